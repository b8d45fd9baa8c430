"""Targets: the files of an output, and where in them each unit goes.

An output is a copy of the template, file by file, where it is of the template's kind. Otherwise its
weights are gathered into one new file, or cut into shards.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from merge_avg.checkpoint import (
    PROVENANCE_FILE,
    DType,
    FileLayout,
    Layout,
    Name,
    NewTensor,
    RecordFile,
    Slot,
    Storage,
    TensorInfo,
    TreePath,
    dotted,
    row_major,
)
from merge_avg.errors import MergeError, UsageError, named
from merge_avg.formats import FORMATS, Asked, Format, copy, format_for
from merge_avg.formats.directory import SUFFIXES, leads_out, relative
from merge_avg.formats.shards import INDEX, is_index, read_index, unsharded
from merge_avg.options import Options, suggested
from merge_avg.plan._places import Target, grown, homes_of, in_place, moved, placed_in_copy
from merge_avg.plan._sets import pieces_of, sets_anew, unneeded
from merge_avg.plan._training import is_placeholder
from merge_avg.plan._units import Plan, Unit

# The formats of new files: with views, and without.
_PICKLED = next(one for one in FORMATS if one.suffixes and one.views)
_PLAIN = next(one for one in FORMATS if one.suffixes and not one.views)
_ENDLESS = 1 << 62  # bytes of a shard, where one file is to hold all
FILE = "."  # the relative path of the one file of an output that is not a directory


@dataclass(frozen=True)
class OutputLayout:
    """The layout that all outputs of a merge share."""

    files: Mapping[str, FileLayout]  # by relative path
    targets: tuple[tuple[Target, ...], ...]  # of each unit, by its number
    whole: bool = False  # whether an output has everything of the template, not its weights only
    # What loading an output calls, as loading the template does, that is not known to be inert.
    callables: tuple[str, ...] = ()
    left_out: frozenset[int] = frozenset()  # the numbers of the template's files that it lacks
    # Chunks of distributed checkpoints that it lacks, by their file's number and storage's name.
    dropped: frozenset[tuple[int, str]] = frozenset()
    placed: Mapping[Name, Target] = field(default_factory=dict)  # of what composites give

    @property
    def directory(self) -> bool:
        """Return whether an output is a directory."""
        return set(self.files) != {FILE}

    @property
    def copies(self) -> Iterator[tuple[int, Storage]]:
        """Yield the bytes that are copied from the template, with the number of their file."""
        for number, file in enumerate(self.files.values()):
            for storage, _ in file.copies:
                yield number, storage

    def nbytes(self, record: bytes) -> int:
        """Return the size of all files of an output with this provenance record."""
        return sum(file.nbytes(record) for file in self.files.values())

    def without(self, left_out: frozenset[int], template: Layout) -> OutputLayout:
        """Return the same directory without the files that have these numbers in the template."""
        gone = {relative(template, number) for number in left_out}
        files = {name: file for name, file in self.files.items() if name not in gone}
        numbers = (number for number, name in enumerate(self.files) if name in files)
        places = {number: place for place, number in enumerate(numbers)}
        targets = tuple(
            tuple(replace(one, file=places[one.file]) for one in some if one.file in places)
            for some in self.targets
        )
        called = {name for number, name in template.callables if number not in left_out}
        callables = tuple(name for name in self.callables if name in called)
        placed = {
            name: replace(one, file=places[one.file])
            for name, one in self.placed.items()
            if one.file in places
        }
        gone_too = left_out | self.left_out
        made = files, targets, self.whole, callables, gone_too
        return OutputLayout(*made, self.dropped, placed)


def lay_out(
    path: Path,
    plan: Plan,
    weights: Mapping[Name, TensorInfo],
    options: Options,
    serve: Collection[TreePath] | None = None,
) -> OutputLayout:
    """Return the layout of the outputs, of which one goes to the path; the weights are in order.

    Where tensors of training state are to be left out, `serve` are the paths of all others.
    """
    # The ending decides between safetensors and pickles; between the two kinds of pickles, and for
    # names without an ending, the template does. A copy keeps what else the template holds.
    template, asked = plan.layouts[0], format_for(path.suffix)
    try:
        _refuse_ending(path, plan, asked, options)
        new_shapes = grown(plan, weights)
        whole = {one for composite in plan.composites for one in composite.consumed}
        new = {c.consumed[0]: c.results[0].name for c in plan.composites if c.results}
        renamed = {new.get(n, n): i for n, i in weights.items()}
        weights = {n: i for n, i in renamed.items() if n not in whole or n in plan.composed}
        limit = options.max_shard_size
        if limit is not None and not _in_sets(template, weights.values()):
            return _sharded(plan, weights, limit)
        if template.members and asked is None:
            return _sharded(plan, weights, _ENDLESS) if new_shapes else _copied(plan, serve, limit)
        if asked is None or asked.views:
            if template.archive is not None and not (options.state_dict or new_shapes):
                return _copied(plan)
            if template.archive is None and asked is None:
                hint = f"end its name in {_PLAIN.suffixes[0]}, or in {', '.join(_PICKLED.suffixes)}"
                what = f"the name {path.name!r} does not say which format to write"
                raise UsageError(what, hint=hint)
        elif template.format == asked.name and not new_shapes:
            return _copied(plan)  # it is a bare state dict already
        weights = _chosen(plan, weights)
        targets: list[list[Target]] = [[] for _ in plan.units]
        placed: dict[Name, Target] = {}
        file = _created(asked or _PICKLED, plan, weights, targets, placed)
        return OutputLayout({FILE: file}, tuple(map(tuple, targets)), placed=placed)
    except MergeError as error:
        raise error.at(path) from None


def _refuse_ending(path: Path, plan: Plan, asked: Format | None, options: Options) -> None:
    """Raise UsageError for an ending that no format has, or that a directory has."""
    if options.max_shard_size is not None:
        if asked is not None:
            hint = f"give the output a directory's name, such as {path.stem}"
            raise UsageError("--max-shard-size writes a directory of shards", hint=hint)
        return
    # As .tar, which torch writes whatever the ending. An ending that an input has is right too.
    ending, inputs = path.suffix.lower(), {one.path.suffix.lower() for one in plan.layouts}
    if asked is not None or ending in {"", *SUFFIXES, *inputs} or ending[1:].isdecimal():
        return
    known = [suffix for one in FORMATS for suffix in one.suffixes]
    near = suggested(ending, known)
    if near is not None or not plan.layouts[0].members:  # a directory has any name
        hint = near or f"end its name in one of {', '.join(known)}"
        raise UsageError(f"no format has the ending {path.suffix!r}", hint=hint)


def _in_sets(template: Layout, weights: Iterable[TensorInfo]) -> bool:
    """Return whether all weights lie in distributed checkpoints."""
    numbers = {part.file for info in weights for part in info.storage.ranges}
    members = [template.members[number] for number in numbers] if template.members else []
    return bool(members) and all(member and member.set_member for member in members)


def _copied(
    plan: Plan, serve: Collection[TreePath] | None = None, limit: int | None = None
) -> OutputLayout:
    template = plan.layouts[0]
    changed = plan.converted()
    _refuse_shared(plan, changed)
    averaged: dict[int, set[str]] = defaultdict(set)
    converted: dict[int, dict[str, DType]] = defaultdict(dict)
    for unit in plan.units:
        for one in homes_of(unit.storage, template):
            averaged[one.file].add(one.name)
    if changed and template.spans:
        what = "the flat groups of ZeRO-3 cannot get another dtype in a copy"
        hint = "write one file: end the output's name in .safetensors or .pt"
        raise MergeError(what, where=template.path, hint=hint)
    for storage, dtype in changed.items():
        for one in homes_of(storage, template):
            converted[one.file][one.name] = dtype
    composed = dict(placed_in_copy(plan)) if plan.composites else {}
    for target in composed.values():
        averaged[target.file].add(target.slot)
    dropped = unneeded(template, serve)
    anew = sets_anew(template, Asked(averaged, converted, dropped, serve is not None, limit))
    replaced = {number for _, numbers in anew.values() for number in numbers}
    files: dict[str, FileLayout] = {}
    for number, member in enumerate(template.members or (template,)):
        name = relative(template, number) if template.members else FILE
        if number in replaced:
            folder = PurePosixPath(name).parent
            found = anew[number][0].files if number in anew else {}
            files |= {str(folder / one): layout for one, layout in found.items()}
        # A file of a directory without weights, or with none that are averaged, is copied as it is.
        elif member is not None and (number in averaged | converted or not template.members):
            recorded = not template.members
            files[name] = copy(member, converted[number], averaged[number], recorded=recorded)
        elif changed and is_index(name):
            files[name] = _resized_index(template, number, plan)
        else:
            files[name] = _verbatim(template, number)
    if template.members:
        files[PROVENANCE_FILE] = RecordFile()
    # In a copy every slot has the name of its storage: units go where their storages are. Chunks of
    # a set that is written anew may have been cut.
    places = {name: place for place, name in enumerate(files)}
    pieces = pieces_of(template, anew, places)
    stay = set(range(len(template.files))) - replaced if template.members else ()
    kept = {number: places[relative(template, number)] for number in stay} or {0: 0}
    targets = tuple(
        tuple(
            new
            for old in in_place(unit, template)
            for new in moved(old, unit.dtype.itemsize, pieces.get((old.file, old.slot)), kept)
        )
        for unit in plan.units
    )
    names = [name for number, name in template.callables if number not in replaced]
    names += [name for new, _ in anew.values() for _, name in new.callables]
    gone = () if limit else (k for k in replaced if relative(template, k) not in files)
    callables = (*dict.fromkeys(names),)
    return OutputLayout(
        files,
        targets,
        whole=True,
        callables=callables,
        left_out=frozenset(gone),
        dropped=frozenset(one for one in dropped if one[0] in replaced),
        placed={name: replace(one, file=kept[one.file]) for name, one in composed.items()},
    )


def _refuse_shared(plan: Plan, converted: Mapping[Storage, DType]) -> None:
    """Raise MergeError where a tensor that is kept shares a storage that gets another dtype."""
    pairs = ((name, plan.aligned.template(name)) for name in plan.aligned.rows)
    changed = {info.path for name, info in pairs if plan.result(name) != info.dtype}
    template = plan.layouts[0]
    for info in template.tensors if converted else ():
        if info.storage in converted and info.path not in changed:
            what = f"tensor {dotted(info.path)!r} is kept, but shares memory with one that --dtype"
            hint = "write a bare state dict with --weights-only, or a .safetensors file"
            what, tensor = f"{what} converts", dotted(info.path)
            raise MergeError(what, where=template.where(info), hint=hint, tensor=tensor)


def _verbatim(template: Layout, number: int) -> FileLayout:
    nbytes, path = template.files[number].nbytes, template.files[number].path
    # Whoever made such a link could have any file of this machine copied.
    if template.members and template.members[number] is None and leads_out(template.path, path):
        what = f"it is a link to {path.resolve()}, outside of the checkpoint, and would be copied"
        hint = "put the file itself there if it belongs to the checkpoint, or remove the link"
        raise MergeError(what, where=path, hint=hint)
    whole = Storage("the file", -template.files[number].base, nbytes, file=number)
    return FileLayout(nbytes, copies=((whole, Slot(0, 0, nbytes)),))


def _resized_index(template: Layout, number: int, plan: Plan) -> FileLayout:
    """Return the template's index with the size that its tensors have with another dtype."""
    index = read_index(template.files[number])
    names = [name for name in plan.aligned.rows if name.key in index["weight_map"]]
    size = sum(plan.aligned.template(name).numel * plan.result(name).itemsize for name in names)
    metadata = index.get("metadata")
    index["metadata"] = {**(metadata if isinstance(metadata, dict) else {}), "total_size": size}
    return _as_json(index)


