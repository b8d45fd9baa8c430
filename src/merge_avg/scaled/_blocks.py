"""Blocks: which elements of a tensor have one scale, and in which order they are worked on.

    codes [m, n], scales [ceil(m / bm), ceil(n / bn)]

      strip 0 |  s00  |  s01  |  s02  |     the block rows that are worked on together: their
              |       |       |       |     scales are neighbours, and so are their codes
      strip 1 |  s10  |  s11  |  s12  |
              |.......|.......|.......|     windows: whole rows, or parts of one, of a strip

No block lies in two strips. So a strip is all that has to be looked at before scales are known.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Window:
    """A rectangle of a strip whose elements lie one after the other, in whole rows or one row."""

    start: int  # of its first element in the tensor
    rows: int
    columns: int
    row: int  # of its first row in the strip
    column: int  # of its first column

    @property
    def stop(self) -> int:
        """Return one past its last element."""
        return self.start + self.rows * self.columns


@dataclass(frozen=True, slots=True)
class Strip:
    """Neighbouring blocks: `rows` rows of `columns` elements, cut into blocks."""

    start: int  # of its first element in the tensor
    rows: int
    columns: int
    block: tuple[int, int]  # the rows and columns of a block; at the edges there may be fewer
    first: int  # the number of its first block

    @property
    def across(self) -> int:
        """Return the number of blocks beside each other."""
        return -(-self.columns // self.block[1])

    @property
    def blocks(self) -> int:
        """Return the number of its blocks."""
        return -(-self.rows // self.block[0]) * self.across

    def windows(self, most: int) -> Iterator[Window]:
        """Yield its windows of up to `most` elements, in order.

        The columns of a window begin with a block, or lie in a single one.
        """
        if self.columns <= most:
            step = most // self.columns
            for row in range(0, self.rows, step):
                rows, at = min(step, self.rows - row), row * self.columns
                yield Window(self.start + at, rows, self.columns, row, 0)
            return
        width = self.block[1]
        # Several whole blocks at a time, or parts of one.
        run = most // width * width or width
        for row in range(self.rows):
            for left in range(0, self.columns, run):
                right = min(left + run, self.columns)
                for column in range(left, right, most):
                    columns, at = min(most, right - column), row * self.columns + column
                    yield Window(self.start + at, 1, columns, row, column)


@dataclass(frozen=True, slots=True)
class Blocks:
    """How a tensor is cut into blocks, as `lead` matrices of (rows, columns).

    The blocks are numbered as their scales lie.
    """

    lead: int
    rows: int
    columns: int
    block: tuple[int, int]

    @property
    def numel(self) -> int:
        """Return the number of elements."""
        return self.lead * self.rows * self.columns

    @property
    def across(self) -> int:
        """Return the number of blocks beside each other."""
        return -(-self.columns // self.block[1])

    @property
    def count(self) -> int:
        """Return the number of blocks."""
        return self.lead * -(-self.rows // self.block[0]) * self.across

    @property
    def largest_strip(self) -> int:
        """Return the number of blocks in a strip that is no longer than its blocks demand."""
        return 1 if self.block[0] == 1 else self.across

    def strips(self, most: int) -> Iterator[Strip]:
        """Yield strips of up to `most` elements, or of as few blocks as there can be, in order."""
        height, width = self.block
        if self.rows == self.lead == 1:  # runs of elements: blocks lie one behind the other
            step = max(most // width, 1)
            for first in range(0, self.across, step):
                start = first * width
                stop = min(start + step * width, self.columns)
                yield Strip(start, 1, stop - start, self.block, first)
            return
        tall = max(most // (height * self.columns), 1) * height
        down = -(-self.rows // height)
        for matrix in range(self.lead):
            for row in range(0, self.rows, tall):
                start = (matrix * self.rows + row) * self.columns
                first = (matrix * down + row // height) * self.across
                rows = min(tall, self.rows - row)
                yield Strip(start, rows, self.columns, self.block, first)


def cut(shape: Shape, block: Shape) -> Blocks | None:
    """Return the blocks of a tensor, by their extents; None where they are of an unusual kind."""
    extents, sizes = list(shape), list(block)
    # Blocks that take all of the last dimension are runs of the one before.
    while len(extents) > 1 and sizes[-1] == extents[-1]:
        extent, _ = extents.pop(), sizes.pop()
        extents[-1] *= extent
        sizes[-1] *= extent
    columns, width = extents[-1], sizes[-1]
    if columns % width == 0 and all(size == 1 for size in sizes[:-1]):
        return Blocks(1, 1, math.prod(extents), (1, width))
    *lead, rows = extents[:-1] or [1]
    *single, height = sizes[:-1] or [1]
    if any(size != 1 for size in single):
        return None
    return Blocks(math.prod(lead), rows, columns, (height, width))


def extents(shape: Shape, scales: Shape, usual: Sequence[int] = ()) -> Shape | None:
    """Return the extents of a block, from the shapes of the codes and of their scales.

    `usual` are the extents of blocks in the last dimensions, where they are known. None where the
    scales are no scales of blocks.
    """
    if math.prod(scales) == 1:
        return shape
    if len(scales) == 1 and len(shape) > 1:  # one for each row, or each column
        fits = [k for k, extent in enumerate(shape) if extent == scales[0]]
        if len(fits) != 1:
            return None
        return tuple(1 if k == fits[0] else extent for k, extent in enumerate(shape))
    if len(scales) != len(shape) or 0 in scales or scales == shape:
        return None
    known = ((0,) * len(shape) + tuple(usual))[-len(shape) :]
    found = []
    for extent, count, size in zip(shape, scales, known, strict=True):
        if count == 1:
            found.append(extent)
        elif size and -(-extent // size) == count:
            found.append(size)
        elif count <= extent and extent % count == 0:
            found.append(extent // count)
        else:
            return None
    return tuple(found)
