"""Which tensor in which file is not finite, does not fit, or differs: named, or refused.

The fast paths only know that something in a window is wrong. What is wrong is found by reading the
window once more, so that merges without trouble do not pay for it.
"""

from __future__ import annotations

import ctypes
from bisect import bisect_left
from collections.abc import Iterator, Sequence

from merge_avg.arithmetic import is_counter, values_of
from merge_avg.checkpoint import Name, TensorInfo
from merge_avg.engine._reading import WindowReader, length, part
from merge_avg.engine._workspace import Workspace
from merge_avg.errors import MergeError
from merge_avg.io import Matrix
from merge_avg.plan import Piece, Unit, Window

Places = Sequence[int] | ctypes.Array[ctypes.c_int64]  # of elements of a window, in order


class Diagnosis:
    """One worker's look at what is wrong with a window.

    Args:
        space: the merge.
        reader: what windows are read by once more.
    """

    def __init__(self, space: Workspace, reader: WindowReader) -> None:
        self._options = space.job.options
        self._paths = [layout.path for layout in space.job.layouts]
        self._findings = space.findings
        self._load_torch = space.load_torch
        self._reader = reader

    def nonfinite(self, window: Window, sources: Sequence[int]) -> None:
        """Raise for a tensor that holds NaN or infinity, or note its name if that is allowed."""
        for k in sources:
            self._reader.again(window, k)
            source = window[0].unit.sources[k]
            values = self._reader.room().rows(1, length(window), source.dtype)
            for name, count in self._bad(window, values):
                if self._options.allow_nonfinite:
                    self._findings.nonfinite.add(str(name))
                    continue
                some = f"{count:,} elements of a window"
                what = f"tensor {str(name)!r} holds NaN or infinity ({some})"
                hint = "--allow-nonfinite averages it all the same"
                raise MergeError(what, where=self._paths[source.checkpoint], hint=hint)

    def overflow(self, window: Window, result: Matrix) -> None:
        """Raise for a tensor whose mean does not fit its dtype."""
        for name, _ in self._bad(window, result):
            what = f"the mean of tensor {str(name)!r} does not fit {window[0].unit.dtype.name}"
            hint = "choose a wider --dtype, such as float32 or bfloat16"
            raise MergeError(what, where=self._paths[0], hint=hint)

    def differing(self, window: Window, piece: Piece, places: Sequence[int], shift: int) -> None:
        """Note which tensors differ, or refuse them, as the policy says.

        Args:
            window: the window.
            piece: one of its pieces.
            places: the elements of the window that differ and lie in the piece.
            shift: what turns them into places in the unit's storage.
        """
        for name, info, _ in _touched(piece.unit, places, shift):
            is_bool = info.dtype.kind == "bool"
            # Counters of steps and batches always differ: a merge that refused them would be of
            # no use to anyone who trains with batch norm.
            counts = is_counter(name.key, len(info.shape), is_bool=is_bool)
            if self._options.int_policy == "error" and not counts:
                place = next(place for place in places if _covers(info, place + shift))
                raise self._unequal(window, place, name, info)
            self._findings.differing.add(str(name))

    def _unequal(self, window: Window, place: int, name: Name, info: TensorInfo) -> MergeError:
        values = []
        for k, source in enumerate(window[0].unit.sources):
            data = self._reader.again(part(window, place, place + 1), k)
            values.append((source.checkpoint, values_of(data, info.dtype)[0]))
        ours = values[0][1]
        where, theirs = next((c, v) for c, v in values if v != ours)
        found = f"holds {theirs}, in {self._paths[0]} {ours}"
        what = f"the {info.dtype.name} tensor {str(name)!r} {found}"
        hint = "--int-policy template, max or mean says what integers become"
        return MergeError(what, where=self._paths[where], hint=hint)

    def _bad(self, window: Window, row: Matrix) -> Iterator[tuple[Name, int]]:
        """Yield the tensors of a window that reach elements which are not finite, and how many."""
        self._load_torch()
        import torch

        values = row.tensor()[0]
        real = torch.view_as_real(values).flatten() if values.is_complex() else values
        real = real.float() if real.itemsize < 2 else real  # float8 has no isfinite
        bad = ~real.isfinite()
        bad = bad.view(-1, 2).any(dim=1) if values.is_complex() else bad
        at = 0
        for piece in window:
            found = bad[at : at + piece.stop - piece.start].nonzero().flatten()
            at += piece.stop - piece.start
            # As it lies in memory: Python's own integers would take five times as much.
            places = (ctypes.c_int64 * len(found)).from_address(found.data_ptr())
            shift = piece.start + piece.unit.start
            for name, _, count in _touched(piece.unit, places, shift) if len(found) else ():
                yield name, count


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
