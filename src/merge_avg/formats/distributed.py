"""Directories of torch.distributed.checkpoint: a file .metadata, and files that hold chunks.

`.metadata` is a pickle (read here without running it) that says for each tensor its shape, its
dtype and its chunks, and for each chunk in which file it lies and where. A chunk is what torch.save
writes for one tensor. Format: torch/distributed/checkpoint/metadata.py and filesystem.py.
"""

from __future__ import annotations

import io
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from merge_avg.checkpoint import (
    BY_NAME,
    Archive,
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
    is_kept,
    row_major,
)
from merge_avg.errors import MergeError
from merge_avg.formats.pickle.allowance import Allowance
from merge_avg.formats.pickle.load import load
from merge_avg.formats.pickle.values import Global, Instance, PickleError, Value, shown
from merge_avg.formats.zip import Within, ZipLayout
from merge_avg.formats.zip import copy as zip_copy
from merge_avg.formats.zip import scan as zip_scan

_NAME, _MARKER = "torch-dcp", ".metadata"
_LARGEST = 1 << 27
_LONGEST_PATH = 200
_METADATA = Global("torch.distributed.checkpoint.metadata", "Metadata")
_TORCH_SIZE = Global("torch", "Size")
_MOST_CUT = 6  # dimensions that a tensor is cut along


class _Section(io.RawIOBase):
    """A range of a file as a file of its own."""

    def __init__(self, file: BinaryIO, offset: int, nbytes: int) -> None:
        self._file, self._offset, self._nbytes, self._at = file, offset, nbytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = max(0, (0, self._at, self._nbytes)[whence] + offset)
        return self._at

    def readinto(self, into: object) -> int:
        view = memoryview(into)  # type: ignore[arg-type]
        self._file.seek(self._offset + self._at)
        data = self._file.read(min(len(view), max(self._nbytes - self._at, 0)))
        view[: len(data)] = data
        self._at += len(data)
        return len(data)


@dataclass(frozen=True)
class _Chunk:
    """Where a chunk of a tensor, or an object (offset None), is stored."""

    fqn: str
    offset: tuple[int, ...] | None
    file: str
    start: int
    nbytes: int


def scan_set(folder: Path, files: Mapping[str, tuple[int, File]]) -> dict[int, Layout]:
    """The layouts of the files of one directory, by their numbers.

    Args:
        folder: the directory that holds `.metadata`.
        files: the number and the file of each name in the directory.

    Returns:
        A layout for each file of chunks, and one for `.metadata` that has all the tensors.

    Raises:
        MergeError: something is damaged, missing, or packed in a way that only torch can read.
    """
    number, stamp = files[_MARKER]
    if stamp.nbytes > _LARGEST:
        raise MergeError("it is absurdly large", where=stamp.path)
    try:
        return dict(_layouts(folder, files, number, _Metadata(stamp.path.read_bytes())))
    except MergeError as error:
        where = error.where or stamp.path
        raise type(error)(error.what, where=where, hint=error.hint) from None


def _layouts(
    folder: Path, files: Mapping[str, tuple[int, File]], number: int, metadata: _Metadata
) -> Iterator[tuple[int, Layout]]:
    """Each file's number and layout, that of `.metadata` last."""
    parts: dict[str, list[tuple[Storage, Layout | None]]] = {}
    stored: dict[tuple[str, tuple[int, ...]], TensorInfo] = {}
    for name, chunks in metadata.by_file().items():
        if name not in files:
            hint = "fetch the checkpoint again"
            raise MergeError(f"it lacks the file {name!r}", where=folder, hint=hint)
        parts[name] = list(_chunks(*files[name], chunks, metadata, stored))
    for name, found in parts.items():
        records = tuple((storage.name, storage) for storage, _ in found)
        members = tuple(layout for _, layout in found)
        archive = Archive(records, b"", "", (), ())
        file = files[name][1]
        layout = Layout(
            file.path, _NAME, (file,), (), archive=archive, members=members, set_member=True
        )
        yield files[name][0], layout
    tensors = tuple(metadata.tensor(fqn, stored) for fqn in metadata.sizes)
    stamp = files[_MARKER][1]
    yield number, Layout(stamp.path, _NAME, (stamp,), tensors, metadata.others(), set_member=True)


