"""From what the user named to a matrix of weights: which checkpoints, and how much of each.

An argument stands for one checkpoint, the many of a run, or what a pattern matches. The chosen
ones, those left out, and why, are one table: nothing is left out without a word.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from merge_avg.checkpoint import Layout
from merge_avg.errors import MergeError, UsageError, failure, named
from merge_avg.formats import scan
from merge_avg.formats.directory import SUFFIXES, is_one, of_a_run
from merge_avg.io import TEMPORARY
from merge_avg.options import Criteria, Mode, Series, Weight, Weighting
from merge_avg.selection._copies import sum_of
from merge_avg.selection._criteria import (
    NAMED,
    Candidate,
    by_age,
    check,
    natural,
    pick,
    without_copies,
)
from merge_avg.selection._logs import Log, read_log
from merge_avg.selection._metadata import STATE, read_metadata
from merge_avg.selection._names import CLOCKS, is_average, read_names
from merge_avg.selection._schemes import phema, resolve

# A layout takes about 500 bytes for each tensor: those kept take 32 MiB. A run of many large
# checkpoints must not fill the memory with layouts of which few are used.
_MOST_TENSORS = 1 << 16
# States of a training beside the checkpoints of a run, by torch, Accelerate and transformers.
_BESIDE = re.compile(r"(?i)optimizer|scheduler|scaler|rng_state|random_states|training_args")
# Folders of a run that hold checkpoints: Lightning's, those of many, and one for each fold.
_FOLDERS = re.compile(r"(?i)checkpoints?|ckpts?|(fold|version)[-_]?\d+|lightning_logs")
_FOLD = re.compile(r"(?i)fold")


@dataclass(frozen=True)
class Choice:
    """The checkpoints of a merge, and how much of each goes into each output."""

    paths: tuple[Path, ...]
    outputs: dict[Path, tuple[Weight, ...]]  # with a weight for each of the `paths`
    candidates: tuple[Candidate, ...]  # all looked at; empty where the user named each checkpoint
    notes: tuple[str, ...]  # for the user, one sentence each
    layouts: Mapping[Path, Layout] = field(default_factory=dict)  # of those scanned and kept


class _Layouts(dict[Path, Layout]):
    """The layouts scanned last, so that planning need not scan the chosen checkpoints again."""

    tensors = 0

    def __missing__(self, path: Path) -> Layout:
        layout = self[path] = scan(path)
        self.tensors += len(layout.tensors)
        # The oldest goes first: it is mostly the last checkpoints of a run that are chosen.
        while self.tensors > _MOST_TENSORS:
            self.tensors -= len(self.pop(next(iter(self))).tensors)
        return layout


def choose(
    arguments: Sequence[str | os.PathLike[str]],
    output: Path,
    criteria: Criteria,
    series: Series,
    weighting: Weighting,
) -> Choice:
    """Choose checkpoints, and their weights in each average.

    UsageError where options do not fit each other, or a metric has no direction; MergeError where
    there are fewer checkpoints than asked for, or one does not say what is needed.
    """
    asked = [weighting.weights, weighting.scheme, weighting.sigma]
    if sum(one is not None for one in asked) > 1:
        what = "--weights, --weighting and --phema exclude each other"
        raise UsageError(what, hint="give one of them")
    layouts = _Layouts()
    candidates, notes, mode = _select(arguments, output, criteria, layouts)
    paths = tuple(one.path for one in candidates if one.chosen)
    if weighting.weights is not None and len(weighting.weights) != len(paths):
        counts = f"{len(weighting.weights)} weights for {len(paths)} checkpoints"
        raise UsageError(counts, hint="give one weight a checkpoint, as in -w 0.7,0.3")

    # Each average of a series is weighted on its own: the oldest of *its* checkpoints is the first.
    def weigh(chosen: Sequence[int]) -> Sequence[Weight]:
        if weighting.weights is not None:
            return [weighting.weights[index] for index in chosen]
        if weighting.sigma is not None:
            return phema([_snapshot(layouts[paths[index]]) for index in chosen], weighting.sigma)
        # The chosen checkpoints are the first of the candidates, in the order of `paths`.
        metrics = [candidates[index].metric for index in chosen]
        return resolve(weighting.scheme or "uniform", len(chosen), metrics, mode or criteria.mode)

    table = outputs(output, members(paths, series), len(paths), weigh)
    # A table of checkpoints that were all named, and say nothing, would only repeat their names.
    plain = all(one.chosen and one.step is one.epoch is one.metric is None for one in candidates)
    kept = {path: layouts[path] for path in paths if path in layouts}
    return Choice(paths, table, () if plain else tuple(candidates), tuple(notes), kept)


def _snapshot(layout: Layout) -> tuple[float, float]:
    """Return the step and the relative width of a stored EMA."""
    found = read_metadata(layout)
    if found.step is None or found.sigma is None:
        what = f"{layout.path}: its step and the width of its EMA are not known"
        hint = "name it as in snapshot-0002147-0.100.pt: the step, and the relative width"
        raise UsageError(what, hint=hint)
    return float(found.step), found.sigma


def _select(
    arguments: Sequence[str | os.PathLike[str]], output: Path, criteria: Criteria, layouts: _Layouts
) -> tuple[list[Candidate], list[str], Mode | None]:
    """Return all candidates, the chosen ones first; notes; and the direction of the metric.

    What is named one by one is all taken, in its order, where nothing else is asked for. What is
    found in a run's directory or by a pattern is sorted by step, epoch and name; copies of one
    checkpoint count once, and neither earlier outputs nor the `output` of this merge count.
    """
    check(criteria)
    # Several directories with nothing else asked for are checkpoints, whatever is in them.
    runs = not criteria.empty or len(arguments) == 1
    try:
        places = [(Path(place), *expand(Path(place), runs=runs)) for place in arguments]
    except OSError as error:
        raise MergeError(error.strerror or str(error), where=error.filename) from None
    if criteria.empty and not any(many for _, _, many in places):
        return [Candidate(path) for _, paths, _ in places for path in paths], [], None
    log = Log() if criteria.metrics_file is None else read_log(criteria.metrics_file)
    # Only the user knows what a number counts that no word explains.
    clocks = [kind for kind in CLOCKS if getattr(criteria, f"{kind}s") is not None]
    everything = [path for _, paths, _ in places for path in paths]
    names = read_names(everything, clocks[0] if len(clocks) == 1 else None)
    seen: list[Candidate] = []
    for place, paths, many in places:
        for path in paths:
            fold = _fold_of(path, place if many else path.parent)
            one = Candidate(path, name=names[path], fold=fold)
            try:
                one = _read(one, layouts, log)
            except MergeError as error:
                if not many or isinstance(error.__context__, PermissionError):  # it may be one
                    raise
                # A run holds other files too. Only what the user named has to be a checkpoint.
                seen.append(one.left(f"no checkpoint: {error.what}"))
                continue
            if one.said.ours or (output.exists() and path.samefile(output)):
                one = one.left("an earlier output of merge-avg")
            elif is_average(path):
                one = replace(one, why="an average of other checkpoints, by its name")
            seen.append(one if many or one.rough is not None else replace(one, why=NAMED))
    # Where there is nothing but averages, or what only --key can name, it is what is asked for.
    sure = any(one.chosen and one.why == NAMED for one in seen)
    found = [one for one in seen if one.chosen and (one.why == NAMED or not sure)]
    left = [one.left(one.why) for one in seen if not one.chosen or (sure and one.why != NAMED)]
    found, notes = without_copies(
        found, lambda path: sum_of(layouts[path]), left, per_fold=criteria.one_best_per_fold
    )
    if not found:
        listed = named([str(one.path) for one in left]) if left else "nothing"
        where = Path(arguments[0]) if arguments else None
        raise MergeError(f"no checkpoint to average; found {listed}", where=where)
    chosen, mode, more = pick(found, criteria, left)
    return [*chosen, *by_age(left)], [*notes, *more], mode


def _read(one: Candidate, layouts: _Layouts, log: Log) -> Candidate:
    """Return a candidate with what is known of it, and a rough sum of its weights, if any."""
    layout = layouts[one.path]
    said = read_metadata(layout, one.name)
    said = replace(said, metrics={**said.metrics, **log.of(one.path, said)})
    one = replace(one, step=said.step, epoch=said.epoch, said=said)
    try:
        return replace(one, rough=sum_of(layout, rough=True))
    except MergeError as error:
        if isinstance(error.__context__, OSError):
            raise
        return replace(one, why=f"no checkpoint: {error.what}")


def _fold_of(path: Path, run: Path) -> Path:
    """Return the folder that tells folds apart: fold*/ below or above, or that of the argument."""
    below = [one for one in path.parents if one.parent == run]
    return next((one for one in (*below, *path.parents) if _FOLD.match(one.name)), run)


def expand(place: Path, *, runs: bool) -> tuple[list[Path], bool]:
    """Return the checkpoints that an argument stands for, and whether it may stand for many.

    With `runs` a directory may be a run, and otherwise is one checkpoint.
    """
    # A file may be called a[1].pt: only what does not exist is a pattern.
    if not os.path.lexists(place) and glob.has_magic(str(place)):
        paths = sorted(_matching(place), key=lambda path: natural(str(path)))
        _refuse_unlisted(place.parts)
        if not paths:
            raise MergeError("no file matches the pattern", where=place)
        return paths, True
    if runs and place.is_dir():
        # A Trainer's folder may hold its final model beside checkpoint-N/. As a run it stands for
        # these folders; the files of the final model are not checkpoints of their own.
        whole = is_one(place)
        found = [path for path in _of_run(place) if path.is_dir() or not whole]
        if found and not (whole and of_a_run(place.name)):
            return sorted(found, key=lambda path: natural(str(path))), True
    return [place], False


def _matching(pattern: Path) -> list[Path]:
    return [Path(name) for name in glob.glob(str(pattern), recursive=True)]  # noqa: PTH207 - any root


def _refuse_unlisted(parts: Sequence[str]) -> None:
    """Raise MergeError for a folder that a pattern leads through and that cannot be listed."""
    # glob passes over what it cannot look into.
    for count in range(1, len(parts)):
        if glob.has_magic(parts[count]) or parts[count - 1] == "**":
            for folder in filter(Path.is_dir, _matching(Path(*parts[:count]))):
                try:
                    os.scandir(folder).close()
                except OSError as error:
                    raise failure(error, "cannot be listed", folder) from None


def _of_run(folder: Path) -> Iterator[Path]:
    """Yield the checkpoints in a run's directory: files, folders, and those in known subfolders."""
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith(".") or TEMPORARY in entry.name or _BESIDE.match(entry.name):
            continue
        if entry.is_dir() and (of_a_run(entry.name) or (entry / STATE).is_file()):
            yield entry
        elif entry.is_dir() and _FOLDERS.fullmatch(entry.name):
            yield from _of_run(entry)
        elif entry.is_file() and entry.suffix.lower() in SUFFIXES:
            yield entry


