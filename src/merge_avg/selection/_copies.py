"""Copies: checkpoints of a run with the same weights, whatever lies around these."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Hashable
from dataclasses import replace

from zlib_ng import zlib_ng

from merge_avg.checkpoint import Layout, Storage, TensorInfo, assign
from merge_avg.errors import failure

_PIECE = 1 << 20
# A rough sum takes in the smallest weights, such as the bias of a head, and as many others, of each
# at most a piece. That tells nearly all checkpoints apart, at the cost of a few reads. The others
# are read whole, each once, so that many cost no more than a merge.
_FEW, _SHORT = 64, 1 << 12  # tensors, bytes


def sum_of(layout: Layout, *, rough: bool = False) -> int | None:
    """Return a number that is the same for checkpoints with the same weights, and for no others.

    A `rough` one takes in only some of the weights. None stands for what cannot be told, or takes
    more reading than four times all its bytes, as views may overlap. MergeError where it holds no
    weights.
    """
    weights = {str(name): info for name, info in assign(layout).weights.items()}
    names = sorted(weights)
    # A state dict may be all there is or lie in {"model": ...}, and wrappers add to each name. What
    # the first and the last begin with, all do.
    ends = zip(names[0].split(".")[:-1], names[-1].split(".")[:-1], strict=False)
    cut = sum(len(a) + 1 for a, _ in itertools.takewhile(lambda end: end[0] == end[1], ends))
    found: list[Hashable] = [len(names)]
    if rough:
        sizes = {name: math.prod(weights[name].shape) for name in names}
        small = heapq.nsmallest(_FEW, names, key=sizes.__getitem__)
        names = sorted({*small, *names[:: len(names) // _FEW + 1]})
    room = 4 * layout.nbytes
    for name in names:
        info = weights[name]
        found.append((name[cut:], info.dtype.name, info.shape))
        if rough and _span(info) > _SHORT:
            found.append(_piece(layout, info))
            continue
        room -= _span(info)
        if (info.trouble or room < 0) and not rough:
            return None
        if room >= 0:
            found.append(_content(layout, info))
    return hash(tuple(found))


def _span(info: TensorInfo) -> int:
    return (info.stop - info.start) * info.dtype.itemsize


def _content(layout: Layout, info: TensorInfo) -> tuple[object, ...]:
    """Return what tells a tensor's content: CRC-32 as recorded, or as read, and the strides."""
    storage, start = info.storage, info.start
    single = storage.ranges == (storage,)
    if single and not storage.coded and _span(info) != storage.nbytes:
        # Others share its storage: no recorded checksum is that of its own bytes.
        offset, start = storage.offset + start * info.dtype.itemsize, 0
        storage = replace(storage, offset=offset, nbytes=_span(info))
    sums = [
        _read(layout, part) if (crc := layout.checksum(part)) is None else crc
        for part in (storage.ranges if info.numel else ())
    ]
    plain = single and info.contiguous and _span(info) == storage.nbytes
    return tuple(sums), storage.swapped, () if plain else (start, info.stride)


def _piece(layout: Layout, info: TensorInfo) -> int | None:
    """Return the CRC-32 of a few bytes in the middle of a tensor, if it is plain there."""
    storage, size = info.storage, info.dtype.itemsize
    if storage.ranges != (storage,) or storage.coded or info.trouble:
        return None
    half = (info.stop - info.start) // 2
    offset, nbytes = storage.offset + (info.start + half) * size, min(half * size, _SHORT)
    return _read(layout, replace(storage, offset=offset, nbytes=nbytes))


def _read(layout: Layout, part: Storage) -> int:
    """Return the CRC-32 of a range of a file."""
    path, nbytes, crc = layout.files[part.file].path, part.packed or part.nbytes, 0
    try:
        with path.open("rb") as file:
            file.seek(layout.offset(part))
            while piece := file.read(min(nbytes, _PIECE)):
                crc, nbytes = zlib_ng.crc32(piece, crc), nbytes - len(piece)
    except OSError as error:
        raise failure(error, "cannot be read", path) from None
    return crc
