"""Files, storages and tensors: where bytes lie, and which of them a strided view reaches.

    Layout       path, format, tensors, ...      what a scan yields: a file, or a directory of ...
    TensorInfo   shape, stride, start            elements of ...
    Storage      offset, nbytes                  a range of bytes of ...
    File         path, size, inode               a file, as it was when it was scanned

Many tensors may view one storage: tied weights, slices, transposed views. A storage that is not one
range of one file is made of others: `parts` one after the other, or `tiles` of a tensor.
"""

from __future__ import annotations

import errno
import math
import stat
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

from merge_avg.checkpoint._dtypes import DType

PROVENANCE = "merge_avg"  # in the metadata of a checkpoint, the record of the merge that made it
PROVENANCE_FILE = "merge_avg.json"  # the same, as a file of a directory or a record of an archive
LARGEST_PROVENANCE = 1 << 24  # bytes: no merge writes more, and whoever reads one holds it

_LARGEST = 1 << 63
_MOST_DIMENSIONS = 64
_MOST_REPEATED = 1 << 30  # elements of a tensor that has far more than its storage

Key = str | int
TreePath = tuple[Key, ...]  # keys from the root of a checkpoint's object tree
Scalar = int | float | str
BytesAt = tuple[int, int, int]  # the number of a file, an offset from its base, and a size


@dataclass(frozen=True, slots=True)
class File:
    """A file of a checkpoint, as it was when it was scanned."""

    path: Path
    nbytes: int
    mtime_ns: int
    device: int
    inode: int
    # Where offsets of storages count from. Checkpoints whose tensors begin elsewhere, behind longer
    # metadata, are otherwise the same.
    base: int = 0

    @classmethod
    def of(cls, path: Path) -> File:
        """Return the file at a path; OSError for a directory, a pipe or a device."""
        found = path.stat()
        # Opening a pipe would wait for a writer forever.
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        return cls(path, found.st_size, found.st_mtime_ns, found.st_dev, found.st_ino)


@dataclass(frozen=True, slots=True)
class Storage:
    """Bytes of a checkpoint that tensors view: a record of an archive, or a tensor's own range."""

    name: str  # in messages; unique in its file
    offset: int  # of its first byte, from the file's base
    nbytes: int
    file: int = 0  # its number in the checkpoint
    packed: int | None = None  # the size that it takes in the file, if it is deflated (RFC 1951)
    swapped: int = 1  # the size of its words if they are big-endian
    # If it is not a range itself: the storages it consists of, one after the other, or the tensors
    # that tile it, each with the index of its first element.
    parts: tuple[Storage, ...] = ()
    tiles: tuple[tuple[tuple[int, ...], TensorInfo], ...] = ()

    @property
    def bytes_at(self) -> BytesAt:
        """Return where its bytes are, for what is known of exactly these."""
        return self.file, self.offset, self.nbytes

    @property
    def coded(self) -> bool:
        """Return whether its bytes have to be decoded before they can be read by offset."""
        return self.packed is not None or self.swapped > 1

    @property
    def ranges(self) -> tuple[Storage, ...]:
        """Return the ranges of files that it consists of."""
        return self.parts or tuple(tile.storage for _, tile in self.tiles) or (self,)


