"""What will be done? Everything about a merge that is known before a byte of payload is read.

`prepare` scans the checkpoints and makes a `Job`: which tensor of one is which of another, the
units to average, where each goes in the outputs, and the windows that fit the memory budget. What
headers tell of an error shows here, before hours of reading.
"""

from __future__ import annotations

from merge_avg.plan._budget import Budget
from merge_avg.plan._job import Job, OutputSpec, prepare, refuse_inputs, without_collector
from merge_avg.plan._provenance import Hashes, Record, RecordedInput, read_record
from merge_avg.plan._targets import FILE, OutputLayout, Target
from merge_avg.plan._units import Restride, Unit, aligned_to_page
from merge_avg.plan._windows import Piece, Window, batches

__all__ = [
    "FILE",
    "Budget",
    "Hashes",
    "Job",
    "OutputLayout",
    "OutputSpec",
    "Piece",
    "Record",
    "RecordedInput",
    "Restride",
    "Target",
    "Unit",
    "Window",
    "aligned_to_page",
    "batches",
    "prepare",
    "read_record",
    "refuse_inputs",
    "without_collector",
]
