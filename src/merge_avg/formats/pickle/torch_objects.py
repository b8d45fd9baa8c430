"""What torch's pickles mean: storages, tensors, and the object tree that holds them.

The names are those of torch/_utils.py, torch/_tensor.py and torch/storage.py.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from merge_avg.checkpoint import (
    ATTRIBUTES,
    BY_NAME,
    BY_STORAGE,
    ClassSpan,
    DType,
    Scalar,
    Storage,
    TensorInfo,
    TreePath,
    dotted,
    impossible,
)
from merge_avg.errors import MergeError
from merge_avg.formats.pickle.machine import (
    Allowance,
    Global,
    InertDict,
    Instance,
    PickleError,
    Value,
    load,
    shown,
    table,
)

# Returns the storage of a key that holds so many bytes of a dtype, or raises MergeError.
Find = Callable[[str, int, DType | None], Storage]

_DEEPEST = 200
_DEEPEST_SCALAR = 6
_MOST_SCALARS = 1000
_MOST_CHILDREN = 10_000
_MOST_VISITS = 200_000  # in the search for scalars
_LONGEST_TEXT = 200
_NUMPY = {"f8": "<d", "f4": "<f", "i8": "<q", "i4": "<i"}  # codes of dtypes of its scalars
_VISIT = 20  # what one step through the tree spends
_LARGEST = 1 << 63  # what a number in a pickle of torch is less than
_NOWHERE = Storage("", 0, 0)
_UNKNOWN = DType("unknown", 1, "code")

_ORDERED_DICT = Global("collections", "OrderedDict")
_DEFAULT_DICT = Global("collections", "defaultdict")
_LOAD_FROM_BYTES = Global("torch.storage", "_load_from_bytes")

# Functions that rebuild tensors whose bytes are not plain numbers, and what these are called.
_UNUSUAL = {
    "_rebuild_sparse_tensor": "a sparse tensor",
    "_rebuild_sparse_csr_tensor": "a sparse tensor",
    "_rebuild_qtensor": "a quantised tensor",
    "_rebuild_nested_tensor": "a nested tensor",
    "_rebuild_meta_tensor_no_storage": "a meta tensor without data",
    "_rebuild_wrapper_subclass": "a tensor subclass without a storage of its own",
    "_rebuild_device_tensor_from_numpy": "a tensor of a device without storages",
    "_rebuild_device_tensor_from_cpu_tensor": "a tensor of a device without storages",
}


# Subclasses that wrap other tensors, by the module that they come from.
_WRAPPED = (
    (
        "torch.distributed",
        "one rank's part of a distributed tensor, not the whole",
    ),
    ("torch.nested", "a nested tensor"),
    ("torchao", "a tensor quantised by torchao"),
)


def _subclass(args: tuple[Value, ...]) -> str:
    name = shown(args[0])
    return next((what for start, what in _WRAPPED if name.startswith(start)), f"a {name}")


@dataclass(eq=False, slots=True)
class Stored:
    """A storage as a pickle names it; no dtype for an untyped one, whose size is in bytes.

    Its first element is number `start` of the record: not 0 for a view in an old legacy file.
    """

    dtype: DType | None
    storage: Storage
    start: int = 0


@dataclass(eq=False, slots=True)
class _Tensor:
    """A tensor in the object tree; its path is known only when the tree is complete."""

    info: TensorInfo


@dataclass(frozen=True)
class Objects:
    """What a pickle describes.

    Attributes:
        tensors: by their path; the names of their storages are the pickle's keys.
        storages: by key; where their bytes lie is not known yet.
        others: top-level keys without tensors.
        kind: what the root is: "a dict", "a list", "a tensor", or "an object of CLASS".
        classes: where it names the class of a storage.
        frames: where its FRAME opcodes start.
        nbytes: its size.
        scalars: numbers and short texts that lie beside the tensors, by their paths.
    """

    tensors: tuple[TensorInfo, ...]
    storages: Mapping[str, Stored]
    others: tuple[str, ...]
    kind: str
    classes: tuple[ClassSpan, ...]
    frames: tuple[int, ...]
    nbytes: int
    scalars: tuple[tuple[TreePath, Scalar], ...] = ()

    def placed(self, find: Find) -> tuple[TensorInfo, ...]:
        """The tensors over the storages of a file."""
        found = {
            key: find(key, stored.storage.nbytes, stored.dtype)
            for key, stored in self.storages.items()
        }
        return tuple(
            TensorInfo(
                info.path,
                info.dtype,
                info.shape,
                info.stride,
                info.start,
                found.get(info.storage.name, info.storage),
                info.trouble,
            )
            for info in self.tensors
        )


@dataclass
class _Reader:
    allowance: Allowance
    storages: dict[str, Stored] = field(default_factory=dict)
    classes: list[ClassSpan] = field(default_factory=list)
    names: dict[tuple[str, str], str] = field(default_factory=dict)

    def persistent(self, pid: Value) -> Value:
        if isinstance(pid, tuple) and len(pid) == 4 and pid[0] == "module":
            return pid[1]  # a legacy file keeps the source of a module's class beside it
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
            raise PickleError("the pickle refers to something that is no storage")
        cls, key, numel = pid[1], pid[2], pid[4]
        if not isinstance(cls, Global) or not _is_number(numel) or not isinstance(key, str | int):
            raise PickleError("the pickle describes a storage in an unknown way")
        key = shown(key)
        dtype = None
        if cls.name != "UntypedStorage":
            dtype = BY_STORAGE.get(cls.name)
            if dtype is None or cls.module not in ("torch", "torch.cuda", "torch.storage"):
                raise PickleError(f"storage {key!r} is of the unknown class {cls}")
        nbytes = numel * (dtype.itemsize if dtype else 1)
        stored = self.storages.get(key)
        self.allowance.used += 400 if stored is None else 200
        if stored is None:
            stored = self.storages[key] = Stored(dtype, Storage(key, 0, nbytes))
        elif stored.storage.nbytes != nbytes:
            raise PickleError(f"the pickle gives storage {key!r} two sizes")
        name = self.names.setdefault((cls.module, cls.name), f"{cls.module}\n{cls.name}")
        self.classes.append(ClassSpan(cls.start, cls.stop, name, key))
        start = 0
        match pid[5:]:
            case ((_, first, _),) if _is_number(first):
                start = first
            case ((_, _, _),):
                raise PickleError(f"storage {key!r} is a view of another in an unknown way")
        return (
            stored if (stored.dtype, start) == (dtype, 0) else Stored(dtype, stored.storage, start)
        )

    def call(self, function: Global, args: tuple[Value, ...]) -> Value | None:
        self.allowance.used += 120 if function == _ORDERED_DICT else 200
        if function == _ORDERED_DICT:
            return table(args[0], self.allowance) if args else InertDict()
        if function == _DEFAULT_DICT:
            return InertDict()
        if function == _LOAD_FROM_BYTES:
            hint = "load them with pickle and save them again with torch.save"
            raise PickleError("its tensors were pickled without torch.save", hint=hint)
        if function.module not in ("torch._utils", "torch._tensor"):
            return None
        if function.name in _UNUSUAL:
            return _strange(_UNUSUAL[function.name])
        match function.name, args:
            case "_rebuild_tensor", (stored, start, shape, stride, *_):
                return _tensor(stored, start, shape, stride, None, None)
            case "_rebuild_tensor_v2", (stored, start, shape, stride, _, _, *more):
                return _tensor(stored, start, shape, stride, None, more[0] if more else None)
            case "_rebuild_tensor_v3", (stored, start, shape, stride, _, _, dtype, *more):
                return _tensor(stored, start, shape, stride, dtype, more[0] if more else None)
            case "_rebuild_parameter" | "_rebuild_parameter_with_state", (_Tensor() as data, *_):
                return data
            case "_rebuild_from_type_v2", (Global() as inner, cls, tuple() as inner_args, *_):
                if inner.name == "_rebuild_wrapper_subclass":
                    return _strange(_subclass(inner_args or (cls,)))
                return self.call(inner, inner_args) or _strange(_subclass((cls,)))
        return None


def _strange(what: str) -> _Tensor:
    return _Tensor(TensorInfo((), _UNKNOWN, (), (), 0, _NOWHERE, what))


def _tensor(
    stored: Value, start: Value, shape: Value, stride: Value, dtype: Value, metadata: Value
) -> _Tensor:
    if not isinstance(stored, Stored):
        raise PickleError("a tensor is rebuilt from something that is no storage")
    element = stored.dtype
    if dtype is not None:
        element = BY_NAME.get(dtype.name) if isinstance(dtype, Global) else None
    if element is None:
        what = f"storage {stored.storage.name!r} holds the unknown dtype {shown(dtype)}"
        raise PickleError(what)
    start = start + stored.start if _is_number(start) else start
    held = stored.storage.nbytes // element.itemsize
    trouble = impossible(shape, stride, start, held)
    if trouble:
        raise PickleError(f"a tensor on storage {stored.storage.name!r} has {trouble}")
    bits = metadata if isinstance(metadata, dict) else {}
    flipped = [bit for bit in ("conj", "neg") if bits.get(bit)]
    trouble = f"a lazy view (its {flipped[0]} bit is set)" if flipped else None
    if element.kind == "code":
        trouble = f"a tensor of {element.name} codes"
    return _Tensor(
        TensorInfo((), element, tuple(shape), tuple(stride), start, stored.storage, trouble)
    )


def _is_number(value: Value) -> bool:
    return type(value) is int and 0 <= value < _LARGEST


@lru_cache(maxsize=1)
def read_objects(data: bytes, density: float = 1.0) -> Objects:
    """Reads torch's pickle without running it.

    Checkpoints of one run often have the same pickle to the byte: the last one is remembered.

    Args:
        data: the pickle.
        density: what each byte of it counts for, see `Allowance`.

    Raises:
        MergeError: the pickle is damaged or dangerous, or a tensor reaches outside its storage.
    """
    return objects_at(data, 0, density)


def objects_at(data: bytes, start: int, density: float = 1.0) -> Objects:
    """The same for a pickle that begins at byte `start`, without remembering it."""
    allowance = Allowance(density)
    reader = _Reader(allowance)
    loaded = load(data, start, persistent=reader.persistent, call=reader.call, allowance=allowance)
    infos = []
    for path, tensor in _walk(loaded.value, allowance):
        info = tensor.info
        allowance.spend(150 + 8 * len(path))
        info = TensorInfo(
            path, info.dtype, info.shape, info.stride, info.start, info.storage, info.trouble
        )
        reach = info.stop * info.dtype.itemsize if info.numel else 0
        if not info.trouble and reach > info.storage.nbytes:
            name = dotted(path)
            raise MergeError(f"tensor {name!r} reaches outside its storage {info.storage.name!r}")
        infos.append(info)
    root = loaded.value
    with_tensors = {info.path[0] for info in infos if info.path}
    others: tuple[str, ...] = ()
    if isinstance(root, dict):
        keys = (key for key in map(_key, root) if key not in with_tensors)
        others = tuple(_spent(str(key), allowance) for key in keys)
    return Objects(
        tuple(infos),
        reader.storages,
        others,
        _kind(root),
        tuple(reader.classes),
        loaded.frames,
        loaded.nbytes,
        tuple(_scalars(root)),
    )


def _kind(root: Value) -> str:
    match root:
        case _Tensor():
            return "a tensor"
        case dict():
            return "a dict"
        case list() | tuple():
            return "a list"
        case Instance():
            return f"an object of {shown(root.function)}"
    return f"a {type(root).__name__}"


def _walk(root: Value, allowance: Allowance) -> Iterator[tuple[TreePath, _Tensor]]:
    """Every tensor below `root` with its path, in order; objects count with their state."""
    if isinstance(root, _Tensor):
        yield (), root
        return
    above: set[int] = {id(root)}
    levels: list[tuple[TreePath, int, Iterator[tuple[str | int, Value]]]]
    levels = [((), id(root), _children(root, allowance))]
    while levels:
        path, owner, children = levels[-1]
        for key, child in children:
            allowance.spend(_VISIT)
            if isinstance(child, _Tensor):
                yield (*path, key), child
            elif isinstance(child, dict | list | tuple | Instance) and id(child) not in above:
                if len(levels) == _DEEPEST:
                    raise PickleError(f"its objects are nested more than {_DEEPEST} deep")
                above.add(id(child))
                levels.append(((*path, key), id(child), _children(child, allowance)))
                break
        else:
            levels.pop()
            above.discard(owner)


def _scalars(root: Value) -> Iterator[tuple[TreePath, Scalar]]:
    """Numbers and short texts that lie near the root, the nearest first."""
    level: list[tuple[TreePath, Value]] = [((), root)]
    left, visits = _MOST_SCALARS, _MOST_VISITS
    for _ in range(_DEEPEST_SCALAR):
        below: list[tuple[TreePath, Value]] = []
        for path, value in level:
            children = _children(value, Allowance(limit=_MOST_VISITS * _VISIT))
            for key, child in itertools.islice(children, _MOST_CHILDREN):
                visits -= 1
                plain = _plain(child)
                if plain is not None:
                    yield (*path, key), plain
                    left -= 1
                elif len(below) < _MOST_SCALARS and isinstance(
                    child, dict | list | tuple | Instance
                ):
                    below.append(((*path, key), child))
                if not left or not visits:
                    return
        level = below


def _plain(value: Value) -> Scalar | None:
    """A number or a short text, also as NumPy pickles numbers."""
    match value:
        case bool():
            return None
        case int() if value.bit_length() <= 64:
            return value
        case float():
            return value
        case str() if len(value) <= _LONGEST_TEXT:
            return value
        case Instance(
            function=Global(name="scalar"), args=(Instance(args=(str() as code, *_)), raw)
        ):
            raw = _encoded(raw)
            form = _NUMPY.get(code)
            if form is not None and len(raw) == struct.calcsize(form):
                number: int | float = struct.unpack(form, raw)[0]
                return number
    return None


def _encoded(value: Value) -> bytes:
    """Bytes, which old protocols of pickle hold as text that a codec turns into bytes."""
    match value:
        case bytes():
            return value
        case Instance(function=Global("_codecs", "encode"), args=(str() as text, "latin1")):
            return text.encode("latin1", "replace")
    return b""


def _key(key: Value) -> str | int:
    small = isinstance(key, int) and key.bit_length() <= 64
    return key if small or isinstance(key, str) else shown(key)


def _children(value: Value, allowance: Allowance) -> Iterator[tuple[str | int, Value]]:
    """What lies in a container; what lies in an object's state and arguments lies in the object."""
    opened: set[int] = set()
    pending = [value]
    while pending:
        one = pending.pop()
        allowance.spend(_VISIT)
        if isinstance(one, dict):
            yield from ((_key(key), child) for key, child in one.items())
        elif isinstance(one, Instance) and _is_module(one):
            yield from _module(one, allowance)
        elif isinstance(one, Instance):
            if id(one) in opened:
                continue
            allowance.spend(_OPENED)
            opened.add(id(one))
            pending += (_Pairs(one.pairs), one.items, one.args, one.state)
        elif isinstance(one, list | tuple):
            yield from enumerate(one)
        elif isinstance(one, _Pairs):
            yield from ((_key(key), child) for key, child in one.pairs)