def _chunks(
    number: int,
    stamp: File,
    chunks: Sequence[_Chunk],
    metadata: _Metadata,
    stored: dict[tuple[str, tuple[int, ...]], TensorInfo],
) -> Iterator[tuple[Storage, Layout | None]]:
    """The chunks of one file, in order; fills `stored`."""
    end = 0
    with stamp.path.open("rb") as file:
        for chunk in sorted(chunks, key=lambda chunk: chunk.start):
            stop = chunk.start + chunk.nbytes
            if chunk.start < end or stop > stamp.nbytes:
                what = f"the chunk of {chunk.fqn!r} is not where it should be"
                raise MergeError(what, where=stamp.path, hint="fetch or save it again")
            end = stop
            name = f"{chunk.fqn} at {list(chunk.offset or ())}"
            whole = Storage(name, chunk.start, chunk.nbytes, file=number)
            if chunk.offset is None or chunk.fqn not in metadata.sizes:
                yield whole, None
                continue
            within = Within(chunk.start, f"{name}: ")
            section = io.BufferedReader(_Section(file, chunk.start, chunk.nbytes))
            layout = zip_scan(section, stamp, number, within)
            if len(layout.tensors) != 1 or layout.tensors[0].path:
                raise MergeError(f"the chunk of {chunk.fqn!r} is no tensor", where=stamp.path)
            stored[chunk.fqn, chunk.offset] = layout.tensors[0]
            yield whole, layout


class _Metadata:
    """What `.metadata` says, checked."""

    def __init__(self, data: bytes) -> None:
        self._allowance = Allowance()
        root = load(data, persistent=_nothing, call=_call, allowance=self._allowance).value
        if not isinstance(root, Instance) or root.function != _METADATA:
            raise PickleError("it is no metadata of torch.distributed.checkpoint")
        state = _table(root.state)
        self._stored = _table(state.get("storage_data"))
        plan = state.get("planner_data")
        self._paths = plan if isinstance(plan, dict) else {}
        self.sizes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, DType] = {}
        self._offsets: dict[str, list[tuple[tuple[int, ...], tuple[int, ...]]]] = {}
        self._objects: list[str] = []
        for fqn, entry in _table(state.get("state_dict_metadata")).items():
            self._add(fqn, entry)

    def _add(self, fqn: Value, entry: Value) -> None:
        if not isinstance(fqn, str) or not isinstance(entry, Instance):
            raise PickleError("it describes an entry in an unknown way")
        kind = entry.function.name if isinstance(entry.function, Global) else ""
        if kind == "BytesStorageMetadata":
            self._objects.append(fqn)
            return
        state = _table(entry.state)
        properties = state.get("properties")
        dtype: Value = None
        if isinstance(properties, Instance):
            match properties.state:
                case (Global() as dtype, *_):
                    pass
                case {"dtype": Global() as dtype}:
                    pass
        if kind != "TensorStorageMetadata" or not isinstance(dtype, Global):
            raise PickleError(f"it describes {fqn!r} in an unknown way")
        known = BY_NAME.get(dtype.name)
        if known is None:
            raise PickleError(f"tensor {fqn!r} is of the unknown dtype {shown(dtype)}")
        chunks = _instances(state.get("chunks"))
        self._allowance.spend(200 * len(chunks) + 500)
        self.sizes[fqn] = _size(state.get("size"))
        self.dtypes[fqn] = known
        self._offsets[fqn] = [
            (_size(_table(chunk.state).get("offsets")), _size(_table(chunk.state).get("sizes")))
            for chunk in chunks
        ]

    def by_file(self) -> dict[str, list[_Chunk]]:
        """All chunks and objects, by the file that holds them."""
        files: dict[str, list[_Chunk]] = {}
        for key, value in self._stored.items():
            index, place = _attributes(key), _attributes(value)
            fqn, offset = index.get("fqn"), index.get("offset")
            match place:
                case {
                    "relative_path": str() as name,
                    "offset": int() as start,
                    "length": int() as size,
                }:
                    pass
                case _:
                    raise PickleError("it describes where a chunk lies in an unknown way")
            if not isinstance(fqn, str) or start < 0 or size < 0:
                raise PickleError("it describes where a chunk lies in an unknown way")
            if place.get("transform_descriptors"):
                hint = "convert the checkpoint: python -m torch.distributed.checkpoint"
                hint += ".format_utils dcp_to_torch DIRECTORY OUTPUT.pt"
                raise MergeError(f"the chunks of {fqn!r} are compressed", hint=hint)
            where = None if offset is None else _size(offset)
            files.setdefault(name, []).append(_Chunk(fqn, where, name, start, size))
        return files

    def others(self) -> tuple[str, ...]:
        """Entries that are no tensors."""
        return tuple(str(self._path(fqn)[0]) for fqn in self._objects)

    def _path(self, fqn: str) -> TreePath:
        match self._paths.get(fqn):
            case tuple() as path if 1 < len(path) < _LONGEST_PATH and all(map(_is_key, path)):
                return path
        # Some writers flatten the names themselves: optimizer.state.exp_avg.WEIGHT.
        head, _, rest = fqn.partition(".")
        return (head, rest) if rest and is_kept(head) else (fqn,)

    def tensor(
        self, fqn: str, stored: Mapping[tuple[str, tuple[int, ...]], TensorInfo]
    ) -> TensorInfo:
        """A tensor over the storages of its chunks."""
        shape, dtype = self.sizes[fqn], self.dtypes[fqn]
        chunks: list[tuple[tuple[int, ...], TensorInfo]] = []
        for offset, size in self._offsets[fqn]:
            info = stored.get((fqn, offset))
            if info is None or info.shape != size or info.dtype != dtype:
                raise PickleError(f"a chunk of {fqn!r} is missing or of another shape or dtype")
            chunks.append((offset, info))
        _check_cover(fqn, shape, chunks)
        path = self._path(fqn)
        if len(chunks) == 1:
            return replace(chunks[0][1], path=path)
        chunks.sort(key=lambda chunk: chunk[0])
        strides = row_major(shape)
        nbytes = math.prod(shape) * dtype.itemsize
        whole = Storage(fqn, 0, nbytes)
        rows = all(
            info.contiguous
            and info.shape[1:] == shape[1:]
            and not info.start
            and info.storage.nbytes == info.numel * dtype.itemsize
            for _, info in chunks
        )
        if rows:  # cut along the first dimension, as FSDP does: one after the other
            parts = tuple(info.storage for _, info in chunks)
            return TensorInfo(path, dtype, shape, strides, 0, replace(whole, parts=parts))
        return TensorInfo(path, dtype, shape, strides, 0, replace(whole, tiles=tuple(chunks)))


