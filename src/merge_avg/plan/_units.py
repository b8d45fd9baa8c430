"""Units: the runs of elements that are averaged, each as one. A value: nothing is read or written.

    storage of the template   | keep |   mean: a, and b tied to it   | keep |   mean: c   |
    tensors that view it             [ a ........................ ]         [ c ........ ]
                                     [ b ........................ ]

A unit is a run of elements of one of the template's storages, not a tensor. So tensors that share
memory, view slices of a larger buffer or have odd strides are averaged once, in the order of
memory, and whatever views them sees the mean.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

from merge_avg.checkpoint import (
    BY_NAME,
    TEMPLATE,
    Composed,
    Composite,
    DType,
    Layout,
    Name,
    Storage,
    TensorInfo,
    is_matrix,
    low_rank,
    row_major,
    unit_or_mask,
)
from merge_avg.errors import MergeError
from merge_avg.plan._alignment import Aligned, check_shared, check_tensors, place
from merge_avg.plan._sources import Everywhere, Source

# Floats and complex numbers have a mean; integers and bools should be equal; what is kept stays the
# template's, because other checkpoints lack it or because no weight covers it.
Kind = Literal["mean", "equal", "keep"]
Member = tuple[Name, TensorInfo]
# A mapping has to start at a multiple of the system's pages, or of what the system hands out: up to
# 64 KiB, on Windows and on some kernels for ARM and POWER.
_PAGE = 1 << 16
_LORA_WARNING = (
    "these are LoRA factors: mean(B) @ mean(A) is not mean(B @ A); to average what they do, use "
    "--lora exact or --lora rank:R, or merge each adapter into its base model first"
)


@dataclass(frozen=True, slots=True)
class Unit:
    """A run of elements of a template's storage, averaged as one."""

    kind: Kind
    storage: Storage
    start: int  # the elements in the storage
    stop: int
    dtype: DType  # of the result
    members: tuple[Member, ...]  # the template's tensors in it
    sources: Sequence[Source]  # one for each checkpoint that takes part; first the template's
    number: int = 0  # its place among the units of the plan
    rule: int = -1  # the number of the rule that gives it weights of its own, if one does

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def checkpoints(self) -> Iterable[int]:
        """Return the numbers of the checkpoints that take part, in order."""
        if isinstance(self.sources, Everywhere):
            return range(self.sources.checkpoints)
        return [source.checkpoint for source in self.sources]

    @property
    def dtypes(self) -> Sequence[DType]:
        """Return the dtypes of the sources, perhaps one for all of them."""
        if isinstance(self.sources, Everywhere):
            return (self.sources.dtype,)
        return [source.dtype for source in self.sources]

    @property
    def alike(self) -> tuple[object, ...]:
        """Return what units have in common that are averaged in one window."""
        if isinstance(self.sources, Everywhere):
            return self.kind, self.dtype, self.rule, self.sources.checkpoints, self.sources.dtype
        return self.kind, self.dtype, self.rule, *(source[:2] for source in self.sources)

    @property
    def nbytes(self) -> int:
        """Return the number of bytes to read."""
        if isinstance(self.sources, Everywhere):
            return len(self) * self.sources.dtype.itemsize * self.sources.checkpoints
        return len(self) * sum(source.dtype.itemsize for source in self.sources)

    @property
    def is_matrix(self) -> bool:
        """Return whether it is averaged, and of a tensor of two dimensions or more."""
        return self.kind == "mean" and any(is_matrix(info.shape) for _, info in self.members)

    @property
    def holed(self) -> bool:
        """Return whether some of its elements may belong to no member: they stay the template's."""
        if any(info.stop - info.start == len(self) and info.dense for _, info in self.members):
            return False
        return self.kind != "keep"


@dataclass(frozen=True, slots=True)
class Restride:
    """Tensors of a checkpoint to copy into another geometry, in the scratch file.

    A checkpoint whose tensors lie otherwise than the template's (with other strides, or apart where
    those are tied) is copied into the template's geometry first. So the loop over windows finds a
    unit's elements in one run, in the same order in every checkpoint. Where two tensors go to the
    same elements they have to agree: `tied_in` ties them.
    """

    checkpoint: int  # its number
    # Name, the tensor as the checkpoint has it, and where it goes: a view of the elements at
    # `offset`, from which its `start` counts.
    pairs: tuple[tuple[Name, TensorInfo, TensorInfo], ...]
    offset: int  # in the scratch file, in bytes
    nbytes: int
    tied_in: int = 0  # the number of a checkpoint that has all of `pairs` in one storage


