"""The one interface to a mean, the mean by the compiled loops, and the choice of who computes it.

The loops average float32, float16 and bfloat16 without torch. Their sum in float64 is exact nearly
always. Where it is not, they report the few elements that might be rounded otherwise. These are
read once more and computed in integers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from merge_avg.arithmetic._kernel import KNOWN, LOOPS, TILE, Kernel, int64s
from merge_avg.arithmetic._weights import Weights
from merge_avg.checkpoint import BY_NAME
from merge_avg.io import Buffer, Matrix, Stack

if TYPE_CHECKING:
    from merge_avg.arithmetic._sums import Buffers

Peek = Callable[[int, int, int], Stack]  # of vector number, start and stop
SETTLED = 1 << 16  # how many numbers are held at a time for exact arithmetic


class Mean(Protocol):
    """The weighted mean of vectors that are shown one after the other, or some at a time.

    It is exact and rounded once to nearest, ties to even. NaN and infinity follow IEEE 754.
    """

    @property
    def finite(self) -> bool:
        """True if every number shown so far was finite; with `whole`, known after `result`."""

    @property
    def fits(self) -> bool:
        """True if all of the last result is finite. Ask before its memory is used again."""

    def extend(self, rows: Stack, *, whole: bool = False) -> None:
        """Add the next vectors, a row each, in host memory or where the sum is kept.

        With `whole`, these are all vectors. They have the result's dtype and stay as they are until
        `result`, which can then read, sum and write in one pass.
        """

    def result(self, out: Stack, peek: Peek) -> None:
        """Write the mean to `out`, a row, and get ready for the next one of as many vectors.

        `peek` returns elements `start` to `stop` of vector number i once more, as one row: the
        float64 sum leaves the rounding of a few elements open. The loops ask for `TILE` of them at
        most, torch for all. Rows that were shown `whole` must not change. Fewer vectors than there
        are weights, or more, are a ValueError.
        """


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
        self._most = max(SETTLED // len(weights), 1)
        self._room = Buffer(8 * len(weights) * min(self._most, TILE))
        self.finite = self.fits = True
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
        factors = ctypes.addressof(self._factors)
        total, known = self._total.address, self._known.address
        self.fits, at = True, 0
        while at < out.numel:  # up to the end, or to a tile with elements that are open
            if self._whole is None:
                written = self._loops.mean(total, known, self._count, self._divisor, out, at)
            else:
                finite, written = self._loops.whole(self._whole, factors, self._divisor, out, at)
                self.finite &= finite
            fits, at, open_ = written
            self.fits &= fits
            for first in range(0, len(open_), self._most):
                self._settle(out, open_[first : first + self._most], peek)
        self._count, self._whole = 0, None

    def _settle(self, out: Matrix, places: Sequence[int], peek: Peek) -> None:
        """Compute some elements of a tile in integers, and write them again."""
        # One read for each vector, of all that lies between the first and the last: a tile at most.
        start, stop = places[0], places[-1] + 1
        runs = int64s([number for place in places for number in (place - start, 1)])
        for number in range(len(self._weights)):
            target = self._room.address + 8 * number * len(places)
            self._loops.take(_matrix(peek(number, start, stop)), runs, target)
        values = self._room.rows(len(self._weights), len(places), BY_NAME["float64"])
        self.fits &= self._loops.settle(values, self._integers, self._weights.total, places, out)


class MeanFactory:
    """Makes the means of one thread, with sums kept on `device`.

    The thread takes no subnormal numbers for zero any more, whatever its parent was told.
    `load_torch` imports torch; it is called before the first mean that needs it.
    """

    def __init__(self, device: str = "cpu", load_torch: Callable[[], None] = lambda: None) -> None:
        self._device = device
        self._load_torch = load_torch
        self._buffers: Buffers | None = None
        if LOOPS is not None:
            LOOPS.default_rounding()

    def __call__(self, weights: Weights, dtype: str, sources: Sequence[str]) -> Mean:
        """Return a mean in `dtype` of vectors whose dtypes are among `sources`."""
        # The loops read host memory only, and rely on products that are exact in float64.
        host = self._device == "cpu"
        if LOOPS is not None and host and weights.small and LOOPS.dtypes >= {dtype, *sources}:
            return CompiledMean(LOOPS, weights)
        self._load_torch()
        import torch

        from merge_avg.arithmetic._sums import Buffers
        from merge_avg.arithmetic.torch_mean import TorchMean

        torch.set_flush_denormal(False)
        # A thread works on one window at a time, so that all its means can share their scratch.
        self._buffers = self._buffers or Buffers()
        device = torch.device(self._device)
        return TorchMean(weights, getattr(torch, dtype), device, self._buffers)


def _matrix(rows: Stack) -> Matrix:
    if isinstance(rows, Matrix):
        return rows
    dtype = BY_NAME[str(rows.dtype).removeprefix("torch.")]
    count, numel = rows.shape
    return Matrix(rows.data_ptr(), dtype, count, numel, rows.stride(0), rows)
