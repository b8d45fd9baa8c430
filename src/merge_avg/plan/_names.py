"""Which tensor of one checkpoint is which of another, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from merge_avg.checkpoint import Name, TensorInfo, dotted
from merge_avg.errors import MergeError, named
from merge_avg.options import Missing

# Segments that wrappers of a model add to its names, and what adds them.
_WRAPPERS = frozenset(
    {
        "module",  # DataParallel, DistributedDataParallel, AveragedModel
        "_orig_mod",  # torch.compile
        "_fsdp_wrapped_module",
        "_checkpoint_wrapped_module",
    }
)


@dataclass(frozen=True)
class NameFilter:
    """Shell patterns of the tensors that are averaged: those included, less those excluded.

    A pattern is held against a tensor's key in its state dict, and against its whole name.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def __contains__(self, name: Name) -> bool:
        wanted = not self.include or _fits(name, self.include)
        return wanted and not _fits(name, self.exclude)


def _fits(name: Name, patterns: Iterable[str]) -> bool:
    texts = (name.key, str(name))
    return any(fnmatchcase(text, pattern) for pattern in patterns for text in texts)


@dataclass(frozen=True)
class Aligned:
    """The template's weights, and for each the tensors of all checkpoints.

    Attributes:
        rows: by the template's name, one tensor a checkpoint; None where a checkpoint lacks it.
        notes: what was done to make names meet, one sentence each.
        skipped: names that some checkpoint lacks and that are therefore kept from the template.
    """

    rows: dict[Name, tuple[TensorInfo | None, ...]]
    notes: tuple[str, ...]
    skipped: frozenset[Name]

    @property
    def checkpoints(self) -> int:
        """Return how many checkpoints there are."""
        return len(next(iter(self.rows.values()), ()))

    def template(self, name: Name) -> TensorInfo:
        """Return the template's tensor of a name."""
        info = self.rows[name][0]
        assert info is not None  # noqa: S101 - rows are those of the template
        return info


def align(
    paths: Sequence[Path],
    weights: Sequence[Mapping[Name, TensorInfo]],
    missing: Missing = "error",
    chosen: NameFilter = NameFilter(),
) -> Aligned:
    """Matches the weights of the checkpoints to those of the first, the template.

    Tensors that are not `chosen` are kept from the template, whatever the others have.

    Raises:
        MergeError: state dicts or names do not match, and `missing` is "error"; or no tensor is
            chosen.
    """
    notes: list[str] = []
    columns = [dict(weights[0])]
    for path, other in zip(paths[1:], weights[1:], strict=True):
        column, note = match(paths[0], weights[0], path, other)
        if note:
            notes.append(note)
        columns.append({name: info for name, info in column.items() if name in chosen})
    template = {name: info for name, info in weights[0].items() if name in chosen}
    if not template:
        have = named([str(name) for name in weights[0]], 4)
        hint = f"patterns are held against names such as {have}"
        raise MergeError("no tensor fits --include and --exclude", where=paths[0], hint=hint)
    spared = tuple(name for name in weights[0] if name not in template)
    if spared:
        names = named([str(name) for name in spared])
        notes.append(f"{names} is not to be averaged and is kept from the template")
    left_out: list[Name] = []
    for path, column in zip(paths[1:], columns[1:], strict=True):
        lacking = [name for name in template if name not in column]
        extra = [name for name in column if name not in template]
        if missing == "error" and (lacking or extra):
            raise _unequal(paths[0], path, lacking, extra)
        left_out += extra
    if left_out:
        names = named(sorted({str(name) for name in left_out}))
        notes.append(f"{names} is not in the template and is left out")
    alone: tuple[None, ...] = (None,) * (len(paths) - 1)
    rows: dict[Name, tuple[TensorInfo | None, ...]] = {
        name: tuple(column.get(name) for column in columns) if name in template else (info, *alone)
        for name, info in weights[0].items()
    }
    incomplete = tuple(name for name in template if None in rows[name])
    if missing == "skip":
        if incomplete:
            names = named([str(name) for name in incomplete])
            notes.append(f"{names} is not in every checkpoint and is kept from the template")
        for name in incomplete:
            rows[name] = (rows[name][0], *alone)
        return Aligned(rows, tuple(notes), frozenset((*spared, *incomplete)))
    if incomplete:
        names = named([str(name) for name in incomplete])
        notes.append(f"{names} is not in every checkpoint and is averaged where it is present")
    return Aligned(rows, tuple(notes), frozenset(spared))


