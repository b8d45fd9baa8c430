"""Shards of one state dict, by their names, and the index that says which of them holds what.

    model-00001-of-00002.safetensors
    model-00002-of-00002.safetensors
    model.safetensors.index.json        {"weight_map": {"w": "model-00001-of-00002.safetensors"}}

Specification: the names and the index are those of huggingface_hub's sharded checkpoints.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from merge_avg.checkpoint import File, Layout, dotted
from merge_avg.errors import MergeError
from merge_avg.formats import bounded

INDEX = ".index.json"
_INDEX = re.compile(r"\.(safetensors|bin)\.index\.json$")
_SHARD = re.compile(r"\A(.+)-(\d{5})-of-(\d{5})\Z")


def check_shards(root: Path, names: Iterable[str]) -> None:
    """Raise MergeError where the names of shards say that there are more."""
    found: dict[tuple[str, str, str], set[int]] = {}
    for path in map(PurePosixPath, names):
        if shard := _SHARD.fullmatch(path.stem):
            key = (str(path.parent / shard[1]), shard[3], path.suffix)
            found.setdefault(key, set()).add(int(shard[2]))
    for (base, count, suffix), numbers in found.items():
        lacking = sorted(set(range(1, int(count) + 1)) - numbers)
        if lacking:
            lost = f"{base}-{lacking[0]:05}-of-{count}{suffix}"
            what = f"{len(lacking)} of {int(count)} shards are missing, the first is {lost}"
            raise MergeError(what, where=root, hint="fetch the checkpoint again")


def is_index(name: str) -> bool:
    """Return whether a file says which shard holds which tensor."""
    return bool(_INDEX.search(name))


def unsharded(stem: str) -> str:
    """Return a file's name, already without its ending, without the number of a shard."""
    return _SHARD.sub(r"\1", stem)


def shard_of(path: Path) -> int | None:
    """Return the number of shards, if a file's name says that it is one of several."""
    shard = _SHARD.fullmatch(path.stem)
    return int(shard[3]) if shard and int(shard[3]) > 1 else None


def read_index(file: File) -> dict[str, Any]:
    """Return the index of a sharded checkpoint, whose `weight_map` leads from tensors to files."""
    raw = bounded.read(file.path)
    try:
        index = bounded.loads(raw)
    except ValueError as error:
        raise MergeError(f"the index is damaged ({error})", where=file.path) from None
    table = index.get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(value, str) for value in table.values()):
        raise MergeError("an index without a weight_map", where=file.path)
    return index


def check_index(files: Mapping[str, File], name: str, members: Mapping[str, Layout]) -> None:
    """Raise MergeError where an index and the shards beside it contradict each other."""
    where, hint = files[name].path, "fetch the checkpoint again"
    keys = {one: {dotted(info.path) for info in held.tensors} for one, held in members.items()}
    folder = PurePosixPath(name).parent
    table = read_index(files[name])["weight_map"]
    paths = {file: (folder / file).as_posix() for file in set(table.values())}
    for key, file in table.items():
        whole = paths[file]
        # An index may name files anywhere: only those of the checkpoint are ever opened.
        if whole not in files:
            far = ".." in PurePosixPath(file).parts or file.startswith("/")
            what = f"it names the file {file!r}, which is {'outside' if far else 'missing'}"
            raise MergeError(what, where=where, hint=hint)
        if key not in keys.get(whole, ()):
            what = f"it says that {key!r} is in {file}, which does not hold it"
            raise MergeError(what, where=where, hint=hint, tensor=key)
