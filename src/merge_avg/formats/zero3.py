"""DeepSpeed's ZeRO-3: each rank has a part of every parameter, in flat groups without names.

    zero_pp_rank_0_mp_rank_00_model_states.pt    param_shapes: [{"w": Size([7, 5]), "b": ...}]
                                                 module: {"w": empty, "buffer": whole}
    zero_pp_rank_0_mp_rank_00_optim_states.pt    fp32_flat_groups: [w's part | b's part | ...]
    zero_pp_rank_1_mp_rank_00_...                the same of the next rank

A parameter of n elements has a part of ceil(n / ranks) in the flat groups of each rank, one after
the other in the order of `param_shapes`; what the last ranks have too much is padding, with any
content. So the parameter is all parts one after the other, up to its n-th element.

Specification: _zero3_merge_trainable_params in deepspeed/utils/zero_to_fp32.py.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path

from merge_avg.checkpoint import Layout, Storage, TensorInfo, impossible, row_major
from merge_avg.errors import MergeError
from merge_avg.formats.pickle.load import load
from merge_avg.formats.pickle.values import InertDict, Instance, Value

_NAME = re.compile(
    r"(.*/)?([a-z0-9]+_)?zero_pp_rank_(?P<rank>\d{1,6})_mp_rank_00_(?P<kind>model|optim)_states\.pt"
)
_GROUPS = ("optimizer_state_dict", "fp32_flat_groups")
_AGAIN = "save it again, or gather it first: python zero_to_fp32.py CHECKPOINT_DIR OUTPUT_DIR"


@dataclass
class Gathered:
    """The tensors of the files of all ranks, as a directory has them."""

    held: dict[str, tuple[TensorInfo, ...]] = field(default_factory=dict)  # by file
    twins: dict[tuple[int, str], tuple[Storage, ...]] = field(default_factory=dict)
    # Of each part, by its file's number and its name, the record that it lies in and from where on.
    spans: dict[tuple[int, str], tuple[str, int]] = field(default_factory=dict)


def is_hollow(layout: Layout) -> bool:
    """Return whether a file has placeholders for parameters that ZeRO-3 has partitioned."""
    keys = {*layout.others, *(str(info.path[0]) for info in layout.tensors if info.path)}
    module = (info for info in layout.tensors if info.path and info.path[0] == "module")
    return "param_shapes" in keys and any(info.shape == (0,) for info in module)


def gather(root: Path, members: Mapping[str, Layout]) -> Gathered:
    """Return what the files of ZeRO-3 in a directory hold together; nothing if it has none.

    Raises:
        MergeError: the file of a rank is missing, or the files do not fit together.
    """
    ranks: dict[str, dict[int, str]] = {"model": {}, "optim": {}}
    for name in members:
        if found := _NAME.fullmatch(name):
            ranks[found["kind"]][int(found["rank"])] = name
    out = Gathered()
    if not any(is_hollow(members[name]) for name in ranks["model"].values()):
        return out
    models, optims = (_complete(root, kind, ranks) for kind in ("model", "optim"))
    try:
        _parameters([members[n] for n in models], [members[n] for n in optims], out, models[0])
        for name in optims:
            out.held[name] = tuple(i for i in members[name].tensors if i.path[:2] != _GROUPS)
        for name in models[1:]:
            out.held[name] = ()
    except MergeError as error:
        raise error.at(root) from None
    return out


def _complete(root: Path, kind: str, ranks: Mapping[str, Mapping[int, str]]) -> list[str]:
    """Return the names of all ranks' files of a kind, in order."""
    world = 1 + max(rank for some in ranks.values() for rank in some)
    for rank in range(world):
        if rank not in ranks[kind]:
            what = f"the {kind} states of rank {rank} are missing, of {world} ranks of ZeRO-3"
            raise MergeError(what, where=root, hint="fetch the checkpoint again")
    return [ranks[kind][rank] for rank in range(world)]


