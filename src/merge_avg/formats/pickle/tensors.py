r"""Storages and tensors, as torch pickles them: read, and written.

    ('storage', torch.FloatStorage, '0', 'cpu', 6)   BINPERSID
                |                   |           elements (bytes, for an UntypedStorage)
                class: the dtype    key: the bytes are record data/0 of a zip archive

    torch._utils._rebuild_tensor_v2(storage, start, shape, stride, requires_grad, hooks[, metadata])
    torch._utils._rebuild_tensor_v3(... hooks, dtype[, metadata])     on an UntypedStorage
    torch._utils._rebuild_parameter(tensor, requires_grad, hooks)

A function of another package is read like these where its arguments are.

A new state dict is written like this:

    80 02                                 PROTO 2
    ccollections\nOrderedDict\n ) R (     the state dict, and a mark for its entries
    X len 'weight'                        for each tensor: its name
    ctorch._utils\n_rebuild_tensor_v2\n (
      ( X 'storage' ctorch\nFloatStorage\n
      X '0' X 'cpu' J 6 t Q               a storage: its class, key and size
      J 0 ( J 2 J 3 t ( J 3 J 1 t         start, shape and strides
      89 ccollections\nOrderedDict\n ) R  no gradient, no hooks
    t R
    u .                                   set the entries, and STOP

Nothing is put into the memo: that costs a few bytes, and no reader needs it. Dtypes without a class
of storage are views of an UntypedStorage, by _rebuild_tensor_v3.

Specification: torch/_utils.py, torch/_tensor.py, torch/storage.py, and persistent_load in
torch/serialization.py; CPython's Lib/pickletools.py.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from merge_avg.checkpoint import (
    BY_NAME,
    BY_STORAGE,
    Archive,
    ClassSpan,
    DType,
    Layout,
    NewTensor,
    Shard,
    Storage,
    TensorInfo,
    impossible,
)
from merge_avg.errors import MergeError
from merge_avg.formats.pickle.machine import inert_dict
from merge_avg.formats.pickle.values import (
    Allowance,
    Global,
    InertDict,
    Instance,
    PickleError,
    Value,
    shown,
)

_VISIT = 20  # bytes that a look at a value costs
_MOST_MESH = 8  # dimensions of a mesh of ranks
_LARGEST = 1 << 63  # every number in a pickle of torch is smaller
NOWHERE = Storage("", 0, 0)  # of tensors without a storage of their own
_UNKNOWN = DType("unknown", 1, "code")

_ORDERED_DICT = Global("collections", "OrderedDict")
_EMPTY_DICT = b"ccollections\nOrderedDict\n)R"
_DEFAULT_DICT = Global("collections", "defaultdict")

# Functions that rebuild tensors whose bytes are not plain numbers, and what users call these.
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
# Subclasses that wrap other tensors, by the start of their module's name.
_WRAPPED = {
    "torch.distributed": "one rank's part of a distributed tensor, not the whole",
    "torch.nested": "a nested tensor",
    "torchao": "a tensor quantised by torchao",
}


@dataclass(eq=False, slots=True)
class Stored:
    """A storage as a pickle names it, by its key and without the place of its bytes."""

    dtype: DType | None  # None for an untyped storage
    storage: Storage
    start: int = 0  # its first element: not 0 for a view of another, as torch before 0.4 wrote them


@dataclass(eq=False, slots=True)
class Tensor:
    """A tensor in the object tree. Its path is known only when the tree is complete."""

    info: TensorInfo
    state: Value = None  # attributes of its own
    args: Value = None  # what it was made of, in which lists and dicts may change

    @property
    def reach(self) -> int:
        """Return how many bytes its storage has to have."""
        return self.info.stop * self.info.dtype.itemsize if self.info.numel else 0

    def parameter(self) -> Tensor:
        """Return the same tensor as a Parameter; others may view it as a plain one."""
        return Tensor(replace(self.info, learned=True), self.state)


@dataclass
class TorchHooks:
    """The hooks that make storages, here by key, and tensors of what a pickle would call."""

    allowance: Allowance
    storages: dict[str, Stored] = field(default_factory=dict)
    classes: list[ClassSpan] = field(default_factory=list)
    # One text for each class: a pickle of a million tensors names perhaps three.
    _names: dict[tuple[str, str], str] = field(default_factory=dict)

    def persistent(self, pid: Value) -> Value:
        """Return the storage that a persistent id describes."""
        if isinstance(pid, tuple) and len(pid) == 4 and pid[0] == "module":
            return pid[1]  # a legacy file keeps the source of a module's class beside it
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
            raise PickleError("the pickle refers to something that is not a storage")
        cls, key, numel = pid[1], pid[2], pid[4]
        if not isinstance(cls, Global) or not _is_number(numel) or not isinstance(key, str | int):
            raise PickleError("the pickle describes a storage in an unknown way")
        key = shown(key)
        dtype = BY_STORAGE.get(cls.name)
        # Files from other devices name their classes: torch.cuda.FloatStorage is the same bytes.
        known = dtype and cls.module in ("torch", "torch.cuda", "torch.storage")
        if not known and cls.name != "UntypedStorage":
            raise PickleError(f"storage {key!r} is of the unknown class {cls}")
        nbytes = numel * (dtype.itemsize if dtype else 1)
        stored = self.storages.get(key)
        self.allowance.used += 400 if stored is None else 200
        if stored is None:
            stored = self.storages[key] = Stored(dtype, Storage(key, 0, nbytes))
        elif stored.storage.nbytes != nbytes:
            raise PickleError(f"the pickle gives storage {key!r} two sizes")
        name = self._names.setdefault((cls.module, cls.name), f"{cls.module}\n{cls.name}")
        self.classes.append(ClassSpan(cls.start, cls.stop, name, key))
        start = 0
        match pid[5:]:
            case ((_, start, _),) if not _is_number(start):
                raise PickleError(f"storage {key!r} is a view of another in an unknown way")
        # Tensors of two dtypes may share the bytes of one storage.
        same = (stored.dtype, start) == (dtype, 0)
        return stored if same else Stored(dtype, stored.storage, start)

    def call(self, function: Global, args: tuple[Value, ...]) -> Value | None:
        """Return the dict or tensor that a call would make, or None for an unknown function."""
        # The name first: comparing all of it takes as long as the rest of this.
        ordered = function.name == "OrderedDict" and function == _ORDERED_DICT
        self.allowance.used += 120 if ordered else 200
        if ordered:
            return inert_dict(args[0], self.allowance) if args else InertDict()
        if function.name == "defaultdict" and function == _DEFAULT_DICT:
            return InertDict()
        # Another unknown call stays an Instance: a tensor among its arguments is still found.
        if function.module not in ("torch._utils", "torch._tensor"):
            return _like_torch(args, self.allowance)
        if function.name in _UNUSUAL:
            return unusual(_UNUSUAL[function.name])
        match function.name, args:
            case "_rebuild_tensor", (stored, start, shape, stride, *_):
                return _tensor(stored, start, shape, stride, None, None)
            case "_rebuild_tensor_v2", (stored, start, shape, stride, _, _, *more):
                return _tensor(stored, start, shape, stride, None, more[0] if more else None)
            case "_rebuild_tensor_v3", (stored, start, shape, stride, _, _, dtype, *more):
                return _tensor(stored, start, shape, stride, dtype, more[0] if more else None)
            case "_rebuild_parameter" | "_rebuild_parameter_with_state", (Tensor() as data, *more):
                return replace(data.parameter(), state=more[2] if more[2:] else data.state)
            case "_rebuild_from_type_v2", (Global() as inner, cls, tuple() as inner_args, *more):
                if inner.name == "_rebuild_wrapper_subclass":
                    what = _subclass(inner_args or (cls,))
                    self.allowance.used += 400
                    return rank_part(what, more[0] if more else None) or unusual(what)
                made = self.call(inner, inner_args) or unusual(_subclass((cls,)))
                return replace(made, state=more[0]) if more and isinstance(made, Tensor) else made
        return None


def unusual(what: str, *shape: int) -> Tensor:
    """Return a tensor that cannot be averaged, and why; it is an error only among the weights."""
    return Tensor(TensorInfo((), _UNKNOWN, shape, shape, 0, NOWHERE, what))


def rank_part(what: str, state: Value) -> Tensor | None:
    """Return the part of a DTensor that its file holds, by the attributes that were pickled."""
    match state:  # attributes in slots come second, in a tuple
        case (None, dict() as slots):
            state = slots
    match state:
        case {"_local_tensor": Tensor() as local, "_spec": Instance(state=dict() as spec)}:
            pass
        case _:
            return None
    info, shape = local.info, _meta_shape(spec.get("tensor_meta"))
    dims: list[int | None] = []
    placements = spec.get("placements")
    if shape is None or info.trouble or not isinstance(placements, list | tuple):
        return None
    for one in placements[:_MOST_MESH]:
        match one:
            case Instance(function=Global(name="Replicate")):
                dims.append(None)
            case Instance(function=Global(name="Shard"), state={"dim": int() as dim}) if (
                -len(shape) <= dim < len(shape)
            ):
                dims.append(dim % len(shape))
            case _:
                return None
    place: tuple[int, ...] | None = None
    match spec.get("mesh"):
        case Instance(state={"_coordinate_on_dim": list() | tuple() as found}):
            if len(found) == len(placements) and all(map(_is_number, found)):
                place = tuple(found)
    shard = Shard(shape, tuple(dims), place)
    return Tensor(replace(info, trouble=what, shard=shard))


def _meta_shape(meta: Value) -> tuple[int, ...] | None:
    """Return the shape in the TensorMeta of a DTensor: a named tuple of shape, stride and dtype."""
    match meta:
        case Instance(args=(size, *_)):
            pass
        case _:
            return None
    match size:
        case Instance(function=Global("torch", "Size"), args=(size, *_)):
            pass
    return None if impossible(size, size, 0, _LARGEST) else tuple(size)


def _like_torch(args: tuple[Value, ...], allowance: Allowance) -> Tensor | None:
    """Return the tensor that an unknown function makes, if its arguments are those of torch's.

    Those of torch_npu have a format of the device's memory behind them, fastai's a class in front.
    """
    at = next((k for k, one in enumerate(args) if isinstance(one, Stored)), len(args))
    if len(args) < at + 4:
        return None
    stored, start, *sizes = args[at : at + 4]
    size = Global("torch", "Size")
    shape, stride = (
        one.args[0] if isinstance(one, Instance) and one.function == size and one.args else one
        for one in sizes
    )
    others = [*args[:at], *args[at + 4 :]]
    for one in [one for one in others if isinstance(one, dict | list | tuple)]:
        allowance.spend(_VISIT * len(one))
        others += one.values() if isinstance(one, dict) else one
    dtypes = [one for one in others if isinstance(one, Global) and one.name in BY_NAME]
    bits = next((one for one in others if isinstance(one, dict) and one), None)
    try:
        tensor = _tensor(stored, start, shape, stride, dtypes[0] if dtypes else None, bits)
    except PickleError:
        return None
    # A scale, or more tensors, give the numbers another meaning; where those have 8 bits, any
    # other number may.
    odd: set[type] = {float, Stored, Tensor, Instance}
    if tensor.info.dtype.kind == "int" and tensor.info.dtype.itemsize == 1:
        odd |= {int, str}
    plain = len(dtypes) < 2 and odd.isdisjoint(map(type, others))
    same = stored.dtype in (None, tensor.info.dtype)
    return tensor if plain and same and tensor.reach <= stored.storage.nbytes else None


def _subclass(args: tuple[Value, ...]) -> str:
    name = shown(args[0])
    return next((what for start, what in _WRAPPED.items() if name.startswith(start)), f"a {name}")


def _tensor(
    stored: Value, start: Value, shape: Value, stride: Value, dtype: Value, metadata: Value
) -> Tensor:
    if not isinstance(stored, Stored):
        raise PickleError("a tensor is rebuilt from something that is not a storage")
    name = stored.storage.name
    element = BY_NAME.get(dtype.name) if isinstance(dtype, Global) else None
    element = stored.dtype if dtype is None else element
    if element is None:
        raise PickleError(f"storage {name!r} holds the unknown dtype {shown(dtype)}")
    start = start + stored.start if _is_number(start) else start
    trouble = impossible(shape, stride, start, stored.storage.nbytes // element.itemsize)
    if trouble:
        raise PickleError(f"a tensor on storage {name!r} has {trouble}")
    # Conjugation and negation may be pending: then the bytes are not yet those of the tensor.
    for bit in ("conj", "neg"):
        if isinstance(metadata, dict) and metadata.get(bit):
            trouble = trouble or f"a lazy view (its {bit} bit is set)"
    if element.kind == "code":
        trouble = f"a tensor of {element.name} codes"
    shape, stride = tuple(shape), tuple(stride)
    return Tensor(TensorInfo((), element, shape, stride, start, stored.storage, trouble))


def _is_number(value: Value) -> bool:
    return type(value) is int and 0 <= value < _LARGEST


def with_classes(layout: Layout, archive: Archive, changed: Mapping[str, DType]) -> bytes:
    """Return a checkpoint's pickle with new dtypes for some storages, by their names."""
    # A frame tells the length of what follows, which changes. Readers need no frames: without them
    # they read opcode by opcode.
    edits = [(at, at + 9, b"") for at in archive.frames]
    # Every class is spelled out where it was put on the stack, since a memo entry can serve
    # storages that change and storages that do not.
    for span in archive.classes:
        cls, name = span.cls, f"{archive.prefix}{span.storage}"
        if name in changed:
            storage = changed[name].storage
            if storage is None or cls.endswith("UntypedStorage"):
                what = f"the dtype of record {name!r} cannot be changed in a copy of it"
                hint = "write a bare state dict with --weights-only, or a .safetensors file"
                raise MergeError(what, where=layout.path, hint=hint)
            cls = f"torch\n{storage}"
        edits.append((span.start, span.stop, f"c{cls}\n".encode()))
    parts, at = [], 0
    for start, stop, new in sorted(edits):
        parts += [archive.pickle[at:start], new]
        at = stop
    return b"".join([*parts, archive.pickle[at:]])


