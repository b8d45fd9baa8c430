"""Which checkpoints the user meant, out of all that the arguments stand for.

The chosen ones, those left out, and why, are one table: nothing is left out without a word.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from merge_avg.checkpoint import Layout
from merge_avg.errors import MergeError, named
from merge_avg.formats import scan
from merge_avg.options import Criteria, Mode
from merge_avg.selection._candidates import (
    Candidate,
    Found,
    age,
    without_copies,
    without_outputs,
)
from merge_avg.selection._criteria import check, deciding, gaps, measured, pick, within
from merge_avg.selection._expand import expand
from merge_avg.selection._metadata import read_metadata
from merge_avg.selection._metrics_log import read_log


@dataclass(frozen=True)
class Selection:
    """The candidates of a merge.

    Attributes:
        candidates: those chosen, the oldest first where anything was asked for; then the others.
        notes: for the user, one sentence each.
        metric: what the best were chosen by.
        mode: whether lower or higher values of it are better.
    """

    candidates: tuple[Candidate, ...]
    notes: tuple[str, ...] = ()
    metric: str | None = None
    mode: Mode | None = None

    @property
    def chosen(self) -> tuple[Path, ...]:
        """The chosen checkpoints, in their order."""
        return tuple(one.path for one in self.candidates if one.chosen)


def select(
    arguments: Sequence[str | os.PathLike[str]],
    criteria: Criteria,
    output: Path | None = None,
    scan: Callable[[Path], Layout] = scan,
) -> Selection:
    """Choose checkpoints.

    Files and checkpoint directories that are named one by one are all taken, in their order, where
    nothing else is asked for. What is found in a run's directory or by a pattern is sorted by step,
    epoch and name; copies of one checkpoint count once, and earlier outputs do not count.

    Args:
        arguments: files, checkpoint directories, directories of runs, and glob patterns.
        criteria: what is asked for.
        output: of the merge, which is not a candidate.
        scan: returns a checkpoint's layout.

    Raises:
        UsageError: the criteria do not fit each other, or a metric has no direction.
        MergeError: there are fewer checkpoints than asked for, or they do not say what is needed.
    """
    check(criteria)
    runs = not criteria.empty or len(arguments) == 1
    try:
        places = [(Path(place), *expand(Path(place), runs=runs)) for place in arguments]
    except OSError as error:
        raise MergeError(error.strerror or str(error), where=error.filename) from None
    if criteria.empty and not any(many for _, _, many in places):
        return Selection(tuple(Candidate(path) for _, paths, _ in places for path in paths))
    log = None if criteria.metrics_file is None else read_log(criteria.metrics_file)
    found: list[Found] = []
    left: list[Candidate] = []
    for place, paths, many in places:
        for path in paths:
            try:
                metadata = read_metadata(scan(path))
            except MergeError as error:
                if not many:
                    raise
                # A run holds other files too. Only what the user named has to be a checkpoint.
                left.append(Candidate(path, chosen=False, why=f"no checkpoint: {error.what}"))
                continue
            except OSError as error:
                raise MergeError(error.strerror or str(error), where=path) from None
            if log is not None:
                metrics = {**metadata.metrics, **log.of(path, metadata)}
                metadata = replace(metadata, metrics=metrics)
            found.append(Found(path, place if many else path.parent, metadata))
    found.sort(key=age)
    found = without_outputs(found, output, left)
    found, notes = without_copies(found, left)
    if not found:
        listed = named([str(one.path) for one in left]) if left else "nothing"
        where = Path(arguments[0]) if arguments else None
        raise MergeError(f"no checkpoint to average; found {listed}", where=where)
    found = within(found, criteria, left)
    metric, mode = deciding(found, criteria)
    if metric is not None:
        found = measured(found, metric)
        notes.append(f"best is the {'lowest' if mode == 'min' else 'highest'} {metric}")
    chosen = pick(found, criteria, mode, left)
    notes += gaps(chosen)
    return Selection((*chosen, *sorted(left, key=age)), tuple(notes), metric, mode)
