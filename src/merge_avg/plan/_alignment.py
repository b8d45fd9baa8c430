"""Alignment: which tensor of one checkpoint is which of another, and whether they have a mean."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from fnmatch import translate
from functools import lru_cache
from pathlib import Path

from merge_avg.checkpoint import Layout, Name, TensorInfo, dotted, refuse_quantised
from merge_avg.errors import MergeError, UsageError, named
from merge_avg.options import Missing

# Segments that wrappers of a model add to its names: "module" is that of DataParallel,
# DistributedDataParallel and AveragedModel, "_orig_mod" that of torch.compile.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# What torch calls the state that a module keeps beside its weights: bytes that nobody else reads.
_OPAQUE = re.compile(r"(.*\.)?_extra_state")
_MOST_PATTERNS = 1000  # each is compared with every name


@dataclass(frozen=True)
class Aligned:
    """The template's weights, and for each the tensors of all checkpoints."""

    # By the template's name, one tensor a checkpoint; None where a checkpoint lacks it.
    rows: dict[Name, tuple[TensorInfo | None, ...]]
    notes: tuple[str, ...]  # for the user, what was done to make names meet; one sentence each
    skipped: frozenset[Name]  # what is not averaged, and kept from the template
    masters: frozenset[Name] = frozenset()  # an optimizer's copies in float32
    alike: bool = False  # whether all checkpoints share the template's very tensors
    count: int = 0  # of the checkpoints, where nothing is left to average by itself

    def asked(self, name: Name, dtype: str | None) -> str | None:
        """Return the dtype that is asked for of a tensor, if one is: none of masters."""
        return None if name in self.skipped or name in self.masters else dtype

    @property
    def checkpoints(self) -> int:
        """Return how many checkpoints there are."""
        return len(next(iter(self.rows.values()), ())) or self.count

    def template(self, name: Name) -> TensorInfo:
        """Return the template's tensor of a name."""
        info = self.rows[name][0]
        assert info is not None  # noqa: S101 - rows are those of the template
        return info


def align(
    paths: Sequence[Path],
    weights: Sequence[Mapping[Name, TensorInfo]],
    missing: Missing = "error",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    masters: Mapping[Name, Name | None] | None = None,
    *,
    besides: bool = False,
) -> Aligned:
    """Match the weights of the checkpoints to those of the first, the template.

    What the shell patterns do not choose is kept from the template, whatever the others have. Those
    that are `masters` of a weight are chosen with it. All may be kept where there is more `besides`
    that is averaged.
    """
    if len(include) + len(exclude) > _MOST_PATTERNS:
        hint = "write one that fits many names"
        raise UsageError(f"there are more than {_MOST_PATTERNS:,} patterns", hint=hint)

    if not weights[0]:  # all that there is has a mean only together
        _left_out(paths[0], {}, [*zip(paths[1:], weights[1:], strict=True)], missing)
        return Aligned({}, (), frozenset(), count=len(paths))

    def chosen(one: Mapping[Name, TensorInfo]) -> dict[Name, TensorInfo]:
        return {
            name: info
            for name, info in one.items()
            if is_chosen((masters or {}).get(name) or name, include, exclude)
            and not _OPAQUE.fullmatch(name.key)
        }

    notes: list[str] = []
    template = chosen(weights[0])
    if not template and not besides:
        hint = f"patterns are compared with names such as {named(weights[0], 4)}"
        raise MergeError("no tensor fits --include and --exclude", where=paths[0], hint=hint)
    columns: list[dict[Name, TensorInfo]] = []
    for path, other in zip(paths[1:], weights[1:], strict=True):
        if other is weights[0]:  # those of a run most often share their tensors
            columns.append(template)
            continue
        # Of one whose tensors are all averaged together with others, nothing is left.
        alone = not other and besides
        column, note = ({}, None) if alone else match(paths[0], weights[0], path, other)
        notes += [note] if note else []
        columns.append(chosen(column))
    pairs = zip(paths[1:], columns, strict=True)
    others = [(path, column) for path, column in pairs if column is not template]
    kept = [name for name in weights[0] if name not in template]
    for opaque, why in ((False, "not to be averaged"), (True, "state of a module beside weights")):
        if some := [name for name in kept if bool(_OPAQUE.fullmatch(name.key)) == opaque]:
            notes.append(f"kept from the template, as {why}: {named(some)}")
    left_out = _left_out(paths[0], template, others, missing)
    if left_out:
        notes.append(f"left out, as the template has no such tensor: {named(sorted(left_out))}")
    if incomplete := [name for name in template if any(name not in one for _, one in others)]:
        lot = "kept from the template" if missing == "skip" else "averaged where present"
        notes.append(f"not in every checkpoint, so {lot}: {named(incomplete)}")
        kept += incomplete if missing == "skip" else []
    skipped = frozenset(kept)
    if skipped.issuperset(weights[0]) and not besides:
        hint = (
            f"names such as {named(template, 2)} have to be in all; are these of one architecture?"
        )
        raise MergeError("none of its tensors is in every checkpoint", where=paths[0], hint=hint)
    rows = _rows(weights[0], columns, skipped, alike=not others)
    return Aligned(rows, tuple(notes), skipped, frozenset(masters or ()), not others)


