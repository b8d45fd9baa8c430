"""Greedy soups: checkpoints are added one at a time, and stay where they do not hurt.

Source: Wortsman et al. 2022, Model soups (arXiv:2203.05482), recipe 1.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from merge_avg.errors import MergeError, UsageError
from merge_avg.io import TEMPORARY, refuse_output, remove
from merge_avg.options import Mode
from merge_avg.soup._log import Log, Members, identities


@dataclass(frozen=True)
class Trial:
    """An evaluation of one checkpoint, or of the soup with one more."""

    members: tuple[Path, ...]  # of a soup, the last is the new one
    score: float
    kept: bool  # whether the new one stays; for a single checkpoint, whether it is the best so far
    number: int  # from 1 to `total`
    total: int
    remembered: bool  # from the log of an earlier run


@dataclass(frozen=True)
class Soup:
    """The finished soup: its members in the order in which they were added, and all evaluations."""

    output: Path
    members: tuple[Path, ...]
    score: float
    singles: Mapping[Path, float]
    trials: tuple[Trial, ...]


def greedy(
    checkpoints: Sequence[Path],
    output: Path,
    *,
    evaluate: Callable[[Path], float],
    merge: Callable[..., object],
    mode: Mode,
    command: str = "",
    log: Path | None = None,
    overwrite: bool = False,
    show: Callable[[Trial], None] = lambda _: None,
) -> Soup:
    """Make a greedy soup.

    Each checkpoint is evaluated. The best begins the soup; the others are tried in the order of
    their scores, and stay where the soup with them is not worse. So on this evaluation the result
    is never worse than the best checkpoint. `merge` writes the plain mean of checkpoints, and is
    called as `merge_checkpoints` is; a trial lies beside the output while it is evaluated.

    Evaluations are logged at once, and a run with the same log does not repeat them. The log stays
    beside the output as its record: by default its path is the output's with ".soup.jsonl" added.
    It knows an evaluation by its `command`. `show` is called with every one. A MergeError
    says that an evaluation fails or is NaN, or that the log is that of another soup.
    """
    if len(checkpoints) < 2:
        raise UsageError("a soup needs at least two checkpoints", hint="name more of them")
    # Only the merge knows whether it writes a directory.
    refuse_output(output, directory=output.is_dir(), overwrite=overwrite)
    if output.exists() and any(path.exists() and path.samefile(output) for path in checkpoints):
        hint = "choose another output"
        raise MergeError("the output is one of the checkpoints", where=output, hint=hint)
    header = {"soup": "greedy", "command": command, "mode": mode, "inputs": identities(checkpoints)}
    known = Log(log or output.with_name(f"{output.name}.soup.jsonl"), header)
    # A trial is hidden, and has the suffix that evaluations look for. Names may have 255 bytes on
    # most file systems, and the merge adds a temporary name of its own.
    stem = os.fsencode(output.stem)[:100].decode("utf-8", "ignore")
    tried = output.with_name(f".{stem}.trial{TEMPORARY}{output.suffix}")
    sign = 1 if mode == "max" else -1
    trials: list[Trial] = []

    def score(members: Members, best: float | None) -> tuple[float, bool]:
        """Return the score of members, and whether the last of them stays."""
        paths = tuple(checkpoints[index] for index in members)
        remembered = members in known.scores
        if not remembered:
            file = paths[0] if len(paths) == 1 else tried
            if len(paths) > 1:
                merge(paths, tried, overwrite=True)
            value = evaluate(file)
            if math.isnan(value):  # neither better nor worse than any other
                hint = "make it print a number and run again"
                raise MergeError("its evaluation is NaN", where=file, hint=hint)
            known.add(members, value)
        value = known.scores[members]
        # A soup may tie, as a member that does not hurt stays. A single checkpoint may not, as the
        # first of equals begins the soup.
        tie = len(members) > 1 and value == best
        kept = best is None or sign * value > sign * best or tie
        number, total = len(trials) + 1, 2 * len(checkpoints) - 1
        trials.append(Trial(paths, value, kept, number, total, remembered))
        show(trials[-1])
        return value, kept

    try:
        singles: list[float] = []
        for index in range(len(checkpoints)):
            best_single = max(singles, key=lambda value: sign * value, default=None)
            singles.append(score((index,), best_single)[0])
        # Sorting is stable: of equals, the first to be named is the first to be tried.
        first, *others = sorted(range(len(checkpoints)), key=lambda index: -sign * singles[index])
        soup: Members = (first,)
        best = singles[first]
        for index in others:
            value, kept = score((*soup, index), best)
            if kept:
                soup, best = (*soup, index), value
    finally:
        remove(tried)
    # The last trial that was kept was this very mean, so `best` is its score. It is merged again
    # because that file may be gone: a later trial replaced it, or its score came from the log.
    members = tuple(checkpoints[index] for index in soup)
    merge(members, output, overwrite=overwrite)
    return Soup(output, members, best, dict(zip(checkpoints, singles, strict=True)), tuple(trials))
