"""Whether checkpoints agree: cosines between their matrices, from a sample of the same reading.

The mean of networks that have nothing to do with each other is no network, and no error says so.
What tells is the cosine between the checkpoints over their tensors of two or more dimensions: the
scales of norm layers lie near 1 everywhere and would hide it. Fine-tunes of one base are nearly
parallel whatever they learned, so they are also compared by their differences to it.

What is kept does not grow with the elements: the Gram matrices of 16 parts of the model, from which
the cosines and their error follow, and for each tensor the squared norms and the products with the
sum. No N x N matrix is kept for a tensor: with many of both that would be the largest thing here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from merge_avg.agreement._cosines import Agreement, Products, agreement
from merge_avg.arithmetic import LOOPS, int64s, takes
from merge_avg.checkpoint import BY_NAME
from merge_avg.io import Buffer, Matrix, Stack
from merge_avg.plan import Unit, Window, is_matrix
from merge_avg.tuning import COMPARED, WHOLE

# Of every block of a tensor the first 1/128 is looked at; of large models, and of very many
# checkpoints, only in every so manieth span of blocks. So it costs next to nothing. Of small models
# more is looked at, up to all, and the smallest tensors of any model whole. None of that depends on
# windows, so neither on threads nor on memory.
_BLOCK = 8192
_SPAN = 16 * _BLOCK
_TAKEN = _BLOCK // 128
_LARGE = 1 << 24  # elements, from which spans are left out
_MOST_EVERY = 64
_MANY = 16  # checkpoints, from which products cost more than what is read
# The error is estimated by leaving out one of these groups at a time. Each is made of many short
# stretches from all over the model.
_GROUPS = 16
_STRETCHES = 16 * _GROUPS
_WIDE = BY_NAME["float64"]


@dataclass(frozen=True, slots=True)
class _Sample:
    """Which elements of a tensor are looked at.

    Attributes:
        size: of the tensor.
        taken: how many of each block, from its start; of a shorter last block as large a part.
        every: in which spans: in every one, every second, and so on, from the first.
    """

    size: int
    taken: int = _BLOCK
    every: int = 1

    def before(self, place: int) -> int:
        """How many elements before a place are looked at."""
        last = self.size // _BLOCK * _BLOCK
        inside = min(min(place, last) % (self.every * _SPAN), _SPAN)
        count = min(place, last) // (self.every * _SPAN) * (_SPAN // _BLOCK * self.taken)
        count += inside // _BLOCK * self.taken + min(inside % _BLOCK, self.taken)
        if place > last and last // _SPAN % self.every == 0:
            count += min(place - last, -(-(self.size - last) * self.taken // _BLOCK))
        return count

    def segments(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Where from `start` to `stop` elements are looked at, counted from `start`; how many."""
        if self.taken == _BLOCK:
            yield 0, stop - start
            return
        last = self.size // _BLOCK * _BLOCK
        first, period = start // _BLOCK * _BLOCK, self.every * _SPAN
        blocks = (
            block
            for span in range(start // period * period, stop, period)
            for block in range(max(span, first), min(span + _SPAN, stop), _BLOCK)
        )
        for block in blocks:
            taken = self.taken if block < last else -(-(self.size - last) * self.taken // _BLOCK)
            begin, end = max(start, block), min(stop, block + taken)
            if begin < end:
                yield begin - start, end - begin

    @property
    def elements(self) -> int:
        """How many elements are looked at."""
        return self.before(self.size)


@dataclass(frozen=True, slots=True)
class _Compared:
    """A unit that is compared.

    Attributes:
        unit: what it is.
        number: among all.
        sample: of its elements.
        first: how many elements of earlier ones are looked at.
        scale: what an element that is looked at stands for.
        based: whether the base has it.
    """

    unit: Unit
    number: int
    sample: _Sample
    first: int
    scale: float
    based: bool


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbours among the elements of a window that are looked at."""

    matrix: _Compared
    group: int
    count: int


class Comparison:
    """Sums of products of checkpoints, to which workers add from any thread.

    Args:
        checkpoints: the numbers of those that are compared.
        units: what they are compared by; of these, tensors of two or more dimensions count.
        base: the number of a checkpoint whose differences to the others are compared as well.
    """

    def __init__(
        self, checkpoints: Sequence[int], units: Iterable[Unit], base: int | None = None
    ) -> None:
        count = len(checkpoints)
        found = [unit for unit in units if count > 1 and _compares(unit, set(checkpoints))]
        samples = _samples([len(unit) for unit in found], count)
        self._matrices: dict[int, _Compared] = {}
        first = 0
        for number, (unit, sample) in enumerate(zip(found, samples, strict=True)):
            based = base in {source.checkpoint for source in unit.sources}
            elements = sample.elements
            scale = len(unit) / elements
            self._matrices[id(unit)] = _Compared(unit, number, sample, first, scale, based)
            first += elements
        self._checkpoints = {checkpoint: row for row, checkpoint in enumerate(checkpoints)}
        self._base = base
        self._stretch = max(first // _STRETCHES, 1)
        # Of the checkpoints themselves, and of their differences to the base.
        kinds = 1 if base is None else 2
        self._grams = [Buffer(8 * _GROUPS * count * count) for _ in range(kinds)]
        self._sums = [Buffer(16 * len(found) * count) for _ in range(kinds)]
        self._lock = threading.Lock()

    @property
    def height(self) -> int:
        """How many rows are compared: those of the checkpoints, and of the base behind them."""
        return len(self._checkpoints) + (self._base is not None)

    def beside(self, unit: Unit) -> frozenset[int]:
        """The numbers of the sources of a unit that are compared and perhaps not averaged."""
        sources = enumerate(unit.sources) if self._base is not None else ()
        return frozenset(k for k, source in sources if source.checkpoint == self._base)

    def segments(self, window: Window) -> list[int]:
        """Where elements of a window are looked at, and how many from there on, by turns."""
        segments: list[int] = []
        at = 0
        for piece in window:
            matrix = self._matrices.get(id(piece.unit))
            if matrix is not None:
                for begin, count in matrix.sample.segments(piece.start, piece.stop):
                    segments += at + begin, count
            at += piece.stop - piece.start
        return segments

    def rows(self, unit: Unit) -> tuple[dict[int, int], dict[int, int]]:
        """By the numbers of a unit's sources, the rows of checkpoints; and that of the base."""
        last = len(self._checkpoints)
        sources = list(enumerate(unit.sources))
        rows = {
            k: self._checkpoints[source.checkpoint]
            for k, source in sources
            if source.checkpoint in self._checkpoints
        }
        base = {k: last for k, source in sources if source.checkpoint == self._base}
        return rows, base

    def multiply(self, rows: Matrix, runs: Sequence[Run], *, based: bool) -> None:
        """Adds the products of some columns, and of their differences to the base.

        Args:
            rows: of float64, which are changed.
            runs: what the columns are of, one after the other.
            based: whether the row of the base is theirs.
        """
        count = len(self._checkpoints)
        columns = (
            [run.count for run in runs],
            [run.group for run in runs],
            [run.matrix.number for run in runs],
            [run.matrix.scale for run in runs],
        )
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
                lines = sums.rows(len(self._matrices), 2 * count, _WIDE).tensor()
                products.multiply(wide, columns, gram.view(_GROUPS, count, count), lines)

    def runs(self, window: Window) -> Iterator[Run]:
        """What is looked at of a window, cut where tensors end and where groups do."""
        for piece in window:
            matrix = self._matrices.get(id(piece.unit))
            if matrix is None:
                continue
            width = 2 if piece.unit.dtype.kind == "complex" else 1
            at = matrix.first + matrix.sample.before(piece.start)
            end = matrix.first + matrix.sample.before(piece.stop)
            while at < end:
                stretch = at // self._stretch
                stop = min((stretch + 1) * self._stretch, end)
                yield Run(matrix, stretch % _GROUPS, (stop - at) * width)
                at = stop

    def result(self) -> Agreement | None:
        """The agreement; None where there is nothing to compare."""
        return self._agreement(0, list(self._matrices.values()))

    def centred(self) -> Agreement | None:
        """The agreement of the differences to the base; None where there is nothing to compare."""
        if self._base is None:
            return None
        return self._agreement(1, [one for one in self._matrices.values() if one.based])

    def _agreement(self, kind: int, matrices: Sequence[_Compared]) -> Agreement | None:
        count = len(self._checkpoints)
        if not matrices:
            return None
        cells, size = _doubles(self._grams[kind]), count * count
        grams = [cells[at : at + size].tolist() for at in range(0, _GROUPS * size, size)]
        whole = sum(len(one.unit) for one in matrices)
        elements = sum(one.sample.elements for one in matrices)
        return agreement(grams, self._tensors(kind, matrices), whole, elements)

    def _tensors(self, kind: int, matrices: Sequence[_Compared]) -> Iterator[Products]:
        count = len(self._checkpoints)
        sums = _doubles(self._sums[kind])
        for one in matrices:
            line = sums[2 * count * one.number : 2 * count * (one.number + 1)]
            name = next(str(name) for name, info in one.unit.members if is_matrix(info))
            elements = one.sample.elements
            yield Products(name, one.sample.size, elements, line[:count], line[count:])


class Sampler:
    """What one worker sets aside of windows, until much of it can be multiplied at a time.

    For each window: `begin`, `take` of all its rows, `end`.

    Args:
        comparison: where products are added.
        load_torch: imports torch; only then it is used.
    """

    def __init__(self, comparison: Comparison, load_torch: Callable[[], None]) -> None:
        self._comparison = comparison
        self._load_torch = load_torch
        self._width = max(COMPARED // max(comparison.height, 1), 1)
        self._room = Buffer(8 * self._width * comparison.height)
        self._used = 0
        self._columns = 0
        self._held: list[Run] = []
        self._based = False
        self._runs: list[Run] = []
        self._segments = int64s([])
        self._rows: tuple[dict[int, int], dict[int, int]] = {}, {}

    def begin(self, window: Window) -> None:
        """Makes room for what is looked at of a window."""
        self._segments = int64s(self._comparison.segments(window))
        if not self._segments:
            return
        self._runs = list(self._comparison.runs(window))
        self._rows = self._comparison.rows(window[0].unit)
        self._columns, based = sum(run.count for run in self._runs), bool(self._rows[1])
        if self._used + self._columns > self._width or based != self._based:
            self.flush()
            self._based = based
        if self._columns > self._width:
            self._width = self._columns
            self._room = Buffer(8 * self._width * self._comparison.height)

    def take(self, group: Sequence[int], stack: Stack) -> None:
        """Sets aside elements of some of the window's sources, of which there is a row each."""
        for rows in self._rows if self._segments else ():
            targets = [rows.get(k, -1) for k in group]
            if max(targets) < 0:
                continue
            if LOOPS is not None and isinstance(stack, Matrix) and takes(stack.dtype.name):
                at = self._room.address + 8 * self._used
                LOOPS.take(stack, self._segments, int64s(targets), at, self._width)
                continue
            self._load_torch()
            from merge_avg.agreement import _torch_products as products

            values = stack.tensor() if isinstance(stack, Matrix) else stack
            room = self._room.rows(self._comparison.height, self._width, _WIDE)
            place = room.part(self._used, self._used + self._columns).tensor()
            products.take(values, list(self._segments), targets, place)

    def end(self) -> None:
        """Ends a window."""
        if self._segments:
            self._held += self._runs
            self._used += self._columns

    def flush(self) -> None:
        """Multiplies what is set aside."""
        if self._held:
            if LOOPS is None:
                self._load_torch()
            rows = self._room.rows(self._comparison.height, self._width, _WIDE)
            used = rows.part(0, self._used)
            self._comparison.multiply(used, self._held, based=self._based)
        self._held, self._used = [], 0


def _doubles(buffer: Buffer) -> memoryview[float]:
    """Memory as float64."""
    return buffer.bytes(len(buffer) // 8 * 8).cast("d")


def _samples(sizes: Sequence[int], count: int) -> Iterator[_Sample]:
    """What is looked at of tensors of some sizes, for so many checkpoints."""
    total = max(sum(sizes), 1)
    taken = min(max(_BLOCK * WHOLE // (total * max(count, 1)), _TAKEN), _BLOCK)
    every = min(max(total * max(count, _MANY) // (_MANY * _LARGE), 1), _MOST_EVERY)
    left = WHOLE // max(count, 1)
    whole = set()
    for number in sorted(range(len(sizes)), key=sizes.__getitem__):
        left -= sizes[number]
        if left < 0:
            break
        whole.add(number)
    for number, size in enumerate(sizes):
        yield _Sample(size) if number in whole else _Sample(size, taken, every)


def _compares(unit: Unit, checkpoints: set[int]) -> bool:
    """Whether a unit is of a matrix that all checkpoints have."""
    return unit.is_matrix and checkpoints <= {source.checkpoint for source in unit.sources}
