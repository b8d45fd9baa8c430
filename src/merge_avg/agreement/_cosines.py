"""Cosines between checkpoints, and their error, from sums of products.

The error of a figure that comes from a sample is estimated by leaving out one part of the sample at
a time: the delete-a-group jackknife (Kott 2001).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

# A cosine of n random elements is 0 +- 1/sqrt(n): of fewer than 16 it says nothing.
FEW = 16


@dataclass(frozen=True, slots=True)
class TensorAgreement:
    """The agreement of checkpoints about one tensor."""

    name: str  # in the template; of tensors that share memory, that of one
    shape: tuple[int, ...]
    size: int
    elements: int  # how many elements were looked at
    # The mean cosine, each pair weighted by the product of its norms; None where fewer than two
    # checkpoints learned anything but zeros, or too few elements were looked at.
    mean: float | None
    error: float  # about the standard error of `mean`; 0 where all elements were looked at
    # The root mean square of the checkpoints' norms, without elements that are the same in all.
    norm: float
    distances: tuple[float, ...]  # of each checkpoint from the mean of all, over `norm`


@dataclass(frozen=True)
class Agreement:
    """The agreement of checkpoints: cosines over their matrices, from a sample of the elements.

    Elements that are the same in all checkpoints do not count: nothing was learned there.
    """

    mean: float  # over all pairs of checkpoints
    error: float  # the standard error of `mean`; 0 where all elements were looked at
    # The cosine of each checkpoint with each, 1 on the diagonal; None for a checkpoint of zeros (or
    # one that does not differ from the base).
    pairs: tuple[tuple[float | None, ...], ...] = field(repr=False)
    each: tuple[float | None, ...]  # the mean over the pairs of each checkpoint
    errors: tuple[float, ...]  # the standard error of each of these
    norms: tuple[float, ...]  # of each checkpoint
    shrinkage: float  # the norm of the plain mean over the mean of the norms
    size: int  # how many elements each checkpoint's matrices have
    elements: int  # how many of them were looked at
    # One for each matrix, in the template's order.
    tensors: tuple[TensorAgreement, ...] = field(repr=False)


def agreement(
    grams: Sequence[Sequence[float]], tensors: Iterable[TensorAgreement], size: int, elements: int
) -> Agreement | None:
    """Return the agreement of checkpoints; None where fewer than two learned anything.

    Each Gram matrix has, row by row, the products of all checkpoints with all in one group of
    elements. There may be very many tensors: they are made last.
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
    for i in range(count):
        cosines[i][i] = 1.0
    pairs = tuple(tuple(map(_known, row)) for row in cosines)
    means = tuple(map(_known, each))
    shrinkage = math.sqrt(max(sum(gram), 0.0)) / count / (sum(norms) / count)
    figures = pairs, means, tuple(errors), tuple(norms), shrinkage
    return Agreement(mean, error, *figures, size, elements, tuple(tensors))


def same(count: int, tensors: Iterable[TensorAgreement], size: int, elements: int) -> Agreement:
    """Return the agreement of checkpoints of which all that was looked at is the same."""
    ones = (1.0,) * count
    figures = (ones,) * count, ones, (0.0,) * count, (0.0,) * count, 1.0
    return Agreement(1.0, 0.0, *figures, size, elements, tuple(tensors))


def agreement_about(
    name: str,
    shape: tuple[int, ...],
    size: int,
    elements: int,
    squares: Sequence[float],
    products: Sequence[float],
) -> TensorAgreement:
    """Return a tensor's figures from checkpoints' squared norms and products with their sum."""
    count = len(squares)
    square, total = sum(squares), sum(products)
    norms = list(map(math.sqrt, squares))
    # The sum of |x||y| over pairs. A product overflows to infinity, where ** would raise.
    between = sum(norms) * sum(norms) - square
    mean = None
    if between > 0 and norms.count(0.0) < count - 1 and elements >= min(size, FEW):
        mean = _known((total - square) / between)
        mean = None if mean is None else min(max(mean, -1.0), 1.0)
    error = (1 - (mean or 0.0) ** 2) / math.sqrt(elements) if elements < size else 0.0
    scale = count / (square if square > 0 else 1.0)
    # The distance to the mean of all: |x - m|^2 = |x|^2 - 2 x.m + |m|^2, which rounding can make
    # negative where x is the mean.
    middle, twice = total / count**2, 2 / count
    away = [a - twice * b + middle for a, b in zip(squares, products, strict=True)]
    distances = tuple([math.sqrt(max(one, 0.0) * scale) for one in away])
    norm = math.sqrt(square / count)
    return TensorAgreement(name, shape, size, elements, mean, error, norm, distances)


def _cosines(gram: Sequence[float], count: int) -> list[list[float]]:
    """Return the cosines of a Gram matrix; NaN where a norm is zero, and on the diagonal."""
    # A difference to the base that is zero may have a square of less than zero by rounding.
    norms = [math.sqrt(square) if square > 0 else 0.0 for square in gram[:: count + 1]]
    cosines = [[math.nan] * count for _ in range(count)]
    for i in range(count):
        for j in range(i):
            if norms[i] and norms[j]:
                value = gram[i * count + j] / norms[i] / norms[j]
                cosines[i][j] = cosines[j][i] = min(max(value, -1.0), 1.0)
    return cosines


def _means(cosines: Sequence[Sequence[float]]) -> tuple[list[float], float]:
    """Return the mean over the pairs of each checkpoint, and over all pairs."""
    return [_mean(row) for row in cosines], _mean([value for row in cosines for value in row])


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def _jackknife(values: Sequence[float]) -> float:
    """Return the standard error, from the figures without each group; 1 if there is one group."""
    count = len(values)
    if count < 2:
        return 1.0
    middle = _mean(values)
    squares = ((value - middle) ** 2 for value in values if not math.isnan(value))
    return math.sqrt(sum(squares) * (count - 1) / count)


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None
