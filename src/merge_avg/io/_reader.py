"""Reading ranges of open files, and checking the CRC-32 of what was read."""

from __future__ import annotations

import array
import bisect
import contextlib
import itertools
import os
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from zlib_ng import zlib_ng

from merge_avg.checkpoint import File, Layout, Storage
from merge_avg.errors import MergeError, failure
from merge_avg.io._platform import FLAGS, read_fully, read_spread, write_all

_BLOCK = 1 << 20
# Records of an archive have a header of about 200 bytes between them. What lies between two that
# are read is read too, up to here.
_NEAR = 1024
_MOST_VIEWS = 1000  # in one call: Linux takes 1,024
# Parts that wait to be combined: combining takes a lock and some matrix products, adding does not.
_FRESH = 64


class Checksum:
    """The CRC-32 of `nbytes` bytes whose parts arrive in any order, from any thread.

    Adjoining parts are combined from time to time, so that few are held whatever the size.
    """

    __slots__ = "_fresh", "_lock", "_nbytes", "_parts"  # there may be very many

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self._fresh: list[tuple[int, int, int]] = []  # start, stop, crc
        self._parts: list[tuple[int, int, int]] = []  # the same, sorted and apart from each other
        self._lock = threading.Lock()

    def add(self, start: int, nbytes: int, crc: int) -> None:
        """Add the CRC-32 of a part; of two that overlap, the shorter is left for `missing`."""
        if nbytes:
            self._fresh.append((start, start + nbytes, crc))
            # The part with the last byte is among the last to arrive. A run that is complete then
            # holds one part instead of up to 64, which take ten times the memory.
            if len(self._fresh) >= _FRESH or start + nbytes == self._nbytes:
                self._combine()

    def _combine(self) -> None:
        with self._lock:
            # Another thread may add a part at any moment: those that are here now are taken.
            fresh = [self._fresh.pop() for _ in range(len(self._fresh))]
            parts: list[tuple[int, int, int]] = []
            for part in sorted(self._parts + fresh):
                start, stop, crc = part
                begin, end, before = parts[-1] if parts else (0, -1, 0)
                if start > end:
                    parts.append(part)
                elif start == end:
                    parts[-1] = begin, stop, zlib_ng.crc32_combine(before, crc, stop - start)
                elif stop - start > end - begin:
                    parts[-1] = part
            self._parts = parts

    def missing(self) -> list[tuple[int, int]]:
        """Return the ranges of bytes that no part covers yet, as start and stop."""
        self._combine()
        stops = [0, *(stop for _, stop, _ in self._parts)]
        starts = [*(start for start, _, _ in self._parts), self._nbytes]
        return [gap for gap in zip(stops, starts, strict=True) if gap[0] < gap[1]]

    def parts(self) -> Sequence[tuple[int, int, int]]:
        """Return start, stop and CRC-32 of what has been added, sorted and apart."""
        self._combine()
        return self._parts

    def value(self) -> int:
        """Return the CRC-32 of the whole run, all of which has been added."""
        self._combine()
        return self._parts[0][2] if self._parts else 0


@dataclass(frozen=True, slots=True)
class Tap:
    """A storage that is read from."""

    storage: Storage
    fd: int
    offset: int  # of its first byte in the open file
    path: Path  # for messages
    crc: int | None = None  # that the file records for it
    sums: Callable[[Storage], Checksum] | None = None  # keeps the checksums of its parts

    def read(self, into: memoryview, at: int, *, again: bool = False) -> None:
        """Fill `into` from byte `at` of the storage on; `again` where it was counted before."""
        read_fully(self.fd, into, self.offset + at, self.path)
        if self.crc is None or self.sums is None or again:
            return
        crc = zlib_ng.crc32(into)
        if len(into) < self.storage.nbytes:
            self.sums(self.storage).add(at, len(into), crc)
        elif crc != self.crc:
            raise _damaged(self.storage, self.path)


# The bytes of a buffer to fill, and a storage with the place in it that they begin at.
Request = tuple[int, int, Storage, int]


class Strip(NamedTuple):
    """A range of a file that is read in one call, and where its bytes go."""

    file: int  # its number; -1 for a request that is met alone
    offset: int  # from the file's base
    views: list[tuple[int, int]]  # begin and end in the buffer; for what is skipped, -1 and a size
    requests: list[tuple[Request, int]]  # with the numbers of their checksums; -1 for a lone one


