"""Directories as checkpoints: the tensors of all files, by the state dict that they belong to.

    model-00001-of-00002.safetensors    shards make up one state dict: paths have no prefix,
    model-00002-of-00002.safetensors    as long as no other file beside them holds weights
    model.safetensors.index.json        {"weight_map": {"w": "model-00001-of-00002.safetensors"}}
    optimizer.pt                        tensors at ("optimizer", ...), which are kept
    unet/model.bin                      tensors at ("unet", "model", ...)
    .metadata, __0_0.distcp             a set of files, read by its own format
    config.json                         files without tensors are copied as they are
    merge_avg.json                      in an output of a merge: its provenance

Specification: the names and the index are those of huggingface_hub's sharded checkpoints.
"""

from __future__ import annotations

import os
import re
from array import array
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from pathlib import Path, PurePosixPath
from weakref import WeakValueDictionary

from merge_avg.checkpoint import (
    LARGEST_PROVENANCE,
    PROVENANCE,
    PROVENANCE_FILE,
    BytesAt,
    Checksums,
    File,
    Layout,
    Storage,
    TensorInfo,
    TreePath,
    assign,
    dotted,
    kind_of,
)
from merge_avg.errors import MergeError, failure, named
from merge_avg.formats import bounded, scan_file, set_format
from merge_avg.formats.shards import check_index, check_shards, is_index, unsharded

