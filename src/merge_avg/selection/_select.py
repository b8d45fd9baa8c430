"""Which checkpoints the user meant, out of all that the arguments stand for.

The chosen ones, those left out, and why, are one table: nothing is left out without a word.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from merge_avg.checkpoint import Layout
from merge_avg.errors import MergeError, named
from merge_avg.formats import scan
from merge_avg.options import Criteria, Mode
from merge_avg.selection._criteria import Candidate, age, check, fold_of, pick, without_copies
from merge_avg.selection._expand import expand
from merge_avg.selection._metadata import Log, Metadata, read_log, read_metadata


@dataclass(frozen=True)
class Selection:
    """The candidates of a merge, with notes for the user, and the direction of the metric.

    The chosen ones come first, the oldest first where anything was asked for; then the others.
    """

    candidates: tuple[Candidate, ...]
    notes: tuple[str, ...] = ()
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
    """Choose checkpoints from files, checkpoint directories, directories of runs and patterns.

    Files and checkpoint directories that are named one by one are all taken, in their order, where
    nothing else is asked for. What is found in a run's directory or by a pattern is sorted by step,
    epoch and name; copies of one checkpoint count once, and neither earlier outputs nor the
    `output` of this merge count.

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
    log = Log() if criteria.metrics_file is None else read_log(criteria.metrics_file)
    found: list[Candidate] = []
    left: list[Candidate] = []
    metrics: dict[Path, Mapping[str, float]] = {}
    folds: dict[Path, Path] = {}
    for place, paths, many in places:
        for path in paths:
            try:
                metadata = _read(path, scan, log)
            except MergeError as error:
                if not many:
                    raise
                # A run holds other files too. Only what the user named has to be a checkpoint.
                left.append(Candidate(path, chosen=False, why=f"no checkpoint: {error.what}"))
                continue
            one = Candidate(path, metadata.step, metadata.epoch)
            if metadata.ours or (output is not None and output.exists() and path.samefile(output)):
                left.append(one.left("an earlier output of merge-avg"))
            else:
                found.append(one)
            metrics[path] = metadata.metrics
            folds.setdefault(path, fold_of(path, place if many else path.parent))
    found, notes = without_copies(sorted(found, key=age), left)
    if not found:
        listed = named([str(one.path) for one in left]) if left else "nothing"
        where = Path(arguments[0]) if arguments else None
        raise MergeError(f"no checkpoint to average; found {listed}", where=where)
    chosen, mode, more = pick(found, metrics, folds, criteria, left)
    return Selection((*chosen, *sorted(left, key=age)), (*notes, *more), mode)


def _read(path: Path, scan: Callable[[Path], Layout], log: Log) -> Metadata:
    """Return what a checkpoint says about itself, and what a log says about it."""
    try:
        metadata = read_metadata(scan(path))
    except OSError as error:
        raise MergeError(error.strerror or str(error), where=path) from None
    return replace(metadata, metrics={**metadata.metrics, **log.of(path, metadata)})