def _as_json(value: object) -> FileLayout:
    return _text(json.dumps(value, indent=2).encode() + b"\n")


def _text(data: bytes) -> FileLayout:
    return FileLayout(len(data), ((0, data),))


def _chosen(plan: Plan, weights: Mapping[Name, TensorInfo]) -> Mapping[Name, TensorInfo]:
    """Return the weights without the state dicts of which none is averaged, if some is of others.

    A new file has one state dict. Whoever excludes all of another leaves it out; else it is an
    error.
    """
    dicts = {name.state_dict for name in weights if name not in plan.aligned.skipped}
    dicts = dicts or {name.state_dict for name in weights}
    if len(dicts) > 1:
        found = named(sorted(map(dotted, dicts)), 8)
        hint = "name the one to write with --key, or leave the others out with --exclude"
        if () in dicts:
            hint += "; the root is --key ''"
        raise MergeError(f"it can hold one state dict, not {found}", hint=hint)
    return {name: info for name, info in weights.items() if name.state_dict in dicts}


def _created(
    form: Format,
    plan: Plan,
    weights: Mapping[Name, TensorInfo],
    targets: Sequence[list[Target]],
    placed: dict[Name, Target],
    shard: int | None = None,
) -> FileLayout:
    """Return the layout of a new file, an output or a shard of one; add the targets in it.

    A format with views keeps each unit as one storage, which tensors view as they do in the
    template. In others each tensor is contiguous and stands alone.
    """
    homes = _homes(plan)
    tensors = []
    for name, info in weights.items():
        dtype, key = plan.result(name), name.key
        if (one := plan.composed.get(name)) is not None:
            nbytes = math.prod(one.shape) * dtype.itemsize
            home = f"composite {len(placed)}" if form.views else key
            placed[name] = Target(0, math.prod(one.shape), shard or 0, home, 0)
            stride = row_major(one.shape)
            tensors.append(NewTensor(key, dtype, one.shape, stride, 0, home, nbytes))
            continue
        # Codes are what they are in any file; a lazy view would lose what is pending.
        if info.trouble and not (dtype.kind == "code" and dtype.safetensors):
            what = f"tensor {str(name)!r} is {info.trouble}, which a new file cannot hold"
            hint = "convert it to a plain tensor before saving"
            raise MergeError(what, where=plan.layouts[0].where(info), hint=hint, tensor=name)
        unit = homes.get(name)
        if unit is None:  # it has no elements, and any storage will do
            storage = f"empty {dtype.name}" if form.views else key
            tensors.append(NewTensor(key, dtype, info.shape, row_major(info.shape), 0, storage, 0))
            continue
        start, stop = info.start - unit.start, info.stop - unit.start
        ours = targets[unit.number]
        if form.views:
            storage, nbytes = str(unit.number), len(unit) * dtype.itemsize
            if not ours:
                ours.append(Target(0, len(unit), shard or 0, storage, 0))
        else:
            storage, nbytes = key, info.numel * dtype.itemsize
            view = None if info.contiguous else info
            ours.append(Target(start, stop, shard or 0, storage, 0, view))
        tensors.append(NewTensor(key, dtype, info.shape, info.stride, start, storage, nbytes))
    metadata = dict(plan.layouts[0].metadata) | dict(plan.metadata)
    return form.create(tensors, metadata, recorded=shard is None)