SUFFIXES = frozenset((".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".th", ".tar", ".pkl"))
# Folders that no program reads a checkpoint from: what is in them is not even copied.
_IGNORED = frozenset((".git", ".cache", ".ipynb_checkpoints", "__pycache__"))
# Folders of a run that are checkpoints of their own: checkpoint-500, global_step1000, epoch=3.
_OF_A_RUN = re.compile(
    r"(checkpoint|ckpt|global_?step|step|epoch|iter)s?([-_+=].*)?\d.*", re.IGNORECASE
)
# Files that only a checkpoint has, not a run that holds several.
_OF_ONE = re.compile(
    r"(adapter_)?config\.json|model_index\.json|modules\.json|trainer_state\.json|CKPT\.yaml"
    r"|latest|mp_rank_.*|.*\.index\.json|.+-\d{5}-of-\d{5}\..*"
    r"|((diffusion_)?pytorch_model|model|adapter_model|params)\.(bin|safetensors|pt)"
)
# What names may tell where a file's content leaves a doubt, and names that tell of weights too.
_TOLD = {"optimizer state", "learning-rate schedule", "random-number state"}
_MODEL = re.compile(r"(?i)model|weights|ema")
_LARGEST_LATEST = 1000
# A file may hold weights if it has a twentieth of the bytes of those that do, and 1 MiB.
_SHARE, _LARGE = 20, 1 << 20
_NO_WEIGHTS = (".json", ".jsonl", ".txt", ".model", ".spm", ".csv", ".log", ".yaml")


_Key = tuple[tuple[str, TreePath, tuple[TensorInfo, ...], Mapping[BytesAt, int]], ...]


@dataclass(frozen=True, eq=False)
class _Shared:
    """What directories of one run share, whose files have the same tensors."""

    key: _Key  # the files that hold weights
    tensors: tuple[TensorInfo, ...]
    numbers: Mapping[BytesAt, int]  # of ranges whose checksums are recorded


_LAST: WeakValueDictionary[str, _Shared] = WeakValueDictionary()


def _same(a: _Key, b: _Key) -> bool:
    """Return whether files have the same names, and share their tensors."""
    pairs = zip(a, b, strict=False)
    return len(a) == len(b) and all(
        x[:2] == y[:2] and x[2] is y[2] and x[3] is y[3] for x, y in pairs
    )


def scan_directory(path: Path) -> Layout:
    """Return the layout of a checkpoint directory.

    MergeError where a file in it cannot be read or is damaged, shards are missing or hold a tensor
    twice, or it holds no checkpoint or several.
    """
    files, notes = _walk(path)
    # An output has a provenance file of its own: that of the template is never copied.
    provenance = files.pop(PROVENANCE_FILE, None)
    metadata: tuple[tuple[str, str], ...] = ()
    if provenance is not None and provenance.nbytes <= LARGEST_PROVENANCE:
        raw = bounded.read(provenance.path, LARGEST_PROVENANCE)
        metadata = ((PROVENANCE, raw.decode("utf-8", "replace")),)
    members, callables = _members(path, files)
    for name in filter(is_index, files):
        check_index(files, name, members)
    check_shards(path, files)
    held, twins, spans = _gathered(path, members)
    apart = {name: one for name, one in members.items() if held[name] is one.tensors}
    named_so, doubts = _named_so(apart)
    notes += doubts + _unread(files, members)
    places = _places(path, members, named_so, held, twins)
    prefixes = _prefixes(members, named_so, places)
    tensors: list[TensorInfo] = []
    holders: dict[TreePath, str] = {}
    sums = [member.checksums for member in members.values()]
    key = tuple(
        (name, prefixes[name], member.tensors, member.checksums.numbers)
        for name, member in members.items()
    )
    shared = _LAST.get("directory")
    alone = all(held[name] is member.tensors for name, member in members.items())
    known = shared is not None and alone and _same(shared.key, key)
    for name, member in members.items():
        prefix = prefixes[name]
        notes += member.notes
        if known:
            continue
        # Shards share a prefix, and may not share a tensor: which of two would be the right one?
        for info in held[name]:
            whole = replace(info, path=(*prefix, *info.path)) if prefix else info
            first = holders.setdefault(whole.path, name)
            if first != name:
                what = f"tensor {dotted(info.path)!r} is both in {first} and in {name}"
                hint = "remove the file that does not belong to the checkpoint"
                raise MergeError(what, where=path, hint=hint, tensor=dotted(info.path))
            tensors.append(whole)
    if shared is None or not known:
        firsts = accumulate((len(one.crcs) for one in sums), initial=0)
        numbers = {
            at: first + number
            for first, one in zip(firsts, sums, strict=False)
            for at, number in one.numbers.items()
        }
        shared = _LAST["directory"] = _Shared(key, tuple(tensors), numbers)
    if not shared.tensors:
        hint = "pass a directory that holds .safetensors, .bin, .pt, .pth or .ckpt files"
        raise MergeError("a directory without a checkpoint in it", where=path, hint=hint)
    parts = tuple(map(members.get, files))
    stamps = tuple(
        file if one is None or one.set_member else one.files[0]
        for file, one in zip(files.values(), parts, strict=True)
    )
    others = tuple(name for name in files if name not in members), metadata, None, parts
    made = (path, "directory", stamps, shared.tensors, *others, tuple(notes))
    pairs = [(prefixes[name], member) for name, member in members.items()]
    return Layout(
        *made,
        callables=callables,
        optimizers=tuple((*prefix, *at) for prefix, one in pairs for at in one.optimizers),
        arrays=tuple(((*prefix, *at), sum_) for prefix, one in pairs for at, sum_ in one.arrays),
        named_files=tuple(prefixes[name] for name in members if name not in named_so),
        checksums=Checksums(shared.numbers, array("I", chain.from_iterable(s.crcs for s in sums))),
        twins=twins,
        spans=spans,
        shared=shared,
    )


_Twins = dict[tuple[int, str], tuple[Storage, ...]]
_Spans = dict[tuple[int, str], tuple[str, int]]
_Held = dict[str, tuple[TensorInfo, ...]]


def _gathered(root: Path, members: Mapping[str, Layout]) -> tuple[_Held, _Twins, _Spans]:
    """Return the tensors of each file, `Layout.twins` and `Layout.spans`."""
    held = {name: member.tensors for name, member in members.items()}
    if any(info.shape == (0,) for one in held.values() for info in one):
        from merge_avg.formats import zero3  # few directories have any
        from merge_avg.formats.refused import refuse_hollow

        found = zero3.gather(root, members)
        for one in () if found.held else members.values():
            refuse_hollow(one)
        return held | found.held, found.twins, found.spans
    return held, {}, {}


def _places(
    root: Path,
    members: Mapping[str, Layout],
    kept: Collection[str],
    held: _Held,
    twins: _Twins,
) -> dict[str, TreePath]:
    """Return the path that the tensors of each file are at.

    Tensors of which ranks have parts become those of the first rank's file.
    """
    places = {name: _place(name, member) for name, member in members.items()}
    models = {name: one for name, one in members.items() if name not in kept}
    if any(info.shard for one in models.values() for info in one.tensors):
        from merge_avg.formats.ranks import rank_sets  # few directories have any

        for ranks in rank_sets(root, models, twins):
            held.update(dict.fromkeys(ranks.names, ()), **{ranks.names[0]: ranks.tensors})
            places.update(dict.fromkeys(ranks.names, ranks.place))
    return places


def of_a_run(name: str) -> bool:
    """Return whether a folder of this name is a checkpoint among others of a run."""
    return _OF_A_RUN.fullmatch(name) is not None


def is_one(path: Path) -> bool:
    """Return whether a directory is one checkpoint by its name or files, and not a run of many."""
    names = [entry.name for entry in path.iterdir()]
    return of_a_run(path.name) or any(_OF_ONE.fullmatch(n) or set_format(n) for n in names)


def leads_out(root: Path, path: Path) -> bool:
    """Return whether a file of a directory is a link that leads out of it, and not to a blob."""
    if not path.is_symlink():
        return False
    # In the cache of Hugging Face's hub a snapshot consists of links to the blobs beside it:
    # REPOSITORY/snapshots/REVISION/unet/model.safetensors -> ../../../blobs/HASH.
    home = root.resolve()
    snapshots = (one for one in home.parents if one.name == "snapshots")
    blobs = (one.parent / "blobs" for one in snapshots)
    return not any(path.resolve().is_relative_to(one) for one in (home, *blobs))


def relative(layout: Layout, number: int) -> str:
    """Return the path of a directory's file within it, with slashes."""
    return layout.files[number].path.relative_to(layout.path).as_posix()


def _walk(root: Path) -> tuple[dict[str, File], list[str]]:
    """Return the files below a directory by relative path, and notes on what is left out."""
    files: dict[str, File] = {}
    notes: list[str] = []
    nested = _nested(root)

    def refuse(error: OSError) -> None:
        raise failure(error, "cannot be read") from None

    for folder, folders, names in os.walk(root, onerror=refuse):
        here = Path(folder)
        for name in sorted(folders):
            link = (here / name).is_symlink()
            if link or name in _IGNORED or (here == root and name in nested):
                folders.remove(name)
            if link:
                notes.append(f"{here / name} is a link to a directory and is left out")
        folders.sort()
        for name in names:
            file = here / name
            if not file.is_file():
                kind = "a link to nothing" if file.is_symlink() else "not a regular file"
                raise MergeError(f"it is {kind}", where=file, hint="fetch the checkpoint again")
            files[file.relative_to(root).as_posix()] = File.of(file)
    # The order of files decides that of tensors: it may not depend on the file system.
    files = dict(sorted(files.items(), key=lambda item: item[0].split("/")))
    outside = [name for name, file in files.items() if leads_out(root, file.path)]
    if outside:
        notes.append(f"{root}: {named(outside)} links to a file outside of it")
    if nested:
        if latest(root) in nested:  # which readers would look for in vain
            del files["latest"]
        notes.append(f"{root}: left out, as other checkpoints are: {named(sorted(nested))}")
    return files, notes


def _nested(root: Path) -> set[str]:
    """Return the folders that are checkpoints of their own, and raise where nothing else is."""
    entries = sorted(root.iterdir())
    found = [entry.name for entry in entries if entry.is_dir() and of_a_run(entry.name)]
    if any(entry.suffix in SUFFIXES or set_format(entry.name) for entry in entries):
        return set(found)
    if len(found) < 2:
        return set()
    if (name := latest(root)) in found:
        return set(found) - {name}
    what = f"it holds {len(found)} checkpoints: {named(found, 4)}"
    hint = f"name the ones to average, for example {root / found[-1]}"
    raise MergeError(what, where=root, hint=hint)


def latest(root: Path, name: str = "latest") -> str:
    """Return which folder is the newest: DeepSpeed writes its name into a file, and takes it."""
    told = root / name
    if told.is_file() and told.stat().st_size <= _LARGEST_LATEST:
        return bounded.read(told, _LARGEST_LATEST).decode("utf-8", "replace").strip()
    return ""


def _members(
    root: Path, files: Mapping[str, File]
) -> tuple[dict[str, Layout], tuple[tuple[int, str], ...]]:
    """Return the layouts of the files that hold tensors, in their order, and `Layout.callables`."""
    members: dict[str, Layout] = {}
    callables: list[tuple[int, str]] = []
    names, paths = list(files), [PurePosixPath(name) for name in files]
    for path in paths:
        if found := set_format(path.name):
            inside = {
                other.name: (number, files[names[number]])
                for number, other in enumerate(paths)
                if other.parent == path.parent
            }
            scanned = found.code.scan_set(root / path.parent, inside)
            members |= {names[number]: layout for number, layout in scanned.items()}
            callables += (one for layout in scanned.values() for one in layout.callables)
    for number, (name, file) in enumerate(files.items()):
        if name in members:
            continue
        layout = None
        if PurePosixPath(name).suffix.lower() in SUFFIXES:
            try:
                # A .bin or .pkl file may be anything; a file that says .safetensors may not.
                layout = scan_file(file, number, strict=name.endswith(".safetensors"))
            except MergeError:
                # An optimizer's file and the like may be whatever it likes.
                if not any(map(kind_of, path_of(name))):
                    raise
        if layout is not None:
            callables += layout.callables
            if layout.tensors:
                members[name] = layout
        elif not leads_out(root, file.path):
            from merge_avg.formats.carried import callables_of  # most directories need none of it

            callables += ((number, one) for one in callables_of(file))
    return {name: members[name] for name in names if name in members}, tuple(sorted(callables))


def path_of(name: str) -> TreePath:
    """Return the folders and the name of a file, without its ending and the number of a shard."""
    path = PurePosixPath(name)
    return (*path.parts[:-1], unsharded(path.stem.removesuffix(".pth")))  # model.pth.tar


def _named_so(members: Mapping[str, Layout]) -> tuple[set[str], list[str]]:
    """Return the files whose names say that they hold no weights and are right, and notes.

    A state dict is weights whatever its file is called: model_optim_rng.pt of Megatron-LM. Only if
    an optimizer's file looks like one, beside files that surely are one, its name breaks the tie.
    """
    told = {
        name: {kind.name for key in _place(name, one) if (kind := kind_of(key))}
        for name, one in members.items()
    }
    surely = any(_holds_weights(one) for name, one in members.items() if not told[name])
    kept, notes = set(), []
    for name in filter(told.get, members):
        doubt = _holds_weights(members[name])
        if doubt and not (surely and told[name] & _TOLD and not _MODEL.search(name)):
            continue
        kept.add(name)
        if doubt:
            key = dotted(_place(name, members[name]))
            what = "is not averaged because of its name, but may hold weights"
            notes.append(f"{members[name].path} {what}; --key {key} averages it")
    return kept, notes


def _holds_weights(member: Layout) -> bool:
    try:
        weights = assign(member).weights.values()
    except MergeError:
        return False
    return any(info.shape and info.dtype.kind == "float" for info in weights)


def _unread(files: Mapping[str, File], members: Mapping[str, Layout]) -> list[str]:
    """Return a note on files that are as large as weights, and are copied unread."""
    inside = {file.path for layout in members.values() for file in layout.files}
    least = max(sum(one.nbytes for one in files.values() if one.path in inside) // _SHARE, _LARGE)
    large = [
        name
        for name, one in files.items()
        if one.nbytes >= least and one.path not in inside and not name.lower().endswith(_NO_WEIGHTS)
    ]
    return [f"{named(large)} is not read: weights in it are not averaged"] if large else []


def _place(name: str, member: Layout) -> TreePath:
    """Return the path of a file's tensors in the directory's tree, if it needs one."""
    return PurePosixPath(name).parts[:-1] if member.set_member else path_of(name)


def _prefixes(
    members: Mapping[str, Layout], kept: Collection[str], places: Mapping[str, TreePath]
) -> dict[str, TreePath]:
    """Return for each file the path that its tensors are at in the directory's tree."""
    # `pytorch_model.bin` and `model.safetensors` are the same state dict by two names. Where it is
    # the only one it needs no prefix, so that a directory can be averaged with a single file too.
    prefixes: dict[str, TreePath] = {}
    families: dict[TreePath, str] = {}
    for name, member in members.items():
        path, suffix = places[name], PurePosixPath(name).suffix
        if not member.set_member:
            plain = (*path[:-1], str(path[-1]).replace("pytorch_model", "model"))
            # Where both lie in one directory, the second needs a name of its own.
            own = families.setdefault(plain, suffix) != suffix
            path = (*path[:-1], f"{path[-1]}{suffix}") if own else plain
        prefixes[name] = path
    # Optimizers and the like lie aside: they do not make a directory one of several state dicts.
    weights = {prefix for name, prefix in prefixes.items() if name not in kept}
    return {name: () if weights == {prefix} else prefix for name, prefix in prefixes.items()}
