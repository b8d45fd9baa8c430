"""Skeletons of zip checkpoints, laid out as torch.save does it.

Local header, the name, padding so that the data starts at a multiple of 64, the data, and a data
descriptor that holds the CRC-32. Source: PKWARE's APPNOTE.TXT, sections 4.3 and 4.5.3.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from merge_avg.checkpoint import MARK_FILE, DType, Layout, Literal, Place, Skeleton, Storage
from merge_avg.formats.pickle.write import FreshTensor, pickled, with_classes

_ALIGNMENT = 64
_FLAGS = 0x0808  # sizes and CRC-32 in a data descriptor; names in UTF-8
_LIMIT = 0xFFFFFFFF
_ORDER = b"little"
_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR = struct.Struct("<4sIQI")


@dataclass(frozen=True)
class Entry:
    """A record to be: its bytes where they are known, else how many there will be."""

    name: str
    nbytes: int
    content: bytes | None = None
    copied: Storage | None = None
    place: str = ""  # what the skeleton calls it, where its bytes come later


def rebuilt(
    layout: Layout, converted: Mapping[str, DType], averaged: set[str], mark: str = ""
) -> Skeleton:
    """The skeleton of a copy of a zip checkpoint whose averaged records are to be filled.

    Args:
        layout: the checkpoint that is copied.
        converted: the dtypes of storages that get another one, by name.
        averaged: the names of the records that hold weights.
        mark: what to say about this merge, in a record of its own.

    Raises:
        MergeError: a converted storage's dtype is not part of its class in the pickle.
    """
    archive = layout.archive
    if archive is None:
        raise ValueError("only a zip checkpoint can be rebuilt")
    sizes = {}
    for info in layout.tensors:
        dtype = converted.get(info.storage.name)
        if dtype is not None:
            count = info.storage.nbytes // info.dtype.itemsize
            sizes[info.storage.name] = count * dtype.itemsize
    pickle = with_classes(layout, archive, converted) if converted else archive.pickle
    entries = []
    mark_name = archive.pickle_name.removesuffix("data.pkl") + MARK_FILE
    for name, record in archive.records:
        if name == mark_name:
            continue
        if name == archive.pickle_name:
            entries.append(Entry(name, len(pickle), pickle))
        elif name.endswith("byteorder") and record.nbytes < len(_ORDER):  # "big"
            entries.append(Entry(name, len(_ORDER), _ORDER))
        elif record.name in averaged:
            size = sizes.get(record.name, record.nbytes)
            entries.append(Entry(name, size, place=record.name))
        else:
            entries.append(Entry(name, record.nbytes, copied=record, place=record.name))
    return _skeleton([*entries, *_mark(mark_name, mark)])


def _mark(name: str, mark: str) -> Iterator[Entry]:
    if mark:
        content = mark.encode()
        yield Entry(name, len(content), content)


def fresh(tensors: Sequence[FreshTensor], storages: Mapping[str, int], mark: str = "") -> Skeleton:
    """The skeleton of a checkpoint that is a bare state dict.

    Args:
        tensors: its entries, in order.
        storages: the size of each storage in bytes; they become data/0, data/1, ...
        mark: what to say about this merge, in a record of its own.
    """
    numbers = {name: str(number) for number, name in enumerate(storages)}
    pickle = pickled(tensors, numbers, storages)
    entries = [
        Entry("archive/data.pkl", len(pickle), pickle),
        Entry("archive/.format_version", 1, b"1"),
        Entry("archive/.storage_alignment", 2, b"64"),
        Entry("archive/byteorder", 6, _ORDER),
        *(
            Entry(f"archive/data/{numbers[name]}", size, place=name)
            for name, size in storages.items()
        ),
        Entry("archive/version", 2, b"3\n"),
        *_mark(f"archive/{MARK_FILE}", mark),
    ]
    return _skeleton(entries)


def _skeleton(entries: Sequence[Entry]) -> Skeleton:
    literals: list[Literal] = []
    places: dict[str, Place] = {}
    copies: list[tuple[Storage, Place]] = []
    headers: list[tuple[Entry, int, Place]] = []
    at = 0
    for entry in entries:
        header = _local_header(entry, at)
        literals.append((at, header))
        place = Place(at + len(header), entry.nbytes)
        headers.append((entry, at, place))
        if entry.content is not None:
            literals.append((place.offset, entry.content))
        elif entry.copied is not None:
            copies.append((entry.copied, place))
        else:
            places[entry.place] = place
        at = place.offset + entry.nbytes + len(_descriptor(entry, at, 0))
    known = {e.name: zlib.crc32(e.content) for e in entries if e.content is not None}

    def close(crcs: Mapping[str, int]) -> tuple[Literal, ...]:
        sums = known | {e.name: crcs[e.place] for e in entries if e.content is None}
        ends = [
            (place.offset + entry.nbytes, _descriptor(entry, start, sums[entry.name]))
            for entry, start, place in headers
        ]
        return (*ends, (at, _directory(headers, sums, at)))

    size = at + len(_directory(headers, dict.fromkeys([e.name for e in entries], 0), at))
    return Skeleton(size, tuple(literals), places, tuple(copies), checked=True, close=close)


def _is_big(entry: Entry, start: int) -> bool:
    return entry.nbytes >= _LIMIT or start >= _LIMIT


def _local_header(entry: Entry, start: int) -> bytes:
    name = entry.name.encode()
    wide = b""
    if _is_big(entry, start):
        wide = struct.pack("<HHQQ", 1, 16, entry.nbytes, entry.nbytes)
    fixed = start + _LOCAL.size + len(name) + len(wide) + 4
    padding = b"Z" * (-fixed % _ALIGNMENT)
    extra = wide + struct.pack("<2sH", b"FB", len(padding)) + padding
    sizes = (_LIMIT, _LIMIT) if wide else (0, 0)
    head = (b"PK\x03\x04", 45 if wide else 0, _FLAGS, 0, 0, 0, 0, *sizes, len(name), len(extra))
    return _LOCAL.pack(*head) + name + extra


def _descriptor(entry: Entry, start: int, crc: int) -> bytes:
    form = "<4sIQQ" if _is_big(entry, start) else "<4sIII"
    return struct.pack(form, b"PK\x07\x08", crc, entry.nbytes, entry.nbytes)


def _directory(
    headers: Sequence[tuple[Entry, int, Place]], crcs: Mapping[str, int], start: int
) -> bytes:
    parts = []
    for entry, offset, _ in headers:
        name = entry.name.encode()
        # What does not fit 32 bits stands in the ZIP64 extra field, in this order.
        wide = [n for n in (entry.nbytes, entry.nbytes, offset) if n >= _LIMIT]
        extra = struct.pack(f"<HH{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
        size, place = min(entry.nbytes, _LIMIT), min(offset, _LIMIT)
        crc = crcs[entry.name]
        fields = (0, 45 if wide else 0, _FLAGS, 0, 0, 0, crc, size, size, len(name), len(extra))
        parts.append(_CENTRAL.pack(b"PK\x01\x02", *fields, 0, 0, 0, 0, place) + name + extra)
    directory = b"".join(parts)
    count, size = len(headers), len(directory)
    # torch writes the ZIP64 end whether it is needed or not: so a copy has the original's size.
    end = _END64.pack(b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, size, start)
    end += _LOCATOR.pack(b"PK\x06\x07", 0, start + size, 1)
    count, size, start = min(count, 0xFFFF), min(size, _LIMIT), min(start, _LIMIT)
    return directory + end + _END.pack(b"PK\x05\x06", 0, 0, count, count, size, start, 0)