def _homes(plan: Plan) -> dict[Name, Unit]:
    return {name: unit for unit in plan.units for name, _ in unit.members}


def _sharded(plan: Plan, weights: Mapping[Name, TensorInfo], shard_size: int) -> OutputLayout:
    """Return shards with an index, named like the template's file, beside its other files."""
    template = plan.layouts[0]
    targets: list[list[Target]] = [[] for _ in plan.units]
    weights = _chosen(plan, weights)
    storages = {info.storage: None for info in weights.values()}
    consumed = {name for one in plan.composites for name in one.consumed}
    for info in template.tensors if consumed else ():  # scales too, that the output lacks
        if Name(info.path[:-1], str(info.path[-1])) in consumed:
            storages[info.storage] = None
    replaced = {part.file for storage in storages for part in homes_of(storage, template)}
    base, form, suffix = _shard_name(template, replaced)
    shards = _cut(plan, weights, shard_size)
    files: dict[str, FileLayout] = {}
    placed: dict[Name, Target] = {}
    table: dict[str, str] = {}
    for number, names in enumerate(shards):
        count = f"-{number + 1:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        name = f"{base}{count}{suffix}"
        part = {one: weights[one] for one in names}
        files[name] = _created(form, plan, part, targets, placed, number)
        table |= dict.fromkeys((one.key for one in names), PurePosixPath(name).name)
    if len(shards) > 1:
        size = sum(plan.nbytes(name, info) for name, info in weights.items())
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(table.items()))}
        files[f"{base}{suffix}{INDEX}"] = _as_json(index)
    # Configurations, tokenizers and weights that are not averaged come along as they are.
    carried: set[int] = set()
    for number, member in enumerate(template.members):
        name = relative(template, number)
        if number in replaced or is_index(name) or (member and member.set_member):
            continue
        if member and is_placeholder(template, member):
            continue
        if name in files:
            what = f"the new file {name} would replace one that the template has"
            raise MergeError(what, where=template.path, hint="remove it, or write one file")
        text = plan.texts.get(name)
        files[name] = _verbatim(template, number) if text is None else _text(text)
        carried.add(number)
    files[PROVENANCE_FILE] = RecordFile()
    whole = bool(template.members) and not any(m and m.set_member for m in template.members)
    callables = dict.fromkeys(name for number, name in template.callables if number in carried)
    return OutputLayout(files, tuple(map(tuple, targets)), whole, (*callables,), placed=placed)