def _left_out(
    path: Path,
    template: Mapping[Name, TensorInfo],
    others: Sequence[tuple[Path, Mapping[Name, TensorInfo]]],
    missing: Missing,
) -> set[str]:
    """Return what the template, which has a path, lacks; MergeError where that may not be."""
    left_out: set[str] = set()
    for other, column in others:
        lacking = [name for name in template if name not in column]
        extra = [name for name in column if name not in template]
        if advice := _advice(missing, lacking, extra, template):
            what = f"it has {named(extra)}, which {path} lacks"
            what = f"it lacks {named(lacking)}, which {path} has" if lacking else what
            raise MergeError(what, where=other, hint=advice, tensor=(lacking or extra)[0])
        left_out.update(map(str, extra))
    return left_out


def _rows(
    weights: Mapping[Name, TensorInfo],
    columns: Sequence[Mapping[Name, TensorInfo]],
    skipped: frozenset[Name],
    *,
    alike: bool,
) -> dict[Name, tuple[TensorInfo | None, ...]]:
    """Return the tensors of all checkpoints by name, which may be `alike` in all."""
    # What is kept has the template as its only source: whether others have it does not matter.
    nowhere, count = (None,) * len(columns), 1 + len(columns)
    if alike:
        pairs = weights.items()
        return {n: (info, *nowhere) if n in skipped else (info,) * count for n, info in pairs}
    return {
        name: (info, *(None if name in skipped else column.get(name) for column in columns))
        for name, info in weights.items()
    }


def _advice(missing: Missing, lacking: Sized, extra: Sized, template: Sized) -> str | None:
    """Return the hint of an error, where a checkpoint lacks, or has more, than it may."""
    if missing == "available" and len(lacking) == len(template):
        return "leave it out: nothing of it would be averaged"
    if missing != "error" or not (lacking or extra):
        return None
    skip = "--missing skip keeps such tensors from the template"
    return f"{skip}, --missing available averages them where they are present"


def is_chosen(name: Name, include: Sequence[str], exclude: Sequence[str]) -> bool:
    """Return whether a tensor is included, and not excluded, by its key or by its whole name."""
    included, excluded = (
        any(map(_one_of(tuple(patterns)).match, (name.key, str(name))))
        for patterns in (include, exclude)
    )
    return (included or not include) and not excluded


@lru_cache
def _one_of(patterns: tuple[str, ...]) -> re.Pattern[str]:
    # As one expression: a thousand patterns and 20,000 names would take 20 s in a loop.
    return re.compile("|".join(map(translate, patterns)) or "(?!)")  # which fits nothing


def match(
    template_path: Path,
    template: Mapping[Name, TensorInfo],
    path: Path,
    other: Mapping[Name, TensorInfo],
) -> tuple[dict[Name, TensorInfo], str | None]:
    """Return the other checkpoint's tensors under the template's names; a note if they differ."""
    if template.keys() == other.keys():
        return dict(other), None
    if {name.state_dict for name in _short(template)} != {n.state_dict for n in _short(other)}:
        dicts = [
            " and ".join(sorted({repr(dotted(name.state_dict)) for name in names}))
            for names in (other, template)
        ]
        what = f"its state dicts are {dicts[0]}, those of {template_path} are {dicts[1]}"
        hint = "name the one to average with --key, for example --key state_dict"
        raise MergeError(what, where=path, hint=hint)
    found: list[tuple[dict[Name, TensorInfo], str | None]] = []
    for change, note in _CHANGES:
        ours, theirs = _renamed(template, change), _renamed(other, change)
        if ours is None or theirs is None:
            continue
        dropped = _dropped_ties(ours, template, theirs, other)
        column = {ours.get(short, name): other[name] for short, name in theirs.items()} | dropped
        # Of tensors that are tied here, the template may have one name only.
        extra = [name for name in column if name not in template]
        places = {place(column[name]) for name in column if name in template} if extra else ()
        spare = [name for name in extra if place(column[name]) in places]
        for name in spare:
            del column[name]
        said = [note] if note else []
        if tied := (*dropped, *spare):
            said.append(f"{named(tied)} was matched with the tensor that it is tied to")
        found.append((column, f"{path}: {'; '.join(said)}" if said else None))
    # The change after which the fewest names are left alone; of equals the first, which changes
    # least. So names that meet as they are stay as they are.
    return min(found, key=lambda one: len(one[0].keys() ^ template.keys()))