# Several averages of the same checkpoints: which go into each, and what it is called.


def members(checkpoints: Sequence[Path], series: Series) -> dict[str, tuple[int, ...]]:
    """Return the numbers of the checkpoints, the oldest first, in each average, by its name."""
    if sum([series.leave_one_out, series.prefixes, len(series.lasts) > 1]) > 1:
        what = "--leave-one-out, --prefixes and a second --last exclude each other"
        raise UsageError(what, hint="run them one after the other")
    count = len(checkpoints)
    if series.several and count < 2:
        raise UsageError("several averages need at least two checkpoints", hint="name more of them")
    everything = tuple(range(count))
    if series.leave_one_out:
        names = enumerate(distinct_names(checkpoints))
        return {f"without-{name}": everything[:i] + everything[i + 1 :] for i, name in names}
    if series.prefixes:
        return {f"first-{size}": everything[:size] for size in range(2, count + 1)}
    # A single --last is a criterion: the selection has seen to it.
    if len(series.lasts) < 2:
        return {"": everything}
    for number in series.lasts:
        if not 1 <= number <= count:
            hint = "choose a smaller number for --last"
            raise UsageError(f"--last {number} of {count} checkpoints", hint=hint)
    return {f"last-{number}": everything[-number:] for number in series.lasts}


