"""What a scan of a checkpoint yields: names, and the places of bytes. No payload, no torch."""

from __future__ import annotations

import errno
import math
import stat
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from merge_avg.checkpoint._dtypes import DType

# In the metadata of a checkpoint, what an earlier merge wrote about itself.
PROVENANCE = "merge_avg"
PROVENANCE_FILE = "merge_avg.json"  # the same, as a file of a directory or a record of an archive
LARGEST_PROVENANCE = 1 << 24  # bytes; what is longer was not written by a merge
Key = str | int
TreePath = tuple[Key, ...]
Scalar = int | float | str
# In the path of what a pickled nn.Module holds beside parameters, buffers and modules.
ATTRIBUTES = "attributes of a module"


@dataclass(frozen=True, slots=True)
class File:
    """A file of a checkpoint, as it was when it was scanned."""

    path: Path
    nbytes: int
    mtime_ns: int
    device: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> File:
        """The file at a path; raises OSError."""
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", str(path))
        return cls(path, found.st_size, found.st_mtime_ns, found.st_dev, found.st_ino)


@dataclass(frozen=True, slots=True)
class Storage:
    """Bytes of a checkpoint that tensors view: a record of an archive, or a tensor's own range.

    Attributes:
        name: what messages call it; unique in its file.
        offset: of its first byte in the file.
        nbytes: its size.
        crc: the CRC-32 that the file records for exactly these bytes, if it does.
        file: the number of the file in the checkpoint.
        packed: the size that it takes in the file, if it is deflated (RFC 1951).
        swapped: the size of the words whose bytes lie in big-endian order, or 1.
        parts: where it is no range of a file but the parts of a tensor, one after the other.
        tiles: where it is no range of a file but the tiles of a tensor: where each begins in the
            tensor, and as what it is stored.
    """

    name: str
    offset: int
    nbytes: int
    crc: int | None = None
    file: int = 0
    packed: int | None = None
    swapped: int = 1
    parts: tuple[Storage, ...] = ()
    tiles: tuple[tuple[tuple[int, ...], TensorInfo], ...] = ()

    @property
    def coded(self) -> bool:
        """Whether its bytes have to be decoded before they can be read by offset."""
        return self.packed is not None or self.swapped > 1

    @property
    def ranges(self) -> tuple[Storage, ...]:
        """The ranges of files that it is made of."""
        return self.parts or tuple(tile.storage for _, tile in self.tiles) or (self,)


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
        usual = row_major(self.shape)
        return (
            self.stride == usual or not self.numel or self.geometry == _geometry(self.shape, usual)
        )

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
    def dense(self) -> bool:
        """Whether it has every element from its first to its last, each once."""
        if not self.numel:
            return True
        once = not self.overlaps_itself and all(step for _, step in self.geometry)
        return once and self.numel == self.stop - self.start

    @property
    def geometry(self) -> tuple[tuple[int, int], ...]:
        """(extent, step) of the dimensions that matter for where elements lie."""
        return _geometry(self.shape, self.stride)


def _geometry(shape: Iterable[int], stride: Iterable[int]) -> tuple[tuple[int, int], ...]:
    pairs = zip(shape, stride, strict=True)
    return tuple((extent, step) for extent, step in pairs if extent != 1)


_LARGEST = 1 << 63
_MOST_DIMENSIONS = 64
_MOST_REPEATED = 1 << 30  # elements of a tensor that has far more than its storage


def impossible(shape: object, stride: object, start: object, held: int) -> str | None:
    """What is wrong with a claimed geometry over a storage of `held` elements, if something is.

    Torch's numbers have 64 bits. A view may repeat elements, as `expand` does, but not without
    end: a file of a few bytes could ask for days of work.
    """
    if not isinstance(shape, list | tuple) or not isinstance(stride, list | tuple):
        return "no shape or no strides"
    if len(shape) != len(stride) or len(shape) > _MOST_DIMENSIONS:
        return f"{len(shape)} dimensions with {len(stride)} strides"
    if any(type(n) is not int or not 0 <= n < _LARGEST for n in (start, *shape, *stride)):
        return "impossible strides"
    if math.prod(max(extent, 1) for extent in shape) >= _LARGEST:
        return "more elements than can be counted"
    if math.prod(shape) > max(_MOST_REPEATED, 16 * held):
        return f"{math.prod(shape):,} elements, but a storage of {held:,}"
    return None


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
    """A scanned checkpoint: one file, or a directory.

    Attributes:
        path: the file or directory.
        format: "torch-zip", "torch-legacy", "safetensors", "torch-dcp" or "directory".
        files: what it is made of; one for a file.
        tensors: every tensor in it, weights or not, in the files' order.
        others: entries at the top level that hold no tensor, such as "epoch".
        metadata: string to string, as safetensors files carry it; and the `PROVENANCE` of an
            earlier merge.
        archive: what a copy of a pickled checkpoint is made of; None for other formats.
        members: for a directory, the part of it that each file holds, in the order of `files`;
            None for files that hold no weights.
        notes: what a person should hear of, one sentence each.
        scalars: numbers and short texts beside the tensors, such as the epoch, by their paths.
        set_member: whether it is a file of a set, whose tensors have names from the root of the set
            and can be written only together.
    """

    path: Path
    format: str
    files: tuple[File, ...]
    tensors: tuple[TensorInfo, ...]
    others: tuple[str, ...] = ()
    metadata: tuple[tuple[str, str], ...] = ()
    archive: Archive | None = None
    members: tuple[Layout | None, ...] = ()
    notes: tuple[str, ...] = ()
    scalars: tuple[tuple[TreePath, Scalar], ...] = ()
    set_member: bool = False

    @property
    def nbytes(self) -> int:
        """The size of all its files."""
        return sum(file.nbytes for file in self.files)

    @property
    def source(self) -> Layout:
        """The same without its archives, which only a copy of the checkpoint needs."""
        members = tuple(member and member.source for member in self.members)
        return replace(self, archive=None, members=members)

    def where(self, info: TensorInfo) -> Path:
        """The file that a tensor lies in."""
        inner = info.storage.parts or [tile.storage for _, tile in info.storage.tiles]
        return self.files[(inner[0] if inner else info.storage).file].path


@dataclass(frozen=True, slots=True)
class ClassSpan:
    """Where a pickle names the class of a storage: bytes start to stop are the opcode that does.

    `cls` is module and name, divided by a newline; `storage` the pickle's key of the storage.
    """

    start: int
    stop: int
    cls: str
    storage: str


@dataclass(frozen=True)
class Archive:
    """The records of a pickled checkpoint, in their order, and the pickle that ties them together.

    Attributes:
        records: the name of each record in the archive, and where it lies.
        pickle: the bytes of data.pkl.
        pickle_name: its record's name.
        classes: each time the pickle names a storage's class.
        frames: where the pickle's FRAME opcodes start.
        unchecked: whether it was written without checksums.
        prefix: what the name of a storage begins with, before the pickle's key for it.
        around: for a legacy file, the bytes before the pickle and those after it.
    """

    records: tuple[tuple[str, Storage], ...]
    pickle: bytes
    pickle_name: str
    classes: tuple[ClassSpan, ...]
    frames: tuple[int, ...]
    unchecked: bool = False
    prefix: str = ""
    around: tuple[bytes, bytes] = (b"", b"")


def dotted(path: TreePath) -> str:
    """A path as a person reads it: state_dict.conv.weight."""
    return ".".join(str(key) for key in path)
