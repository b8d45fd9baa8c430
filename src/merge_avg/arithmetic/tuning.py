"""Sizes that were measured, and that the memory budget counts on.

Two packages need each of them: the one that allocates, and `plan`, which promises how much memory a
merge takes.
"""

from __future__ import annotations

# Elements of a window that torch sums at a time: sum and scratch tensors, each 512 KiB of float64,
# stay in a core's cache from one row to the next.
BLOCK = 1 << 16

# Numbers that torch converts to float64 at a time. More rows at once save calls, as long as a
# core's cache still holds them when they are summed.
CONVERTED = 1 << 19

# Numbers that a worker sets aside before it compares checkpoints by them.
COMPARED = 5 << 12

# Numbers up to which small tensors and small models are compared in full, not by a sample.
WHOLE = 1 << 16
