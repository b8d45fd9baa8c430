"""Integers, which are not simply averaged, and tensors that are not finite, do not fit, or differ.

The fast paths only know that something in a window is wrong. Which tensor in which file is found by
reading the window once more, so that merges without trouble do not pay for it.
"""

from __future__ import annotations

import ctypes
import math
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from merge_avg.arithmetic import Weights, is_counter, settle, unequal, values_of
from merge_avg.checkpoint import Name, TensorInfo
from merge_avg.engine._reading import WindowReader, counted, length, part
from merge_avg.engine._workspace import Workspace
from merge_avg.errors import MergeError
from merge_avg.io import Buffer, Matrix, same
from merge_avg.plan import Piece, Unit, Window, spans, without

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# What has no mean, and how to have the values that it and others give instead of them.
_MASK = "is a mask of zeros and ones"
_UNIT = "is of unit length, as vectors of spectral norm and orthogonal bases are"
_FOLDED = {
    _MASK: "make the pruning permanent before saving (torch.nn.utils.prune.remove), or {}",
    _UNIT: "remove the parametrization before saving, or {}, "
    "and renew vectors of spectral norm by a forward pass in training mode",
}
_SETTLED = 1 << 16  # how many integers are held at a time as Python's, which are large
Places = Sequence[int] | ctypes.Array[ctypes.c_int64]  # of elements of a window, in order


class Diagnosis:
    """One worker's look at what is wrong with a window."""

    def __init__(self, space: Workspace, reader: WindowReader) -> None:
        self._options = space.job.options
        self._paths = [layout.path for layout in space.job.layouts]
        self._findings = space.findings
        self._load_torch = space.load_torch
        self._reader = reader

    def nonfinite(
        self, window: Window, sources: Sequence[int], out: Matrix
    ) -> Callable[[], None] | None:
        """Raise for a tensor that holds NaN or infinity, or note its name if that is allowed.

        What is the same in all sources, bit for bit, is copied, such as the -inf of causal masks:
        it is zero in `out` until the function that is returned is called.
        """
        self._load_torch()
        ours: Tensor | None = None
        for k in sources:
            self._reader.again(window, k)
            source = window[0].unit.sources[k]
            values = _real(self._reader.room().rows(1, length(window), source.dtype))
            bad = ~_finite(values)
            if self._options.allow_nonfinite:
                self._findings.nonfinite.update(str(name) for name, _ in self._reached(window, bad))
                continue
            theirs = _special(values, bad, _real(out).dtype)
            ours = theirs if ours is None else ours
            for number, special in ((sources[0], ours), (k, theirs)):
                for name, count in self._reached(window, (theirs != ours) & (special != 0)):
                    what = f"tensor {str(name)!r} holds NaN or infinity"
                    what += f" ({count:,} elements of a window)"
                    where = self._paths[window[0].unit.sources[number].checkpoint]
                    hint = "--allow-nonfinite averages it all the same"
                    raise MergeError(what, where=where, hint=hint, tensor=name)
        if ours is None:
            return None
        nan = ours.view(_real(out).dtype).isnan()  # which nobody means to have
        self._findings.nonfinite.update(str(name) for name, _ in self._reached(window, nan))
        words, places = _real(out).view(ours.dtype), ours.nonzero().flatten()
        bits = ours[places]
        words[places] = 0
        return partial(words.__setitem__, places, bits)

    def overflow(self, window: Window, result: Matrix) -> None:
        """Raise for a tensor whose mean does not fit its dtype."""
        self._load_torch()
        for name, _ in self._reached(window, ~_finite(_real(result))):
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

    def _reached(self, window: Window, bad: Tensor) -> Iterator[tuple[Name, int]]:
        """Yield the tensors of a window that reach chosen elements, and how many of them."""
        bad = bad.view(length(window), -1).any(dim=1)  # complex numbers have two flags each
        for piece, start, stop in spans(window):
            found = bad[start:stop].nonzero().flatten()
            # As it lies in memory: Python's own integers would take five times as much.
            places = (ctypes.c_int64 * len(found)).from_address(found.data_ptr())
            shift = piece.start + piece.unit.start
            for name, _, count in _touched(piece.unit, places, shift) if len(found) else ():
                yield name, count


