"""Chunks of a tensor: boxes that have to cover it, each element once.

    .---.------.     Each box is known by its corners with     + ---- -
    |   |      |     signs: the mixed differences of the       |      |
    |   .--.---.     function that is 1 in the box, and 0      |      |
    |   |  |   |     outside.                                  - ---- +
    '---'--'---'

Functions are equal where their differences are: boxes tile a tensor exactly if their corners add
up to the corners of the tensor. That takes time in proportion to the number of boxes, where
comparing each with each other would take its square.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence

Box = tuple[tuple[int, ...], tuple[int, ...]]  # its first corner, and its extents

_MOST_CUT = 6  # dimensions that a tensor is cut along: a box has two corners for each


def tile(boxes: Sequence[Box], shape: tuple[int, ...]) -> bool:
    """Return whether boxes cover a tensor of this shape, each element once."""
    if any(not len(offset) == len(size) == len(shape) for offset, size in boxes):
        return False
    # Dimensions along which every box has the whole extent make no difference.
    cut = [d for d in range(len(shape)) if any((o[d], s[d]) != (0, shape[d]) for o, s in boxes)]
    if not all(shape) or len(cut) > _MOST_CUT:
        return not all(shape) and not boxes
    corners: Counter[tuple[int, ...]] = Counter()
    whole: Box = ((0,) * len(shape), shape)
    for sign, (offset, size) in [(-1, whole), *((1, box) for box in boxes)]:
        for ends in itertools.product((0, 1), repeat=len(cut)):
            corner = tuple(offset[d] + end * size[d] for d, end in zip(cut, ends, strict=True))
            corners[corner] += sign * (-1) ** sum(ends)
    return not any(corners.values())