class Reader:
    """An open checkpoint, read by offset from any thread.

    Every byte that `read` takes from a storage with a recorded CRC-32 is counted towards it. A
    storage that is read whole is checked there and then; of others, `finish` reads what is left,
    and checks. Storages that are deflated or in big-endian byte order are decoded, when they are
    first read, into a nameless file in `scratch`.
    """

    # Files are read and not mapped: one that shrinks under a mapping kills the process (SIGBUS),
    # and mapped pages count as memory of the process.

    def __init__(self, layout: Layout, scratch: Path) -> None:
        self.path = layout.path
        self._files = layout.files
        self.checksums = layout.checksums
        self._fds: dict[int, int] = {}
        # By identity, as hashing a storage costs more than a read.
        self._sums: dict[int, tuple[Storage, Checksum]] = {}
        self._decoded: dict[Storage, Tap] = {}
        self._lock = threading.Lock()
        self._scratch = scratch
        self._spool: BinaryIO | None = None
        self._between = memoryview(bytearray(_NEAR))  # for what nobody looks at

    def read(self, into: memoryview, storage: Storage, at: int, *, again: bool = False) -> None:
        """Fill `into` from byte `at` of a storage on; `again` where it was counted before.

        Raises:
            MergeError: a file cannot be opened or read, ends before that, or is not the one that
                was scanned; or the checksum is wrong.
        """
        if not storage.parts:
            self.tap(storage).read(into, at, again=again)
            return
        stop = at + len(into)
        ends = list(itertools.accumulate(part.nbytes for part in storage.parts))
        for number in range(bisect.bisect_right(ends, at), len(ends)):
            part, end = storage.parts[number], ends[number]
            start = end - part.nbytes
            if start >= stop:
                break
            first, last = max(at, start), min(stop, end)
            self.read(into[first - at : last - at], part, first - start, again=again)

    def plan(self, requests: Iterable[Request]) -> Sequence[Strip]:
        """Return how requests are met: neighbours in a file by one call of the system.

        Any reader of a checkpoint that has these storages, and as many checksums, may use it.
        """
        numbers = self.checksums.numbers
        strips: list[Strip] = []
        strip, end = None, -1
        for one in requests:
            begin, stop, storage, at = one
            if storage.parts or storage.coded:
                strips.append(Strip(-1, 0, [], [(one, -1)]))
                strip = None
                continue
            start = storage.offset + at
            if (
                strip is None
                or storage.file != strip.file
                or not 0 <= start - end <= _NEAR
                or len(strip.views) > _MOST_VIEWS
            ):
                strip, end = Strip(storage.file, start, [], []), start
                strips.append(strip)
            if start > end:
                strip.views.append((-1, start - end))
            number = (
                numbers.get((storage.file, storage.offset, storage.nbytes)) if numbers else None
            )
            if not numbers and start == end and strip.views and strip.views[-1][1] == begin:
                strip.views[-1] = strip.views[-1][0], stop
            else:
                strip.views.append((begin, stop))
            if number is not None:
                strip.requests.append((one, number))
            end = start + stop - begin
        return strips

    def read_all(self, strips: Sequence[Strip], into: memoryview, *, again: bool = False) -> None:
        """Do what `read` does, for each request that was planned."""
        recorded, between, crc32 = self.checksums.crcs, self._between, zlib_ng.crc32
        for strip in strips:
            if strip.file < 0:
                (begin, stop, storage, at), _ = strip.requests[0]
                self.read(into[begin:stop], storage, at, again=again)
                continue
            views = [into[a:b] if a >= 0 else between[:b] for a, b in strip.views]
            path = self._files[strip.file].path
            at = self._files[strip.file].base + strip.offset
            read_spread(self._fd(strip.file), views, at, path)
            for (begin, stop, storage, start), number in () if again else strip.requests:
                crc = crc32(into[begin:stop])
                if stop - begin < storage.nbytes:
                    self._checksum(storage).add(start, stop - begin, crc)
                elif crc != recorded[number]:
                    raise _damaged(storage, path)

    def tap(self, storage: Storage) -> Tap:
        """Return where the bytes of a storage without parts come from."""
        fd, path = self._fd(storage.file), self._files[storage.file].path
        if storage.coded:
            return self._decode(storage, fd, path)
        start = self._start(storage)
        return Tap(storage, fd, start, path, self._recorded(storage), self._checksum)

    def _start(self, storage: Storage) -> int:
        return self._files[storage.file].base + storage.offset

    def _recorded(self, storage: Storage) -> int | None:
        return self.checksums.get(storage.bytes_at)

    def _checksum(self, storage: Storage) -> Checksum:
        if id(storage) not in self._sums:
            with self._lock:
                self._sums.setdefault(id(storage), (storage, Checksum(storage.nbytes)))
        return self._sums[id(storage)][1]

    def take(self) -> list[tuple[int, ...]]:
        """Check the storages that were read whole, and return the sums of others, to be `put` back.

        Each is a file, offset and size, and of a part of it the start, stop and CRC-32.
        """
        taken: list[tuple[int, ...]] = []
        for storage, sums in self._sums.values():
            if sums.missing():
                taken += ((*storage.bytes_at, *part) for part in sums.parts())
            elif sums.value() != self._recorded(storage):
                raise _damaged(storage, self._files[storage.file].path)
        self._sums.clear()
        for number, fd in self._fds.items():
            _refuse_changed(self._files[number], fd)
        return taken

    def put(self, storage: Storage, start: int, stop: int, crc: int) -> None:
        """Count what was read of a storage, here or elsewhere; ValueError for what cannot be."""
        if self._recorded(storage) is None or not 0 <= start < stop <= storage.nbytes:
            raise ValueError("a part that no record has")
        self._checksum(storage).add(start, stop - start, crc)

    def finish(self, *, elsewhere: bool = False) -> None:
        """Raise MergeError where a storage has another CRC-32, or a file changed since the scan.

        Files that others have read `elsewhere` are looked at too.
        """
        block = memoryview(bytearray(_BLOCK))
        for storage, sums in self._sums.values():
            path = self._files[storage.file].path
            for start, stop in sums.missing():
                for at in range(start, stop, _BLOCK):
                    part = block[: min(_BLOCK, stop - at)]
                    read_fully(self._fd(storage.file), part, self._start(storage) + at, path)
                    sums.add(at, len(part), zlib_ng.crc32(part))
            if sums.value() != self._recorded(storage):
                raise _damaged(storage, path)
        for number, fd in self._fds.items():
            _refuse_changed(self._files[number], fd)
        for file in self._files if elsewhere else ():
            _refuse_changed(file, file.path)

    def close(self) -> None:
        """Close the files."""
        for fd in self._fds.values():
            with contextlib.suppress(OSError):  # nothing was written
                os.close(fd)
        self._fds.clear()
        if self._spool is not None:
            self._spool.close()

    def _fd(self, number: int) -> int:
        if number in self._fds:
            return self._fds[number]
        with self._lock:
            if number not in self._fds:
                file = self._files[number]
                try:
                    self._fds[number] = os.open(file.path, os.O_RDONLY | FLAGS)
                except OSError as error:
                    raise failure(error, "cannot be opened", file.path) from None
                _refuse_changed(file, self._fds[number])
            return self._fds[number]

    def _decode(self, storage: Storage, fd: int, path: Path) -> Tap:
        """Return where the decoded bytes of a storage lie in the spool."""
        with self._lock:
            if storage in self._decoded:
                return self._decoded[storage]
            crc = nbytes = 0
            try:
                if self._spool is None:
                    self._spool = tempfile.TemporaryFile(dir=self._scratch)  # noqa: SIM115 - close()
                spool = self._spool
                start = os.fstat(spool.fileno()).st_size
                for block in _inflated(fd, storage, self._start(storage), path):
                    crc = zlib_ng.crc32(block, crc)
                    nbytes += len(block)
                    # An archive that lies about sizes must not fill the disk.
                    if nbytes > storage.nbytes:
                        raise _damaged(storage, path)
                    # At its place: others read what was decoded before, maybe by seeking.
                    data = memoryview(_little(block, storage.swapped))
                    write_all(spool.fileno(), data, start + nbytes - len(data))
            except OSError as error:
                what = f"record {storage.name!r} cannot be unpacked ({error.strerror})"
                hint = f"{storage.nbytes:,} bytes are needed in {self._scratch}"
                raise MergeError(what, where=path, hint=hint) from None
            if nbytes != storage.nbytes or self._recorded(storage) not in (None, crc):
                raise _damaged(storage, path)
            self._decoded[storage] = Tap(storage, spool.fileno(), start, path)
            return self._decoded[storage]


