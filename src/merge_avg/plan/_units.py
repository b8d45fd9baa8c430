"""What will be averaged, cut into units and windows. A value: nothing is read or written here.

The unit of work is a run of elements of one of the template's storages that its weights cover. So
tensors that share memory, view slices of a larger buffer or have odd strides are averaged once,
in the order of memory, and whatever views them sees the mean. A checkpoint whose tensors lie
otherwise (other strides, or apart where the template's are tied) is first copied into the
template's geometry, in a scratch file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from merge_avg.checkpoint import (
    BY_NAME,
    TEMPLATE,
    DType,
    Layout,
    Name,
    Storage,
    TensorInfo,
    row_major,
)
from merge_avg.errors import MergeError, named
from merge_avg.plan._checks import LORA_A, LORA_WARNING, check_alike, refuse_quantised
from merge_avg.plan._names import Aligned

Kind = Literal["mean", "equal", "keep"]
_PAGE = 1 << 16


@dataclass(frozen=True, slots=True)
class Source:
    """Where a unit's elements lie in one checkpoint.

    Attributes:
        checkpoint: its index.
        dtype: of the elements.
        storage: what they are part of; None where they lie in the scratch file.
        offset: of the first element, in bytes, in the storage or the scratch file.
    """

    checkpoint: int
    dtype: DType
    storage: Storage | None
    offset: int


@dataclass(frozen=True, slots=True)
class Unit:
    """A run of elements of a template's storage, averaged as one.

    Attributes:
        kind: "mean" for float and complex; "equal" for integers and bools, which should agree;
            "keep" for what stays the template's, because other checkpoints lack it or because no
            weight covers it.
        start, stop: its elements in the storage.
        dtype: of the result.
        members: the template's tensors in it, by name.
        sources: one for each checkpoint that takes part.
        number: its place among the units of the plan.
    """

    kind: Kind
    storage: Storage
    start: int
    stop: int
    dtype: DType
    members: tuple[tuple[Name, TensorInfo], ...]
    sources: tuple[Source, ...]
    number: int = 0

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def is_matrix(self) -> bool:
        """Whether it is averaged, and of a tensor of two dimensions or more."""
        return self.kind == "mean" and any(is_matrix(info) for _, info in self.members)

    @property
    def holed(self) -> bool:
        """Whether some of its elements may belong to no member: they stay the template's."""
        if any(info.stop - info.start == len(self) and info.dense for _, info in self.members):
            return False
        return self.kind != "keep"


@dataclass(frozen=True, slots=True)
class Staging:
    """Tensors of a checkpoint to copy into another geometry, in the scratch file.

    Where two of them go to the same elements they have to agree: `tied_in` ties them.

    Attributes:
        pairs: a tensor as the checkpoint has it, and where it goes: a view of the elements at
            `offset` (its `start` counts from there).
        offset, nbytes: the place in the scratch file.
        tied_in: the index of a checkpoint that has all of `pairs` in one storage.
    """

    checkpoint: int
    pairs: tuple[tuple[Name, TensorInfo, TensorInfo], ...]
    offset: int
    nbytes: int
    tied_in: int


@dataclass(frozen=True)
class Plan:
    """The work of one merge.

    Attributes:
        layouts: the checkpoints; the first is the template.
        aligned: the weights by the template's names.
        units: in the template's order.
        stagings: copies to make before, in scratch places that end at `scratch`.
        factors: tensors A of low-rank products B @ A. Where they are the same everywhere, the mean
            of the products is the product of the means, and elsewhere it is not.
    """

    layouts: tuple[Layout, ...]
    aligned: Aligned
    units: tuple[Unit, ...]
    stagings: tuple[Staging, ...]
    scratch: int
    factors: frozenset[Name]
    dtype: str | None = None

    def result(self, name: Name) -> DType:
        """The dtype that a tensor of the template gets."""
        info = _template(self.aligned, name)
        return _result(info, None if name in self.aligned.skipped else self.dtype)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What may make the mean meaningless."""
        return (LORA_WARNING,) if self.factors else ()

    @property
    def itemsize(self) -> int:
        """The bytes of the widest element, of inputs and results."""
        sizes = {unit.dtype.itemsize for unit in self.units}
        sizes |= {source.dtype.itemsize for unit in self.units for source in unit.sources}
        return max(sizes, default=1)

    def converted(self) -> dict[Storage, DType]:
        """The template's storages whose elements get another dtype, and which."""
        pairs = ((_template(self.aligned, name), self.result(name)) for name in self.aligned.rows)
        return {info.storage: dtype for info, dtype in pairs if dtype != info.dtype}


