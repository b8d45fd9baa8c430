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

    __slots__ = "_ends", "_fresh", "_lock", "_nbytes", "_parts"  # there may be very many

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self._fresh: list[tuple[int, int, int]] = []  # start, stop, crc
        self._parts: dict[int, tuple[int, int]] = {}  # start: (stop, crc)
        self._ends: dict[int, int] = {}  # stop: start
        self._lock = threading.Lock()

    def add(self, start: int, nbytes: int, crc: int) -> None:
        """Add the CRC-32 of a part; one that overlaps earlier parts is left for `missing`."""
        if nbytes:
            self._fresh.append((start, start + nbytes, crc))
            # The part with the last byte is among the last to arrive. A run that is complete then
            # holds one part instead of up to 64, which take ten times the memory.
            if len(self._fresh) >= _FRESH or start + nbytes == self._nbytes:
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
        """Return the ranges of bytes that no part covers yet, as start and stop."""
        self._combine()
        gaps = []
        at = 0
        for start, (stop, _) in sorted(self._parts.items()):
            if start > at:
                gaps.append((at, start))
            at = stop
        return [*gaps, (at, self._nbytes)] if at < self._nbytes else gaps

    def value(self) -> int:
        """Return the CRC-32 of the whole run, all of which has been added."""
        self._combine()
        return self._parts[0][1] if self._parts else 0
