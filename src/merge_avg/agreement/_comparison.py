"""Sums of products of checkpoints, from a sample of what is read for the mean.

The mean of networks that have nothing to do with each other is not a network, and no error says so.
What tells is the cosine between the checkpoints over their tensors of two or more dimensions: the
scales of norm layers lie near 1 everywhere and would hide it. Fine-tunes of one base are nearly
parallel whatever they learned, so they are also compared by their differences to it.

What is kept does not grow with the elements: the Gram matrices of 16 parts of the model, from which
the cosines and their error follow, and for each tensor the squared norms and the products with the
sum. No N x N matrix is kept for a tensor: with many of both that would be the largest thing here.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from merge_avg.agreement._cosines import Agreement, Products, agreement
from merge_avg.agreement._sample import Sample, samples
from merge_avg.arithmetic import LOOPS, int64s
from merge_avg.checkpoint import BY_NAME
from merge_avg.io import Buffer, Matrix
from merge_avg.plan import Piece, Unit, Window
from merge_avg.tuning import COMPARED

# The error is estimated by leaving out one of these groups at a time. With 16, the estimate is
# itself off by about a fifth (the standard deviation of a chi with 15 degrees of freedom).
_GROUPS = 16
# Each group is made of 16 short stretches from all over the model: layers differ, and groups of
# whole layers would measure that instead of the sampling.
_STRETCHES = 16 * _GROUPS
_WIDE = BY_NAME["float64"]
_FIRST = int64s([0])


@dataclass(frozen=True, slots=True)
class _Compared:
    """A unit that is compared, and which of its elements are looked at."""

    unit: Unit
    line: int  # its number among those that are compared
    sample: Sample
    first: int  # how many elements of earlier ones are looked at
    scale: float  # how many elements one that is looked at stands for
    based: bool  # whether the base has it


class Run(NamedTuple):
    """Neighbours among the elements of a window that are looked at, in the order of `columns`."""

    length: int
    group: int
    line: int
    scale: float


class Comparison:
    """Sums of products of checkpoints, to which workers add from any thread.

    Of the units of a plan, those of tensors of two or more dimensions count. With a `base`, the
    number of a checkpoint, the differences of the others to it are compared as well.
    """

    def __init__(
        self, checkpoints: Sequence[int], units: Sequence[Unit], base: int | None = None
    ) -> None:
        count = len(checkpoints)
        found = [unit for unit in units if count > 1 and _compares(unit, set(checkpoints))]
        self._compared: list[_Compared] = []
        self._by_unit: list[_Compared | None] = [None] * len(units)
        first = 0
        for unit, sample in zip(found, samples([len(unit) for unit in found], count), strict=True):
            based = base in {source.checkpoint for source in unit.sources}
            line, elements = len(self._compared), sample.elements
            one = _Compared(unit, line, sample, first, len(unit) / elements, based)
            self._compared.append(one)
            self._by_unit[unit.number] = one
            first += elements
        self._rows = {checkpoint: row for row, checkpoint in enumerate(checkpoints)}
        self._base = base
        self._stretch = max(first // _STRETCHES, 1)
        # Of the checkpoints themselves, and of their differences to the base.
        kinds = 1 if base is None else 2
        self._grams = [Buffer(8 * _GROUPS * count * count) for _ in range(kinds)]
        self._sums = [Buffer(16 * len(found) * count) for _ in range(kinds)]
        self._lock = threading.Lock()

    @property
    def empty(self) -> bool:
        """Return whether there is nothing to compare."""
        return not self._compared

    @property
    def height(self) -> int:
        """Return how many rows are compared: those of the checkpoints, and the base's behind."""
        return len(self._rows) + (self._base is not None)

    def beside(self, unit: Unit) -> frozenset[int]:
        """Return the sources of a unit that are compared, and perhaps not averaged."""
        sources = enumerate(unit.sources) if self._base is not None else ()
        return frozenset(k for k, source in sources if source.checkpoint == self._base)

    def rows(self, unit: Unit) -> Mapping[int, Sequence[int]]:
        """Return the rows of each source of a unit, by its number; an averaged base has two."""
        rows: dict[int, list[int]] = {}
        for k, source in enumerate(unit.sources):
            if source.checkpoint in self._rows:
                rows[k] = [self._rows[source.checkpoint]]
            if source.checkpoint == self._base:
                rows.setdefault(k, []).append(len(self._rows))
        return rows

    def select(self, window: Window) -> tuple[list[int], list[Run]]:
        """Return where elements of a window are looked at and how many from there on, by turns.

        The same elements are returned as runs, too, cut where tensors end and where groups do.
        """
        segments: list[int] = []
        runs: list[Run] = []
        at = 0
        for piece in window:
            one = self._by_unit[piece.unit.number]
            if one is not None:
                for begin, count in one.sample.segments(piece.start, piece.stop):
                    segments += at + begin, count
                runs += self._runs(one, piece)
            at += piece.stop - piece.start
        return segments, runs

    def _runs(self, one: _Compared, piece: Piece) -> Iterator[Run]:
        # A complex number is two real ones.
        width = 2 if piece.unit.dtype.kind == "complex" else 1
        at = one.first + one.sample.before(piece.start)
        end = one.first + one.sample.before(piece.stop)
        while at < end:
            stretch = at // self._stretch
            stop = min((stretch + 1) * self._stretch, end)
            yield Run((stop - at) * width, stretch % _GROUPS, one.line, one.scale)
            at = stop

    def multiply(self, rows: Matrix, runs: Sequence[Run], *, based: bool) -> None:
        """Add the products of rows of float64 and, if the last is the base's, of the differences.

        The rows are changed; runs tell what their columns are of, one after the other.
        """
        count = len(self._rows)
        counts, groups, lines, scales = map(list, zip(*runs, strict=True))
        columns = counts, groups, lines, scales
        ours = rows.run(slice(0, count))
        for kind in range(2 if based else 1):
            grams, sums = self._grams[kind], self._sums[kind]
            with self._lock:
                if LOOPS is not None:
                    less = count if kind else -1
                    LOOPS.products(ours, less, columns, grams.address, sums.address)
                    continue
                from merge_avg.agreement import _torch_products as products

                wide = ours.tensor()
                if kind:
                    wide -= rows.run(slice(count, count + 1)).tensor()
                gram = grams.rows(_GROUPS * count, count, _WIDE).tensor()
                table = sums.rows(len(self._compared), 2 * count, _WIDE).tensor()
                products.multiply(wide, columns, gram.view(_GROUPS, count, count), table)

    def result(self) -> Agreement | None:
        """Return the agreement; None where there is nothing to compare."""
        return self._agreement(0, self._compared)

    def centred(self) -> Agreement | None:
        """Return the agreement of the differences to the base, in the same way."""
        return self._agreement(1, [one for one in self._compared if one.based])

    def _agreement(self, kind: int, compared: Sequence[_Compared]) -> Agreement | None:
        if not compared:
            return None
        cells, size = _doubles(self._grams[kind]), len(self._rows) ** 2
        grams = [cells[at : at + size].tolist() for at in range(0, _GROUPS * size, size)]
        whole = sum(len(one.unit) for one in compared)
        elements = sum(one.sample.elements for one in compared)
        sums, width = _doubles(self._sums[kind]), 2 * len(self._rows)
        tensors = (_products(one, sums[width * one.line :][:width]) for one in compared)
        return agreement(grams, tensors, whole, elements)


