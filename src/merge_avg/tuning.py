"""Sizes that were measured, and that the memory budget counts on.

They stand here because two packages need each of them: the one that allocates, and `plan`, which
promises how much memory a merge takes.
"""

from __future__ import annotations

BLOCK = 1 << 16  # elements of a window that torch sums at a time
CONVERTED = 1 << 19  # numbers that torch holds as float64 at a time: what a core's cache holds
COMPARED = 5 << 12  # numbers that a worker sets aside before it compares checkpoints by them
WHOLE = 1 << 16  # numbers up to which small tensors and small models are compared in full
