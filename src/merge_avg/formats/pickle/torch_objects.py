"""The checkpoint that a pickle of torch.save describes: its tensors, storages and scalars.

    {"epoch": 3,                            ("epoch",)                   a scalar
     "model": {"conv.weight": tensor},      ("model", "conv.weight")     a tensor
     "ema": [tensor],                       ("ema", 0)
     "net": an nn.Module}                   ("net", "conv.weight")       as its state dict names it

What lies in an object's state or arguments counts as lying in the object. The tree may have loops,
and may share parts, so that it unfolds to far more than was read: each step costs something.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from weakref import WeakValueDictionary

from merge_avg.checkpoint import (
    ATTRIBUTES,
    ClassSpan,
    DType,
    Scalar,
    Storage,
    TensorInfo,
    TreePath,
    dotted,
)
from merge_avg.errors import MergeError
from merge_avg.formats.pickle.load import load
from merge_avg.formats.pickle.numpy_objects import digest_of, number_of
from merge_avg.formats.pickle.tensors import NOWHERE, Stored, Tensor, TorchHooks, unusual
from merge_avg.formats.pickle.values import Allowance, Instance, PickleError, Value, shown
from merge_avg.formats.refused import one_rank

_INNER = (dict, list, tuple, Instance)  # values that have others inside
_SETS = (set, frozenset)
_HELD = (Tensor, Stored, *_SETS, *_INNER)  # values that are a tensor, or may lead to one
_DEEPEST = 200
_VISIT = 20  # bytes that one step through the tree costs
_MOST_PARTS = 100  # of a call that makes one tensor, and of each of its arguments
_PARAMETERS = ("Parameter", "_rebuild_parameter", "_rebuild_parameter_with_state")
_OPENED = 300  # bytes that a look into an object costs
_MODULE = ("_parameters", "_buffers", "_modules")  # in the state of a pickled nn.Module

# Scalars are a courtesy: the search for them stops early rather than late.
_DEEPEST_SCALAR = 6
_MOST_SCALARS = 1000
_MOST_CHILDREN = 10_000
_MOST_VISITS = 200_000
_LONGEST_TEXT = 200
_MOST_ARRAYS = 5000  # of NumPy, below the root

_Children = Iterator[tuple[str | int, Value]]
_Level = tuple[TreePath, Value, _Children]  # a value that is being walked through


@dataclass(frozen=True)
class Objects:
    """The content of a pickle of `nbytes`; `classes` and `frames` are for a copy, see `Archive`."""

    tensors: tuple[TensorInfo, ...]  # on storages that have the pickle's keys as names
    storages: Mapping[str, Stored]  # by key, without a place in a file
    others: tuple[str, ...]  # top-level keys without tensors
    classes: tuple[ClassSpan, ...]
    frames: tuple[int, ...]
    nbytes: int
    scalars: tuple[tuple[TreePath, Scalar], ...]  # that lie beside the tensors
    callables: tuple[str, ...]  # that a loader calls, and that are not known to be inert
    optimizers: tuple[TreePath, ...]  # dicts, or objects, with `state` beside `param_groups`
    arrays: tuple[tuple[TreePath, str], ...]  # of NumPy, with a digest of each

    def placed(self, find: Callable[[str, int, DType | None], Storage]) -> tuple[TensorInfo, ...]:
        """Return the tensors over the storages of a file.

        `find` returns the storage of a key that holds so many bytes of a dtype, or raises.
        """
        all_stored = self.storages.items()
        found = {key: find(key, one.storage.nbytes, one.dtype) for key, one in all_stored}
        return tuple(_moved(i, i.path, found.get(i.storage.name, i.storage)) for i in self.tensors)


# dataclasses.replace takes three times as long, for each of many tensors.
def _moved(i: TensorInfo, path: TreePath, storage: Storage) -> TensorInfo:
    more = i.trouble, i.learned, i.shard
    return TensorInfo(path, i.dtype, i.shape, i.stride, i.start, storage, *more)


def objects_at(data: bytes, start: int = 0, density: float = 1.0) -> Objects:
    """Read the pickle of torch that begins at byte `start`, without running it."""
    allowance = Allowance(density)
    hooks = TorchHooks(allowance)
    loaded = load(data, start, persistent=hooks.persistent, call=hooks.call, allowance=allowance)
    root, infos = loaded.value, []
    optimizers: list[TreePath] = []
    arrays: list[tuple[TreePath, str]] = []
    for path, value in values_below(root, allowance):
        if isinstance(value, Tensor):
            allowance.spend(150 + 8 * len(path))
            info = _moved(value.info, path, value.info.storage)
            # Torch would refuse it too, but only when it loads the file.
            if info.storage is not NOWHERE and value.reach > info.storage.nbytes:
                what = f"tensor {dotted(path)!r} reaches outside its storage {info.storage.name!r}"
                raise MergeError(what, tensor=dotted(path))
            infos.append(info)
        elif _is_optimizer(value):
            allowance.spend(150 + 8 * len(path))
            optimizers.append(path)
        elif (
            isinstance(value, Instance)
            and len(arrays) < _MOST_ARRAYS
            and (digest := digest_of(value, allowance))
        ):
            allowance.spend(250 + 8 * len(path))
            arrays.append((path, digest))
    with_tensors = {info.path[0] for info in infos if info.path}
    keys = map(key_of, root) if isinstance(root, dict) else ()
    others = tuple(_paid(key, allowance) for key in keys if key not in with_tensors)
    pickled = tuple(hooks.classes), loaded.frames, loaded.nbytes
    found = tuple(scalars_near(root)), loaded.callables
    held = tuple(optimizers), tuple(arrays)
    return Objects(tuple(infos), hooks.storages, others, *pickled, *found, *held)


# Checkpoints of one run often have the same pickle to the byte.
_KNOWN: WeakValueDictionary[tuple[bytes, int, float], Objects] = WeakValueDictionary()


def read_objects(data: bytes, start: int = 0, density: float = 1.0) -> Objects:
    """Do what `objects_at` does, once for the same bytes while its result is in use."""
    known = _KNOWN.get((data, start, density))
    if known is None:
        known = _KNOWN[data, start, density] = objects_at(data, start, density)
    return known


def sharing(objects: Objects, other: Objects) -> Objects:
    """Return objects that share their tensors with others, if these have the same."""
    # Such as those of the next epoch: numbers beside the tensors are what differs.
    if objects.tensors is other.tensors or objects.tensors != other.tensors:
        return objects
    # True is equal to 1, and 1.0 too, but they are other names.
    keys = {type(key) for one in (objects, other) for info in one.tensors for key in info.path}
    if not keys <= {str, int}:
        return objects
    pairs = zip(objects.storages.items(), other.storages.items(), strict=False)
    same = len(objects.storages) == len(other.storages) and all(
        (key, one.dtype, one.storage) == (other_key, two.dtype, two.storage)
        for (key, one), (other_key, two) in pairs
    )
    return replace(objects, tensors=other.tensors, storages=other.storages) if same else objects


def refuse_root(objects: Objects, path: Path) -> None:
    """Raise MergeError for a pickle that is one tensor, or one rank's part of a checkpoint."""
    if any(not info.path for info in objects.tensors):
        hint = "pass checkpoints that hold a state dict: a dict of names and tensors"
        raise MergeError("it holds a single tensor without a name", where=path, hint=hint)
    parts = [one for one in objects.tensors if (one.trouble or "").startswith("one rank's")]
    if any(one.shard is None for one in parts):
        raise one_rank(path)


