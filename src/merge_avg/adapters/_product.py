"""A product of factors, B @ A times a scaling, in each checkpoint and in an output. A value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from merge_avg.checkpoint import Access, Composed, Name, TensorInfo

_MOST = 1 << 19  # numbers of all factors in a block, which is worked on at a time
_ROWS = 256, 4096


@dataclass(frozen=True)
class Product:
    """The product of factors A and B in each checkpoint; see `checkpoint.Composite`.

    A is (rank, n), B is (m, rank), and a tensor of one number, alpha, may come with them. Its
    scalings are what each checkpoint's product is multiplied by for that of an output, which itself
    is scaled by `scaling`.
    """

    name: str
    consumed: tuple[Name, ...]  # A, B, perhaps alpha
    template: tuple[TensorInfo, ...]
    sources: tuple[tuple[TensorInfo, ...], ...]
    scalings: tuple[Fraction, ...]
    scaling: Fraction
    results: tuple[Composed, ...] = ()
    rank: int = 0  # of the result
    alpha: Fraction | None = None
    # Where the result is exact: checkpoints that have A (0) or B (1) in common, or are alone.
    groups: tuple[tuple[int, tuple[int, ...]], ...] = ()

    def factor(self, checkpoint: int, side: int) -> TensorInfo:
        """Return A (0) or B (1) of a checkpoint, or of the template if that has no weight."""
        return (self.sources[checkpoint] or self.template)[side]

    @property
    def shape(self) -> tuple[int, int]:
        """Return the shape of the product."""
        a, b = self.template[:2]
        return b.shape[0], math.prod(a.shape[1:])

    @property
    def change(self) -> bool:
        """Return that it stands for a change of weights."""
        return True

    @property
    def finite(self) -> bool:
        """Return that no number of it may be NaN or infinity."""
        return True

    @property
    def ranks(self) -> Sequence[int]:
        """Return the rank of each checkpoint's product, zero where it has no weight."""
        return [one[0].shape[0] if one else 0 for one in self.sources]

    @property
    def block(self) -> int:
        """Return how many rows of B, or columns of A, are worked on at a time."""
        least, most = _ROWS
        return min(max(_MOST // max(sum(self.ranks), 1), least), most)

    @property
    def memory(self) -> int:
        """Return the bytes that computing it takes at most."""
        # In float64. Measured: a block, what is stacked upon it, and copies that QR makes of both;
        # and square matrices of the rank of all.
        total = sum(self.ranks)
        return 8 * total * (6 * self.block + 12 * total)

    def compose(self, access: Access) -> None:
        """Read the factors, and write those of each output."""
        from merge_avg.adapters import _mean  # which imports torch

        _mean.compose(self, access)
