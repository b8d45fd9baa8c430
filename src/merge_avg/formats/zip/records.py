"""The records of a zip archive, read strictly and with little memory.

    PK 3 4   local header: sizes and CRC-32, or zeros; name; extra fields   -.
             data                                                            | for each record
    PK 7 8   data descriptor: CRC-32 and sizes, where the header has zeros  -'
    PK 1 2   central directory: for each record sizes, CRC-32, name, extra fields, and the offset
             of its local header
    PK 6 6   zip64 end: count, size and offset of the directory, 64 bits    -. only where 16 or
    PK 6 7   zip64 locator: the offset of the zip64 end                     -' 32 bits are too few
    PK 5 6   end of central directory: the same in 16 and 32 bits, and a comment

A number that does not fit 32 bits is ffffffff, and a zip64 extra field holds it. Readers start at
the end, at the first header, or search. So all three have to agree here, and records may not
overlap: then no other program sees another archive in the same bytes.

Specification: PKWARE's APPNOTE.TXT, sections 4.3 to 4.5.
"""

from __future__ import annotations

import hashlib
import itertools
import struct
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import BinaryIO, NamedTuple

from merge_avg.errors import MergeError

_STORED, _DEFLATED = 0, 8  # methods of compression
END = struct.Struct("<4s4H2IH")
LOCATOR = struct.Struct("<4sIQI")
END64 = struct.Struct("<4sQ2H2I4Q")
CENTRAL = struct.Struct("<4s6H3I5H2I")
LOCAL = struct.Struct("<4s5H3I2H")
_FIELD = struct.Struct("<2H")
_NONE = 0xFFFFFFFF  # stands for a number that the zip64 field holds
# General purpose flags: the data is encrypted or the header masked; sizes and CRC-32 follow the
# data; the name is in UTF-8, not in code page 437.
_ENCRYPTED, _LATER, _UTF8 = 0x2041, 0x8, 0x800
_LARGEST_COMMENT = 0xFFFF
_LARGEST_ENTRY = CENTRAL.size + 3 * 0xFFFF  # with a name, extra fields and a comment
# A directory of a million records is read in blocks: all of it at once would take 100 MB.
_BLOCK = 1 << 18
# What two archives have in common is found out for as many records: of fewer it is not worth it, of
# more it takes memory. Between two local headers, data of up to so many bytes is read as well.
_FEW, _LARGEST_DIRECTORY, _NEAR = 64, 1 << 24, 1 << 12
_CRC_CENTRAL, _CRC_LOCAL = 16, 14  # where a header has the CRC-32
_ZEROS = bytes(4)


@dataclass(frozen=True)
class Part:
    """The part of a file that is an archive, perhaps all of it: the reader sees nothing else."""

    file: BinaryIO
    number: int  # of the file in its checkpoint
    start: int
    nbytes: int
    name: str = ""  # a prefix for those of its records, where a file has several archives

    def read(self, at: int, count: int) -> bytes:
        """Return bytes from an offset in the archive."""
        raw = b""
        if at + count <= self.nbytes:
            self.file.seek(self.start + at)
            raw = self.file.read(count)
        if len(raw) != count:
            raise _damaged("it ends too early")
        return raw


class Record(NamedTuple):  # there may be a million
    """A record of an archive."""

    name: str
    offset: int  # of its data, in the file
    nbytes: int
    packed: int | None  # the size that it takes, if it is deflated
    crc: int
    header: int  # the offset of its local header, in the archive
    entry: int  # and of its entry in the central directory

    def span(self, part: Part) -> tuple[int, int]:
        """Return where its local header begins and ends, in the archive."""
        return self.header, self.offset - part.start


Place = tuple[int, int, int | None]  # of a record, as there: offset, nbytes, packed
# Offsets in an archive, of each record: its entry in the directory; its local header, and its end.
_Headers = tuple["array[int]", "array[int]", "array[int]"]
_Look = tuple[str, "array[int]", bytes]


@dataclass(frozen=True, eq=False)
class Listing:
    """The records of an archive in the order of their bytes, but for what each save changes.

    That is their checksums, and the folder that all of them are in: torch.save names it for the
    file. So archives of one run have the same listing, but for folders of other lengths.
    """

    names: tuple[str, ...]  # without the folder
    places: tuple[Place, ...]
    # By what an archive is known to have it, if it can be: its place, the bounds of its directory,
    # and the SHA-256 of that and of the local headers, with zeros for what each save changes.
    bounds: tuple[int, ...] = ()
    headers: _Headers = (array("Q"), array("Q"), array("Q"))
    digest: bytes = b""  # empty if it is not known


class Found(NamedTuple):
    """The listing of one archive, and what that leaves out."""

    listing: Listing
    folder: str  # with its slash; empty if there is none that all are in
    checksums: array[int]  # the CRC-32 of each record


def records(part: Part) -> Iterator[Record]:
    """Yield the records of an archive, in the order of its central directory.

    Raises:
        MergeError: the archive is damaged or contradicts itself, or a record cannot be read.
    """
    yield from _records(part, *_directory(part))


