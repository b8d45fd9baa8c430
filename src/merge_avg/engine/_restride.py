"""Tensors in a geometry other than their file's: strided copies through the scratch file."""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from merge_avg.checkpoint import Name, TensorInfo
from merge_avg.errors import MergeError
from merge_avg.io import Buffer, Reader, Scratch, Sink
from merge_avg.plan import Staging, Target, Unit, aligned_to_page

SLAB = 1 << 17  # elements that are copied at a time
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}


def stage(scratch: Scratch, reader: Reader, staging: Staging, tied_in: Path) -> None:
    """Copies tensors of a checkpoint into another geometry, as the plan says.

    Raises:
        MergeError: two tensors that have to share elements differ.
    """
    place = _mapped(scratch, staging.offset, staging.nbytes).zero_()
    # Behind it: which elements a tensor was copied to already, and the tensor's own bytes.
    behind = aligned_to_page(staging.offset + staging.nbytes)
    taken = _mapped(scratch, behind, staging.nbytes).zero_()
    for name, info, view in staging.pairs:
        copied = _copied(scratch, reader, info, behind + aligned_to_page(staging.nbytes))
        source = strided(copied, info, 0)
        target = strided(place, view, view.start)
        marks = strided(taken, view, view.start)
        agree = True
        for dim, step in enumerate(view.stride):
            if not step and view.shape[dim] > 1:  # the target repeats one element
                agree &= _all_equal(source, source.narrow(dim, 0, 1).expand_as(source))
                source, target, marks = (t.narrow(dim, 0, 1) for t in (source, target, marks))
        agree &= _all_equal(source, target, marks)
        if not agree:
            others = [str(other) for other, _, _ in staging.pairs if other != name]
            what = f"tensor {str(name)!r} varies where it repeats one element in {tied_in}"
            if others:
                pair = f"{others[0]!r} and {str(name)!r}"
                what = f"tensors {pair} differ, but {tied_in} ties them"
            hint = "tie them in all checkpoints or in none, and save again"
            raise MergeError(what, where=reader.path, hint=hint)
        target.copy_(source)
        marks.fill_(1)


def _mapped(scratch: Scratch, offset: int, nbytes: int) -> Tensor:
    return torch.frombuffer(scratch.map(offset, nbytes), dtype=torch.uint8)


def _copied(scratch: Scratch, reader: Reader, info: TensorInfo, at: int) -> Tensor:
    """The bytes of a file that a tensor spans, copied to `at`."""
    size = info.dtype.itemsize
    nbytes = (info.stop - info.start) * size
    room = _mapped(scratch, at, nbytes)
    buffer = Buffer(SLAB)
    for start in range(0, nbytes, SLAB):
        count = min(SLAB, nbytes - start)
        at = info.start * size + start
        reader.read(buffer.bytes(count), info.storage, at)
        room[start : start + count] = buffer.tensor(count, torch.uint8)
    return room


def mark(mask: mmap.mmap, members: Iterable[tuple[Name, TensorInfo]], start: int) -> None:
    """Sets the bytes of the elements that tensors reach to 1, counted from element `start`."""
    flat = torch.frombuffer(mask, dtype=torch.uint8).zero_()
    for _, info in members:
        flat.as_strided(info.shape, info.stride, info.start - start).fill_(1)


def restore(out: Tensor, theirs: Tensor, mask: mmap.mmap, start: int) -> None:
    """Gives elements that `mask` has no mark for, from element `start` on, other values."""
    reached = torch.frombuffer(mask, dtype=torch.uint8)[start : start + len(out)] != 0
    out.copy_(torch.where(reached, out, theirs.to(out.dtype)))


def spread(out: Sink, unit: Unit, targets: Sequence[Target], mapped: mmap.mmap) -> None:
    """Copies a result that lies in the scratch file to where the output has it contiguous."""
    flat = torch.frombuffer(mapped, dtype=torch.uint8)
    buffer = Buffer(SLAB * unit.dtype.itemsize)
    for target in targets:
        if target.view is None:
            continue
        at = target.at
        for slab in slabs(
            strided(flat, replace(target.view, dtype=unit.dtype), target.start), SLAB
        ):
            nbytes = slab.numel() * slab.itemsize
            buffer.tensor(slab.numel(), slab.dtype).view(slab.shape).copy_(slab)
            out.write(target.file, target.slot, at, buffer.bytes(nbytes))
            at += nbytes


def _all_equal(ours: Tensor, theirs: Tensor, where: Tensor | None = None) -> bool:
    """Whether two tensors are equal (where a third is not zero), a slab at a time."""
    where = torch.ones((), dtype=torch.int8).expand_as(ours) if where is None else where
    parts = zip(*(slabs(tensor, SLAB) for tensor in (ours, theirs, where)), strict=True)
    return not any(bool(((a != b) & (mark != 0)).any()) for a, b, mark in parts)


def strided(flat: Tensor, info: TensorInfo, start: int) -> Tensor:
    """A tensor's elements as integers of their size, in `flat` bytes, from element `start` on.

    Elements of 16 bytes become pairs.
    """
    words = flat.view(_WORDS[info.dtype.itemsize])
    if info.dtype.itemsize < 16:
        return words.as_strided(info.shape, info.stride, start)
    doubled = tuple(2 * step for step in info.stride)
    return words.as_strided((*info.shape, 2), (*doubled, 1), 2 * start)


def slabs(view: Tensor, limit: int) -> Iterator[Tensor]:
    """A tensor cut along its leading dimensions into parts of at most `limit` elements, in order.

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
