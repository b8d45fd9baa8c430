"""Which checkpoints the user meant: files, runs that hold many, and patterns; the last, the best.

What is chosen, what is not, and why, is one table: nothing is left out without a word.
"""

from __future__ import annotations

import filecmp
import glob
import itertools
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from merge_avg.errors import MergeError, UsageError, named
from merge_avg.formats import scan
from merge_avg.formats.directory import SUFFIXES, is_one, of_a_run
from merge_avg.io import TEMPORARY
from merge_avg.options import Mode
from merge_avg.selection._metadata import STATE, Metadata, name_metadata, read_metadata
from merge_avg.selection._metrics_log import Log, read_log

Bounds = tuple[int | None, int | None, int | None]

# What a run keeps beside its checkpoints.
_BESIDE = re.compile(
    r"(optimizer|scheduler|scaler|rng_state|random_states|training_args|.*\.index\.json)",
    re.IGNORECASE,
)
# Folders of a run that hold checkpoints.
_FOLDERS = re.compile(r"checkpoints?|ckpts?|(fold|version)[-_]?\d+|lightning_logs", re.IGNORECASE)
_LOWER = re.compile(
    r"loss|err|error|perplexity|ppl|wer|cer|fid|mse|mae|rmse|nll|bpc|bpb", re.IGNORECASE
)
_HIGHER = re.compile(
    r"acc|accuracy|bleu|f1|auc|auroc|map|iou|miou|dice|psnr|ssim|rouge\w*|top[-_]?\d+|precision"
    r"|recall|r2|fitness",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Criteria:
    """What is asked for; None where nothing is.

    Attributes:
        last: how many of the newest.
        best: how many of the best by `metric`; `mode` says whether lower or higher is better.
        steps: first, last, and of which number the steps are multiples.
        epochs: first and last.
        min_interval: how many steps, or epochs, lie between those chosen at least.
        metrics_file: a log with metrics.
        one_best_per_fold: whether the best of each folder is asked for.
    """

    last: int | None = None
    best: int | None = None
    metric: str | None = None
    mode: Mode | None = None
    steps: Bounds | None = None
    epochs: Bounds | None = None
    min_interval: int | None = None
    metrics_file: Path | None = None
    one_best_per_fold: bool = False

    @property
    def empty(self) -> bool:
        """Whether nothing is asked for, so that all are taken."""
        return self == Criteria(mode=self.mode)


@dataclass(frozen=True)
class Candidate:
    """A checkpoint that was looked at: what is known of it, and why it was chosen or not."""

    path: Path
    step: int | None = None
    epoch: int | None = None
    metric: float | None = None
    chosen: bool = True
    why: str = "named"


@dataclass(frozen=True)
class Selection:
    """All candidates, and what a person should hear of.

    `metric` and `mode` are what the best were chosen by.
    """

    candidates: tuple[Candidate, ...]
    notes: tuple[str, ...] = ()
    metric: str | None = None
    mode: Mode | None = None

    @property
    def chosen(self) -> tuple[Path, ...]:
        """The chosen checkpoints; the oldest first, where that was asked about."""
        return tuple(one.path for one in self.candidates if one.chosen)


@dataclass(frozen=True)
class _Found:
    """A candidate with all that is known of it, and the folder that it was found in."""

    candidate: Candidate
    metadata: Metadata
    folder: Path


def parse_range(text: str) -> Bounds:
    """The bounds in "A:B" or "A:B:EVERY", each of which may be left out; one number is both.

    Raises:
        UsageError: it is neither.
    """
    parts = text.split(":")
    try:
        bounds = [int(part) if part.strip() else None for part in parts]
    except ValueError:
        bounds = []
    if len(bounds) == 1 and bounds[0] is not None:
        bounds *= 2
    if not 2 <= len(bounds) <= 3 or any(bound is not None and bound < 0 for bound in bounds):
        hint = "write it as 1000:5000, 1000: or 1000:5000:500"
        raise UsageError(f"the range {text!r} is not understood", hint=hint)
    first, last, every = [*bounds, None][:3]
    if every == 0 or (first is not None and last is not None and first > last):
        raise UsageError(f"the range {text!r} is empty", hint="write it as FIRST:LAST[:EVERY]")
    return first, last, every


def select(
    arguments: Sequence[str | os.PathLike[str]], criteria: Criteria, output: Path | None = None
) -> Selection:
    """Chooses checkpoints.

    Files and checkpoint directories that are named one by one are all taken, in their order, where
    nothing else is asked for. What is found in a run's directory or by a pattern is sorted by step,
    epoch and name; copies of one checkpoint count once, and earlier outputs do not count.

    Args:
        arguments: files, checkpoint directories, directories of runs, and glob patterns.
        criteria: what is asked for.
        output: of the merge, which is no candidate.

    Raises:
        UsageError: the criteria do not fit each other, or a metric has no direction.
        MergeError: there are fewer checkpoints than asked for, or they do not say what is needed.
    """
    _check(criteria)
    runs = not criteria.empty or len(arguments) == 1
    try:
        places = [(place, *_expanded(Path(place), runs=runs)) for place in arguments]
    except OSError as error:
        raise MergeError(error.strerror or str(error), where=error.filename) from None
    if criteria.empty and not any(many for _, _, many in places):
        return Selection(tuple(Candidate(path) for _, paths, _ in places for path in paths))
    log = None if criteria.metrics_file is None else read_log(criteria.metrics_file)
    found: list[_Found] = []
    left: list[Candidate] = []
    for place, paths, many in places:
        for path in paths:
            one = _looked_at(path, Path(place) if many else path.parent, log, left, strict=not many)
            if one is not None:
                found.append(one)
    found.sort(key=_age)
    found = _without_ours(found, output, left)
    found, notes = _without_copies(found, left)
    if not found:
        listed = named([str(one.path) for one in left]) if left else "nothing"
        where = Path(arguments[0]) if arguments else None
        raise MergeError(f"no checkpoint to average; found {listed}", where=where)
    found = _within(found, criteria, left)
    metric, mode = _direction(found, criteria)
    if metric is not None:
        found = [_measured(one, metric) for one in found]
        notes.append(f"best is the {'lowest' if mode == 'min' else 'highest'} {metric}")
    chosen = _picked(found, criteria, mode, left)
    notes += _gaps(chosen)
    rest = sorted(left, key=lambda one: _order(one.step, one.epoch, one.path))
    return Selection((*chosen, *rest), tuple(notes), metric, mode)


def direction(metric: str) -> Mode | None:
    """Whether a metric of this name is better where it is lower or higher; None if both may be."""
    words = [word for word in re.split(r"[^A-Za-z0-9]+|(?<=[a-z])(?=[A-Z])", metric) if word]
    lower = any(_LOWER.fullmatch(word) for word in words)
    higher = any(_HIGHER.fullmatch(word) for word in words)
    return None if lower == higher else "min" if lower else "max"


def _check(criteria: Criteria) -> None:
    for name in ("last", "best", "min_interval"):
        number = getattr(criteria, name)
        if number is not None and number < 1:
            raise UsageError(f"--{name.replace('_', '-')} is {number}", hint="give one or more")
    if criteria.last is not None and (criteria.best is not None or criteria.one_best_per_fold):
        raise UsageError("--last and the best exclude each other", hint="give one of them")
    if criteria.best is not None and criteria.one_best_per_fold:
        raise UsageError("--best and --one-best-per-fold exclude each other", hint="give one")


# What arguments stand for


def _expanded(place: Path, *, runs: bool) -> tuple[list[Path], bool]:
    """The checkpoints that an argument stands for, and whether it may stand for many.

    `runs`: whether directories may be runs. Several directories that are named one by one, with
    nothing else asked for, are checkpoints; files of different names in them belong together.
    """
    if not os.path.lexists(place) and glob.has_magic(str(place)):
        names = sorted(glob.glob(str(place), recursive=True), key=_natural)  # noqa: PTH207 - any root
        if not names:
            raise MergeError("no file matches the pattern", where=place)
        return [path for name in names for path in _expanded(Path(name), runs=False)[0]], True
    if runs and place.is_dir():
        whole = is_one(place)
        found = [path for path in _of_run(place) if path.is_dir() or not whole]
        if found and not (whole and of_a_run(place.name)):
            return sorted(found, key=lambda path: _natural(str(path))), True
    return [place], False


def _of_run(folder: Path) -> Iterator[Path]:
    """The checkpoints in a run's directory: files, sub-folders, and those below checkpoints/."""
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith(".") or TEMPORARY in entry.name or _BESIDE.match(entry.name):
            continue
        if entry.is_dir() and (of_a_run(entry.name) or (entry / STATE).is_file()):
            yield entry
        elif entry.is_dir() and _FOLDERS.fullmatch(entry.name):
            yield from _of_run(entry)
        elif entry.is_file() and entry.suffix.lower() in SUFFIXES:
            yield entry


def _natural(text: str) -> list[tuple[int, int | str]]:
    """A key that sorts numbers in names as numbers."""
    parts = re.split(r"(\d+)", text)
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in parts]


