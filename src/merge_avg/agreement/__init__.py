"""Do the checkpoints agree? Cosines between them, measured in the same reading as the mean."""

from __future__ import annotations

from merge_avg.agreement._comparison import Comparison, Sampler
from merge_avg.agreement._cosines import Agreement

__all__ = ["Agreement", "Comparison", "Sampler"]
