"""Why a tensor is kept, and not averaged: what lies around it and what it is decide.

The first of these that holds decides. All else is a weight: a state dict is a dict (or list) that
holds tensors, and frameworks choose its name as they like.

    1  it lies in an optimizer's master weights                      a weight
    2  `state` lies beside `param_groups` in a dict above it         optimizer state
    3  a key above it stands for state: `STATE`, or                  kept
       `AROUND`, but not a second tensor of a weight's name, or
       `LEARNED_TOO`, if no floats of one or more dimensions lie below that key
    4  it is a slot of a parameter: ("state", 3 or "conv.weight")    optimizer state
    5  its name is a state's, then the name of another tensor        optimizer state
    6  it has the form of the state of torch's generator             random-number state
    7  it lies beside state dicts, is a single number, and no        a metric, a counter
       Parameter: a float whose name says nothing is a weight

The names of weights never count, since models choose them: one may well be called "scaler" or
"time". Nor do the names of files that hold weights: see `Layout.named_files`.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property, lru_cache

from merge_avg.checkpoint._layout import Key, Layout, TensorInfo, TreePath, dotted
from merge_avg.checkpoint._metrics import is_metric

# The key under which a scan lists what a pickled nn.Module holds beside its state dict.
ATTRIBUTES = "attributes of a module"


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of content, of containers whose keys match a pattern in any letter case."""

    name: str
    pattern: re.Pattern[str]
    around: bool = False  # whether weights may lie among it
    learned_too: bool = False  # whether it may be a learned module


