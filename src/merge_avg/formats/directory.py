"""Directories as checkpoints: a set of files by relative path.

The tensors of a directory are those of all its files. A file's name tells which state dict they
belong to: shards (`model-00001-of-00003.safetensors`) make up one, and every other file, with its
sub-folder, is one of its own.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from merge_avg.checkpoint import (
    LARGEST_PROVENANCE,
    PROVENANCE,
    PROVENANCE_FILE,
    File,
    Layout,
    TensorInfo,
    TreePath,
    dotted,
    is_kept,
)
from merge_avg.errors import MergeError, named
from merge_avg.formats import bounded_json
from merge_avg.formats._table import scan_file, set_format

INDEX = ".index.json"
_INDEX = re.compile(r"\.(safetensors|bin)\.index\.json$")
_SHARD = re.compile(r"(?P<base>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})")
SUFFIXES = frozenset((".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".th", ".tar", ".pkl"))
# Folders that no program reads a checkpoint from.
_IGNORED = frozenset((".git", ".cache", ".ipynb_checkpoints", "__pycache__"))
# Folders of a run that are checkpoints of their own.
_OF_A_RUN = re.compile(
    r"(checkpoint|ckpt|global_?step|step|epoch|iter)s?([-_+=].*)?\d.*", re.IGNORECASE
)
# Files that only a checkpoint has, not a run that holds several.
_OF_ONE = re.compile(
    r"(adapter_)?config\.json|model_index\.json|modules\.json|trainer_state\.json|CKPT\.yaml"
    r"|latest|mp_rank_.*|.*\.index\.json|.+-\d{5}-of-\d{5}\..*"
    r"|((diffusion_)?pytorch_model|model|adapter_model|params)\.(bin|safetensors|pt)"
)
_LARGEST_INDEX = 100_000_000


@dataclass
class _Tree:
    """The files below a directory by their relative paths, and what was left out, and why."""

    files: dict[str, File] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def scan_directory(path: Path) -> Layout:
    """The layout of a checkpoint directory.

    Raises:
        MergeError: a file in it cannot be read or is damaged, shards are missing or hold a tensor
            twice, or it holds no checkpoint or several.
    """
    tree = _walk(path)
    mark = tree.files.pop(PROVENANCE_FILE, None)
    if mark is not None and mark.nbytes > LARGEST_PROVENANCE:
        mark = None
    stamps = tuple(tree.files.values())
    names = list(tree.files)
    members = _members(path, tree)
    for name in names:
        if is_index(name):
            _check_index(tree.files, name, members)
    prefixes = _prefixes(path, names, members)
    tensors: list[TensorInfo] = []
    holders: dict[TreePath, str] = {}
    others: list[str] = []
    notes = list(tree.notes)
    for number, name in enumerate(names):
        member = members.get(number)
        if member is None:
            others.append(name)
            continue
        notes += member.notes
        for info in member.tensors:
            whole = replace(info, path=(*prefixes[number], *info.path))
            first = holders.setdefault(whole.path, name)
            if first != name:
                what = f"tensor {dotted(info.path)!r} is both in {first} and in {name}"
                hint = "remove the file that does not belong to the checkpoint"
                raise MergeError(what, where=path, hint=hint)
            tensors.append(whole)
    if not tensors:
        hint = "pass a directory that holds .safetensors, .bin, .pt, .pth or .ckpt files"
        raise MergeError("a directory without a checkpoint in it", where=path, hint=hint)
    return Layout(
        path,
        "directory",
        stamps,
        tuple(tensors),
        tuple(others),
        () if mark is None else ((PROVENANCE, mark.path.read_text("utf-8", "replace")),),
        members=tuple(members.get(number) for number in range(len(names))),
        notes=tuple(notes),
    )


def of_a_run(name: str) -> bool:
    """Whether a folder of this name is a checkpoint among others of a run."""
    return _OF_A_RUN.fullmatch(name) is not None


def is_one(path: Path) -> bool:
    """Whether a directory is one checkpoint by its name or its files, and not a run of many."""
    names = [entry.name for entry in path.iterdir()]
    return of_a_run(path.name) or any(_OF_ONE.fullmatch(n) or set_format(n) for n in names)


def leads_out(root: Path, path: Path) -> bool:
    """Whether a file of a directory is a link to somewhere else.

    In the cache of Hugging Face's hub a snapshot consists of links to the blobs beside it.
    """
    if not path.is_symlink():
        return False
    home = root.resolve()
    home = home.parents[1] if home.parent.name == "snapshots" else home
    return not path.resolve().is_relative_to(home)


def relative(layout: Layout, number: int) -> str:
    """The path of a directory's file below it, with slashes."""
    return layout.files[number].path.relative_to(layout.path).as_posix()


