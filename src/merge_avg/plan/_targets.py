"""The output before its weights: its files as skeletons, and where in them each unit goes.

The output is a copy of the template, file by file, where it is of the template's kind. Otherwise
its weights are gathered into one new file, or cut into shards.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from merge_avg.checkpoint import (
    MARK_FILE,
    DType,
    Layout,
    Name,
    Place,
    Skeleton,
    Storage,
    TensorInfo,
    dotted,
    row_major,
)
from merge_avg.errors import MergeError, UsageError, named
from merge_avg.formats import DCP, rebuilt
from merge_avg.formats.directory import INDEX, is_index, leads_out, read_index, relative, unsharded
from merge_avg.plan._units import Plan, Unit, tiled

# Endings that stand for a zip checkpoint, where the template does not say so already.
ZIP_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
FILE = "."


@dataclass(frozen=True)
class Target:
    """Elements of a unit, counted from its start, and where in the output they go.

    `file` is the number of a file, `place` names room in its skeleton, `at` is an offset there in
    bytes. What does not lie contiguous in the unit goes to a contiguous place by way of the scratch
    file: `view` is it as a view of the unit.
    """

    start: int
    stop: int
    file: int
    place: str
    at: int
    view: TensorInfo | None = None


@dataclass(frozen=True)
class Draft:
    """The output's skeletons by relative path ("." for a single file), and each unit's targets.

    `whole` says whether it has all that the template has, not its weights only.
    """

    files: Mapping[str, Skeleton]
    targets: tuple[tuple[Target, ...], ...]
    whole: bool = False

    @property
    def directory(self) -> bool:
        """Whether the output is a directory."""
        return set(self.files) != {FILE}

    @property
    def nbytes(self) -> int:
        """The size of all files."""
        return sum(skeleton.nbytes for skeleton in self.files.values())

    @property
    def copies(self) -> Iterator[tuple[int, Storage]]:
        """What is copied from the template: the number of the output's file, and the bytes."""
        for number, skeleton in enumerate(self.files.values()):
            for storage, _ in skeleton.copies:
                yield number, storage


def make_draft(
    path: Path,
    plan: Plan,
    weights: Mapping[Name, TensorInfo],
    *,
    state_dict: bool,
    shard_size: int | None,
    mark: str = "",
) -> Draft:
    """The draft of an output.

    Args:
        path: of the output; its ending tells the format where the template does not.
        plan: what is averaged.
        weights: the template's, by name, in its order.
        state_dict: whether a bare state dict is asked for.
        shard_size: the largest size of a shard in bytes, if shards are asked for.
        mark: what the output says about how it was made.

    Raises:
        UsageError: the name or the options do not say what to write.
        MergeError: the format cannot hold the result.
    """
    template = plan.layouts[0]
    suffix = path.suffix.lower()
    is_file = suffix == ".safetensors" or suffix in ZIP_SUFFIXES
    try:
        if shard_size is not None:
            return _sharded(plan, weights, shard_size, mark)
        if template.members and not is_file:
            if state_dict:
                hint = "give the output a file's name, such as merged.safetensors"
                raise UsageError("--state-dict writes a file, not a directory", hint=hint)
            return _copied(plan, mark)
        if suffix == ".safetensors" and template.format != "safetensors":
            return _fresh_safetensors(plan, weights, _short_names(weights), 0, mark)
        if suffix == ".safetensors" or (template.archive is not None and not state_dict):
            return _copied(plan, mark)
        if template.archive is None and suffix not in ZIP_SUFFIXES:
            hint = f"end its name in .safetensors, or in {', '.join(ZIP_SUFFIXES)}"
            what = f"the name {path.name!r} does not say which format to write"
            raise UsageError(what, hint=hint)
        return _fresh_zip(plan, weights, _short_names(weights), 0, mark)
    except MergeError as error:
        if error.where is not None:
            raise
        raise type(error)(error.what, where=path, hint=error.hint) from None


# Copies of the template


def _copied(plan: Plan, mark: str) -> Draft:
    template = plan.layouts[0]
    averaged: dict[int, set[str]] = {}
    converted: dict[int, dict[str, DType]] = {}
    for storage in {unit.storage for unit in plan.units}:
        for part in storage.ranges:
            averaged.setdefault(part.file, set()).add(part.name)
    _refuse_shared(plan)
    for storage, dtype in plan.converted().items():
        for part in storage.ranges:
            converted.setdefault(part.file, {})[part.name] = dtype
    files: dict[str, Skeleton] = {}
    for number, member in enumerate(template.members or (template,)):
        name = relative(template, number) if template.members else FILE
        if member is not None and (number in averaged | converted or not template.members):
            parts = converted.get(number, {}), averaged.get(number, set())
            files[name] = rebuilt(member, *parts, "" if template.members else mark)
        elif converted and is_index(name):
            files[name] = _literal(_resized_index(template, number, plan))
        else:
            files[name] = _copy(template, number)
    if template.members and mark:
        files[MARK_FILE] = _literal(mark.encode())
    targets = tuple(tuple(_in_place(unit, template)) for unit in plan.units)
    return Draft(files, targets, whole=True)


