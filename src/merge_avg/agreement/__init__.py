"""Do the checkpoints agree? Cosines between them, measured in the same reading as the mean."""

from __future__ import annotations

from merge_avg.agreement._comparison import Comparison, Sampler
from merge_avg.agreement._cosines import LEAST_AGREEMENT, Agreement

__all__ = ["LEAST_AGREEMENT", "Agreement", "Comparison", "Sampler"]
