"""The roles of tensors: which are weights, and which are kept as the template has them.

A state dict is a dict (or list) that holds tensors. All state dicts of a checkpoint are weights,
except those below a key of the table `KEPT`, and single values that lie beside state dicts.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass

from merge_avg.checkpoint._layout import Key, Layout, TensorInfo, TreePath, dotted
from merge_avg.errors import MergeError, named

# The key under which a scan lists what a pickled nn.Module holds beside its state dict.
ATTRIBUTES = "attributes of a module"

# Containers that are never averaged: what they hold, and their keys in any letter case. The keys of
# tensors do not count: frameworks choose the names of containers, but models choose the names of
# parameters, and one may well be called "scaler" or "time". Names of weights thus decide nothing.
KEPT = (
    ("optimizer state", r"optim|.*optim(izer)?s?(_.*)?|.*_optimizer|opt_state.*"),
    ("learning-rate schedule", r".*sched.*"),
    ("gradient scaler", r"(.*_)?(grad_?)?scaler(_.*)?|amp|native_amp_scaling_state"),
    ("random-number state", r"(.*_)?rng(_.*)?|(.*_)?random_states?(_.*)?|np_random.*"),
    ("callback state", r"callbacks?|callback_.*"),
    ("loop state", r"loops?|(.*_)?loop|trainer(_state)?"),
    ("data order", r"samplers?(_\d+|_state.*)?|dataloader.*|dl_state_dict.*|datamodule.*"),
    ("settings", r"hyper_?parameters|h_?params|(.*_)?args|cfg|config|arguments"),
    ("metrics", r"metrics?|loss(es)?|(.*_)?(loss|acc|accuracy|score)|history|logs?"),
    ("the best so far", r"best_(metric|fitness|epoch|step).*"),
    ("counters", r"epochs?|(global_)?steps?|iter(ation|ator)?s?|n_?updates"),
    ("times", r"timestamps?|(.*_)?time"),
    ("what a pickled module holds beside its state dict", re.escape(ATTRIBUTES)),
)
# Averaged even below such a key: DeepSpeed's optimizer holds the weights in full precision.
_MASTERS = re.compile(r"single_partition_of_fp32_groups|fp32_groups(_flat)?|fp32_flat_groups")
_KEPT = re.compile("|".join(f"(?:{pattern})" for _, pattern in KEPT), re.IGNORECASE)
# Longer names mean nothing. Matching takes the square of their length, and files choose it.
_LONGEST = 200
# The one kind of state that is commonly a tensor of its own beside state dicts: torch's generators.
_RANDOM = re.compile(r"(.*_)?rng_states?", re.IGNORECASE)


@dataclass(frozen=True, order=True)
class Name:
    """The name of a weight: the state dict it lies in, and its key there."""

    state_dict: TreePath
    key: str

    def __str__(self) -> str:
        return dotted((*self.state_dict, self.key))


@dataclass(frozen=True)
class Kept:
    """Tensors below one key that are not averaged: how many, and their bytes."""

    key: str
    tensors: int
    nbytes: int


@dataclass(frozen=True)
class Roles:
    """The weights of a checkpoint by name, in its order, and a summary of all that is kept."""

    weights: dict[Name, TensorInfo]
    kept: tuple[Kept, ...]


def assign(layout: Layout, key: str | None = None) -> Roles:
    """Return the roles of tensors, where those below the dotted path `key`, if any, are weights.

    Raises:
        MergeError: there are no weights, none below `key`, or two have the same name.
    """
    chosen = [info for info in layout.tensors if _is_weight(info.path)]
    groups = {info.path[:-1] for info in chosen}
    above = {group[:depth] for group in groups for depth in range(len(group))}
    chosen = [info for info in chosen if not _is_stray(info, above)]
    if key is not None:
        # Whatever the user names counts, even below a key of `KEPT`.
        below = [info for info in layout.tensors if dotted(info.path).startswith(f"{key}.")]
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
        raise MergeError(what, where=layout.path, hint=hint)
    weights: dict[Name, TensorInfo] = {}
    for info in chosen:
        name = Name(info.path[:-1], str(info.path[-1]))
        if name in weights:
            raise MergeError(f"two tensors are called {str(name)!r}", where=layout.path)
        weights[name] = info
    averaged = {info.path for info in chosen}
    rest = [info for info in layout.tensors if info.path not in averaged]
    return Roles(weights, tuple(_summary(rest)))


def is_kept(key: Key) -> bool:
    """Return whether what lies below a key of a container, or in a file of that name, is kept."""
    return isinstance(key, str) and len(key) <= _LONGEST and bool(_KEPT.fullmatch(key))


def _is_weight(path: TreePath) -> bool:
    containers = path[:-1]
    if any(isinstance(key, str) and _MASTERS.fullmatch(key) for key in containers):
        return True
    if any(map(is_kept, containers)):
        return False
    # torch.optim's state dict: {"state": {0: {"exp_avg": ...}}, "param_groups": ...}
    pairs = itertools.pairwise(containers)
    if any(a == "state" and isinstance(b, int) for a, b in pairs):
        return False
    last = path[-1]
    return not (isinstance(last, str) and len(last) <= _LONGEST and _RANDOM.fullmatch(last))


def _is_stray(info: TensorInfo, above: set[TreePath]) -> bool:
    """Return whether a tensor is a value beside state dicts, as {"model": {...}, "loss": ...}."""
    # Where no state dict lies below, {"scale": ...} is itself one, and its values are weights.
    return info.path[:-1] in above and (not info.shape or is_kept(str(info.path[-1])))


def _summary(tensors: Iterable[TensorInfo]) -> Iterable[Kept]:
    groups: dict[str, list[TensorInfo]] = {}
    for info in tensors:
        groups.setdefault(str(info.path[0]), []).append(info)
    for key, infos in groups.items():
        # Tensors that share a storage count its bytes once. Those of a set have several ranges.
        ranges = (part for info in infos for part in info.storage.ranges)
        places = {(part.file, part.offset, part.nbytes) for part in ranges}
        yield Kept(key, len(infos), sum(nbytes for _, _, nbytes in places))
