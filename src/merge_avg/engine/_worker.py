"""The loop: for each window, for each checkpoint, read and update; then write."""

from __future__ import annotations

import ctypes
import functools
import mmap
import threading
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from xxhash import xxh3_128, xxh3_128_intdigest

from merge_avg.agreement import Comparison, Sampler
from merge_avg.arithmetic import (
    TILE,
    Mean,
    MeanFactory,
    Weights,
    is_counter,
    settle,
    unequal,
    values_of,
)
from merge_avg.checkpoint import Name, Storage, TensorInfo
from merge_avg.engine._device import make_lane, travel
from merge_avg.errors import MergeError
from merge_avg.io import Buffer, Matrix, Reader, Scratch, Sink, Tap, same
from merge_avg.plan import Job, Piece, Unit, Window

# Of each checkpoint the hashes of chunks are added, so that windows, and the order in which they
# are read, are of no matter. A chunk takes so many bytes in the template, as most windows do.
_CHUNK = 1 << 19
_SETTLED = 1 << 16  # how many integers are held at a time as Python's, which are large
KEPT = -1  # stands for the number of a checkpoint, where hashes are of what the template gives


@dataclass
class Findings:
    """What the workers of a merge report: bytes read, and tensors that a person should hear of."""

    progress: Callable[[int], None] | None = None
    nbytes: int = 0
    differing: set[str] = field(default_factory=set)
    nonfinite: set[str] = field(default_factory=set)
    factors_differ: bool = False
    hashes: Counter[int] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add_hashes(self, hashes: Mapping[int, int]) -> None:
        """Adds sums of the hashes of chunks, by the number of the checkpoint, or `KEPT`."""
        with self._lock:
            self.hashes.update(hashes)

    def count(self, nbytes: int) -> None:
        """Counts bytes that were read."""
        with self._lock:
            self.nbytes += nbytes
            if self.progress is not None:
                self.progress(nbytes)


@dataclass(frozen=True)
class Maps:
    """Mapped parts of the scratch file, by the identity of units.

    Attributes:
        results: the results that an output holds in other strides, by the average's number too.
        masks: a byte for each element of a unit with holes, 0 where no tensor reaches it.
    """

    results: Mapping[tuple[int, int], mmap.mmap]
    masks: Mapping[int, mmap.mmap]


@dataclass(frozen=True)
class _Recipe:
    """How a unit's windows are averaged; of each average, and of any, the sources that count.

    `converted`: some sources have another dtype than the result. `groups` are the numbers of
    sources that are read at a time, which have one dtype, and `taps` where each source is read
    from, if not from parts of a storage or the scratch file. `owners`: whose hashes a source counts
    for.
    """

    unit: Unit
    converted: bool
    counted: Sequence[Sequence[int]]
    averaged: frozenset[int]
    means: Sequence[Mean]
    groups: Sequence[Sequence[int]]
    taps: Sequence[Tap | None]
    owners: Sequence[Sequence[int]]


