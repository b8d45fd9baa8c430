"""The mean of rows of float32, float16 and bfloat16 by the compiled loops alone, without torch.

It is the exact weighted mean, rounded once to nearest, ties to even, as in `average`: a sum in
float64 is exact nearly always. Of the rest, those few elements that might have been rounded
otherwise are looked at once more, and computed in integers (Kulisch, 2002: the long accumulator).
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence

from merge_avg.arithmetic._kernel import KNOWN, TILE, Kernel, Places, int64s
from merge_avg.arithmetic._weights import Weights
from merge_avg.checkpoint import BY_NAME
from merge_avg.io import Buffer, Matrix, Stack

Peek = Callable[[int, int, int], Stack]  # vector number, start, stop
_FIRST = int64s([0])
_HELD = 1 << 16  # how many numbers are held at a time for exact arithmetic


class CompiledMean:
    """The weighted mean of vectors that are shown one after the other, or some at a time.

    NaN and infinity follow IEEE 754. `result` leaves the object ready for the next mean of as many
    vectors.

    Args:
        loops: what computes it.
        weights: of the vectors; their products with 24-bit numbers have to fit float64.

    Attributes:
        finite: whether every number so far was finite; of vectors that are held, after `result`.
        fits: whether all of the last result is finite.
    """

    def __init__(self, loops: Kernel, weights: Weights) -> None:
        self._loops = loops
        self._weights = weights
        factors = [float(weight) for weight in weights.integers]
        self._factors = (ctypes.c_double * len(factors))(*factors)
        self._integers = int64s(weights.integers)
        self._total = Buffer(1)
        self._known = Buffer(1)
        self._most = max(_HELD // len(weights), 1)
        self._room = Buffer(8 * len(weights) * min(self._most, TILE))
        self.finite = True
        self.fits = True
        self._count = 0
        self._whole: Matrix | None = None

    def extend(self, rows: Stack, *, whole: bool = False) -> None:
        """Add the next vectors, a row each."""
        rows = _matrix(rows)
        if whole:
            self._whole, self._count = rows, rows.count
            return
        if len(self._total) < 8 * rows.numel:
            self._total = Buffer(8 * rows.numel)
            self._known = Buffer(KNOWN * -(-rows.numel // TILE))
        at = ctypes.addressof(self._factors) + 8 * self._count
        where = self._total.address, self._known.address
        finite = self._loops.add(rows, at, *where, begun=self._count > 0)
        self.finite = finite and (self.finite or not self._count)
        self._count += rows.count

    def result(self, out: Stack, peek: Peek) -> None:
        """Write the mean, and look again at elements whose rounding the float64 sum leaves open."""
        out = _matrix(out)
        if self._count != len(self._weights):
            raise ValueError(f"{self._count} of {len(self._weights)} vectors have been shown")
        step = self._step(out)
        self.fits, at = True, 0
        while at < out.numel:
            fits, at, open_ = step(at)
            self.fits &= fits
            for first in range(0, len(open_), self._most):
                self._settle(out, open_[first : first + self._most], peek)
        self._count = 0

    def _step(self, out: Matrix) -> Callable[[int], tuple[bool, int, Places]]:
        """What writes the mean from a column on, and returns what `Kernel.mean` does."""
        divisor = float(self._weights.total)
        whole, self._whole = self._whole, None
        if whole is None:
            sums = self._total.address, self._known.address, self._count, divisor
            return functools.partial(self._loops.mean, *sums, out)
        self.finite = True

        def step(at: int) -> tuple[bool, int, Places]:
            factors = ctypes.addressof(self._factors)
            finite, written = self._loops.whole(whole, factors, divisor, out, at)
            self.finite &= finite
            return written

        return step

    def _settle(self, out: Matrix, places: Sequence[int], peek: Peek) -> None:
        """Writes some elements of a tile again."""
        start, stop = places[0], places[-1] + 1
        runs = int64s([number for place in places for number in (place - start, 1)])
        for number in range(len(self._weights)):
            target = self._room.address + 8 * number * len(places)
            self._loops.take(_matrix(peek(number, start, stop)), runs, _FIRST, target, len(places))
        values = self._room.rows(len(self._weights), len(places), BY_NAME["float64"])
        self.fits &= self._loops.settle(values, self._integers, self._weights.total, places, out)


def _matrix(rows: Stack) -> Matrix:
    """Rows in host memory, where the loops find them."""
    if isinstance(rows, Matrix):
        return rows
    dtype = BY_NAME[str(rows.dtype).removeprefix("torch.")]
    count, numel = rows.shape
    return Matrix(rows.data_ptr(), dtype, count, numel, rows.stride(0), rows)
