"""The pickle of a set that says which chunks there are of each tensor, and where each lies.

    Metadata(state_dict_metadata={name: ...}, planner_data={name: path}, storage_data={...})

See the package for the whole of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from merge_avg.checkpoint import (
    BY_NAME,
    DType,
    TensorInfo,
    TreePath,
    impossible,
    kind_of,
)
from merge_avg.errors import MergeError
from merge_avg.formats.pickle.load import load
from merge_avg.formats.pickle.values import (
    Allowance,
    Global,
    InertDict,
    Instance,
    PickleError,
    Sized,
    Value,
    shown,
)
from merge_avg.formats.tiles import Box, Index, joined, tile

LARGEST = 1 << 27  # bytes of `.metadata`
_LONGEST_PATH = 200
_METADATA = Global("torch.distributed.checkpoint.metadata", "Metadata")
_TORCH_SIZE = Global("torch", "Size")

# The name of a tensor, the first corner of a chunk, and where in a file it starts and how long it
# is. The bytes of an object have no corner.
Chunk = tuple[str, Index | None, int, int]


@dataclass(frozen=True, slots=True)
class Placed:
    """A chunk, or the bytes of an object, and where a new set has it."""

    fqn: str
    corner: Index | None  # its first in the tensor
    shape: Index
    part_of: Index | None  # the first corner of the chunk that it was, or was cut from
    file: str
    offset: int
    nbytes: int


class SetMetadata:
    """The content of a `.metadata` file, checked."""

    def __init__(self, data: bytes) -> None:
        self._allowance = Allowance()
        loaded = load(data, persistent=_nothing, call=_call, allowance=self._allowance)
        root, self.callables = loaded.value, loaded.callables
        if not isinstance(root, Instance) or root.function != _METADATA:
            raise PickleError("it is not metadata of torch.distributed.checkpoint")
        self._root = root
        state = _table(root.state)
        self._places = _table(state.get("storage_data"))
        # Only the default planner writes the paths of names; see `path` for those of others.
        plan = state.get("planner_data")
        self._paths = plan if isinstance(plan, dict) else {}
        self.shapes: dict[str, Index] = {}
        self.paths: list[TreePath] = []  # of all entries
        self.others: list[str] = []  # top-level keys of those that are not tensors
        self.stored: dict[tuple[str, Index], TensorInfo] = {}  # chunks by name and first corner
        self._dtypes: dict[str, DType] = {}
        self._boxes: dict[str, list[Box]] = {}
        for fqn, entry in _table(state.get("state_dict_metadata")).items():
            self._add(fqn, entry)

    def _add(self, fqn: Value, entry: Value) -> None:
        if not isinstance(fqn, str) or not isinstance(entry, Instance):
            raise PickleError("it describes an entry in an unknown way")
        kind = entry.function.name if isinstance(entry.function, Global) else ""
        self.paths.append(self.path(fqn))
        if kind == "BytesStorageMetadata":
            self.others.append(str(self.paths[-1][0]))
            return
        state = _table(entry.state)
        dtype: Value = None
        # A tuple, as TensorProperties.__getstate__ makes it, or the attributes themselves.
        match state.get("properties"):
            case Instance(state=(dtype, *_) | {"dtype": dtype}):
                pass
        if kind != "TensorStorageMetadata" or not isinstance(dtype, Global):
            raise PickleError(f"it describes {fqn!r} in an unknown way", tensor=fqn)
        known = BY_NAME.get(dtype.name)
        if known is None:
            raise PickleError(f"tensor {fqn!r} is of the unknown dtype {shown(dtype)}", tensor=fqn)
        chunks = state.get("chunks")
        if not isinstance(chunks, list) or not all(isinstance(one, Instance) for one in chunks):
            raise PickleError("it describes chunks in an unknown way")
        # A list of chunks may be shared by many tensors: its pickle is short, this is not.
        self._allowance.spend(200 * len(chunks) + 500)
        self.shapes[fqn] = _size(state.get("size"))
        self._dtypes[fqn] = known
        self._boxes[fqn] = [
            (_size(_table(chunk.state).get("offsets")), _size(_table(chunk.state).get("sizes")))
            for chunk in chunks
        ]

    def by_file(self) -> dict[str, list[Chunk]]:
        """Return all chunks and objects, by the name of the file that holds them."""
        files: dict[str, list[Chunk]] = {}
        for key, value in self._places.items():
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
                raise MergeError(f"the chunks of {fqn!r} are compressed", hint=hint, tensor=fqn)
            corner = None if index.get("offset") is None else _size(index["offset"])
            files.setdefault(name, []).append((fqn, corner, at, size))
        return files

    def path(self, fqn: str) -> TreePath:
        """Return the path of a name in the state dict."""
        match self._paths.get(fqn):
            case tuple() as path if 1 < len(path) < _LONGEST_PATH and all(map(_is_key, path)):
                return path
        # Some writers flatten the names themselves: optimizer.state.exp_avg.WEIGHT.
        head, _, rest = fqn.partition(".")
        kind = kind_of(head)
        return (head, rest) if rest and kind and not kind.learned_too else (fqn,)

    def has(self, fqn: str) -> bool:
        """Return whether it describes an entry of this name."""
        return fqn in _table(_table(self._root.state)["state_dict_metadata"])

    def again(self, placed: Sequence[Placed], dtypes: Mapping[str, DType]) -> bytes:
        """Return the pickle of the same set with these chunks and objects only, and new dtypes."""
        from merge_avg.formats.pickle.again import pickled_again  # most runs write no set anew

        old = {self._index(key): (key, place) for key, place in self._places.items()}
        kept = dict.fromkeys(one.fqn for one in placed)
        cut = {one.fqn for one in placed if one.corner != one.part_of}
        entries, places = _table(_table(self._root.state)["state_dict_metadata"]), InertDict()
        boxes: dict[str, list[Value]] = {fqn: [] for fqn in kept}
        for one in placed:
            key, place = old[one.fqn, one.part_of]
            if one.fqn in cut:
                offset = {"offset": Sized(one.corner or ()), "index": None}
                key = _changed(key, offset)
                sizes = {"offsets": Sized(one.corner or ()), "sizes": Sized(one.shape)}
                boxes[one.fqn].append(_changed(self._pattern(one.fqn), sizes))
            there = {"relative_path": one.file, "offset": one.offset, "length": one.nbytes}
            places[key] = _changed(place, there)
        table = InertDict()
        for fqn in kept:
            entry, changes = entries[fqn], {}
            if fqn in dtypes:
                changes["properties"] = _converted(_attributes(entry)["properties"], dtypes[fqn])
            if fqn in cut:
                changes["chunks"] = boxes[fqn]
            table[fqn] = _changed(entry, changes) if changes else entry
        gone = entries.keys() - kept.keys()
        # Megatron adds tables by the same names, and may add what each rank planned to write: that
        # is no longer so.
        state = InertDict(
            (key, _without(value, gone))
            for key, value in _table(self._root.state).items()
            if not isinstance(value, list)
        )
        state |= {"state_dict_metadata": table, "storage_data": places}
        return pickled_again(Instance(self._root.function, self._root.args, state))

    def _index(self, key: Value) -> tuple[Value, Index | None]:
        index = _attributes(key)
        return index.get("fqn"), None if index.get("offset") is None else _size(index["offset"])

    def _pattern(self, fqn: str) -> Value:
        """Return some chunk of a tensor, as the pickle describes it."""
        entry = _table(_table(self._root.state)["state_dict_metadata"])[fqn]
        chunks = _attributes(entry)["chunks"]
        return chunks[0] if isinstance(chunks, list) else None

    @property
    def optimizers(self) -> tuple[TreePath, ...]:
        """Return the dicts that hold `state` and `param_groups`, or such names with dots."""
        state, groups = (
            {path[:n] for path in self.paths for n, key in enumerate(path) if _head(key) == word}
            for word in ("state", "param_groups")
        )
        return tuple(sorted(state & groups, key=str))

    def tensor(self, fqn: str) -> TensorInfo:
        """Return a tensor over the storages of its chunks, which are `stored` by now."""
        shape, dtype = self.shapes[fqn], self._dtypes[fqn]
        chunks: list[tuple[Index, TensorInfo]] = []
        for corner, size in self._boxes[fqn]:
            info = self.stored.get((fqn, corner))
            if info is None or info.shape != size or info.dtype != dtype:
                raise PickleError(f"a chunk of {fqn!r} is missing or of another shape or dtype")
            chunks.append((corner, info))
        boxes = [(corner, info.shape) for corner, info in chunks if info.numel]
        if not chunks or not tile(boxes, shape):
            raise PickleError(f"the chunks of {fqn!r} do not make up the tensor")
        path = self.path(fqn)
        return joined(fqn, path, dtype, shape, chunks)


def _changed(value: Value, changes: Mapping[str, Value]) -> Value:
    """Return an object like another, with other attributes."""
    if not isinstance(value, Instance):
        raise PickleError("it describes the checkpoint in an unknown way")
    return Instance(value.function, value.args, InertDict({**_table(value.state), **changes}))


def _converted(properties: Value, dtype: DType) -> Value:
    """Return properties of a tensor with another dtype; `SetMetadata` has read the old one."""
    named = Global("torch", dtype.name)
    match properties:
        case Instance(state=(_, *more)):
            return Instance(properties.function, properties.args, (named, *more))
    return _changed(properties, {"dtype": named})


def _without(value: Value, gone: AbstractSet[str]) -> Value:
    """Return a table without the entries of names that are gone; anything else as it is."""
    if not isinstance(value, dict):
        return value
    return InertDict((key, one) for key, one in value.items() if key not in gone)


def _nothing(_: Value) -> Value:
    raise PickleError("it refers to something outside of it")


def _call(function: Global, args: tuple[Value, ...]) -> Value | None:
    return Sized(_size(args[0] if args else ())) if function == _TORCH_SIZE else None


def _size(value: Value) -> Index:
    match value:
        case Instance(function=Global("torch", "Size"), args=(value, *_)):
            pass
    if impossible(value, value, 0, 1 << 63):
        raise PickleError("a shape in it is damaged")
    return tuple(value)


def _is_key(key: Value) -> bool:
    return isinstance(key, str) or (isinstance(key, int) and key.bit_length() <= 64)


def _head(key: str | int) -> str:
    return str(key).partition(".")[0]


def _table(value: Value) -> dict[Value, Value]:
    if not isinstance(value, dict):
        raise PickleError("it describes the checkpoint in an unknown way")
    return value


def _attributes(value: Value) -> dict[Value, Value]:
    return _table(value.state if isinstance(value, Instance) else value)