class Sampler:
    """One worker's part of windows, set aside until much of it can be multiplied at a time.

    For each window: `begin`, then `see` for each source; and `close` after the last. The products
    go to `comparison`, and `load_torch` is called before the first use of torch.
    """

    def __init__(self, comparison: Comparison, load_torch: Callable[[], None]) -> None:
        self._comparison = comparison
        self._load_torch = load_torch
        self._width = max(COMPARED // max(comparison.height, 1), 1)
        self._room = Buffer(8 * self._width * comparison.height)
        # The columns of the room that are used, and from where on by the present window.
        self._used = self._at = 0
        self._held: list[Run] = []
        self._based = False
        self._unit: Unit | None = None
        self._segments = int64s([])
        self._rows: Mapping[int, Sequence[int]] = {}

    def begin(self, window: Window) -> None:
        """Make room for what is looked at of a window."""
        self._unit = window[0].unit
        segments, runs = self._comparison.select(window)
        self._rows = self._comparison.rows(self._unit) if segments else {}
        if not segments:
            return
        self._segments = int64s(segments)
        columns = sum(run.length for run in runs)
        based = bool(self._comparison.beside(self._unit))
        if self._used + columns > self._width or based != self._based:
            self.close()
            self._based = based
        if columns > self._width:
            self._width = columns
            self._room = Buffer(8 * self._width * self._comparison.height)
        self._held += runs
        self._at, self._used = self._used, self._used + columns

    def see(self, k: int, data: memoryview) -> None:
        """Set aside elements of the window as source number k has them."""
        rows = self._rows.get(k)
        if rows is None or self._unit is None:
            return
        dtype = self._unit.sources[k].dtype
        address = ctypes.addressof(ctypes.c_char.from_buffer(data))
        numel = len(data) // dtype.itemsize
        row = Matrix(address, dtype, 1, numel, numel, data)
        for target in rows:
            if LOOPS is not None and dtype.name in LOOPS.dtypes:
                at = self._room.address + 8 * (target * self._width + self._at)
                LOOPS.take(row, self._segments, _FIRST, at, self._width)
                continue
            self._load_torch()
            from merge_avg.agreement import _torch_products as products

            room = self._room.rows(self._comparison.height, self._width, _WIDE)
            place = room.part(self._at, self._used).tensor()
            products.take(row.tensor(), list(self._segments), [target], place)

    def close(self) -> None:
        """Multiply what is set aside: after the last window, or to make room for the next."""
        if self._held:
            if LOOPS is None:
                self._load_torch()
            rows = self._room.rows(self._comparison.height, self._width, _WIDE)
            self._comparison.multiply(rows.part(0, self._used), self._held, based=self._based)
        self._held, self._used = [], 0


def _products(one: _Compared, sums: memoryview[float]) -> Products:
    name = next(str(name) for name, info in one.unit.members if len(info.shape) > 1)
    half = len(sums) // 2
    return Products(name, one.sample.size, one.sample.elements, sums[:half], sums[half:])


def _doubles(buffer: Buffer) -> memoryview[float]:
    return buffer.bytes(len(buffer) // 8 * 8).cast("d")


def _compares(unit: Unit, checkpoints: set[int]) -> bool:
    """Return whether a unit is of a matrix that all checkpoints have."""
    return unit.is_matrix and checkpoints <= {source.checkpoint for source in unit.sources}
