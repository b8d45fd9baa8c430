"""Memory that files are read into and tensors are made of, without a copy between them."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor


class Buffer:
    """Anonymous pages of `nbytes` bytes, seen as bytes and as tensors."""

    def __init__(self, nbytes: int) -> None:
        self._pages = mmap.mmap(-1, max(nbytes, 1))
        self._bytes = memoryview(self._pages)
        self._flat = torch.frombuffer(self._pages, dtype=torch.uint8)

    def bytes(self, nbytes: int) -> memoryview:
        """The first `nbytes` bytes."""
        return self._bytes[:nbytes]

    def tensor(self, numel: int, dtype: torch.dtype) -> Tensor:
        """The first bytes as a vector of `numel` elements of `dtype`."""
        return self._flat[: numel * dtype.itemsize].view(dtype)
