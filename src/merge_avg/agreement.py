"""Whether checkpoints agree: cosines between their matrices, from a sample of the same reading.

The mean of networks that have nothing to do with each other is no network, and no error says so.
What tells is the cosine between the checkpoints over their tensors of two or more dimensions: the
scales of norm layers lie near 1 everywhere and would hide it.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from merge_avg.plan import Unit, Window
from merge_avg.policies import LEAST_AGREEMENT

# Of every block of a tensor the first 1/64 is looked at, which costs next to nothing; of small
# models all. What is looked at does not depend on windows, so neither on threads nor on memory.
_BLOCK = 8192
_SHARE = 64
_SMALL = 1 << 17  # elements of all checkpoints together


@dataclass(frozen=True)
class Agreement:
    """How far checkpoints agree, as cosines over their matrices; of a sample of the elements.

    Attributes:
        mean: over all pairs of checkpoints.
        pairs: the cosine of each checkpoint with each, 1 on the diagonal.
        each: the mean over the pairs of each checkpoint.
        shrinkage: the norm of the plain mean over the mean of the norms.
        elements: how many of each checkpoint's elements were looked at.
    """

    mean: float
    pairs: tuple[tuple[float, ...], ...]
    each: tuple[float, ...]
    shrinkage: float
    elements: int

    @property
    def odd(self) -> int | None:
        """The number of the one checkpoint that agrees with no other, where the others do."""
        count = len(self.each)
        if count < 3:
            return None
        worst = min(range(count), key=self.each.__getitem__)
        rest = [self.pairs[i][j] for i in range(count) for j in range(i) if worst not in (i, j)]
        return worst if min(rest) >= LEAST_AGREEMENT > self.each[worst] else None


class Comparison:
    """Sums of products of checkpoints, to which workers add from any thread.

    Args:
        checkpoints: the numbers of those that are compared.
        units: what they are compared by; of these, tensors of two or more dimensions count.
    """

    def __init__(self, checkpoints: Sequence[int], units: Iterable[Unit]) -> None:
        count = len(checkpoints)
        matrices = [unit for unit in units if count > 1 and _compares(unit, set(checkpoints))]
        self._matrices = {id(unit) for unit in matrices}
        total = sum(map(len, matrices))
        self._share = 1 if total * count <= _SMALL else _SHARE
        self._gram = torch.zeros(count, count, dtype=torch.float64)
        self._elements = 0
        self._lock = threading.Lock()

    def places(self, window: Window) -> Tensor | None:
        """The places of a window's elements that are compared; None where there are none."""
        found = []
        at = 0
        for piece in window:
            if id(piece.unit) in self._matrices:
                places = _sampled(piece.start, piece.stop, len(piece.unit), self._share)
                found.append(places + at if at else places)
            at += piece.stop - piece.start
        return torch.cat(found) if len(found) > 1 else found[0] if found else None

    def add(self, samples: Sequence[Sequence[Tensor]]) -> None:
        """Adds elements of all checkpoints: for some windows, parts of a matrix with a row each."""
        columns = [torch.cat([_real(part) for part in parts]) for parts in samples]
        whole = torch.cat(columns, dim=1).to("cpu", torch.float64)
        products = whole @ whole.T
        with self._lock:
            self._gram += products
            self._elements += whole.shape[1]

    def result(self) -> Agreement | None:
        """The agreement; None where there is nothing to compare."""
        count = len(self._gram)
        norms = self._gram.diagonal().sqrt()
        if count < 2 or not bool((norms > 0).all()) or not bool(self._gram.isfinite().all()):
            return None
        cosines = (self._gram / norms[:, None] / norms[None, :]).clamp(-1, 1)
        cosines.fill_diagonal_(1)
        each = (cosines.sum(dim=1) - 1) / (count - 1)
        total = math.sqrt(max(float(self._gram.sum()), 0.0)) / count
        return Agreement(
            float(each.mean()),
            tuple(tuple(row) for row in cosines.tolist()),
            tuple(each.tolist()),
            total / float(norms.mean()),
            self._elements,
        )


def _compares(unit: Unit, checkpoints: set[int]) -> bool:
    """Whether a unit is of a matrix that all checkpoints have."""
    return (
        unit.kind == "mean"
        and any(len(info.shape) > 1 for _, info in unit.members)
        and checkpoints <= {source.checkpoint for source in unit.sources}
    )


def _real(values: Tensor) -> Tensor:
    return torch.view_as_real(values).flatten(1) if values.is_complex() else values


def _sampled(start: int, stop: int, size: int, share: int) -> Tensor:
    """The elements `start` to `stop` of `size` that are looked at, counted from `start`."""
    if share == 1:
        return torch.arange(stop - start)
    last = size // _BLOCK * _BLOCK
    pattern = _pattern(start % _BLOCK, stop - start, share)
    if stop <= last:
        return pattern
    few = -(-(size - last) // share)  # the last block is shorter, and so is what is taken of it
    return pattern[pattern + start < last + few]


@functools.lru_cache(maxsize=64)
def _pattern(offset: int, length: int, share: int) -> Tensor:
    """The same for elements that begin `offset` after the start of a block."""
    blocks = torch.arange(0, offset + length, _BLOCK)
    places = (blocks[:, None] + torch.arange(_BLOCK // share)[None, :]).flatten() - offset
    return places[(places >= 0) & (places < length)]
