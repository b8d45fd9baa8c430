"""Candidates, and which of them are asked for: some steps or epochs, the last, or the best.

Each function returns the candidates that stay. Those that go are added to `left`, with the reason.
"""

from __future__ import annotations

import filecmp
import itertools
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from merge_avg.errors import MergeError, UsageError, named
from merge_avg.options import Bounds, Criteria, Mode
from merge_avg.selection._metadata import Metadata, name_metadata

# Words that tell the direction of a metric. They have to match whole, as a "glossy" metric is not a
# loss. Names that may mean either, such as score or metric, are missing on purpose: --mode decides.
_LOWER = re.compile(r"(?i)loss|err|error|perplexity|ppl|wer|cer|fid|mse|mae|rmse|nll|bpc|bpb")
_HIGHER = re.compile(
    r"(?i)acc|accuracy|bleu|f1|auc|auroc|map|iou|miou|dice|psnr|ssim|rouge\w*|top[-_]?\d+"
    r"|precision|recall|r2|fitness"
)


def natural(text: str) -> list[tuple[int, int | str]]:
    """Return a key that sorts the numbers in names as numbers: fold10 comes after fold9."""
    parts = re.split(r"(\d+)", text)
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in parts]


@dataclass(frozen=True)
class Candidate:
    """A checkpoint that was looked at, its value of the metric that decides, and its fate."""

    path: Path
    step: int | None = None
    epoch: int | None = None
    metric: float | None = None
    chosen: bool = True
    why: str = "named"

    def left(self, why: str) -> Candidate:
        """Return it as one that is left out."""
        return replace(self, chosen=False, why=why)


def age(one: Candidate) -> tuple[object, ...]:
    """Return a key that sorts by step, epoch and name; what tells neither number comes last."""
    counts = one.step, one.epoch
    known = [-1 if count is None else count for count in counts]
    return counts == (None, None), known, natural(str(one.path))


def without_copies(
    found: Sequence[Candidate], left: list[Candidate]
) -> tuple[list[Candidate], list[str]]:
    """Return each checkpoint once, the oldest first, and a note for each copy."""
    kept: dict[tuple[int, int], Candidate] = {}  # by what tells files apart
    alike: dict[object, list[Candidate]] = {}
    notes = []
    # Of a checkpoint and its copy last.ckpt, the one whose name says something is kept.
    for one in sorted(found, key=lambda one: name_metadata(one.path) == Metadata()):
        stat = one.path.stat()
        # Bytes are compared only where all of this leaves a doubt: checkpoints are large.
        file = one.path.is_file()
        doubts = alike.setdefault((one.step, one.epoch, _end(one.path)), []) if file else []
        twin = kept.get((stat.st_dev, stat.st_ino)) or next(
            (other for other in doubts if filecmp.cmp(one.path, other.path, shallow=False)), None
        )
        if twin is None:
            kept[stat.st_dev, stat.st_ino] = one
            doubts.append(one)
        else:
            why = f"a copy of {twin.path.name}"
            left.append(one.left(why))
            notes.append(f"{one.path} is {why} and is counted once")
    return sorted(kept.values(), key=age), notes


