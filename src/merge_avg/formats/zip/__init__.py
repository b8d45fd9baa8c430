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
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import BinaryIO
from weakref import WeakValueDictionary

from merge_avg.checkpoint import (
    LARGEST_PROVENANCE,
    NO_CHECKSUMS,
    PROVENANCE,
    PROVENANCE_FILE,
    Archive,
    BytesAt,
    Checksums,
    DType,
    File,
    Layout,
    Storage,
    TensorInfo,
)
from merge_avg.errors import MergeError
from merge_avg.formats.pickle.torch_objects import Objects, read_objects, refuse_root, sharing
from merge_avg.formats.refused import refuse_archive
from merge_avg.formats.zip.records import Listing, Part, Place, listed
from merge_avg.formats.zip.write import ZipLayout, bare, copy, create

__all__ = ["Part", "ZipLayout", "bare", "copy", "create", "scan"]

_LARGEST_PICKLE = 1 << 27
_LARGEST_UNPACKED = 1 << 26  # of a pickle that was packed
_LARGEST_ORDER = 16
# Weights hardly compress at all: records that unpack to many times the file are an attack on the
# disk that they would be unpacked to.
_MOST_UNPACKED, _MOST_RATIO = 1 << 30, 100


@dataclass(frozen=True, eq=False)
class _Shared:
    """What archives of one run share, which most often differ in nothing but their weights."""

    listing: Listing
    base: int  # the offset that those of storages count from
    objects: Objects
    pickle: bytes  # that holds the objects
    name: str  # of the part
    order: bytes  # "big" or "little"
    storages: tuple[Storage, ...]  # the records
    tensors: tuple[TensorInfo, ...]
    numbers: Mapping[BytesAt, int]  # of the storages


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
    shared = _LAST.get((part.number, part.start))
    listing, folder, sums = listed(part, None if shared is None else shared.listing)
    if shared is None or listing is not shared.listing:
        _refuse(part, listing)
        refuse_archive(stamp.path, [folder + name for name in listing.names])
    root = _root(folder, listing.names)
    # torch.serialization.set_crc32_options(False) leaves all checksums zero. Other archives have at
    # least one that is not, that of the pickle.
    unchecked = not any(sums)

    def content(name: str, largest: int, *, refuse: bool = True) -> bytes | None:
        """Return the bytes of a record, if there is one, and unless it may not be so large."""
        if name not in listing.names:
            return None
        number = listing.names.index(name)
        if not refuse and listing.places[number][1] > largest:
            return None
        crc = None if unchecked else sums[number]
        return _bytes(part, folder + name, listing.places[number], crc, largest)

    pickle = content(f"{root}data.pkl", _LARGEST_PICKLE) or b""
    order = content(f"{root}byteorder", _LARGEST_ORDER) or b"little"
    if order not in (b"little", b"big"):
        raise MergeError(f"it is written in the unknown byte order {order!r}")
    # A byte of a pickle that was packed counts for its share of the file.
    _, nbytes, packed = listing.places[listing.names.index(f"{root}data.pkl")]
    density = 1.0 if packed is None else packed / max(nbytes, 1)
    objects = read_objects(pickle, density=density)
    if shared is not None:
        objects = sharing(objects, shared.objects)
        pickle = shared.pickle if shared.pickle == pickle else pickle
    # With a longer pickle, which comes first, all that follows lies farther on.
    first = whole and listing.names[0] == f"{root}data.pkl" and len(listing.names) > 1
    base = listing.places[1][0] if first else 0
    # The records were read and checked all the same: no file can vouch for another.
    if (
        shared is None
        or not _alike(listing, base, shared)
        or shared.objects.tensors is not objects.tensors
        or (shared.name, shared.order) != (part.name, order)
    ):
        placed = _placed(part, listing, objects, order, root, base)
        shared = _Shared(listing, base, objects, pickle, part.name, order, *placed)
        _LAST[part.number, part.start] = shared
    metadata: tuple[tuple[str, str], ...] = ()
    if whole:
        refuse_root(objects, stamp.path)
        raw = content(f"{root}{PROVENANCE_FILE}", LARGEST_PROVENANCE, refuse=False)
        metadata = () if raw is None else ((PROVENANCE, raw.decode("utf-8", "replace")),)
    read = pickle, f"{folder}{root}data.pkl", objects.classes, objects.frames
    prefix = f"{part.name}{root}data/"
    archive = Archive(listing.names, shared.storages, *read, prefix=prefix, folder=folder)
    path, others, scalars = stamp.path, objects.others, objects.scalars
    callables = tuple((part.number, name) for name in objects.callables)
    notes = (f"{path} records no checksums, so damage would not show",) if unchecked else ()
    stamps, tensors = (replace(stamp, base=base),), shared.tensors
    made = (path, "torch-zip", stamps, tensors, others, metadata, archive, (), notes, scalars)
    return Layout(
        *made,
        callables,
        optimizers=objects.optimizers,
        arrays=objects.arrays,
        checksums=NO_CHECKSUMS if unchecked else Checksums(shared.numbers, sums),
        shared=shared,
    )


