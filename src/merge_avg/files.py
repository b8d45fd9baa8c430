"""Reading ranges of open files, and checking the CRC-32 of what was read."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from zlib_ng import zlib_ng

from merge_avg.errors import MergeError
from merge_avg.layout import Storage

_LARGEST_READ = 0x7FFFF000  # what Linux moves in one call
_BLOCK = 1 << 20

Buffer = memoryview | bytearray


class Reader:
    """An open checkpoint file, read by offset from any thread.

    Every byte that `read` takes from a storage with a recorded CRC-32 is counted towards it;
    `finish` reads what is left of such storages and compares.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._begun = os.fstat(self._fd)
        self._sums: dict[Storage, Checksum] = {}
        self._lock = threading.Lock()

    def read(self, into: memoryview, offset: int, storage: Storage | None = None) -> None:
        """Fills `into` from `offset` on.

        Raises:
            MergeError: the file ends before that, or cannot be read.
        """
        read_fully(self._fd, into, offset, self.path)
        if storage is not None and storage.crc is not None:
            crc = zlib_ng.crc32(into)
            with self._lock:
                sums = self._sums.setdefault(storage, Checksum(storage.nbytes))
                sums.add(offset - storage.offset, len(into), crc)

    def finish(self) -> None:
        """Checks the CRC-32 of every storage that was read from, and that the file is the same.

        Raises:
            MergeError: a checksum is wrong, or the file changed since it was opened.
        """
        block = memoryview(bytearray(_BLOCK))
        for storage, sums in self._sums.items():
            for start, stop in sums.missing():
                for at in range(start, stop, _BLOCK):
                    part = block[: min(_BLOCK, stop - at)]
                    read_fully(self._fd, part, storage.offset + at, self.path)
                    sums.add(at, len(part), zlib_ng.crc32(part))
            if sums.value() != storage.crc:
                what = f"record {storage.name!r} is damaged: its CRC-32 does not match"
                raise MergeError(what, where=self.path, hint="fetch or save the file again")
        ended = os.fstat(self._fd)
        if (ended.st_size, ended.st_mtime_ns) != (self._begun.st_size, self._begun.st_mtime_ns):
            hint = "run again when nothing writes to it any more"
            raise MergeError("it changed while it was read", where=self.path, hint=hint)

    @property
    def identity(self) -> tuple[int, int]:
        """Device and inode: what makes two paths the same file."""
        return self._begun.st_dev, self._begun.st_ino

    def close(self) -> None:
        """Closes the file."""
        os.close(self._fd)


def read_fully(fd: int, into: memoryview, offset: int, path: Path) -> None:
    """Fills `into` from `offset` of a file on, in as many calls as it takes."""
    at = 0
    while at < len(into):
        part = into[at : at + _LARGEST_READ]
        try:
            count = os.preadv(fd, [part], offset + at)
        except OSError as error:
            raise MergeError(f"cannot be read ({error.strerror})", where=path) from None
        if not count:
            what = f"it ends at byte {offset + at:,}, in the middle of the weights"
            raise MergeError(what, where=path, hint="fetch or save the file again")
        at += count


def write_fully(fd: int, data: memoryview, offset: int, path: Path) -> None:
    """Writes all of `data` at `offset`, in as many calls as it takes."""
    at = 0
    while at < len(data):
        try:
            at += os.pwrite(fd, data[at : at + _LARGEST_READ], offset + at)
        except OSError as error:
            raise MergeError(f"cannot be written ({error.strerror})", where=path) from None


@dataclass
class Checksum:
    """The CRC-32 of a run of bytes whose parts arrive in any order.

    Adjoining parts are combined at once, so that few are held whatever the size.
    """

    nbytes: int
    _parts: dict[int, tuple[int, int]] = field(default_factory=dict)  # start: (stop, crc)
    _ends: dict[int, int] = field(default_factory=dict)  # stop: start

    def add(self, start: int, nbytes: int, crc: int) -> None:
        """Adds the CRC-32 of a part; one that overlaps parts added before is left for `missing`."""
        stop = start + nbytes
        if not nbytes or any(a < stop and start < b for a, (b, _) in self._parts.items()):
            return
        if start in self._ends:
            before = self._ends.pop(start)
            _, first = self._parts.pop(before)
            crc = zlib_ng.crc32_combine(first, crc, stop - start)
            start = before
        if stop in self._parts:
            after, last = self._parts.pop(stop)
            crc = zlib_ng.crc32_combine(crc, last, after - stop)
            stop = after
        self._parts[start] = stop, crc
        self._ends[stop] = start

    def missing(self) -> list[tuple[int, int]]:
        """The ranges of bytes that no part covers yet."""
        gaps = []
        at = 0
        for start, (stop, _) in sorted(self._parts.items()):
            if start > at:
                gaps.append((at, start))
            at = stop
        return [*gaps, (at, self.nbytes)] if at < self.nbytes else gaps

    def value(self) -> int:
        """The CRC-32 of the whole run, all of which has been added."""
        return self._parts[0][1] if self._parts else 0


def same_file(path: Path, readers: Iterable[Reader]) -> Reader | None:
    """The reader whose file `path` is, under whatever name, if there is one."""
    try:
        found = path.stat()
    except OSError:
        return None
    matches = (r for r in readers if r.identity == (found.st_dev, found.st_ino))
    return next(matches, None)
