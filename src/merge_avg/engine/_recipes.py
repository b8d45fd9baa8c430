"""How a unit is averaged: which sources are read together, and which means they are shown to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from merge_avg.arithmetic import Mean, MeanFactory, Weights
from merge_avg.engine._workspace import Workspace
from merge_avg.errors import MergeError
from merge_avg.io import Tap
from merge_avg.plan import Unit


@dataclass(frozen=True)
class Recipe:
    """How the windows of a unit are averaged.

    Attributes:
        unit: the unit; of a window of several, the first.
        converted: whether some sources have another dtype than the result.
        counted: for each output, the sources that count.
        means: for each output, the running mean.
        groups: the sources that are read at a time, all of one dtype.
        taps: where each source is read from, if it does not lie in parts or in the scratch file.
        whole: whether there is one group, which one mean is shown as it is.
    """

    unit: Unit
    converted: bool
    counted: Sequence[Sequence[int]]
    means: Sequence[Mean]
    groups: Sequence[Sequence[int]]
    taps: Sequence[Tap | None]
    whole: bool

    def shares(self, group: Sequence[int]) -> Iterator[tuple[Mean, slice]]:
        """Yield the means that rows of a group are shown to, and which rows."""
        for mean, wanted in zip(self.means, self.counted, strict=True):
            for rows in _runs(group, wanted):
                yield mean, rows


class Recipes:
    """One worker's recipes. Means are used again: they hold the worker's largest buffers."""

    def __init__(self, space: Workspace) -> None:
        self._space = space
        self._make_mean = MeanFactory(space.device, space.load_torch)
        self._means: dict[object, Mean] = {}
        self._last: Recipe | None = None

    def of(self, unit: Unit) -> Recipe:
        """Return the recipe of a unit: most often, that of the last window."""
        if self._last is None or self._last.unit is not unit:
            rows = [output.weights for output in self._space.job.outputs]
            chosen = [counted(unit, weights) for weights in rows]
            means = [self._mean(unit, *pair) for pair in enumerate(zip(rows, chosen, strict=True))]
            wanted = sorted(self._space.comparison.beside(unit).union(*chosen))
            groups = tuple(_groups(unit, wanted, self._space.job.budget.rows))
            taps = [
                self._space.readers[source.checkpoint].tap(source.storage)
                if source.storage is not None and not (source.storage.parts or source.storage.tiles)
                else None
                for source in unit.sources
            ]
            converted = any(source.dtype != unit.dtype for source in unit.sources)
            # Neighbours in one group that go to one mean: read, summed and written in one pass.
            runs = [rows for group in groups for ours in chosen for rows in _runs(group, ours)]
            whole = len(groups) == len(runs) == 1 and not converted
            self._last = Recipe(unit, converted, chosen, means, groups, taps, whole)
        return self._last

    def _mean(self, unit: Unit, number: int, row: tuple[Weights, Sequence[int]]) -> Mean:
        """Return a running mean for an output, with buffers that it used before."""
        sources = [unit.sources[k] for k in row[1]]
        chosen = tuple(source.checkpoint for source in sources)
        dtypes = tuple(source.dtype.name for source in sources)
        # By what decides a mean, not by unit: there are few kinds of units, and very many units.
        key = number, chosen, unit.kind, unit.dtype.name, dtypes
        if key not in self._means:
            weights = row[0].subset(chosen)
            if unit.kind == "mean" and weights is None:
                names = str(unit.members[0][0])
                what = f"every checkpoint that has {names!r} has the weight zero"
                raise MergeError(what, where=self._space.job.layouts[0].path)
            if unit.kind == "keep" or weights is None:
                weights = Weights.uniform(len(chosen))
            self._means[key] = self._make_mean(weights, unit.dtype.name, dtypes)
        return self._means[key]


def counted(unit: Unit, weights: Weights) -> Sequence[int]:
    """Return the sources of a unit that have a weight other than zero; all, if none has."""
    integers = weights.integers
    some = [k for k, source in enumerate(unit.sources) if integers[source.checkpoint]]
    return some or range(len(unit.sources))


def _groups(unit: Unit, sources: Sequence[int], most: int) -> Iterator[Sequence[int]]:
    """Cut a unit's sources where the dtype changes, and into groups of at most `most`."""
    start = 0
    for k in range(1, len(sources) + 1):
        first = unit.sources[sources[start]].dtype
        ends = k == len(sources) or unit.sources[sources[k]].dtype != first
        if ends or k - start >= max(most, 1):
            yield sources[start:k]
            start = k


def _runs(group: Sequence[int], wanted: Sequence[int]) -> Iterator[slice]:
    """Yield the rows of a group that are wanted, as runs of neighbours."""
    chosen = set(wanted)
    start = 0
    for row in range(len(group) + 1):
        if row == len(group) or group[row] not in chosen:
            if start < row:
                yield slice(start, row)
            start = row + 1
