"""From what the user named to a matrix of weights: which checkpoints, and how much of each."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from merge_avg.arithmetic import Weight
from merge_avg.errors import UsageError
from merge_avg.formats import scan
from merge_avg.selection._metadata import read_metadata
from merge_avg.selection._schemes import phema, resolve
from merge_avg.selection._select import Candidate, Criteria, Selection, select
from merge_avg.selection._series import Series, members, outputs


@dataclass(frozen=True)
class Weighting:
    """How much of each checkpoint: numbers, or a scheme, or a width for post-hoc EMA; or equal."""

    weights: Sequence[Weight] | None = None
    scheme: str | None = None
    sigma: float | None = None


@dataclass(frozen=True)
class Choice:
    """What a merge is made of.

    Attributes:
        paths: the chosen checkpoints.
        outputs: each output, with the weights of the checkpoints.
        candidates: all that were looked at; none where the user named each checkpoint.
        notes: what a person should hear of.
    """

    paths: tuple[Path, ...]
    outputs: dict[Path, tuple[Weight, ...]]
    candidates: tuple[Candidate, ...]
    notes: tuple[str, ...]


def choose(
    arguments: Sequence[str | os.PathLike[str]],
    output: Path,
    criteria: Criteria,
    series: Series,
    weighting: Weighting,
) -> Choice:
    """Chooses checkpoints, and their weights in each average.

    Raises:
        UsageError: the options do not fit each other.
        MergeError: there are fewer checkpoints than asked for, or one does not say what is needed.
    """
    asked = [weighting.weights, weighting.scheme, weighting.sigma]
    if sum(one is not None for one in asked) > 1:
        what = "--weights, --weighting and --phema exclude each other"
        raise UsageError(what, hint="give one of them")
    selection = select(arguments, criteria, output)
    paths = selection.chosen
    if weighting.weights is not None and len(weighting.weights) != len(paths):
        counts = f"{len(weighting.weights)} weights for {len(paths)} checkpoints"
        raise UsageError(counts, hint="give one weight a checkpoint, in the same order")
    known = {candidate.path: candidate.metric for candidate in selection.candidates}
    mode = selection.mode or criteria.mode

    def weigh(chosen: Sequence[int]) -> Sequence[Weight]:
        if weighting.weights is not None:
            return [weighting.weights[index] for index in chosen]
        if weighting.sigma is not None:
            return _synthesis([paths[index] for index in chosen], weighting.sigma)
        metrics = [known.get(paths[index]) for index in chosen]
        return resolve(weighting.scheme or "uniform", len(chosen), metrics, mode)

    table = outputs(output, members(paths, series), len(paths), weigh)
    return Choice(paths, table, _looked_at(selection), selection.notes)


def _synthesis(paths: Sequence[Path], sigma: float) -> Sequence[Weight]:
    snapshots = []
    for path in paths:
        found = read_metadata(scan(path))
        if found.step is None or found.sigma is None:
            what = "its step and the width of its EMA are not known"
            hint = "name it as in snapshot-0002147-0.100.pt: the step, and the relative width"
            raise UsageError(f"{path}: {what}", hint=hint)
        snapshots.append((float(found.step), found.sigma))
    return phema(snapshots, sigma)


def _looked_at(selection: Selection) -> tuple[Candidate, ...]:
    plain = all(
        one.chosen and one.step is one.epoch is one.metric is None for one in selection.candidates
    )
    return () if plain else selection.candidates
