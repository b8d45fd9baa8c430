"""Reading ranges of open files, and checking the CRC-32 of what was read."""

from __future__ import annotations

import array
import bisect
import contextlib
import ctypes
import errno
import itertools
import os
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from zlib_ng import zlib_ng

from merge_avg.checkpoint import File, Layout, Storage
from merge_avg.errors import MergeError, failure

_LARGEST_READ = 0x7FFFF000  # what Linux moves in one call
_BLOCK = 1 << 20
_SYNC_FILE_RANGE = getattr(ctypes.CDLL(None), "sync_file_range", None)
_FRESH = 64  # how many checksums of parts wait to be combined

Buffer = memoryview | bytearray


@dataclass(frozen=True, slots=True)
class Tap:
    """A storage that is read from: its file, where it begins in it, and what keeps checksums."""

    storage: Storage
    fd: int
    offset: int
    path: Path
    sums: Callable[[Storage], Checksum] | None

    def read(self, into: memoryview, at: int, *, again: bool = False) -> None:
        """Fills `into` from byte `at` of the storage on; `again` where it was counted before."""
        read_fully(self.fd, into, self.offset + at, self.path)
        if self.sums is None or again:
            return
        crc = zlib_ng.crc32(into)
        if len(into) < self.storage.nbytes:
            self.sums(self.storage).add(at, len(into), crc)
        elif crc != self.storage.crc:
            raise _damaged(self.storage, self.path)


class Reader:
    """An open checkpoint, read by offset from any thread.

    Every byte that `read` takes from a storage with a recorded CRC-32 is counted towards it. One
    that is read whole is checked there and then; of others, `finish` reads what is left, and
    checks. Storages that are deflated or in big-endian byte order are decoded, when they are first
    read, into a nameless file in `scratch`.

    Raises:
        MergeError: a file cannot be opened, or is not the one that was scanned.
    """

    def __init__(self, layout: Layout, scratch: Path) -> None:
        self.path = layout.path
        self._files = layout.files
        self._fds: dict[int, int] = {}
        # By identity, as hashing a storage costs more than a read.
        self._sums: dict[int, tuple[Storage, Checksum]] = {}
        self._decoded: dict[Storage, int] = {}
        self._lock = threading.Lock()
        self._scratch = scratch
        self._spool: BinaryIO | None = None

    def read(self, into: memoryview, storage: Storage, at: int, *, again: bool = False) -> None:
        """Fills `into` from byte `at` of a storage on; `again` where it was counted before.

        Raises:
            MergeError: the file ends before that, or cannot be read, or the checksum is wrong.
        """
        if storage.parts:
            for part, start, first, last in _overlaps(storage.parts, at, at + len(into)):
                self.read(into[first - at : last - at], part, first - start, again=again)
            return
        self.tap(storage).read(into, at, again=again)

    def tap(self, storage: Storage) -> Tap:
        """Where the bytes of a storage that has no parts come from."""
        path = self._files[storage.file].path
        if storage.coded:
            offset = self._decode(storage)
            return Tap(storage, self._spooled().fileno(), offset, path, None)
        sums = None if storage.crc is None else self._checksum
        return Tap(storage, self._fd(storage.file), storage.offset, path, sums)

    def _checksum(self, storage: Storage) -> Checksum:
        found = self._sums.get(id(storage))
        if found is None:
            with self._lock:
                made = storage, Checksum(storage.nbytes)
                found = self._sums.setdefault(id(storage), made)
        return found[1]

    def finish(self) -> None:
        """Checks the CRC-32 of every storage that was read from, and that the files are the same.

        Raises:
            MergeError: a checksum is wrong, or a file changed since it was scanned.
        """
        block = memoryview(bytearray(_BLOCK))
        for storage, sums in self._sums.values():
            path = self._files[storage.file].path
            for start, stop in sums.missing():
                for at in range(start, stop, _BLOCK):
                    part = block[: min(_BLOCK, stop - at)]
                    read_fully(self._fd(storage.file), part, storage.offset + at, path)
                    sums.add(at, len(part), zlib_ng.crc32(part))
            if sums.value() != storage.crc:
                raise _damaged(storage, path)
        for number, fd in self._fds.items():
            _same(self._files[number], os.fstat(fd))

    def close(self) -> None:
        """Closes the files."""
        for fd in self._fds.values():
            with contextlib.suppress(OSError):  # nothing was written
                os.close(fd)
        self._fds.clear()
        if self._spool is not None:
            self._spool.close()

    def _fd(self, number: int) -> int:
        fd = self._fds.get(number)
        if fd is not None:
            return fd
        with self._lock:
            if number not in self._fds:
                file = self._files[number]
                try:
                    fd = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC)
                except OSError as error:
                    raise failure(error, "cannot be opened", file.path) from None
                self._fds[number] = fd
                _same(file, os.fstat(fd))
            return self._fds[number]

    def _spooled(self) -> BinaryIO:
        if self._spool is None:
            self._spool = tempfile.TemporaryFile(dir=self._scratch)  # noqa: SIM115 - see close()
        return self._spool

    def _decode(self, storage: Storage) -> int:
        """Where in the spool a storage's decoded bytes begin."""
        fd = self._fd(storage.file)
        with self._lock:
            if storage in self._decoded:
                return self._decoded[storage]
            path = self._files[storage.file].path
            crc = nbytes = 0
            try:
                spool = self._spooled()
                start = spool.seek(0, os.SEEK_END)
                for block in _inflated(fd, storage, path):
                    crc = zlib_ng.crc32(block, crc)
                    nbytes += len(block)
                    if nbytes > storage.nbytes:  # more than the archive says
                        raise _damaged(storage, path)
                    spool.write(_little(block, storage.swapped))
                spool.flush()
            except OSError as error:
                what = f"record {storage.name!r} cannot be unpacked ({error.strerror})"
                hint = f"{storage.nbytes:,} bytes are needed in {self._scratch}"
                raise MergeError(what, where=path, hint=hint) from None
            if nbytes != storage.nbytes or storage.crc not in (None, crc):
                raise _damaged(storage, path)
            self._decoded[storage] = start
            return start


