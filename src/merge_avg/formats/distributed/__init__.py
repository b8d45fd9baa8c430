"""Directories of torch.distributed.checkpoint: each rank wrote its chunks of the tensors.

    .metadata          pickle: shape, dtype and chunks of each tensor, and where each chunk lies
    __0_0.distcp       chunks of rank 0
      0       PK 3 4 ... archive/data.pkl, archive/data/0 ...  PK 5 6     a chunk: one bare tensor
      1234    PK 3 4 ... PK 5 6                                           another
      2468    ...                                                         bytes of an object
    __1_0.distcp       chunks of rank 1

Gaps may lie between chunks. In a copy every chunk stays where the template has it, so that
`.metadata` still says where: an archive has to take exactly the bytes of the original, and no dtype
may change.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from merge_avg.checkpoint import (
    Archive,
    DType,
    File,
    FileLayout,
    Layout,
    Literal,
    Slot,
    Storage,
    TensorInfo,
)
from merge_avg.errors import MergeError
from merge_avg.formats.distributed.metadata import Chunk, Metadata
from merge_avg.formats.zip import Within, ZipLayout
from merge_avg.formats.zip import copy as zip_copy
from merge_avg.formats.zip import scan as zip_scan

_NAME, _MARKER = "torch-dcp", ".metadata"
_LARGEST = 1 << 27  # bytes of `.metadata`


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


def scan_set(folder: Path, files: Mapping[str, tuple[int, File]]) -> dict[int, Layout]:
    """Return a layout for each file of chunks, and one for `.metadata` that has all the tensors.

    Numbers of files lead to layouts, and names in the folder to numbers and files.

    Raises:
        MergeError: something is damaged, missing, or packed in a way that only torch can read.
    """
    number, stamp = files[_MARKER]
    if stamp.nbytes > _LARGEST:
        raise MergeError("it is absurdly large", where=stamp.path)
    try:
        return dict(_layouts(folder, files, number, Metadata(stamp.path.read_bytes())))
    except MergeError as error:
        raise error.at(stamp.path) from None


def _layouts(
    folder: Path, files: Mapping[str, tuple[int, File]], number: int, metadata: Metadata
) -> Iterator[tuple[int, Layout]]:
    """Yield each file's number and layout, that of `.metadata` last."""
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
        index, file = files[name]
        made = Layout(file.path, _NAME, (file,), (), (), (), archive, members, set_member=True)
        yield index, made
    # The tensors belong to the file that tells of them; files of chunks have none of their own.
    tensors = tuple(metadata.tensor(fqn, stored) for fqn in metadata.sizes)
    stamp = files[_MARKER][1]
    yield number, Layout(stamp.path, _NAME, (stamp,), tensors, metadata.others(), set_member=True)


def _chunks(
    number: int,
    stamp: File,
    chunks: Sequence[Chunk],
    metadata: Metadata,
    stored: dict[tuple[str, tuple[int, ...]], TensorInfo],
) -> Iterator[tuple[Storage, Layout | None]]:
    """Yield the chunks of one file in order, and add them to `stored` by name and offset."""
    end = 0
    with stamp.path.open("rb") as file:
        # In the order of their bytes: chunks may not overlap, or a copy could not fill both.
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
            # The archive reader sees nothing but the chunk, so that no record reaches outside.
            within = Within(chunk.start, f"{name}: ")
            section = io.BufferedReader(_Section(file, chunk.start, chunk.nbytes))
            layout = zip_scan(section, stamp, number, within)
            if len(layout.tensors) != 1 or layout.tensors[0].path:
                raise MergeError(f"the chunk of {chunk.fqn!r} is not a tensor", where=stamp.path)
            stored[chunk.fqn, chunk.offset] = layout.tensors[0]
            yield whole, layout


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
    for (_, record), member in zip(archive.records, layout.members, strict=True):
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