def _looked_at(
    path: Path, folder: Path, log: Log | None, left: list[Candidate], *, strict: bool
) -> _Found | None:
    try:
        known = read_metadata(scan(path))
    except MergeError as error:
        if strict:
            raise
        left.append(Candidate(path, chosen=False, why=f"no checkpoint: {error.what}"))
        return None
    except OSError as error:
        raise MergeError(error.strerror or str(error), where=path) from None
    if log is not None:
        known = replace(known, metrics={**known.metrics, **log.of(path, known)})
    return _Found(Candidate(path, known.step, known.epoch), known, folder)


def _age(found: _Found) -> tuple[object, ...]:
    one = found.candidate
    return _order(one.step, one.epoch, one.path)


def _order(step: int | None, epoch: int | None, path: Path) -> tuple[object, ...]:
    return (
        step is None and epoch is None,
        -1 if step is None else step,
        -1 if epoch is None else epoch,
        _natural(str(path)),
    )


# What does not count


def _without_ours(found: list[_Found], output: Path | None, left: list[Candidate]) -> list[_Found]:
    kept = []
    for one in found:
        path = one.candidate.path
        is_output = output is not None and output.exists() and path.samefile(output)
        if one.metadata.ours or is_output:
            why = "an earlier output of merge-avg"
            left.append(replace(one.candidate, chosen=False, why=why))
        else:
            kept.append(one)
    return kept


