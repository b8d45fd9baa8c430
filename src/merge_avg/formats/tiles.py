"""Tensors that lie in chunks: do these make up the whole, and where are its bytes?"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from merge_avg.checkpoint import DType, Storage, TensorInfo, TreePath, row_major

_MOST_CUT = 6  # dimensions that a tensor is cut along: a box has two corners for each

Index = tuple[int, ...]
Box = tuple[Index, Index]  # its first corner, and its extents


def joined(
    name: str,
    path: TreePath,
    dtype: DType,
    shape: Index,
    chunks: Sequence[tuple[Index, TensorInfo]],
) -> TensorInfo:
    """Return a tensor over the storages of its chunks, of which each comes with its first corner.

    They make up the tensor; see `tile`.
    """
    # One chunk is the tensor itself, with whatever strides it was saved with.
    if len(chunks) == 1:
        return replace(chunks[0][1], path=path)
    chunks = sorted(chunks, key=lambda chunk: chunk[0])
    whole = Storage(name, 0, math.prod(shape) * dtype.itemsize)
    # Cut along the first dimension, as FSDP does, the chunks are the bytes of the tensor one
    # after the other, and need no copy in the order of the whole. Behind the last of them FSDP may
    # have padding.
    spare = [info.storage.nbytes - info.numel * dtype.itemsize for _, info in chunks]
    rows = not any(spare[:-1]) and all(
        info.contiguous and info.shape[1:] == shape[1:] and not info.start for _, info in chunks
    )
    if rows:
        parts = tuple(info.storage for _, info in chunks)
        whole = Storage(name, 0, whole.nbytes + spare[-1], parts=parts)
    else:
        whole = replace(whole, tiles=tuple(chunks))
    trouble = next((info.trouble for _, info in chunks if info.trouble), None)
    return TensorInfo(path, dtype, shape, row_major(shape), 0, whole, trouble)


def tile(boxes: Sequence[Box], shape: Index) -> bool:
    """Return whether boxes cover a tensor of this shape, each element once.

    Each box is known by its corners with signs, the mixed differences of the function that is 1 in
    the box and 0 outside. Functions are equal where their differences are: boxes tile a tensor
    exactly if their corners add up to those of the tensor. That takes time in proportion to the
    number of boxes, where comparing each with each other would take its square.
    """
    if any(not len(offset) == len(size) == len(shape) for offset, size in boxes):
        return False
    # Dimensions along which every box has the whole extent make no difference.
    cut = [d for d in range(len(shape)) if any((o[d], s[d]) != (0, shape[d]) for o, s in boxes)]
    if not all(shape) or len(cut) > _MOST_CUT:
        return not all(shape) and not boxes
    corners: Counter[Index] = Counter()
    whole: Box = ((0,) * len(shape), shape)
    for sign, (offset, size) in [(-1, whole), *((1, box) for box in boxes)]:
        for ends in itertools.product((0, 1), repeat=len(cut)):
            corner = tuple(offset[d] + end * size[d] for d, end in zip(cut, ends, strict=True))
            corners[corner] += sign * (-1) ** sum(ends)
    return not any(corners.values())
