"""Zip checkpoints, laid out as torch.save does it.

    PK 3 4   local header: flags 808, zeros for sizes and CRC-32; name; zip64 field where   -.
             needed; field "FB" of padding, up to a multiple of 64 bytes                     |
             data: a slot for weights, a copy, or known bytes                                | each
    PK 7 8   data descriptor: CRC-32 and sizes of 32 bits, or of 64 in zip64                -'
    ...      the record with the provenance: last, so that no slot depends on its length
    PK 1 2   central directory: an entry for each record
    PK 6 6   zip64 end, PK 6 7 its locator, PK 5 6 the end of the central directory

Everything that depends on a CRC-32 lies behind the data or in the directory: it is written last,
when the weights have passed by.

Specification: PKWARE's APPNOTE.TXT, sections 4.3 and 4.5.3.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from merge_avg.checkpoint import (
    PROVENANCE_FILE,
    DType,
    FileLayout,
    Layout,
    Literal,
    NewTensor,
    Slot,
    Storage,
)
from merge_avg.errors import MergeError
from merge_avg.formats.pickle.tensors import pickled, pickled_tensor, with_classes
from merge_avg.formats.zip.records import CENTRAL, END, END64, LOCAL, LOCATOR

_ALIGNMENT = 64  # torch maps storages into memory, and vector instructions like it
_FLAGS = 0x0808  # sizes and CRC-32 in a data descriptor; names in UTF-8
_LIMIT = 0xFFFFFFFF  # stands for a number in the zip64 field, so no number of 32 bits itself
_ORDER = b"little"


@dataclass(frozen=True, slots=True)
class _Entry:
    """A record to be written: its local header starts at `start`, and `stop` is where it ends."""

    name: str
    start: int
    slot: Slot
    content: bytes | None = None  # where it is known before the weights

    @property
    def stop(self) -> int:
        return self.slot.offset + self.slot.nbytes + len(_descriptor(self, 0))


@dataclass(frozen=True)
class ZipLayout(FileLayout):
    """The layout of a zip archive: its records, and the name of one more for the provenance."""

    checked: bool = True
    entries: tuple[_Entry, ...] = ()
    record_name: str = ""

    def nbytes(self, record: bytes) -> int:
        """Return the size of the archive with a record."""
        entries = self._recorded(record)
        return self.size + sum(one.stop - one.start + len(_central(one, 0)) for one in entries)

    def opening(self) -> Iterator[Literal]:
        """Yield local headers, and the records that are known."""
        for entry in self.entries:
            yield entry.start, _local_header(entry.name, entry.start, entry.slot.nbytes)
            if entry.content is not None:
                yield entry.slot.offset, entry.content

    def closing(self, record: bytes, checksums: Sequence[int]) -> Iterator[Literal]:
        """Yield data descriptors, the record, and the central directory."""
        directory = []
        recorded = self._recorded(record)
        entries = (*self.entries, *recorded)
        for entry in entries:
            content = entry.content
            crc = checksums[entry.slot.number] if content is None else zlib.crc32(content)
            yield entry.slot.offset + entry.slot.nbytes, _descriptor(entry, crc)
            directory.append(_central(entry, crc))
        for entry in recorded:
            yield entry.start, _local_header(entry.name, entry.start, entry.slot.nbytes)
            yield entry.slot.offset, record
        start = entries[-1].stop
        yield start, b"".join(directory) + _end(directory, start)

    def _recorded(self, record: bytes) -> tuple[_Entry, ...]:
        """Return the entry of the provenance, behind all others."""
        if not self.record_name:
            return ()
        return (_entry(self.record_name, self.entries[-1].stop, len(self.entries), record),)


def copy(
    layout: Layout, converted: Mapping[str, DType], averaged: set[str], *, recorded: bool = True
) -> ZipLayout:
    """Return the layout of a copy of a zip checkpoint; see `formats.copy`.

    Raises:
        MergeError: a converted storage's dtype is not part of its class in the pickle.
    """
    archive = layout.archive
    if archive is None:
        raise ValueError("only a zip checkpoint can be copied as one")
    sizes = {}
    for info in layout.tensors:
        dtype = converted.get(info.storage.name)
        if dtype is not None and info.shard is not None:
            what = "the parts of a distributed tensor cannot get another dtype in a copy"
            hint = "write one file: end the output's name in .safetensors or .pt"
            raise MergeError(what, where=layout.path, hint=hint)
        if dtype is not None:
            sizes[info.storage.name] = info.storage.nbytes // info.dtype.itemsize * dtype.itemsize
    pickle = with_classes(layout, archive, converted) if converted else archive.pickle
    record_name = archive.pickle_name.removesuffix("data.pkl") + PROVENANCE_FILE
    contents: list[tuple[str, bytes | Storage, int]] = []
    for name, record in archive.records:
        if name == record_name:
            continue  # of the merge that made the template
        if name == archive.pickle_name:
            contents.append((name, pickle, 0))
        elif name.endswith("byteorder") and record.nbytes < len(_ORDER):  # "big"
            contents.append((name, _ORDER, 0))  # all that is written here is little-endian
        else:
            contents.append((name, record, sizes.get(record.name, record.nbytes)))
    return _layout(contents, averaged, record_name if recorded else "")


def create(
    tensors: Sequence[NewTensor], metadata: Mapping[str, str], *, recorded: bool = True
) -> ZipLayout:
    """Return the layout of a checkpoint that is a bare state dict.

    Storages become data/0, data/1, ...; the slots have the names of the tensors' storages.
    """
    del metadata
    numbers = _numbers(tensors)
    return _archive(tensors, pickled(tensors, numbers), numbers, recorded=recorded)


def bare(tensor: NewTensor) -> ZipLayout:
    """Return the layout of an archive with one tensor and nothing around it."""
    numbers = _numbers([tensor])
    return _archive([tensor], pickled_tensor(tensor, numbers), numbers, recorded=False)


def _numbers(tensors: Sequence[NewTensor]) -> dict[str, str]:
    return {name: str(k) for k, name in enumerate(dict.fromkeys(one.storage for one in tensors))}


def _archive(
    tensors: Sequence[NewTensor], pickle: bytes, numbers: Mapping[str, str], *, recorded: bool
) -> ZipLayout:
    sizes = {tensor.storage: tensor.storage_nbytes for tensor in tensors}
    contents: list[tuple[str, bytes | Storage, int]] = [
        ("archive/data.pkl", pickle, 0),
        ("archive/.format_version", b"1", 0),
        ("archive/.storage_alignment", b"64", 0),
        ("archive/byteorder", _ORDER, 0),
    ]
    for name, size in sizes.items():
        contents.append((f"archive/data/{numbers[name]}", Storage(name, 0, size), size))
    contents.append(("archive/version", b"3\n", 0))
    return _layout(contents, sizes.keys(), f"archive/{PROVENANCE_FILE}" if recorded else "")


def _layout(
    contents: Sequence[tuple[str, bytes | Storage, int]],
    averaged: Collection[str],
    record_name: str,
) -> ZipLayout:
    """Lay records out one after the other: known bytes, or storages with the sizes they get."""
    entries: list[_Entry] = []
    slots: dict[str, Slot] = {}
    copies: list[tuple[Storage, Slot]] = []
    at = 0
    for number, (name, content, size) in enumerate(contents):
        known = content if isinstance(content, bytes) else None
        entry = _entry(name, at, number, known, size)
        entries.append(entry)
        if isinstance(content, Storage):
            if content.name in averaged:
                slots[content.name] = entry.slot
            else:
                copies.append((content, entry.slot))
        at = entry.stop
    directory = [_central(entry, 0) for entry in entries]
    size = at + sum(map(len, directory)) + len(_end(directory, at))
    return ZipLayout(
        size, (), slots, tuple(copies), entries=tuple(entries), record_name=record_name
    )


def _entry(name: str, start: int, number: int, content: bytes | None, nbytes: int = 0) -> _Entry:
    nbytes = nbytes if content is None else len(content)
    offset = start + len(_local_header(name, start, nbytes))
    return _Entry(name, start, Slot(number, offset, nbytes), content)


def _local_header(text: str, start: int, nbytes: int) -> bytes:
    name = text.encode()
    wide = struct.pack("<HHQQ", 1, 16, nbytes, nbytes) if max(nbytes, start) >= _LIMIT else b""
    fixed = start + LOCAL.size + len(name) + len(wide) + 4
    padding = b"Z" * (-fixed % _ALIGNMENT)
    extra = wide + struct.pack("<2sH", b"FB", len(padding)) + padding
    sizes = (_LIMIT, _LIMIT) if wide else (0, 0)
    # Version 4.5 of the format is the first with zip64.
    head = (b"PK\x03\x04", 45 if wide else 0, _FLAGS, 0, 0, 0, 0, *sizes, len(name), len(extra))
    return LOCAL.pack(*head) + name + extra


def _descriptor(entry: _Entry, crc: int) -> bytes:
    nbytes = entry.slot.nbytes
    form = "<4sIQQ" if max(nbytes, entry.start) >= _LIMIT else "<4sIII"
    return struct.pack(form, b"PK\x07\x08", crc, nbytes, nbytes)


def _central(entry: _Entry, crc: int) -> bytes:
    """Return the entry of a record in the central directory."""
    name, nbytes = entry.name.encode(), entry.slot.nbytes
    # Numbers that do not fit 32 bits go to the zip64 field, in this order.
    wide = [n for n in (nbytes, nbytes, entry.start) if n >= _LIMIT]
    extra = struct.pack(f"<HH{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
    size, place = min(nbytes, _LIMIT), min(entry.start, _LIMIT)
    fields = (0, 45 if wide else 0, _FLAGS, 0, 0, 0, crc, size, size, len(name), len(extra))
    return CENTRAL.pack(b"PK\x01\x02", *fields, 0, 0, 0, 0, place) + name + extra


def _end(directory: Sequence[bytes], start: int) -> bytes:
    """Return the bytes behind a central directory that begins at `start`."""
    count, size = len(directory), sum(map(len, directory))
    # Torch writes the zip64 end whether it is needed or not. So does this: a chunk of a distributed
    # checkpoint has to have the size of the original to fit its place.
    end = END64.pack(b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, size, start)
    end += LOCATOR.pack(b"PK\x06\x07", 0, start + size, 1)
    count, size, start = min(count, 0xFFFF), min(size, _LIMIT), min(start, _LIMIT)
    return end + END.pack(b"PK\x05\x06", 0, 0, count, count, size, start, 0)
