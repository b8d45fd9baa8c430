"""Greedy soups: checkpoints are added one at a time, and stay where they do not hurt.

Source: Wortsman et al. 2022, Model soups (arXiv:2203.05482), recipe 1.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol, Self

from merge_avg.arithmetic import Weight
from merge_avg.checkpoint import Layout
from merge_avg.errors import MergeError, UsageError
from merge_avg.formats import scan
from merge_avg.io import TEMPORARY, refuse_output, remove
from merge_avg.options import Mode

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


# The numbers of the members, and whether it was their exact mean, made after the last trial.
_Evaluated = tuple[tuple[int, ...], bool]


@dataclass
class _Log:
    """Evaluations by what was evaluated, kept in a file from one run to the next."""

    path: Path
    header: dict[str, Any]
    scores: dict[_Evaluated, float] = field(default_factory=dict)

    def open(self) -> None:
        """Reads what an earlier run left, or begins anew. Whole lines are never written again."""
        with _readable(self.path):
            data = self.path.read_bytes() if self.path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]  # the rest of the last line was cut by a kill
        if not whole:
            if not _line(self.header).startswith(data):
                raise self._strange()
            self._write(self.header, "wb")
            return
        try:
            header, *entries = map(json.loads, whole.splitlines())
            for entry in entries:
                members = tuple(map(int, entry["members"]))
                self.scores[members, bool(entry.get("exact"))] = float(entry["score"])
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
            raise self._strange() from None
        if header != self.header:
            raise self._strange()
        if len(whole) < len(data):
            with _readable(self.path):
                os.truncate(self.path, len(whole))

    def add(self, evaluated: _Evaluated, score: float) -> None:
        """Remembers an evaluation for good."""
        members, exact = evaluated
        self.scores[evaluated] = score
        self._write({"members": members, "score": score} | ({"exact": True} if exact else {}))

    def _write(self, entry: Mapping[str, Any], mode: str = "ab") -> None:
        with _readable(self.path), self.path.open(mode) as file:
            file.write(_line(entry))
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
        MergeError: an evaluation fails or is NaN, a file cannot be read or written, or the log is
            that of another soup.
    """
    if len(checkpoints) < 2:
        raise UsageError("a soup needs two checkpoints at least", hint="name more of them")
    # Only the merge knows whether it writes a directory.
    refuse_output(output, directory=output.is_dir(), overwrite=overwrite)
    if any(_same_place(path, output) for path in checkpoints):
        hint = "choose another output"
        raise MergeError("the output is one of the checkpoints", where=output, hint=hint)
    known = _Log(
        log or output.with_name(output.name + LOG),
        {"soup": "greedy", "command": command, "mode": mode, "inputs": _identities(checkpoints)},
    )
    known.open()
    total = 2 * len(checkpoints) - 1
    sign = 1 if mode == "max" else -1
    trials: list[Trial] = []

    def scored(
        members: tuple[int, ...], path: Callable[[], Path], *, exact: bool = False
    ) -> tuple[float, bool]:
        evaluated = (members, exact)
        if evaluated in known.scores:
            return known.scores[evaluated], True
        file = path()
        value = evaluate(file)
        if math.isnan(value):  # neither better nor worse than any other
            raise MergeError("its evaluation is NaN", where=file, hint="mend it and run again")
        known.add(evaluated, value)
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

        def exactly(count: int, path: Path) -> float:
            return scored(soup[:count], lambda: path, exact=True)[0]

        members = tuple(checkpoints[index] for index in soup)
        floor = singles[order[0]]
        served, best = kitchen.serve(members, best, floor, exactly, sign, overwrite=overwrite)
    scores = dict(zip(checkpoints, singles, strict=True))
    return Soup(output, tuple(served), best, scores, tuple(trials))


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
        stem = os.fsencode(self._output.stem)[:100].decode("utf-8", "ignore")
        name = f".{stem}.{what}{TEMPORARY}{self._output.suffix}"
        return self._output.with_name(name)

    def _sum(self, count: int) -> Path:
        """The sum of the first of those kept: the best itself, or a file in float64.

        There is the last sum that was made and the one before it.
        """
        for number in range(self._summed, count):
            before = self._order[0] if number == 1 else self._sums[0]
            one = self._order[self._kept[number]]
            self._merge(
                [before, one],
                self._sums[1],
                weights=[1, 1],
                normalize=False,
                dtype="float64",
                overwrite=True,
            )
            self._sums.reverse()
            self._summed = number + 1
        return self._order[0] if count == 1 else self._sums[self._summed - count]

    def tried(self, place: int) -> Path:
        """The soup with one more."""
        if self._summable:
            try:
                self._combined([*self._kept, place], self._trial)
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
        evaluate: Callable[[int, Path], float],
        sign: int,
        *,
        overwrite: bool,
    ) -> tuple[Sequence[Path], float]:
        """Writes the mean of the members, and returns them and its score.

        That is the score of the trial `best`, unless the sum in float64 was rounded and some bit is
        another: then the mean is evaluated as well. Should it be worse than the best checkpoint,
        whose score is `floor`, the last members are left out again.
        """
        if len(members) > 2 and self._tried_again():  # of two, the trial was the mean itself
            self._merge(members, self._exact, overwrite=True)
            if not _same_weights(self._exact, self._trial):
                best = evaluate(len(members), self._exact)
            while sign * best < sign * floor:
                members, best = members[:-1], floor
                if len(members) > 1:
                    self._merge(members, self._exact, overwrite=True)
                    best = evaluate(len(members), self._exact)
        self._merge(members, self._output, overwrite=overwrite)
        return members, best

    def _tried_again(self) -> bool:
        """Makes the last trial that was kept, unless it was the mean itself.

        The scores of a resumed run may all be remembered, so what can be summed shows only here.
        """
        if not self._summable:
            return False
        try:
            self._combined(self._kept, self._trial)
        except MergeError:
            return False
        return True

    def _combined(self, members: Sequence[int], output: Path) -> None:
        """The mean of members by way of the sum of all but the last, as a copy of the best."""
        share = Fraction(1, len(members))
        self._merge(
            [self._sum(len(members) - 1), self._order[members[-1]]],
            output,
            weights=[share, share],
            normalize=False,
            dtype="template",
            template=self._order[0],
            overwrite=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for path in (*self._sums, self._trial, self._exact):
            remove(path)


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
        # An evaluation may leave its results in a directory: only what holds weights counts.
        for file in _weights_in(path) if path.is_dir() else [path]:
            with _readable(file):
                state = file.stat()
            found.append([str(file.absolute()), state.st_size, state.st_mtime_ns])
    return found


def _weights_in(folder: Path) -> list[Path]:
    layout = scan(folder)
    pairs = zip(layout.files, layout.members, strict=True)
    return [file.path for file, member in pairs if member is not None]


def _same_place(one: Path, other: Path) -> bool:
    return one.exists() and other.exists() and one.samefile(other)


def _line(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry).encode() + b"\n"


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise MergeError(error.strerror or str(error), where=path) from None
