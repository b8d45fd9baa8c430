"""Greedy soups: checkpoints are added one at a time, and stay where they do not hurt.

Source: Wortsman et al. 2022, Model soups (arXiv:2203.05482), recipe 1.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol, Self

from merge_avg.errors import MergeError, UsageError
from merge_avg.layout import Layout
from merge_avg.policies import Mode
from merge_avg.scan import scan
from merge_avg.temporary import TEMPORARY
from merge_avg.weights import Weight

_BLOCK = 1 << 20
LOG = ".soup.jsonl"  # what the log's name adds to the output's


class Merge(Protocol):
    """Averages files, as `merge_checkpoints` does it."""

    def __call__(
        self,
        paths: Sequence[Path],
        output: Path,
        *,
        weights: Sequence[Weight] | None = None,
        normalize: bool = True,
        dtype: str | None = None,
        template: Path | None = None,
        overwrite: bool = False,
    ) -> object:
        """Writes an average, or a sum."""


@dataclass(frozen=True)
class Trial:
    """An evaluation: of one checkpoint, or of the soup with one more.

    Attributes:
        members: what was evaluated; for a soup the new one is the last.
        score: what came out.
        kept: whether the new one stays; for a single checkpoint, whether it is the best.
        number: of this evaluation, from 1.
        total: how many there will be.
        remembered: whether it was taken from the log of an earlier run.
    """

    members: tuple[Path, ...]
    score: float
    kept: bool
    number: int
    total: int
    remembered: bool = False


@dataclass(frozen=True)
class Soup:
    """What came out: the members in the order in which they were added, and all evaluations."""

    output: Path
    members: tuple[Path, ...]
    score: float
    singles: Mapping[Path, float]
    trials: tuple[Trial, ...]


@dataclass
class _Log:
    """Evaluations by what was evaluated, kept in a file from one run to the next."""

    path: Path
    header: dict[str, Any]
    scores: dict[tuple[int, ...], float] = field(default_factory=dict)

    def open(self) -> None:
        """Reads what an earlier run left, or begins anew."""
        with _readable(self.path):
            lines = self.path.read_bytes().splitlines() if self.path.exists() else []
        entries = []
        for number, line in enumerate(lines):
            try:
                entries.append(json.loads(line))
            except ValueError:
                if number < len(lines) - 1:  # the last may have been cut by a kill
                    raise self._strange() from None
        if not entries:
            self._write(self.header, "wb")
            return
        if entries[0] != self.header:
            raise self._strange()
        with contextlib.suppress(KeyError, TypeError, ValueError):
            for entry in entries[1:]:
                self.scores[tuple(map(int, entry["members"]))] = float(entry["score"])
        self._write(self.header, "wb")
        for members, score in self.scores.items():
            self._write({"members": members, "score": score})

    def add(self, members: tuple[int, ...], score: float) -> None:
        """Remembers an evaluation for good."""
        self.scores[members] = score
        self._write({"members": members, "score": score})

    def _write(self, entry: Mapping[str, Any], mode: str = "ab") -> None:
        with _readable(self.path), self.path.open(mode) as file:
            file.write(json.dumps(entry).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def _strange(self) -> MergeError:
        what = "it is the log of another soup: of other checkpoints, another command or mode"
        return MergeError(what, where=self.path, hint="remove it to begin anew")


def greedy(
    checkpoints: Sequence[Path],
    output: Path,
    *,
    evaluate: Callable[[Path], float],
    merge: Merge,
    mode: Mode,
    command: str = "",
    log: Path | None = None,
    overwrite: bool = False,
    show: Callable[[Trial], None] = lambda _: None,
) -> Soup:
    """Makes a greedy soup.

    Each checkpoint is evaluated. The best begins the soup; the others are tried in the order of
    their scores, and stay where the soup with them is not worse. So on this evaluation the result
    is never worse than the best checkpoint. Each trial reads two files, however large the soup: the
    running sum in float64, and the one that is tried. The result is the mean of the members
    themselves.

    Evaluations are written to a log at once, and are not repeated by a run with the same log. It
    stays beside the output as its record.

    Args:
        checkpoints: what may go into it.
        output: where it goes; what is tried goes beside it for a while.
        evaluate: the score of a checkpoint.
        merge: averages files.
        mode: whether lower or higher scores are better.
        command: what is evaluated, for the log.
        log: by default the output's path with ".soup.jsonl" added.
        overwrite: whether the output may replace what is there.
        show: is told of every evaluation.

    Raises:
        UsageError: there are fewer than two checkpoints.
        MergeError: an evaluation fails, or a file cannot be read or written.
    """
    if len(checkpoints) < 2:
        raise UsageError("a soup needs two checkpoints at least", hint="name more of them")
    if os.path.lexists(output) and not overwrite:
        hint = "choose another output, or replace this one with --overwrite"
        raise MergeError("the output exists already", where=output, hint=hint)
    known = _Log(
        log or output.with_name(output.name + LOG),
        {"soup": "greedy", "command": command, "mode": mode, "inputs": _identities(checkpoints)},
    )
    known.open()
    total = 2 * len(checkpoints) - 1
    sign = 1 if mode == "max" else -1
    trials: list[Trial] = []

    def scored(members: tuple[int, ...], path: Callable[[], Path]) -> tuple[float, bool]:
        if members in known.scores:
            return known.scores[members], True
        value = evaluate(path())
        known.add(members, value)
        return value, False

    def told(members: tuple[int, ...], score: float, *, kept: bool, remembered: bool) -> None:
        paths = tuple(checkpoints[index] for index in members)
        trial = Trial(paths, score, kept, len(trials) + 1, total, remembered)
        trials.append(trial)
        show(trial)

    singles: list[float] = []
    for index, path in enumerate(checkpoints):
        value, remembered = scored((index,), lambda path=path: path)  # type: ignore[misc]
        better = all(sign * value > sign * other for other in singles)
        singles.append(value)
        told((index,), value, kept=better, remembered=remembered)
    order = sorted(range(len(checkpoints)), key=lambda index: -sign * singles[index])
    soup: tuple[int, ...] = (order[0],)
    best = singles[order[0]]
    with _Kitchen(output, [checkpoints[i] for i in order], merge) as kitchen:
        for place, index in enumerate(order[1:], 1):
            tried = (*soup, index)
            value, remembered = scored(tried, lambda place=place: kitchen.tried(place))  # type: ignore[misc]
            kept = sign * value >= sign * best
            if kept:
                kitchen.keep(place)
                soup, best = tried, value
            told(tried, value, kept=kept, remembered=remembered)
        members = tuple(checkpoints[index] for index in soup)
        floor = singles[order[0]]
        best = kitchen.serve(members, best, floor, evaluate, sign, overwrite=overwrite)
    scores = dict(zip(checkpoints, singles, strict=True))
    return Soup(output, members, best, scores, tuple(trials))


class _Kitchen:
    """The soup so far as a sum in float64, and what is tried, in files beside the output."""

    def __init__(self, output: Path, order: Sequence[Path], merge: Merge) -> None:
        self._output = output
        self._order = order
        self._merge = merge
        self._kept = [0]
        self._summable = True
        self._summed = 1  # how many of those kept are in the sum
        self._sums = [self._beside("sum-a"), self._beside("sum-b")]
        self._trial = self._beside("trial")
        self._exact = self._beside("mean")

    def _beside(self, what: str) -> Path:
        name = f".{self._output.stem[:100]}.{what}{TEMPORARY}{self._output.suffix}"
        return self._output.with_name(name)

    def _sum(self) -> Path:
        """The sum of those kept so far: the best itself, or a file in float64."""
        for count in range(self._summed, len(self._kept)):
            before = self._order[0] if count == 1 else self._sums[0]
            one = self._order[self._kept[count]]
            self._merge(
                [before, one],
                self._sums[1],
                weights=[1, 1],
                normalize=False,
                dtype="float64",
                overwrite=True,
            )
            self._sums.reverse()
        self._summed = len(self._kept)
        return self._order[0] if self._summed == 1 else self._sums[0]

    def tried(self, place: int) -> Path:
        """The soup with one more."""
        if self._summable:
            try:
                share = Fraction(1, len(self._kept) + 1)
                self._combined([self._sum(), self._order[place]], share, self._trial)
            except MergeError:  # a copy in float64 cannot be made of every checkpoint
                self._summable = False
            else:
                return self._trial
        members = [self._order[index] for index in (*self._kept, place)]
        self._merge(members, self._trial, overwrite=True)
        return self._trial

    def keep(self, place: int) -> None:
        """What was tried stays."""
        self._kept.append(place)

    def serve(
        self,
        members: Sequence[Path],
        best: float,
        floor: float,
        evaluate: Callable[[Path], float],
        sign: int,
        *,
        overwrite: bool,
    ) -> float:
        """Writes the mean of the members, and returns its score.

        That is the score of the trial `best`, unless the sum in float64 was rounded and some bit is
        another: then the mean is evaluated as well. Should it be worse than the best checkpoint,
        whose score is `floor`, what was tried is written.
        """
        score = best
        if len(members) > 2 and self._summable:  # of two, the trial was the mean itself
            share = Fraction(1, len(members))
            self._combined([self._sum()], share, self._trial)
            self._merge(members, self._exact, overwrite=True)
            if not _same_weights(self._exact, self._trial):
                score = evaluate(self._exact)
            if sign * score < sign * floor:
                self._combined([self._sum()], share, self._output, overwrite=overwrite)
                return best
        self._merge(members, self._output, overwrite=overwrite)
        return score

    def _combined(
        self, paths: Sequence[Path], share: Fraction, output: Path, *, overwrite: bool = True
    ) -> None:
        """The sum of some files times a share, as a copy of the best checkpoint."""
        self._merge(
            paths,
            output,
            weights=[share] * len(paths),
            normalize=False,
            dtype="template",
            template=self._order[0],
            overwrite=overwrite,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for path in (*self._sums, self._trial, self._exact):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def _same_weights(one: Path, other: Path) -> bool:
    """Whether two checkpoints of one layout hold the same bytes in their tensors."""
    ours, theirs = list(_ranges(scan(one))), list(_ranges(scan(other)))
    if [size for _, _, size in ours] != [size for _, _, size in theirs]:
        return False
    for (path, at, nbytes), (path2, at2, _) in zip(ours, theirs, strict=True):
        with path.open("rb") as file, path2.open("rb") as file2:
            file.seek(at)
            file2.seek(at2)
            for done in range(0, nbytes, _BLOCK):
                size = min(_BLOCK, nbytes - done)
                if file.read(size) != file2.read(size):
                    return False
    return True


def _ranges(layout: Layout) -> Iterator[tuple[Path, int, int]]:
    """Where the bytes of tensors lie: file, offset and size, each once."""
    storages = dict.fromkeys(info.storage for info in layout.tensors if not info.trouble)
    for storage in storages:
        for part in storage.ranges:
            yield layout.files[part.file].path, part.offset, part.nbytes


def _identities(paths: Sequence[Path]) -> list[list[str | int]]:
    """What tells that checkpoints are those of an earlier run."""
    found: list[list[str | int]] = []
    for path in paths:
        with _readable(path):
            state = path.stat()
        found.append([str(path.absolute()), state.st_size, state.st_mtime_ns])
    return found


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise MergeError(error.strerror or str(error), where=path) from None
