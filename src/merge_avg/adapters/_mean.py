"""The mean of products, by torch: exact, or the best of a rank; in blocks of rows of float64.

Let B be the factors of all checkpoints beside each other, and A one above the other, so that the
mean is B C A with weights and scalings on the diagonal of C. Of B = Qb Rb and A' = Qa Ra only the
small triangles are needed: Rb C Ra' has the singular values of the mean, and from its singular
vectors U, V follow the factors of the best approximation,

    B C Ra' V S^(-1/2)   and   S^(-1/2) U' Rb C A

No matrix of the size of the product is formed, and none of Q.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction

import torch
from torch import Tensor

from merge_avg.adapters._product import Product
from merge_avg.arithmetic import Weights
from merge_avg.arithmetic.torch_mean import RunningMean
from merge_avg.checkpoint import Access

_WIDE = torch.float64
_EPSILON = torch.finfo(_WIDE).eps


def compose(product: Product, access: Access) -> None:
    """Read the factors of a product, and write those of each output."""
    used = [k for k, some in enumerate(product.sources) if some]
    for k in used:
        for tensor, info in enumerate(product.sources[k]):
            step = product.block * product.ranks[k]
            for at in range(0, info.numel, step):
                access.read(k, tensor, at, min(at + step, info.numel))
    compared = access.compared if set(access.compared) <= set(used) else ()
    triangles = None
    if product.groups == () or compared:
        triangles = (
            _triangle(_columns(product, access, used)),
            _triangle(_rows(product, access, used)),
        )
    if triangles is not None and compared:
        access.compare(_gram(product, *triangles, used, compared))
    for output, weights in enumerate(access.weights):
        scalings = [weights[k] * product.scalings[k] for k in range(len(weights))]
        if product.groups:
            _write_exact(product, access, output, scalings)
        elif triangles is not None:
            _write_best(product, access, output, used, triangles, scalings)
        if product.alpha is not None:
            access.write(output, 2, 0, torch.tensor([float(product.alpha)], dtype=_WIDE))


def _rows(product: Product, access: Access, used: Sequence[int]) -> Iterator[Tensor]:
    """Yield blocks of rows of B: the factors of all checkpoints beside each other."""
    for start, stop in _blocks(product, product.shape[0]):
        parts = []
        for k in used:
            rank = product.ranks[k]
            part = access.read(k, 1, start * rank, stop * rank, again=True)
            parts.append(part.view(-1, rank).to(_WIDE))
        yield torch.cat(parts, dim=1)


def _columns(product: Product, access: Access, used: Sequence[int]) -> Iterator[Tensor]:
    """Yield blocks of columns of A, each as rows: the factors of all one above the other."""
    width = product.shape[1]
    for start, stop in _blocks(product, width):
        parts = [
            access.read(k, 0, row * width + start, row * width + stop, again=True).to(_WIDE)
            for k in used
            for row in range(product.ranks[k])
        ]
        yield torch.stack(parts, dim=1)


def _blocks(product: Product, length: int) -> Iterator[tuple[int, int]]:
    for start in range(0, length, product.block):
        yield start, min(start + product.block, length)


def _triangle(blocks: Iterator[Tensor]) -> Tensor:
    """Return R of the QR decomposition of blocks of rows, of which one is held at a time."""
    found: Tensor = torch.linalg.qr(next(blocks), mode="r").R
    for block in blocks:
        found = torch.linalg.qr(torch.cat([found, block]), mode="r").R
    return found


def _gram(
    product: Product, right: Tensor, left: Tensor, used: Sequence[int], compared: Sequence[int]
) -> list[list[float]]:
    """Return the inner products of all pairs of checkpoints' products, as they scale them."""
    # <Bi Ai, Bj Aj> is the sum over all elements of (Bi' Bj) * (Ai Aj').
    ends = torch.tensor([product.ranks[k] for k in used]).cumsum(0).tolist()
    parts = {k: slice(end - product.ranks[k], end) for k, end in zip(used, ends, strict=True)}
    both = (left.T @ left) * (right.T @ right)
    true = {k: float(product.scalings[k] * product.scaling) for k in compared}
    return [
        [true[i] * true[j] * float(both[parts[i], parts[j]].sum()) for j in compared]
        for i in compared
    ]