def _without_copies(found: list[_Found], left: list[Candidate]) -> tuple[list[_Found], list[str]]:
    kept: list[_Found] = []
    notes: list[str] = []
    # A name that says something is kept rather than "last.ckpt".
    for one in sorted(found, key=lambda one: name_metadata(one.candidate.path) == Metadata()):
        twin = next((other for other in kept if _is_copy(one.candidate, other.candidate)), None)
        if twin is None:
            kept.append(one)
            continue
        why = f"a copy of {twin.candidate.path.name}"
        left.append(replace(one.candidate, chosen=False, why=why))
        notes.append(f"{one.candidate.path} is {why} and is counted once")
    return sorted(kept, key=_age), notes


def _is_copy(one: Candidate, other: Candidate) -> bool:
    a, b = one.path, other.path
    if (one.step, one.epoch) != (other.step, other.epoch) or a.is_dir() or b.is_dir():
        return a.samefile(b)
    return a.samefile(b) or (a.stat().st_size == b.stat().st_size and _same_bytes(a, b))


def _same_bytes(a: Path, b: Path) -> bool:
    return filecmp.cmp(a, b, shallow=False)


# What is asked for


def _within(found: list[_Found], criteria: Criteria, left: list[Candidate]) -> list[_Found]:
    bounds: list[tuple[str, Bounds | None, Callable[[Candidate], int | None]]] = [
        ("step", criteria.steps, lambda one: one.step),
        ("epoch", criteria.epochs, lambda one: one.epoch),
    ]
    for name, wanted, value in bounds:
        if wanted is None:
            continue
        _need(found, name, value)
        kept = []
        for one in found:
            number = value(one.candidate)
            if number is not None and _inside(number, wanted):
                kept.append(one)
            else:
                why = f"{name} {number} is not asked for"
                left.append(replace(one.candidate, chosen=False, why=why))
        if not kept:
            listed = named([_shown(one.candidate) for one in found], 8)
            raise MergeError(f"no checkpoint has a {name} that is asked for: there are {listed}")
        found = kept
    return _spaced(found, criteria, left) if criteria.min_interval else found


