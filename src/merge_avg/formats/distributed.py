"""Directories of torch.distributed.checkpoint: each rank wrote its chunks of the tensors.

    .metadata          pickle: shape, dtype and chunks of each tensor, and where each chunk lies
    __0_0.distcp       chunks of rank 0
      0       PK 3 4 ... archive/data.pkl, archive/data/0 ...  PK 5 6     a chunk: one bare tensor
      1234    PK 3 4 ... PK 5 6                                           another
      2468    ...                                                         bytes of an object
    __1_0.distcp       chunks of rank 1

Gaps may lie between chunks. In a copy every chunk stays where the template has it, so that
`.metadata` still says where: an archive has to take exactly the bytes of the original, and no dtype
may change. The pickle is read without being run:

    Metadata(
      state_dict_metadata={
        "w": TensorStorageMetadata(properties=TensorProperties(dtype=torch.float32, ...),
                                   size=[6, 4],
                                   chunks=[ChunkStorageMetadata(offsets=[0, 0], sizes=[3, 4]),
                                           ChunkStorageMetadata(offsets=[3, 0], sizes=[3, 4])]),
        "epoch": BytesStorageMetadata()},
      planner_data={"w": ("model", "w")},             the path of each name in the state dict
      storage_data={
        MetadataIndex(fqn="w", offset=[0, 0]):
          _StorageInfo(relative_path="__0_0.distcp", offset=0, length=1234)})

Specification: torch/distributed/checkpoint/metadata.py and filesystem.py.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path

from merge_avg.checkpoint import (
    BY_NAME,
    Archive,
    BytesAt,
    Checksums,
    DType,
    File,
    FileLayout,
    Layout,
    Literal,
    Slot,
    Storage,
    TensorInfo,
    TreePath,
    impossible,
    kind_of,
    row_major,
)
from merge_avg.errors import MergeError
from merge_avg.formats import bounded
from merge_avg.formats.carried import callables_in
from merge_avg.formats.pickle.load import load
from merge_avg.formats.pickle.values import Allowance, Global, Instance, PickleError, Value, shown
from merge_avg.formats.zip import Part, ZipLayout
from merge_avg.formats.zip import copy as zip_copy
from merge_avg.formats.zip import scan as zip_scan

_NAME, _MARKER = "torch-dcp", ".metadata"
_LARGEST = 1 << 27  # bytes of `.metadata`
_LONGEST_PATH = 200
_MOST_CUT = 6  # dimensions that a tensor is cut along: a box has two corners for each
_METADATA = Global("torch.distributed.checkpoint.metadata", "Metadata")
_TORCH_SIZE = Global("torch", "Size")

_Index = tuple[int, ...]
_Box = tuple[_Index, _Index]  # its first corner, and its extents
# The name of a tensor, the first corner of a chunk, and where in a file it starts and how long it
# is. The bytes of an object have no corner.
_Chunk = tuple[str, _Index | None, int, int]


def scan_set(folder: Path, files: Mapping[str, tuple[int, File]]) -> dict[int, Layout]:
    """Return a layout for each file of chunks, and one for `.metadata` that has all the tensors.

    Numbers of files lead to layouts, and names in the folder to numbers and files.

    Raises:
        MergeError: something is damaged, missing, or packed in a way that only torch can read.
    """
    number, stamp = files[_MARKER]
    found: dict[int, Layout] = {}
    try:
        metadata = _Metadata(bounded.read(stamp.path, _LARGEST))
        for name, chunks in metadata.by_file().items():
            if name not in files:
                hint = "fetch the checkpoint again"
                raise MergeError(f"it lacks the file {name!r}", where=folder, hint=hint)
            found[files[name][0]] = _scanned(*files[name], chunks, metadata)
        # The tensors belong to the file that tells of them; files of chunks have none of their own.
        tensors, others = tuple(map(metadata.tensor, metadata.shapes)), tuple(metadata.others)
    except MergeError as error:
        raise error.at(stamp.path) from None
    callables = tuple((number, name) for name in metadata.callables)
    made = (stamp.path, _NAME, (stamp,), tensors, others)
    found[number] = Layout(
        *made, callables=callables, set_member=True, optimizers=metadata.optimizers
    )
    return found


def _scanned(number: int, stamp: File, chunks: Sequence[_Chunk], metadata: _Metadata) -> Layout:
    """Return the layout of a file of chunks, and add them to what the metadata knows."""
    records: list[Storage] = []
    members: list[Layout | None] = []
    callables: list[str] = []
    checksums: dict[BytesAt, int] = {}
    end = 0
    with stamp.path.open("rb") as file:
        # In the order of their bytes: chunks may not overlap, or a copy could not fill both.
        for fqn, corner, start, nbytes in sorted(chunks, key=itemgetter(2)):
            if start < end or start + nbytes > stamp.nbytes:
                what = f"the chunk of {fqn!r} is not where it should be"
                hint = "fetch or save it again"
                raise MergeError(what, where=stamp.path, hint=hint, tensor=fqn)
            end = start + nbytes
            name = f"{fqn} at {list(corner or ())}"
            records.append(Storage(name, start, nbytes, file=number))
            # The archive reader sees nothing but the chunk, so that no record reaches outside.
            part = Part(file, number, start, nbytes, f"{name}: ")
            if corner is None or fqn not in metadata.shapes:
                members.append(None)
                callables += callables_in(part, stamp)
                continue
            layout = zip_scan(file, stamp, number, part)
            checksums.update(layout.checksums)
            callables += (one for _, one in layout.callables)
            if len(layout.tensors) != 1 or layout.tensors[0].path:
                what = f"the chunk of {fqn!r} is not a tensor"
                raise MergeError(what, where=stamp.path, tensor=fqn)
            metadata.stored[fqn, corner] = layout.tensors[0]
            members.append(layout)
    archive = Archive(tuple(one.name for one in records), tuple(records), b"", "", (), ())
    named = tuple((number, one) for one in dict.fromkeys(callables))
    made = (stamp.path, _NAME, (stamp,), (), (), (), archive, tuple(members))
    return Layout(*made, callables=named, set_member=True, checksums=Checksums.of(checksums))


class _Metadata:
    """The content of a `.metadata` file, checked."""

    def __init__(self, data: bytes) -> None:
        self._allowance = Allowance()
        loaded = load(data, persistent=_nothing, call=_call, allowance=self._allowance)
        root, self.callables = loaded.value, loaded.callables
        if not isinstance(root, Instance) or root.function != _METADATA:
            raise PickleError("it is not metadata of torch.distributed.checkpoint")
        state = _table(root.state)
        self._places = _table(state.get("storage_data"))
        # Only the default planner writes the paths of names; see `_path` for those of others.
        plan = state.get("planner_data")
        self._paths = plan if isinstance(plan, dict) else {}
        self.shapes: dict[str, _Index] = {}
        self.paths: list[TreePath] = []  # of all entries
        self.others: list[str] = []  # top-level keys of those that are not tensors
        self.stored: dict[tuple[str, _Index], TensorInfo] = {}  # chunks by name and first corner
        self._dtypes: dict[str, DType] = {}
        self._boxes: dict[str, list[_Box]] = {}
        for fqn, entry in _table(state.get("state_dict_metadata")).items():
            self._add(fqn, entry)

    def _add(self, fqn: Value, entry: Value) -> None:
        if not isinstance(fqn, str) or not isinstance(entry, Instance):
            raise PickleError("it describes an entry in an unknown way")
        kind = entry.function.name if isinstance(entry.function, Global) else ""
        self.paths.append(self._path(fqn))
        if kind == "BytesStorageMetadata":
            self.others.append(str(self.paths[-1][0]))
            return
        state = _table(entry.state)
        dtype: Value = None
        # A tuple, as TensorProperties.__getstate__ makes it, or the attributes themselves.
        match state.get("properties"):
            case Instance(state=(dtype, *_) | {"dtype": dtype}):
                pass
        if kind != "TensorStorageMetadata" or not isinstance(dtype, Global):
            raise PickleError(f"it describes {fqn!r} in an unknown way", tensor=fqn)
        known = BY_NAME.get(dtype.name)
        if known is None:
            raise PickleError(f"tensor {fqn!r} is of the unknown dtype {shown(dtype)}", tensor=fqn)
        chunks = state.get("chunks")
        if not isinstance(chunks, list) or not all(isinstance(one, Instance) for one in chunks):
            raise PickleError("it describes chunks in an unknown way")
        # A list of chunks may be shared by many tensors: its pickle is short, this is not.
        self._allowance.spend(200 * len(chunks) + 500)
        self.shapes[fqn] = _size(state.get("size"))
        self._dtypes[fqn] = known
        self._boxes[fqn] = [
            (_size(_table(chunk.state).get("offsets")), _size(_table(chunk.state).get("sizes")))
            for chunk in chunks
        ]

    def by_file(self) -> dict[str, list[_Chunk]]:
        """Return all chunks and objects, by the name of the file that holds them."""
        files: dict[str, list[_Chunk]] = {}
        for key, value in self._places.items():
            index, place = _attributes(key), _attributes(value)
            entry = index.get("fqn"), *map(place.get, ("relative_path", "offset", "length"))
            match entry:
                case str() as fqn, str() as name, int() as at, int() as size if min(at, size) >= 0:
                    pass
                case _:
                    raise PickleError("it describes where a chunk lies in an unknown way")
            # Names of extensions such as compression, which only torch can undo.
            if place.get("transform_descriptors"):
                hint = "convert the checkpoint: python -m torch.distributed.checkpoint"
                hint += ".format_utils dcp_to_torch DIRECTORY OUTPUT.pt"
                raise MergeError(f"the chunks of {fqn!r} are compressed", hint=hint, tensor=fqn)
            corner = None if index.get("offset") is None else _size(index["offset"])
            files.setdefault(name, []).append((fqn, corner, at, size))
        return files

    def _path(self, fqn: str) -> TreePath:
        match self._paths.get(fqn):
            case tuple() as path if 1 < len(path) < _LONGEST_PATH and all(map(_is_key, path)):
                return path
        # Some writers flatten the names themselves: optimizer.state.exp_avg.WEIGHT.
        head, _, rest = fqn.partition(".")
        kind = kind_of(head)
        return (head, rest) if rest and kind and not kind.learned_too else (fqn,)

    @property
    def optimizers(self) -> tuple[TreePath, ...]:
        """Return the dicts that hold `state` and `param_groups`, or such names with dots."""
        state, groups = (
            {path[:n] for path in self.paths for n, key in enumerate(path) if _head(key) == word}
            for word in ("state", "param_groups")
        )
        return tuple(sorted(state & groups, key=str))

    def tensor(self, fqn: str) -> TensorInfo:
        """Return a tensor over the storages of its chunks, which are `stored` by now."""
        shape, dtype = self.shapes[fqn], self._dtypes[fqn]
        chunks: list[tuple[_Index, TensorInfo]] = []
        for corner, size in self._boxes[fqn]:
            info = self.stored.get((fqn, corner))
            if info is None or info.shape != size or info.dtype != dtype:
                raise PickleError(f"a chunk of {fqn!r} is missing or of another shape or dtype")
            chunks.append((corner, info))
        boxes = [(corner, info.shape) for corner, info in chunks if info.numel]
        if not chunks or not _tile(boxes, shape):
            raise PickleError(f"the chunks of {fqn!r} do not make up the tensor")
        path = self._path(fqn)
        # One chunk is the tensor itself, with whatever strides it was saved with.
        if len(chunks) == 1:
            return replace(chunks[0][1], path=path)
        chunks.sort(key=lambda chunk: chunk[0])
        whole = Storage(fqn, 0, math.prod(shape) * dtype.itemsize)
        # Cut along the first dimension, as FSDP does, the chunks are the bytes of the tensor one
        # after the other, and need no copy in the order of the whole.
        rows = all(
            info.contiguous
            and info.shape[1:] == shape[1:]
            and not info.start
            and info.storage.nbytes == info.numel * dtype.itemsize
            for _, info in chunks
        )
        if rows:
            whole = replace(whole, parts=tuple(info.storage for _, info in chunks))
        else:
            whole = replace(whole, tiles=tuple(chunks))
        trouble = next((info.trouble for _, info in chunks if info.trouble), None)
        return TensorInfo(path, dtype, shape, row_major(shape), 0, whole, trouble)


def _nothing(_: Value) -> Value:
    raise PickleError("it refers to something outside of it")


def _call(function: Global, args: tuple[Value, ...]) -> Value | None:
    return _size(args[0] if args else ()) if function == _TORCH_SIZE else None


def _size(value: Value) -> _Index:
    match value:
        case Instance(function=Global("torch", "Size"), args=(value, *_)):
            pass
    if impossible(value, value, 0, 1 << 63):
        raise PickleError("a shape in it is damaged")
    return tuple(value)


def _is_key(key: Value) -> bool:
    return isinstance(key, str) or (isinstance(key, int) and key.bit_length() <= 64)


def _head(key: str | int) -> str:
    return str(key).partition(".")[0]


def _table(value: Value) -> dict[Value, Value]:
    if not isinstance(value, dict):
        raise PickleError("it describes the checkpoint in an unknown way")
    return value


def _attributes(value: Value) -> dict[Value, Value]:
    return _table(value.state if isinstance(value, Instance) else value)


def _tile(boxes: Sequence[_Box], shape: _Index) -> bool:
    """Return whether boxes cover a tensor of this shape, each element once.

    Each box is known by its corners with signs, the mixed differences of the function that is 1 in
    the box and 0 outside. Functions are equal where their differences are: boxes tile a tensor
    exactly if their corners add up to those of the tensor. That takes time in proportion to the
    number of boxes, where comparing each with each other would take its square.
    """
    if any(not len(offset) == len(size) == len(shape) for offset, size in boxes):
        return False
    # Dimensions along which every box has the whole extent make no difference.
    cut = [d for d in range(len(shape)) if any((o[d], s[d]) != (0, shape[d]) for o, s in boxes)]
    if not all(shape) or len(cut) > _MOST_CUT:
        return not all(shape) and not boxes
    corners: Counter[_Index] = Counter()
    whole: _Box = ((0,) * len(shape), shape)
    for sign, (offset, size) in [(-1, whole), *((1, box) for box in boxes)]:
        for ends in itertools.product((0, 1), repeat=len(cut)):
            corner = tuple(offset[d] + end * size[d] for d, end in zip(cut, ends, strict=True))
            corners[corner] += sign * (-1) ** sum(ends)
    return not any(corners.values())


@dataclass(frozen=True)
class _ChunksLayout(FileLayout):
    """The layout of a file of chunks, some of which are archives that are written anew."""

    checked: bool = True
    # Of each archive its offset, the number of its first slot, and its layout.
    chunks: tuple[tuple[int, int, ZipLayout], ...] = ()

    def opening(self) -> Iterator[Literal]:
        """Yield the bytes that the archives open with."""
        for base, _, chunk in self.chunks:
            yield from ((base + at, data) for at, data in chunk.opening())

    def closing(self, record: bytes, checksums: Sequence[int]) -> Iterator[Literal]:  # noqa: ARG002
        """Yield the bytes that the archives close with."""
        for base, first, chunk in self.chunks:
            sums = checksums[first : first + len(chunk.entries)]
            yield from ((base + at, data) for at, data in chunk.closing(b"", sums))


def copy(
    layout: Layout,
    converted: Mapping[str, DType],
    averaged: set[str],
    *,
    recorded: bool = True,  # noqa: ARG001 - a file beside the set holds the provenance
) -> FileLayout:
    """Return the layout of a copy of one file of chunks; see `formats.copy`.

    Raises:
        MergeError: a dtype is to change, or a chunk would not take the room that it has.
    """
    archive = layout.archive
    if archive is None:
        raise ValueError("only a file of chunks can be copied as one")
    slots: dict[str, Slot] = {}
    copies: list[tuple[Storage, Slot]] = []
    inner: list[tuple[Storage, Slot]] = []
    chunks: list[tuple[int, int, ZipLayout]] = []
    end = number = 0
    for record, member in zip(archive.storages, layout.members, strict=True):
        if record.offset > end:
            gap = Storage(f"bytes from {end}", end, record.offset - end, file=record.file)
            copies.append((gap, Slot(number, end, gap.nbytes)))
            number += 1
        end = record.offset + record.nbytes
        names = {info.storage.name for info in member.tensors} if member else set()
        if member is None or not names & averaged:
            copies.append((record, Slot(number, record.offset, record.nbytes)))
            number += 1
            continue
        chunk = zip_copy(member, {}, averaged, recorded=False)
        if names & converted.keys() or chunk.nbytes(b"") != record.nbytes:
            hint = "write one file instead: end the output's name in .safetensors or .pt"
            what = "the chunks of this directory cannot be written anew"
            raise MergeError(what, where=layout.path, hint=hint)

        def moved(slot: Slot, first: int = number, base: int = record.offset) -> Slot:
            return Slot(first + slot.number, base + slot.offset, slot.nbytes)

        slots |= {name: moved(slot) for name, slot in chunk.slots.items()}
        inner += [(storage, moved(slot)) for storage, slot in chunk.copies]
        chunks.append((record.offset, number, chunk))
        number += len(chunk.entries)
    # In this order copies are hashed: what earlier versions recorded stays comparable.
    whole = (*copies, *inner)
    return _ChunksLayout(end, (), slots, whole, chunks=tuple(chunks))
