"""Sets of rank files: each rank of a training saved its own parts of distributed tensors.

    model_world_size_2_rank_0.pt    {"w": DTensor(rows 0 to 3 of 7), "b": plain}
    model_world_size_2_rank_1.pt    {"w": DTensor(rows 4 to 6 of 7), "b": plain, the same}

A DTensor says what the whole has for a shape, along which of its dimensions each dimension of the
mesh of ranks cuts it, and where in the mesh its rank is. So together the files have the tensors,
each made up of parts. What several ranks have in common (a plain tensor, or one that the mesh
replicates) is read from the first, and written for all.

Specification: torch/distributed/tensor/_dtensor_spec.py and placement_types.py.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from merge_avg.checkpoint import Layout, Storage, TensorInfo, TreePath, dotted
from merge_avg.errors import MergeError, named
from merge_avg.formats.refused import one_rank
from merge_avg.formats.tiles import Index, joined, tile

_RANK = re.compile(r"(?P<head>(.*[^A-Za-z0-9])?rank[-_]?)(?P<rank>\d{1,6})(?P<tail>\D*)")
_WORLD = re.compile(r"world_size[-_]?(\d{1,6})(?!\d)")
_AGAIN = "save all ranks again, or fetch the files again"

Twins = dict[tuple[int, str], tuple[Storage, ...]]


@dataclass(frozen=True)
class RankSet:
    """The files of all ranks, by rank, and the tensors that they have together."""

    names: tuple[str, ...]
    place: TreePath  # the folders and the name of all, without the number of a rank
    tensors: tuple[TensorInfo, ...]


def rank_sets(root: Path, members: Mapping[str, Layout], twins: Twins) -> list[RankSet]:
    """Return the sets among the files of a directory that hold parts of tensors; add to `twins`.

    Raises:
        MergeError: the file of a rank is missing, or the files do not fit together.
    """
    groups: dict[tuple[str, str], dict[int, str]] = defaultdict(dict)
    parts: set[tuple[str, str]] = set()
    for name, member in members.items():
        path = PurePosixPath(name)
        found = _RANK.fullmatch(path.name)
        apart = any(info.shard for info in member.tensors)
        if found is None:
            if apart:
                raise one_rank(root / name)
            continue
        key = str(path.parent / found["head"]), found["tail"]
        groups[key][int(found["rank"])] = name
        parts |= {key} if apart else set()
    sets = []
    for head, tail in sorted(parts):
        files = groups[head, tail]
        told = _WORLD.search(PurePosixPath(head).name)
        world = max(int(told[1]) if told else 0, max(files) + 1)
        lacking = [rank for rank in range(world) if rank not in files]
        if lacking:
            what = (
                f"{len(lacking)} of its {world} ranks are missing, the first is rank {lacking[0]}"
            )
            lost = f"{PurePosixPath(head).name}{lacking[0]}{tail}"
            raise MergeError(f"{what} ({lost})", where=root, hint="fetch the checkpoint again")
        names = tuple(files[rank] for rank in range(world))
        # Neither the number of a rank nor of all is a part of what the weights are called.
        stem = _WORLD.sub("", PurePosixPath(head).name).removesuffix("_")
        place = PurePosixPath(head).with_name(re.sub(r"[-_]*rank[-_]?$", "", stem) or "model")
        try:
            tensors = _tensors([members[name] for name in names], twins)
        except MergeError as error:
            raise error.at(root) from None
        sets.append(RankSet(names, place.parts, tensors))
    return sets


def _tensors(ranks: Sequence[Layout], twins: Twins) -> tuple[TensorInfo, ...]:
    """Return the whole tensors of all ranks, in the order of the first."""
    tables = [{info.path: info for info in layout.tensors} for layout in ranks]
    for rank, table in enumerate(tables):
        odd = [dotted(path) for path in table.keys() ^ tables[0].keys()]
        if odd:
            what = f"ranks 0 and {rank} do not hold the same tensors: {named(sorted(odd), 3)}"
            raise MergeError(what, hint=_AGAIN)
    found: list[TensorInfo] = []
    known: dict[object, TensorInfo] = {}  # tensors that are tied have the same parts
    for path in tables[0]:
        infos = [table[path] for table in tables]
        info = _whole(path, infos, ranks, twins)
        spots = tuple((one.storage.file, one.storage.name, one.start, one.shape) for one in infos)
        first = known.setdefault((spots, info.shape, info.stride), info)
        found.append(replace(info, storage=first.storage))
    return tuple(found)


def _whole(
    path: TreePath, infos: Sequence[TensorInfo], ranks: Sequence[Layout], twins: Twins
) -> TensorInfo:
    name, first = dotted(path), infos[0]
    shards = [info.shard for info in infos]
    same = {(i.dtype, i.shard and (i.shard.shape, i.shard.dims), i.trouble) for i in infos}
    if len(same) > 1:
        what = f"tensor {name!r} has not the same dtype, shape and placement in all ranks"
        raise MergeError(what, hint=_AGAIN, tensor=name)
    if first.shard is None:
        boxes: list[Index] = [() for _ in infos]
        shape = first.shape
        alike = {(info.shape, info.stride, info.start) for info in infos}
        if len(alike) > 1:
            what = f"tensor {name!r} differs between ranks, which do not say that it is distributed"
            raise MergeError(what, hint=_AGAIN, tensor=name)
    else:
        shape = first.shard.shape
        known = [shard.place if shard else None for shard in shards]
        if None in known and len(first.shard.dims) == 1:
            known = [(rank,) for rank in range(len(infos))]
        boxes = _corners(infos, [one for one in known if one is not None], first.shard.dims, name)
    chunks: dict[Index, TensorInfo] = {}
    owners: dict[Index, Layout] = {}
    for corner, info, layout in zip(boxes, infos, ranks, strict=True):
        if first.shard is not None and not info.numel and all(shape):
            continue  # of a rank for which nothing is left
        part = replace(info, trouble=None, shard=None) if info.shard else info
        if corner not in chunks:
            chunks[corner], owners[corner] = part, layout
            continue
        ours = chunks[corner]
        sums = owners[corner].checksum(ours.storage), layout.checksum(part.storage)
        if part.shape != ours.shape or (None not in sums and sums[0] != sums[1]):
            what = f"tensor {name!r} should be the same in several ranks, and differs"
            hint = "average the ranks' files one by one, or save a full state dict"
            raise MergeError(what, hint=hint, tensor=name)
        at = ours.storage.file, ours.storage.name
        if part.storage not in twins.get(at, ()):
            twins[at] = (*twins.get(at, ()), part.storage)
    if first.shard is None:
        return first
    covered = [(corner, one.shape) for corner, one in chunks.items() if one.numel]
    if not chunks or not tile(covered, shape):
        what = f"the parts of {name!r} do not make up the tensor"
        raise MergeError(what, hint=_AGAIN, tensor=name)
    return joined(name, path, first.dtype, shape, [*chunks.items()])


def _corners(
    infos: Sequence[TensorInfo], places: Sequence[Index], dims: Sequence[int | None], name: str
) -> list[Index]:
    """Return the first corner of each rank's part: what lies before it along each dimension."""
    cut = [dim for dim in dims if dim is not None]
    if len(places) < len(infos) or len(set(cut)) < len(cut):
        what = f"tensor {name!r} is distributed over a mesh of ranks in an unknown way"
        hint = "save a full state dict, or use a directory of torch.distributed.checkpoint"
        raise MergeError(what, hint=hint, tensor=name)
    corners = [[0] * len(info.shape) for info in infos]
    for axis, dim in enumerate(dims):
        if dim is None:
            continue
        extents = {place[axis]: info.shape[dim] for place, info in zip(places, infos, strict=True)}
        before, starts = 0, {}
        for at in sorted(extents):
            starts[at] = before
            before += extents[at]
        for corner, place in zip(corners, places, strict=True):
            corner[dim] = starts[place[axis]]
    return [tuple(corner) for corner in corners]
