"""Cosines between checkpoints, and how far they are known, from sums of products.

The error of what was measured on a sample is estimated by leaving out one part of it at a time: the
delete-a-group jackknife (Kott 2001).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# The mean cosine between matrices below which the mean of networks is most likely none.
LEAST_AGREEMENT = 0.5
_FEW = 16  # of a tensor of which fewer elements are looked at, nothing is said


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
class Products:
    """What was measured of a tensor.

    Attributes:
        name, size, elements: those of `TensorAgreement`.
        squares: of each checkpoint's norm.
        products: of each checkpoint with the sum of all.
    """

    name: str
    size: int
    elements: int
    squares: Sequence[float]
    products: Sequence[float]


def agreement(
    grams: Sequence[Sequence[float]], tensors: Iterable[Products], size: int, elements: int
) -> Agreement | None:
    """The agreement of some checkpoints; None where there is nothing to compare.

    Args:
        grams: of each group of elements the products of all checkpoints with all, row by row.
        tensors: what was measured of each tensor; there may be very many.
        size: how many elements all of them have.
        elements: how many of these were looked at.
    """
    gram = [sum(cells) for cells in zip(*grams, strict=True)]
    count = math.isqrt(len(gram))
    norms = [math.sqrt(square) for square in gram[:: count + 1]]
    if not all(map(math.isfinite, gram)) or sum(norm > 0 for norm in norms) < 2:
        return None
    cosines = _cosines(gram, count)
    each, mean = _means(cosines)
    errors, error = [0.0] * count, 0.0
    if elements < size:
        without = [
            _means(_cosines([a - b for a, b in zip(gram, part, strict=True)], count))
            for part in grams
            if sum(part[:: count + 1]) > 0
        ]
        errors = [_jackknife([one[i] for one, _ in without]) for i in range(count)]
        error = _jackknife([every for _, every in without])
    total = math.sqrt(max(sum(gram), 0.0)) / count
    return Agreement(
        mean,
        error,
        tuple(
            tuple(1.0 if i == j else _known(value) for j, value in enumerate(row))
            for i, row in enumerate(cosines)
        ),
        tuple(map(_known, each)),
        tuple(errors),
        total / (sum(norms) / count),
        size,
        elements,
        tuple(map(_of_tensor, tensors)),
    )


def _of_tensor(one: Products) -> TensorAgreement:
    count = len(one.squares)
    square, total = sum(one.squares), sum(one.products)
    norms = [math.sqrt(value) for value in one.squares]
    between = sum(norms) * sum(norms) - square  # by **, what is too large would be an error
    mean = None
    if between > 0 and sum(norm > 0 for norm in norms) > 1 and one.elements >= min(one.size, _FEW):
        mean = _known((total - square) / between)
        mean = None if mean is None else min(max(mean, -1.0), 1.0)
    error = 0.0
    if one.elements < one.size:
        error = (1 - (mean or 0.0) ** 2) / math.sqrt(one.elements)
    scale = count / (square if square > 0 else 1.0)
    # Of each to the mean of all: |x - m|^2 = |x|^2 - 2 x.m + |m|^2.
    middle = total / count**2
    distances = tuple(
        math.sqrt(max(own - 2 / count * product + middle, 0.0) * scale)
        for own, product in zip(one.squares, one.products, strict=True)
    )
    norm = math.sqrt(square / count)
    return TensorAgreement(one.name, one.size, one.elements, mean, error, norm, distances)


def _cosines(gram: Sequence[float], count: int) -> list[list[float]]:
    """Cosines from a Gram matrix; NaN where a norm is zero, and on the diagonal."""
    # A norm of zero makes 0 / 0, and one that is left of rounding nothing better.
    norms = [math.sqrt(square) if square > 0 else 0.0 for square in gram[:: count + 1]]
    cosines = [[math.nan] * count for _ in range(count)]
    for i in range(count):
        for j in range(i):
            if norms[i] and norms[j]:
                value = gram[i * count + j] / norms[i] / norms[j]
                cosines[i][j] = cosines[j][i] = min(max(value, -1.0), 1.0)
    return cosines


def _means(cosines: Sequence[Sequence[float]]) -> tuple[list[float], float]:
    """The mean over the pairs of each checkpoint, and over all."""
    return [_mean(row) for row in cosines], _mean([value for row in cosines for value in row])


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def _jackknife(values: Sequence[float]) -> float:
    """The standard error of what came out without each of some groups; 1 where there is but one."""
    count = len(values)
    if count < 2:
        return 1.0
    middle = _mean(values)
    squares = ((value - middle) ** 2 for value in values if not math.isnan(value))
    return math.sqrt(sum(squares) * (count - 1) / count)


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None
