"""Windows of integers and bools, and of what is kept: the template's, where all agree."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterator, Sequence

from merge_avg.arithmetic import Weights, settle, unequal, values_of
from merge_avg.engine._diagnose import Diagnosis
from merge_avg.engine._reading import WindowReader
from merge_avg.engine._recipes import counted
from merge_avg.engine._workspace import Workspace
from merge_avg.io import Buffer, same
from merge_avg.plan import Piece, Window

_SETTLED = 1 << 16  # how many integers are held at a time as Python's, which are large


class Integers:
    """One worker's means of integers.

    Args:
        space: the merge.
        reader: what windows are read by.
        diagnosis: notes or refuses what differs.
        out: where results are made.
    """

    def __init__(
        self, space: Workspace, reader: WindowReader, diagnosis: Diagnosis, out: Buffer
    ) -> None:
        self._rows = [output.weights for output in space.job.outputs]
        self._policy = space.job.options.int_policy
        self._reader = reader
        self._diagnosis = diagnosis
        self._out = out

    def results(self, window: Window) -> Iterator[int]:
        """Yield the number of each output, while its part of the window lies in `out`."""
        # The template's elements are the result until the policy says otherwise.
        ours = self._reader.read(window, 0, self._out)
        size = window[0].unit.dtype.itemsize
        places = unequal(self._pairs(window, ours), size)
        found: list[tuple[Piece, slice, array[int]]] = []
        at = 0
        for piece in window if places else ():
            span = slice(at, at + piece.stop - piece.start)
            at = span.stop
            some = places[bisect_left(places, span.start) : bisect_left(places, span.stop)]
            if some:
                shift = piece.unit.start + piece.start - span.start
                self._diagnosis.differing(window, piece, some, shift)
                found.append((piece, span, some))
        for number in range(len(self._rows)):
            if self._policy in ("max", "mean"):
                for piece, span, some in found:
                    data = ours[span.start * size : span.stop * size]
                    self._settle(number, piece, [place - span.start for place in some], data)
            yield number

    def _pairs(self, window: Window, ours: memoryview) -> Iterator[tuple[memoryview, memoryview]]:
        """Yield a window of the template with each other source's that is not the same."""
        for k in range(1, len(window[0].unit.sources)):
            theirs = self._reader.read(window, k)
            # One memcmp, as integers nearly always agree.
            if not same(self._out, self._reader.room(), len(ours)):
                yield ours, theirs

    def _settle(self, number: int, piece: Piece, places: Sequence[int], data: memoryview) -> None:
        """Give elements that differ the values that the policy makes of them for an output."""
        dtype = piece.unit.members[0][1].dtype
        ours = values_of(data, dtype)
        row = self._rows[number]
        sources = counted(piece.unit, row)
        chosen = [piece.unit.sources[k].checkpoint for k in sources]
        weights = row.subset(chosen) or Weights.uniform(len(sources))
        most = max(_SETTLED // len(sources), 1)
        for start in range(0, len(places), most):
            some = places[start : start + most]
            columns = []
            for k in sources:
                # Also of the template: the output before this one has settled other values here.
                theirs = values_of(self._reader.again((piece,), k), dtype)
                columns.append([theirs[place] for place in some])
            for place, *values in zip(some, *columns, strict=True):
                ours[place] = settle(values, self._policy, weights)
