"""Tensors in a geometry other than their file's: strided copies through a nameless file.

The file is mapped, so that a copy of any size takes no memory of its own. The checkpoints
themselves are never mapped: they might shrink under the mapping.
"""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from merge_avg.buffer import Buffer
from merge_avg.errors import MergeError
from merge_avg.files import Reader, read_fully, reserve
from merge_avg.layout import TensorInfo
from merge_avg.plan import Staging, aligned_to_page

SLAB = 1 << 17  # elements that are copied at a time
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}


class Scratch:
    """A file without a name on the disk of `directory`, gone when it is closed."""

    def __init__(self, directory: Path) -> None:
        self._path = directory
        self._file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115 - closed by close()
        self._size = 0

    def read(self, into: memoryview, offset: int) -> None:
        """Fills `into` from `offset` on."""
        read_fully(self._file.fileno(), into, offset, self._path)

    def close(self) -> None:
        """Gives the room back."""
        self._file.close()

    def map(self, offset: int, nbytes: int) -> Tensor:
        """Bytes of the file, mapped; it grows as needed. `offset` is a multiple of 64 KiB.

        Raises:
            MergeError: there is no room; a hole that cannot be filled would kill the process.
        """
        if offset + nbytes > self._size:
            # Writing to a mapped hole ends the process (SIGBUS) when the disk is full.
            try:
                reserve(self._file.fileno(), offset + nbytes - self._size, self._size)
            except OSError as error:
                what = f"no room for strided copies ({error.strerror})"
                hint = f"{offset + nbytes:,} bytes are needed there for a while"
                raise MergeError(what, where=self._path, hint=hint) from None
            self._size = offset + nbytes
        return torch.frombuffer(
            mmap.mmap(self._file.fileno(), nbytes, offset=offset), dtype=torch.uint8
        )

    def stage(self, reader: Reader, staging: Staging, tied_in: Path) -> None:
        """Copies tensors of a checkpoint into another geometry, as the plan says.

        Raises:
            MergeError: two tensors that have to share elements differ.
        """
        place = self.map(staging.offset, staging.nbytes).zero_()
        # Behind it: which elements a tensor was copied to already, and the tensor's own bytes.
        behind = aligned_to_page(staging.offset + staging.nbytes)
        taken = self.map(behind, staging.nbytes).zero_()
        for name, info, view in staging.pairs:
            copied = self._copied(reader, info, behind + aligned_to_page(staging.nbytes))
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

    def _copied(self, reader: Reader, info: TensorInfo, at: int) -> Tensor:
        """The bytes of a file that a tensor spans, copied to `at`."""
        size = info.dtype.itemsize
        nbytes = (info.stop - info.start) * size
        room = self.map(at, nbytes)
        buffer = Buffer(SLAB)
        for start in range(0, nbytes, SLAB):
            count = min(SLAB, nbytes - start)
            at = info.start * size + start
            reader.read(buffer.bytes(count), info.storage, at)
            room[start : start + count] = buffer.tensor(count, torch.uint8)
        return room


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