def _parameters(
    models: Sequence[Layout], optims: Sequence[Layout], out: Gathered, home: str
) -> None:
    world, found = len(models), []
    flats = [[i for i in layout.tensors if i.path[:2] == _GROUPS] for layout in optims]
    for info in (one for some in flats for one in some):
        if not info.contiguous or info.trouble or info.storage.coded or len(info.shape) != 1:
            raise MergeError("its flat groups are no plain vectors", hint=_AGAIN)
    sizes = [[(i.numel, i.dtype) for i in some] for some in flats]
    if any(some != sizes[0] for some in sizes) or not flats[0]:
        raise MergeError("the flat groups of its ranks are of different sizes", hint=_AGAIN)
    at, dtype = 0, flats[0][0].dtype
    firsts = [*accumulate((info.numel for info in flats[0]), initial=0)]
    total = firsts.pop()
    for name, shape in _shapes(models[0]):
        each = -(-math.prod(shape) // world)
        if at + each > total:
            raise MergeError("its flat groups are too small for its parameters", hint=_AGAIN)
        parts = [one for some in flats for one in _cut(some, firsts, at, each, out)]
        whole = Storage(f"module.{name}", 0, each * world * dtype.itemsize, parts=tuple(parts))
        path = ("module", name)
        found.append(TensorInfo(path, dtype, shape, row_major(shape), 0, whole))
        at += each
    if at != total:
        raise MergeError("its flat groups are too large for its parameters", hint=_AGAIN)
    known = {info.path for info in found}
    for info in models[0].tensors:
        if info.path in known:
            continue
        if info.path[0] == "module":
            if info.shape == (0,):
                what = f"parameter {info.path[-1]!r} is in no flat group, as one that is frozen"
                raise MergeError(what, hint=_AGAIN, tensor=str(info.path[-1]))
            _same(info, models, out)
        found.append(info)
    out.held[home] = tuple(found)


def _cut(
    flats: Sequence[TensorInfo], firsts: Sequence[int], at: int, count: int, out: Gathered
) -> Iterator[Storage]:
    """Yield where a rank has elements of its flat groups, which begin at `firsts`."""
    for number in range(max(bisect_right(firsts, at) - 1, 0), len(flats)):
        info, first = flats[number], firsts[number]
        start, stop = max(at, first), min(at + count, first + info.numel)
        if first >= at + count:
            break
        if start < stop:
            size = info.dtype.itemsize
            record, offset = info.storage, (info.start + start - first) * size
            name = f"{record.name} from {offset}"
            out.spans[record.file, name] = record.name, offset
            yield Storage(name, record.offset + offset, (stop - start) * size, file=record.file)


def _same(info: TensorInfo, models: Sequence[Layout], out: Gathered) -> None:
    """Note that a buffer is the same in all ranks."""
    for layout in models[1:]:
        theirs = next((one for one in layout.tensors if one.path == info.path), None)
        sums = models[0].checksum(info.storage), theirs and layout.checksum(theirs.storage)
        alike = theirs and replace(theirs, storage=info.storage) == info
        if theirs is None or not alike or (None not in sums and sums[0] != sums[1]):
            what = f"buffer {info.path[-1]!r} differs between ranks"
            raise MergeError(what, hint=_AGAIN, tensor=str(info.path[-1]))
        place = info.storage.file, info.storage.name
        out.twins[place] = (*out.twins.get(place, ()), theirs.storage)


def _shapes(layout: Layout) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the names and shapes of the parameters of all groups, in order."""
    if layout.archive is None:
        raise MergeError("its model states are not of torch.save", hint=_AGAIN)
    root = load(layout.archive.pickle, persistent=lambda _: None, call=_dict).value
    groups = root.get("param_shapes") if isinstance(root, dict) else None
    for group in groups if isinstance(groups, list) else ():
        for name, size in group.items() if isinstance(group, dict) else ():
            match size:
                case Instance(args=(size, *_)):
                    pass
            if not isinstance(name, str) or impossible(size, size, 0, 1 << 63):
                raise MergeError("it tells the shapes of its parameters in an unknown way")
            yield name, tuple(size)


def _dict(function: object, args: tuple[Value, ...]) -> Value | None:
    return InertDict() if str(function) == "collections.OrderedDict" and not args else None