def listed(part: Part, known: Listing | None = None) -> Found:
    """Return what an archive has, with the listing that is `known` if it is the same.

    Raises:
        MergeError: as `records` does.
    """
    bounds = _directory(part)
    if known is not None and known.digest and known.bounds == (part.start, *bounds):
        folder, sums, digest = _looked(part, bounds, known.headers)
        if digest == known.digest:
            return Found(known, folder, sums)
    found = sorted(_records(part, *bounds), key=attrgetter("offset"))
    folder = found[0].name.partition("/")[0] + "/" if found else ""
    if not all(one.name.startswith(folder) for one in found):
        folder = ""
    sums = array("I", (one.crc for one in found))
    names = tuple(one.name[len(folder) :] for one in found)
    places = tuple(one[1:4] for one in found)
    if known is not None and (names, places) == (known.names, known.places):
        return Found(known, folder, sums)
    listing = Listing(names, places)
    if folder and len(found) >= _FEW and bounds[2] - bounds[1] <= _LARGEST_DIRECTORY:
        headers = array("Q"), array("Q"), array("Q")
        for one in found:
            for column, at in zip(headers, (one.entry, *one.span(part)), strict=True):
                column.append(at)
        digest = _looked(part, bounds, headers)[2]
        listing = Listing(names, places, (part.start, *bounds), headers, digest)
    return Found(listing, folder, sums)


def _looked(part: Part, bounds: tuple[int, int, int], headers: _Headers) -> _Look:
    """Return the folder and the checksums of an archive's records, and the digest of the rest.

    The digest is empty unless all headers begin where they do in another archive, and are of
    records in one folder, whose name every program decodes to the same text.
    """
    _, start, stop = bounds
    entries, begins, ends = headers
    directory = bytearray(part.read(start, stop - start))
    sums, digest = array("I"), hashlib.sha256()
    first = entries[0] - start + CENTRAL.size
    folder = bytes(directory[first : directory.find(b"/", first) + 1])
    if not folder.isascii():
        return "", sums, b""
    size, blank = len(folder), bytes(len(folder))
    digest.update(size.to_bytes(4, "little"))  # of what the zeros stand for
    for entry in entries:
        at = entry - start
        name = at + CENTRAL.size
        if directory[name : name + size] != folder:
            return "", sums, b""
        sums.frombytes(directory[at + _CRC_CENTRAL : at + _CRC_CENTRAL + 4])
        directory[at + _CRC_CENTRAL : at + _CRC_CENTRAL + 4] = _ZEROS
        directory[name : name + size] = blank
    digest.update(directory)
    for low, high in _runs(begins, ends):
        base = begins[low]
        block = bytearray(part.read(base, ends[high - 1] - base))
        view = memoryview(block)
        for number in range(low, high):
            at, end = begins[number] - base, ends[number] - base
            name = at + LOCAL.size
            if block[name : name + size] != folder:
                return "", sums, b""
            block[at + _CRC_LOCAL : at + _CRC_LOCAL + 4] = _ZEROS
            block[name : name + size] = blank
            digest.update(view[at:end])
    return folder.decode(), sums, digest.digest()