def _refuse_shared(plan: Plan) -> None:
    """Raises MergeError where a tensor that is kept shares a storage that gets another dtype."""
    converted = plan.converted()
    rows = ((name, row[0]) for name, row in plan.aligned.rows.items())
    changed = {info.path for name, info in rows if info and plan.result(name) != info.dtype}
    template = plan.layouts[0]
    for info in template.tensors:
        if info.storage in converted and info.path not in changed:
            what = f"tensor {dotted(info.path)!r} is kept, but shares memory with one that --dtype"
            hint = "write a bare state dict with --state-dict, or a .safetensors file"
            raise MergeError(f"{what} converts", where=template.where(info), hint=hint)


def _in_place(unit: Unit, template: Layout) -> Iterator[Target]:
    """Where a unit goes in a copy of the template."""
    storage, size = unit.storage, unit.dtype.itemsize
    if storage.tiles:
        for _, info in unit.members:
            for tile, view in tiled(info, replace(info, start=info.start - unit.start)):
                if not tile.contiguous:
                    hint = "write one file: end the output's name in .safetensors or .pt"
                    what = f"the chunk {tile.storage.name!r} has strides"
                    raise MergeError(what, where=template.where(tile), hint=hint)
                home = tile.storage
                at = tile.start * size
                yield Target(view.start, view.stop, home.file, home.name, at, view)
        return
    start = 0
    for part in storage.ranges:
        stop = start + part.nbytes // unit.sources[0].dtype.itemsize
        first, last = max(start, unit.start), min(stop, unit.stop)
        if first < last:
            at = (first - start) * size
            yield Target(first - unit.start, last - unit.start, part.file, part.name, at)
        start = stop


def _copy(template: Layout, number: int) -> Skeleton:
    """A file of the template, byte for byte.

    Raises:
        MergeError: it is no checkpoint, and a link out of the directory: whoever made that could
            have any file of this machine copied.
    """
    nbytes, path = template.files[number].nbytes, template.files[number].path
    if template.members and template.members[number] is None and leads_out(template.path, path):
        what = f"it is a link to {path.resolve()}, outside of the checkpoint, and would be copied"
        hint = "put the file itself there if it belongs to the checkpoint, or remove the link"
        raise MergeError(what, where=path, hint=hint)
    whole = Storage("the file", 0, nbytes, file=number)
    return Skeleton(nbytes, (), {}, ((whole, Place(0, nbytes)),))


def _literal(data: bytes) -> Skeleton:
    return Skeleton(len(data), ((0, data),), {})


def _resized_index(template: Layout, number: int, plan: Plan) -> bytes:
    """The template's index with the size that its tensors have with another dtype."""
    index = read_index(template.files[number])
    keys = index["weight_map"]
    found = [(name, row[0]) for name, row in plan.aligned.rows.items() if name.key in keys]
    size = sum(info.numel * plan.result(name).itemsize for name, info in found if info)
    metadata = index.get("metadata")
    index["metadata"] = {**(metadata if isinstance(metadata, dict) else {}), "total_size": size}
    return _as_json(index)


def _as_json(value: object) -> bytes:
    return json.dumps(value, indent=2).encode() + b"\n"


# New files


def _short_names(weights: Mapping[Name, TensorInfo]) -> dict[Name, str]:
    """Names as keys of the one state dict that the output holds."""
    dicts = {name.state_dict for name in weights}
    if len(dicts) > 1:
        found = named(sorted(str(Name(d[:-1], str(d[-1]))) if d else "" for d in dicts), 8)
        hint = "name the one to write with --key"
        raise MergeError(f"it can hold one state dict, not {found}", hint=hint)
    return {name: name.key for name in weights}


def _fresh_safetensors(
    plan: Plan,
    weights: Mapping[Name, TensorInfo],
    short: Mapping[Name, str],
    number: int,
    mark: str = "",
) -> Draft:
    from merge_avg.formats import safetensors

    entries = [(short[name], plan.result(name), info.shape) for name, info in weights.items()]
    skeleton = safetensors.fresh(entries, safetensors.marked(plan.layouts[0], mark))
    targets: list[tuple[Target, ...]] = []
    for unit in plan.units:
        views = [
            (short[name], info, info.start - unit.start, info.stop - unit.start)
            for name, info in unit.members
            if name in weights
        ]
        targets.append(
            tuple(
                Target(start, stop, number, name, 0, None if info.contiguous else info)
                for name, info, start, stop in views
            )
        )
    return Draft({FILE: skeleton}, tuple(targets))


