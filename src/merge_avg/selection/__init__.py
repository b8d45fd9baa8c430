"""Which checkpoints, and how much of each?"""

from __future__ import annotations

from merge_avg.selection._choose import Choice, Weighting, choose
from merge_avg.selection._metadata import read_metadata
from merge_avg.selection._select import Criteria, parse_range
from merge_avg.selection._series import Series

__all__ = ["Choice", "Criteria", "Series", "Weighting", "choose", "parse_range", "read_metadata"]
