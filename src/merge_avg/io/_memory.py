"""Memory that files are read into and numbers are taken from, without a copy between them."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import mmap
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from merge_avg.checkpoint import DType
from merge_avg.errors import MergeError
from merge_avg.io._platform import read_fully, reserve, same_memory

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """Suspend the collector of cyclic garbage.

    A scan makes no cycles, nor does importing torch. The collector takes a third of the time of the
    one, and a sixth of the other.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@dataclass(frozen=True, slots=True)
class Matrix:
    """Rows of numbers in host memory: `count` rows of `numel`, one for each checkpoint."""

    address: int  # not a tensor: compiled loops take addresses, and torch need not be imported
    dtype: DType
    count: int
    numel: int
    stride: int  # the numbers between the beginnings of two rows
    held: object  # keeps the memory alive

    def run(self, rows: slice) -> Matrix:
        """Return some neighbouring rows."""
        if rows == slice(0, self.count):
            return self
        at = self.address + rows.start * self.stride * self.dtype.itemsize
        count = rows.stop - rows.start
        return Matrix(at, self.dtype, count, self.numel, self.stride, self.held)

    def part(self, start: int, stop: int) -> Matrix:
        """Return the columns from `start` to `stop`."""
        at = self.address + start * self.dtype.itemsize
        return Matrix(at, self.dtype, self.count, stop - start, self.stride, self.held)

    def tensor(self) -> Tensor:
        """Return the numbers as a tensor of shape (count, numel), without a copy."""
        import torch

        numel = self.stride * (self.count - 1) + self.numel
        memory = (ctypes.c_char * (numel * self.dtype.itemsize)).from_address(self.address)
        memory.held = self.held  # type: ignore[attr-defined]
        flat = torch.frombuffer(memory, dtype=torch.uint8).view(getattr(torch, self.dtype.name))
        return flat.as_strided((self.count, self.numel), (self.stride, 1))


Stack: TypeAlias = "Matrix | Tensor"  # rows in host memory, or on a device


class Buffer:
    """Anonymous pages of `nbytes` bytes, seen as bytes, as rows and as tensors."""

    # Mapped and not a bytearray: pages that nothing is written to take no memory, and freed ones go
    # back to the system at once, so the peak is what the budget says.

    def __init__(self, nbytes: int) -> None:
        self._pages = mmap.mmap(-1, max(nbytes, 1))
        self._bytes = memoryview(self._pages)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._pages))

    def __len__(self) -> int:
        return len(self._pages)

    def bytes(self, nbytes: int) -> memoryview:
        """Return the first `nbytes` bytes."""
        return self._bytes[:nbytes]

    def rows(self, count: int, numel: int, dtype: DType) -> Matrix:
        """Return the first bytes as `count` rows of `numel` numbers, one after the other."""
        return Matrix(self.address, dtype, count, numel, numel, self._bytes)

    def tensor(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Return the first bytes as a vector of `numel` elements of `dtype`."""
        import torch

        flat = torch.frombuffer(self._pages, dtype=torch.uint8)
        return flat[: numel * dtype.itemsize].view(dtype)


def same(ours: Buffer, theirs: Buffer, nbytes: int) -> bool:
    """Return whether the first bytes of two buffers are the same."""
    # Python compares memoryviews element by element, and slices of bytes only after copying them.
    return same_memory(ours.address, theirs.address, nbytes)


class Scratch:
    """A file without a name on the disk of `directory`, gone when it is closed.

    It holds tensors and results that lie in another geometry for a while. It is mapped, so that a
    copy of any size takes no memory of its own.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory
        self._file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115 - closed by close()
        self._size = 0

    def read(self, into: memoryview, offset: int) -> None:
        """Fill `into` from `offset` on."""
        read_fully(self._file.fileno(), into, offset, self._path)

    def close(self) -> None:
        """Give the space back."""
        self._file.close()

    def map(self, offset: int, nbytes: int) -> mmap.mmap:
        """Return mapped bytes of the file, which grows; `offset` is a multiple of 64 KiB."""
        if offset + nbytes > self._size:
            # A write to a mapped hole kills the process (SIGBUS) when the disk is full.
            try:
                reserve(self._file.fileno(), offset + nbytes - self._size, self._size)
            except OSError as error:
                what = f"no room for strided copies ({error.strerror})"
                hint = f"{offset + nbytes:,} bytes are needed there for a while"
                raise MergeError(what, where=self._path, hint=hint) from None
            self._size = offset + nbytes
        return mmap.mmap(self._file.fileno(), nbytes, offset=offset)
