"""Where units go in a copy of the template."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from merge_avg.checkpoint import Layout, Name, Storage, TensorInfo
from merge_avg.errors import MergeError
from merge_avg.formats import Piece
from merge_avg.plan._units import Plan, Unit, tiled


@dataclass(frozen=True, slots=True)
class Target:
    """The place of elements of a unit in an output."""

    start: int  # the elements, counted from the unit's start
    stop: int
    file: int  # the number of the output's file
    slot: str  # the name of a slot in that file
    at: int  # offset in the slot, in bytes
    # The tensor as a view of the unit, if it is not contiguous there but in its slot. Then the
    # elements get there by way of the scratch file.
    view: TensorInfo | None = None


def homes_of(storage: Storage, template: Layout) -> Iterator[Storage]:
    """Yield the records that a storage lies in, and those of other ranks with the same content."""
    for part in storage.ranges:
        name, _ = template.spans.get((part.file, part.name), (part.name, 0))
        yield replace(part, name=name)
        yield from template.twins.get((part.file, part.name), ())


def in_place(unit: Unit, template: Layout) -> Iterator[Target]:
    """Yield where a unit goes in a copy of the template, also in each rank that has the same."""
    for one in _home(unit, template):
        slot, offset = template.spans.get((one.file, one.slot), (one.slot, 0))
        yield replace(one, slot=slot, at=one.at + offset) if offset or slot != one.slot else one
        for twin in template.twins.get((one.file, one.slot), ()):
            yield replace(one, file=twin.file, slot=twin.name)


def _home(unit: Unit, template: Layout) -> Iterator[Target]:
    storage, size = unit.storage, unit.dtype.itemsize
    for _, info in unit.members if storage.tiles else ():
        for tile, view in tiled(info, replace(info, start=info.start - unit.start)):
            # Its bytes would have to be put in the tile's order once more; torch writes none.
            # Nor would more than the tile be written, where its storage is larger.
            whole = tile.numel * tile.dtype.itemsize == tile.storage.nbytes
            if not tile.contiguous or not whole:
                hint = "write one file: end the output's name in .safetensors or .pt"
                what = f"the chunk {tile.storage.name!r} has strides, or is a part of a larger one"
                raise MergeError(what, where=template.where(tile), hint=hint)
            home, at = tile.storage, tile.start * size
            yield Target(view.start, view.stop, home.file, home.name, at, view)
    # The parts of a storage are of its dtype in the template, and of the result's in the output.
    start = 0
    for part in () if storage.tiles else storage.ranges:
        stop = start + part.nbytes // unit.sources[0].dtype.itemsize
        first, last = max(start, unit.start), min(stop, unit.stop)
        if first < last:
            at = (first - start) * size
            yield Target(first - unit.start, last - unit.start, part.file, part.name, at)
        start = stop


def moved(
    target: Target, size: int, pieces: Sequence[tuple[int, Piece]] | None, kept: Mapping[int, int]
) -> Iterator[Target]:
    """Yield where elements go that lie in a slot of the template, of elements of this size."""
    if pieces is None:
        yield replace(target, file=kept[target.file])
        return
    first = target.at // size
    for file, piece in pieces:
        if target.view is not None:  # all of the chunk, as a view of the unit
            pairs = zip(piece.corner, target.view.stride, strict=True)
            start = target.view.start + sum(a * b for a, b in pairs)
            view = replace(target.view, shape=piece.shape, start=start)
            yield Target(view.start, view.stop, file, piece.slot, 0, view)
            continue
        stop = piece.start + math.prod(piece.shape)
        last = min(first + target.stop - target.start, stop)
        begin = max(first, piece.start)
        if len(pieces) == 1:  # the storage, with whatever it has beside the tensor's elements
            yield replace(target, file=file, slot=piece.slot)
        elif begin < last:
            shift = target.start - first
            at = (begin - piece.start) * size
            yield Target(begin + shift, last + shift, file, piece.slot, at)


def placed_in_copy(plan: Plan) -> Iterator[tuple[Name, Target]]:
    """Yield where composites go in a copy of the template: where theirs are."""
    template = plan.layouts[0]
    views = Counter((info.storage.file, info.storage.name) for info in template.tensors)
    for info in template.tensors:
        name = Name(info.path[:-1], str(info.path[-1]))
        if name not in plan.composed:
            continue
        shared = views[info.storage.file, info.storage.name] > 1  # each would overwrite the other
        if shared or info.storage.parts or info.storage.tiles:
            lot = "shares its memory with another" if shared else "lies in several pieces"
            what = f"tensor {str(name)!r} {lot}"
            hint = "write one file: end the output's name in .safetensors or .pt"
            raise MergeError(what, where=template.where(info), hint=hint, tensor=name)
        at = info.start * info.dtype.itemsize
        yield name, Target(0, info.numel, info.storage.file, info.storage.name, at)


def grown(plan: Plan, weights: Mapping[Name, TensorInfo]) -> bool:
    """Return whether composites leave tensors of other shapes or dtypes, or fewer of them."""
    consumed = [name for one in plan.composites for name in one.consumed]
    return len(consumed) != len(plan.composed) or any(
        (one.shape, one.dtype) != (weights[name].shape, weights[name].dtype)
        for name, one in plan.composed.items()
    )
