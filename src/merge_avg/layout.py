"""What a scan of a checkpoint yields: names, and the places of bytes. No payload, no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from merge_avg.dtypes import DType

Key = str | int
TreePath = tuple[Key, ...]


@dataclass(frozen=True, slots=True)
class Storage:
    """Bytes of a file that tensors view: a record of a zip archive, or a tensor's own range.

    Attributes:
        name: what messages call it.
        offset: of its first byte in the file.
        nbytes: its size.
        crc: the CRC-32 that the file records for exactly these bytes, if it does.
    """

    name: str
    offset: int
    nbytes: int
    crc: int | None = None


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor in a checkpoint: a strided view of a storage.

    Attributes:
        path: keys from the root of the checkpoint's object tree; the last is the tensor's name.
        shape: extents in elements.
        stride: steps in elements, one for each dimension.
        start: of its first element in the storage, in elements.
        trouble: why its bytes are not plain numbers, if they are not ("a sparse tensor").
    """

    path: TreePath
    dtype: DType
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    start: int
    storage: Storage
    trouble: str | None = None

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def stop(self) -> int:
        """One past the last element of the storage that it reaches; `start` if it has none."""
        if not self.numel:
            return self.start
        steps = zip(self.shape, self.stride, strict=True)
        return self.start + sum((extent - 1) * step for extent, step in steps) + 1

    @property
    def contiguous(self) -> bool:
        """Whether its elements lie one after the other, in row-major order."""
        return not self.numel or self.geometry == _geometry(self.shape, row_major(self.shape))

    @property
    def overlaps_itself(self) -> bool:
        """Whether different indices reach the same element, other than by repeating it whole."""
        reach = 0
        for extent, step in sorted(self.geometry, key=lambda pair: pair[1]):
            if step and step <= reach:
                return True
            reach += (extent - 1) * step
        return False

    @property
    def geometry(self) -> tuple[tuple[int, int], ...]:
        """(extent, step) of the dimensions that matter for where elements lie."""
        return _geometry(self.shape, self.stride)


def _geometry(shape: Iterable[int], stride: Iterable[int]) -> tuple[tuple[int, int], ...]:
    pairs = zip(shape, stride, strict=True)
    return tuple((extent, step) for extent, step in pairs if extent != 1)


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a contiguous tensor of this shape, in elements."""
    strides = []
    step = 1
    for extent in reversed(shape):
        strides.append(step)
        step *= max(extent, 1)
    return tuple(reversed(strides))


@dataclass(frozen=True)
class Layout:
    """A scanned checkpoint.

    Attributes:
        path: the file.
        format: "torch-zip" or "safetensors".
        nbytes: the size of the file.
        tensors: every tensor in it, weights or not, in the file's order.
        others: entries at the top level that hold no tensor, such as "epoch".
        metadata: string to string, as safetensors files carry it.
        archive: what a copy of a zip checkpoint is made of; None for other formats.
    """

    path: Path
    format: str
    nbytes: int
    tensors: tuple[TensorInfo, ...]
    others: tuple[str, ...] = ()
    metadata: tuple[tuple[str, str], ...] = ()
    archive: Archive | None = None


@dataclass(frozen=True, slots=True)
class ClassSpan:
    """Where a pickle names the class of a storage: bytes start to stop are the opcode that does.

    `cls` is module and name, divided by a newline; `storage` the storage's record.
    """

    start: int
    stop: int
    cls: str
    storage: str


@dataclass(frozen=True)
class Archive:
    """The records of a zip checkpoint, in their order, and the pickle that ties them together.

    Attributes:
        pickle: the bytes of data.pkl.
        pickle_name: its record's name.
        classes: each time the pickle names a storage's class.
        frames: where the pickle's FRAME opcodes start.
        unchecked: whether it was written without checksums.
    """

    records: tuple[Storage, ...]
    pickle: bytes
    pickle_name: str
    classes: tuple[ClassSpan, ...]
    frames: tuple[int, ...]
    unchecked: bool = False


def dotted(path: TreePath) -> str:
    """A path as a person reads it: state_dict.conv.weight."""
    return ".".join(str(key) for key in path)
