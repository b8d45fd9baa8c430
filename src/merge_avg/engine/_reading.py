"""How a unit is averaged, and how its windows are read from wherever their pieces lie."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from merge_avg.arithmetic import Mean, MeanFactory, Weights
from merge_avg.engine._observers import Observer
from merge_avg.engine._workspace import Workspace
from merge_avg.io import Buffer, Matrix, Request, Strip, Tap
from merge_avg.plan import Piece, Unit, Window, spans


@dataclass(frozen=True)
class Recipe:
    """How the windows of a unit are averaged."""

    unit: Unit  # of a window of several, the first
    converted: bool  # whether some sources have another dtype than the result
    counted: Sequence[Sequence[int]]  # for each output, the sources that count
    means: Sequence[Mean]  # for each output
    groups: Sequence[Sequence[int]]  # the sources that are read at a time, all of one dtype
    taps: Sequence[Tap | None]  # of sources that lie neither in parts nor in the scratch file
    whole: bool  # whether there is one group, which one mean is shown as it is

    def shares(self, group: Sequence[int]) -> Iterator[tuple[Mean, slice]]:
        """Yield the means that rows of a group are shown to, and which rows."""
        for mean, wanted in zip(self.means, self.counted, strict=True):
            for rows in _runs(group, wanted):
                yield mean, rows


class Recipes:
    """One worker's recipes. Means are used again: they hold the worker's largest buffers."""

    def __init__(self, space: Workspace) -> None:
        self._space = space
        self._make_mean = MeanFactory(space.device, space.load_torch)
        self._means: dict[object, Mean] = {}
        self._last: Recipe | None = None

    def of(self, unit: Unit) -> Recipe:
        """Return the recipe of a unit: most often, that of the last window."""
        if self._last is None or self._last.unit is not unit:
            rows = self._space.job.weights(unit)
            chosen = [counted(unit, weights) for weights in rows]
            means = [self._mean(unit, *pair) for pair in enumerate(zip(rows, chosen, strict=True))]
            # What is compared is read in any case: a rule may give it no weight here.
            compared = self._space.comparison.rows(unit) if unit.kind == "mean" else ()
            wanted = sorted({*compared}.union(*chosen))
            groups = tuple(_groups(unit, wanted, self._space.job.budget.rows))
            taps = [
                self._space.readers[source.checkpoint].tap(source.storage)
                if source.storage is not None and not (source.storage.parts or source.storage.tiles)
                else None
                for source in unit.sources
            ]
            converted = any(dtype != unit.dtype for dtype in unit.dtypes)
            # Neighbours in one group that go to one mean: read, summed and written in one pass.
            runs = [rows for group in groups for ours in chosen for rows in _runs(group, ours)]
            whole = len(groups) == len(runs) == 1 and not converted
            self._last = Recipe(unit, converted, chosen, means, groups, taps, whole)
        return self._last

    def _mean(self, unit: Unit, number: int, row: tuple[Weights, Sequence[int]]) -> Mean:
        """Return a running mean for an output, with buffers that it used before."""
        sources = [unit.sources[k] for k in row[1]]
        chosen = tuple(source.checkpoint for source in sources)
        dtypes = tuple(source.dtype.name for source in sources)
        # By what decides a mean, not by unit: there are few kinds of units, and very many units.
        key = number, unit.rule, chosen, unit.kind, unit.dtype.name, dtypes
        if key not in self._means:
            weights = row[0].subset(chosen)
            if unit.kind == "keep" or weights is None:
                weights = Weights.uniform(len(chosen))
            self._means[key] = self._make_mean(weights, unit.dtype.name, dtypes)
        return self._means[key]


def counted(unit: Unit, weights: Weights) -> Sequence[int]:
    """Return the sources of a unit that have a weight other than zero; all, if none has."""
    integers = weights.integers
    some = [k for k, source in enumerate(unit.sources) if integers[source.checkpoint]]
    return some or range(len(unit.sources))


def _groups(unit: Unit, sources: Sequence[int], most: int) -> Iterator[Sequence[int]]:
    """Cut a unit's sources where the dtype changes, and into groups of at most `most`."""
    for _, alike in groupby(sources, lambda k: unit.sources[k].dtype):
        group = list(alike)
        yield from (group[at : at + most] for at in range(0, len(group), most))


def _runs(group: Sequence[int], wanted: Sequence[int]) -> Iterator[slice]:
    """Yield the rows of a group that are wanted, as runs of neighbours."""
    chosen = set(wanted)
    for inside, rows in groupby(range(len(group)), lambda row: group[row] in chosen):
        if inside:
            first, *more = rows
            yield slice(first, first + 1 + len(more))


class WindowReader:
    """One worker's reading: observers see what is read for the first time; `room` is memory."""

    def __init__(
        self, space: Workspace, watch: Sequence[Observer], room: Callable[[], Buffer]
    ) -> None:
        self._readers = space.readers
        self._scratch = space.scratch
        self._findings = space.findings
        self._watch = watch
        self.room = room
        aligned = space.job.plan.aligned
        # What lies in the scratch file is read while the reading is planned.
        shared = aligned.alike and not space.job.plan.restrides
        self._alike = aligned.checkpoints if shared else 0
        self._planned: tuple[Window, object, Sequence[Strip]] = (), None, ()

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
        number = window[0].unit.sources[k].checkpoint
        reader = self._readers[number]
        # Checkpoints that share their tensors have one plan; a base is none of them, and those
        # without checksums have another.
        planned, numbers, strips = self._planned
        ours, alike = reader.checksums.numbers, number < self._alike
        if not alike or planned is not window or numbers is not ours:
            strips = reader.plan(self._requests(into, window, k))
        if alike:
            self._planned = window, ours, strips
        reader.read_all(strips, into, again=again)

    def _requests(self, into: memoryview, window: Window, k: int) -> Iterator[Request]:
        """Yield what to read of the checkpoint; what lies in the scratch file is read here."""
        # With tensors of 1 KB this loop runs hundreds of times for each window.
        size, at = window[0].unit.sources[k].dtype.itemsize, 0
        for piece in window:
            source, start = piece.unit.sources[k], piece.start
            end = at + (piece.stop - start) * size
            offset = source.offset + start * size
            if source.storage is None:
                self._scratch.read(into[at:end], offset)
            else:
                yield at, end, source.storage, offset
            at = end


def length(window: Window) -> int:
    """Return the number of elements of a window."""
    return sum(piece.stop - piece.start for piece in window)


def part(window: Window, start: int, stop: int) -> Window:
    """Return elements `start` to `stop` of a window as a window."""
    return tuple(
        Piece(one.unit, one.start + max(start - at, 0), one.stop - max(end - stop, 0))
        for one, at, end in spans(window)
        if start < end and at < stop
    )
