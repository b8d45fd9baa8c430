"""Tensors in a geometry other than their file's: strided copies by way of the scratch file.

A checkpoint whose tensors lie otherwise than the template's (other strides, or apart where the
template's are tied) is restrided before the merge; a result that the output holds in other strides
than the template does is restrided after it. Both are mapped files, so that a tensor of any size
takes no memory of its own.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from merge_avg.checkpoint import Name, TensorInfo
from merge_avg.engine._workspace import Workspace
from merge_avg.errors import MergeError
from merge_avg.io import Buffer, Reader, Scratch
from merge_avg.plan import Restride, aligned_to_page

SLAB = 1 << 17  # elements that are copied at a time
# Elements are moved, not computed with: as integers, NaN keeps its bits.
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}


def restride(space: Workspace) -> None:
    """Copy tensors into the template's geometry, and map what units need beside their windows."""
    job, scratch = space.job, space.scratch
    for one in job.plan.restrides:
        reader = space.readers[one.checkpoint]
        restride_input(scratch, reader, one, job.layouts[one.tied_in].path)
    offset = job.plan.scratch
    for unit, targets in zip(job.plan.units, job.layout.targets, strict=True):
        if any(target.view is not None for target in targets):
            nbytes = len(unit) * unit.dtype.itemsize
            step = aligned_to_page(nbytes)
            places = range(offset, offset + len(space.sinks) * step, step)
            space.results[unit.number] = [scratch.map(place, nbytes) for place in places]
            offset = places.stop
        if unit.number in job.plan.holed:
            mask = space.masks[unit.number] = scratch.map(offset, len(unit))
            mask_members(mask, unit.members, unit.start)
            offset = aligned_to_page(offset + len(unit))


def restride_results(space: Workspace) -> None:
    """Copy results from the scratch file to where outputs have them contiguous."""
    buffer = Buffer(SLAB * space.job.plan.itemsize)
    for number, results in space.results.items():
        dtype = space.job.plan.units[number].dtype
        for target in space.job.layout.targets[number]:
            if target.view is None:
                continue
            for sink, mapped in zip(space.sinks, results, strict=True):
                flat, at = torch.frombuffer(mapped, dtype=torch.uint8), target.at
                view = strided(flat, replace(target.view, dtype=dtype), target.start)
                for slab in slabs(view, SLAB):
                    buffer.tensor(slab.numel(), slab.dtype).view(slab.shape).copy_(slab)
                    data = buffer.bytes(slab.numel() * slab.itemsize)
                    sink.write(target.file, target.slot, at, data)
                    at += len(data)


def restride_input(scratch: Scratch, reader: Reader, one: Restride, tied_in: Path) -> None:
    """Copy tensors of a checkpoint into another geometry; those that share elements must agree."""
    room = _mapped(scratch, one.offset, one.nbytes).zero_()
    # Behind it: which elements a tensor was copied to already, and the tensor's own bytes.
    behind = aligned_to_page(one.offset + one.nbytes)
    taken = _mapped(scratch, behind, one.nbytes).zero_()
    for name, info, view in one.pairs:
        copied = _copied(scratch, reader, info, behind + aligned_to_page(one.nbytes))
        source = strided(copied, info, 0)
        target = strided(room, view, view.start)
        marks = strided(taken, view, view.start)
        # Elements that the template has once and this checkpoint several times can have one mean
        # only if they are equal. It is the bits that count: NaN is equal to itself.
        agree = True
        for dim, step in enumerate(view.stride):
            if not step and view.shape[dim] > 1:  # the target repeats one element
                agree &= _all_equal(source, source.narrow(dim, 0, 1).expand_as(source))
                source, target, marks = (t.narrow(dim, 0, 1) for t in (source, target, marks))
        agree &= _all_equal(source, target, marks)
        if not agree:
            others = [str(other) for other, _, _ in one.pairs if other != name]
            what = f"tensor {str(name)!r} varies where it repeats one element in {tied_in}"
            if others:
                pair = f"{others[0]!r} and {str(name)!r}"
                what = f"tensors {pair} differ, but {tied_in} ties them"
            hint = "tie them in all checkpoints or in none, and save again"
            raise MergeError(what, where=reader.path, hint=hint, tensor=name)
        target.copy_(source)
        marks.fill_(1)


def _mapped(scratch: Scratch, offset: int, nbytes: int) -> Tensor:
    return torch.frombuffer(scratch.map(offset, nbytes), dtype=torch.uint8)


def _copied(scratch: Scratch, reader: Reader, info: TensorInfo, offset: int) -> Tensor:
    """Copy the bytes that a tensor spans in its file to an offset of the scratch file."""
    size = info.dtype.itemsize
    nbytes = (info.stop - info.start) * size
    room = _mapped(scratch, offset, nbytes)
    buffer = Buffer(SLAB)
    for start in range(0, nbytes, SLAB):
        count = min(SLAB, nbytes - start)
        reader.read(buffer.bytes(count), info.storage, info.start * size + start)
        room[start : start + count] = buffer.tensor(count, torch.uint8)
    return room


def mask_members(mask: mmap.mmap, members: Iterable[tuple[Name, TensorInfo]], start: int) -> None:
    """Set the bytes of the elements that tensors reach to 1, counted from element `start`."""
    flat = torch.frombuffer(mask, dtype=torch.uint8).zero_()
    for _, info in members:
        flat.as_strided(info.shape, info.stride, info.start - start).fill_(1)


def restore(out: Tensor, theirs: Tensor, mask: mmap.mmap, start: int) -> None:
    """Give elements that `mask` has a 0 for, from element `start` on, other values."""
    reached = torch.frombuffer(mask, dtype=torch.uint8)[start : start + len(out)] != 0
    out.copy_(torch.where(reached, out, theirs.to(out.dtype)))


def _all_equal(ours: Tensor, theirs: Tensor, where: Tensor | None = None) -> bool:
    """Return whether two tensors are equal (where a third is not zero), a slab at a time."""
    where = torch.ones((), dtype=torch.int8).expand_as(ours) if where is None else where
    parts = zip(*(slabs(tensor, SLAB) for tensor in (ours, theirs, where)), strict=True)
    return not any(bool(((a != b) & (mark != 0)).any()) for a, b, mark in parts)


def strided(flat: Tensor, info: TensorInfo, start: int) -> Tensor:
    """Return a tensor's elements as integers of their size, in `flat` from element `start` on.

    Elements of 16 bytes become pairs.
    """
    words = flat.view(_WORDS[info.dtype.itemsize])
    if info.dtype.itemsize < 16:
        return words.as_strided(info.shape, info.stride, start)
    doubled = tuple(2 * step for step in info.stride)
    return words.as_strided((*info.shape, 2), (*doubled, 1), 2 * start)


def slabs(view: Tensor, limit: int) -> Iterator[Tensor]:
    """Cut a tensor along its leading dimensions into parts of at most `limit` elements, in order.

    Tensors of one shape are cut alike.
    """
    if view.numel() <= limit or not view.dim():
        yield view
        return
    row = view.numel() // view.shape[0]
    step = max(limit // row, 1)
    for start in range(0, view.shape[0], step):
        part = view[start : start + step]
        if row > limit:
            yield from slabs(part[0], limit)
        else:
            yield part