_Box = tuple[tuple[int, ...], tuple[int, ...]]  # where it begins, and its extents


def _check_cover(
    fqn: str, shape: tuple[int, ...], chunks: Sequence[tuple[tuple[int, ...], TensorInfo]]
) -> None:
    """Raises PickleError where the chunks do not cover the tensor, each element once.

    A box is known by its corners, each with a sign: the mixed differences of the function that is 1
    inside. Boxes cover another exactly if their corners add up to those of the other.
    """
    boxes = [(offset, info.shape) for offset, info in chunks if info.numel]
    if (
        not chunks
        or any(not len(o) == len(s) == len(shape) for o, s in boxes)
        or not _tile(boxes, shape)
    ):
        raise PickleError(f"the chunks of {fqn!r} do not make up the tensor")


def _tile(boxes: Sequence[_Box], shape: tuple[int, ...]) -> bool:
    cut = [d for d in range(len(shape)) if any((o[d], s[d]) != (0, shape[d]) for o, s in boxes)]
    if not all(shape) or len(cut) > _MOST_CUT:
        return not all(shape) and not boxes
    corners: Counter[tuple[int, ...]] = Counter()
    whole: _Box = ((0,) * len(shape), shape)
    for sign, (offset, size) in [(-1, whole), *((1, box) for box in boxes)]:
        for ends in itertools.product((0, 1), repeat=len(cut)):
            corner = tuple(offset[d] + end * size[d] for d, end in zip(cut, ends, strict=True))
            corners[corner] += sign * (-1) ** sum(ends)
    return not any(corners.values())