def _runs(begins: Sequence[int], ends: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield headers that are read in one call, as ranges of their numbers."""
    low = 0
    for number in range(1, len(begins)):
        far = begins[number] - ends[number - 1] > _NEAR
        if far or ends[number] - begins[low] > _BLOCK:
            yield low, number
            low = number
    yield low, len(begins)


def _records(part: Part, count: int, start: int, stop: int) -> Iterator[Record]:
    ranges: list[tuple[int, int]] = []
    names: set[str] = set()
    for at, head, raw, extra in _entries(part, count, start, stop):
        _, _, _, flags, method, _, _, crc, packed, nbytes, _, _, _, disk, _, _, where = head
        if _NONE in (nbytes, packed, where):
            nbytes, packed, where = _wide(extra, nbytes, packed, where)
        name = raw.decode("utf-8" if flags & _UTF8 else "cp437", "backslashreplace")
        # Of two records with one name, one program reads the first and another the last.
        if name in names:
            raise MergeError(f"two records of the zip archive have the same name, {name!r}")
        names.add(name)
        offset = _offset(part, where, raw, flags, method, packed)
        # The data lies before the directory, on this disk: archives of several exist, torch's not.
        if offset + packed > start or disk:
            raise _misplaced(name)
        ranges.append((where, offset + packed))
        if flags & _ENCRYPTED or method not in (_STORED, _DEFLATED):
            kind = "encrypted" if flags & _ENCRYPTED else "compressed in an unusual way"
            hint = "unpack it, and pack it again without compression: zip -0 -r OUTPUT DIRECTORY"
            raise MergeError(f"record {name!r} of the archive is {kind}", hint=hint)
        # Deflate packs at most 1,032 bytes into one, and adds few bytes to what it cannot pack.
        lies = nbytes > 1032 * packed or packed > nbytes + (nbytes >> 10) + 64
        if lies if method == _DEFLATED else packed != nbytes:
            raise MergeError(f"record {name!r} of the archive lies about its size")
        kept = packed if method == _DEFLATED else None
        yield Record(name, part.start + offset, nbytes, kept, crc, where, at)
    ranges.sort()
    if any(begin < end for (_, end), (begin, _) in itertools.pairwise(ranges)):
        raise _damaged("its records overlap")


def _entries(
    part: Part, count: int, start: int, stop: int
) -> Iterator[tuple[int, tuple[int, ...], bytes, bytes]]:
    """Yield the entries of the central directory: offset, numbers, name and extra fields."""
    block, base, at = b"", start, start
    for _ in range(count):
        if at - base + _LARGEST_ENTRY > len(block) and base + len(block) < stop:
            block, base = part.read(at, min(_BLOCK, stop - at)), at
        if at - base + CENTRAL.size > len(block):
            raise _damaged("its directory ends too early")
        head = CENTRAL.unpack_from(block, at - base)
        name = at - base + CENTRAL.size
        extra = name + head[10]
        begin, at = at, at + CENTRAL.size + head[10] + head[11] + head[12]
        if head[0] != b"PK\1\2" or at > stop:
            raise _damaged("its directory is garbled")
        yield begin, head, block[name:extra], block[extra : extra + head[11]]
    if at != stop:
        raise _damaged("its directory does not end where it should")


def _damaged(why: str) -> MergeError:
    hint = "it was cut short or changed on its way; fetch or save it again"
    return MergeError(f"the zip archive is damaged ({why})", hint=hint)


def _misplaced(name: str) -> MergeError:
    return MergeError(f"record {name!r} of the archive is not where it should be")


def _directory(part: Part) -> tuple[int, int, int]:
    """Return the number of records in the central directory, its offset, and its end."""
    nbytes = part.nbytes
    room = min(nbytes, END.size + _LARGEST_COMMENT)
    tail = part.read(nbytes - room, room)
    found = tail.rfind(b"PK\5\6")
    if found < 0 or found + END.size > len(tail):
        raise _damaged("its end is missing")
    end = nbytes - room + found
    _, disk, home, here, count, size, start, comment = END.unpack_from(tail, found)
    # A comment that holds another end would hide it from readers that search backwards.
    if end + END.size + comment != nbytes:
        raise _damaged("its end is not where it should be")
    stop, narrow = end, (disk, home, here, count, size, start)
    if end >= LOCATOR.size + END64.size:
        magic, disk64, where, _ = LOCATOR.unpack(part.read(end - LOCATOR.size, LOCATOR.size))
        if magic == b"PK\6\7":
            stop = end - LOCATOR.size - END64.size
            magic, length, _, _, *wide = END64.unpack(part.read(stop, END64.size))
            # A number of the narrow end is that of the wide one, or the largest that it can hold.
            limits = (0xFFFF,) * 4 + (_NONE,) * 2
            lies = any(n not in (w, most) for n, w, most in zip(narrow, wide, limits, strict=True))
            if (magic, length, where, disk64) != (b"PK\6\6", 44, stop, 0) or lies:
                raise _damaged("its two ends contradict each other")
            disk, home, here, count, size, start = wide
    if disk or home or here != count or start + size != stop:
        raise _damaged("its directory is not where it should be")
    return count, start, stop


def _wide(extra: bytes, *numbers: int) -> Iterator[int]:
    """Yield numbers of the directory, those that do not fit 32 bits from the zip64 field.

    The field holds only these, one after the other in the order of the directory.
    """
    at, wide = 0, b""
    while at + _FIELD.size <= len(extra):
        kind, length = _FIELD.unpack_from(extra, at)
        at += _FIELD.size
        if kind == 1:
            wide = extra[at : at + length]
            break
        at += length
    for number in numbers:
        if number == _NONE and wide:
            if len(wide) < 8:
                raise _damaged("a size is missing")
            number, wide = int.from_bytes(wide[:8], "little"), wide[8:]  # noqa: PLW2901
        yield number


def _offset(part: Part, where: int, name: bytes, flags: int, method: int, packed: int) -> int:
    """Return the offset of a record's data, behind its local header, which has to agree."""
    size = LOCAL.size + len(name)
    raw = part.read(where, size)
    magic, _, own_flags, own, _, _, _, own_packed, _, length, extra = LOCAL.unpack_from(raw)
    # The name is compared as bytes: that two decode to the same text is not enough.
    if magic != b"PK\3\4" or own != method or length != len(name) or raw[LOCAL.size :] != name:
        raise _misplaced(name.decode("utf-8", "backslashreplace"))
    agree = own_flags & _LATER or own_packed in (packed, _NONE)
    if (own_flags ^ flags) & _ENCRYPTED or not agree:
        raise _damaged("its headers contradict each other")
    return where + size + int(extra)
