"""Training state in a directory: what a training resumes from, and serving a model does not need.

    optimizer.pt, rng_state.pth, optimizer_0/__0_0.distcp    none of its tensors is a weight
    scheduler.pt, training_args.bin, scaler.pt               saved by torch, and without tensors
    optimizer.npz                                            its name says so
    trainer_state.json, CKPT.yaml, latest                    a text about steps, losses or folders
    config.json, tokenizer.model, modeling.py, vae/          all else may be needed to serve

What is unclear is kept: a model with a file too many works, and one that lacks a file does not.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from pathlib import PurePosixPath

from merge_avg.checkpoint import (
    MASTERS,
    UNASKED,
    File,
    Layout,
    Roles,
    TensorInfo,
    TreePath,
    kind_of,
)
from merge_avg.errors import MergeError, named
from merge_avg.formats import bounded, scan_file
from merge_avg.formats.beside import PROGRESS
from merge_avg.formats.directory import SUFFIXES, path_of, relative
from merge_avg.formats.shards import INDEX, unsharded

_DATA = SUFFIXES | {".npz", ".npy", ".pickle", ".joblib", ".msgpack"}
_TEXT = (".json", ".yaml", ".yml")
_NAMED = re.compile(r"latest|zero_to_fp32\.py|events\.out\.tfevents\..*")
_SERVES = re.compile(r"(?i)config|index|label|model|process|featur|template|token|vocab")


def serving(roles: Roles, weights: Collection[TensorInfo]) -> frozenset[TreePath]:
    """Return the paths of the tensors that are needed to serve a model."""
    # Masters are an optimizer's, unless they are the only weights.
    masters = {info.path for info in weights if any(MASTERS.fullmatch(str(k)) for k in info.path)}
    serve = {info.path for info in weights} - masters or masters
    return frozenset(
        serve | {path for path, reason in roles.reasons.items() if reason.text == UNASKED}
    )


def training_state(
    template: Layout, serve: Collection[TreePath]
) -> tuple[frozenset[int], list[str]]:
    """Return the numbers of a directory's files that are training state, and notes on doubts.

    `serve` are the paths of the tensors that are none.
    """
    holds: dict[int, set[bool]] = defaultdict(set)  # of each file, whether its tensors serve
    for info in template.tensors:
        for part in info.storage.ranges:
            for one in (part, *template.twins.get((part.file, part.name), ())):
                holds[one.file].add(info.path in serve)
    groups: dict[str, list[int]] = defaultdict(list)  # that come along together or not at all
    for number, member in enumerate(template.members):
        groups[_home(relative(template, number), member)].append(number)
    out: set[int] = set()
    doubts: dict[str, list[str]] = defaultdict(list)
    sets = {relative(template, k).rpartition("/")[0] for k in _kept_sets(template, holds)}
    for home, numbers in groups.items():
        found = {one for number in numbers for one in holds[number]}
        members = [member for number in numbers if (member := template.members[number])]
        if True in found:
            if any(member.set_member for member in members):
                continue  # of a set, what does not serve is left out of its files
            if False in found or any(kind_of(other) for one in members for other in one.others):
                doubts["training state is kept that lies in a file with weights"].append(home)
        elif _beside(template, home, members, sets):
            continue
        elif (told := bool(members) or _told(home, template.files[numbers[0]])) is None:
            doubts["what may be training state, or be needed to serve, is kept"].append(home)
        elif told:
            out.update(numbers)
    return frozenset(out), [f"{what}: {named(some, 3)}" for what, some in doubts.items()]


def dropped_keys(template: Layout, dropped: Collection[tuple[int, str]], roles: Roles) -> list[str]:
    """Return the keys under which tensors are kept that an output leaves out of its sets."""
    found = {
        roles.reasons[info.path].key
        for info in (template.tensors if dropped else ())
        if info.path in roles.reasons
        and any((part.file, part.name) in dropped for part in info.storage.ranges)
    }
    return sorted(found)


def _kept_sets(template: Layout, holds: Mapping[int, set[bool]]) -> Iterator[int]:
    """Yield the numbers of the files of sets that hold tensors that serve."""
    for number, member in enumerate(template.members):
        if member is not None and member.set_member and True in holds.get(number, ()):
            yield number


def _beside(template: Layout, home: str, members: list[Layout], sets: Collection[str]) -> bool:
    """Return whether a loader of weights needs a file without any."""
    # Placeholders of ZeRO-3 tell what the flat groups hold; common.pt of Megatron lies in a set.
    hollow = any(is_placeholder(template, member) for member in members)
    return hollow or (home.rpartition("/")[0] in sets and not any(map(kind_of, path_of(home))))


def is_placeholder(template: Layout, member: Layout) -> bool:
    """Return whether a file has only placeholders of weights that lie in those of other ranks."""
    if not template.spans:
        return False
    from merge_avg.formats.zero3 import is_hollow  # few directories have any

    return is_hollow(member)


def _home(name: str, member: Layout | None) -> str:
    """Return a name that the files of a set share, and shards with their index."""
    path = PurePosixPath(name.removesuffix(INDEX))
    one = path.with_name(unsharded(path.stem) + path.suffix)
    return str(path.parent if member is not None and member.set_member else one)


def _told(name: str, file: File) -> bool | None:
    """Return whether a file without tensors is training state; None where that is unclear."""
    path = PurePosixPath(name)
    serves, suffix = _SERVES.search(path.name), path.suffix.lower()
    if suffix not in _DATA:
        said = suffix in _TEXT and not serves and PROGRESS.search(bounded.sketch(file.path)[0])
        return bool(said or _NAMED.fullmatch(path.name))
    try:
        layout = scan_file(file, strict=False)
    except MergeError:  # the scan of the directory has let it pass, for its name
        return True
    saved = layout is not None and layout.archive is not None
    # A scaler that torch saved is one of gradients; others may be of the inputs.
    kinds = filter(None, map(kind_of, path_of(name)))
    return any(saved or not one.learned_too for one in kinds) or (saved and not serves) or None
