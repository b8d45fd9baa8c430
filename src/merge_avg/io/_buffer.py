"""Memory that files are read into and numbers are taken from, without a copy between them."""

from __future__ import annotations

import ctypes
import mmap
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from merge_avg.checkpoint import DType

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_MEMCMP = ctypes.CDLL(None).memcmp
_MEMCMP.argtypes = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t


@dataclass(frozen=True, slots=True)
class Matrix:
    """Matrix of numbers in host memory.

    Attributes:
        address: of the first number.
        dtype: of all.
        count: how many rows there are.
        numel: the numbers of each.
        stride: how many numbers lie between the beginnings of rows.
        held: what keeps the memory.
    """

    address: int
    dtype: DType
    count: int
    numel: int
    stride: int
    held: object

    def run(self, rows: slice) -> Matrix:
        """Some neighbouring rows."""
        if rows == slice(0, self.count):
            return self
        start = self.address + rows.start * self.stride * self.dtype.itemsize
        count = rows.stop - rows.start
        return Matrix(start, self.dtype, count, self.numel, self.stride, self.held)

    def part(self, start: int, stop: int) -> Matrix:
        """Some columns."""
        at = self.address + start * self.dtype.itemsize
        return Matrix(at, self.dtype, self.count, stop - start, self.stride, self.held)

    def tensor(self) -> Tensor:
        """The same as a tensor of shape (count, numel)."""
        import torch

        numel = self.stride * (self.count - 1) + self.numel
        memory = (ctypes.c_char * (numel * self.dtype.itemsize)).from_address(self.address)
        memory.held = self.held  # type: ignore[attr-defined]
        flat = torch.frombuffer(memory, dtype=torch.uint8).view(getattr(torch, self.dtype.name))
        return flat.as_strided((self.count, self.numel), (self.stride, 1))


Stack: TypeAlias = "Matrix | Tensor"  # rows in host memory, or on a device


class Buffer:
    """Anonymous pages of `nbytes` bytes, seen as bytes, as rows and as tensors."""

    def __init__(self, nbytes: int) -> None:
        self._pages = mmap.mmap(-1, max(nbytes, 1))
        self._bytes = memoryview(self._pages)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._pages))

    def __len__(self) -> int:
        return len(self._pages)

    def bytes(self, nbytes: int) -> memoryview:
        """The first `nbytes` bytes."""
        return self._bytes[:nbytes]

    def rows(self, count: int, numel: int, dtype: DType) -> Matrix:
        """The first bytes as `count` rows of `numel` numbers, one after the other."""
        return Matrix(self.address, dtype, count, numel, numel, self._bytes)

    def tensor(self, numel: int, dtype: torch.dtype) -> Tensor:
        """The first bytes as a vector of `numel` elements of `dtype`."""
        import torch

        flat = torch.frombuffer(self._pages, dtype=torch.uint8)
        return flat[: numel * dtype.itemsize].view(dtype)


def same(ours: Buffer, theirs: Buffer, nbytes: int) -> bool:
    """Whether the first bytes of two buffers are the same."""
    return not _MEMCMP(ours.address, theirs.address, nbytes)
