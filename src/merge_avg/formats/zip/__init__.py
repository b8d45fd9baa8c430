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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from merge_avg.checkpoint import (
    LARGEST_PROVENANCE,
    PROVENANCE,
    PROVENANCE_FILE,
    Archive,
    DType,
    File,
    Layout,
    Storage,
)
from merge_avg.errors import MergeError
from merge_avg.formats.pickle.torch_objects import read_objects, refuse_root
from merge_avg.formats.refused import refuse_archive
from merge_avg.formats.zip.records import DEFLATED, STORED, Record
from merge_avg.formats.zip.records import records as records_of
from merge_avg.formats.zip.write import ZipLayout, copy, create

__all__ = ["Within", "ZipLayout", "copy", "create", "scan"]

_LARGEST_PICKLE = 1 << 27
_LARGEST_UNPACKED = 1 << 26  # of a pickle that was packed
_LARGEST_ORDER = 16
# Weights hardly compress at all: records that unpack to many times the file are an attack on the
# disk that they would be unpacked to.
_MOST_UNPACKED, _MOST_RATIO = 1 << 30, 100


@dataclass(frozen=True)
class Within:
    """The place of an archive that is part of a file, and the prefix of its records' names."""

    offset: int
    name: str


def scan(file: BinaryIO, stamp: File, number: int = 0, within: Within | None = None) -> Layout:
    """Return the layout of a zip checkpoint.

    An archive `within` the file, of which `file` shows nothing else, may hold a bare tensor.

    Raises:
        MergeError: it is damaged, encrypted or dangerous, or not a checkpoint of torch.save.
    """
    path = stamp.path
    part = within or Within(0, "")
    records = _records(file, path, number, part)
    root = _root(list(records), path)
    # torch.serialization.set_crc32_options(False) leaves all checksums zero. Other archives have at
    # least one that is not, that of the pickle.
    unchecked = all(record.crc == 0 for record in records.values())
    if unchecked:
        records = {name: replace(record, crc=None) for name, record in records.items()}
    pickle_name = f"{root}data.pkl"
    stored = records[pickle_name]
    pickle = _bytes(file, stored, path, part.offset, _LARGEST_PICKLE)
    order, noted = b"little", records.get(f"{root}byteorder")
    if noted is not None:
        order = _bytes(file, noted, path, part.offset, _LARGEST_ORDER)
    if order not in (b"little", b"big"):
        raise MergeError(f"it is written in the unknown byte order {order!r}", where=path)

    def find(key: str, size: int, dtype: DType | None) -> Storage:
        name = f"{root}data/{key}"
        record = records.get(name)
        if record is None:
            raise MergeError(f"the archive has no record for storage {key!r}")
        if record.nbytes != size:
            found = f"{record.nbytes:,} bytes long, expected {size:,}"
            raise MergeError(f"record {record.name!r} is {found}")
        if order == b"big" and record.swapped == 1:
            if dtype is None:
                what = f"record {record.name!r} is in big-endian byte order and has no dtype"
                raise MergeError(what, hint="load it with torch.load and save it again")
            record = records[name] = replace(record, swapped=dtype.word)
        return record

    # A byte of a pickle that was packed counts for its share of the file.
    density = 1.0 if stored.packed is None else stored.packed / max(stored.nbytes, 1)
    try:
        objects = read_objects(pickle, density)
        tensors = objects.placed(find)
    except MergeError as error:
        raise error.at(path) from None
    if within is None:
        refuse_root(objects, path)
    read = (pickle, pickle_name, objects.classes, objects.frames)
    archive = Archive(tuple(records.items()), *read, prefix=f"{part.name}{root}data/")
    metadata: tuple[tuple[str, str], ...] = ()
    provenance = records.get(f"{root}{PROVENANCE_FILE}") if within is None else None
    if provenance is not None and provenance.nbytes <= LARGEST_PROVENANCE:
        raw = _bytes(file, provenance, path, 0, LARGEST_PROVENANCE)
        metadata = ((PROVENANCE, raw.decode("utf-8", "replace")),)
    note = f"{path} records no checksums, so damage would not show"
    notes, others = (note,) if unchecked else (), objects.others
    return Layout(
        path, "torch-zip", (stamp,), tensors, others, metadata, archive, (), notes, objects.scalars
    )


def _records(file: BinaryIO, path: Path, number: int, within: Within) -> dict[str, Storage]:
    """Return the records of an archive by name, in the order of their bytes."""
    try:
        found = {record.name: _storage(record, number, within) for record in records_of(file)}
    except MergeError as error:
        raise error.at(path) from None
    unpacked = sum(storage.nbytes for storage in found.values() if storage.packed is not None)
    if unpacked > max(_MOST_UNPACKED, _MOST_RATIO * file.seek(0, 2)):
        what = f"its records would unpack to {unpacked:,} bytes, far more than weights do"
        raise MergeError(what, where=path, hint="get the file from a source you trust")
    return dict(sorted(found.items(), key=lambda item: item[1].offset))


def _root(names: list[str], path: Path) -> str:
    """Return the prefix of the records' names, up to and with its slash."""
    refuse_archive(path, names)
    folders = {"", *(name.partition("/")[0] + "/" for name in names if "/" in name)}
    roots = [root for root in folders if f"{root}data.pkl" in names]
    if len(roots) != 1:
        hint = "pass files that torch.save wrote"
        raise MergeError("a zip archive, but not a checkpoint of torch.save", where=path, hint=hint)
    return roots[0]


def _storage(record: Record, number: int, within: Within) -> Storage:
    """Return a record as a storage, if it can be read by offset or unpacked."""
    name, nbytes, packed = record.name, record.nbytes, record.packed
    if record.encrypted or record.method not in (STORED, DEFLATED):
        kind = "encrypted" if record.encrypted else "compressed in an unusual way"
        hint = "unpack it, and pack it again without compression: zip -0 -r OUTPUT DIRECTORY"
        raise MergeError(f"record {name!r} of the archive is {kind}", hint=hint)
    deflated = record.method == DEFLATED
    # Deflate packs at most 1,032 bytes into one, and adds few bytes to what it cannot pack.
    lies = nbytes > 1032 * packed or packed > nbytes + (nbytes >> 10) + 64
    if lies if deflated else packed != nbytes:
        raise MergeError(f"record {name!r} of the archive lies about its size")
    whole, where = within.name + name, within.offset + record.offset
    return Storage(whole, where, nbytes, record.crc, number, packed if deflated else None)


def _bytes(file: BinaryIO, record: Storage, path: Path, base: int, largest: int) -> bytes:
    """Read a record that is not a storage, of an archive at `base`."""
    # A pickle that was packed well is one of few objects, or an attack.
    if record.nbytes > (largest if record.packed is None else min(largest, _LARGEST_UNPACKED)):
        raise MergeError(f"record {record.name!r} is absurdly large", where=path)
    file.seek(record.offset - base)
    if record.packed is None:
        content = file.read(record.nbytes)
    else:
        try:
            content = zlib.decompressobj(-15).decompress(file.read(record.packed), record.nbytes)
        except zlib.error as error:
            what = f"record {record.name!r} is damaged ({error})"
            raise MergeError(what, where=path, hint="fetch or save the file again") from None
    # Storages are checked as they are read; what is read here is checked at once.
    if len(content) != record.nbytes or record.crc not in (None, zlib.crc32(content)):
        what = f"record {record.name!r} is damaged: its CRC-32 does not match"
        raise MergeError(what, where=path, hint="fetch or save the file again")
    return content
