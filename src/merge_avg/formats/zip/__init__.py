"""Zip checkpoints: what torch.save has written since torch 1.6 (.pt, .pth, .bin, .ckpt).

    ROOT/data.pkl              pickle of the object tree; it names storages by key
    ROOT/byteorder             "little" or "big"; files before torch 2.0 have none
    ROOT/data/0                raw bytes of the storage with key 0, at a multiple of 64 bytes
    ROOT/data/1                ...
    ROOT/version               "3", and further small records, which are copied as they are
    ROOT/.data/serialization_id
    ROOT/merge_avg.json        in an output of a merge: its provenance

ROOT is the name that the file had when it was saved.

Specification: torch/csrc/jit/serialization/docs/serialization.md.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import BinaryIO
from weakref import WeakValueDictionary

from merge_avg.checkpoint import (
    LARGEST_PROVENANCE,
    PROVENANCE,
    PROVENANCE_FILE,
    Archive,
    BytesAt,
    DType,
    File,
    Layout,
    Storage,
    TensorInfo,
)
from merge_avg.errors import MergeError
from merge_avg.formats.pickle.torch_objects import Objects, read_objects, refuse_root
from merge_avg.formats.refused import refuse_archive
from merge_avg.formats.zip.records import Part, Record, records
from merge_avg.formats.zip.write import ZipLayout, copy, create

__all__ = ["Part", "ZipLayout", "copy", "create", "scan"]

_LARGEST_PICKLE = 1 << 27
_LARGEST_UNPACKED = 1 << 26  # of a pickle that was packed
_LARGEST_ORDER = 16
# Weights hardly compress at all: records that unpack to many times the file are an attack on the
# disk that they would be unpacked to.
_MOST_UNPACKED, _MOST_RATIO = 1 << 30, 100


# The part's name, the content of the pickle, the byte order; and for each record its name, its
# place, and the size that it takes if it is deflated.
_Key = tuple[str, Objects, bytes, list[tuple[str, int, int, int | None]]]


@dataclass(frozen=True, eq=False)
class _Shared:
    """What archives of one run share, which most often differ in nothing but their weights."""

    key: _Key  # what the rest follows from
    storages: tuple[Storage, ...]  # the records, without the name that they all begin with
    tensors: tuple[TensorInfo, ...]
    bytes_at: tuple[BytesAt, ...]  # of the records


# By the number of the file in its checkpoint, and where the archive begins in it.
_LAST: WeakValueDictionary[tuple[int, int], _Shared] = WeakValueDictionary()


def scan(file: BinaryIO, stamp: File, number: int = 0, part: Part | None = None) -> Layout:
    """Return the layout of a zip checkpoint; one that is only a part of the file may be a tensor.

    Raises:
        MergeError: it is damaged, encrypted or dangerous, or not a checkpoint of torch.save.
    """
    try:
        return _scanned(part or Part(file, number, 0, file.seek(0, 2)), stamp, whole=part is None)
    except MergeError as error:
        raise error.at(stamp.path) from None


def _scanned(part: Part, stamp: File, *, whole: bool) -> Layout:
    found = _records(part)
    refuse_archive(stamp.path, list(found))
    root = _root(found)
    # torch.serialization.set_crc32_options(False) leaves all checksums zero. Other archives have at
    # least one that is not, that of the pickle.
    unchecked = not any(record.crc for record in found.values())
    pickle_name = f"{root}data.pkl"
    stored = found[pickle_name]
    pickle = _bytes(part, stored, _LARGEST_PICKLE, unchecked=unchecked)
    noted = found.get(f"{root}byteorder")
    order = _bytes(part, noted, _LARGEST_ORDER, unchecked=unchecked) if noted else b"little"
    if order not in (b"little", b"big"):
        raise MergeError(f"it is written in the unknown byte order {order!r}")
    # A byte of a pickle that was packed counts for its share of the file.
    density = 1.0 if stored.packed is None else stored.packed / max(stored.nbytes, 1)
    objects = read_objects(pickle, density=density)
    # Of the file's name, with which all records begin, storages know nothing.
    cut = len(root) if all(name.startswith(root) for name in found) else 0
    places = [(name[cut:], *record[1:4]) for name, record in found.items()]
    # The records were read and checked all the same: no file can vouch for another.
    key, shared = (part.name, objects, order, places), _LAST.get((part.number, part.start))
    if shared is None or key != shared.key:
        shared = _LAST[part.number, part.start] = _placed(part, key, root[cut:])
    crcs = (record.crc for record in found.values())
    checksums = {} if unchecked else dict(zip(shared.bytes_at, crcs, strict=True))
    metadata: tuple[tuple[str, str], ...] = ()
    if whole:
        refuse_root(objects, stamp.path)
        provenance = found.get(f"{root}{PROVENANCE_FILE}")
        if provenance is not None and provenance.nbytes <= LARGEST_PROVENANCE:
            raw = _bytes(part, provenance, LARGEST_PROVENANCE, unchecked=unchecked)
            metadata = ((PROVENANCE, raw.decode("utf-8", "replace")),)
    tensors, listed = shared.tensors, tuple(zip(found, shared.storages, strict=True))
    read = pickle, pickle_name, objects.classes, objects.frames
    archive = Archive(listed, *read, prefix=f"{part.name}{root[cut:]}data/")
    path, others, scalars = stamp.path, objects.others, objects.scalars
    callables = tuple((part.number, name) for name in objects.callables)
    notes = (f"{path} records no checksums, so damage would not show",) if unchecked else ()
    made = (path, "torch-zip", (stamp,), tensors, others, metadata, archive, (), notes, scalars)
    return Layout(
        *made,
        callables,
        optimizers=objects.optimizers,
        arrays=objects.arrays,
        checksums=checksums,
        shared=shared,
    )


def _placed(part: Part, key: _Key, root: str) -> _Shared:
    """Return the tensors of an archive whose records begin with `root`, and its storages."""
    _, objects, order, places = key
    found = {
        name: Storage(part.name + name, offset, nbytes, part.number, packed)
        for name, offset, nbytes, packed in places
    }

    def find(stored: str, size: int, dtype: DType | None) -> Storage:
        name = f"{root}data/{stored}"
        record = found.get(name)
        if record is None:
            raise MergeError(f"the archive has no record for storage {stored!r}")
        if record.nbytes != size:
            what = f"{record.nbytes:,} bytes long, expected {size:,}"
            raise MergeError(f"record {record.name!r} is {what}")
        if order == b"big" and record.swapped == 1:
            if dtype is None:
                what = f"record {record.name!r} is in big-endian byte order and has no dtype"
                raise MergeError(what, hint="load it with torch.load and save it again")
            record = found[name] = replace(record, swapped=dtype.word)
        return record

    tensors, storages = objects.placed(find), tuple(found.values())
    return _Shared(key, storages, tensors, tuple(storage.bytes_at for storage in storages))


def _records(part: Part) -> dict[str, Record]:
    """Return the records of an archive by name, in the order of their bytes."""
    found = {one.name: one for one in sorted(records(part), key=attrgetter("offset"))}
    unpacked = sum(record.nbytes for record in found.values() if record.packed is not None)
    if unpacked > max(_MOST_UNPACKED, _MOST_RATIO * part.nbytes):
        what = f"its records would unpack to {unpacked:,} bytes, far more than weights do"
        raise MergeError(what, hint="get the file from a source you trust")
    return found


def _root(names: Collection[str]) -> str:
    """Return the prefix of the records' names, up to and with its slash."""
    folders = {"", *(name.partition("/")[0] + "/" for name in names if "/" in name)}
    roots = [root for root in folders if f"{root}data.pkl" in names]
    if len(roots) != 1:
        hint = "if it has checkpoints in it, unpack it first; torch.save writes other zips"
        raise MergeError("a zip archive, but not a checkpoint of torch.save", hint=hint)
    return roots[0]


def _bytes(part: Part, record: Record, largest: int, *, unchecked: bool) -> bytes:
    """Read a record that is not a storage."""
    # A pickle that was packed well is one of few objects, or an attack.
    if record.nbytes > (largest if record.packed is None else min(largest, _LARGEST_UNPACKED)):
        raise MergeError(f"record {record.name!r} is absurdly large")
    held = record.nbytes if record.packed is None else record.packed
    content = part.read(record.offset - part.start, held)
    damaged, hint = f"record {record.name!r} is damaged", "fetch or save the file again"
    if record.packed is not None:
        try:
            content = zlib.decompressobj(-15).decompress(content, record.nbytes)
        except zlib.error as error:
            raise MergeError(f"{damaged} ({error})", hint=hint) from None
    # Storages are checked as they are read; what is read here is checked at once.
    wrong = not unchecked and record.crc != zlib.crc32(content)
    if len(content) != record.nbytes or wrong:
        raise MergeError(f"{damaged}: its CRC-32 does not match", hint=hint)
    return content
