"""Greedy soups: checkpoints are added one at a time, and stay where they do not hurt.

Source: Wortsman et al. 2022, Model soups (arXiv:2203.05482), recipe 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from merge_avg.errors import MergeError, UsageError
from merge_avg.formats import scan
from merge_avg.io import refuse_output, remove, workplace
from merge_avg.options import Mode
from merge_avg.plan import refuse_inputs
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
    begin: Callable[[Sequence[Path], int, int], None] = lambda *_: None,
    show: Callable[[Trial], None] = lambda _: None,
) -> Soup:
    """Make a greedy soup.

    Each checkpoint is evaluated. The best begins the soup; the others are tried in the order of
    their scores, and stay where the soup with them is not worse. So on this evaluation the result
    is never worse than the best checkpoint. `merge` writes the plain mean of checkpoints, and is
    called as `merge_checkpoints` is; a trial lies in a hidden directory beside the output.

    Evaluations are logged at once, and a run with the same log does not repeat them. The log stays
    beside the output as its record: by default its path is the output's with ".soup.jsonl" added.
    It knows an evaluation by its `command`. `begin` is called before each, with the members, its
    number and how many there are; `show` is called with every one, those of the log too. A
    MergeError says that an evaluation fails or is NaN, or that the log is that of another soup.
    """
    if len(checkpoints) < 2:
        raise UsageError("a soup needs at least two checkpoints", hint="name more of them")
    # Only the merge knows whether it writes a directory.
    refuse_output(output, directory=output.is_dir(), overwrite=overwrite)
    log = log or output.with_name(f"{output.name}.soup.jsonl")
    layouts = [scan(path) for path in checkpoints]
    for target in (output, log):
        refuse_inputs(target, layouts)
    header = {"soup": "greedy", "command": command, "mode": mode, "inputs": identities(checkpoints)}
    known = Log(log, header)
    sign = 1 if mode == "max" else -1
    trials: list[Trial] = []

    def score(members: Members, best: float | None, tried: Path) -> tuple[float, bool]:
        """Return the score of members, and whether the last of them stays."""
        paths = tuple(checkpoints[index] for index in members)
        remembered = members in known.scores
        number, total = len(trials) + 1, 2 * len(checkpoints) - 1
        if not remembered:
            begin(paths, number, total)
            file = paths[0] if len(paths) == 1 else tried
            if len(paths) > 1:
                merge(paths, tried)
            value = evaluate(file)
            remove(tried)
            if math.isnan(value):  # neither better nor worse than any other
                hint = "make it print a number and run again"
                raise MergeError("its evaluation is NaN", where=file, hint=hint)
            known.add(members, value)
        value = known.scores[members]
        # A soup may tie, as a member that does not hurt stays. A single checkpoint may not, as the
        # first of equals begins the soup.
        tie = len(members) > 1 and value == best
        kept = best is None or sign * value > sign * best or tie
        trials.append(Trial(paths, value, kept, number, total, remembered))
        show(trials[-1])
        return value, kept

    with workplace(output) as folder:
        tried = folder / f"trial{output.suffix}"  # evaluations may look at the suffix
        singles: list[float] = []
        for index in range(len(checkpoints)):
            best_single = max(singles, key=lambda value: sign * value, default=None)
            singles.append(score((index,), best_single, tried)[0])
        # Sorting is stable: of equals, the first to be named is the first to be tried.
        first, *others = sorted(range(len(checkpoints)), key=lambda index: -sign * singles[index])
        soup: Members = (first,)
        best = singles[first]
        for index in others:
            value, kept = score((*soup, index), best, tried)
            if kept:
                soup, best = (*soup, index), value
    # The last trial that was kept was this very mean, so `best` is its score. It is merged again
    # because that file may be gone: a later trial replaced it, or its score came from the log.
    members = tuple(checkpoints[index] for index in soup)
    merge(members, output, overwrite=overwrite)
    return Soup(output, members, best, dict(zip(checkpoints, singles, strict=True)), tuple(trials))