def make_plan(layouts: Sequence[Layout], aligned: Aligned, dtype: str | None = None) -> Plan:
    """Plans a merge.

    Args:
        layouts: the checkpoints, the template first.
        aligned: their weights.
        dtype: the float dtype of all averaged float tensors; by default the template's.

    Raises:
        MergeError: tensors of the same name differ in shape or dtype, or cannot be averaged.
    """
    for name, row in aligned.rows.items():
        if name not in aligned.skipped:
            check_alike(layouts, name, row, dtype)
    refuse_quantised(layouts[0], aligned.rows)
    factors = frozenset(name for name in aligned.rows if LORA_A.search(name.key))
    units: list[Unit] = []
    stagings: list[Staging] = []
    scratch = 0
    storages: dict[Storage, list[Name]] = {}
    for name, row in aligned.rows.items():
        info = row[0]
        if info is not None and info.numel:
            storages.setdefault(info.storage, []).append(name)
    for storage, names in storages.items():
        spans = [(_template(aligned, n).start, _template(aligned, n).stop, n) for n in names]
        end = 0
        for start, stop, members in _merged(spans):
            unit, staged = _unit(layouts, aligned, start, stop, members, dtype, scratch)
            end = _gap(units, unit, end)
            units.append(unit)
            stagings += staged
            scratch = max([scratch, *(aligned_to_page(s.offset + s.nbytes) for s in staged)])
        last = units[-1]
        total = storage.nbytes // last.sources[0].dtype.itemsize
        _gap(units, replace(last, start=total, stop=total), end)
    for staging in _ties(aligned.rows, scratch):
        stagings.append(staging)
        scratch = aligned_to_page(staging.offset + staging.nbytes)
    numbered = tuple(replace(unit, number=number) for number, unit in enumerate(units))
    return Plan(tuple(layouts), aligned, numbered, tuple(stagings), scratch, factors, dtype)


def with_base(plan: Plan, layout: Layout, weights: Mapping[Name, TensorInfo]) -> Plan:
    """The plan with one more checkpoint, that the averaged matrices are compared with.

    It takes no part in the average, so what it lacks, or has in another shape, is no error.

    Args:
        plan: without it.
        layout: of the checkpoint.
        weights: its tensors by the template's names.
    """
    number, scratch = len(plan.layouts), plan.scratch
    units: list[Unit] = []
    stagings = list(plan.stagings)
    for unit in plan.units:
        found = [weights.get(name) for name, _ in unit.members]
        infos = [info for info in found if info is not None and not info.trouble]
        if unit.is_matrix and len(infos) == len(found) and all(map(_alike, unit.members, infos)):
            source, staging = _source(number, unit.members, infos, unit.start, unit.stop, scratch)
            fits = staging is None or (len(found) == 1 and not unit.members[0][1].overlaps_itself)
            if fits and staging is not None:
                stagings.append(staging)
                scratch = aligned_to_page(scratch + staging.nbytes)
            units.append(replace(unit, sources=(*unit.sources, source)) if fits else unit)
        else:
            units.append(unit)
    return replace(
        plan,
        layouts=(*plan.layouts, layout),
        units=tuple(units),
        stagings=tuple(stagings),
        scratch=scratch,
    )


def _alike(member: tuple[Name, TensorInfo], info: TensorInfo) -> bool:
    ours = member[1]
    return info.shape == ours.shape and info.dtype.kind == ours.dtype.kind


def is_matrix(info: TensorInfo) -> bool:
    """Whether a tensor has two dimensions or more."""
    return len(info.shape) > 1