def _end(path: Path) -> tuple[int, bytes]:
    """Return a file's size and last bytes, which have the checksums of a zip archive."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 4096, 0))
        return size, file.read()


def check(criteria: Criteria) -> None:
    """Raise UsageError where criteria exclude each other, or a number of them is too small."""
    for name in ("last", "best", "min_interval"):
        number = getattr(criteria, name)
        if number is not None and number < 1:
            raise UsageError(f"--{name.replace('_', '-')} is {number}", hint="give one or more")
    if criteria.last is not None and (criteria.best is not None or criteria.one_best_per_fold):
        raise UsageError("--last and the best exclude each other", hint="give one of them")
    if criteria.best is not None and criteria.one_best_per_fold:
        raise UsageError("--best and --one-best-per-fold exclude each other", hint="give one")


def _within(found: list[Candidate], criteria: Criteria, left: list[Candidate]) -> list[Candidate]:
    """Return those whose step and epoch are asked for, and that lie far enough apart."""
    for name, bounds in (("step", criteria.steps), ("epoch", criteria.epochs)):
        if bounds is None:
            continue
        _need(found, name)
        kept = [one for one in found if _inside(getattr(one, name), bounds)]
        if not kept:
            what = f"no checkpoint has a {name} that is asked for: there are {_names(found)}"
            raise MergeError(what)
        others = (one for one in found if not _inside(getattr(one, name), bounds))
        left += [one.left(f"{name} {getattr(one, name)} is not asked for") for one in others]
        found = kept
    if criteria.min_interval is None:
        return found
    # From the newest back, each that lies far enough from the last one kept.
    clock = _clock(found)
    spaced: list[Candidate] = []
    for one in reversed(found):
        if spaced and getattr(spaced[-1], clock) - getattr(one, clock) < criteria.min_interval:
            left.append(one.left("too near to the next one"))
        else:
            spaced.append(one)
    return spaced[::-1]


def _inside(number: int, bounds: Bounds) -> bool:
    first, last, every = bounds
    low, high = first is None or number >= first, last is None or number <= last
    return low and high and number % (every or 1) == 0


def _clock(found: Sequence[Candidate]) -> str:
    """Return what orders checkpoints in time: steps where all are known, else epochs."""
    if all(one.step is not None for one in found):
        return "step"
    _need(found, "epoch")
    return "epoch"


def _need(found: Sequence[Candidate], name: str) -> None:
    for one in found:
        if getattr(one, name) is None:
            hint = f"put it into the name, as in {name}=3.pt, or leave out the option"
            raise MergeError(f"its {name} is not known", where=one.path, hint=hint)


def _gaps(chosen: Sequence[Candidate]) -> Iterator[str]:
    """Yield a note where neighbours lie much further from each other than others do."""
    for name in ("epoch", "step"):
        numbers = [getattr(one, name) for one in chosen]
        if len(numbers) < 3 or None in numbers:
            continue
        pairs = [(a, b) for a, b in itertools.pairwise(sorted(numbers)) if b > a]
        nearest = min((b - a for a, b in pairs), default=0)
        for a, b in pairs:
            # Where a single checkpoint is missing, the distance is twice the smallest: no gap yet.
            if b - a > 2 * nearest:
                yield f"there is a gap between {name} {a} and {name} {b} of those chosen"
                return


def direction(metric: str) -> Mode | None:
    """Return whether lower or higher is better for a metric; None where its name does not tell."""
    words = [word for word in re.split(r"[^A-Za-z0-9]+|(?<=[a-z])(?=[A-Z])", metric) if word]
    lower = any(_LOWER.fullmatch(word) for word in words)
    higher = any(_HIGHER.fullmatch(word) for word in words)
    return None if lower == higher else "min" if lower else "max"


def _deciding(known: set[str], criteria: Criteria) -> tuple[str | None, Mode | None]:
    """Return the metric that decides, if one does, and whether lower or higher is better."""
    metric = criteria.metric
    if criteria.best is None and not criteria.one_best_per_fold and metric is None:
        return None, None
    if metric is None:
        names = sorted(known - {"step", "epoch"})
        if len(names) != 1:
            listed = named(names, 8) if names else "none"
            hint = "name the one that decides with --metric"
            raise UsageError(f"what is best depends on a metric; known are {listed}", hint=hint)
        metric = names[0]
    mode = criteria.mode or direction(metric)
    if mode is None:
        hint = "say --mode min or --mode max"
        raise UsageError(f"whether a lower {metric!r} is better is not obvious", hint=hint)
    return metric, mode


def _value(metrics: Mapping[str, float], metric: str) -> float | None:
    """Return the metric of this name, or the only one that is spelt so or ends so.

    Frameworks put the same metric under names of their own: val/loss, val_loss, eval_loss.
    """
    if metric in metrics:
        return metrics[metric]
    plain = {name: _plain(name) for name in metrics}
    same = [name for name in plain if plain[name] == _plain(metric)]
    ending = [name for name in plain if plain[name].endswith(f"_{_plain(metric)}")]
    return next((metrics[alike[0]] for alike in (same, ending) if len(alike) == 1), None)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def pick(
    found: list[Candidate],
    metrics: Mapping[Path, Mapping[str, float]],
    folds: Mapping[Path, Path],
    criteria: Criteria,
    left: list[Candidate],
) -> tuple[list[Candidate], Mode | None, list[str]]:
    """Return those asked for, the direction of the metric, and notes for the user.

    The candidates are sorted by age; each has its metrics by name, and the folder of its fold.
    """
    found = _within(found, criteria, left)
    metric, mode = _deciding({name for one in found for name in metrics[one.path]}, criteria)
    notes = []
    if metric is not None:
        found = [replace(one, metric=_value(metrics[one.path], metric)) for one in found]
        notes.append(f"best is the {'lowest' if mode == 'min' else 'highest'} {metric}")
    if criteria.one_best_per_fold:
        chosen = []
        for fold in dict.fromkeys(folds[one.path] for one in found):
            group = [one for one in found if folds[one.path] == fold]
            chosen += _best(group, 1, mode, left, f"the best of {fold.name}")
    elif criteria.best is not None:
        chosen = _best(found, criteria.best, mode, left, f"among the best {criteria.best}")
    elif criteria.last is not None:
        chosen = _last(found, criteria.last, left)
    else:
        chosen = [replace(one, why="asked for") for one in found]
    return chosen, mode, [*notes, *_gaps(chosen)]


def _last(found: list[Candidate], count: int, left: list[Candidate]) -> list[Candidate]:
    # Steps that repeat were counted within each epoch.
    if _clock(found) == "epoch" or len({one.step for one in found}) < len(found):
        found = sorted(found, key=lambda one: (one.epoch or 0, *age(one)))
    _enough(found, count, "last", found)
    why = f"among the last {count}"
    left += [one.left(f"not {why}") for one in found[:-count]]
    return [replace(one, why=why) for one in found[-count:]]


def _best(
    found: list[Candidate], count: int, mode: Mode | None, left: list[Candidate], why: str
) -> list[Candidate]:
    known: list[Candidate] = []
    for one in found:
        if one.metric is None or math.isnan(one.metric):
            lacking = "is not known" if one.metric is None else "is not a number"
            left.append(one.left(f"its metric {lacking}"))
        else:
            known.append(one)
    _enough(known, count, "best", found)
    sign = 1 if mode == "max" else -1
    # Of equals, the later one counts: sorting is stable, and `found` is sorted by age.
    ranked = sorted(known, key=lambda one: sign * (one.metric or 0.0))
    winners = {one.path for one in ranked[-count:]}
    left += [one.left(f"not {why}") for one in known if one.path not in winners]
    return [replace(one, why=why) for one in known if one.path in winners]


def _enough(known: list[Candidate], count: int, what: str, found: list[Candidate]) -> None:
    if len(known) < count:
        noun = "checkpoint" if len(known) == 1 else "checkpoints"
        where = " with the metric" if what == "best" else ""
        there = f"there are {len(known)} {noun}{where}: {_names(found)}"
        hint = "ask for fewer, or look at them with --dry-run"
        raise MergeError(f"the {what} {count} are asked for, and {there}", hint=hint)


def _names(found: Sequence[Candidate]) -> str:
    return named([one.path.name for one in found], 8)