def _inside(number: int, bounds: Bounds) -> bool:
    first, last, every = bounds
    low, high = first is None or number >= first, last is None or number <= last
    return low and high and number % (every or 1) == 0


def _spaced(found: list[_Found], criteria: Criteria, left: list[Candidate]) -> list[_Found]:
    """The newest, and of the others those that are far enough from the next one chosen."""
    by_step = all(one.candidate.step is not None for one in found)
    if not by_step:
        _need(found, "epoch", lambda one: one.epoch)
    kept: list[_Found] = []
    after: int | None = None
    for one in reversed(found):
        at = one.candidate.step if by_step else one.candidate.epoch
        if at is None or (after is not None and after - at < (criteria.min_interval or 0)):
            why = "too near to the next one"
            left.append(replace(one.candidate, chosen=False, why=why))
        else:
            kept.append(one)
            after = at
    return kept[::-1]


def _need(
    found: Sequence[_Found], name: str, value: Callable[[Candidate], int | float | None]
) -> None:
    for one in found:
        if value(one.candidate) is None:
            hint = f"put it into the name, as in {name}=3.pt, or leave out the option"
            raise MergeError(f"its {name} is not known", where=one.candidate.path, hint=hint)


def _direction(found: list[_Found], criteria: Criteria) -> tuple[str | None, Mode | None]:
    """The metric that decides, and what is better."""
    if criteria.best is None and not criteria.one_best_per_fold and criteria.metric is None:
        return None, None
    names = sorted({name for one in found for name in one.metadata.metrics} - {"step", "epoch"})
    metric = criteria.metric
    if metric is None:
        if len(names) != 1:
            listed = named(names, 8) if names else "none"
            hint = "name the one that decides with --metric"
            raise UsageError(f"what is best depends on a metric; known are {listed}", hint=hint)
        metric = names[0]
    mode = criteria.mode or direction(metric)
    if mode is None:
        hint = "say --mode min or --mode max"
        raise UsageError(f"whether a lower {metric!r} is better is not obvious", hint=hint)
    return metric, mode


def _measured(one: _Found, metric: str) -> _Found:
    return replace(one, candidate=replace(one.candidate, metric=_value(one.metadata, metric)))


