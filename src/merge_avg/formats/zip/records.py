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

import itertools
import struct
from collections.abc import Iterator
from dataclasses import dataclass
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


def records(part: Part) -> Iterator[Record]:
    """Yield the records of an archive, in the order of its central directory.

    Raises:
        MergeError: the archive is damaged or contradicts itself, or a record cannot be read.
    """
    count, start, stop = _directory(part)
    ranges: list[tuple[int, int]] = []
    names: set[str] = set()
    for head, raw, extra in _entries(part, count, start, stop):
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
        kept, at = packed if method == _DEFLATED else None, part.start + offset
        yield Record(name, at, nbytes, kept, crc)
    ranges.sort()
    if any(begin < end for (_, end), (begin, _) in itertools.pairwise(ranges)):
        raise _damaged("its records overlap")


def _entries(
    part: Part, count: int, start: int, stop: int
) -> Iterator[tuple[tuple[int, ...], bytes, bytes]]:
    """Yield the entries of the central directory: numbers, name and extra fields of each."""
    block, base, at = b"", start, start
    for _ in range(count):
        if at - base + _LARGEST_ENTRY > len(block) and base + len(block) < stop:
            block, base = part.read(at, min(_BLOCK, stop - at)), at
        if at - base + CENTRAL.size > len(block):
            raise _damaged("its directory ends too early")
        head = CENTRAL.unpack_from(block, at - base)
        name = at - base + CENTRAL.size
        extra = name + head[10]
        at += CENTRAL.size + head[10] + head[11] + head[12]
        if head[0] != b"PK\1\2" or at > stop:
            raise _damaged("its directory is garbled")
        yield head, block[name:extra], block[extra : extra + head[11]]
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