def values_below(root: Value, allowance: Allowance) -> Iterator[tuple[TreePath, Value]]:
    """Yield every tensor, container and object below `root` with its path, in order."""
    yield (), root
    if not isinstance(root, _INNER):
        return
    # A stack of iterators instead of recursion: Python's own stack is too small for a tree that
    # is deep on purpose, and a loop is found by the objects above.
    above = {id(root)}
    levels: list[_Level] = [((), root, _children(root, allowance))]
    foreign: set[TreePath] = set()
    while levels:
        path, owner, children = levels[-1]
        for key, child in children:
            allowance.spend(_VISIT)
            if not isinstance(child, _HELD):
                continue
            below = (*path, key)
            found: Value = child
            if isinstance(child, Instance):
                found = _only_tensor(child) or child
            elif isinstance(child, Stored):
                below, what = _foreign(levels, key)
                found = None if below in foreign else unusual(what, 0)
                foreign.add(below)
            elif isinstance(child, Tensor) and isinstance(owner, _SETS):
                found = unusual("a tensor in a set, which has no order", 0)
            elif isinstance(child, Tensor) and _is_changed(child):
                found = unusual("a tensor that a state of its own changes", 0)
            if isinstance(found, Tensor):
                yield below, found
                below, found = (*below, ATTRIBUTES), found.state
            if isinstance(found, _HELD) and id(found) not in above:
                if len(levels) == _DEEPEST:
                    raise PickleError(f"its objects are nested more than {_DEEPEST} deep")
                above.add(id(found))
                yield below, found
                levels.append((below, found, _children(found, allowance)))
                break
        else:
            levels.pop()
            above.discard(id(owner))