def _shard_name(template: Layout, replaced: set[int]) -> tuple[str, Format, str]:
    """Return the name of shards up to their number, their format, and their ending."""
    paths = [PurePosixPath(relative(template, k)) for k in replaced if template.members]
    names = {(str(path.parent / unsharded(path.stem)), path.suffix) for path in paths}
    creatable = {one.name for one in FORMATS if one.suffixes}
    members = (template.members[k] for k in replaced if template.members)
    if len(names) == 1 and all(one and one.format in creatable for one in members):
        ((base, suffix),) = names
        return base, format_for(suffix) or _PICKLED, suffix
    return "model", _PLAIN, _PLAIN.suffixes[0]


def _cut(plan: Plan, weights: Mapping[Name, TensorInfo], limit: int) -> Sequence[list[Name]]:
    """Return names by shard, in order; names that share memory stay together."""
    # Files cannot share a storage: apart, tensors that are tied would be written twice, and no
    # longer tied when they are loaded.
    homes = _homes(plan)
    together: dict[object, list[Name]] = defaultdict(list)
    for name in weights:
        unit = homes.get(name)
        together[name if unit is None else unit.number].append(name)
    shards: list[list[Name]] = [[]]
    held = 0
    for names in together.values():
        size = sum(plan.nbytes(name, weights[name]) for name in names)
        if shards[-1] and held + size > limit:
            shards.append([])
            held = 0
        shards[-1] += names
        held += size
    return shards