def aligned_to_page(offset: int) -> int:
    """The next offset at which a mapping can start on every system: a multiple of 64 KiB."""
    return -(-offset // _PAGE) * _PAGE


def _template(aligned: Aligned, name: Name) -> TensorInfo:
    info = aligned.rows[name][0]
    assert info is not None  # noqa: S101 - rows are those of the template
    return info


def _gap(units: list[Unit], unit: Unit, start: int) -> int:
    """Adds what lies between the last unit and this one, kept as the template has it."""
    if unit.start > start:
        source = unit.sources[0]
        size = source.dtype.itemsize
        where = replace(source, storage=unit.storage, offset=start * size)
        gap = Unit("keep", unit.storage, start, unit.start, unit.dtype, (), (where,))
        units.append(gap)
    return unit.stop


def _merged(spans: list[tuple[int, int, Name]]) -> Iterator[tuple[int, int, list[Name]]]:
    """Spans joined where they overlap."""
    spans.sort(key=lambda span: span[:2])
    start, stop, first = spans[0]
    members = [first]
    for a, b, name in spans[1:]:
        if a < stop:
            stop = max(stop, b)
            members.append(name)
        else:
            yield start, stop, members
            start, stop, members = a, b, [name]
    yield start, stop, members


def _unit(
    layouts: Sequence[Layout],
    aligned: Aligned,
    start: int,
    stop: int,
    names: Sequence[Name],
    dtype: str | None,
    scratch: int,
) -> tuple[Unit, list[Staging]]:
    members = tuple((name, _template(aligned, name)) for name in names)
    first = members[0][1]
    if len({info.dtype for _, info in members}) > 1:
        where = named([str(name) for name in names], 2)
        raise MergeError(f"{where} view the same bytes as different dtypes", where=layouts[0].path)
    sources: list[Source] = []
    stagings: list[Staging] = []
    for index, layout in enumerate(layouts):
        row = [aligned.rows[name][index] for name in names]
        infos = [info for info in row if info is not None]
        if not infos:
            continue
        spared = aligned.skipped.intersection(names)
        if spared and len(spared) < len(names):
            shared = named([str(name) for name in names if name not in spared])
            kept = named(sorted(map(str, spared)))
            what = f"{kept} is to be kept, but shares memory with {shared}"
            hint = "keep all tensors that share memory, or none"
            raise MergeError(what, where=layouts[0].path, hint=hint)
        if len(infos) < len(row):
            absent = named([str(n) for n, i in zip(names, row, strict=True) if i is None])
            what = f"it lacks {absent}, which shares memory with other tensors in the template"
            raise MergeError(what, where=layout.path, hint="use --missing skip")
        if len({info.dtype for info in infos}) > 1:
            tied = named([str(name) for name in names], 2)
            what = f"{tied} have different dtypes, but share memory in {layouts[0].path}"
            hint = "save them with one dtype, or choose a template where they are apart: --template"
            raise MergeError(what, where=layout.path, hint=hint)
        source, staging = _source(index, members, infos, start, stop, scratch)
        sources.append(source)
        if staging is None:
            continue
        for name, member in members:
            if member.overlaps_itself:
                what = f"tensor {str(name)!r} overlaps itself in {layouts[0].path}, but not here"
                raise MergeError(what, where=layout.path, hint="save it as .contiguous()")
        stagings.append(staging)
        scratch = aligned_to_page(scratch + staging.nbytes)
    kind: Kind = "mean" if first.dtype.kind in ("float", "complex") else "equal"
    if aligned.skipped.issuperset(names):
        kind, dtype = "keep", None
    return (
        Unit(kind, first.storage, start, stop, _result(first, dtype), members, tuple(sources)),
        stagings,
    )


def _source(
    index: int,
    members: Sequence[tuple[Name, TensorInfo]],
    infos: Sequence[TensorInfo],
    start: int,
    stop: int,
    scratch: int,
) -> tuple[Source, Staging | None]:
    """Where a checkpoint has the elements of a unit, and what to copy to the scratch file first."""
    dtype = infos[0].dtype
    if _direct(members, infos):
        offset = (start + infos[0].start - members[0][1].start) * dtype.itemsize
        return Source(index, dtype, infos[0].storage, offset), None
    pairs = tuple(
        (name, part, view)
        for (name, member), info in zip(members, infos, strict=True)
        for part, view in tiled(info, replace(member, start=member.start - start))
    )
    nbytes = (stop - start) * dtype.itemsize
    return Source(index, dtype, None, scratch), Staging(index, pairs, scratch, nbytes, tied_in=0)


def tiled(info: TensorInfo, view: TensorInfo) -> Iterator[tuple[TensorInfo, TensorInfo]]:
    """The tiles that a tensor is stored as, and where in another view of its elements each goes."""
    if not info.storage.tiles:
        yield info, replace(view, dtype=info.dtype)
    for offset, tile in info.storage.tiles:
        start = view.start + sum(a * b for a, b in zip(offset, view.stride, strict=True))
        yield tile, replace(view, shape=tile.shape, start=start, dtype=info.dtype)


def _direct(members: Sequence[tuple[Name, TensorInfo]], infos: Sequence[TensorInfo]) -> bool:
    """Whether tensors lie to each other as the template's do, only elsewhere."""
    shift = infos[0].start - members[0][1].start
    return all(
        (info.storage is infos[0].storage or info.storage == infos[0].storage)
        and not info.storage.tiles
        and info.start - member.start == shift
        and (
            (info.shape == member.shape and info.stride == member.stride)
            or info.geometry == member.geometry
        )
        for (_, member), info in zip(members, infos, strict=True)
    )


def _result(info: TensorInfo, dtype: str | None) -> DType:
    if dtype is None or dtype == TEMPLATE or info.dtype.kind != "float":
        return info.dtype
    return BY_NAME[dtype]


def _ties(rows: Mapping[Name, tuple[TensorInfo | None, ...]], scratch: int) -> Iterator[Staging]:
    """Pairs that a checkpoint ties and the template does not, in all that keep them apart."""
    count = len(next(iter(rows.values()), ()))
    seen: set[tuple[Name, Name]] = set()
    for index in range(1, count):
        places: dict[object, Name] = {}
        for name, row in rows.items():
            info = row[index]
            if info is None or not info.numel:
                continue
            first = places.setdefault((info.storage, info.start, info.geometry), name)
            if first is name or (first, name) in seen:
                continue
            seen.add((first, name))
            for other in range(count):
                a, b = rows[first][other], row[other]
                if a and b and (a.storage, a.start) != (b.storage, b.start):
                    nbytes = a.numel * a.dtype.itemsize
                    pairs = tuple(
                        (called, part, place)
                        for called, info in ((first, a), (name, b))
                        for part, place in tiled(
                            info, replace(info, start=0, stride=row_major(info.shape))
                        )
                    )
                    yield Staging(other, pairs, scratch, nbytes, index)
                    scratch = aligned_to_page(scratch + nbytes)
