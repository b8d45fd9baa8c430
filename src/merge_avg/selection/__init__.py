"""Which checkpoints, and how much of each? `choose` answers both, for what the user named."""

from __future__ import annotations

from merge_avg.selection._choose import Choice, choose, refuse_place, refuse_trivial
from merge_avg.selection._criteria import Candidate
from merge_avg.selection._metadata import read_metadata
from merge_avg.selection._places import expand

__all__ = [
    "NAMED",
    "Candidate",
    "Choice",
    "choose",
    "expand",
    "read_metadata",
    "refuse_place",
    "refuse_trivial",
]