def _walk(root: Path) -> _Tree:
    tree = _Tree()
    nested = _nested(root)
    for folder, folders, names in os.walk(root):
        here = Path(folder)
        for name in sorted(folders):
            if name in _IGNORED or (here / name).is_symlink() or (here == root and name in nested):
                folders.remove(name)
                if (here / name).is_symlink():
                    tree.notes.append(f"{here / name} is a link to a directory and is left out")
        folders.sort()
        for name in names:
            file = here / name
            if not file.is_file():
                what = "it is a link to nothing" if file.is_symlink() else "it is no regular file"
                raise MergeError(what, where=file, hint="fetch the checkpoint again")
            tree.files[file.relative_to(root).as_posix()] = File.of(file)
    tree.files = dict(sorted(tree.files.items(), key=lambda item: item[0].split("/")))
    outside = [name for name, file in tree.files.items() if leads_out(root, file.path)]
    if outside:
        tree.notes.append(f"{root}: {named(outside)} links to a file outside of it")
    if nested:
        tree.notes.append(f"{root}: {named(sorted(nested))} is left out, a checkpoint of its own")
    return tree


def _nested(root: Path) -> set[str]:
    """Sub-folders that are left out because they are checkpoints of their own.

    Raises:
        MergeError: there is nothing but several of them.
    """
    found = sorted(
        entry.name for entry in root.iterdir() if entry.is_dir() and _OF_A_RUN.fullmatch(entry.name)
    )
    if any(entry.suffix in SUFFIXES or set_format(entry.name) for entry in root.iterdir()):
        return set(found)
    if len(found) < 2:
        return set()
    latest = root / "latest"  # DeepSpeed names the newest one there
    if latest.is_file() and latest.stat().st_size < 1000:
        name = latest.read_text("utf-8", "replace").strip()
        if name in found:
            return set(found) - {name}
    what = f"it holds {len(found)} checkpoints: {named(found, 4)}"
    hint = f"name the ones to average, for example {root / found[-1]}"
    raise MergeError(what, where=root, hint=hint)


def _members(root: Path, tree: _Tree) -> dict[int, Layout]:
    """The layouts of the files that hold tensors, by number."""
    numbers = {name: number for number, name in enumerate(tree.files)}
    members: dict[int, Layout] = {}
    for name in tree.files:
        found = set_format(PurePosixPath(name).name)
        if found is not None:
            folder = str(PurePosixPath(name).parent)
            inside = {
                PurePosixPath(other).name: (numbers[other], tree.files[other])
                for other in tree.files
                if str(PurePosixPath(other).parent) == folder
            }
            members |= found.code.scan_set(root / folder, inside)
    for name, number in numbers.items():
        if number in members or PurePosixPath(name).suffix.lower() not in SUFFIXES:
            continue
        try:
            strict = name.endswith(".safetensors")
            layout = scan_file(tree.files[name], number, strict=strict)
        except MergeError as error:
            from merge_avg.formats.pickle.values import DangerousPickleError

            if isinstance(error, DangerousPickleError):
                raise  # the output would carry it on
            if any(map(is_kept, _path_of(name))):
                continue  # an optimizer's file and the like may be whatever it likes
            raise
        if layout is not None and layout.tensors:
            members[number] = layout
    return members


def _path_of(name: str) -> TreePath:
    """Folders, and the file's name without ending or the number of a shard."""
    path = PurePosixPath(name)
    stem = path.stem.removesuffix(".pth")  # model.pth.tar
    return (*path.parts[:-1], unsharded(stem))


