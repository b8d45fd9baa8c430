"""What will be done? Everything about a merge that is known before a byte of payload is read.

`prepare` scans the checkpoints and makes a `Job`: which tensor of one is which of another, the
units to average, where each goes in the outputs, and the windows that fit the memory budget. What
headers tell of an error shows here, before hours of reading.
"""

from __future__ import annotations

from merge_avg.plan._alignment import without
from merge_avg.plan._budget import Piece, Window, batches, spans
from merge_avg.plan._job import (
    Job,
    OutputSpec,
    prepare,
    refuse_inputs,
    refuse_values,
)
from merge_avg.plan._masters import Masters, roles_of
from merge_avg.plan._provenance import Hashes, Record, read_record
from merge_avg.plan._targets import FILE
from merge_avg.plan._units import Restride, Unit, aligned_to_page

__all__ = [
    "FILE",
    "Hashes",
    "Job",
    "Masters",
    "OutputSpec",
    "Piece",
    "Record",
    "Restride",
    "Unit",
    "Window",
    "aligned_to_page",
    "batches",
    "prepare",
    "read_record",
    "refuse_inputs",
    "refuse_values",
    "roles_of",
    "spans",
    "without",
]