@dataclass(frozen=True, slots=True)
class Shard:
    """The whole of a distributed tensor, as one rank's part of it tells."""

    shape: tuple[int, ...]  # of the whole
    dims: tuple[int | None, ...]  # along which each dimension of the mesh cuts; None: replicated
    place: tuple[int, ...] | None  # of the rank in the mesh, if the file says so


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor in a checkpoint: a strided view of a storage, counted in elements."""

    path: TreePath  # the last key is the tensor's name
    dtype: DType
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    start: int  # its first element in the storage
    storage: Storage
    trouble: str | None = None  # why its bytes are not plain numbers ("a sparse tensor")
    learned: bool = False  # whether the file says that it is a Parameter; few state dicts do
    shard: Shard | None = None  # where it is one rank's part of another tensor

    @property
    def numel(self) -> int:
        """Return the number of elements."""
        return math.prod(self.shape)

    @property
    def stop(self) -> int:
        """Return one past the last element of the storage that it reaches; `start` if none."""
        if not self.numel:
            return self.start
        # Steps are never negative, as torch has none: the last index reaches farthest.
        return self.start + _reach(self.shape, self.stride) + 1

    @property
    def geometry(self) -> tuple[tuple[int, int], ...]:
        """Return (extent, step) of the dimensions that decide where elements lie."""
        return _geometry(self.shape, self.stride)

    @property
    def contiguous(self) -> bool:
        """Return whether its elements lie one after the other, in row-major order."""
        return not self.numel or self.geometry == _geometry(self.shape, row_major(self.shape))

    @property
    def overlaps_itself(self) -> bool:
        """Return whether different indices reach one element, other than by repeating it whole."""
        return _overlaps(self.geometry)

    @property
    def dense(self) -> bool:
        """Return whether it has every element from its first to its last, each once."""
        once = not self.overlaps_itself and all(step for _, step in self.geometry)
        return not self.numel or (once and self.numel == self.stop - self.start)


class Checksums(Mapping[BytesAt, int]):
    """The CRC-32 that files record for ranges of their bytes.

    There may be very many ranges, and checkpoints of a run have the same: `numbers` of them may be
    shared, and four bytes are held for each.
    """

    def __init__(self, numbers: Mapping[BytesAt, int], crcs: array[int]) -> None:
        self.numbers = numbers
        self.crcs = crcs  # by number

    @classmethod
    def of(cls, pairs: Mapping[BytesAt, int]) -> Checksums:
        """Return those that a mapping has."""
        return cls({at: k for k, at in enumerate(pairs)}, array("I", pairs.values()))

    def __getitem__(self, at: BytesAt) -> int:
        return self.crcs[self.numbers[at]]

    def __iter__(self) -> Iterator[BytesAt]:
        return iter(self.numbers)

    def __len__(self) -> int:
        return len(self.numbers)


NO_CHECKSUMS = Checksums.of({})


@dataclass(frozen=True)
class Layout:
    """A scanned checkpoint: one file, or a directory. All that later steps know of it."""

    path: Path
    format: str  # "torch-zip", "torch-legacy", "safetensors", "torch-dcp" or "directory"
    files: tuple[File, ...]
    tensors: tuple[TensorInfo, ...]  # weights or not, in the files' order
    others: tuple[str, ...] = ()  # entries at the top level that hold no tensor, such as "epoch"
    # As safetensors files carry it; and the `PROVENANCE` of an earlier merge.
    metadata: tuple[tuple[str, str], ...] = ()
    archive: Archive | None = None  # all that a copy of a pickled checkpoint needs
    # For a directory, what each of its files holds; None for files that hold no weights.
    members: tuple[Layout | None, ...] = ()
    notes: tuple[str, ...] = ()  # for the user, one sentence each
    scalars: tuple[tuple[TreePath, Scalar], ...] = ()  # numbers and short texts beside the tensors
    # What a loader of a copy would call that is not known to be inert, with the file's number.
    callables: tuple[tuple[int, str], ...] = ()
    # Whether it is a file of a set, whose tensors have names from the root of the set.
    set_member: bool = False
    # Dicts that hold `state` beside `param_groups`, as the state of an optimizer does.
    optimizers: tuple[TreePath, ...] = ()
    # NumPy arrays, which are not averaged, with a digest of the dtype, shape and bytes of each.
    arrays: tuple[tuple[TreePath, str], ...] = ()
    # Storages of other ranks that have the same content as one, by its file's number and its name.
    twins: Mapping[tuple[int, str], tuple[Storage, ...]] = field(default_factory=dict, hash=False)
    # Storages that are parts of one, by the same: its name, and where in it they begin.
    spans: Mapping[tuple[int, str], tuple[str, int]] = field(default_factory=dict, hash=False)
    # Folders and files of a directory that hold weights: what they are called decides nothing.
    named_files: tuple[TreePath, ...] = ()
    # The CRC-32 that a file records for exactly the bytes of a storage. They are not in the storage
    # itself: files that differ in their numbers alone, as those of a run do, share all tensors.
    checksums: Checksums = field(default_factory=lambda: NO_CHECKSUMS, hash=False)
    # What other layouts may share with it: readers remember it for as long as there is one.
    shared: object = field(default=None, compare=False, repr=False)

    def checksum(self, storage: Storage) -> int | None:
        """Return the CRC-32 that is recorded for a storage, if one is."""
        return self.checksums.get(storage.bytes_at)

    @property
    def nbytes(self) -> int:
        """Return the size of all its files."""
        return sum(file.nbytes for file in self.files)

    @property
    def source(self) -> Layout:
        """Return the same without its archives, which only a copy of the checkpoint needs."""
        members = tuple(member and member.source for member in self.members)
        return replace(self, archive=None, members=members)

    def offset(self, storage: Storage) -> int:
        """Return the offset of a storage's first byte in its file."""
        return self.files[storage.file].base + storage.offset

    def where(self, info: TensorInfo) -> Path:
        """Return the file that a tensor lies in, or begins in."""
        return self.files[info.storage.ranges[0].file].path


