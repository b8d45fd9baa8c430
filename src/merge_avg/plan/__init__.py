"""What will be done? Everything about a merge that is known before a byte of payload is read."""

from __future__ import annotations

from merge_avg.plan._job import (
    RECORDED,
    Average,
    Hashes,
    Job,
    Options,
    Outputs,
    marked,
    prepare,
    refuse_report,
    without_collector,
)
from merge_avg.plan._targets import Target
from merge_avg.plan._units import Piece, Staging, Unit, Window, aligned_to_page, batches, is_matrix

__all__ = [
    "RECORDED",
    "Average",
    "Hashes",
    "Job",
    "Options",
    "Outputs",
    "Piece",
    "Staging",
    "Target",
    "Unit",
    "Window",
    "aligned_to_page",
    "batches",
    "is_matrix",
    "marked",
    "prepare",
    "refuse_report",
    "without_collector",
]