def _dropped_ties(
    ours: Mapping[Name, Name],
    template: Mapping[Name, TensorInfo],
    theirs: Mapping[Name, Name],
    other: Mapping[Name, TensorInfo],
) -> dict[Name, TensorInfo]:
    """Return tensors that the other checkpoint has only under the name of one they are tied to."""
    # safetensors holds no ties: of tied weights, such as an embedding and the head, save_model and
    # transformers write one. Which one is theirs to choose, and it need not be the template's.
    places = {place(template[name]): short for short, name in ours.items() if short in theirs}
    absent = (name for short, name in ours.items() if short not in theirs)
    found = ((name, places.get(place(template[name]))) for name in absent)
    return {name: other[theirs[short]] for name, short in found if short is not None}


def place(info: TensorInfo) -> tuple[object, ...]:
    """Return where a tensor lies; tensors at the same place are tied."""
    return info.storage, info.start, info.geometry


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


def check_tensors(layouts: Sequence[Layout], aligned: Aligned, dtype: str | None) -> None:
    """Raise MergeError for tensors that cannot be averaged, or not with each other."""
    template = layouts[0].path
    tensors = {name: aligned.template(name) for name in aligned.rows}
    refuse_quantised(layouts[0], tensors, aligned.skipped)
    for name, row in aligned.rows.items():
        first = tensors[name]
        if name in aligned.skipped:
            continue
        for layout, info in zip(layouts, row, strict=True):
            if info is None or (info is first and not info.trouble):
                continue
            if info.trouble:
                what = f"tensor {str(name)!r} is {info.trouble}, which cannot be averaged"
                hint = "convert it to a plain tensor before saving"
                raise MergeError(what, where=layout.where(info), hint=hint, tensor=name)
            if info.shape != first.shape:
                shapes = f"{list(info.shape)}, expected {list(first.shape)} as in {template}"
                what = f"tensor {str(name)!r} has the shape {shapes}"
                hint = f"{without(name)} keeps the template's"
                raise MergeError(what, where=layout.where(info), hint=hint, tensor=name)
            if info.dtype == first.dtype:
                continue
            if {info.dtype.kind, first.dtype.kind} != {"float"}:
                hint = "save both with the same dtype"
            # The template's dtype may be the narrow one by accident: whoever mixes has to say.
            elif dtype is None:
                wide = "float64" if "float64" in (info.dtype.name, first.dtype.name) else "float32"
                hint = f"choose the dtype of the result, for example --dtype {wide}"
            else:
                continue
            names = f"{info.dtype.name}, in {template} it is {first.dtype.name}"
            what = f"tensor {str(name)!r} is {names}"
            raise MergeError(what, where=layout.path, hint=hint, tensor=name)


def without(name: Name) -> str:
    """Return the option that leaves out a tensor along with what belongs to it."""
    parts = name.key.split(".")
    # A metric keeps several states, which go together, as do all metrics of a collection.
    metric = next((k for k, part in enumerate(parts[:-1]) if "metric" in part.lower()), -2)
    module = ".".join(parts[: metric + 1] if metric >= 0 else parts[:-1])
    return f"--exclude '{module}.*'" if module else f"--exclude '{name.key}'"


def check_shared(
    layouts: Sequence[Layout], aligned: Aligned, members: Sequence[tuple[Name, TensorInfo]]
) -> None:
    """Raise MergeError for tensors that share memory in the template, but cannot share a mean.

    All that share memory are averaged together or kept together, and every checkpoint has all of
    them with one dtype, or none.
    """
    if len(members) == 1:
        return
    template = layouts[0].path
    names = [name for name, _ in members]
    pair = named(names, 2)
    if len({info.dtype for _, info in members}) > 1:
        what = f"{pair} view the same bytes as different dtypes"
        raise MergeError(what, where=template, tensor=names[0])
    kept = aligned.skipped.intersection(names)
    if kept and len(kept) < len(names):
        shared = named(name for name in names if name not in kept)
        what = f"{named(sorted(map(str, kept)))} is to be kept, but shares memory with {shared}"
        hint = "keep all tensors that share memory, or none"
        raise MergeError(what, where=template, hint=hint, tensor=min(kept, key=str))
    for number, layout in enumerate(layouts):
        infos = [aligned.rows[name][number] for name in names]
        absent = [name for name, info in zip(names, infos, strict=True) if info is None]
        if 0 < len(absent) < len(names):
            what = f"{named(absent)}, which shares memory with other tensors in the template"
            what, hint = f"it lacks {what}", "use --missing skip"
            raise MergeError(what, where=layout.path, hint=hint, tensor=absent[0])
        if len({info.dtype for info in infos if info is not None}) > 1:
            what = f"{pair} have different dtypes, but share memory in {template}"
            hint = "save them with one dtype, or choose a template where they are apart: --template"
            raise MergeError(what, where=layout.path, hint=hint, tensor=names[0])
