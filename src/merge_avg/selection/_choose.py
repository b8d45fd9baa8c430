"""From what the user named to a matrix of weights: which checkpoints, and how much of each."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from merge_avg.checkpoint import Layout
from merge_avg.errors import UsageError
from merge_avg.formats import scan
from merge_avg.options import Criteria, Series, Weight, Weighting
from merge_avg.selection._criteria import Candidate
from merge_avg.selection._metadata import read_metadata
from merge_avg.selection._schemes import phema, resolve
from merge_avg.selection._select import select

# A layout takes about 500 bytes for each tensor, so those kept take at most 32 MiB. That is enough
# for 100 checkpoints of 600 tensors; a run of many large ones must not fill the memory with layouts
# of which few are used.
_MOST_TENSORS = 1 << 16


@dataclass(frozen=True)
class Choice:
    """The checkpoints of a merge, and how much of each goes into each output.

    Attributes:
        outputs: each output, with a weight for each of the `paths`.
        candidates: all that were looked at; empty where the user named each checkpoint.
        notes: for the user, one sentence each.
        layouts: of chosen checkpoints that have been scanned already, as far as they were kept.
    """

    paths: tuple[Path, ...]
    outputs: dict[Path, tuple[Weight, ...]]
    candidates: tuple[Candidate, ...]
    notes: tuple[str, ...]
    layouts: Mapping[Path, Layout] = field(default_factory=dict)


class _Layouts(dict[Path, Layout]):
    """The layouts scanned last, so that planning need not scan the chosen checkpoints again."""

    tensors = 0

    def __missing__(self, path: Path) -> Layout:
        layout = self[path] = scan(path)
        self.tensors += len(layout.tensors)
        # The oldest goes first: runs are scanned in order, and it is mostly the last checkpoints of
        # a run that are chosen.
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

    Raises:
        UsageError: the options do not fit each other.
        MergeError: there are fewer checkpoints than asked for, or one does not say what is needed.
    """
    asked = [weighting.weights, weighting.scheme, weighting.sigma]
    if sum(one is not None for one in asked) > 1:
        what = "--weights, --weighting and --phema exclude each other"
        raise UsageError(what, hint="give one of them")
    layouts = _Layouts()
    selection = select(arguments, criteria, output, layouts.__getitem__)
    paths, candidates = selection.chosen, selection.candidates
    if weighting.weights is not None and len(weighting.weights) != len(paths):
        counts = f"{len(weighting.weights)} weights for {len(paths)} checkpoints"
        raise UsageError(counts, hint="give one weight a checkpoint, in the same order")

    # Each average of a series is weighted on its own: the oldest of *its* checkpoints is the first.
    def weigh(chosen: Sequence[int]) -> Sequence[Weight]:
        if weighting.weights is not None:
            return [weighting.weights[index] for index in chosen]
        if weighting.sigma is not None:
            return phema([_snapshot(layouts[paths[index]]) for index in chosen], weighting.sigma)
        # The chosen checkpoints are the first of the candidates, in the order of `paths`.
        metrics = [candidates[index].metric for index in chosen]
        mode = selection.mode or criteria.mode
        return resolve(weighting.scheme or "uniform", len(chosen), metrics, mode)

    table = outputs(output, members(paths, series), len(paths), weigh)
    # A table of checkpoints that were all named, and say nothing, would only repeat their names.
    plain = all(one.chosen and one.step is one.epoch is one.metric is None for one in candidates)
    kept = {path: layouts[path] for path in paths if path in layouts}
    return Choice(paths, table, () if plain else candidates, selection.notes, kept)


def _snapshot(layout: Layout) -> tuple[float, float]:
    """Return the step and the relative width of a stored EMA."""
    found = read_metadata(layout)
    if found.step is None or found.sigma is None:
        what = f"{layout.path}: its step and the width of its EMA are not known"
        hint = "name it as in snapshot-0002147-0.100.pt: the step, and the relative width"
        raise UsageError(what, hint=hint)
    return float(found.step), found.sigma


# Several averages of the same checkpoints: which go into each, and what it is called.


def members(checkpoints: Sequence[Path], series: Series) -> dict[str, tuple[int, ...]]:
    """Return the numbers of the checkpoints, the oldest first, in each average, by its name.

    Raises:
        UsageError: more than one kind of series is asked for, or there are too few checkpoints.
    """
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
    for depth in range(1, max((len(path.parts) for path in paths), default=1) + 1):
        names = tuple("-".join(path.with_suffix("").parts[-depth:]) for path in paths)
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
    """Return the output of each average, with a weight for each of `count` checkpoints.

    `weigh` returns the weights of those in a group; the others have the weight 0.

    Raises:
        UsageError: there are several averages, and no {name} in the pattern.
    """
    if len(groups) > 1 and "{name}" not in str(pattern):
        hint = "put {name} into it, as in -o 'avg-{name}.pt'"
        raise UsageError(f"{len(groups)} averages need as many outputs, not {pattern}", hint=hint)
    table: dict[Path, tuple[Weight, ...]] = {}
    for name, chosen in groups.items():
        row: list[Weight] = [0] * count
        for index, weight in zip(chosen, weigh(chosen), strict=True):
            row[index] = weight
        # Without a series the average has no name, and the path is taken as it is.
        path = Path(str(pattern).replace("{name}", name)) if name else pattern
        table[path] = tuple(row)
    return table