def _real(row: Matrix) -> Tensor:
    import torch

    values = row.tensor()[0]
    return torch.view_as_real(values).flatten() if values.is_complex() else values


def _finite(values: Tensor) -> Tensor:
    return (values.float() if values.itemsize < 2 else values).isfinite()  # float8 has no isfinite


def _special(values: Tensor, bad: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the bits of what is not finite, in a dtype, and 0 elsewhere."""
    import torch

    words = (torch.uint8, torch.int16, torch.int32, torch.int64)[dtype.itemsize.bit_length() - 1]
    bits = values.to(dtype).view(words)
    if values.dtype != dtype:
        # Which NaN a conversion gives depends on how many numbers torch converts at a time.
        usual = torch.full((1,), math.nan, dtype=dtype).view(words)
        bits = bits.where(~values.isnan(), usual)
    return bits.where(bad, 0)


def refuse_derived(space: Workspace) -> None:
    """Raise MergeError for values that differ and that have no mean, as they follow from others."""
    space.load_torch()
    job, buffer = space.job, Buffer(_SETTLED * space.job.plan.itemsize)
    reader = WindowReader(space, (), lambda: buffer)
    found: dict[Name, str] = {}
    for unit in job.plan.units:
        for name, info in unit.members:
            if name in space.findings.varying and name in job.plan.derived:
                certain = job.plan.derived[name]
                kind = _UNIT if certain else _kind(unit, info, reader, job.averaged)
                found |= {name: kind} if kind else {}
    for name, kind in found.items():
        lasts = {other.key.rpartition(".")[2] for other in found if found[other] == kind}
        some = " ".join(f"--exclude '*{last}'" for last in sorted(lasts)[:4])
        what = f"tensor {str(name)!r} {kind}: it differs between the checkpoints, and has no mean"
        hint = _FOLDED[kind].format(f"keep the template's with {some}")
        raise MergeError(what, where=job.layouts[0].path, hint=hint, tensor=name)


def _kind(
    unit: Unit, info: TensorInfo, reader: WindowReader, averaged: Sequence[int]
) -> str | None:
    """Return what the values of a tensor are in all checkpoints, if one of `_FOLDED`."""
    kinds = {_MASK, _UNIT} if len(unit) == info.numel else set[str]()
    columns = 1 if info.numel == max(info.shape, default=1) else min(info.shape)
    for k in (k for k, source in enumerate(unit.sources) if source.checkpoint in averaged):
        squares, dtype = 0.0, unit.sources[k].dtype
        for start in range(0, len(unit), _SETTLED):
            if not kinds:
                return None
            stop = min(start + _SETTLED, len(unit))
            reader.again((Piece(unit, start, stop),), k)
            values = reader.room().rows(1, stop - start, dtype).tensor()[0].double()
            squares += float(values.square().sum())
            if not bool(((values == 0) | (values == 1)).all()):
                kinds.discard(_MASK)
            if squares > 2 * columns:
                kinds.discard(_UNIT)
        # Of orthonormal columns, each has the length 1. Narrow dtypes round that.
        if abs(squares / columns - 1) > (1e-4 if dtype.itemsize > 2 else 2e-2):
            kinds.discard(_UNIT)
    return min(kinds, default=None)


def _touched(unit: Unit, places: Places, shift: int) -> Iterator[tuple[Name, TensorInfo, int]]:
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
        found: list[tuple[Piece, int, int, array[int]]] = []
        for piece, start, stop in spans(window) if places else ():
            if some := places[bisect_left(places, start) : bisect_left(places, stop)]:
                shift = piece.unit.start + piece.start - start
                self._diagnosis.differing(window, piece, some, shift)
                found.append((piece, start, stop, some))
        for number in range(len(self._rows)):
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
