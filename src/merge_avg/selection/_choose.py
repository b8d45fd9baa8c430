"""From what the user named to a matrix of weights: which checkpoints, and how much of each.

An argument stands for one checkpoint, the many of a run, or what a pattern matches. The chosen
ones, those left out, and why, are one table: nothing is left out without a word.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from merge_avg.checkpoint import Layout
from merge_avg.errors import MergeError, UsageError, counted, named
from merge_avg.formats import scan
from merge_avg.io import without_collector
from merge_avg.options import Criteria, Location, Mode, Options, Series, Weight, Weighting
from merge_avg.selection._copies import sum_of
from merge_avg.selection._criteria import (
    NAMED,
    Age,
    Candidate,
    age_of,
    by_age,
    check,
    pick,
    refuse_unordered,
    told_apart,
    without_copies,
)
from merge_avg.selection._logs import Log, read_log
from merge_avg.selection._metadata import read_metadata
from merge_avg.selection._names import CLOCKS, is_average, read_names
from merge_avg.selection._places import Place, expand, final_models, fold_of
from merge_avg.selection._schemes import BY_TIME, exponent, phema, resolve
from merge_avg.selection._series import members, outputs

# A layout takes about 500 bytes for each tensor: those kept take 32 MiB. A run of many large
# checkpoints must not fill the memory with layouts of which few are used.
_MOST_TENSORS = 1 << 16
_MOST_LISTED = 8
# Why averages are left out where there are other checkpoints.
_OURS = "an earlier output of merge-avg"
_AVERAGE = "an average of other checkpoints, by its name"


@dataclass(frozen=True)
class Choice:
    """The checkpoints of a merge, and how much of each goes into each output."""

    paths: tuple[Path, ...]
    outputs: dict[Path, tuple[Weight, ...]]  # with a weight for each of the `paths`
    # All looked at; empty where the user named each checkpoint, and none tells anything.
    candidates: tuple[Candidate, ...]
    notes: tuple[str, ...]  # for the user, one sentence each
    ages: Mapping[Path, Age] = field(default_factory=dict)  # of those that tell a step or epoch
    # Layouts of those scanned and kept, and of others without their archives: see `prepare`.
    scanned: tuple[Mapping[Path, Layout], ...] = ({}, {})

    def newest(self, paths: Iterable[Path]) -> Path | None:
        """Return the newest of some of the paths, if one of them tells its age."""
        # Of several of the same age, as folds are, `max` takes the first.
        return max(
            (one for one in paths if one in self.ages), key=self.ages.__getitem__, default=None
        )

    def templated(self, options: Options, paths: Iterable[Path] | None = None) -> Options:
        """Return options by which the newest of the paths is the template, where none is named."""
        newest = self.newest(self.paths if paths is None else paths)
        named = options.template is not None or newest is None
        return options if named else replace(options, template=newest)


class _Layouts(dict[Path, Layout]):
    """The layouts scanned last, so that planning need not scan the chosen checkpoints again."""

    def __init__(self, *, every: bool) -> None:
        self.every = every  # whether nearly all of them will be chosen
        self.tensors = 0
        self.sources: dict[Path, Layout] = {}

    def __missing__(self, path: Path) -> Layout:
        if path in self.sources:
            return self.sources[path]
        layout = self[path] = scan(path)
        self.tensors += len(layout.tensors)
        # The oldest goes first: it is mostly the last checkpoints of a run that are chosen.
        while self.tensors > _MOST_TENSORS:
            oldest = next(iter(self))
            gone = self.pop(oldest)
            self.tensors -= len(gone.tensors)
            if self.every:  # the plan will hold it in any case
                self.sources[oldest] = gone.source
        return layout


def choose(
    arguments: Sequence[str | os.PathLike[str]],
    output: Path,
    criteria: Criteria,
    series: Series,
    weighting: Weighting,
    *,
    listed: bool = False,
) -> Choice:
    """Choose checkpoints, and their weights in each average.

    UsageError where options do not fit each other, or a metric has no direction; MergeError where
    there are fewer checkpoints than asked for, or one does not say what is needed. Numbers as
    weights belong to the arguments in the order in which these are `listed`.
    """
    if not arguments:
        raise UsageError("there are no checkpoints to average", hint="name at least one")
    _check(criteria, series, weighting)
    layouts = _Layouts(every=criteria.empty)
    numbers = weighting.weights
    listed = listed or numbers is not None
    places = expand(arguments, runs=not criteria.empty)
    if numbers is not None and all(place.found != "run" for place in places):
        _refuse_count(len(numbers), len(places))  # before 0.7 0.3 is looked for as a checkpoint
    with without_collector():
        candidates, notes, mode = _select(places, output, criteria, layouts, listed=listed)
    chosen = [one for one in candidates if one.chosen]
    paths = tuple(one.path for one in chosen)
    if numbers is not None:
        _refuse_count(len(numbers), len(paths))
    age = age_of(chosen)
    order = [number for number, _ in sorted(enumerate(chosen), key=lambda one: age(one[1]))]
    # 1.pt and 2.pt may be folds: what is only guessed makes neither a template nor a note.
    sure = [one for one in chosen if one.said.timed and (one.said.counted or not one.said.guessed)]
    ages = {one.path: age(one) for one in sure}
    by_hand = numbers is not None and len(set(numbers)) > 1
    if by_hand and len(sure) == len(chosen) and order != sorted(order):
        names = named([path.name for path in paths], _MOST_LISTED)
        notes.append(f"the weights are in the order of the arguments, not by age: {names}")
    if (by_order := _by_order(series, weighting)) is not None:
        refuse_unordered(chosen, by_order)
    clock, times = _times(chosen)
    notes += _uneven(weighting.scheme or "", clock, times)

    # Each average of a series is weighted on its own: the oldest of *its* checkpoints is the first.
    def weigh(numbered: Sequence[int]) -> Sequence[Weight]:
        if numbers is not None:
            return [numbers[index] for index in numbered]
        if weighting.sigma is not None:
            return phema([_snapshot(layouts[paths[index]]) for index in numbered], weighting.sigma)
        metrics = [chosen[index].metric for index in numbered]
        moments = [times[index] for index in numbered] if times else ()
        how = weighting.scheme or "uniform", len(numbered), metrics, mode or criteria.mode
        return resolve(*how, moments)

    steps = times if clock == "step" else ()
    table = outputs(output, members(paths, series, order, steps), len(paths), weigh)
    # A stored EMA may be the very one that is asked for.
    averages = series.several and weighting.sigma is None and not criteria.allow_trivial
    for path, row in table.items() if averages else ():
        used = [one for one, weight in zip(paths, row, strict=True) if weight]
        if len(used) == 1:
            hint = "name more checkpoints, or allow it with --allow-trivial"
            raise MergeError(f"it alone has a weight in {path}", where=used[0], hint=hint)
    # A table of checkpoints that were all named, and say nothing, would only repeat their names.
    plain = all(one.chosen and one.step is one.epoch is one.metric is None for one in candidates)
    kept = {path: layouts[path] for path in paths if path in layouts}
    said = () if plain else tuple(candidates)
    return Choice(paths, table, said, tuple(notes), ages, (kept, layouts.sources))


def _times(chosen: Sequence[Candidate]) -> tuple[str, Sequence[int]]:
    """Return the clock by which all of the chosen differ, steps or epochs, and their times."""
    for clock in ("step", "epoch"):
        times = [getattr(one, clock) for one in chosen]
        if None not in times and len({*times}) == len(times):
            # An epoch is over when it is saved: frameworks that count from 0 mean the first.
            return clock, [time + (clock == "epoch" and min(times) == 0) for time in times]
    return "step", ()


def _by_order(series: Series, weighting: Weighting) -> str | None:
    """Return the option that goes by the age of checkpoints, if one does."""
    if weighting.scheme and weighting.scheme not in ("uniform", "metric"):
        return f"--weighting {weighting.scheme}"
    return "--prefixes" if series.prefixes else "--sliding" if series.sliding else None


def _uneven(scheme: str, clock: str, times: Sequence[int]) -> Iterator[str]:
    """Yield a note on weights that go by time where that is not what the order tells."""
    if scheme.partition(":")[0] not in BY_TIME:
        return
    if not times:
        yield f"{scheme} counts checkpoints, not steps: they have none, or the same"
    elif len({b - a for a, b in itertools.pairwise(sorted(times))}) > 1:
        yield f"{scheme} goes by {clock}s, which are not evenly apart"


def _refuse_count(weights: int, checkpoints: int) -> None:
    if weights != checkpoints:
        counts = f"{counted(weights, 'weight')} for {counted(checkpoints, 'checkpoint')}"
        raise UsageError(counts, hint="give one for each, with commas between, as in -w 0.7,0.3")


def _check(criteria: Criteria, series: Series, weighting: Weighting) -> None:
    """Raise UsageError, before anything is read, for options that exclude each other or are odd."""
    asked = [weighting.weights, weighting.scheme, weighting.sigma]
    if sum(one is not None for one in asked) > 1:
        what = "--weights, --weighting and --phema exclude each other"
        raise UsageError(what, hint="give one of them")
    check(criteria)
    asked_for = series.leave_one_out, series.prefixes, series.sliding, len(series.lasts) > 1
    if sum(map(bool, asked_for)) > 1:
        what = "--leave-one-out, --prefixes, --sliding and a second --last exclude each other"
        raise UsageError(what, hint="run them one after the other")
    decided = criteria.best is not None or criteria.one_best_per_fold
    if weighting.scheme == "metric" and criteria.metric is None and not decided:
        hint = "name it, as in --metric val_loss"
        raise UsageError("weights by a metric need one", hint=hint)
    if not decided and weighting.scheme != "metric":
        idle = {"metric": criteria.metric, "mode": criteria.mode, "metrics": criteria.metrics_file}
        for name in (name for name, value in idle.items() if value is not None):
            hint = "add --best N, --one-best-per-fold or --weighting metric, or leave it out"
            raise UsageError(f"--{name} decides nothing", hint=hint)
    if weighting.scheme is not None:
        resolve(weighting.scheme, 2, (1.0, 1.0), "max")
    if weighting.sigma is not None:
        exponent(weighting.sigma)


def refuse_trivial(choice: Choice) -> None:
    """Raise MergeError where there is nothing to average: a mean of one checkpoint."""
    if len(choice.paths) == 1:
        left = [f"{one.path.name} is {one.why}" for one in choice.candidates if not one.chosen]
        why = f": {left[0]}" if len(left) == 1 else f": {len(left):,} are left out" if left else ""
        hint = "name more, or allow it with --allow-trivial"
        raise MergeError(f"it is the only checkpoint{why}", where=choice.paths[0], hint=hint)


def refuse_place(output: Location, choice: Choice, options: Options) -> None:
    """Raise UsageError for an output that cannot be meant: stdout, or a folder for a file."""
    text = os.fspath(output)
    if text == "-":
        raise UsageError("an output is not written to stdout", hint="name a file, or ./- for this")
    folder = options.max_shard_size is not None or choice.paths[0].is_dir()
    if text.endswith(("/", os.sep)) and not folder:
        hint = f"name a file in it, as in {text}merged{choice.paths[0].suffix}"
        raise UsageError(f"{text} is a directory, and the average is a file", hint=hint)
    if any("{name}" in str(path) for path in choice.outputs):
        hint = "{name} tells several averages apart, as of --leave-one-out; choose another name"
        raise UsageError("one average has no {name}", hint=hint)


def _snapshot(layout: Layout) -> tuple[float, float]:
    """Return the step and the relative width of a stored EMA."""
    found = read_metadata(layout)
    if found.step is None or found.sigma is None:
        what = f"{layout.path}: its step and the width of its EMA are not known"
        hint = "name it as in snapshot-0002147-0.100.pt: the step, and the relative width"
        raise UsageError(what, hint=hint)
    return float(found.step), found.sigma


def _select(
    places: Sequence[Place],
    output: Path,
    criteria: Criteria,
    layouts: _Layouts,
    *,
    listed: bool,
) -> tuple[list[Candidate], list[str], Mode | None]:
    """Return all candidates, the chosen ones first; notes; and the direction of the metric.

    The chosen ones come in the order of the arguments, but sorted by age where these stand for many
    or not all are wanted. Copies of one checkpoint count once, and averages do not count, unless
    weights are `listed`.
    """
    log = Log() if criteria.metrics_file is None else read_log(criteria.metrics_file)
    # Only the user knows what a number counts that no word explains.
    clocks = [kind for kind in CLOCKS if getattr(criteria, f"{kind}s") is not None]
    everything = [path for place in places for path in place.checkpoints]
    names = read_names(everything, clocks[0] if len(clocks) == 1 else None)
    seen: list[Candidate] = []
    for number, place in enumerate(places):
        how = place.found
        for path in place.checkpoints:
            fold = fold_of(path, path.parent if how == "name" else place.path)
            one = Candidate(path, name=names[path], fold=fold, listed=number)
            try:
                one = _read(one, layouts, log, summed=how != "name")
            except MergeError as error:
                denied = isinstance(error.__context__, PermissionError)  # it may be one
                if how == "name" or denied:
                    raise
                # A run holds other files too. Only what the user named has to be a checkpoint.
                seen.append(one.left(f"no checkpoint: {error.what}"))
                continue
            if one.said.ours and not listed and output.exists() and path.samefile(output):
                one = one.left(_OURS)
            elif (one.said.ours or is_average(path)) and not (listed and how != "run"):
                one = replace(one, why=_OURS if one.said.ours else _AVERAGE)
            seen.append(one)
    if not told_apart(seen):  # by their times, or else by their weights, whose sums take a while
        seen = [one if one.rough else _summed(one, layouts, named=True) for one in seen]
    # Where there is nothing but averages, or what only --key can name, it is what is asked for.
    sure = any(one.chosen and one.why == NAMED for one in seen)
    found = [one for one in seen if one.chosen and (one.why == NAMED or not sure)]
    left = [one.left(one.why) for one in seen if not one.chosen or (sure and one.why != NAMED)]
    notes = [*final_models(places)]
    reasons = {why: [one.path for one in left if one.why == why] for why in (_OURS, _AVERAGE)}
    notes += [f"left out {named(paths)}: {why}" for why, paths in reasons.items() if paths]
    if ours := [one.path for one in found if one.said.ours and one.why == NAMED]:
        notes.append(f"averaged too, as weights are given: {named(ours)}, {_OURS}")
    found, copies = without_copies(
        found, lambda path: sum_of(layouts[path]), left, criteria, listed=listed
    )
    if not found:
        told = named([f"{one.path} ({one.why})" for one in left]) if left else "nothing"
        where = places[0].path if places else None
        raise MergeError(f"no checkpoint to average; found {told}", where=where)
    named_all = criteria.empty and all(place.found == "name" for place in places)
    chosen, mode, more = pick(found, criteria, left, mixed=named_all)
    if criteria.empty:
        chosen.sort(key=lambda one: one.listed)  # of a run, the oldest still comes first
    return [*chosen, *by_age(left)], [*notes, *copies, *more], mode


def _read(one: Candidate, layouts: _Layouts, log: Log, *, summed: bool) -> Candidate:
    """Return a candidate with what is known of it, and a rough sum of its weights if asked for."""
    layout = layouts[one.path]
    said = read_metadata(layout, one.name)
    said = replace(said, metrics={**said.metrics, **log.of(one.path, said)})
    one = replace(one, step=said.step, epoch=said.epoch, said=said)
    return _summed(one, layouts) if summed else one


def _summed(one: Candidate, layouts: _Layouts, *, named: bool = False) -> Candidate:
    """Return a candidate with a rough sum of its weights; without any it may be no checkpoint."""
    try:
        return replace(one, rough=sum_of(layouts[one.path], rough=True))
    except MergeError as error:
        if isinstance(error.__context__, OSError):
            raise
        # What is named is left to planning, as --key may find weights in it.
        return one if named else replace(one, why=f"no checkpoint: {error.what}")