def _foreign(levels: Sequence[_Level], key: str | int) -> tuple[TreePath, str]:
    """Return the path of a storage that no tensor is known to view, and what it is.

    One among the arguments of a call stands for what the call makes. The shape of what it returns
    is unknown, and is not that of a single number, which may be a counter.
    """
    last: str | int = key
    for path, owner, _ in reversed(levels):
        if isinstance(owner, Instance):
            if isinstance(last, int) and path:
                return path, f"a tensor rebuilt by the unknown {shown(owner.function)}"
            break
        last = path[-1] if path else ""
    return (*levels[-1][0], key), "a bare storage"


def _is_changed(tensor: Tensor) -> bool:
    # Tensor.__setstate__ takes a storage with sizes, or other data.
    state = tensor.state if isinstance(tensor.state, tuple) else ()
    return any(isinstance(one, Tensor | Stored) for one in state[:_MOST_PARTS])


def _only_tensor(value: Value) -> Tensor | None:
    """Return the tensor that a call is made of, as a subclass of Parameter is, if it has no other.

    Its name is that of the call: {"w": mylib.Weight(tensor)} is a weight "w".
    """
    learned = False
    for _ in range(_MOST_PARTS):
        if isinstance(value, Tensor):
            return value.parameter() if learned else value
        if not isinstance(value, Instance) or value.items or value.pairs:
            break
        args = value.args if isinstance(value.args, tuple) else (value.args,)
        held = [one for one in args[:_MOST_PARTS] if not _is_plain(one)]
        if len(held) != 1 or len(args) > _MOST_PARTS or not _is_plain(value.state):
            break
        learned |= getattr(value.function, "name", "") in _PARAMETERS
        (value,) = held
    return None


def _is_plain(value: Value) -> bool:
    """Return whether a value, which may be a small container, has no tensor in it."""
    if isinstance(value, (dict, list, tuple, *_SETS)):
        inside = value.values() if isinstance(value, dict) else value
        return len(inside) <= _MOST_PARTS and not any(isinstance(one, _HELD) for one in inside)
    return not isinstance(value, _HELD)


def _is_optimizer(value: Value) -> bool:
    # A torch.optim.Optimizer that was pickled whole has both in its state.
    held = value.state if isinstance(value, Instance) else value
    return isinstance(held, dict) and "state" in held and "param_groups" in held


def key_of(key: Value) -> str | int:
    """Return a dict's key as a part of a path."""
    small = isinstance(key, int) and key.bit_length() <= 64
    return key if small or isinstance(key, str) else shown(key)


def _paid(key: Value, allowance: Allowance, prefix: str = "") -> str:
    text = str(key_of(key))
    allowance.spend(100 + 4 * len(text))
    return prefix + text


