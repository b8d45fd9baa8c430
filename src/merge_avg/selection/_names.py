"""What the names of a run say: steps, epochs and metrics, and which are averages that others made.

    epoch=3-step=1000-val_loss=0.12.ckpt      Lightning's ModelCheckpoint
    checkpoint_best_bleu_27.5.pt              fairseq: the word before a number says what it is
    322epoch.pth  ep12-ba480-rank0.pt         ESPnet: the word after; Composer
    checkpoint-1000  checkpoint12.pt          steps of transformers, epochs of fairseq and timm
    model_9.pth  net_g_5000.pth  0012.pth     no word says: the one number that varies in the run
    epoch-30-avg-15.pt  valid.acc.ave.pth     averages

Where several numbers vary and none has a word, nothing is read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from merge_avg.checkpoint import is_metric, words

Clock = Literal["step", "epoch"]
CLOCKS: tuple[Clock, ...] = get_args(Clock)

# What goes on after a dot, as in epoch-2.5, is not a count. A sign is part of a pair's value only.
_NUMBER = re.compile(
    r"(?i)(?<==)[-+]?(?:(?:\d+\.\d+|\d+|\.\d+)(?:e[-+]?\d+)?|nan|inf)|\d+(?:\.\d+)*"
)
# Of the others, parts of a set, settings and runs.
_TIMES = {
    "step": r"steps?|iter(ation)?s?|it|itr|updates?|ba|s",
    "epoch": r"epochs?|ep|e",
    "weak": r"checkpoints?|ch?kpts?",
    "other": r"avg|ave|folds?|cv|split|seed|rank|gpu|world|run|trial|exp|v(ersion)?|member|worker"
    r"|client|part|shard|stage|phase|task|layers?|dim|size|bs|lr|k",
}
_AFTER = re.compile(r"[-_.]?([A-Za-z]+)(?![A-Za-z]|[-_.=]*\d)")
_NAME = re.compile(r"(?:.*best[_.])?([A-Za-z][\w/@.]*?)[-_.=]*$")
# Averages that recipes make of a run's checkpoints: icefall, WeNet, ESPnet, fairseq, OpenNMT, SWA.
_AVERAGE = re.compile(
    r"(?:(?<![A-Za-z])|(?<=[a-z])(?=[A-Z]))(?i:avg|ave|averaged?|swa|soup)(?![a-z])"
    r"(?P<rest>[^0-9]*)(?P<number>[0-9.]*)"
)
# fairseq: epoch and step. EDM2: thousands of images, and the relative width of the EMA.
_SPECIAL = re.compile(
    r"(?:^checkpoint_?(?P<epoch>\d+)_|snapshot-(?=\d+-))(?P<step>\d+)(?:-(?P<sigma>\d*\.\d+))?$"
)
_SUFFIXES = re.compile(r"(?i)(\.(pt|pth|bin|ckpt|safetensors|tar|pkl|th))+$")


@dataclass(frozen=True)
class Metadata:
    """Step, epoch and metrics of a checkpoint, as far as they are known."""

    step: int | None = None  # of the optimizer; EDM2 counts thousands of images instead
    epoch: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)  # by the framework's names
    sigma: float | None = None  # the relative width of a stored power-function EMA
    ours: bool = False  # the output of an earlier merge
    counted: bool = False  # whether step or epoch are told by more than its name
    guessed: bool = False  # whether its name tells them without a word, as the number that varies

    @property
    def timed(self) -> bool:
        """Return whether step or epoch are known."""
        return (self.step, self.epoch) != (None, None)


def read_names(paths: Iterable[Path], clock: Clock | None = None) -> dict[Path, Metadata]:
    """Return what names say that belong together.

    A number that no word explains counts what `clock` says, by default steps where it looks so.
    """
    runs: dict[tuple[str, ...], list[Path]] = {}
    for path in paths:
        runs.setdefault(series(path), []).append(path)
    return {path: said for run in runs.values() for path, said in _read(run, clock)}


def series(path: Path) -> tuple[str, ...]:
    """Return what is around the numbers of a name, the same for all names of a series."""
    return tuple(_NUMBER.split(_stem(path)))


def is_average(path: Path) -> bool:
    """Return whether a name says that the file is an average of other checkpoints."""
    # avg_loss=0.1 and avg_val_acc_0.93 are metrics. A metric before, as in valid.acc.ave, is what
    # the checkpoints were chosen by.
    return any(
        not is_metric(one["rest"]) and "=" not in one["rest"] and "." not in one["number"][:-1]
        for one in _AVERAGE.finditer(_stem(path))
    )


def _stem(path: Path) -> str:
    return _SUFFIXES.sub("", path.name)


def _read(run: Sequence[Path], clock: Clock | None) -> Iterator[tuple[Path, Metadata]]:
    """Yield what each name of a series says."""
    rows = [_NUMBER.findall(_stem(path)) for path in run]
    columns = [*zip(*rows, strict=True)]
    varying = [len(set(column)) > 1 for column in columns]
    labels = [*_labels(_stem(run[0]), varying)]

    def those(*kinds: str) -> list[int]:  # those that vary come first
        found = (n for n, (kind, _) in enumerate(labels) if kind in kinds)
        return sorted(found, key=lambda n: not varying[n])

    counts: dict[str, int] = {kind: those(kind)[0] for kind in CLOCKS if those(kind)}
    moving = any(varying[n] for n in counts.values())
    if moving and "step" in counts and not varying[counts["step"]]:
        del counts["step"]  # no step stays while epochs pass
    unnamed = [n for n in those("", "weak") if all(map(str.isdecimal, columns[n]))]
    free = [n for n in unnamed if varying[n] and not moving]
    weak = [n for n in unnamed if labels[n][0] == "weak" and (varying[n] or not any(varying))]
    guessed = False
    for n in free if len(free) == 1 else weak if len(weak) == 1 and "epoch" not in counts else ():
        found = [*map(int, columns[n])]
        # Of detectron2 the steps count from zero: model_0004999.pth.
        rounded = max(found) >= 999 and all(one % 100 in (0, 99) for one in found)
        folders = n in weak and run[0].is_dir()
        counts["step" if folders else clock or ("step" if rounded else "epoch")] = n
        guessed = clock is None
    for path, row in zip(run, rows, strict=True):
        step, epoch = (_whole(row[counts[kind]]) if kind in counts else None for kind in CLOCKS)
        pairs = zip(labels, row, strict=True)
        metrics = {name: _value(text) for (kind, name), text in pairs if kind == "metric"}
        if special := _SPECIAL.search(_stem(path)):
            step, epoch = int(special["step"]), int(special["epoch"]) if special["epoch"] else None
        sigma = float(special["sigma"]) if special and special["sigma"] else None
        yield path, Metadata(step, epoch, metrics, sigma, guessed=guessed and not special)


def _labels(stem: str, varying: Sequence[bool]) -> Iterator[tuple[str, str]]:
    """Yield for each number what it counts, "metric", or "" if unclear; and the metric's name."""
    end = 0
    for number, varies in zip(_NUMBER.finditer(stem), varying, strict=True):
        before, after = stem[end : number.start()], _AFTER.match(stem, number.end())
        word, match = (words(before) or [""])[-1], _NAME.search(before)
        name = match[1] if match else ""
        pair = name and before.endswith("=")
        kind = _kind(word, single=varies)
        if not kind and after and not pair:
            kind = _kind(after[1].lower())
        if before.endswith("@") or stem[number.end() :].startswith("="):
            kind = "other"  # part of a name, as in recall@10=0.5
        elif pair and (not kind or is_metric(name)):
            kind = "metric"  # loss_epoch=0.5 too
        elif is_metric(word) and ("." in number[0] or not before[-1].isalpha()):
            kind = "metric"
        # Other numbers that stay the same are part of the words around them: resnet50_3, f1_93.
        if varies or kind in ("step", "epoch", "weak", "metric"):
            end = number.end()
        yield kind, name


def _kind(word: str, *, single: bool = False) -> str:
    # Single letters count where they vary, as in RVC's name_e50_s4000.pth.
    known = (kind for kind, text in _TIMES.items() if re.fullmatch(text, word))
    return next(known, "") if single or len(word) > 1 else ""


def _value(text: str) -> float:
    return float(text) if text.count(".") < 2 else math.nan


def _whole(text: str) -> int | None:
    """Return a count, which may be written as 3.0 or 1e3; None for anything else."""
    value = int(text) if text.isdecimal() else _value(text)
    return int(value) if value >= 0 and value == value // 1 < math.inf else None