def distinct_names(paths: Sequence[Path]) -> tuple[str, ...]:
    """Return a name for each path, of as many of its last parts as tell all of them apart."""
    paths = [path if path.name.strip(".") else path.resolve() for path in paths]  # of "." and ".."
    for depth in range(1, max((len(path.parts) for path in paths), default=1) + 1):
        names = tuple("-".join([*path.parts[:-1], path.stem][-depth:]) for path in paths)
        if len(set(names)) == len(names):
            return tuple(name.lstrip("/") for name in names)
    # The same checkpoint twice, or paths that differ in their suffix only.
    return tuple(f"{number}-{path.stem}" for number, path in enumerate(paths, 1))


def outputs(
    pattern: Path,
    groups: Mapping[str, Sequence[int]],
    count: int,
    weigh: Callable[[Sequence[int]], Sequence[Weight]],
) -> dict[Path, tuple[Weight, ...]]:
    """Return each output, with `count` weights: those that `weigh` gives to a group, and zeros."""
    if len(groups) > 1 and "{name}" not in str(pattern):
        hint = "put {name} into it, as in -o 'avg-{name}.pt'"
        raise UsageError(f"{len(groups)} averages need as many outputs, not {pattern}", hint=hint)
    table: dict[Path, tuple[Weight, ...]] = {}
    for name, chosen in groups.items():
        weights = dict(zip(chosen, weigh(chosen), strict=True))
        # Without a series the average has no name, and the path is taken as it is.
        path = Path(str(pattern).replace("{name}", name)) if name else pattern
        table[path] = tuple(weights.get(index, 0) for index in range(count))
    return table
