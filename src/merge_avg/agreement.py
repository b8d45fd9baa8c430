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

from merge_avg.budget import COMPARED, WHOLE
from merge_avg.plan import Unit, Window, is_matrix
from merge_avg.policies import LEAST_AGREEMENT

# Of every block of a tensor the first 1/128 is looked at; of large models, and of very many
# checkpoints, only in every so manieth span of blocks. So it costs next to nothing. Of small models
# more is looked at, up to all, and the smallest tensors of any model whole. None of that depends on
# windows, so neither on threads nor on memory.
_BLOCK = 8192
_SPAN = 16 * _BLOCK
_TAKEN = _BLOCK // 128
_LARGE = 1 << 24  # elements, from which spans are left out
_MOST_EVERY = 64
_MANY = 16  # checkpoints, from which products cost more than what is read
_FEW = 16  # of a tensor of which fewer elements are looked at, nothing is said
# The error is estimated by leaving out one of these groups at a time (the delete-a-group jackknife,
# Kott 2001). Each is made of many short stretches from all over the model.
_GROUPS = 16
_STRETCHES = 16 * _GROUPS
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
class _Sample:
    """Which elements of a tensor are looked at.

    Attributes:
        size: of the tensor.
        taken: how many of each block, from its start; of a shorter last block as large a part.
        every: in which spans: in every one, every second, and so on, from the first.
    """

    size: int
    taken: int = _BLOCK
    every: int = 1

    def before(self, place: int) -> int:
        """How many elements before a place are looked at."""
        last = self.size // _BLOCK * _BLOCK
        inside = min(min(place, last) % (self.every * _SPAN), _SPAN)
        count = min(place, last) // (self.every * _SPAN) * (_SPAN // _BLOCK * self.taken)
        count += inside // _BLOCK * self.taken + min(inside % _BLOCK, self.taken)
        if place > last and last // _SPAN % self.every == 0:
            count += min(place - last, -(-(self.size - last) * self.taken // _BLOCK))
        return count

    def segments(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Where from `start` to `stop` elements are looked at, counted from `start`; how many."""
        if self.taken == _BLOCK:
            yield 0, stop - start
            return
        last = self.size // _BLOCK * _BLOCK
        first, period = start // _BLOCK * _BLOCK, self.every * _SPAN
        blocks = (
            block
            for span in range(start // period * period, stop, period)
            for block in range(max(span, first), min(span + _SPAN, stop), _BLOCK)
        )
        for block in blocks:
            taken = self.taken if block < last else -(-(self.size - last) * self.taken // _BLOCK)
            begin, end = max(start, block), min(stop, block + taken)
            if begin < end:
                yield begin - start, end - begin

    @property
    def elements(self) -> int:
        """How many elements are looked at."""
        return self.before(self.size)


@dataclass(frozen=True, slots=True)
class _Matrix:
    """A unit that is compared.

    Attributes:
        unit: what it is.
        number: among all.
        sample: of its elements.
        first: how many elements of earlier ones are looked at.
        scale: what an element that is looked at stands for.
        based: whether the base has it.
    """

    unit: Unit
    number: int
    sample: _Sample
    first: int
    scale: float
    based: bool


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
        samples = _samples([len(unit) for unit in found], count)
        self._matrices: dict[int, _Matrix] = {}
        first = 0
        for number, (unit, sample) in enumerate(zip(found, samples, strict=True)):
            based = base in {source.checkpoint for source in unit.sources}
            elements = sample.elements
            scale = len(unit) / elements
            self._matrices[id(unit)] = _Matrix(unit, number, sample, first, scale, based)
            first += elements
        self._checkpoints = tuple(checkpoints)
        self._base = base
        self._stretch = max(first // _STRETCHES, 1)
        # Of the checkpoints themselves, and of their differences to the base.
        kinds = 1 if base is None else 2
        self._grams = torch.zeros(kinds, _GROUPS, count, count, dtype=torch.float64)
        self._rows = torch.zeros(kinds, len(found), 2 * count, dtype=torch.float64)
        self._limit = max(COMPARED // max(count, 1), 1)
        self._rooms = threading.local()
        self._lock = threading.Lock()

    def beside(self, unit: Unit) -> frozenset[int]:
        """The numbers of the sources of a unit that are compared and perhaps not averaged."""
        sources = enumerate(unit.sources) if self._base is not None else ()
        return frozenset(k for k, source in sources if source.checkpoint == self._base)

    def places(self, window: Window) -> Tensor | None:
        """The places of a window's elements that are compared; None where there are none."""
        begins: list[int] = []
        counts: list[int] = []
        at = 0
        for piece in window:
            matrix = self._matrices.get(id(piece.unit))
            if matrix is not None:
                for begin, count in matrix.sample.segments(piece.start, piece.stop):
                    begins.append(at + begin)
                    counts.append(count)
            at += piece.stop - piece.start
        if not begins:
            return None
        if len(window) == 1:  # most windows of a large model, and of few kinds
            return _pattern(tuple(begins), tuple(counts))
        return _counted(begins, counts)

    def add(self, samples: Sequence[tuple[Window, Sequence[Tensor]]]) -> None:
        """Adds elements of all checkpoints: for some windows, parts of a matrix with a row each."""
        count, limit = len(self._checkpoints), self._limit
        if not hasattr(self._rooms, "room"):  # a fresh one would cost more than the products
            height = count if self._base is None else 2 * count + 1
            self._rooms.room = torch.empty(height, limit, dtype=torch.float64)
        room: Tensor = self._rooms.room
        held: list[_Run] = []
        width, based = 0, False
        for window, parts in samples:
            ours, base = self._order(window[0].unit)
            rows = torch.cat([_real(part) for part in parts]) if len(parts) > 1 else _real(parts[0])
            runs = list(self._runs(window))
            for start in range(0, rows.shape[1], limit):
                stop = min(start + limit, rows.shape[1])
                if width + stop - start > limit or based != (base is not None):
                    self._multiply(room, width, held, based=based)
                    held, width = [], 0
                based = base is not None
                room[:count, width : width + stop - start] = rows[ours, start:stop]
                if base is not None:
                    room[count, width : width + stop - start] = rows[base, start:stop]
                held += _cut(runs, start, stop)
                width += stop - start
        self._multiply(room, width, held, based=based)

    def _multiply(self, room: Tensor, width: int, runs: Sequence[_Run], *, based: bool) -> None:
        """Adds the products of some columns, and of their differences to the base."""
        if not runs:
            return
        count = len(self._checkpoints)
        kinds = [room[:count, :width]]
        if based:
            differences = room[count + 1 :, :width]
            kinds.append(torch.sub(kinds[0], room[count : count + 1, :width], out=differences))
        numbers = torch.tensor([run.matrix.number for run in runs])
        for kind, rows in enumerate(kinds):
            groups, grams, sums = _summed(rows, runs)
            with self._lock:
                self._grams[kind].index_add_(0, torch.tensor(groups), grams)
                self._rows[kind].index_add_(0, numbers, sums)

    def _order(self, unit: Unit) -> tuple[list[int] | slice, int | None]:
        """The rows of a sample that are the checkpoints', and that of the base."""
        wanted = {*self._checkpoints, self._base}
        there = (one.checkpoint for one in unit.sources if one.checkpoint in wanted)
        place: dict[int | None, int] = {checkpoint: row for row, checkpoint in enumerate(there)}
        rows = [place[checkpoint] for checkpoint in self._checkpoints]
        base = place.get(self._base)
        return (slice(len(rows)) if rows == list(range(len(rows))) else rows), base

    def _runs(self, window: Window) -> Iterator[_Run]:
        """What is looked at of a window, cut where tensors end and where groups do."""
        for piece in window:
            matrix = self._matrices.get(id(piece.unit))
            if matrix is None:
                continue
            width = 2 if piece.unit.dtype.kind == "complex" else 1
            at = matrix.first + matrix.sample.before(piece.start)
            end = matrix.first + matrix.sample.before(piece.stop)
            while at < end:
                stretch = at // self._stretch
                stop = min((stretch + 1) * self._stretch, end)
                yield _Run(matrix, stretch % _GROUPS, (stop - at) * width)
                at = stop

    def result(self) -> Agreement | None:
        """The agreement; None where there is nothing to compare."""
        return self._agreement(0, list(self._matrices.values()))

    def centred(self) -> Agreement | None:
        """The agreement of the differences to the base; None where there is nothing to compare."""
        if self._base is None:
            return None
        return self._agreement(1, [one for one in self._matrices.values() if one.based])

    def _agreement(self, kind: int, matrices: Sequence[_Matrix]) -> Agreement | None:
        grams = self._grams[kind]
        gram = grams.sum(dim=0)
        norms = gram.diagonal().sqrt()
        if not bool(gram.isfinite().all()) or int((norms > 0).sum()) < 2:
            return None
        size = sum(len(matrix.unit) for matrix in matrices)
        elements = sum(matrix.sample.elements for matrix in matrices)
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
            tuple(self._tensors(kind, matrices)),
        )

    def _tensors(self, kind: int, matrices: Sequence[_Matrix]) -> Iterator[TensorAgreement]:
        count = len(self._checkpoints)
        numbers = [matrix.number for matrix in matrices]
        squares, products = self._rows[kind][numbers].split(count, dim=1)
        square, norms = squares.sum(dim=1), squares.sqrt()
        between = norms.sum(dim=1).square() - square
        means = ((products.sum(dim=1) - square) / between).clamp_(-1, 1)
        means[(between <= 0) | ((norms > 0).sum(dim=1) < 2)] = math.nan
        distances = squares - 2 / count * products + products.sum(dim=1, keepdim=True) / count**2
        distances = distances.clamp_(min=0) * count / square.where(square > 0, 1.0)[:, None]
        columns = means, (square / count).sqrt(), distances.sqrt()
        rows = zip(matrices, *(column.tolist() for column in columns), strict=True)
        for matrix, value, norm, away in rows:
            size, elements = matrix.sample.size, matrix.sample.elements
            mean = _known(value) if elements >= min(size, _FEW) else None
            error = 0.0 if elements == size else (1 - (mean or 0.0) ** 2) / math.sqrt(elements)
            name = next(name for name, info in matrix.unit.members if is_matrix(info))
            yield TensorAgreement(str(name), size, elements, mean, error, norm, tuple(away))


def _samples(sizes: Sequence[int], count: int) -> Iterator[_Sample]:
    """What is looked at of tensors of some sizes, for so many checkpoints."""
    total = max(sum(sizes), 1)
    taken = min(max(_BLOCK * WHOLE // (total * max(count, 1)), _TAKEN), _BLOCK)
    every = min(max(total * max(count, _MANY) // (_MANY * _LARGE), 1), _MOST_EVERY)
    left = WHOLE // max(count, 1)
    whole = set()
    for number in sorted(range(len(sizes)), key=sizes.__getitem__):
        left -= sizes[number]
        if left < 0:
            break
        whole.add(number)
    for number, size in enumerate(sizes):
        yield _Sample(size) if number in whole else _Sample(size, taken, every)


def _cut(runs: Sequence[_Run], start: int, stop: int) -> Iterator[_Run]:
    """Runs of columns, less what lies outside `start` to `stop`."""
    at = 0
    for run in runs:
        some = min(at + run.count, stop) - max(at, start)
        at += run.count
        if some == run.count:
            yield run
        elif some > 0:
            yield _Run(run.matrix, run.group, some)


def _summed(rows: Tensor, runs: Sequence[_Run]) -> tuple[list[int], Tensor, Tensor]:
    """Sums over runs of columns, scaled from what is looked at to all of a tensor.

    Returns:
        Groups, and a Gram matrix for each; and for each run the squared norms of the rows, and
        their products with the sum of all.
    """
    groups, lengths = [run.group for run in runs], [run.count for run in runs]
    scales = torch.tensor([run.matrix.scale for run in runs], dtype=torch.float64)
    if rows.shape[1] >= _SHORT * len(runs):
        grams = torch.stack([part @ part.mT for part in rows.split(lengths, dim=1)])
        grams *= scales[:, None, None]
        return groups, grams, torch.cat([grams.diagonal(dim1=1, dim2=2), grams.sum(dim=2)], dim=1)
    where = torch.arange(len(runs)).repeat_interleave(torch.tensor(lengths))
    rows = rows * scales.sqrt()[where]
    groups, lengths = _merged(groups, lengths)
    grams = torch.stack([part @ part.mT for part in rows.split(lengths, dim=1)])
    sums = [
        rows.new_zeros(len(rows), len(runs)).index_add_(1, where, rows * other)
        for other in (rows, rows.sum(dim=0))
    ]
    return groups, grams, torch.cat(sums).mT


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
    return value if math.isfinite(value) else None


def _compares(unit: Unit, checkpoints: set[int]) -> bool:
    """Whether a unit is of a matrix that all checkpoints have."""
    return unit.is_matrix and checkpoints <= {source.checkpoint for source in unit.sources}


def _real(values: Tensor) -> Tensor:
    """Numbers that torch can promote to each other's dtype, complex ones by component."""
    if values.is_complex():
        return torch.view_as_real(values).flatten(1)
    return values if values.itemsize > 1 else values.float()


def _counted(begins: Sequence[int], counts: Sequence[int]) -> Tensor:
    """Runs of numbers, one after the other, by where each begins and how many it has."""
    lengths = torch.tensor(counts)
    shifts = torch.tensor(begins) - (lengths.cumsum(0) - lengths)
    return shifts.repeat_interleave(lengths) + torch.arange(sum(counts))


@functools.lru_cache(maxsize=64)
def _pattern(begins: tuple[int, ...], counts: tuple[int, ...]) -> Tensor:
    """The same, remembered."""
    return _counted(begins, counts)