@dataclass(frozen=True, slots=True)
class _Pairs:
    """What a pickle sets on an object that may be a kind of dict."""

    pairs: list[tuple[Value, Value]]


_OPENED = 300  # what looking into an object spends


def _is_module(value: Value) -> bool:
    return (
        isinstance(value, Instance)
        and isinstance(value.state, dict)
        and all(isinstance(value.state.get(key), dict) for key in _MODULE)
    )


_MODULE = ("_parameters", "_buffers", "_modules")


def _module(root: Instance, allowance: Allowance) -> Iterator[tuple[str, Value]]:
    """A pickled nn.Module's tensors by the names that its state dict has, then what else it holds.

    Source: torch/nn/modules/module.py, state_dict.
    """
    rest: dict[str, Value] = {}
    stack: list[tuple[str, Instance, frozenset[int]]] = [("", root, frozenset())]
    while stack:
        prefix, module, above = stack.pop()
        if id(module) in above or len(above) == _DEEPEST:
            what = f"its modules are parts of themselves, or nested more than {_DEEPEST} deep"
            raise PickleError(what)
        state = module.state
        unsaved = state.get("_non_persistent_buffers_set")
        unsaved = unsaved if isinstance(unsaved, set) else set()
        inside = above | {id(module)}
        # The names, which begin with those of all the modules above, take the most.
        entries = sum(len(state[kind]) for kind in _MODULE) + len(state)
        allowance.spend((_OPENED + len(prefix)) * entries + 100 * len(inside))
        for kind in ("_parameters", "_buffers"):
            for key, child in state[kind].items():
                name = f"{prefix}{_spent(str(_key(key)), allowance)}"
                if kind == "_buffers" and key in unsaved:
                    rest[name] = child
                else:
                    yield name, child
        for key, child in state.items():
            if key not in _MODULE and isinstance(child, _Tensor | dict | list | tuple | Instance):
                rest[f"{prefix}{_spent(str(_key(key)), allowance)}"] = child
        children = [
            (f"{prefix}{_spent(str(_key(key)), allowance)}.", child)
            for key, child in state["_modules"].items()
            if _is_module(child)
        ]
        stack += reversed([(name, child, inside) for name, child in children])
    yield ATTRIBUTES, rest