def _overlaps(
    parts: Sequence[Storage], at: int, stop: int
) -> Iterator[tuple[Storage, int, int, int]]:
    """The parts that bytes `at` to `stop` of a storage lie in.

    Each with where it starts in the storage, and the first and last of the bytes in it.
    """
    ends = list(itertools.accumulate(part.nbytes for part in parts))
    for number in range(bisect.bisect_right(ends, at), len(parts)):
        start = ends[number] - parts[number].nbytes
        if start >= stop:
            return
        yield parts[number], start, max(at, start), min(stop, ends[number])


def _inflated(fd: int, storage: Storage, path: Path) -> Iterator[bytes]:
    """The bytes of a storage as they were before they were deflated, a block at a time."""
    block = memoryview(bytearray(_BLOCK))
    packed = storage.nbytes if storage.packed is None else storage.packed
    inflater = zlib.decompressobj(-15)
    held = b""
    for at in range(0, packed, _BLOCK):
        part = block[: min(_BLOCK, packed - at)]
        read_fully(fd, part, storage.offset + at, path)
        if storage.packed is None:
            yield bytes(part)
            continue
        pending = bytes(part)
        while pending:
            try:
                held += inflater.decompress(pending, _BLOCK)
            except zlib.error:
                raise _damaged(storage, path) from None
            if inflater.eof and (inflater.unused_data or at + len(part) < packed):
                raise _damaged(storage, path)  # bytes that no program would read
            pending = inflater.unconsumed_tail
            whole = len(held) // 16 * 16  # words are never cut
            yield held[:whole]
            held = held[whole:]
    yield held


def _little(block: bytes, word: int) -> bytes:
    """Words of a size in the other byte order."""
    if word == 1:
        return block
    words = array.array({2: "H", 4: "I", 8: "Q"}[word], block)
    words.byteswap()
    return words.tobytes()


def _damaged(storage: Storage, path: Path) -> MergeError:
    what = f"record {storage.name!r} is damaged: its CRC-32 does not match"
    return MergeError(what, where=path, hint="fetch or save the file again")


def _same(file: File, found: os.stat_result) -> None:
    then = file.nbytes, file.mtime_ns, file.device, file.inode
    if then != (found.st_size, found.st_mtime_ns, found.st_dev, found.st_ino):
        hint = "run again when nothing writes to it any more"
        raise MergeError("it changed while it was read", where=file.path, hint=hint)


def read_fully(fd: int, into: memoryview, offset: int, path: Path) -> None:
    """Fills `into` from `offset` of a file on, in as many calls as it takes."""
    at, size = 0, len(into)
    while at < size:
        part = into[at : at + _LARGEST_READ] if at or size > _LARGEST_READ else into
        try:
            count = os.preadv(fd, [part], offset + at)
        except OSError as error:
            raise failure(error, "cannot be read", path) from None
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
            raise failure(error, "cannot be written", path) from None


def reserve(fd: int, nbytes: int, start: int = 0) -> None:
    """Claims a file's space from `start` on, so that a full disk is an error now and not later.

    Raises:
        OSError: there is not so much space, or no file can be so large.
    """
    if not nbytes:
        return
    try:
        os.posix_fallocate(fd, start, nbytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        os.ftruncate(fd, start + nbytes)
    except OverflowError:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG)) from None


def start_writeback(fd: int) -> None:
    """Lets the disk begin with what was written to a file, while more is made (Linux).

    It is a hint: where it cannot be given, `fsync` does all of it in the end.
    """
    if _SYNC_FILE_RANGE is not None:
        _SYNC_FILE_RANGE(fd, ctypes.c_int64(0), ctypes.c_int64(0), ctypes.c_uint(2))


class Checksum:
    """The CRC-32 of a run of `nbytes` bytes whose parts arrive in any order, from any thread.

    Adjoining parts are combined from time to time, so that few are held whatever the size.
    """

    __slots__ = "_ends", "_fresh", "_lock", "_nbytes", "_parts"  # there may be very many

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self._fresh: list[tuple[int, int, int]] = []  # start, stop, crc
        self._parts: dict[int, tuple[int, int]] = {}  # start: (stop, crc)
        self._ends: dict[int, int] = {}  # stop: start
        self._lock = threading.Lock()

    def add(self, start: int, nbytes: int, crc: int) -> None:
        """Adds the CRC-32 of a part; one that overlaps parts added before is left for `missing`."""
        if nbytes:
            self._fresh.append((start, start + nbytes, crc))
            if len(self._fresh) >= _FRESH:
                self._combine()

    def _combine(self) -> None:
        with self._lock:
            while self._fresh:
                self._join(*self._fresh.pop(0))

    def _join(self, start: int, stop: int, crc: int) -> None:
        if any(a < stop and start < b for a, (b, _) in self._parts.items()):
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
        self._combine()
        gaps = []
        at = 0
        for start, (stop, _) in sorted(self._parts.items()):
            if start > at:
                gaps.append((at, start))
            at = stop
        return [*gaps, (at, self._nbytes)] if at < self._nbytes else gaps

    def value(self) -> int:
        """The CRC-32 of the whole run, all of which has been added."""
        self._combine()
        return self._parts[0][1] if self._parts else 0