def _write_best(
    product: Product,
    access: Access,
    output: int,
    used: Sequence[int],
    triangles: tuple[Tensor, Tensor],
    scalings: Sequence[Fraction],
) -> None:
    """Write the factors of the best approximation of the result's rank."""
    right, left = triangles
    each = [float(scalings[k]) for k in used for _ in range(product.ranks[k])]
    diagonal = torch.tensor(each, dtype=_WIDE)
    left = left * diagonal
    u, s, v = torch.linalg.svd(left @ right.T)
    count = min(product.rank, len(s))
    known = s[:count] > s[:1] * _EPSILON * max(left.shape[1], 1)
    root = torch.where(known, s[:count].sqrt(), 1)
    over = torch.where(known, 1 / root, 0)
    # (rank, all) and (all, rank); what has no length stays zero.
    first = over[:, None] * (u[:, :count].T @ left)
    second = diagonal[:, None] * (right.T @ (v[:count].T * over))
    # Signs are free, and not the same on every machine.
    signs = first.gather(1, first.abs().argmax(dim=1, keepdim=True)).sign()
    first, second = first * signs, second * signs.T
    if count < product.rank:
        more = product.rank - count
        first = torch.cat([first, first.new_zeros(more, first.shape[1])])
        second = torch.cat([second, second.new_zeros(second.shape[0], more)], dim=1)
    width = product.shape[1]
    for (start, _), block in zip(
        _blocks(product, width), _columns(product, access, used), strict=True
    ):
        for row, values in enumerate((block @ first.T).T):
            access.write(output, 0, row * width + start, values)
    for (start, _), block in zip(
        _blocks(product, product.shape[0]), _rows(product, access, used), strict=True
    ):
        access.write(output, 1, start * product.rank, block @ second)
    scale = float(product.scaling) ** 2
    access.approximated(scale * float(s[count:].square().sum()), scale * float(s.square().sum()))


def _write_exact(
    product: Product, access: Access, output: int, scalings: Sequence[Fraction]
) -> None:
    """Write factors whose product is the mean: those of all, or less where some are the same."""
    dtype = getattr(torch, product.results[0].dtype.name)
    height, width = product.shape
    at = 0
    ranks = [product.ranks[some[0]] for _, some in product.groups]
    for (side, some), rank in zip(product.groups, ranks, strict=True):
        # Of what they have in common the first has all; else it is A that is combined.
        ours, wanted = (some[:1], None) if not side else (some, scalings)
        if side and len(some) == 1:
            wanted = None
        for start in range(0, rank * width, product.block * rank):
            stop = min(start + product.block * rank, rank * width)
            rows = _reading(access, 0, start, stop)
            access.write(output, 0, at + start, _combined(rows, ours, wanted, dtype))
        at += rank * width
    for start, stop in _blocks(product, height):
        parts = []
        for (side, some), rank in zip(product.groups, ranks, strict=True):
            rows = _reading(access, 1, start * rank, stop * rank)
            alone = len(some) == 1 or not side
            part = _combined(rows, some if alone else some[:1], scalings if alone else None, dtype)
            parts.append(part.view(-1, rank))
        access.write(output, 1, start * product.rank, torch.cat(parts, dim=1))


def _reading(access: Access, side: int, start: int, stop: int) -> Callable[[int], Tensor]:
    return lambda k: access.read(k, side, start, stop, again=True)


def _combined(
    rows: Callable[[int], Tensor],
    some: Sequence[int],
    scalings: Sequence[Fraction] | None,
    dtype: torch.dtype,
) -> Tensor:
    """Return a linear combination, rounded once; without scalings, the first as it is."""
    if scalings is None:
        first: Tensor = rows(some[0]).to(dtype)
        return first
    chosen = [scalings[k] for k in some]
    if not any(chosen):
        return torch.zeros_like(rows(some[0]), dtype=dtype)
    mean = RunningMean(Weights.of(chosen, normalize=False), dtype)
    for k in some:
        mean.update(rows(k))
    result: Tensor = mean.result(lambda number: rows(some[number]))
    return result