@dataclass(frozen=True, slots=True)
class ClassSpan:
    """The place where a pickle names the class of a storage: the bytes of the opcode that does."""

    # Torch tells the dtype of a tensor by the class of its storage, as in torch.FloatStorage: a
    # copy with another dtype replaces just these bytes of the pickle.
    start: int
    stop: int
    cls: str  # module and name, with a newline between them
    storage: str  # the pickle's key of it


@dataclass(frozen=True)
class Archive:
    """The records of a pickled checkpoint, in order, and the pickle that ties them together."""

    names: tuple[str, ...]  # of the records, without the folder that all are in
    storages: tuple[Storage, ...]  # the records
    pickle: bytes  # of data.pkl
    pickle_name: str  # its record's name
    classes: tuple[ClassSpan, ...]
    frames: tuple[int, ...]  # where the pickle's FRAME opcodes start
    prefix: str = ""  # of the names of storages, before the pickle's key
    around: tuple[bytes, bytes] = (b"", b"")  # for a legacy file, the bytes beside the pickle
    folder: str = ""  # with its slash

    @property
    def records(self) -> Iterator[tuple[str, Storage]]:
        """Yield the records with their names in the archive."""
        names = (self.folder + name for name in self.names)
        return zip(names, self.storages, strict=True)


@lru_cache(maxsize=4096)  # layers repeat their shapes
def _geometry(shape: tuple[int, ...], stride: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    # Torch leaves the step of a dimension with one element at whatever it was.
    return tuple(pair for pair in zip(shape, stride, strict=True) if pair[0] != 1)


@lru_cache(maxsize=4096)
def _reach(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    return sum((extent - 1) * step for extent, step in zip(shape, stride, strict=True))


@lru_cache(maxsize=4096)
def _overlaps(geometry: tuple[tuple[int, int], ...]) -> bool:
    # From the smallest step up, each has to lead past all that smaller ones reach together.
    # Steps of zero repeat elements, as `expand` does: a single value is behind them.
    reach = 0
    for extent, step in sorted(geometry, key=lambda pair: pair[1]):
        if step and step <= reach:
            return True
        reach += (extent - 1) * step
    return False


@lru_cache(maxsize=4096)
def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor of this shape, in elements."""
    strides, step = [], 1
    for extent in reversed(shape):
        strides.append(step)
        step *= max(extent, 1)
    return tuple(reversed(strides))


def is_matrix(shape: Sequence[int]) -> bool:
    """Return whether a tensor has two dimensions or more, of more than one element."""
    # Scales of rows, of the shape (rows, 1), are vectors: all near 1, or all positive.
    return sum(extent > 1 for extent in shape) > 1


def impossible(shape: object, stride: object, start: object, held: int) -> str | None:
    """Return what is wrong with a claimed geometry over a storage of `held` elements, if anything.

    Torch's numbers have 64 bits. A view may repeat elements, as `expand` does, but not without
    end: a file of a few bytes could ask for days of work.
    """
    if not isinstance(shape, list | tuple) or not isinstance(stride, list | tuple):
        return "no shape or no strides"
    if len(shape) != len(stride) or len(shape) > _MOST_DIMENSIONS:
        return f"{len(shape)} dimensions with {len(stride)} strides"
    # `type`, for True is an int too, and would be written as a number that it is not.
    if any(type(n) is not int or not 0 <= n < _LARGEST for n in (start, *shape, *stride)):
        return "impossible strides"
    # Extents of zero count as one: strides of an empty tensor are products of the others.
    if math.prod(max(extent, 1) for extent in shape) >= _LARGEST:
        return "more elements than can be counted"
    if math.prod(shape) > max(_MOST_REPEATED, 16 * held):
        return f"{math.prod(shape):,} elements, but a storage of {held:,}"
    return None


def dotted(path: TreePath) -> str:
    """Return a path as messages show it: state_dict.conv.weight."""
    return ".".join(str(key) for key in path)
