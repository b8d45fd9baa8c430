"""The `.metadata` of a distributed checkpoint: a pickle, read here without being run.

    Metadata(
      state_dict_metadata={
        "w": TensorStorageMetadata(properties=TensorProperties(dtype=torch.float32, ...),
                                   size=[6, 4],
                                   chunks=[ChunkStorageMetadata(offsets=[0, 0], sizes=[3, 4]),
                                           ChunkStorageMetadata(offsets=[3, 0], sizes=[3, 4])]),
        "epoch": BytesStorageMetadata()},
      planner_data={"w": ("model", "w")},             the path of each name in the state dict
      storage_data={
        MetadataIndex(fqn="w", offset=[0, 0]):
          _StorageInfo(relative_path="__0_0.distcp", offset=0, length=1234)})

Specification: torch/distributed/checkpoint/metadata.py and filesystem.py.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from merge_avg.checkpoint import (
    BY_NAME,
    DType,
    Storage,
    TensorInfo,
    TreePath,
    impossible,
    is_kept,
    row_major,
)
from merge_avg.errors import MergeError
from merge_avg.formats.pickle.load import load
from merge_avg.formats.pickle.values import Allowance, Global, Instance, PickleError, Value, shown

Box = tuple[tuple[int, ...], tuple[int, ...]]  # its first corner, and its extents

_LONGEST_PATH = 200
_MOST_CUT = 6  # dimensions that a tensor is cut along: a box has two corners for each
_METADATA = Global("torch.distributed.checkpoint.metadata", "Metadata")
_TORCH_SIZE = Global("torch", "Size")


@dataclass(frozen=True)
class Chunk:
    """The place in a file of a chunk of a tensor, or of an object, which has no offset."""

    fqn: str
    offset: tuple[int, ...] | None
    start: int
    nbytes: int


class Metadata:
    """The content of a `.metadata` file, checked."""

    def __init__(self, data: bytes) -> None:
        self._allowance = Allowance()
        root = load(data, persistent=_nothing, call=_call, allowance=self._allowance).value
        if not isinstance(root, Instance) or root.function != _METADATA:
            raise PickleError("it is not metadata of torch.distributed.checkpoint")
        state = _table(root.state)
        self._stored = _table(state.get("storage_data"))
        # Only the default planner writes the paths of names; see `_path` for those of others.
        plan = state.get("planner_data")
        self._paths = plan if isinstance(plan, dict) else {}
        self.sizes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, DType] = {}
        self._offsets: dict[str, list[tuple[tuple[int, ...], tuple[int, ...]]]] = {}
        self._objects: list[str] = []
        for fqn, entry in _table(state.get("state_dict_metadata")).items():
            self._add(fqn, entry)

    def _add(self, fqn: Value, entry: Value) -> None:
        if not isinstance(fqn, str) or not isinstance(entry, Instance):
            raise PickleError("it describes an entry in an unknown way")
        kind = entry.function.name if isinstance(entry.function, Global) else ""
        if kind == "BytesStorageMetadata":
            self._objects.append(fqn)
            return
        state = _table(entry.state)
        dtype: Value = None
        # A tuple, as TensorProperties.__getstate__ makes it, or the attributes themselves.
        match state.get("properties"):
            case Instance(state=(dtype, *_) | {"dtype": dtype}):
                pass
        if kind != "TensorStorageMetadata" or not isinstance(dtype, Global):
            raise PickleError(f"it describes {fqn!r} in an unknown way")
        known = BY_NAME.get(dtype.name)
        if known is None:
            raise PickleError(f"tensor {fqn!r} is of the unknown dtype {shown(dtype)}")
        chunks = state.get("chunks")
        if not isinstance(chunks, list) or not all(isinstance(one, Instance) for one in chunks):
            raise PickleError("it describes chunks in an unknown way")
        # A list of chunks may be shared by many tensors: its pickle is short, this is not.
        self._allowance.spend(200 * len(chunks) + 500)
        self.sizes[fqn] = _size(state.get("size"))
        self.dtypes[fqn] = known
        self._offsets[fqn] = [
            (_size(_table(chunk.state).get("offsets")), _size(_table(chunk.state).get("sizes")))
            for chunk in chunks
        ]

    def by_file(self) -> dict[str, list[Chunk]]:
        """Return all chunks and objects, by the name of the file that holds them."""
        files: dict[str, list[Chunk]] = {}
        for key, value in self._stored.items():
            index, place = _attributes(key), _attributes(value)
            entry = index.get("fqn"), *map(place.get, ("relative_path", "offset", "length"))
            match entry:
                case str() as fqn, str() as name, int() as at, int() as size if min(at, size) >= 0:
                    pass
                case _:
                    raise PickleError("it describes where a chunk lies in an unknown way")
            # Names of extensions such as compression, which only torch can undo.
            if place.get("transform_descriptors"):
                hint = "convert the checkpoint: python -m torch.distributed.checkpoint"
                hint += ".format_utils dcp_to_torch DIRECTORY OUTPUT.pt"
                raise MergeError(f"the chunks of {fqn!r} are compressed", hint=hint)
            offset = None if index.get("offset") is None else _size(index["offset"])
            files.setdefault(name, []).append(Chunk(fqn, offset, at, size))
        return files

    def others(self) -> tuple[str, ...]:
        """Return the top-level keys of entries that are not tensors."""
        return tuple(str(self._path(fqn)[0]) for fqn in self._objects)

    def _path(self, fqn: str) -> TreePath:
        match self._paths.get(fqn):
            case tuple() as path if 1 < len(path) < _LONGEST_PATH and all(map(_is_key, path)):
                return path
        # Some writers flatten the names themselves: optimizer.state.exp_avg.WEIGHT.
        head, _, rest = fqn.partition(".")
        return (head, rest) if rest and is_kept(head) else (fqn,)

    def tensor(
        self, fqn: str, stored: Mapping[tuple[str, tuple[int, ...]], TensorInfo]
    ) -> TensorInfo:
        """Return a tensor over the storages of its chunks, found by name and offset."""
        shape, dtype = self.sizes[fqn], self.dtypes[fqn]
        chunks: list[tuple[tuple[int, ...], TensorInfo]] = []
        for offset, size in self._offsets[fqn]:
            info = stored.get((fqn, offset))
            if info is None or info.shape != size or info.dtype != dtype:
                raise PickleError(f"a chunk of {fqn!r} is missing or of another shape or dtype")
            chunks.append((offset, info))
        boxes = [(start, info.shape) for start, info in chunks if info.numel]
        if not chunks or not tile(boxes, shape):
            raise PickleError(f"the chunks of {fqn!r} do not make up the tensor")
        path = self._path(fqn)
        # One chunk is the tensor itself, with whatever strides it was saved with.
        if len(chunks) == 1:
            return replace(chunks[0][1], path=path)
        chunks.sort(key=lambda chunk: chunk[0])
        whole = Storage(fqn, 0, math.prod(shape) * dtype.itemsize)
        # Cut along the first dimension, as FSDP does, the chunks are the bytes of the tensor one
        # after the other, and need no copy in the order of the whole.
        rows = all(
            info.contiguous
            and info.shape[1:] == shape[1:]
            and not info.start
            and info.storage.nbytes == info.numel * dtype.itemsize
            for _, info in chunks
        )
        if rows:
            whole = replace(whole, parts=tuple(info.storage for _, info in chunks))
        else:
            whole = replace(whole, tiles=tuple(chunks))
        return TensorInfo(path, dtype, shape, row_major(shape), 0, whole)


def _nothing(_: Value) -> Value:
    raise PickleError("it refers to something outside of it")


def _call(function: Global, args: tuple[Value, ...]) -> Value | None:
    return _size(args[0] if args else ()) if function == _TORCH_SIZE else None


def _size(value: Value) -> tuple[int, ...]:
    match value:
        case Instance(function=Global("torch", "Size"), args=(value, *_)):
            pass
    if impossible(value, value, 0, 1 << 63):
        raise PickleError("a shape in it is damaged")
    return tuple(value)


def _is_key(key: Value) -> bool:
    return isinstance(key, str) or (isinstance(key, int) and key.bit_length() <= 64)


def _table(value: Value) -> dict[Value, Value]:
    if not isinstance(value, dict):
        raise PickleError("it describes the checkpoint in an unknown way")
    return value


def _attributes(value: Value) -> dict[Value, Value]:
    return _table(value.state if isinstance(value, Instance) else value)


def tile(boxes: Sequence[Box], shape: tuple[int, ...]) -> bool:
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
    corners: Counter[tuple[int, ...]] = Counter()
    whole: Box = ((0,) * len(shape), shape)
    for sign, (offset, size) in [(-1, whole), *((1, box) for box in boxes)]:
        for ends in itertools.product((0, 1), repeat=len(cut)):
            corner = tuple(offset[d] + end * size[d] for d, end in zip(cut, ends, strict=True))
            corners[corner] += sign * (-1) ** sum(ends)
    return not any(corners.values())
