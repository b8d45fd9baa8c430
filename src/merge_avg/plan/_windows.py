"""Units cut and packed into windows: what is read, summed and written at a time."""

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


Window = tuple[Piece, ...]


def windows(units: Iterable[Unit], limit: int) -> Iterator[Window]:
    """The units cut and packed into windows of at most `limit` elements.

    The pieces of a window are alike: same kind, same checkpoints, same dtypes. Each piece starts at
    a multiple of `limit` in its unit, and is as long or reaches to the unit's end.
    """
    open_: dict[object, list[Piece]] = {}
    sizes: dict[object, int] = {}
    for unit in units:
        start = len(unit) // limit * limit
        yield from ((Piece(unit, at, at + limit),) for at in range(0, start, limit))
        if start == len(unit):
            continue
        # What is left, whole, with the rest of others.
        alike = (unit.kind, unit.dtype, tuple((s.checkpoint, s.dtype) for s in unit.sources))
        if sizes.get(alike, 0) + len(unit) - start > limit:
            yield tuple(open_.pop(alike))
            del sizes[alike]
        open_.setdefault(alike, []).append(Piece(unit, start, len(unit)))
        sizes[alike] = sizes.get(alike, 0) + len(unit) - start
    yield from (tuple(pieces) for pieces in open_.values())


def batches(units: Iterable[Unit], limit: int, chunk: int) -> Iterator[tuple[Window, ...]]:
    """Windows of at most `limit` elements; those that share a chunk of a unit come together.

    A chunk is so many elements of a unit, from a multiple of that on, or to the unit's end. What is
    derived from chunks in the order of their elements, such as a hash, needs no second reading.
    """
    for window in windows(units, max(limit, chunk)):
        yield (window,) if limit >= chunk else tuple(_cut(window, limit))


def _cut(window: Window, limit: int) -> Iterator[Window]:
    """A window as smaller ones, in order; pieces that fit stay whole."""
    packed: list[Piece] = []
    size = 0
    for piece in window:
        length = piece.stop - piece.start
        if length > limit:
            for at in range(piece.start, piece.stop, limit):
                yield (Piece(piece.unit, at, min(at + limit, piece.stop)),)
            continue
        if size + length > limit:
            yield tuple(packed)
            packed, size = [], 0
        packed.append(piece)
        size += length
    if packed:
        yield tuple(packed)