def _spent(text: str, allowance: Allowance) -> str:
    allowance.spend(100 + 4 * len(text))
    return text


def refuse_root(objects: Objects, path: Path) -> None:
    """Raises MergeError for a pickle that is one tensor, or one rank's part of a checkpoint."""
    if objects.kind == "a tensor":
        hint = "pass checkpoints that hold a state dict: a dict of names and tensors"
        raise MergeError("it holds a single tensor without a name", where=path, hint=hint)
    keys = {*objects.others, *(str(info.path[0]) for info in objects.tensors)}
    if {"ds_config", "ds_version"} & keys and _is_hollow(objects.tensors):
        hint = "gather them first: python zero_to_fp32.py CHECKPOINT_DIR OUTPUT_DIR"
        what = "a DeepSpeed ZeRO-3 file, whose weights are spread over the optimizer files"
        raise MergeError(what, where=path, hint=hint)
    if any(info.trouble and "distributed" in info.trouble for info in objects.tensors):
        hint = "save a full state dict (StateDictOptions(full_state_dict=True)), or use a directory"
        what = "it holds one rank's parts of distributed tensors"
        hint += " of torch.distributed.checkpoint"
        raise MergeError(what, where=path, hint=hint)


def _is_hollow(tensors: tuple[TensorInfo, ...]) -> bool:
    module = [info for info in tensors if info.path[0] == "module"]
    return bool(module) and all(info.shape == (0,) for info in module)