def _text(value: str) -> bytes:
    raw = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def _int(value: int) -> bytes:
    # LONG1 holds up to 255 bytes; the shapes, strides and sizes here need at most 9.
    if value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    raw = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def _ints(values: Sequence[int]) -> bytes:
    return b"(" + b"".join(map(_int, values)) + b"t"


def pickled(tensors: Sequence[NewTensor], keys: Mapping[str, str]) -> bytes:
    """Return a state dict as torch.save pickles it; `keys` are those of its storages, by name."""
    parts = [b"\x80\x02", _EMPTY_DICT, b"("]
    for tensor in tensors:
        parts += [_text(tensor.name), _rebuilt(tensor, keys)]
    return b"".join([*parts, b"u."])


def pickled_tensor(tensor: NewTensor, keys: Mapping[str, str]) -> bytes:
    """Return the same of one tensor that is all there is."""
    return b"\x80\x02" + _rebuilt(tensor, keys) + b"."


def _rebuilt(tensor: NewTensor, keys: Mapping[str, str]) -> bytes:
    size, typed = tensor.storage_nbytes, tensor.dtype.storage is not None
    cls = f"ctorch\n{tensor.dtype.storage}\n" if typed else "ctorch.storage\nUntypedStorage\n"
    count = size // tensor.dtype.itemsize if typed else size
    parts = [
        f"ctorch._utils\n_rebuild_tensor_v{2 if typed else 3}\n(".encode(),
        b"(" + _text("storage") + cls.encode(),
        _text(keys[tensor.storage]) + _text("cpu") + _int(count) + b"tQ",
        _int(tensor.start) + _ints(tensor.shape) + _ints(tensor.stride),
        b"\x89" + _EMPTY_DICT,
        b"" if typed else f"ctorch\n{tensor.dtype.name}\n".encode(),
        b"tR",
    ]
    return b"".join(parts)