_OPTIMIZER = "optimizer state"
STATE = {
    _OPTIMIZER: r"optim|.*optim(izer)?s?(_.*)?|.*_optimizer|opt_state.*",
    "learning-rate schedule": r".*sched.*",
    "random-number state": r"(.*_)?rng(_.*)?|(.*_)?random_states?(_.*)?|np_random.*",
    "settings": r"hyper_?parameters|h_?params|(.*_)?args|cfg|config|arguments",
    "metrics": r"metrics?|history|logs?",
    "what a pickled module holds beside its state dict": re.escape(ATTRIBUTES),
}
# An EMA that a callback keeps is known by the names of the weights; and where there are no other
# weights, these are.
AROUND = {
    "callback state": r"callbacks?|callback_.*",
    "loop state": r"loops?|(.*_)?loop|trainer(_state)?",
    "data order": r"dataloader.*|dl_state_dict.*|datamodule.*",
    "the best so far": r"best_(metric|fitness|epoch|step).*",
}
# A loss with class centers, a score network, a sampler of points; what frameworks keep under these
# keys are single numbers and integers.
LEARNED_TOO = {
    "gradient scaler": r"(.*_)?(grad_?)?scaler(_.*)?|amp|native_amp_scaling_state",
    "data order": r"samplers?(_\d+|_state.*)?",
    "metrics": r"loss(es)?|(.*_)?(loss|acc|accuracy|score)",
    "counters": r"epochs?|(global_)?steps?|iter(ation|ator)?s?|n_?updates",
    "times": r"timestamps?|(.*_)?time",
}
_KINDS = tuple(
    Kind(name, re.compile(f"(?i){text}"), rows is AROUND, rows is LEARNED_TOO)
    for rows in (STATE, AROUND, LEARNED_TOO)
    for name, text in rows.items()
)
_OPT = re.compile(r"(?i)(.*_)?opts?(_.*)?")  # names that models have too
# What training loops call single numbers beside state dicts, other than metrics.
_SETTING = re.compile(r"(?i)best(_.*)?|lr|learning_rate|weight_decay|momentum|seed")
# Averaged even below such a key: DeepSpeed's optimizer holds the weights in full precision.
MASTERS = re.compile(r"single_partition_of_fp32_groups|fp32_groups(_flat)?|fp32_flat_groups")
# Longer names mean nothing. Matching takes the square of their length, and files choose it.
_LONGEST = 200
_RANDOM = re.compile(r"(.*_)?rng_states?", re.IGNORECASE)
# torch.get_rng_state: a Mersenne Twister of 624 words, with its index and two cached numbers; and
# that of a device: a seed and an offset of Philox.
_GENERATOR, _DEVICE_GENERATOR = ("uint8", (5056,)), ("uint8", (16,))
_STATE, _GROUPS = "state", "param_groups"


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a tensor is kept, and the key under which a summary counts it."""

    text: str
    key: str


_reason = lru_cache(maxsize=4096)(Reason)  # an optimizer has three tensors of each weight


@lru_cache(maxsize=4096)
def kind_of(key: Key) -> Kind | None:
    """Return what a container of such a key, or a file, holds; None where it may be anything."""
    if not isinstance(key, str) or len(key) > _LONGEST:
        return None
    return next((kind for kind in _KINDS if kind.pattern.fullmatch(key)), None)


class Reasons:
    """The reasons of all tensors of a checkpoint, which depend on each other."""

    def __init__(self, layout: Layout, *, alone: bool = False) -> None:
        self._alone = alone  # whether weights lie among other state, and nowhere else
        self._tensors = layout.tensors
        self._optimizers = frozenset(layout.optimizers)
        self._files = frozenset(layout.named_files)

    def why_kept(self, info: TensorInfo) -> Reason | None:
        """Return why a tensor is kept by what lies above it; None for a weight or a stray."""
        path, containers, top = info.path, info.path[:-1], str(info.path[0])
        if any(isinstance(key, str) and MASTERS.fullmatch(key) for key in containers):
            return None
        # At the root a model may have been added to an optimizer's dict.
        head = top.partition(".")[0]
        for depth in range(len(path)) if self._optimizers else ():
            if path[:depth] in self._optimizers and (depth or head in (_STATE, _GROUPS)):
                return _reason(
                    f"{_OPTIMIZER} ({_STATE} beside {_GROUPS})", dotted(path[:depth]) or head
                )
        # What a file of weights is called counts for nothing.
        named = next((n for n in range(len(path), 0, -1) if path[:n] in self._files), 0)
        for depth in range(named, len(containers)):
            kind, container = kind_of(path[depth]), path[: depth + 1]
            if kind and not self._learned(kind, info, container):
                return _reason(f"{kind.name}, by the key {path[depth]!r}", dotted(container))
        for depth, (above, below) in enumerate(itertools.pairwise(containers)):
            if above == _STATE and (isinstance(below, int) or below in self._names):
                return _reason(f"{_OPTIMIZER} of {below!r}", top)
            # {"opt": {"exp_avg": {"conv.weight": ...}}}; an OPT model would have its names here.
            slot = depth + 2 == len(containers) and _OPT.fullmatch(str(above)[:_LONGEST])
            if slot and self._names[path[-1]] > 1:
                return _reason(f"{_OPTIMIZER} of {path[-1]!r}", top)
        return self._flat(path) or self._random(info)

    def why_stray(self, info: TensorInfo, above: set[TreePath]) -> Reason | None:
        """Return why a value is kept that lies in one of the dicts `above` state dicts."""
        # Where no state dict lies below, {"scale": ...} is itself one, and its values are weights.
        name = str(info.path[-1])
        if info.path[:-1] not in above or info.learned:
            return None
        single = info.numel == 1 and len(info.shape) < 2
        if kind_of(name) or (single and (is_metric(name) or _SETTING.fullmatch(name))):
            return _reason("a value beside state dicts, by its name", name)
        # Where there is trouble its shape is not known: better an error than a copy without a word.
        unsure = info.shape or info.dtype.kind == "float" or info.trouble
        if unsure or info.path[:-1] in self._direct:
            return None
        return _reason("a number beside state dicts", name)

    def _learned(self, kind: Kind, info: TensorInfo, container: TreePath) -> bool:
        """Return whether a tensor is learned, although a key above it stands for state."""
        if kind.learned_too:
            return container in self._vectors
        again = self._alone or self._forms[info.path[-1], info.shape] > 1
        return bool(kind.around and info.shape and again)

    def _flat(self, path: TreePath) -> Reason | None:
        """Return the reason of optimizer.state.exp_avg.decoder.w, beside a tensor decoder.w."""
        # Few names have the word, and looking at the parts of all takes a tenth of a merge's time.
        name = str(path[-1])
        parts = name.split(".") if "opt" in name.lower() else []
        for at, part in enumerate(parts[:-1] if len(parts) < _LONGEST else ()):
            kind, rest = kind_of(part), parts[at + 1 :]
            opt = _OPT.fullmatch(part[:_LONGEST]) and rest[0] == _STATE
            if not opt and (kind is None or kind.name != _OPTIMIZER):
                continue
            for start in range(len(rest)):
                # Before or after what the slot is called: state.exp_avg.w, and state.w.exp_avg.
                for one in (".".join(rest[start:]), ".".join(rest[start:-1])):
                    if one in self._names:
                        return _reason(f"optimizer state of {one!r}", ".".join(parts[: at + 1]))
        return None

    def _random(self, info: TensorInfo) -> Reason | None:
        form, path = (info.dtype.name, info.shape), info.path
        beside = form == _DEVICE_GENERATOR and {path[:-1], path[:-2]} & self._generators
        named = "rng" in (name := str(path[-1]).lower()) and _RANDOM.fullmatch(name[:_LONGEST])
        if form == _GENERATOR or beside or named:
            return _reason("random-number state, by its form or name", str(path[0]))
        return None

    @cached_property
    def _names(self) -> Counter[Key]:
        """Return the names of tensors of more than one number, and how many have each."""
        return Counter(info.path[-1] for info in self._tensors if info.shape and info.path)

    @cached_property
    def _forms(self) -> Counter[tuple[Key, tuple[int, ...]]]:
        return Counter((info.path[-1], info.shape) for info in self._tensors if info.path)

    @cached_property
    def _direct(self) -> frozenset[TreePath]:
        """Return the containers that hold floats of one dimension or more themselves."""
        floats = (i.path[:-1] for i in self._tensors if i.shape and i.dtype.kind == "float")
        return frozenset(floats)

    @cached_property
    def _vectors(self) -> frozenset[TreePath]:
        """Return the containers that hold such floats at any depth."""
        return frozenset(path[:n] for path in self._direct for n in range(1, len(path) + 1))

    @cached_property
    def _generators(self) -> frozenset[TreePath]:
        found = (i.path for i in self._tensors if (i.dtype.name, i.shape) == _GENERATOR)
        return frozenset(path[:-1] for path in found)