def _nothing(_: Value) -> Value:
    raise PickleError("it refers to something outside of it")


def _call(function: Global, args: tuple[Value, ...]) -> Value | None:
    if function == _TORCH_SIZE:
        return _size(args[0] if args else ())
    return None


def _size(value: Value) -> tuple[int, ...]:
    match value:
        case Instance(function=Global("torch", "Size"), args=(value, *_)):
            pass
    if impossible(value, value, 0, 1 << 63):
        raise PickleError("a shape in it is damaged")
    return tuple(value)


def _is_key(key: Value) -> bool:
    return isinstance(key, str) or (isinstance(key, int) and key.bit_length() <= 64)


def _instances(value: Value) -> list[Instance]:
    if not isinstance(value, list) or not all(isinstance(one, Instance) for one in value):
        raise PickleError("it describes chunks in an unknown way")
    return value


def _table(value: Value) -> dict[Value, Value]:
    if not isinstance(value, dict):
        raise PickleError("it describes the checkpoint in an unknown way")
    return value


def _attributes(value: Value) -> dict[Value, Value]:
    return _table(value.state if isinstance(value, Instance) else value)


@dataclass(frozen=True)
class _ChunksLayout(FileLayout):
    """The layout of a file of chunks.

    Attributes:
        chunks: the archives in it that are written anew, and their offsets.
    """

    chunks: tuple[tuple[int, ZipLayout], ...] = ()

    def opening(self) -> Iterator[Literal]:
        """Yield what the archives open with."""
        for base, chunk in self.chunks:
            yield from ((base + at, data) for at, data in chunk.opening())

    def closing(self, record: bytes, checksums: Sequence[int]) -> Iterator[Literal]:  # noqa: ARG002
        """Yield what the archives close with."""
        first = 0
        for base, chunk in self.chunks:
            sums = checksums[first : first + len(chunk.entries)]
            yield from ((base + at, data) for at, data in chunk.closing(b"", sums))
            first += len(chunk.entries)


def copy(
    layout: Layout,
    converted: Mapping[str, DType],
    averaged: set[str],
    *,
    recorded: bool = True,  # noqa: ARG001 - a file beside the set holds the provenance
) -> FileLayout:
    """Return the layout of a copy of one file of chunks; every chunk stays where it is.

    Raises:
        MergeError: a dtype is to change, or a chunk would not take the room that it has.
    """
    archive = layout.archive
    if archive is None:
        raise ValueError("only a file of chunks can be copied as one")
    slots: dict[str, Slot] = {}
    copies: list[tuple[Storage, Slot]] = []
    copied: list[tuple[Storage, int, int]] = []  # with the offset and the size in the copy
    chunks: list[tuple[int, ZipLayout]] = []
    end = number = 0
    for (_, record), member in zip(archive.records, layout.members, strict=True):
        if record.offset > end:
            gap = Storage(f"bytes from {end}", end, record.offset - end, file=record.file)
            copied.append((gap, end, gap.nbytes))
        end = record.offset + record.nbytes
        names = {info.storage.name for info in member.tensors} if member else set()
        if member is None or not names & averaged:
            copied.append((record, record.offset, record.nbytes))
            continue
        chunk = zip_copy(member, {}, averaged, recorded=False)
        if names & converted.keys() or chunk.nbytes(b"") != record.nbytes:
            hint = "write one file instead: end the output's name in .safetensors or .pt"
            what = "the chunks of this directory cannot be written anew"
            raise MergeError(what, where=layout.path, hint=hint)
        # The slots of the chunks come first, so that each chunk finds its checksums in a row.
        for name, slot in chunk.slots.items():
            slots[name] = Slot(number + slot.number, record.offset + slot.offset, slot.nbytes)
        for storage, slot in chunk.copies:
            moved = Slot(number + slot.number, record.offset + slot.offset, slot.nbytes)
            copies.append((storage, moved))
        number += len(chunk.entries)
        chunks.append((record.offset, chunk))
    copies += [
        (storage, Slot(number + n, offset, nbytes))
        for n, (storage, offset, nbytes) in enumerate(copied)
    ]
    return _ChunksLayout(end, (), slots, tuple(copies), checked=True, chunks=tuple(chunks))
