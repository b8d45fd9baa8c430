"""The loop: for each window, read and add each checkpoint; then write."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

from merge_avg.arithmetic import TILE
from merge_avg.checkpoint import Storage
from merge_avg.engine._composites import Access
from merge_avg.engine._device import make_lane, travel
from merge_avg.engine._diagnose import Diagnosis, Integers
from merge_avg.engine._observers import Hasher, observers
from merge_avg.engine._reading import Recipes, WindowReader, length, part
from merge_avg.engine._workspace import Workspace
from merge_avg.io import Buffer, Matrix
from merge_avg.plan import Piece, Window, spans


class Worker:
    """One thread's buffers, and what it does with a window: reads, shows, averages, writes.

    All that it holds is of a size that the budget knows.
    """

    def __init__(self, space: Workspace) -> None:
        self._space = space
        budget = space.job.budget
        self._nbytes = budget.window * budget.rows * budget.itemsize
        self._lane = make_lane(self._nbytes, space.device)
        self._out = Buffer(budget.window * budget.itemsize)
        self._peeked = Buffer(TILE * budget.itemsize)
        self._watch = observers(space)
        self._kept = Hasher(space.job, space.findings)
        self._recipes = Recipes(space)
        self._reader = WindowReader(space, self._watch, functools.partial(self._lane.room, 0))
        self._diagnosis = Diagnosis(space, self._reader)
        self._integers = Integers(space, self._reader, self._diagnosis, self._out)

    def fill(self, batch: Sequence[Window]) -> None:
        """Average windows over all checkpoints, and write the results."""
        for window in batch:
            unit = window[0].unit
            # The template's elements need no sum, unless --dtype converts their storage.
            kept = unit.kind == "keep" and unit.dtype == unit.sources[0].dtype
            for one in self._watch:
                one.begin(window)
            if unit.kind == "equal" or kept:
                results = self._integers.results(window)
            else:
                results = self._means(window)
            size = unit.dtype.itemsize
            data = self._out.bytes(length(window) * size)
            for number in results:
                self._restore(window, first=not number)
                for piece, start, stop in spans(window):
                    self._write(number, piece, data[start * size : stop * size])

    def copy(self, index: int, number: int, record: Storage) -> None:
        """Copy a record of the template that holds no weights into file `number` of each output.

        `index` is its number among all that are copied.
        """
        with self._kept.copying(index) as seen:
            for at in range(0, record.nbytes, self._nbytes):
                data = self._lane.room(0).bytes(min(self._nbytes, record.nbytes - at))
                self._space.readers[0].read(data, record, at)
                for sink in self._space.sinks:
                    sink.write(number, record.name, at, data)
                seen(data)
                self._space.findings.count(len(data))

    def compose(self, number: int) -> None:
        """Compute composite `number` of the plan."""
        findings = self._space.findings
        hashes = [0] * len(findings.hashes)
        self._space.job.plan.composites[number].compose(Access(self._space, number, hashes))
        findings.add_hashes(hashes)

    def close(self) -> None:
        """Report what was found, and give the device's memory back."""
        for one in (*self._watch, self._kept):
            one.close()
        self._lane.close()

    def _means(self, window: Window) -> Iterator[int]:
        """Yield the number of each output, while its part of the window lies in `out`."""
        unit, options = window[0].unit, self._space.job.options
        recipe = self._recipes.of(unit)
        fill = functools.partial(self._reader.stack, window, recipe)
        for group, stack in travel(self._lane, recipe.groups, fill):
            for mean, rows in recipe.shares(group):
                some = stack.run(rows) if isinstance(stack, Matrix) else stack[rows]
                mean.extend(some, whole=recipe.whole)
        out = self._out.rows(1, length(window), unit.dtype)
        outputs = self._space.job.outputs
        # All outputs were added in one reading. Their results are written one by one, so that there
        # is one buffer for them whatever their number.
        for number, (ours, mean) in enumerate(zip(recipe.counted, recipe.means, strict=True)):
            mean.result(out, functools.partial(self._peek, window, ours))
            # A mean of finite numbers of one dtype fits that dtype; a linear combination may not.
            grows = recipe.converted or outputs[number].weights.divisor is not None
            write = None
            if unit.kind == "mean" and not mean.finite:
                write = self._diagnosis.nonfinite(window, ours, out)
            if grows and not options.allow_nonfinite and not mean.fits:
                self._diagnosis.overflow(window, out)
            if write is not None:
                write()
            yield number

    def _peek(
        self, window: Window, sources: Sequence[int], number: int, start: int, stop: int
    ) -> Matrix:
        """Return elements `start` to `stop` of a window once more, as a source has them."""
        k = sources[number]
        # Rows that a mean was shown whole are still needed: the little that is asked for then lies
        # beside them. Only torch, which holds no rows, asks for more.
        buffer = self._peeked if stop - start <= TILE else self._lane.room(0)
        self._reader.again(part(window, start, stop), k, buffer)
        return buffer.rows(1, stop - start, window[0].unit.sources[k].dtype)

    def _restore(self, window: Window, *, first: bool) -> None:
        """Give elements that belong to no tensor, but to what is kept, the template's values."""
        masks = self._space.masks
        if all(piece.unit.number not in masks for piece in window):
            return
        from merge_avg.engine._restride import restore

        unit, source = window[0].unit, window[0].unit.sources[0]
        data = self._reader.again(window, 0)
        out = self._out.rows(1, length(window), unit.dtype).tensor()[0]
        theirs = self._lane.room(0).rows(1, length(window), source.dtype).tensor()[0]
        size = source.dtype.itemsize
        for piece, start, stop in spans(window):
            if (mask := masks.get(piece.unit.number)) is not None:
                if first:
                    self._kept.keep(piece, data[start * size : stop * size])
                restore(out[start:stop], theirs[start:stop], mask, piece.start)

    def _write(self, number: int, piece: Piece, data: memoryview) -> None:
        unit = piece.unit
        size = unit.dtype.itemsize
        # Strided results wait in the scratch file until they are whole; see _restride.
        if unit.number in self._space.results:
            result = self._space.results[unit.number][number]
            result[piece.start * size : piece.stop * size] = data
        for target in self._space.job.layout.targets[unit.number]:
            start, stop = max(piece.start, target.start), min(piece.stop, target.stop)
            if target.view is None and start < stop:
                some = data[(start - piece.start) * size : (stop - piece.start) * size]
                at = target.at + (start - target.start) * size
                self._space.sinks[number].write(target.file, target.slot, at, some)
