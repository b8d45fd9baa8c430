"""Integers, which are not simply averaged, and tensors that are not finite, do not fit, or differ.

The fast paths only know that something in a window is wrong. Which tensor in which file is found by
reading the window once more, so that merges without trouble do not pay for it.
"""

from __future__ import annotations

import ctypes
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import compress
from operator import mul

from merge_avg.arithmetic import LOOPS, Weights, int64s, is_counter, settle, unequal, values_of
from merge_avg.checkpoint import DType, Name, TensorInfo
from merge_avg.engine._reading import WindowReader, counted, part
from merge_avg.engine._workspace import Workspace
from merge_avg.errors import MergeError
from merge_avg.io import Buffer, Matrix, same
from merge_avg.plan import Piece, Unit, Window, spans, without

# The bits that are all set in what is not finite; infinity; and the usual NaN. The sign lies above.
_SPECIAL = {
    "float64": (0x7FF << 52, 0x7FF << 52, 0xFFF << 51),
    "float32": (0x7F800000, 0x7F800000, 0x7FC00000),
    "float16": (0x7C00, 0x7C00, 0x7E00),
    "bfloat16": (0x7F80, 0x7F80, 0x7FC0),
    "float8_e5m2": (0x7C, 0x7C, 0x7F),
    "float8_e4m3fn": (0x7F, 0x7E, 0x7F),  # without infinities: torch takes the largest number
    "float8_e4m3fnuz": (0x80, 0x80, 0x80),  # with one NaN, in the place of -0
    "float8_e5m2fnuz": (0x80, 0x80, 0x80),
}
_SPECIAL |= {"complex128": _SPECIAL["float64"], "complex64": _SPECIAL["float32"]}
_CODES = {1: "B", 2: "H", 4: "I", 8: "Q"}  # of words, in arrays
_integer = partial(int.from_bytes, byteorder="little")
_EMPTY = b"\xff" + bytes(255)  # for `translate`: a flag for each zero
# What has no mean, and how to have the values that it and others give instead of them.
_MASK = "is a mask of zeros and ones"
_UNIT = "is of unit length, as vectors of spectral norm and orthogonal bases are"
_FOLDED = {
    _MASK: "make the pruning permanent before saving (torch.nn.utils.prune.remove), or {}",
    _UNIT: "remove the parametrization before saving, or {}, "
    "and renew vectors of spectral norm by a forward pass in training mode",
}
_SETTLED = 1 << 16  # how many numbers are held at a time as Python's, which are large


