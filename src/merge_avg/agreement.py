"""Whether checkpoints agree: cosines between their matrices, from a sample of the same reading.

The mean of networks that have nothing to do with each other is no network, and no error says so.
What tells is the cosine between the checkpoints over their tensors of two or more dimensions: the
scales of norm layers lie near 1 everywhere and would hide it. Fine-tunes of one base are nearly
parallel whatever they learned, so they are also compared by their differences to it.

What is kept does not grow with the elements: the Gram matrices of 16 parts of the model, from which
the cosines and their error follow, and for each tensor the squared norms and the products with the
sum. No N x N matrix is kept for a tensor: with many of both that would be the largest thing here.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from merge_avg.budget import MULTIPLIED, WHOLE
from merge_avg.plan import Unit, Window, is_matrix
from merge_avg.policies import LEAST_AGREEMENT

# Of every block of a tensor the first 1/64 is looked at, which costs next to nothing; of small
# models more, up to all, and the smallest tensors of any model whole. What is looked at does not
# depend on windows, so neither on threads nor on memory.
_BLOCK = 8192
_TAKEN = _BLOCK // 64
_FEW = 16  # of a tensor of which fewer elements are looked at, nothing is said
# The error is estimated by leaving out one of these groups at a time (the delete-a-group jackknife,
# Kott 2001). Each is made of many short stretches from all over the model.
_GROUPS = 16
_STRETCHES = 32 * _GROUPS
_STRETCH = 1 << 17  # elements, at most
_SHORT = 64  # elements of a tensor below which many tensors are summed at a time


@dataclass(frozen=True, slots=True)
class TensorAgreement:
    """How far checkpoints agree about one tensor.

    Attributes:
        name: in the template; of tensors that share memory, that of one.
        size: its elements.
        elements: how many of them were looked at.
        mean: the mean cosine, each pair weighted by the product of its norms; None where fewer than
            two checkpoints hold anything but zeros, or too few elements were looked at.
        error: about the standard error of `mean`; 0 where all elements were looked at.
        norm: the root mean square of the checkpoints' norms.
        distances: of each checkpoint from the mean of all, over `norm`.
    """

    name: str
    size: int
    elements: int
    mean: float | None
    error: float
    norm: float
    distances: tuple[float, ...]


@dataclass(frozen=True)
class Agreement:
    """How far checkpoints agree, as cosines over their matrices; of a sample of the elements.

    Attributes:
        mean: over all pairs of checkpoints.
        error: the standard error of `mean`, from the sampling; 0 where all elements were looked at.
        pairs: the cosine of each checkpoint with each, 1 on the diagonal; None for a checkpoint of
            zeros (or one that does not differ from the base).
        each: the mean over the pairs of each checkpoint.
        errors: the standard error of each of these.
        shrinkage: the norm of the plain mean over the mean of the norms.
        size: how many elements each checkpoint's matrices have.
        elements: how many of them were looked at.
        tensors: the same for each matrix, in the template's order.
    """

    mean: float
    error: float
    pairs: tuple[tuple[float | None, ...], ...]
    each: tuple[float | None, ...]
    errors: tuple[float, ...]
    shrinkage: float
    size: int
    elements: int
    tensors: tuple[TensorAgreement, ...]

    @property
    def odd(self) -> int | None:
        """The number of the one checkpoint that agrees with no other, where the others do."""
        known = {i: value for i, value in enumerate(self.each) if value is not None}
        if len(known) < 3:
            return None
        worst = min(known, key=known.__getitem__)
        rest = [self.pairs[i][j] for i in known for j in known if j < i and worst not in (i, j)]
        least = min((one for one in rest if one is not None), default=-1.0)
        return worst if least >= LEAST_AGREEMENT > known[worst] else None


@dataclass(frozen=True, slots=True)
class _Matrix:
    """A unit that is compared: its number, its place among all, and what is looked at."""

    unit: Unit
    number: int
    offset: int
    taken: int  # elements of a block
    based: bool  # whether the base has it

    def before(self, place: int) -> int:
        """How many elements before a place are looked at."""
        last = len(self.unit) // _BLOCK * _BLOCK
        if place <= last:
            return place // _BLOCK * self.taken + min(place % _BLOCK, self.taken)
        few = -(-(len(self.unit) - last) * self.taken // _BLOCK)
        return last // _BLOCK * self.taken + min(place - last, few)

    @property
    def elements(self) -> int:
        """How many elements are looked at."""
        return self.before(len(self.unit))


@dataclass(frozen=True, slots=True)
class _Run:
    """Neighbours among the elements of a window that are looked at."""

    matrix: _Matrix
    group: int
    count: int


class Comparison:
    """Sums of products of checkpoints, to which workers add from any thread.

    Args:
        checkpoints: the numbers of those that are compared.
        units: what they are compared by; of these, tensors of two or more dimensions count.
        base: the number of a checkpoint whose differences to the others are compared as well.
    """

    def __init__(
        self, checkpoints: Sequence[int], units: Iterable[Unit], base: int | None = None
    ) -> None:
        count = len(checkpoints)
        found = [unit for unit in units if count > 1 and _compares(unit, set(checkpoints))]
        sizes = [len(unit) for unit in found]
        self._size = sum(sizes)
        self._checkpoints = tuple(checkpoints)
        self._base = base
        self._stretch = min(max(self._size // _STRETCHES, 1), _STRETCH)
        taken = _BLOCK * WHOLE // max(self._size * count, 1)
        taken = min(max(taken, _TAKEN), _BLOCK)
        small = _smallest(sizes, WHOLE // max(count, 1))
        self._matrices: dict[int, _Matrix] = {}
        offset = 0
        for number, unit in enumerate(found):
            based = base in {source.checkpoint for source in unit.sources}
            whole = _BLOCK if number in small else taken
            self._matrices[id(unit)] = _Matrix(unit, number, offset, whole, based)
            offset += len(unit)
        # Of the checkpoints themselves, and of their differences to the base, or to the first.
        self._grams = torch.zeros(2 * _GROUPS, 2, count, count, dtype=torch.float64)
        self._rows = torch.zeros(len(found), 2, 2 * count, dtype=torch.float64)
        self._lock = threading.Lock()

    def beside(self, window: Window) -> set[int]:
        """The numbers of the sources of a window that are compared and not averaged."""
        if all(id(piece.unit) not in self._matrices for piece in window):
            return set()
        sources = window[0].unit.sources
        return {k for k, source in enumerate(sources) if source.checkpoint == self._base}

    def places(self, window: Window) -> Tensor | None:
        """The places of a window's elements that are compared; None where there are none."""
        found = []
        at = 0
        for piece in window:
            matrix = self._matrices.get(id(piece.unit))
            if matrix is not None:
                places = _sampled(piece.start, piece.stop, len(piece.unit), matrix.taken)
                found.append(places + at if at else places)
            at += piece.stop - piece.start
        return torch.cat(found) if len(found) > 1 else found[0] if found else None

    def add(self, samples: Sequence[tuple[Window, Sequence[Tensor]]]) -> None:
        """Adds elements of all checkpoints: for some windows, parts of a matrix with a row each."""
        for held, runs in self._batches(samples):
            rows = torch.cat([part.to("cpu", torch.float64)[order] for part, order in held], dim=1)
            pair = torch.stack([rows[1:], rows[1:] - rows[0]])
            lengths = [run.count for run in runs]
            scales = [len(run.matrix.unit) / run.matrix.elements for run in runs]
            if any(scale != 1 for scale in scales):
                roots = torch.tensor(scales, dtype=torch.float64).sqrt_()
                pair *= roots.repeat_interleave(torch.tensor(lengths))
            numbers = torch.tensor([run.matrix.number for run in runs])
            if len(rows[0]) >= _SHORT * len(runs):
                groups = [run.group for run in runs]
                grams = _products(pair, lengths)
                sums = torch.cat([grams.diagonal(dim1=2, dim2=3), grams.sum(dim=3)], dim=2)
            else:
                groups, grouped = _merged([run.group for run in runs], lengths)
                grams = _products(pair, grouped)
                squares = torch.cat([pair * pair, pair * pair.sum(dim=1, keepdim=True)], dim=1)
                where = torch.arange(len(runs)).repeat_interleave(torch.tensor(lengths))
                sums = squares.new_zeros(*squares.shape[:2], len(runs))
                sums = sums.index_add_(2, where, squares).permute(2, 0, 1)
            with self._lock:
                self._grams.index_add_(0, torch.tensor(groups), grams)
                self._rows.index_add_(0, numbers, sums)

    def _batches(
        self, samples: Sequence[tuple[Window, Sequence[Tensor]]]
    ) -> Iterator[tuple[list[tuple[Tensor, list[int]]], list[_Run]]]:
        """A few columns at a time, with the order that their rows are wanted in."""
        limit = max(MULTIPLIED // (len(self._checkpoints) + 1), 1)
        held: list[tuple[Tensor, list[int]]] = []
        runs: list[_Run] = []
        room = limit
        for window, parts in samples:
            rows = torch.cat([_real(part) for part in parts]) if len(parts) > 1 else _real(parts[0])
            order = self._order(window[0].unit)
            begin = at = 0
            for run in self._runs(window):
                rest = run.count
                while rest:
                    some = min(rest, room)
                    runs.append(_Run(run.matrix, run.group, some))
                    rest, room, at = rest - some, room - some, at + some
                    if not room:
                        yield [*held, (rows[:, begin:at], order)], runs
                        held, runs, room, begin = [], [], limit, at
            if begin < at:
                held.append((rows[:, begin:at], order))
        if runs:
            yield held, runs

    def _order(self, unit: Unit) -> list[int]:
        """The rows of a sample: that of the base, or of the first, and those of the checkpoints."""
        wanted = {*self._checkpoints, self._base}
        there = [one.checkpoint for one in unit.sources if one.checkpoint in wanted]
        rows = [there.index(checkpoint) for checkpoint in self._checkpoints]
        return [there.index(self._base) if self._base in there else rows[0], *rows]

    def _runs(self, window: Window) -> Iterator[_Run]:
        """What is looked at of a window, cut where tensors end and where groups do."""
        for piece in window:
            matrix = self._matrices.get(id(piece.unit))
            if matrix is None:
                continue
            width = 2 if piece.unit.dtype.kind == "complex" else 1
            start = piece.start
            while start < piece.stop:
                stretch = (matrix.offset + start) // self._stretch
                stop = min((stretch + 1) * self._stretch - matrix.offset, piece.stop)
                count = matrix.before(stop) - matrix.before(start)
                if count:
                    group = stretch % _GROUPS + _GROUPS * matrix.based
                    yield _Run(matrix, group, count * width)
                start = stop

    def result(self) -> Agreement | None:
        """The agreement; None where there is nothing to compare."""
        grams = self._grams[:, 0].unflatten(0, (2, _GROUPS)).sum(dim=0)
        return self._agreement(grams, 0, list(self._matrices.values()))

    def centred(self) -> Agreement | None:
        """The agreement of the differences to the base; None where there is nothing to compare."""
        based = [matrix for matrix in self._matrices.values() if matrix.based]
        return self._agreement(self._grams[_GROUPS:, 1], 1, based)

    def _agreement(self, grams: Tensor, kind: int, matrices: Sequence[_Matrix]) -> Agreement | None:
        gram = grams.sum(dim=0)
        norms = gram.diagonal().sqrt()
        if not bool(gram.isfinite().all()) or int((norms > 0).sum()) < 2:
            return None
        size = sum(len(matrix.unit) for matrix in matrices)
        elements = sum(matrix.elements for matrix in matrices)
        cosines = _cosines(gram)
        each, mean = _means(cosines)
        errors = torch.zeros_like(each)
        error = 0.0
        if elements < size:
            parts = grams[grams.diagonal(dim1=1, dim2=2).sum(dim=1) > 0]
            each_without, mean_without = _means(_cosines(gram - parts))
            errors, error = _jackknife(each_without), float(_jackknife(mean_without))
        cosines.fill_diagonal_(1)
        total = math.sqrt(max(float(gram.sum()), 0.0)) / len(gram)
        return Agreement(
            float(mean),
            error,
            tuple(tuple(map(_known, row)) for row in cosines.tolist()),
            tuple(map(_known, each.tolist())),
            tuple(errors.tolist()),
            total / float(norms.mean()),
            size,
            elements,
            tuple(self._tensor(matrix, kind) for matrix in matrices),
        )

    def _tensor(self, matrix: _Matrix, kind: int) -> TensorAgreement:
        count = len(self._checkpoints)
        squares, products = self._rows[matrix.number, kind].split(count)
        norms = squares.sqrt()
        square, size, elements = float(squares.sum()), len(matrix.unit), matrix.elements
        between = float(norms.sum()) ** 2 - square
        mean = None
        if between > 0 and int((norms > 0).sum()) > 1 and elements >= min(size, _FEW):
            mean = _known((float(products.sum()) - square) / between)
        away, towards = self._rows[matrix.number, 1].split(count)
        distances = away - 2 / count * towards + towards.sum() / count**2
        distances = distances.clamp_(min=0).mul_(count / (square or 1.0)).sqrt_()
        error = 0.0 if elements == size else (1 - (mean or 0.0) ** 2) / math.sqrt(elements)
        name = next(name for name, info in matrix.unit.members if is_matrix(info))
        norm = math.sqrt(square / count)
        return TensorAgreement(
            str(name), size, elements, mean, error, norm, tuple(distances.tolist())
        )


def _smallest(sizes: Sequence[int], most: int) -> set[int]:
    """The numbers of the smallest sizes, of as many as sum up to `most`."""
    chosen = set()
    for number in sorted(range(len(sizes)), key=sizes.__getitem__):
        most -= sizes[number]
        if most < 0:
            break
        chosen.add(number)
    return chosen


def _products(pair: Tensor, lengths: Sequence[int]) -> Tensor:
    """The Gram matrices of runs of columns, stacked."""
    return torch.stack([part @ part.mT for part in pair.split(lengths, dim=2)])


def _merged(groups: Sequence[int], lengths: Sequence[int]) -> tuple[list[int], list[int]]:
    """Neighbours of the same group as one."""
    merged: list[int] = []
    sums: list[int] = []
    for group, length in zip(groups, lengths, strict=True):
        if merged and merged[-1] == group:
            sums[-1] += length
        else:
            merged.append(group)
            sums.append(length)
    return merged, sums


def _cosines(gram: Tensor) -> Tensor:
    """Cosines from Gram matrices; NaN where a norm is zero, and on the diagonals."""
    norms = gram.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    cosines = (gram / norms[..., :, None] / norms[..., None, :]).clamp(-1, 1)
    cosines.diagonal(dim1=-2, dim2=-1).fill_(math.nan)
    # A norm of zero makes 0 / 0, and one that is left of rounding nothing better.
    zero = norms == 0
    return cosines.masked_fill(zero[..., :, None] | zero[..., None, :], math.nan)


def _means(cosines: Tensor) -> tuple[Tensor, Tensor]:
    """The mean over the pairs of each checkpoint, and over all."""
    return cosines.nanmean(dim=-1), cosines.flatten(-2).nanmean(dim=-1)


def _jackknife(values: Tensor) -> Tensor:
    """The standard error of what came out without each of some groups; 1 where there is but one."""
    count = len(values)
    if count < 2:
        return torch.ones_like(values[0] if count else values.sum(dim=0))
    deviations = (values - values.nanmean(dim=0)).nan_to_num(0)
    return (deviations.square().sum(dim=0) * (count - 1) / count).sqrt()


def _known(value: float) -> float | None:
    return max(-1.0, min(value, 1.0)) if math.isfinite(value) else None


def _compares(unit: Unit, checkpoints: set[int]) -> bool:
    """Whether a unit is of a matrix that all checkpoints have."""
    return unit.is_matrix and checkpoints <= {source.checkpoint for source in unit.sources}


def _real(values: Tensor) -> Tensor:
    """Numbers that torch can promote to each other's dtype, complex ones by component."""
    if values.is_complex():
        return torch.view_as_real(values).flatten(1)
    return values if values.itemsize > 1 else values.float()


def _sampled(start: int, stop: int, size: int, taken: int) -> Tensor:
    """The elements `start` to `stop` of `size` that are looked at, counted from `start`.

    They are the first `taken` of each block, and as large a part of the last, shorter one.
    """
    if taken == _BLOCK:
        return torch.arange(stop - start)
    last = size // _BLOCK * _BLOCK
    pattern = _pattern(start % _BLOCK, stop - start, taken)
    if stop <= last:
        return pattern
    few = -(-(size - last) * taken // _BLOCK)
    return pattern[pattern + start < last + few]


@functools.lru_cache(maxsize=64)
def _pattern(offset: int, length: int, taken: int) -> Tensor:
    """The same for elements that begin `offset` after the start of a block."""
    blocks = torch.arange(0, offset + length, _BLOCK)
    places = (blocks[:, None] + torch.arange(taken)[None, :]).flatten() - offset
    return places[(places >= 0) & (places < length)]
