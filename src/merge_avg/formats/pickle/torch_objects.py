"""The checkpoint that a pickle of torch.save describes: its tensors, storages and scalars.

    pickle  --load-->  a tree of values  --tree-->  paths and tensors, on storages by key
                       (hooks: tensors)             |
                                                    `--placed-->  the same, on bytes of a file

A zip archive and a legacy file keep the bytes of storages in different places; `placed` asks them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from merge_avg.checkpoint import ClassSpan, DType, Scalar, Storage, TensorInfo, TreePath, dotted
from merge_avg.errors import MergeError
from merge_avg.formats.pickle.allowance import Allowance
from merge_avg.formats.pickle.load import load
from merge_avg.formats.pickle.tensors import Stored, Tensor, TorchHooks
from merge_avg.formats.pickle.tree import key_of, paid, scalars_near, tensors_below
from merge_avg.formats.pickle.values import Instance, Value, shown

# Returns the storage of a key that holds so many bytes of a dtype, or raises MergeError.
Find = Callable[[str, int, DType | None], Storage]


@dataclass(frozen=True)
class Objects:
    """The content of a pickle.

    Attributes:
        tensors: with their paths; the names of their storages are the pickle's keys.
        storages: by key; the place of their bytes is not known yet.
        others: top-level keys without tensors.
        kind: of the root: "a dict", "a list", "a tensor", or "an object of CLASS".
        classes: each place where the pickle names the class of a storage.
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
        """Return the tensors over the storages of a file."""
        found = {
            key: find(key, stored.storage.nbytes, stored.dtype)
            for key, stored in self.storages.items()
        }
        # Spelled out: dataclasses.replace takes three times as long, for each of many tensors.
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


@lru_cache(maxsize=1)
def read_objects(data: bytes, density: float = 1.0) -> Objects:
    """Read a pickle of torch without running it.

    Checkpoints of one run often have the same pickle to the byte: the last one is remembered.

    Args:
        data: the pickle.
        density: how much each byte of it counts, see `Allowance`.

    Raises:
        MergeError: the pickle is damaged or dangerous, or a tensor reaches outside its storage.
    """
    return objects_at(data, 0, density)


def objects_at(data: bytes, start: int, density: float = 1.0) -> Objects:
    """Read a pickle that begins at byte `start`, as `read_objects`, without remembering it."""
    allowance = Allowance(density)
    hooks = TorchHooks(allowance)
    loaded = load(data, start, persistent=hooks.persistent, call=hooks.call, allowance=allowance)
    infos = []
    for path, tensor in tensors_below(loaded.value, allowance):
        info = tensor.info
        allowance.spend(150 + 8 * len(path))
        info = TensorInfo(
            path, info.dtype, info.shape, info.stride, info.start, info.storage, info.trouble
        )
        # Torch would refuse it too, but only when it loads the file.
        reach = info.stop * info.dtype.itemsize if info.numel else 0
        if not info.trouble and reach > info.storage.nbytes:
            name = dotted(path)
            raise MergeError(f"tensor {name!r} reaches outside its storage {info.storage.name!r}")
        infos.append(info)
    root = loaded.value
    with_tensors = {info.path[0] for info in infos if info.path}
    others: tuple[str, ...] = ()
    if isinstance(root, dict):
        keys = (key for key in map(key_of, root) if key not in with_tensors)
        others = tuple(paid(str(key), allowance) for key in keys)
    return Objects(
        tuple(infos),
        hooks.storages,
        others,
        _kind(root),
        tuple(hooks.classes),
        loaded.frames,
        loaded.nbytes,
        tuple(scalars_near(root)),
    )


def _kind(root: Value) -> str:
    match root:
        case Tensor():
            return "a tensor"
        case dict():
            return "a dict"
        case list() | tuple():
            return "a list"
        case Instance():
            return f"an object of {shown(root.function)}"
    return f"a {type(root).__name__}"


def refuse_root(objects: Objects, path: Path) -> None:
    """Raise MergeError for a pickle that is one tensor, or one rank's part of a checkpoint."""
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
    # DeepSpeed leaves a placeholder of shape (0,) for each parameter that ZeRO-3 has partitioned.
    module = [info for info in tensors if info.path[0] == "module"]
    return bool(module) and all(info.shape == (0,) for info in module)
