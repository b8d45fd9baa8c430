"""Do the checkpoints agree? Cosines between them, measured in the same reading as the mean.

Workers give `Sampler`s what they read, these add products to one `Comparison`, and that turns them
into an `Agreement`.
"""

from __future__ import annotations

from merge_avg.agreement._comparison import Comparison, Sampler
from merge_avg.agreement._cosines import LEAST_AGREEMENT, Agreement, TensorAgreement

__all__ = ["LEAST_AGREEMENT", "Agreement", "Comparison", "Sampler", "TensorAgreement"]
