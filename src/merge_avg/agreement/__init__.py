"""Do the checkpoints agree? Cosines between them, measured in the same reading as the mean.

Workers give `Sampler`s what they read, these add products to one `Comparison`, and that turns them
into an `Agreement`, on which `judge` gives a `Verdict`.
"""

from __future__ import annotations

from merge_avg.agreement._comparison import Comparison, Products, Sampler
from merge_avg.agreement._cosines import Agreement, TensorAgreement, agreement, agreement_about
from merge_avg.agreement._verdict import LEAST_AGREEMENT, Verdict, groups_of, judge

__all__ = [
    "LEAST_AGREEMENT",
    "Agreement",
    "Comparison",
    "Products",
    "Sampler",
    "TensorAgreement",
    "Verdict",
    "agreement",
    "agreement_about",
    "groups_of",
    "judge",
]
