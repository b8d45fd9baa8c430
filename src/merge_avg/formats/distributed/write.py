"""Sets of chunks, written: a file as the template has it, or the whole set anew.

    copy        every chunk in its place, so that the template's `.metadata` still says where
    rewrite     without some of the chunks, with other dtypes or in files of a given size: what is
                left lies one after the other, and a new `.metadata` says where

A chunk that stays whole is a copy of the template's archive, with its strides. One that is larger
than a file may be is cut along its first dimensions into runs of its elements:

    chunk at [4, 0], 6 x 3    ->   at [4, 0], 4 x 3   and   at [8, 0], 2 x 3

"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import itemgetter

from merge_avg.checkpoint import (
    DType,
    File,
    FileLayout,
    Layout,
    Literal,
    NewTensor,
    Slot,
    Storage,
    TensorInfo,
    kind_of,
    row_major,
)
from merge_avg.errors import MergeError
from merge_avg.formats import Asked, NewSet, Piece, bounded
from merge_avg.formats.carried import callables_in
from merge_avg.formats.distributed.metadata import LARGEST, Placed, SetMetadata
from merge_avg.formats.pickle.values import PickleError
from merge_avg.formats.tiles import Index
from merge_avg.formats.zip import Part, ZipLayout, bare
from merge_avg.formats.zip import copy as zip_copy

# Bytes beside the elements of a chunk: records of torch take 1,200 to 1,500 beside the name.
_AROUND = 2048
_LEAST = 1024  # bytes of elements: a cut does not make chunks smaller than this


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


@dataclass
class _Chunks:
    """A file of chunks in the making: each goes where the last one ends."""

    end: int = 0
    _number: int = 0
    _slots: dict[str, Slot] = field(default_factory=dict)
    _copies: list[tuple[Storage, Slot]] = field(default_factory=list)
    _inner: list[tuple[Storage, Slot]] = field(default_factory=list)
    _archives: list[tuple[int, int, ZipLayout]] = field(default_factory=list)

    def add(self, content: Storage | ZipLayout) -> None:
        """Add bytes of the template as they are, or an archive that is written anew."""
        first, base = self._number, self.end
        if isinstance(content, Storage):
            self._copies.append((content, Slot(first, base, content.nbytes)))
            self._number += 1
            self.end += content.nbytes
            return

        def moved(slot: Slot) -> Slot:
            return Slot(first + slot.number, base + slot.offset, slot.nbytes)

        self._slots |= {name: moved(slot) for name, slot in content.slots.items()}
        self._inner += [(storage, moved(slot)) for storage, slot in content.copies]
        self._archives.append((base, first, content))
        self._number += len(content.entries)
        self.end += content.nbytes(b"")

    def layout(self) -> FileLayout:
        """Return the layout of the file."""
        # In this order copies are hashed: what earlier versions recorded stays comparable.
        whole = (*self._copies, *self._inner)
        return _ChunksLayout(self.end, (), self._slots, whole, chunks=tuple(self._archives))


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
    chunks = _Chunks()
    for record, member in zip(archive.storages, layout.members, strict=True):
        if record.offset > chunks.end:
            size = record.offset - chunks.end
            chunks.add(Storage(f"bytes from {chunks.end}", chunks.end, size, file=record.file))
        names = {info.storage.name for info in member.tensors} if member else set()
        if member is None or not names & averaged:
            chunks.add(record)
            continue
        chunk = zip_copy(member, {}, averaged, recorded=False)
        if names & converted.keys() or chunk.nbytes(b"") != record.nbytes:
            hint = "write one file instead: end the output's name in .safetensors or .pt"
            what = "the chunks of this directory cannot be written anew"
            raise MergeError(what, where=layout.path, hint=hint)
        chunks.add(chunk)
    return chunks.layout()


@dataclass(frozen=True)
class _Item:
    """A chunk or an object of the template that stays."""

    fqn: str
    corner: Index | None
    record: Storage  # all its bytes
    file: str
    member: Layout | None  # None for an object

    @property
    def info(self) -> TensorInfo | None:
        return None if self.member is None else self.member.tensors[0]

    @property
    def home(self) -> tuple[int, str] | None:
        """Return the number of its file, and the name of its storage."""
        return None if self.info is None else (self.record.file, self.info.storage.name)


def rewrite(template: Layout, number: int, asked: Asked) -> NewSet:
    """Return a set anew, of whose `.metadata` this is the number in the template's directory.

    Raises:
        MergeError: it changed since it was scanned, or holds what cannot be written again.
    """
    stamp = template.files[number]
    if File.of(stamp.path) != stamp:
        raise MergeError("it changed while it was read", where=stamp.path, hint="run again")
    try:
        metadata = SetMetadata(bounded.read(stamp.path, LARGEST))
        return _rewritten(template, number, asked, metadata)
    except MergeError as error:
        raise error.at(stamp.path) from None


def _rewritten(template: Layout, number: int, asked: Asked, metadata: SetMetadata) -> NewSet:
    files: dict[str, _Chunks] = {}
    pieces: dict[tuple[int, str], list[Piece]] = {}
    placed: list[Placed] = []
    dtypes: dict[str, DType] = {}
    items = list(_items(template, number, asked, metadata))
    for item in items:
        if item.home is not None:
            where, storage = item.home
            if (to := asked.converted.get(where, {}).get(storage)) is not None:
                dtypes[item.fqn] = to
        for piece, content in _cut(item, asked, dtypes.get(item.fqn)):
            nbytes = content.nbytes if isinstance(content, Storage) else content.nbytes(b"")
            name = item.file
            if asked.limit is not None:
                last = files.get(f"__0_{len(files) - 1}.distcp")
                full = last is None or (last.end and last.end + nbytes > asked.limit)
                name = f"__0_{len(files) - (not full)}.distcp"
            file = files.setdefault(name, _Chunks())
            corner = None
            if item.home is not None:
                pieces.setdefault(item.home, []).append(replace(piece, file=name))
                corner = tuple(a + b for a, b in zip(item.corner or (), piece.corner, strict=True))
            there = item.corner, name, file.end, nbytes
            placed.append(Placed(item.fqn, corner, piece.shape, *there))
            file.add(content)
    layouts = {name: file.layout() for name, file in files.items()}
    data = metadata.again(placed, dtypes)
    # What is written can be read, and tells what a loader of it calls.
    again = SetMetadata(data) if len(data) <= LARGEST else None
    if again is None:
        what = f"its metadata would be longer than the {LARGEST:,} bytes that it may have"
        raise MergeError(what, hint="write larger files with --max-shard-size")
    marker = {template.files[number].path.name: FileLayout(len(data), ((0, data),))}
    return NewSet(marker | layouts, pieces, _callables(template, number, items, again))


def _items(template: Layout, number: int, asked: Asked, metadata: SetMetadata) -> Iterator[_Item]:
    """Yield what stays of a set, in the order of its files and their bytes."""
    folder = template.files[number].path.parent
    seen: set[tuple[str, Index | None]] = set()
    numbers = {file.path: k for k, file in enumerate(template.files)}
    for name, chunks in metadata.by_file().items():
        layout = template.members[numbers[folder / name]]
        if layout is None or layout.archive is None:
            raise ValueError("a file of chunks that was not scanned")
        ordered = sorted(chunks, key=itemgetter(2))
        known = zip(ordered, layout.archive.storages, layout.members, strict=True)
        for (fqn, corner, _, _), record, member in known:
            item = _Item(fqn, corner, record, name, member)
            same = item.info is None or len(item.info.shape) == len(corner or ())
            if (fqn, corner) in seen or not same or not metadata.has(fqn):
                raise PickleError(f"it describes {fqn!r} in an unknown way", tensor=fqn)
            seen.add((fqn, corner))
            if item.home is None:
                stays = not (asked.lean and _is_state(fqn, metadata))
            else:
                stays = item.home not in asked.dropped
            if stays:
                yield item


def _is_state(fqn: str, metadata: SetMetadata) -> bool:
    """Return whether an object is training state, by the keys above it."""
    path = metadata.path(fqn)
    if any(path[: len(one)] == one for one in metadata.optimizers):
        return True
    # Models have objects too (extra states), whose own names say nothing; unless nothing is above.
    return any(map(kind_of, path[:-1] or path))


def _cut(
    item: _Item, asked: Asked, to: DType | None
) -> Iterator[tuple[Piece, Storage | ZipLayout]]:
    """Yield what a chunk or an object becomes: itself, or pieces that a file has room for."""
    info, member = item.info, item.member
    if info is None or member is None:
        yield Piece("", "", (), (), 0), item.record
        return
    where, storage = item.record.file, info.storage
    averaged, converted = asked.averaged.get(where, set()), asked.converted.get(where, {})
    dtype = to or info.dtype
    room = None if asked.limit is None else max(asked.limit - _AROUND, _LEAST) // dtype.itemsize
    plain = info.contiguous and not (info.start or info.trouble or storage.coded)
    plain = plain and info.numel * info.dtype.itemsize == storage.nbytes
    if room is None or info.numel <= room or not plain:
        content: Storage | ZipLayout = item.record
        if storage.name in averaged or to is not None:
            content = zip_copy(member, converted, averaged, recorded=False)
        yield Piece("", storage.name, (0,) * len(info.shape), info.shape, 0), content
        return
    for corner, shape in runs(info.shape, room):
        start = sum(a * b for a, b in zip(corner, row_major(info.shape), strict=True))
        at = [a + b for a, b in zip(item.corner or (), corner, strict=True)]
        slot, count = f"{item.fqn} from {at}", math.prod(shape)
        new = NewTensor("", dtype, shape, row_major(shape), 0, slot, count * dtype.itemsize)
        archive = bare(new)
        if storage.name not in averaged:
            size = info.dtype.itemsize
            theirs = Storage(slot, storage.offset + start * size, count * size, file=where)
            archive = replace(archive, slots={}, copies=((theirs, archive.slots[slot]),))
        yield Piece("", slot, corner, shape, start), archive


def runs(shape: Index, most: int) -> Iterator[tuple[Index, Index]]:
    """Cut a tensor into boxes of at most so many elements that lie one after the other in memory.

    Each is a first corner with extents.
    """
    if math.prod(shape) <= most or not shape:
        yield (0,) * len(shape), shape
        return
    row = math.prod(shape[1:])
    step = most // row
    for start in range(0, shape[0], step or 1):
        if step:
            yield (start, *(0,) * len(shape[1:])), (min(step, shape[0] - start), *shape[1:])
        else:
            yield from (((start, *a), (1, *b)) for a, b in runs(shape[1:], most))


def _callables(
    template: Layout, number: int, items: Sequence[_Item], metadata: SetMetadata
) -> tuple[tuple[int, str], ...]:
    """Return what a loader of the set would call that is not known to be inert."""
    found = [(number, name) for name in metadata.callables]
    for item in items:
        if item.member is not None:
            found += item.member.callables
            continue
        stamp = template.files[item.record.file]
        with stamp.path.open("rb") as file:
            part = Part(file, item.record.file, item.record.offset, item.record.nbytes)
            found += ((item.record.file, name) for name in callables_in(part, stamp))
    return tuple(dict.fromkeys(found))
