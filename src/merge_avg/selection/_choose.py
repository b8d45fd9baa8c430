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
from merge_avg.selection._candidates import Candidate
from merge_avg.selection._metadata import read_metadata
from merge_avg.selection._schemes import phema, resolve
from merge_avg.selection._select import Selection, select
from merge_avg.selection._series import members, outputs

# A layout takes about 500 bytes for each tensor, so those kept take at most 32 MiB. That is enough
# for 100 checkpoints of 600 tensors; a run of many large ones must not fill the memory with layouts
# of which few are used.
_MOST_TENSORS = 1 << 16


@dataclass(frozen=True)
class Choice:
    """The checkpoints of a merge, and how much of each goes into each output.

    Attributes:
        paths: the chosen checkpoints.
        outputs: each output, with the weights of the checkpoints.
        candidates: all that were looked at; empty where the user named each checkpoint.
        notes: for the user, one sentence each.
        layouts: of chosen checkpoints that have been scanned already, as far as they were kept.
    """

    paths: tuple[Path, ...]
    outputs: dict[Path, tuple[Weight, ...]]
    candidates: tuple[Candidate, ...]
    notes: tuple[str, ...]
    layouts: Mapping[Path, Layout] = field(default_factory=dict)


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
    selection = select(arguments, criteria, output, layouts.scan)
    paths = selection.chosen
    if weighting.weights is not None and len(weighting.weights) != len(paths):
        counts = f"{len(weighting.weights)} weights for {len(paths)} checkpoints"
        raise UsageError(counts, hint="give one weight a checkpoint, in the same order")
    metrics = {candidate.path: candidate.metric for candidate in selection.candidates}
    mode = selection.mode or criteria.mode

    # Each average of a series is weighted on its own: the oldest of *its* checkpoints is the first.
    def weigh(chosen: Sequence[int]) -> Sequence[Weight]:
        if weighting.weights is not None:
            return [weighting.weights[index] for index in chosen]
        own = [paths[index] for index in chosen]
        if weighting.sigma is not None:
            return _synthesis(own, weighting.sigma, layouts.scan)
        scheme = weighting.scheme or "uniform"
        return resolve(scheme, len(own), [metrics.get(path) for path in own], mode)

    table = outputs(output, members(paths, series), len(paths), weigh)
    return Choice(paths, table, _looked_at(selection), selection.notes, layouts.of(paths))


def _synthesis(
    paths: Sequence[Path], sigma: float, scan: Callable[[Path], Layout]
) -> Sequence[Weight]:
    """Return the weights that make an EMA of another width of stored ones."""
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
    """Return the candidates, or none where a table of them would only repeat what was named."""
    plain = all(
        one.chosen and one.step is one.epoch is one.metric is None for one in selection.candidates
    )
    return () if plain else selection.candidates


class _Layouts:
    """The layouts scanned last, so that planning need not scan the chosen checkpoints again."""

    def __init__(self) -> None:
        self._kept: dict[Path, Layout] = {}
        self._tensors = 0

    def scan(self, path: Path) -> Layout:
        """Return a checkpoint's layout, and keep it while there are not too many others."""
        if path in self._kept:
            return self._kept[path]
        layout = self._kept[path] = scan(path)
        self._tensors += len(layout.tensors)
        # The oldest goes first: runs are scanned in order, and it is mostly the last checkpoints of
        # a run that are chosen.
        while self._tensors > _MOST_TENSORS:
            self._tensors -= len(self._kept.pop(next(iter(self._kept))).tensors)
        return layout

    def of(self, paths: Sequence[Path]) -> dict[Path, Layout]:
        """Return the layouts of some checkpoints, as far as they are kept."""
        return {path: self._kept[path] for path in paths if path in self._kept}