@dataclass(frozen=True)
class Plan:
    """The work of one merge."""

    layouts: tuple[Layout, ...]  # the checkpoints; the first is the template
    aligned: Aligned
    units: tuple[Unit, ...]  # in the template's order
    restrides: tuple[Restride, ...]  # copies to make first
    # Pairs of factors of low-rank products. Where one of each is the same everywhere, the mean of
    # the products is the product of the means, and elsewhere it is not.
    factors: frozenset[frozenset[Name]]
    # What may follow from other values, so that it has no mean; True where that is certain.
    derived: Mapping[Name, bool]
    dtype: str | None = None  # the float dtype that is asked for
    holed: frozenset[int] = frozenset()  # the numbers of units of which some elements stay
    composites: tuple[Composite, ...] = ()  # tensors that have a mean only together
    # What composites have to say otherwise than the template: files of its directory, by path, and
    # entries of a file's metadata.
    texts: Mapping[str, bytes] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def composed(self) -> Mapping[Name, Composed]:
        """Return what an output has of composites, by name."""
        return {result.name: result for one in self.composites for result in one.results}

    def result(self, name: Name) -> DType:
        """Return the dtype that a tensor of the template gets."""
        if name in self.composed:
            return self.composed[name].dtype
        info = self.aligned.template(name)
        return _result(info, self.aligned.asked(name, self.dtype))

    def nbytes(self, name: Name, info: TensorInfo) -> int:
        """Return the size that a tensor of the template has in an output."""
        one = self.composed.get(name)
        numel = info.numel if one is None else math.prod(one.shape)
        return numel * self.result(name).itemsize

    @property
    def scratch(self) -> int:
        """Return where the copies end in the scratch file."""
        return _end(self.restrides)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Return what may make the mean meaningless, if factors differ."""
        return (_LORA_WARNING,) if self.factors else ()

    @property
    def itemsize(self) -> int:
        """Return the bytes of the widest element, of inputs and results."""
        dtypes = {dtype for unit in self.units for dtype in (unit.dtype, *unit.dtypes)}
        dtypes |= {one.dtype for one in self.composed.values()}
        return max((dtype.itemsize for dtype in dtypes), default=1)

    def converted(self) -> dict[Storage, DType]:
        """Return the template's storages whose elements get another dtype, with that dtype."""
        pairs = ((self.aligned.template(name), self.result(name)) for name in self.aligned.rows)
        return {info.storage: dtype for info, dtype in pairs if dtype != info.dtype}


def make_plan(layouts: Sequence[Layout], aligned: Aligned, dtype: str | None = None) -> Plan:
    """Plan a merge; averaged float tensors get the dtype, and by default the template's."""
    check_tensors(layouts, aligned, dtype)
    storages: dict[Storage, list[Member]] = {}
    for name in aligned.rows:
        info = aligned.template(name)
        if info.numel:
            storages.setdefault(info.storage, []).append((name, info))
    restrides: list[Restride] = []
    units: list[Unit] = []
    holed: set[int] = set()
    for members in storages.values():
        if (whole := _whole(aligned, members, dtype, len(units))) is not None:
            units.append(whole)
            continue
        runs = (_unit(layouts, aligned, run, dtype, restrides) for run in _overlapping(members))
        for unit in _with_gaps(runs):
            holed |= {len(units)} if unit.holed else set()
            units.append(replace(unit, number=len(units)))
    _tie(aligned, restrides)
    tensors = {name: aligned.template(name) for name in aligned.rows}
    derived = low_rank(tensors), unit_or_mask(tensors)
    planned = tuple(layouts), aligned, tuple(units), tuple(restrides)
    return Plan(*planned, *derived, dtype, frozenset(holed))


def with_base(plan: Plan, layout: Layout, weights: Mapping[Name, TensorInfo]) -> Plan:
    """Return the plan with one more checkpoint, which the averaged matrices are compared with.

    It takes no part in the average, so what it lacks, or has in another shape, is not an error. Its
    weights have the template's names.
    """
    number = len(plan.layouts)
    restrides = list(plan.restrides)
    units: list[Unit] = []
    for unit in plan.units:
        infos = _comparable(unit, weights) if unit.is_matrix else None
        more = () if infos is None else (_source(number, unit, infos, restrides),)
        units.append(replace(unit, sources=(*unit.sources, *more)))
    layouts = (*plan.layouts, layout)
    return replace(plan, layouts=layouts, units=tuple(units), restrides=tuple(restrides))


