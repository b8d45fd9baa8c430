"""The one interface to a mean, and the one place that chooses how it is computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from merge_avg.arithmetic._compiled_mean import CompiledMean, Peek
from merge_avg.arithmetic._kernel import LOOPS
from merge_avg.arithmetic._weights import Weights
from merge_avg.io import Stack

if TYPE_CHECKING:
    from merge_avg.arithmetic._formats import Buffers


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
        """Add the next vectors, a row each.

        Args:
            rows: the vectors, in host memory or where the sum is kept.
            whole: these are all vectors. They have the result's dtype and stay as they are until
                `result`, which can then read, sum and write in one pass.
        """

    def result(self, out: Stack, peek: Peek) -> None:
        """Write the mean, and get ready for the next one of as many vectors.

        Args:
            out: one row, of as many numbers as the vectors have.
            peek: return elements `start` to `stop` of vector number i once more, as one row: the
                float64 sum leaves the rounding of a few elements open. The loops ask for `TILE` of
                them at most, torch for all. Rows that were shown `whole` must not change.

        Raises:
            ValueError: fewer vectors were shown than there are weights, or more.
        """


class MeanFactory:
    """Makes the means of one thread.

    Args:
        device: where sums are kept.
        load_torch: imports torch; called before the first mean that needs it.
    """

    def __init__(self, device: str = "cpu", load_torch: Callable[[], None] = lambda: None) -> None:
        self._device = device
        self._load_torch = load_torch
        self._buffers: Buffers | None = None

    def __call__(self, weights: Weights, dtype: str, sources: Sequence[str]) -> Mean:
        """Return a mean in `dtype` of vectors whose dtypes are among `sources`."""
        # The loops read host memory only, and rely on products that are exact in float64.
        host = self._device == "cpu"
        if LOOPS is not None and host and weights.small and LOOPS.dtypes >= {dtype, *sources}:
            return CompiledMean(LOOPS, weights)
        self._load_torch()
        import torch

        from merge_avg.arithmetic._formats import Buffers
        from merge_avg.arithmetic.torch_mean import TorchMean

        # A thread works on one window at a time, so that all its means can share their scratch.
        self._buffers = self._buffers or Buffers()
        device = torch.device(self._device)
        return TorchMean(weights, getattr(torch, dtype), device, self._buffers)