class Worker:
    """One thread's buffers, and what it does with a window.

    Args:
        job: the merge.
        readers: one an input.
        outs: one an average.
        scratch: where staged tensors lie, and results that go elsewhere in the end.
        maps: room in the scratch file for what some units need.
        findings: what is reported.
        comparison: how far the checkpoints agree.
        device: where sums are kept.
        load_torch: imports torch; only then it is used.
    """

    def __init__(
        self,
        job: Job,
        readers: Sequence[Reader],
        outs: Sequence[Sink],
        scratch: Scratch,
        maps: Maps,
        findings: Findings,
        comparison: Comparison,
        device: str,
        load_torch: Callable[[], None],
    ) -> None:
        self._job = job
        self._readers = readers
        self._outs = outs
        self._rows = [output.weights for output in job.outputs]
        self._scratch = scratch
        self._maps = maps
        self._findings = findings
        self._comparison = comparison
        self._sampler = Sampler(comparison, load_torch)
        self._device = device
        self._load_torch = load_torch
        self._targets = dict(zip(map(id, job.plan.units), job.layout.targets, strict=True))
        budget = job.budget
        self._room = budget.window * budget.rows * budget.itemsize
        self._lane = make_lane(self._room, device)
        self._out_buffer = Buffer(budget.window * budget.itemsize)
        self._peeked = Buffer(TILE * budget.itemsize)
        self._means: dict[object, Mean] = {}
        self._make_mean = MeanFactory(device, load_torch)
        self._factors: int | None = None
        self._last: _Recipe | None = None
        self._numbers = {id(unit): number for number, unit in enumerate(job.plan.units)}
        self._hashes: Counter[int] = Counter()
        self._begun: dict[int, xxh3_128] = {}  # hashes of chunks that the next windows complete
        self._hashing = job.options.hashes

    def fill(self, window: Window) -> None:
        """Averages a window over all checkpoints and writes the results."""
        unit = window[0].unit
        if unit.kind == "equal" or (unit.dtype == unit.sources[0].dtype and unit.kind == "keep"):
            results = self._agreed(window)
        else:
            results = self._averaged(window)
        data = self._out_buffer.bytes(_length(window) * unit.dtype.itemsize)
        for number in results:
            if self._maps.masks and any(id(piece.unit) in self._maps.masks for piece in window):
                self._restore(window, first=not number)
            at = 0
            for piece in window:
                nbytes = (piece.stop - piece.start) * unit.dtype.itemsize
                self._write(number, piece, data[at : at + nbytes])
                at += nbytes

    def copy(self, index: int, number: int, record: Storage) -> None:
        """Copies a record of the template that holds no weights into a file of each output.

        Args:
            index: of the record among all that are copied.
            number: of the file.
            record: where it lies in the template.
        """
        digest = xxh3_128(seed=seed(-1 - index, 0))
        for at in range(0, record.nbytes, self._room):
            part = self._lane.room(0).bytes(min(self._room, record.nbytes - at))
            self._readers[0].read(part, record, at)
            for out in self._outs:
                out.write(number, record.name, at, part)
            if self._hashing:
                digest.update(part)
            self._findings.count(len(part))
        self._hashes[KEPT] += digest.intdigest()

    def _restore(self, window: Window, *, first: bool) -> None:
        """Gives elements that belong to no tensor, but to what is kept, the template's values."""
        self._load_torch()
        from merge_avg.engine._restride import restore

        unit, size = window[0].unit, window[0].unit.sources[0].dtype.itemsize
        data = self._read(window, 0, again=True)
        out = self._out_buffer.rows(1, _length(window), unit.dtype).tensor()[0]
        theirs = self._lane.room(0).rows(1, _length(window), unit.sources[0].dtype).tensor()[0]
        at = 0
        for piece in window:
            span = slice(at, at + piece.stop - piece.start)
            at = span.stop
            mask = self._maps.masks.get(id(piece.unit))
            if mask is not None:
                if first and self._hashing:
                    self._hash((piece,), 0, data[span.start * size : span.stop * size], KEPT)
                restore(out[span], theirs[span], mask, piece.start)

    def _averaged(self, window: Window) -> Iterator[int]:
        """The number of each average whose part of a window lies in the output buffer."""
        unit = window[0].unit
        recipe = self._recipe(unit)
        self._read_all(window, recipe)
        allowed = self._job.options.allow_nonfinite
        out = self._out_buffer.rows(1, _length(window), unit.dtype)
        for number, (ours, mean) in enumerate(zip(recipe.counted, recipe.means, strict=True)):
            mean.result(out, functools.partial(self._peek, window, ours))
            grows = recipe.converted or self._rows[number].divisor is not None
            if unit.kind == "mean" and not mean.finite:
                self._report_nonfinite(window, ours)
            if grows and not allowed and not mean.fits:
                self._refuse_overflow(window, out)
            yield number

    def _recipe(self, unit: Unit) -> _Recipe:
        """The recipe of a unit: that of the last one, most often."""
        if self._last is None or self._last.unit is not unit:
            counted = [self._counted(unit, weights) for weights in self._rows]
            means = [self._mean_for(unit, number) for number in range(len(self._rows))]
            averaged = frozenset(k for ours in counted for k in ours)
            wanted = sorted(averaged | self._comparison.beside(unit))
            groups = tuple(_groups(unit, wanted, self._job.budget.rows))
            taps = [
                self._readers[source.checkpoint].tap(source.storage)
                if source.storage is not None and not (source.storage.parts or source.storage.tiles)
                else None
                for source in unit.sources
            ]
            converted = any(source.dtype != unit.dtype for source in unit.sources)
            owners = [_owners(unit, k) for k in range(len(unit.sources))]
            self._last = _Recipe(unit, converted, counted, averaged, means, groups, taps, owners)
        return self._last

    def _read_all(self, window: Window, recipe: _Recipe) -> None:
        """Reads each source that some average needs once, for all of them."""
        self._sampler.begin(window)
        self._factors = None
        fill = functools.partial(self._stacked, window, recipe)
        for group, stack in travel(self._lane, recipe.groups, fill):
            for mean, ours in zip(recipe.means, recipe.counted, strict=True):
                runs = list(_runs(group, ours))
                stays = len(recipe.means) == len(recipe.groups) == len(runs) == 1
                stays = stays and not recipe.converted
                for run in runs:
                    rows = stack.run(run) if isinstance(stack, Matrix) else stack[run]
                    mean.extend(rows, whole=stays)
            self._sampler.take(group, stack)
        self._sampler.end()

    def _peek(
        self, window: Window, counted: Sequence[int], number: int, start: int, stop: int
    ) -> Matrix:
        """Elements `start` to `stop` of a window once more, as a source has them."""
        k = counted[number]
        dtype = window[0].unit.sources[k].dtype
        # Rows that a mean was shown whole are still needed: the little that is asked for then lies
        # beside them. Only torch, which holds no rows, asks for more.
        buffer = self._peeked if stop - start <= TILE else self._lane.room(0)
        part = buffer.bytes((stop - start) * dtype.itemsize)
        self._fetch(_part(window, start, stop), k, part, again=True)
        return buffer.rows(1, stop - start, dtype)

    def _look_at_factors(self, window: Window, k: int, data: memoryview) -> None:
        """Whether what belongs to factors A of low-rank products is the same in all sources."""
        size = window[0].unit.sources[k].dtype.itemsize
        digest, found, at = xxh3_128(), False, 0
        for piece in window:
            end = at + (piece.stop - piece.start) * size
            if any(name in self._job.plan.factors for name, _ in piece.unit.members):
                digest.update(data[at:end])
                found = True
            at = end
        value = digest.intdigest()
        if found and self._factors not in (None, value):
            self._findings.factors_differ = True
        self._factors = value

    def _counted(self, unit: Unit, weights: Weights) -> Sequence[int]:
        """The numbers of a unit's sources that have a weight other than zero; of all, if none."""
        integers = weights.integers
        some = [k for k, source in enumerate(unit.sources) if integers[source.checkpoint]]
        return some or range(len(unit.sources))

    def _mean_for(self, unit: Unit, number: int) -> Mean:
        """A running mean for the checkpoints of a unit, with buffers that it used before."""
        row = self._rows[number]
        sources = [unit.sources[k] for k in self._counted(unit, row)]
        chosen = tuple(source.checkpoint for source in sources)
        dtypes = tuple(source.dtype.name for source in sources)
        key = number, chosen, unit.kind, unit.dtype.name, dtypes
        if key not in self._means:
            weights = row.subset(chosen)
            if unit.kind == "mean" and weights is None:
                names = str(unit.members[0][0])
                what = f"every checkpoint that has {names!r} has the weight zero"
                raise MergeError(what, where=self._job.layouts[0].path)
            if unit.kind == "keep" or weights is None:
                weights = Weights.uniform(len(chosen))
            self._means[key] = self._make_mean(weights, unit.dtype.name, dtypes)
        return self._means[key]

    def _agreed(self, window: Window) -> Iterator[int]:
        """The same for integers and bools, and for what is kept.

        They are the template's, where all checkpoints agree or the policy says so.
        """
        ours = self._read(window, 0, into=self._out_buffer)
        size = window[0].unit.dtype.itemsize
        places = unequal(self._pairs(window, ours), size)
        found: list[tuple[Piece, slice, array[int]]] = []
        at = 0
        for piece in window if places else ():
            span = slice(at, at + piece.stop - piece.start)
            at = span.stop
            some = places[bisect_left(places, span.start) : bisect_left(places, span.stop)]
            if some:
                self._note(window, piece, some, piece.unit.start + piece.start - span.start)
                found.append((piece, span, some))
        for number in range(len(self._rows)):
            if self._job.options.int_policy in ("max", "mean"):
                for piece, span, some in found:
                    data = ours[span.start * size : span.stop * size]
                    self._settle(number, piece, [place - span.start for place in some], data)
            yield number

    def _pairs(self, window: Window, ours: memoryview) -> Iterator[tuple[memoryview, memoryview]]:
        """A window of the template, with each other source's that is not the same."""
        for k in range(1, len(window[0].unit.sources)):
            theirs = self._read(window, k)
            if not same(self._out_buffer, self._lane.room(0), len(ours)):
                yield ours, theirs

    def _note(self, window: Window, piece: Piece, places: Sequence[int], shift: int) -> None:
        """Notes which tensors differ, or refuses them, as the policy says."""
        for name, info, _ in self._touched(piece.unit, places, shift):
            is_bool = info.dtype.kind == "bool"
            counts = is_counter(name.key, len(info.shape), is_bool=is_bool)
            if self._job.options.int_policy == "error" and not counts:
                place = next(place for place in places if covers(info, place + shift))
                raise self._unequal(window, place, name, info)
            self._findings.differing.add(str(name))

    def _settle(self, number: int, piece: Piece, places: Sequence[int], data: memoryview) -> None:
        """Gives elements that differ the values that the policy makes of them for an average."""
        dtype = piece.unit.members[0][1].dtype
        ours = values_of(data, dtype)
        row = self._rows[number]
        counted = self._counted(piece.unit, row)
        chosen = [piece.unit.sources[k].checkpoint for k in counted]
        weights = row.subset(chosen) or Weights.uniform(len(counted))
        policy = self._job.options.int_policy
        most = max(_SETTLED // len(counted), 1)
        for start in range(0, len(places), most):
            some = places[start : start + most]
            columns = []
            for k in counted:
                theirs = values_of(self._read((piece,), k, again=True), dtype)
                columns.append([theirs[place] for place in some])
            for place, *values in zip(some, *columns, strict=True):
                ours[place] = settle(values, policy, weights)

    def _unequal(self, window: Window, place: int, name: Name, info: TensorInfo) -> MergeError:
        values = []
        for k, source in enumerate(window[0].unit.sources):
            data = self._read(_part(window, place, place + 1), k, again=True)
            values.append((source.checkpoint, values_of(data, info.dtype)[0]))
        ours = values[0][1]
        where, theirs = next((c, v) for c, v in values if v != ours)
        paths = [layout.path for layout in self._job.layouts]
        what = f"the {info.dtype.name} tensor {str(name)!r} holds {theirs}, in {paths[0]} {ours}"
        hint = "--int-policy template, max or mean says what integers become"
        return MergeError(what, where=paths[where], hint=hint)

    def close(self) -> None:
        """Compares the rest, and gives the device's memory back."""
        self._findings.add_hashes(self._hashes)
        self._sampler.flush()
        self._lane.close()

    def _stacked(
        self, window: Window, recipe: _Recipe, group: Sequence[int], room: Buffer
    ) -> Matrix:
        """The window's elements as some sources of one dtype have them, a row each, in `room`."""
        numel = _length(window)
        sources = recipe.unit.sources
        dtype = sources[group[0]].dtype
        size = numel * dtype.itemsize
        data = room.bytes(size * len(group))
        start = window[0].start * dtype.itemsize if len(window) == 1 else None
        first = self._chunk(window) if self._hashing else None
        for row, k in enumerate(group):
            part = data[row * size : (row + 1) * size]
            tap = recipe.taps[k]
            if start is not None and tap is not None:  # most windows
                tap.read(part, sources[k].offset + start)
            else:
                self._fetch(window, k, part)
            if first is not None:
                value = xxh3_128_intdigest(part, first)
                for owner in recipe.owners[k]:
                    self._hashes[owner] += value
            elif self._hashing:
                self._hash(window, k, part, *recipe.owners[k])
            if self._job.plan.factors and k in recipe.averaged:
                self._look_at_factors(window, k, part)
        self._findings.count(len(data))
        return room.rows(len(group), numel, dtype)

    def _read(
        self, window: Window, k: int, *, again: bool = False, into: Buffer | None = None
    ) -> memoryview:
        """The window's elements as source number k has them, in the lane's room."""
        buffer = into or self._lane.room(0)
        data = buffer.bytes(_length(window) * window[0].unit.sources[k].dtype.itemsize)
        self._fetch(window, k, data, again=again)
        if not again:
            self._findings.count(len(data))
            if self._hashing:
                self._hash(window, k, data, *_owners(window[0].unit, k))
        return data

    def _chunk(self, window: Window) -> int | None:
        """What the hash of a window begins with that is a whole chunk, as most are."""
        (unit, start, stop), *more = ((p.unit, p.start, p.stop) for p in window)
        size = chunk(unit)
        whole = start % size == 0 and stop == min(start + size, len(unit)) and not more
        return seed(self._numbers[id(unit)], start // size) if whole else None

    def _hash(self, window: Window, k: int, data: memoryview, *owners: int) -> None:
        """Adds the hashes of the chunks of a window, as a source has them, to those of owners."""
        at = 0
        owner = owners[0]
        for piece in window:
            unit, start = piece.unit, piece.start
            size, length = unit.sources[k].dtype.itemsize, chunk(unit)
            while start < piece.stop:
                stop = min(start - start % length + length, piece.stop)
                end = at + (stop - start) * size
                part = data if end - at == len(data) else data[at:end]
                begins, ends = start % length == 0, stop % length == 0 or stop == len(unit)
                first = seed(self._numbers[id(unit)], start // length)
                if begins and ends:
                    value = xxh3_128_intdigest(part, first)
                else:
                    digest = self._begun[owner] if not begins else xxh3_128(seed=first)
                    digest.update(part)
                    self._begun[owner] = digest
                    value = digest.intdigest() if ends else 0
                for one in owners if ends else ():
                    self._hashes[one] += value
                start, at = stop, end

    def _fetch(self, window: Window, k: int, view: memoryview, *, again: bool = False) -> None:
        """Fills `view` with the window's elements as source number k has them."""
        at = 0
        for piece in window:
            source = piece.unit.sources[k]
            size = source.dtype.itemsize
            nbytes = (piece.stop - piece.start) * size
            part = view if len(view) == nbytes else view[at : at + nbytes]
            offset = source.offset + piece.start * size
            if source.storage is None:
                self._scratch.read(part, offset)
            else:
                self._readers[source.checkpoint].read(part, source.storage, offset, again=again)
            at += nbytes

    def _write(self, number: int, piece: Piece, data: memoryview) -> None:
        size = piece.unit.dtype.itemsize
        mapped = self._maps.results.get((number, id(piece.unit)))
        if mapped is not None:
            mapped[piece.start * size : piece.stop * size] = data
        for target in self._targets[id(piece.unit)]:
            start, stop = max(piece.start, target.start), min(piece.stop, target.stop)
            if target.view is None and start < stop:
                part = data[(start - piece.start) * size : (stop - piece.start) * size]
                at = target.at + (start - target.start) * size
                self._outs[number].write(target.file, target.slot, at, part)

    def _report_nonfinite(self, window: Window, counted: Sequence[int]) -> None:
        """Raises for a tensor that holds NaN or infinity, or notes its name if that is allowed."""
        for k in counted:
            self._read(window, k, again=True)
            dtype = window[0].unit.sources[k].dtype
            values = self._lane.room(0).rows(1, _length(window), dtype)
            for name, count in self._bad_elements(window, values):
                if self._job.options.allow_nonfinite:
                    self._findings.nonfinite.add(str(name))
                    continue
                path = self._job.layouts[window[0].unit.sources[k].checkpoint].path
                some = f"{count:,} elements of a window"
                what = f"tensor {str(name)!r} holds NaN or infinity ({some})"
                hint = "--allow-nonfinite averages it all the same"
                raise MergeError(what, where=path, hint=hint)

    def _refuse_overflow(self, window: Window, out: Matrix) -> None:
        for name, _ in self._bad_elements(window, out):
            what = f"the mean of tensor {str(name)!r} does not fit {window[0].unit.dtype.name}"
            hint = "choose a wider --dtype, such as float32 or bfloat16"
            raise MergeError(what, where=self._job.layouts[0].path, hint=hint)

    def _bad_elements(self, window: Window, row: Matrix) -> Iterator[tuple[Name, int]]:
        """The tensors of a window that reach elements which are not finite, and how many."""
        self._load_torch()
        import torch

        values = row.tensor()[0]
        real = torch.view_as_real(values).flatten() if values.is_complex() else values
        real = real.float() if real.itemsize < 2 else real
        bad = ~real.isfinite()
        bad = bad.view(-1, 2).any(dim=1) if values.is_complex() else bad
        at = 0
        for piece in window:
            found = bad[at : at + piece.stop - piece.start].nonzero().flatten()
            at += piece.stop - piece.start
            places = (ctypes.c_int64 * len(found)).from_address(found.data_ptr())
            shift = piece.start + piece.unit.start
            for name, _, count in self._touched(piece.unit, places, shift) if len(found) else ():
                yield name, count

    def _touched(
        self, unit: Unit, places: Sequence[int] | ctypes.Array[ctypes.c_int64], shift: int
    ) -> Iterator[tuple[Name, TensorInfo, int]]:
        """The tensors that elements of a unit's storage belong to, in order, and how many do."""
        for name, info in unit.members:
            first, last = (bisect_left(places, at - shift) for at in (info.start, info.stop))
            count = last - first
            if not info.dense:
                count = sum(covers(info, place + shift) for place in places[first:last])
            if count:
                yield name, info, count


def chunk(unit: Unit) -> int:
    """How many elements of a unit are hashed at a time, from multiples of that on."""
    return _CHUNK // unit.sources[0].dtype.itemsize


def seed(unit: int, number: int) -> int:
    """What the hash of a chunk begins with: where it is, so that no two chunks can be swapped."""
    return (unit << 32 | number) & 0xFFFFFFFFFFFFFFFF


def _owners(unit: Unit, k: int) -> Sequence[int]:
    """Whose hash the elements of a source belong to."""
    checkpoint = unit.sources[k].checkpoint
    return (checkpoint, KEPT) if not checkpoint and unit.kind != "mean" else (checkpoint,)


def covers(info: TensorInfo, element: int) -> bool:
    """Whether a tensor reaches an element of its storage."""
    rest = element - info.start
    if rest < 0 or element >= info.stop:
        return False
    for extent, step in sorted(info.geometry, key=lambda pair: -pair[1]):
        if step:
            rest -= min(rest // step, extent - 1) * step
    return rest == 0


def _part(window: Window, start: int, stop: int) -> Window:
    """Elements `start` to `stop` of a window."""
    pieces = []
    at = 0
    for piece in window:
        end = at + piece.stop - piece.start
        if start < end and at < stop:
            first, last = piece.start + max(start - at, 0), piece.stop - max(end - stop, 0)
            pieces.append(Piece(piece.unit, first, last))
        at = end
    return tuple(pieces)


def _groups(unit: Unit, counted: Sequence[int], most: int) -> Iterator[Sequence[int]]:
    """Numbers of a unit's sources, cut where the dtype changes and into groups of `most`."""
    start = 0
    for k in range(1, len(counted) + 1):
        first = unit.sources[counted[start]].dtype
        ends = k == len(counted) or unit.sources[counted[k]].dtype != first
        if ends or k - start >= max(most, 1):
            yield counted[start:k]
            start = k


def _runs(group: Sequence[int], wanted: Sequence[int]) -> Iterator[slice]:
    """The rows of a group that are wanted, as runs of neighbours."""
    chosen = set(wanted)
    start = 0
    for row in range(len(group) + 1):
        if row == len(group) or group[row] not in chosen:
            if start < row:
                yield slice(start, row)
            start = row + 1


def _length(window: Window) -> int:
    return sum(piece.stop - piece.start for piece in window)