def _fresh_zip(
    plan: Plan,
    weights: Mapping[Name, TensorInfo],
    short: Mapping[Name, str],
    number: int,
    mark: str = "",
) -> Draft:
    from merge_avg.formats.pickle.write import FreshTensor
    from merge_avg.formats.zip import write as torch_zip_write

    homes = {name: (i, unit) for i, unit in enumerate(plan.units) for name, _ in unit.members}
    tensors = []
    sizes: dict[str, int] = {}
    for name, info in weights.items():
        dtype = plan.result(name)
        if name not in homes:  # it has no elements
            storage = f"empty {dtype.name}"
            sizes.setdefault(storage, 0)
            tensors.append((short[name], dtype, info.shape, row_major(info.shape), 0, storage))
            continue
        index, unit = homes[name]
        sizes[str(index)] = len(unit) * dtype.itemsize
        start = info.start - unit.start
        tensors.append((short[name], dtype, info.shape, info.stride, start, str(index)))
    skeleton = torch_zip_write.fresh([FreshTensor(*t) for t in tensors], sizes, mark)
    targets = (
        (Target(0, len(unit), number, str(index), 0),) if str(index) in sizes else ()
        for index, unit in enumerate(plan.units)
    )
    return Draft({FILE: skeleton}, tuple(targets))


def _sharded(plan: Plan, weights: Mapping[Name, TensorInfo], shard_size: int, mark: str) -> Draft:
    """Shards with an index, named as the template's file, beside what else its directory holds."""
    template = plan.layouts[0]
    short = _short_names(weights)
    replaced = {part.file for info in weights.values() for part in info.storage.ranges}
    base, suffix = _shard_name(template, replaced)
    fresh = _fresh_safetensors if suffix == ".safetensors" else _fresh_zip
    shards = _cut(plan, weights, shard_size)
    files: dict[str, Skeleton] = {}
    targets: list[list[Target]] = [[] for _ in plan.units]
    table: dict[str, str] = {}
    for number, names in enumerate(shards):
        name = f"{base}-{number + 1:05}-of-{len(shards):05}{suffix}"
        name = f"{base}{suffix}" if len(shards) == 1 else name
        part = {one: weights[one] for one in names}
        draft = fresh(plan, part, short, number)
        files[name] = draft.files[FILE]
        for some, more in zip(targets, draft.targets, strict=True):
            some.extend(more)
        table |= dict.fromkeys((short[one] for one in names), PurePosixPath(name).name)
    if len(shards) > 1:
        size = sum(info.numel * plan.result(name).itemsize for name, info in weights.items())
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(table.items()))}
        files[f"{base}{suffix}{INDEX}"] = _literal(_as_json(index))
    for number, member in enumerate(template.members):
        name = relative(template, number)
        if number in replaced or is_index(name) or (member and member.format == DCP):
            continue
        if name in files:
            what = f"the new file {name} would replace one that the template has"
            raise MergeError(what, where=template.path, hint="remove it, or write one file")
        files[name] = _copy(template, number)
    if mark:
        files[MARK_FILE] = _literal(mark.encode())
    dropped = any(member and member.format == DCP for member in template.members)
    whole = bool(template.members) and not dropped
    return Draft(files, tuple(map(tuple, targets)), whole=whole)


def _shard_name(template: Layout, replaced: set[int]) -> tuple[str, str]:
    """What shards are called, up to their number, and their ending."""
    names = {
        (str(path.parent / unsharded(path.stem)), path.suffix)
        for path in (PurePosixPath(relative(template, number)) for number in replaced)
        if template.members
    }
    formats = {template.members[number].format for number in replaced if template.members}  # type: ignore[union-attr]
    if len(names) == 1 and formats <= {"torch-zip", "safetensors"}:
        return names.pop()
    return "model", ".safetensors"


def _cut(plan: Plan, weights: Mapping[Name, TensorInfo], limit: int) -> list[list[Name]]:
    """Names by shard, in order; what shares memory stays together."""
    homes = {name: index for index, unit in enumerate(plan.units) for name, _ in unit.members}
    together: dict[object, list[Name]] = {}
    for name in weights:
        together.setdefault(homes.get(name, name), []).append(name)
    shards: list[list[Name]] = [[]]
    held = 0
    for names in together.values():
        size = sum(weights[name].numel * plan.result(name).itemsize for name in names)
        if shards[-1] and held + size > limit:
            shards.append([])
            held = 0
        shards[-1] += names
        held += size
    return shards