def _unequal(
    template: Path, path: Path, lacking: Sequence[Name], extra: Sequence[Name]
) -> MergeError:
    if lacking:
        what = f"it lacks {named([str(name) for name in lacking])}, which {template} has"
    else:
        what = f"it has {named([str(name) for name in extra])}, which {template} lacks"
    hint = "--missing skip keeps such tensors from the template, --missing available averages "
    return MergeError(what, where=path, hint=hint + "them where they are present")


def match(
    template_path: Path,
    template: Mapping[Name, TensorInfo],
    path: Path,
    other: Mapping[Name, TensorInfo],
) -> tuple[dict[Name, TensorInfo], str | None]:
    """The other checkpoint's tensors under the template's names, and what was done for it.

    Raises:
        MergeError: it has other state dicts.
    """
    if template.keys() == other.keys():
        return dict(other), None
    _same_state_dicts(template_path, template, path, other)
    best: tuple[int, dict[Name, TensorInfo], str | None] | None = None
    for change, note in _CHANGES:
        ours, theirs = _renamed(template, change), _renamed(other, change)
        if ours is None or theirs is None:
            continue
        dropped = _dropped_ties(ours, template, theirs, other)
        column = {ours.get(short, name): other[name] for short, name in theirs.items()} | dropped
        spare = {name for name in column if name not in template and _tied(name, column, template)}
        column = {name: info for name, info in column.items() if name not in spare}
        said = [note] if note else []
        if dropped or spare:
            names = [str(name) for name in (*dropped, *spare)]
            said.append(f"{named(names)} was matched with the tensor that it is tied to")
        unmatched = len(column.keys() ^ template.keys())
        if best is None or unmatched < best[0]:
            best = unmatched, column, f"{path}: {'; '.join(said)}" if said else None
    if best is None:
        return dict(other), None
    return best[1], best[2]


def _dropped_ties(
    ours: Mapping[Name, Name],
    template: Mapping[Name, TensorInfo],
    theirs: Mapping[Name, Name],
    other: Mapping[Name, TensorInfo],
) -> dict[Name, TensorInfo]:
    """Tensors that the other checkpoint has only under the name of one they are tied to."""
    places = {_place(template[name]): short for short, name in ours.items() if short in theirs}
    absent = [short for short in ours if short not in theirs]
    found = {ours[short]: places.get(_place(template[ours[short]])) for short in absent}
    return {name: other[theirs[short]] for name, short in found.items() if short is not None}


def _tied(
    name: Name, column: Mapping[Name, TensorInfo], template: Mapping[Name, TensorInfo]
) -> bool:
    """Whether a tensor is tied, in its own checkpoint, to one that the template has."""
    place = _place(column[name])
    return any(other in template and _place(info) == place for other, info in column.items())


def _place(info: TensorInfo) -> tuple[object, ...]:
    return info.storage, info.start, info.geometry


def _same_state_dicts(
    template_path: Path, template: Iterable[Name], path: Path, other: Iterable[Name]
) -> None:
    if {name.state_dict for name in _short(template)} == {n.state_dict for n in _short(other)}:
        return
    ours, theirs = (
        " and ".join(sorted({repr(dotted(name.state_dict)) for name in names}))
        for names in (template, other)
    )
    raise MergeError(
        f"its state dicts are {theirs}, those of {template_path} are {ours}",
        where=path,
        hint="name the one to average with --key, for example --key state_dict",
    )


def _short(names: Iterable[Name]) -> dict[Name, Name]:
    """Short name to name, where a short name drops what all state dict paths begin with."""
    names = list(names)
    paths = {name.state_dict for name in names}
    depth = 0
    while all(len(path) > depth for path in paths) and len({path[depth] for path in paths}) == 1:
        depth += 1
    return {Name(name.state_dict[depth:], name.key): name for name in names}


def _same(key: str) -> str:
    return key


def _unwrapped(key: str) -> str:
    return ".".join(segment for segment in key.split(".") if segment not in _WRAPPERS)


def _without_model(key: str) -> str:
    return _unwrapped(key).removeprefix("model.")


_CHANGES: tuple[tuple[Callable[[str], str], str | None], ...] = (
    (_same, None),
    (_unwrapped, "names were matched without the prefixes of wrappers (module., _orig_mod.)"),
    (_without_model, "names were matched without the prefix model."),
)


def _renamed(names: Iterable[Name], change: Callable[[str], str]) -> dict[Name, Name] | None:
    """Short, changed name to name; None where two names become one."""
    short = _short(names)
    changed = {Name(s.state_dict, change(s.key)): name for s, name in short.items()}
    return changed if len(changed) == len(short) else None
