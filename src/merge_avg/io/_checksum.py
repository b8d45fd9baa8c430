"""CRC-32 of runs of bytes whose parts arrive in any order."""

from __future__ import annotations

import threading

from zlib_ng import zlib_ng

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

    def value(self) -> int:
        """Return the CRC-32 of the whole run, all of which has been added."""
        self._combine()
        return self._parts[0][2] if self._parts else 0