def _children(value: Value, allowance: Allowance) -> _Children:
    opened: set[int] = set()
    pending = [value]
    while pending:
        one = pending.pop()
        allowance.spend(_VISIT)
        if isinstance(one, dict):
            yield from ((key_of(key), child) for key, child in one.items())
        elif isinstance(one, Instance) and _is_module(one):
            yield from _module(one, allowance)
        # An object has no order of its own: its state comes first, then its arguments and items.
        elif isinstance(one, Instance):
            if id(one) in opened:
                continue
            allowance.spend(_OPENED)
            opened.add(id(one))
            pending += (one.function, iter(one.pairs), one.items, one.args, one.state)
        elif isinstance(one, (list, tuple, *_SETS)):
            yield from enumerate(one)
        elif isinstance(one, Iterator):  # the entries of an object that may be a kind of dict
            yield from ((key_of(key), child) for key, child in one)


def _is_module(value: Value) -> bool:
    return (
        isinstance(value, Instance)
        and isinstance(value.state, dict)
        and all(isinstance(value.state.get(key), dict) for key in _MODULE)
    )


def _module(root: Instance, allowance: Allowance) -> Iterator[tuple[str, Value]]:
    """Yield a pickled nn.Module's tensors as its state dict names them, then its other attributes.

    Specification: torch/nn/modules/module.py, state_dict.
    """
    rest: dict[str, Value] = {}
    stack: list[tuple[str, Instance, frozenset[int]]] = [("", root, frozenset())]
    while stack:
        prefix, module, above = stack.pop()
        if id(module) in above or len(above) == _DEEPEST:
            what = f"its modules are parts of themselves, or nested more than {_DEEPEST} deep"
            raise PickleError(what)
        state = module.state
        # Buffers that the state dict leaves out are attributes like any other. Protocols below 4
        # write the set as a call, which is not looked into: there they count as saved.
        unsaved = state.get("_non_persistent_buffers_set")
        unsaved = unsaved if isinstance(unsaved, set) else set()
        inside = above | {id(module)}
        # Names take the most memory, since each begins with those of all the modules above.
        entries = sum(len(state[kind]) for kind in _MODULE)
        allowance.spend(_OPENED + (_VISIT + len(prefix)) * entries + 100 * len(inside))
        allowance.spend(_VISIT * len(state))
        for kind in ("_parameters", "_buffers"):
            for key, child in state[kind].items():
                name = _paid(key, allowance, prefix)
                if kind == "_buffers" and key in unsaved:
                    rest[name] = child
                else:
                    learned = kind == "_parameters" and isinstance(child, Tensor)
                    yield name, child.parameter() if learned else child
        for key, child in state.items():
            if key not in _MODULE and isinstance(child, _HELD) and child:
                rest[_paid(key, allowance, prefix)] = child
        modules = []
        for key, child in state["_modules"].items():
            name = _paid(key, allowance, prefix)
            if _is_module(child):
                modules.append((f"{name}.", child, inside))
            else:  # none, or one that a function of its own makes
                yield name, child
        stack += reversed(modules)
    yield ATTRIBUTES, rest


def scalars_near(root: Value) -> Iterator[tuple[TreePath, Scalar]]:
    """Yield numbers and short texts near the root, the nearest first."""
    level: list[tuple[TreePath, Value]] = [((), root)]
    left, visits = _MOST_SCALARS, _MOST_VISITS
    # Level by level: an epoch at the root counts more than numbers deep in an optimizer.
    for _ in range(_DEEPEST_SCALAR):
        below: list[tuple[TreePath, Value]] = []
        for path, value in level:
            for key, child in itertools.islice(_nearest(value), _MOST_CHILDREN):
                visits -= 1
                if (plain := _plain(child)) is not None:
                    yield (*path, key), plain
                    left -= 1
                elif len(below) < _MOST_SCALARS and isinstance(child, _INNER):
                    below.append(((*path, key), child))
                if not left or not visits:
                    return
        level = below


def _nearest(value: Value) -> _Children:
    """Yield what is in a value, and of a module with thousands of parts the first of them."""
    with contextlib.suppress(PickleError):
        yield from _children(value, Allowance(limit=_MOST_VISITS * _VISIT))


def _plain(value: Value) -> Scalar | None:
    match value:
        case int() if isinstance(value, bool) or value.bit_length() > 64:
            return None
        case str() if len(value) > _LONGEST_TEXT:
            return None
        case int() | float() | str():
            return value
        case Instance():
            return number_of(value)
    return None
