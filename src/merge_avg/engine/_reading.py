"""Reading a window as a checkpoint has it, from wherever its pieces lie."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from merge_avg.engine._observers import Observer
from merge_avg.engine._recipes import Recipe
from merge_avg.engine._workspace import Workspace
from merge_avg.io import Buffer, Matrix
from merge_avg.plan import Piece, Window


class WindowReader:
    """One worker's reading.

    Args:
        space: the merge.
        watch: see everything that is read for the first time.
        room: returns memory for a window.
    """

    def __init__(
        self, space: Workspace, watch: Sequence[Observer], room: Callable[[], Buffer]
    ) -> None:
        self._readers = space.readers
        self._scratch = space.scratch
        self._findings = space.findings
        self._watch = watch
        self.room = room

    def stack(self, window: Window, recipe: Recipe, group: Sequence[int], room: Buffer) -> Matrix:
        """Read a window as some sources have it, a row each."""
        numel, sources = length(window), recipe.unit.sources
        dtype = sources[group[0]].dtype
        size = numel * dtype.itemsize
        data = room.bytes(size * len(group))
        start = window[0].start * dtype.itemsize
        for row, k in enumerate(group):
            ours = data[row * size : (row + 1) * size]
            tap = recipe.taps[k] if len(window) == 1 else None
            if tap is not None:  # most windows
                tap.read(ours, sources[k].offset + start)
            else:
                self._fill(ours, window, k)
            for one in self._watch:
                one.see(k, ours)
        self._findings.count(len(data))
        return room.rows(len(group), numel, dtype)

    def read(self, window: Window, k: int, buffer: Buffer | None = None) -> memoryview:
        """Read a window as source number k has it, into the room if no buffer is given."""
        data = self._data(window, k, buffer)
        self._fill(data, window, k)
        for one in self._watch:
            one.see(k, data)
        self._findings.count(len(data))
        return data

    def again(self, window: Window, k: int, buffer: Buffer | None = None) -> memoryview:
        """Read what has been seen and counted before."""
        data = self._data(window, k, buffer)
        self._fill(data, window, k, again=True)
        return data

    def _data(self, window: Window, k: int, buffer: Buffer | None) -> memoryview:
        nbytes = length(window) * window[0].unit.sources[k].dtype.itemsize
        return (buffer or self.room()).bytes(nbytes)

    def _fill(self, into: memoryview, window: Window, k: int, *, again: bool = False) -> None:
        # The pieces of a window are alike, but for where they lie. With tensors of 1 KB this loop
        # runs hundreds of times for each window and checkpoint: what can stand before it does.
        source = window[0].unit.sources[k]
        size, read = source.dtype.itemsize, self._readers[source.checkpoint].read
        at = 0
        for piece in window:
            source, start = piece.unit.sources[k], piece.start
            end = at + (piece.stop - start) * size
            offset = source.offset + start * size
            if source.storage is None:
                self._scratch.read(into[at:end], offset)
            else:
                read(into[at:end], source.storage, offset, again=again)
            at = end


def length(window: Window) -> int:
    """Return the number of elements of a window."""
    return sum(piece.stop - piece.start for piece in window)


def part(window: Window, start: int, stop: int) -> Window:
    """Return elements `start` to `stop` of a window as a window."""
    pieces = []
    at = 0
    for piece in window:
        end = at + piece.stop - piece.start
        if start < end and at < stop:
            first, last = piece.start + max(start - at, 0), piece.stop - max(end - stop, 0)
            pieces.append(Piece(piece.unit, first, last))
        at = end
    return tuple(pieces)
