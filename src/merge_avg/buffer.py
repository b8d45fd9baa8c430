"""Memory that files are read into and tensors are made of, without a copy between them."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

_VIEWS = 64  # how many are kept: making one takes as long as a read


class Buffer:
    """Anonymous pages of `nbytes` bytes, seen as bytes and as tensors."""

    def __init__(self, nbytes: int) -> None:
        self._pages = mmap.mmap(-1, max(nbytes, 1))
        self._bytes = memoryview(self._pages)
        self._flat = torch.frombuffer(self._pages, dtype=torch.uint8)
        self._views: dict[tuple[int, torch.dtype], Tensor] = {}

    def bytes(self, nbytes: int) -> memoryview:
        """The first `nbytes` bytes."""
        return self._bytes[:nbytes]

    def tensor(self, numel: int, dtype: torch.dtype) -> Tensor:
        """The first bytes as a vector of `numel` elements of `dtype`."""
        view = self._views.get((numel, dtype))
        if view is None:
            if len(self._views) >= _VIEWS:
                self._views.clear()
            view = self._flat[: numel * dtype.itemsize].view(dtype)
            self._views[numel, dtype] = view
        return view
