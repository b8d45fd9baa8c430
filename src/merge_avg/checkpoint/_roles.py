"""The roles of tensors: which are weights, and which are kept as the template has them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from merge_avg.checkpoint._layout import Layout, TensorInfo, TreePath, dotted
from merge_avg.checkpoint._reasons import Reason, Reasons, kind_of
from merge_avg.errors import MergeError, named

UNASKED = "it is not below --key"  # the text of the reason of what may well be a weight


class Name(NamedTuple):  # tables of all tensors go by it, so that hashing it has to be quick
    """The name of a weight: the state dict it lies in, and its key there."""

    state_dict: TreePath
    key: str

    def __str__(self) -> str:
        return dotted((*self.state_dict, self.key))


@dataclass(frozen=True)
class Kept:
    """Tensors below one key that are not averaged: how many, their bytes, and why."""

    key: str
    tensors: int
    nbytes: int
    reason: str  # of the first of them


@dataclass(frozen=True)
class Roles:
    """The weights of a checkpoint by name, in its order, and a summary of all that is kept."""

    weights: dict[Name, TensorInfo]
    kept: tuple[Kept, ...]
    reasons: Mapping[TreePath, Reason] = field(default_factory=dict)  # of all that is kept

    def promoted(self, layout: Layout, paths: Collection[TreePath]) -> Roles:
        """Return the same with some tensors that were kept among the weights, behind the others."""
        more = {_name(info): info for info in layout.tensors if info.path in paths}
        why = {path: reason for path, reason in self.reasons.items() if path not in paths}
        return Roles(self.weights | more, tuple(_summary(layout.tensors, why)), why)


def assign(layout: Layout, key: str | None = None) -> Roles:
    """Return the roles of tensors, where those below the dotted path `key`, if any, are weights.

    MergeError where there are no weights, none below `key`, or two of the same name.
    """
    reasons = Reasons(layout)
    found = {info.path: reasons.why_kept(info) for info in layout.tensors}
    if all(found.values()):  # {"trainer": {"model": ...}}
        reasons = Reasons(layout, alone=True)
        found = {info.path: reasons.why_kept(info) for info in layout.tensors}
    groups = {path[:-1] for path, reason in found.items() if reason is None}
    above = {group[:depth] for group in groups for depth in range(len(group))}
    for info in layout.tensors:
        found[info.path] = found[info.path] or reasons.why_stray(info, above)
    chosen = [info for info in layout.tensors if found[info.path] is None]
    if key is not None:
        # Whatever the user names counts, even what would be kept. The root has the name "".
        below = [info for info in layout.tensors if dotted(info.path).startswith(f"{key}.")]
        below = below if key else [info for info in layout.tensors if len(info.path) == 1]
        if not below:
            have = sorted({dotted(info.path[:-1]) for info in chosen} - {""})
            hint = f"its state dicts are {named(have, 8)}" if have else "it is itself a state dict"
            raise MergeError(f"it has no state dict {key!r}", where=layout.path, hint=hint)
        chosen = below
    if not chosen:
        held = sorted({str(info.path[0]) for info in layout.tensors if info.path})
        what = f"it holds no weights, only {named(held, 5)}" if held else "it holds no tensors"
        if held == ["state"] and "param_groups" in layout.others:
            what = "it holds an optimizer's state and no weights"
        hint = "pass checkpoints that hold a model's state dict, or name one with --key"
        arrays = [dotted(one) for one, _ in layout.arrays if not any(map(kind_of, one))]
        if arrays:
            what = f"its weights are NumPy arrays ({named(arrays)}), not tensors"
            hint = "save them again as tensors: torch.from_numpy makes one of an array"
        raise MergeError(what, where=layout.path, hint=hint)
    weights: dict[Name, TensorInfo] = {}
    for info in chosen:
        if weights.setdefault(_name(info), info) is not info:
            name = str(_name(info))
            raise MergeError(f"two tensors are called {name!r}", where=layout.path, tensor=name)
    averaged = {info.path for info in chosen}
    rest = (path for path in found if path not in averaged)
    why = {path: found[path] or Reason(UNASKED, str(path[0])) for path in rest}
    return Roles(weights, tuple(_summary(layout.tensors, why)), why)


def _name(info: TensorInfo) -> Name:
    return Name(info.path[:-1], str(info.path[-1]))


def _summary(tensors: Iterable[TensorInfo], why: Mapping[TreePath, Reason]) -> Iterable[Kept]:
    groups: dict[str, list[TensorInfo]] = {}
    for info in tensors:
        if info.path in why:
            groups.setdefault(why[info.path].key, []).append(info)
    for key, infos in groups.items():
        # Tensors that share a storage count its bytes once. Those of a set have several ranges.
        ranges = (part for info in infos for part in info.storage.ranges)
        places = {(part.file, part.offset, part.nbytes) for part in ranges}
        size = sum(nbytes for _, _, nbytes in places)
        yield Kept(key, len(infos), size, why[infos[0].path].text)