class Diagnosis:
    """One worker's look at what is wrong with a window."""

    def __init__(self, space: Workspace, reader: WindowReader) -> None:
        self._options = space.job.options
        self._paths = [layout.path for layout in space.job.layouts]
        self._findings = space.findings
        self._reader = reader

    def nonfinite(
        self, window: Window, sources: Sequence[int], out: Matrix
    ) -> Callable[[], None] | None:
        """Raise for a tensor that holds NaN or infinity, or note its name if that is allowed.

        What is the same in all sources, bit for bit, is copied, such as the -inf of causal masks:
        it is zero in `out` until the function that is returned is called.
        """
        ours, size = b"", out.dtype.word
        for k in sources:
            data, dtype = bytes(self._reader.again(window, k)), window[0].unit.sources[k].dtype
            if self._options.allow_nonfinite:
                special = _special(data, dtype, dtype)
                self._note(window, _places(special, dtype.word))
                continue
            theirs = _special(data, dtype, out.dtype)
            ours = ours or theirs
            if theirs == ours:  # mostly those of causal masks
                continue
            pairs = zip(_words(ours, size), _words(theirs, size), strict=True)
            differ = [one != other for one, other in pairs]
            for number, special in ((sources[0], ours), (k, theirs)):
                places = [place for place in _places(special, size) if differ[place]]
                for name, count in self._reached(window, places):
                    what = f"tensor {str(name)!r} holds NaN or infinity"
                    what += f" ({count:,} element{'s' * (count > 1)} of those read at once)"
                    where = self._paths[window[0].unit.sources[number].checkpoint]
                    hint = "--allow-nonfinite averages it all the same"
                    raise MergeError(what, where=where, hint=hint, tensor=name)
        if not ours:
            return None
        words, infinity = _words(ours, size), _SPECIAL[out.dtype.name][1]
        nan = set(words) - {0, infinity, infinity | 1 << 8 * size - 1}  # which nobody means to have
        if nan:
            self._note(window, [place for place in _places(ours, size) if words[place] in nan])
        _bytes(out)[:] = _masked(_bytes(out), size, ours[size - 1 :: size].translate(_EMPTY))

        def write() -> None:
            both = _integer(_bytes(out)) | _integer(ours)
            _bytes(out)[:] = both.to_bytes(len(ours), "little")

        return write

    def overflow(self, window: Window, result: Matrix) -> None:
        """Raise for a tensor whose mean does not fit its dtype."""
        special = _special(bytes(_bytes(result)), result.dtype, result.dtype)
        for name, _ in self._reached(window, _places(special, result.dtype.word)):
            what = f"the mean of tensor {str(name)!r} does not fit {window[0].unit.dtype.name}"
            hint = "choose a wider --dtype, such as float32 or bfloat16"
            raise MergeError(what, where=self._paths[0], hint=hint, tensor=name)

    def differing(self, window: Window, piece: Piece, places: Sequence[int], shift: int) -> None:
        """Note which tensors differ in a piece of a window, or refuse them, as the policy says.

        `places` are elements of the window; adding `shift` gives elements of the unit's storage.
        """
        for name, info, _ in _touched(piece.unit, places, shift):
            # Counters of steps and batches always differ: a merge that refused them would be of
            # no use to anyone who trains with batch norm.
            counts = is_counter(name.key, info.numel, is_bool=info.dtype.kind == "bool")
            if self._options.int_policy == "error" and not counts:
                place = next(place for place in places if _covers(info, place + shift))
                one = part(window, place, place + 1)
                (_, ours), *others = (
                    (source.checkpoint, values_of(self._reader.again(one, k), info.dtype)[0])
                    for k, source in enumerate(piece.unit.sources)
                )
                where, theirs = next(pair for pair in others if pair[1] != ours)
                found = f"holds {theirs}, in {self._paths[0]} {ours}"
                what = f"the {info.dtype.name} tensor {str(name)!r} {found}"
                hint = "--int-policy template, max or mean says what integers become"
                hint += f"; {without(name)} keeps the template's"
                raise MergeError(what, where=self._paths[where], hint=hint, tensor=name)
            self._findings.differing.add(str(name))

    def _note(self, window: Window, places: Sequence[int]) -> None:
        self._findings.nonfinite.update(str(name) for name, _ in self._reached(window, places))

    def _reached(self, window: Window, places: Sequence[int]) -> Iterator[tuple[Name, int]]:
        """Yield the tensors of a window that reach chosen numbers, and how many elements."""
        if window[0].unit.dtype.kind == "complex":  # of two numbers each
            places = sorted({place // 2 for place in places})
        for piece, start, stop in spans(window):
            some = places[bisect_left(places, start) : bisect_left(places, stop)]
            shift = piece.unit.start + piece.start - start
            for name, _, count in _touched(piece.unit, some, shift) if some else ():
                yield name, count


def _special(data: bytes, dtype: DType, into: DType) -> bytes:
    """Return numbers in another dtype, with zeros in place of the finite ones."""
    # Without torch, which the merge may do without: all at a time, as the digits of integers.
    size, flags = dtype.word, -1
    full, infinity, _ = _SPECIAL[dtype.name]
    for at in range(max(size - 2, 0), size):
        bits = full >> 8 * at & 0xFF
        alone = size == 1 and bits == 0x80
        table = (byte == bits if alone else byte & bits == bits for byte in range(256))
        flags &= _integer(data[at::size].translate(bytes(0xFF * one for one in table)))
    special = _masked(data, size, flags.to_bytes(len(data) // size, "little"))
    if dtype == into:
        return special
    # Which NaN a conversion by torch gives depends on how many numbers it converts at a time.
    (_, theirs, nan), words, sign = _SPECIAL[into.name], _words(special, size), 1 << 8 * size - 1
    said = dict.fromkeys({*words}, nan) | {0: 0}
    if not infinity & sign:
        said |= {infinity: theirs, infinity | sign: theirs | 1 << 8 * into.word - 1}
    return array(_CODES[into.word], [said[word] for word in words]).tobytes()


def _bytes(row: Matrix) -> memoryview:
    nbytes = row.numel * row.dtype.itemsize
    return memoryview((ctypes.c_ubyte * nbytes).from_address(row.address)).cast("B")


def _words(data: bytes, size: int) -> Sequence[int]:
    return array(_CODES[size], data)


def _places(special: bytes, size: int) -> Sequence[int]:
    """Return which words are not zero: the last byte of what is not finite never is."""
    return array("q", compress(range(len(special) // size), special[size - 1 :: size]))


def _masked(data: bytes | memoryview, size: int, flags: bytes) -> bytes:
    """Return words with zeros in place of those whose flag, a byte, is zero and not 255."""
    data, kept, found = bytes(data), _integer(flags), bytearray(len(data))
    for at in range(size):
        found[at::size] = (_integer(data[at::size]) & kept).to_bytes(len(flags), "little")
    return bytes(found)


def refuse_derived(space: Workspace) -> None:
    """Raise MergeError for values that differ and that have no mean, as they follow from others."""
    job, buffer = space.job, Buffer(_SETTLED * space.job.plan.itemsize)
    reader = WindowReader(space, (), lambda: buffer)
    found: dict[Name, str] = {}
    for unit in job.plan.units:
        for name, info in unit.members:
            if name in space.findings.varying and name in job.plan.derived:
                certain = job.plan.derived[name]
                kind = _UNIT if certain else _kind(unit, info, reader, space)
                found |= {name: kind} if kind else {}
    for name, kind in found.items():
        lasts = {other.key.rpartition(".")[2] for other in found if found[other] == kind}
        some = " ".join(f"--exclude '*{last}'" for last in sorted(lasts)[:4])
        what = f"tensor {str(name)!r} {kind}: it differs between the checkpoints, and has no mean"
        hint = _FOLDED[kind].format(f"keep the template's with {some}")
        raise MergeError(what, where=job.layouts[0].path, hint=hint, tensor=name)


def _kind(unit: Unit, info: TensorInfo, reader: WindowReader, space: Workspace) -> str | None:
    """Return what the values of a tensor are in all checkpoints, if one of `_FOLDED`."""
    kinds = {_MASK, _UNIT} if len(unit) == info.numel else set[str]()
    columns = 1 if info.numel == max(info.shape, default=1) else min(info.shape)
    averaged = space.job.averaged
    for k in (k for k, source in enumerate(unit.sources) if source.checkpoint in averaged):
        squares, dtype = 0.0, unit.sources[k].dtype
        for start in range(0, len(unit), _SETTLED):
            if not kinds:
                return None
            stop = min(start + _SETTLED, len(unit))
            reader.again((Piece(unit, start, stop),), k)
            row = reader.room().rows(1, stop - start, dtype)
            if LOOPS is not None and dtype.name in LOOPS.dtypes:
                room = (ctypes.c_double * row.numel)()
                LOOPS.take(row, int64s([0, row.numel]), ctypes.addressof(room))
                values = room[:]
            else:
                space.load_torch()
                values = row.tensor()[0].double().tolist()
            squares += sum(map(mul, values, values))
            if not {0.0, 1.0}.issuperset(values):
                kinds.discard(_MASK)
            if squares > 2 * columns:
                kinds.discard(_UNIT)
        # Of orthonormal columns, each has the length 1. Narrow dtypes round that.
        if abs(squares / columns - 1) > (1e-4 if dtype.itemsize > 2 else 2e-2):
            kinds.discard(_UNIT)
    return min(kinds, default=None)


def _touched(
    unit: Unit, places: Sequence[int], shift: int
) -> Iterator[tuple[Name, TensorInfo, int]]:
    """Yield the tensors of a unit that reach some of its elements, and how many of them."""
    for name, info in unit.members:
        first, last = (bisect_left(places, at - shift) for at in (info.start, info.stop))
        count = last - first
        if not info.dense:
            count = sum(_covers(info, place + shift) for place in places[first:last])
        if count:
            yield name, info, count


def _covers(info: TensorInfo, element: int) -> bool:
    """Return whether a tensor reaches an element of its storage."""
    rest = element - info.start
    if rest < 0 or element >= info.stop:
        return False
    # Largest steps first, as in writing a number in digits. A step that no smaller ones can make
    # up for is taken as often as it fits.
    for extent, step in sorted(info.geometry, key=lambda pair: -pair[1]):
        if step:
            rest -= min(rest // step, extent - 1) * step
    return rest == 0


class Integers:
    """One worker's means of integers, which are made in `out`."""

    def __init__(
        self, space: Workspace, reader: WindowReader, diagnosis: Diagnosis, out: Buffer
    ) -> None:
        self._job = space.job
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
        found: list[tuple[Piece, int, int, array[int]]] = []
        for piece, start, stop in spans(window) if places else ():
            if some := places[bisect_left(places, start) : bisect_left(places, stop)]:
                shift = piece.unit.start + piece.start - start
                self._diagnosis.differing(window, piece, some, shift)
                found.append((piece, start, stop, some))
        for number in range(len(self._job.outputs)):
            for piece, start, stop, some in found if self._policy in ("max", "mean") else ():
                data = ours[start * size : stop * size]
                self._settle(number, piece, [place - start for place in some], data)
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
        row = self._job.weights(piece.unit)[number]
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
