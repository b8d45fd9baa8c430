"""The mean of vectors of float32, float16 and bfloat16 by the compiled loops, without torch.

A sum in float64 is exact nearly always. Where it is not, the loops report the few elements that
might be rounded otherwise. These are read once more and computed in integers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

from merge_avg.arithmetic._kernel import KNOWN, TILE, Kernel, Written, int64s
from merge_avg.arithmetic._weights import Weights
from merge_avg.checkpoint import BY_NAME
from merge_avg.io import Buffer, Matrix, Stack

Peek = Callable[[int, int, int], Stack]  # of vector number, start and stop
_FIRST_ROW = int64s([0])
_SETTLED = 1 << 16  # how many numbers are held at a time for exact arithmetic


class CompiledMean:
    """A `Mean` for weights that are small, so that products with them are exact in float64."""

    def __init__(self, loops: Kernel, weights: Weights) -> None:
        self._loops = loops
        self._weights = weights
        self._factors = (ctypes.c_double * len(weights))(*weights.integers)
        self._integers = int64s(weights.integers)
        self._divisor = float(weights.total)
        # Both grow to the longest vector, and are used for one mean after the other.
        self._total = Buffer(1)
        self._known = Buffer(1)
        # Exact arithmetic needs elements of all vectors at once: of many vectors, few at a time.
        self._most = max(_SETTLED // len(weights), 1)
        self._room = Buffer(8 * len(weights) * min(self._most, TILE))
        self.finite = True
        self.fits = True
        self._count = 0
        self._whole: Matrix | None = None

    def extend(self, rows: Stack, *, whole: bool = False) -> None:
        rows = _matrix(rows)
        if whole:  # `result` reads them, tile by tile
            self._whole, self._count, self.finite = rows, rows.count, True
            return
        if len(self._total) < 8 * rows.numel:
            self._total = Buffer(8 * rows.numel)
            self._known = Buffer(KNOWN * -(-rows.numel // TILE))
        factors = ctypes.addressof(self._factors) + 8 * self._count
        total, known = self._total.address, self._known.address
        finite = self._loops.add(rows, factors, total, known, begun=self._count > 0)
        self.finite = finite and (self.finite or not self._count)
        self._count += rows.count

    def result(self, out: Stack, peek: Peek) -> None:
        if self._count != len(self._weights):
            raise ValueError(f"{self._count} of {len(self._weights)} vectors have been shown")
        out = _matrix(out)
        self.fits, at = True, 0
        while at < out.numel:
            fits, at, open_ = self._write(out, at)
            self.fits &= fits
            for first in range(0, len(open_), self._most):
                self._settle(out, open_[first : first + self._most], peek)
        self._count, self._whole = 0, None

    def _write(self, out: Matrix, at: int) -> Written:
        """Write the mean from a column on, up to a tile with elements that are open."""
        if self._whole is None:
            total, known = self._total.address, self._known.address
            return self._loops.mean(total, known, self._count, self._divisor, out, at)
        factors = ctypes.addressof(self._factors)
        finite, written = self._loops.whole(self._whole, factors, self._divisor, out, at)
        self.finite &= finite
        return written

    def _settle(self, out: Matrix, places: Sequence[int], peek: Peek) -> None:
        """Compute some elements of a tile in integers, and write them again."""
        # One read for each vector, of all that lies between the first and the last: a tile at most.
        start, stop = places[0], places[-1] + 1
        runs = int64s([number for place in places for number in (place - start, 1)])
        for number in range(len(self._weights)):
            target = self._room.address + 8 * number * len(places)
            rows = _matrix(peek(number, start, stop))
            self._loops.take(rows, runs, _FIRST_ROW, target, len(places))
        values = self._room.rows(len(self._weights), len(places), BY_NAME["float64"])
        self.fits &= self._loops.settle(values, self._integers, self._weights.total, places, out)


def _matrix(rows: Stack) -> Matrix:
    """Return where rows lie in host memory."""
    if isinstance(rows, Matrix):
        return rows
    dtype = BY_NAME[str(rows.dtype).removeprefix("torch.")]
    count, numel = rows.shape
    return Matrix(rows.data_ptr(), dtype, count, numel, rows.stride(0), rows)
