"""Windows: units cut and packed into what is read, summed and written at a time.

units        | a ................................. | b ... | c .. |
windows      |   a    |   a    |   a    |   a    | |  a, b, c    |
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from merge_avg.plan._units import Unit


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements of a unit, counted from the unit's start."""

    unit: Unit
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


Window = tuple[Piece, ...]


def windows(units: Iterable[Unit], limit: int) -> Iterator[Window]:
    """Yield the units cut and packed into windows of at most `limit` elements.

    The pieces of a window are alike: same kind, same checkpoints, same dtypes. Each piece starts at
    a multiple of `limit` in its unit, and is as long or reaches to the unit's end.
    """
    # Whole windows of one unit are the fast case: one read per checkpoint, into one row of one
    # matrix, and its hash is that of one chunk. What is left of each unit would cost as much as a
    # whole window for a few elements: a model has many biases and norms. So rests share windows.
    open_: dict[object, list[Piece]] = {}
    sizes: dict[object, int] = {}
    for unit in units:
        start = len(unit) // limit * limit
        yield from ((Piece(unit, at, at + limit),) for at in range(0, start, limit))
        if start == len(unit):
            continue
        alike = (unit.kind, unit.dtype, tuple((s.checkpoint, s.dtype) for s in unit.sources))
        if sizes.get(alike, 0) + len(unit) - start > limit:
            yield tuple(open_.pop(alike))
            del sizes[alike]
        open_.setdefault(alike, []).append(Piece(unit, start, len(unit)))
        sizes[alike] = sizes.get(alike, 0) + len(unit) - start
    yield from (tuple(pieces) for pieces in open_.values())


def batches(units: Iterable[Unit], limit: int, chunk: int) -> Iterator[tuple[Window, ...]]:
    """Yield windows of at most `limit` elements; those that share a chunk of a unit come together.

    A chunk is so many elements of a unit, from a multiple of that on, or to the unit's end.
    """
    # The hash of a chunk takes its bytes in order, and a chunk is of one size whatever the memory
    # budget is: else the same file would have another hash. Where windows are smaller than chunks,
    # one worker gets all windows of a chunk in order, and no second reading is needed.
    for window in windows(units, max(limit, chunk)):
        yield (window,) if limit >= chunk else tuple(_cut(window, limit))


def _cut(window: Window, limit: int) -> Iterator[Window]:
    """Yield a window as smaller ones, in order; pieces that fit stay whole."""
    packed: list[Piece] = []
    size = 0
    for piece in window:
        if len(piece) > limit:
            # What is packed need not come first: its pieces are whole chunks.
            for at in range(piece.start, piece.stop, limit):
                yield (Piece(piece.unit, at, min(at + limit, piece.stop)),)
            continue
        if size + len(piece) > limit:
            yield tuple(packed)
            packed, size = [], 0
        packed.append(piece)
        size += len(piece)
    if packed:
        yield tuple(packed)
