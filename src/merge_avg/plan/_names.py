"""Names: which tensor of one checkpoint is which of another, and which of them are averaged."""

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
    """Shell patterns that choose the tensors to average: those included, less those excluded.

    A pattern is compared with a tensor's key in its state dict, and with its whole name.
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
        notes: for the user, what was done to make names meet; one sentence each.
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
    """Match the weights of the checkpoints to those of the first, the template.

    Tensors that are not `chosen` are kept from the template, whatever the others have.

    Raises:
        MergeError: state dicts or names do not match, and `missing` is "error"; or no tensor is
            chosen.
    """
    notes: list[str] = []
    template = {name: info for name, info in weights[0].items() if name in chosen}
    if not template:
        hint = f"patterns are compared with names such as {named(weights[0], 4)}"
        raise MergeError("no tensor fits --include and --exclude", where=paths[0], hint=hint)
    columns = []
    for path, other in zip(paths[1:], weights[1:], strict=True):
        column, note = match(paths[0], weights[0], path, other)
        notes += [note] if note else []
        columns.append({name: info for name, info in column.items() if name in chosen})
    kept = [name for name in weights[0] if name not in template]
    if kept:
        notes.append(f"{named(kept)} is not to be averaged and is kept from the template")
    left_out: set[str] = set()
    for path, column in zip(paths[1:], columns, strict=True):
        lacking = [name for name in template if name not in column]
        extra = [name for name in column if name not in template]
        if missing == "error" and (lacking or extra):
            raise _unequal(paths[0], path, lacking, extra)
        left_out.update(map(str, extra))
    if left_out:
        notes.append(f"{named(sorted(left_out))} is not in the template and is left out")
    incomplete = [name for name in template if any(name not in column for column in columns)]
    if incomplete and missing == "skip":
        notes.append(
            f"{named(incomplete)} is not in every checkpoint and is kept from the template"
        )
        kept += incomplete
    elif incomplete:
        what = "is not in every checkpoint and is averaged where it is present"
        notes.append(f"{named(incomplete)} {what}")
    skipped = frozenset(kept)
    # What is kept has the template as its only source: whether others have it does not matter.
    rows = {
        name: (info, *(None if name in skipped else column.get(name) for column in columns))
        for name, info in weights[0].items()
    }
    return Aligned(rows, tuple(notes), skipped)


def _unequal(
    template: Path, path: Path, lacking: Sequence[Name], extra: Sequence[Name]
) -> MergeError:
    what = f"it has {named(extra)}, which {template} lacks"
    if lacking:
        what = f"it lacks {named(lacking)}, which {template} has"
    hint = "--missing skip keeps such tensors from the template, --missing available averages "
    return MergeError(what, where=path, hint=hint + "them where they are present")


def match(
    template_path: Path,
    template: Mapping[Name, TensorInfo],
    path: Path,
    other: Mapping[Name, TensorInfo],
) -> tuple[dict[Name, TensorInfo], str | None]:
    """Return the other checkpoint's tensors under the template's names, and a note if they differ.

    Raises:
        MergeError: it has other state dicts.
    """
    if template.keys() == other.keys():
        return dict(other), None
    _same_state_dicts(template_path, template, path, other)
    # The change after which the fewest names are left alone; of equals the first, which changes
    # least. So names that meet as they are stay as they are.
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
            names = named((*dropped, *spare))
            said.append(f"{names} was matched with the tensor that it is tied to")
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
    """Return tensors that the other checkpoint has only under the name of one they are tied to."""
    # safetensors holds no ties: of tied weights, such as an embedding and the head, save_model and
    # transformers write one. Which one is theirs to choose, and it need not be the template's.
    places = {_place(template[name]): short for short, name in ours.items() if short in theirs}
    absent = [short for short in ours if short not in theirs]
    found = {ours[short]: places.get(_place(template[ours[short]])) for short in absent}
    return {name: other[theirs[short]] for name, short in found.items() if short is not None}


def _tied(
    name: Name, column: Mapping[Name, TensorInfo], template: Mapping[Name, TensorInfo]
) -> bool:
    """Return whether a tensor is tied, in its own checkpoint, to one that the template has."""
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
    """Return names by short names, which leave out what all paths of state dicts begin with."""
    # A bare state dict thus meets the same one below "state_dict", or below "model".
    names = list(names)
    paths = {name.state_dict for name in names}
    depth = 0
    while all(len(path) > depth for path in paths) and len({path[depth] for path in paths}) == 1:
        depth += 1
    return {Name(name.state_dict[depth:], name.key): name for name in names}


def _unwrapped(key: str) -> str:
    return ".".join(segment for segment in key.split(".") if segment not in _WRAPPERS)


# Each changes more than the one before. Wrappers add their segments anywhere; "model." is what
# Lightning modules call the model inside, and only its front is surely not the model's own.
_CHANGES: tuple[tuple[Callable[[str], str], str | None], ...] = (
    (lambda key: key, None),
    (_unwrapped, "names were matched without the prefixes of wrappers (module., _orig_mod.)"),
    (
        lambda key: _unwrapped(key).removeprefix("model."),
        "names were matched without the prefix model.",
    ),
)


def _renamed(names: Iterable[Name], change: Callable[[str], str]) -> dict[Name, Name] | None:
    """Return names by their short names after a change; None where two become one."""
    short = _short(names)
    changed = {Name(s.state_dict, change(s.key)): name for s, name in short.items()}
    return changed if len(changed) == len(short) else None