def _alike(listing: Listing, base: int, shared: _Shared) -> bool:
    """Return whether records lie to each other as those that are shared do."""
    if listing is shared.listing or not (base and shared.base):
        return listing is shared.listing
    return listing.names == shared.listing.names and all(
        (one[0] - base, *one[1:]) == (two[0] - shared.base, *two[1:])
        for one, two in zip(listing.places[1:], shared.listing.places[1:], strict=True)
    )


def _placed(
    part: Part, listing: Listing, objects: Objects, order: bytes, root: str, base: int
) -> tuple[tuple[Storage, ...], tuple[TensorInfo, ...], dict[BytesAt, int]]:
    """Return the storages of an archive's records, its tensors, and the numbers of storages."""
    found = {
        name: Storage(part.name + name, offset - base, nbytes, part.number, packed)
        for name, (offset, nbytes, packed) in zip(listing.names, listing.places, strict=True)
    }
    if base:  # where the pickle lies, which a copy has anyway, differs
        found[listing.names[0]] = Storage(part.name + listing.names[0], 0, 0, part.number)

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
    numbers = {one.bytes_at: number for number, one in enumerate(storages) if not base or number}
    return storages, tensors, numbers


def _refuse(part: Part, listing: Listing) -> None:
    """Raise MergeError where records would unpack to far more than weights do."""
    unpacked = sum(nbytes for _, nbytes, packed in listing.places if packed is not None)
    if unpacked > max(_MOST_UNPACKED, _MOST_RATIO * part.nbytes):
        what = f"its records would unpack to {unpacked:,} bytes, far more than weights do"
        raise MergeError(what, hint="get the file from a source you trust")


def _root(folder: str, names: Collection[str]) -> str:
    """Return what the pickle's name begins with behind the folder of all, with its slash."""
    folders = {"", *(name.partition("/")[0] + "/" for name in names if "/" in name and not folder)}
    roots = [root for root in folders if f"{root}data.pkl" in names]
    if len(roots) != 1:
        hint = "if it has checkpoints in it, unpack it first; torch.save writes other zips"
        raise MergeError("a zip archive, but not a checkpoint of torch.save", hint=hint)
    return roots[0]


def _bytes(part: Part, name: str, place: Place, crc: int | None, largest: int) -> bytes:
    """Read a record that is not a storage, and check it if its CRC-32 is known."""
    offset, nbytes, packed = place
    # A pickle that was packed well is one of few objects, or an attack.
    if nbytes > (largest if packed is None else min(largest, _LARGEST_UNPACKED)):
        raise MergeError(f"record {name!r} is absurdly large")
    content = part.read(offset - part.start, nbytes if packed is None else packed)
    damaged, hint = f"record {name!r} is damaged", "fetch or save the file again"
    if packed is not None:
        try:
            content = zlib.decompressobj(-15).decompress(content, nbytes)
        except zlib.error as error:
            raise MergeError(f"{damaged} ({error})", hint=hint) from None
    # Storages are checked as they are read; what is read here is checked at once.
    if len(content) != nbytes or crc not in (None, zlib.crc32(content)):
        raise MergeError(f"{damaged}: its CRC-32 does not match", hint=hint)
    return content