def _comparable(unit: Unit, weights: Mapping[Name, TensorInfo]) -> list[TensorInfo] | None:
    """Return the tensors of a base that a unit can be compared with, if it has them all."""
    infos = [
        info
        for name, ours in unit.members
        if (info := weights.get(name)) is not None
        and not info.trouble
        and (info.shape, info.dtype.kind) == (ours.shape, ours.dtype.kind)
    ]
    if len(infos) < len(unit.members):
        return None
    # Copies that go to the same elements would have to agree, and a base may well disagree.
    alone = len(infos) == 1 and not unit.members[0][1].overlaps_itself
    return infos if alone or _direct(unit.members, infos) else None


def aligned_to_page(offset: int) -> int:
    """Return the next offset at which a mapping can start on every system."""
    return -(-offset // _PAGE) * _PAGE


def _end(restrides: Sequence[Restride]) -> int:
    return aligned_to_page(restrides[-1].offset + restrides[-1].nbytes) if restrides else 0


def _overlapping(members: Sequence[Member]) -> Iterator[list[Member]]:
    """Yield tensors of a storage in the order of memory, those whose elements overlap together."""
    # Only by their places: names hold texts and numbers, which have no order.
    ordered = sorted(members, key=lambda member: (member[1].start, member[1].stop))
    together: list[Member] = []
    end = 0
    for member in ordered:
        if together and member[1].start >= end:
            yield together
            together = []
        together.append(member)
        end = max(end, member[1].stop)
    yield together


def _with_gaps(units: Iterable[Unit]) -> Iterator[Unit]:
    """Yield the units of a storage, and between them what no weight covers, to be kept."""
    # A storage is written whole, from units alone. So padding, slices that are not averaged and
    # unused capacity are units too, with the template as their only source.
    end = 0
    for unit in units:
        yield from _gap(unit, end, unit.start)
        yield unit
        end = unit.stop
    yield from _gap(unit, end, unit.storage.nbytes // unit.sources[0].dtype.itemsize)


def _gap(unit: Unit, start: int, stop: int) -> Iterator[Unit]:
    if start < stop:
        # Of the result's dtype, as its neighbour: all of a storage is converted, or nothing.
        theirs = unit.sources[0].dtype
        source = Source(0, theirs, unit.storage, start * theirs.itemsize)
        yield Unit("keep", unit.storage, start, stop, unit.dtype, (), (source,))


def _whole(
    aligned: Aligned, members: Sequence[Member], dtype: str | None, number: int
) -> Unit | None:
    """Return the unit of a tensor that is all of its storage, in the same place everywhere."""
    (name, info), storage = members[0], members[0][1].storage
    alone = len(members) == 1 and not (storage.tiles or info.start)
    if not (alone and aligned.alike and info.numel * info.dtype.itemsize == storage.nbytes):
        return None
    if info.stride != row_major(info.shape) and not info.contiguous:
        return None
    kind: Kind = "mean" if info.dtype.kind in ("float", "complex") else "equal"
    kept = name in aligned.skipped
    count = 1 if kept else aligned.checkpoints
    result = _result(info, aligned.asked(name, dtype))
    sources = Everywhere(count, info.dtype, storage)
    about = storage, 0, info.numel, result, (members[0],), sources, number
    return Unit("keep" if kept else kind, *about)


def _unit(
    layouts: Sequence[Layout],
    aligned: Aligned,
    members: Sequence[Member],
    dtype: str | None,
    restrides: list[Restride],
) -> Unit:
    """Return the unit of tensors whose elements overlap, and add the copies that it needs."""
    check_shared(layouts, aligned, members)
    names, first = [name for name, _ in members], members[0][1]
    kind: Kind = "mean" if first.dtype.kind in ("float", "complex") else "equal"
    if names[0] in aligned.skipped:
        kind = "keep"
    stop = max(info.stop for _, info in members)
    result = _result(first, aligned.asked(names[0], dtype))
    unit = Unit(kind, first.storage, first.start, stop, result, tuple(members), ())
    sources: list[Source] = []
    for number, layout in enumerate(layouts):
        infos = [info for name in names if (info := aligned.rows[name][number]) is not None]
        sources += [_source(number, unit, infos, restrides)] if infos else []
        # It has one place for several of the elements to copy.
        folded = (name for name, info in members if info.overlaps_itself)
        if infos and sources[-1].storage is None and (name := next(folded, None)):
            what = f"tensor {str(name)!r} overlaps itself in {layouts[0].path}, but not here"
            hint = "save it as .contiguous()"
            raise MergeError(what, where=layout.path, hint=hint, tensor=name)
    return replace(unit, sources=tuple(sources))


def _source(
    number: int, unit: Unit, infos: Sequence[TensorInfo], restrides: list[Restride]
) -> Source:
    """Return where a checkpoint has the elements of a unit, if need be after a copy of them."""
    dtype = infos[0].dtype
    if _direct(unit.members, infos):
        shift = infos[0].start - unit.members[0][1].start
        return Source(number, dtype, infos[0].storage, (unit.start + shift) * dtype.itemsize)
    pairs = (
        (name, info, replace(ours, start=ours.start - unit.start))
        for (name, ours), info in zip(unit.members, infos, strict=True)
    )
    return Source(number, dtype, None, _copy(restrides, number, pairs, len(unit) * dtype.itemsize))


def _copy(
    restrides: list[Restride],
    number: int,
    copied: Iterable[tuple[Name, TensorInfo, TensorInfo]],
    nbytes: int,
    tied_in: int = 0,
) -> int:
    """Add a copy of tensors to what there is to do first, and return where it will lie."""
    pairs = tuple((name, *one) for name, info, view in copied for one in tiled(info, view))
    restrides.append(Restride(number, pairs, _end(restrides), nbytes, tied_in))
    return restrides[-1].offset


def tiled(info: TensorInfo, view: TensorInfo) -> Iterator[tuple[TensorInfo, TensorInfo]]:
    """Yield the tiles of a tensor, and where in another view of its elements each goes."""
    if not info.storage.tiles:
        yield info, replace(view, dtype=info.dtype)
    for index, tile in info.storage.tiles:
        start = view.start + sum(a * b for a, b in zip(index, view.stride, strict=True))
        yield tile, replace(view, shape=tile.shape, start=start, dtype=info.dtype)


def _direct(members: Sequence[Member], infos: Sequence[TensorInfo]) -> bool:
    """Return whether tensors lie to each other as the template's do, only elsewhere."""
    shift = infos[0].start - members[0][1].start
    return all(
        # Identity first: comparing two storages, field by field, costs more than all else here.
        (info.storage is infos[0].storage or info.storage == infos[0].storage)
        and not info.storage.tiles
        and info.start - ours.start == shift
        and (
            (info.shape == ours.shape and info.stride == ours.stride)
            or info.geometry == ours.geometry
        )
        for (_, ours), info in zip(members, infos, strict=True)
    )


def _result(info: TensorInfo, dtype: str | None) -> DType:
    if dtype is None or dtype == TEMPLATE or info.dtype.kind != "float":
        return info.dtype
    return BY_NAME[dtype]


def _tie(aligned: Aligned, restrides: list[Restride]) -> None:
    """Add copies that compare pairs which one checkpoint ties, in all that keep them apart."""
    # A model that ties a pair has one value for both. Where a pair differs anywhere, its two means
    # differ, and in a model that ties them one would be lost without a word. Both tensors of a pair
    # are copied to one place, and have to agree there.
    if aligned.alike:  # whatever they tie, the template ties
        return
    rows, everyone = aligned.rows, range(aligned.checkpoints)
    seen: set[tuple[Name, Name]] = set()
    for number in everyone[1:]:
        places: dict[object, Name] = {}
        for name, row in rows.items():
            info = row[number]
            if info is None or not info.numel:
                continue
            first = places.setdefault(place(info), name)
            if first is name or (first, name) in seen:
                continue
            seen.add((first, name))
            for other in everyone:
                a, b = rows[first][other], row[other]
                if a and b and (a.storage, a.start) != (b.storage, b.start):
                    pairs = (
                        (called, one, replace(one, start=0, stride=row_major(one.shape)))
                        for called, one in ((first, a), (name, b))
                    )
                    _copy(restrides, other, pairs, a.numel * a.dtype.itemsize, number)