def _prefixes(root: Path, names: Sequence[str], members: Mapping[int, Layout]) -> list[TreePath]:
    """For each file, where its tensors are in the directory's tree.

    `pytorch_model.bin` and `model.safetensors` are the same state dict by two names; it needs no
    prefix where it is the only one.
    """
    prefixes: list[TreePath] = [()] * len(names)
    families: dict[TreePath, str] = {}
    for number, name in enumerate(names):
        if number not in members:
            continue
        if members[number].set_member:
            prefixes[number] = PurePosixPath(name).parts[:-1]
            continue
        path = _path_of(name)
        suffix = PurePosixPath(name).suffix
        plain = (*path[:-1], str(path[-1]).replace("pytorch_model", "model"))
        if families.setdefault(plain, suffix) != suffix:
            plain = (*path[:-1], f"{path[-1]}{suffix}")
            families[plain] = suffix
        prefixes[number] = plain
    _check_shards(root, names)
    weights = {p for number, p in enumerate(prefixes) if number in members and not _is_aside(p)}
    if len(weights) == 1:
        only = weights.pop()
        return [() if prefix == only else prefix for prefix in prefixes]
    return prefixes


def _is_aside(prefix: TreePath) -> bool:
    return any(map(is_kept, prefix))


def _check_shards(root: Path, names: Sequence[str]) -> None:
    """Raises MergeError where the names of shards say that there are more."""
    found: dict[tuple[str, str, str], set[int]] = {}
    for name in names:
        path = PurePosixPath(name)
        shard = _SHARD.fullmatch(path.stem)
        if shard:
            key = (str(path.parent / shard["base"]), shard["count"], path.suffix)
            found.setdefault(key, set()).add(int(shard["number"]))
    for (base, count, suffix), numbers in found.items():
        lacking = sorted(set(range(1, int(count) + 1)) - numbers)
        if lacking:
            lost = f"{base}-{lacking[0]:05}-of-{count}{suffix}"
            what = f"{len(lacking)} of {int(count)} shards are missing, the first is {lost}"
            raise MergeError(what, where=root, hint="fetch the checkpoint again")


def is_index(name: str) -> bool:
    """Whether a file says which shard holds what."""
    return bool(_INDEX.search(name))


def unsharded(stem: str) -> str:
    """A file's name without its ending and, for a shard, without its number."""
    shard = _SHARD.fullmatch(stem)
    return shard["base"] if shard else stem


def shard_of(path: Path) -> int | None:
    """How many shards there are, if a file's name says that it is one of several."""
    shard = _SHARD.fullmatch(path.stem)
    return int(shard["count"]) if shard and int(shard["count"]) > 1 else None


def read_index(file: File) -> dict[str, Any]:
    """The index of a sharded checkpoint: a table with a `weight_map` of tensor names to files.

    Raises:
        MergeError: it is none.
    """
    try:
        if file.nbytes > _LARGEST_INDEX:
            raise ValueError("it is absurdly large")
        index = bounded_json.loads(file.path.read_bytes())
        match index:
            case {"weight_map": dict() as table} if all(
                isinstance(value, str) for value in table.values()
            ):
                return index
    except ValueError as error:
        raise MergeError(f"the index is damaged ({error})", where=file.path) from None
    raise MergeError("an index without a weight_map", where=file.path)


def _check_index(files: Mapping[str, File], name: str, members: Mapping[int, Layout]) -> None:
    """Raises MergeError where an index and the shards beside it contradict each other."""
    table = read_index(files[name])["weight_map"]
    numbers = {other: number for number, other in enumerate(files)}
    keys: dict[str, set[str]] = {}
    folder = PurePosixPath(name).parent
    for key, file in table.items():
        whole = (folder / file).as_posix()
        if whole not in files:
            far = ".." in PurePosixPath(file).parts or file.startswith("/")
            what = f"it names the file {file!r}, which is {'outside' if far else 'missing'}"
            raise MergeError(what, where=files[name].path, hint="fetch the checkpoint again")
        if whole not in keys:
            member = members.get(numbers[whole])
            keys[whole] = set(_names(member)) if member else set()
        if key not in keys[whole]:
            what = f"it says that {key!r} is in {file}, which does not hold it"
            raise MergeError(what, where=files[name].path, hint="fetch the checkpoint again")


def _names(layout: Layout) -> Iterator[str]:
    return (dotted(info.path) for info in layout.tensors)
