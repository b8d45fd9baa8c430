"""How are bytes read and published?

Files are read by offset and checked on the way; an output appears whole, or not at all.
"""

from __future__ import annotations

from merge_avg.io._memory import Buffer, Matrix, Scratch, Stack, same, without_collector
from merge_avg.io._output import Output, OutputFile, Sink, refuse_loss, refuse_output, workplace
from merge_avg.io._platform import (
    FLAGS,
    LIBRARY_SUFFIX,
    READS_AHEAD,
    WINDOWS,
    ask_for,
    cores,
    leads_elsewhere,
    read_fully,
    sync,
)
from merge_avg.io._reader import Reader, Request, Strip, Tap
from merge_avg.io._site import SharedOutput, Site
from merge_avg.io._temporary import TEMPORARY, remove

__all__ = [
    "FLAGS",
    "LIBRARY_SUFFIX",
    "READS_AHEAD",
    "TEMPORARY",
    "WINDOWS",
    "Buffer",
    "Matrix",
    "Output",
    "OutputFile",
    "Reader",
    "Request",
    "Scratch",
    "SharedOutput",
    "Sink",
    "Site",
    "Stack",
    "Strip",
    "Tap",
    "ask_for",
    "cores",
    "leads_elsewhere",
    "read_fully",
    "refuse_loss",
    "refuse_output",
    "remove",
    "same",
    "sync",
    "without_collector",
    "workplace",
]
