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
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from merge_avg.agreement._cosines import (
    FEW,
    Agreement,
    TensorAgreement,
    agreement,
    agreement_about,
    same,
)
from merge_avg.arithmetic import LOOPS, int64s
from merge_avg.arithmetic.tuning import COMPARED, WHOLE
from merge_avg.checkpoint import BY_NAME, Composite, is_matrix
from merge_avg.io import Buffer, Matrix
from merge_avg.plan import Piece, Unit, Window

# The rule of thumb: about one element in 128, which costs next to nothing beside the reading. The
# first 64 of every 8192 are taken, and not every 128th: 64 neighbours lie in a few cache lines, and
# 64 that lie apart in 64.
_BLOCK = 8192
_TAKEN = _BLOCK // 128
# A model of 2^24 elements already gives 131,072 of them, by which a cosine is known to 0.003. From
# there on whole spans of blocks are left out, so that products do not grow with the model; but not
# more than 63 of 64, or parts of a model would have no say.
_SPAN = 16 * _BLOCK
_LARGE = 1 << 24
_MOST_EVERY = 64
_MANY = 16  # checkpoints, from which products (of all pairs) cost more than what is read
# The error is estimated by leaving out one of these groups at a time. With 16, the estimate is
# itself off by about a fifth (the standard deviation of a chi with 15 degrees of freedom).
_GROUPS = 16
# Each group is made of 16 short stretches from all over the model: layers differ, and groups of
# whole layers would measure that instead of the sampling.
_STRETCHES = 16 * _GROUPS
_WIDE = BY_NAME["float64"]
_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True, slots=True)
class Sample:
    """Which elements of a tensor are looked at, whatever the windows, the threads, the memory."""

    size: int
    taken: int = _BLOCK  # of each block, from its start; of a shorter last block as large a part
    every: int = 1  # the blocks of every span, of every second one from the first, ...

    def before(self, place: int) -> int:
        """Return how many of the elements before a place are looked at."""
        if self.taken == _BLOCK:  # it is looked at whole
            return place
        if self.size < _BLOCK:  # of which a model may have thousands
            return min(place, self._taken_of_last)
        last = self.size // _BLOCK * _BLOCK
        inside = min(min(place, last) % (self.every * _SPAN), _SPAN)
        count = min(place, last) // (self.every * _SPAN) * (_SPAN // _BLOCK * self.taken)
        count += inside // _BLOCK * self.taken + min(inside % _BLOCK, self.taken)
        if place > last and last // _SPAN % self.every == 0:
            count += min(place - last, self._taken_of_last)
        return count

    def segments(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Yield where elements from `start` to `stop` are looked at, from `start`, and how many."""
        if self.taken == _BLOCK:
            yield 0, stop - start
            return
        last = self.size // _BLOCK * _BLOCK
        first, period = start // _BLOCK * _BLOCK, self.every * _SPAN
        for span in range(start // period * period, stop, period):
            for block in range(max(span, first), min(span + _SPAN, stop), _BLOCK):
                taken = self.taken if block < last else self._taken_of_last
                begin, end = max(start, block), min(stop, block + taken)
                if begin < end:
                    yield begin - start, end - begin

    @property
    def _taken_of_last(self) -> int:
        # Rounded up: of the smallest tensor one element is looked at.
        return -(-(self.size % _BLOCK) * self.taken // _BLOCK)

    @property
    def elements(self) -> int:
        """Return how many elements are looked at."""
        return self.before(self.size)


def samples(sizes: Sequence[int], checkpoints: int) -> list[Sample | None]:
    """Return the sample of each tensor of a model, by their sizes; None for those left out."""
    total, checkpoints = max(sum(sizes), 1), max(checkpoints, 1)
    # Of small models more is looked at, up to all: WHOLE numbers of all checkpoints cost nothing.
    taken = min(max(_BLOCK * WHOLE // (total * checkpoints), _TAKEN), _BLOCK)
    every = min(max(total * max(checkpoints, _MANY) // (_MANY * _LARGE), 1), _MOST_EVERY)
    found = [Sample(size, taken, every) for size in sizes]
    # As many numbers again are spent on the smallest tensors, which are looked at whole: a part of
    # a few hundred elements says nothing about the tensor that they are of.
    budget = left = WHOLE // checkpoints
    # Of equally small ones, some from all over the model: the fractions of multiples of the golden
    # ratio are spread evenly.
    for number in sorted(range(len(sizes)), key=lambda k: (sizes[k], k * _GOLDEN % 1)):
        if sizes[number] > left:
            break
        left -= sizes[number]
        found[number] = Sample(sizes[number])
    # Once many are looked at whole, a few elements of each of thousands more tell nothing new.
    many = left < budget // 2
    return [None if many and one.elements < min(one.size, FEW) else one for one in found]


@dataclass(frozen=True, slots=True)
class _Compared:
    """A unit that is compared, and which of its elements are looked at."""

    unit: Unit
    line: int  # its number among those that are compared
    sample: Sample
    elements: int  # how many are looked at
    first: int  # how many elements of earlier ones are looked at
    scale: float  # how many elements one that is looked at stands for


class Run(NamedTuple):
    """Neighbours of one tensor and one group among the elements of a window that are looked at."""

    length: int
    group: int
    line: int
    scale: float


# By the number of a group, and of a compared tensor, what was added for it.
Products = tuple[dict[int, list[float]], dict[int, list[float]]]


class Comparison:
    """Sums of products of checkpoints, to which workers add from any thread.

    Of the units of a plan, those of tensors of two or more dimensions count. With a `base`, the
    number of a checkpoint, the differences of the others to it are compared as well. Composites are
    compared whole, by what they stand for.
    """

    def __init__(
        self,
        checkpoints: Sequence[int],
        units: Sequence[Unit],
        base: int | None = None,
        composites: Sequence[Composite] = (),
    ) -> None:
        self._count = count = len(checkpoints)
        self._base = base
        self.height = count + (base is not None)  # how many rows are compared: the base's are last
        self._rows = {checkpoint: [row] for row, checkpoint in enumerate(checkpoints)}
        if base is not None:
            self._rows.setdefault(base, []).append(count)
        everyone = set(checkpoints)
        matrices = [unit for unit in units if count > 1 and unit.is_matrix]
        found = [unit for unit in matrices if everyone.issubset(unit.checkpoints)]
        self._compared: dict[int, _Compared] = {}  # by the unit's number
        first = 0
        for unit, sample in zip(found, samples([len(unit) for unit in found], count), strict=True):
            if sample is None:
                continue
            elements = sample.elements
            what = unit, len(self._compared), sample, elements, first, len(unit) / elements
            self._compared[unit.number] = _Compared(*what)
            first += elements
        self.empty = not found  # there is nothing to compare in windows
        self.checkpoints = tuple(checkpoints) if count > 1 else ()
        whole = composites if count > 1 else ()
        self._composites = dict(enumerate(whole, len(self._compared)))  # by their lines
        self._stretch = max(first // _STRETCHES, 1)
        # Of the checkpoints themselves, and of their differences to the base.
        kinds = 1 if base is None else 2
        self._grams = [Buffer(8 * _GROUPS * count * count) for _ in range(kinds)]
        self._lines = len(self._compared) + len(self._composites)
        self._sums = [Buffer(16 * self._lines * count) for _ in range(kinds)]
        self._lock = threading.Lock()

    def beside(self, unit: Unit) -> frozenset[int]:
        """Return the sources of a unit that are compared, and perhaps not averaged."""
        return frozenset(k for k, one in enumerate(unit.sources) if one.checkpoint == self._base)

    def rows(self, unit: Unit) -> Mapping[int, Sequence[int]]:
        """Return the rows of each source of a unit, by its number; an averaged base has two."""
        sources = enumerate(unit.sources)
        return {k: self._rows[one.checkpoint] for k, one in sources if one.checkpoint in self._rows}

    def select(self, window: Window) -> tuple[list[int], list[Run]]:
        """Return where a window is looked at and how many elements, by turns; and these as runs."""
        segments: list[int] = []
        runs: list[Run] = []
        at = 0
        for piece in window:
            one = self._compared.get(piece.unit.number)
            if one is not None:
                for begin, count in one.sample.segments(piece.start, piece.stop):
                    segments += at + begin, count
                runs += self._runs(one, piece)
            at += piece.stop - piece.start
        return segments, runs

    def _runs(self, one: _Compared, piece: Piece) -> Iterator[Run]:
        width = 2 if piece.unit.dtype.kind == "complex" else 1  # how many real numbers it is
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
        count = self._count
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
                else:
                    wide = products.learned(wide)
                gram = grams.rows(_GROUPS * count, count, _WIDE).tensor()
                table = sums.rows(self._lines, 2 * count, _WIDE).tensor()
                products.multiply(wide, columns, gram.view(_GROUPS, count, count), table)

    def add(self, number: int, gram: Sequence[Sequence[float]]) -> None:
        """Add the products of composite `number` of the plan, of all pairs of checkpoints."""
        count, line = self._count, len(self._compared) + number
        with self._lock:
            (grams, size), (sums, length) = self._tables(0)
            for row, products in enumerate(gram):
                for column, product in enumerate(products):
                    grams[line % _GROUPS * size + row * count + column] += product
                sums[line * length + row] += products[row]
                sums[line * length + count + row] += math.fsum(products)

    def take(self) -> list[Products]:
        """Return the sums so far, to be `put` into another comparison, and begin anew."""
        taken: list[Products] = []
        for kind in range(len(self._grams)):
            found: list[dict[int, list[float]]] = []
            for cells, length in self._tables(kind):
                # What nothing was added to is left out: most of it, in a part of a large model.
                rows = (cells[at : at + length] for at in range(0, len(cells), length))
                found.append({n: [*row] for n, row in enumerate(rows) if any(row)})
                nothing = memoryview(bytes(8 * length)).cast("d")
                for number in found[-1]:
                    cells[number * length : (number + 1) * length] = nothing
            taken.append((found[0], found[1]))
        return taken

    def put(self, products: Sequence[Products]) -> None:
        """Add sums of the same plan; ValueError where they cannot be of it."""
        for kind, found in zip(range(len(self._grams)), products, strict=True):
            for (cells, length), rows in zip(self._tables(kind), found, strict=True):
                for number, row in rows.items():
                    if len(row) != length or not 0 <= number < len(cells) // length:
                        raise ValueError("products of other checkpoints")
                    for place, value in enumerate(row, number * length):
                        cells[place] += value

    def _tables(self, kind: int) -> list[tuple[memoryview[float], int]]:
        """Return the numbers of the Gram matrices and of the sums, and how many make a row."""
        count = self._count
        tables = (
            (self._grams[kind], _GROUPS, count**2),
            (self._sums[kind], self._lines, 2 * count),
        )
        return [
            (buffer.bytes(8 * rows * length).cast("d"), max(length, 1))
            for buffer, rows, length in tables
        ]

    def result(self) -> Agreement | None:
        """Return the agreement; None where there is nothing to compare."""
        return self._agreement(0)

    def centred(self) -> Agreement | None:
        """Return the agreement of the differences to the base, in the same way."""
        return self._agreement(1)

    def _agreement(self, kind: int) -> Agreement | None:
        compared = [one for one in self._compared.values() if not kind or self.beside(one.unit)]
        composites = () if kind else self._composites.values()
        if not compared and not composites:
            return None
        size = self._count**2
        cells = self._grams[kind].bytes(8 * _GROUPS * size).cast("d")
        grams = [cells[at : at + size] for at in range(0, _GROUPS * size, size)]
        numel = sum(math.prod(one.shape) for one in composites)
        whole = sum(len(one.unit) for one in compared) + numel
        elements = sum(one.elements for one in compared) + numel
        tensors = self._tensors(kind, compared)
        if not kind and not any(map(any, grams)):
            return same(self._count, tensors, whole, elements)
        return agreement(grams, tensors, whole, elements)

    def _tensors(self, kind: int, compared: Sequence[_Compared]) -> Iterator[TensorAgreement]:
        count = self._count
        sums = self._sums[kind].bytes(16 * self._lines * count).cast("d")
        for one in compared:
            name, info = next(pair for pair in one.unit.members if is_matrix(pair[1].shape))
            at = 2 * count * one.line
            line = sums[at : at + 2 * count].tolist()
            about = str(name), info.shape, len(one.unit), one.elements
            yield agreement_about(*about, line[:count], line[count:])
        for number, composite in () if kind else self._composites.items():
            line = sums[2 * count * number : 2 * count * (number + 1)].tolist()
            size = math.prod(composite.shape)
            about = composite.name, composite.shape, size, size
            yield agreement_about(*about, line[:count], line[count:])


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
        self._unit = unit = window[0].unit
        segments, runs = self._comparison.select(window)
        self._rows = self._comparison.rows(unit) if segments else {}
        if not segments:
            return
        self._segments = int64s(segments)
        columns = sum(run.length for run in runs)
        based = bool(self._comparison.beside(unit))
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
        if self._unit is None or k not in self._rows:
            return
        rows, dtype = self._rows[k], self._unit.sources[k].dtype
        address = ctypes.addressof(ctypes.c_char.from_buffer(data))
        numel = len(data) // dtype.itemsize
        row = Matrix(address, dtype, 1, numel, numel, data)
        if LOOPS is not None and dtype.name in LOOPS.dtypes:
            for target in rows:
                at = self._room.address + 8 * (target * self._width + self._at)
                LOOPS.take(row, self._segments, at)
            return
        self._load_torch()
        from merge_avg.agreement import _torch_products as products

        room = self._room.rows(self._comparison.height, self._width, _WIDE)
        room.part(self._at, self._used).tensor()[rows] = products.take(row.tensor(), self._segments)

    def close(self) -> None:
        """Multiply what is set aside: after the last window, or to make room for the next."""
        if self._held:
            if LOOPS is None:
                self._load_torch()
            rows = self._room.rows(self._comparison.height, self._width, _WIDE)
            self._comparison.multiply(rows.part(0, self._used), self._held, based=self._based)
        self._held, self._used = [], 0