def _inflated(fd: int, storage: Storage, start: int, path: Path) -> Iterator[bytes]:
    """Yield the bytes of a storage as they were before they were deflated, a block at a time."""
    block = memoryview(bytearray(_BLOCK))
    packed = storage.nbytes if storage.packed is None else storage.packed
    inflater = zlib.decompressobj(-15)  # raw deflate, as RFC 1951 has it and zip archives use it
    held = b""
    for at in range(0, packed, _BLOCK):
        part = block[: min(_BLOCK, packed - at)]
        read_fully(fd, part, start + at, path)
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
            # Whole numbers of the widest dtype, so that swapping bytes never cuts a word.
            whole = len(held) // 16 * 16
            yield held[:whole]
            held = held[whole:]
    yield held


def _little(block: bytes, word: int) -> bytes:
    """Return big-endian words of a size in little-endian byte order."""
    if word == 1:
        return block
    words = array.array({2: "H", 4: "I", 8: "Q"}[word], block)
    words.byteswap()
    return words.tobytes()


def _damaged(storage: Storage, path: Path) -> MergeError:
    what = f"record {storage.name!r} is damaged: its CRC-32 does not match"
    return MergeError(what, where=path, hint="fetch or save the file again")


def _refuse_changed(file: File, place: int | Path) -> None:
    """Raise MergeError for a file, open or not, that is not what it was when it was scanned."""
    found = os.fstat(place) if isinstance(place, int) else place.stat()
    then = file.nbytes, file.mtime_ns, file.device, file.inode
    if then != (found.st_size, found.st_mtime_ns, found.st_dev, found.st_ino):
        hint = "run again when nothing writes to it any more"
        raise MergeError("it changed while it was read", where=file.path, hint=hint)