def _value(known: Metadata, metric: str) -> float | None:
    """The metric of this name; its only one that is spelt so, or that ends so, will do as well."""
    if metric in known.metrics:
        return known.metrics[metric]
    plain = _plain(metric)
    for alike in (
        [name for name in known.metrics if _plain(name) == plain],
        [name for name in known.metrics if _plain(name).endswith(f"_{plain}")],
    ):
        if len(alike) == 1:
            return known.metrics[alike[0]]
    return None


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def _picked(
    found: list[_Found], criteria: Criteria, mode: Mode | None, left: list[Candidate]
) -> list[Candidate]:
    if criteria.one_best_per_fold:
        folders = list(dict.fromkeys(_fold(one) for one in found))
        groups = [[one for one in found if _fold(one) == folder] for folder in folders]
        return [
            replace(winner, why=f"the best of {folder.name}")
            for folder, group in zip(folders, groups, strict=True)
            for winner in _best(group, 1, mode, left, f"the best of {folder.name}")
        ]
    if criteria.best is not None:
        return _best(found, criteria.best, mode, left, f"among the best {criteria.best}")
    if criteria.last is None:
        return [replace(one.candidate, why="asked for") for one in found]
    by_step = all(one.candidate.step is not None for one in found)
    if not by_step:
        _need(found, "epoch", lambda one: one.epoch)
    if not by_step or len({one.candidate.step for one in found}) < len(found):
        found = sorted(found, key=lambda one: (one.candidate.epoch or 0, *_age(one)))
    _enough(found, criteria.last, "last")
    why = f"among the last {criteria.last}"
    older = found[: len(found) - criteria.last]
    left += [replace(one.candidate, chosen=False, why=f"not {why}") for one in older]
    return [replace(one.candidate, why=why) for one in found[len(found) - criteria.last :]]


def _fold(one: _Found) -> Path:
    """The folder that tells folds apart: that of the argument, or one below it named fold*."""
    below = one.candidate.path.relative_to(one.folder).parts if _is_below(one) else ()
    if len(below) > 1 and re.match(r"fold", below[0], re.IGNORECASE):
        return one.folder / below[0]
    inside = [p for p in one.candidate.path.parents if re.match(r"fold", p.name, re.IGNORECASE)]
    return inside[0] if inside else one.folder


def _is_below(one: _Found) -> bool:
    return one.candidate.path.is_relative_to(one.folder)


def _best(
    found: list[_Found], count: int, mode: Mode | None, left: list[Candidate], why: str
) -> list[Candidate]:
    measured = []
    for one in found:
        value = one.candidate.metric
        if value is None or math.isnan(value):
            known = "is not a number" if value is not None else "is not known"
            left.append(replace(one.candidate, chosen=False, why=f"its metric {known}"))
        else:
            measured.append(one)
    _enough(measured, count, "best", found)
    sign = 1 if mode == "max" else -1
    ranked = sorted(measured, key=lambda one: sign * (one.candidate.metric or 0.0))
    # Of equals, the later one counts: sorting is stable, and found is sorted by age.
    winners = {id(one) for one in ranked[len(ranked) - count :]}
    left += [
        replace(one.candidate, chosen=False, why=f"not {why}")
        for one in measured
        if id(one) not in winners
    ]
    return [replace(one.candidate, why=why) for one in measured if id(one) in winners]


def _enough(
    found: Sequence[_Found], count: int, what: str, everything: Sequence[_Found] | None = None
) -> None:
    if len(found) >= count:
        return
    listed = named([_shown(one.candidate) for one in everything or found], 8)
    noun = "checkpoint" if len(found) == 1 else "checkpoints"
    where = " with the metric" if what == "best" else ""
    hint = "ask for fewer, or look at them with --dry-run"
    raise MergeError(
        f"the {what} {count} are asked for, and there are {len(found)} {noun}{where}: {listed}",
        hint=hint,
    )


def _shown(one: Candidate) -> str:
    return one.path.name


def _gaps(chosen: Sequence[Candidate]) -> Iterator[str]:
    """A note where neighbours lie much further from each other than others do."""
    for name in ("epoch", "step"):
        numbers = [getattr(one, name) for one in chosen]
        if len(numbers) < 3 or None in numbers:
            continue
        numbers = sorted(numbers)
        steps = [b - a for a, b in itertools.pairwise(numbers) if b > a]
        wide = [(a, b) for a, b in itertools.pairwise(numbers) if steps and b - a > 2 * min(steps)]
        if wide:
            a, b = wide[0]
            yield f"there is a gap between {name} {a} and {name} {b} of those chosen"
            return
