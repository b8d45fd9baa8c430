"""What is asked for: some steps or epochs, the last, or the best by a metric."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from merge_avg.errors import MergeError, UsageError, named
from merge_avg.options import Bounds, Criteria, Mode
from merge_avg.selection._candidates import Candidate, Found, age
from merge_avg.selection._metadata import Metadata

# Words that tell the direction of a metric. They have to match whole, as a "glossy" metric is not a
# loss. Names that may mean either, such as score or metric, are missing on purpose: --mode decides.
_LOWER = re.compile(
    r"loss|err|error|perplexity|ppl|wer|cer|fid|mse|mae|rmse|nll|bpc|bpb", re.IGNORECASE
)
_HIGHER = re.compile(
    r"acc|accuracy|bleu|f1|auc|auroc|map|iou|miou|dice|psnr|ssim|rouge\w*|top[-_]?\d+|precision"
    r"|recall|r2|fitness",
    re.IGNORECASE,
)
_FOLD = re.compile(r"fold", re.IGNORECASE)


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


# Steps and epochs


def within(found: list[Found], criteria: Criteria, left: list[Candidate]) -> list[Found]:
    """Return those whose step and epoch are asked for, and that lie far enough apart."""
    for name, bounds in (("step", criteria.steps), ("epoch", criteria.epochs)):
        if bounds is None:
            continue
        _need(found, name)
        kept = []
        for one in found:
            number = getattr(one, name)
            if _inside(number, bounds):
                kept.append(one)
            else:
                left.append(one.left(f"{name} {number} is not asked for"))
        if not kept:
            what = f"no checkpoint has a {name} that is asked for: there are {_names(found)}"
            raise MergeError(what)
        found = kept
    return found if criteria.min_interval is None else _spaced(found, criteria.min_interval, left)


def _inside(number: int, bounds: Bounds) -> bool:
    first, last, every = bounds
    low, high = first is None or number >= first, last is None or number <= last
    return low and high and number % (every or 1) == 0


def _spaced(found: list[Found], interval: int, left: list[Candidate]) -> list[Found]:
    """Return the newest, and of the others those that are far enough from the next one chosen."""
    name = _clock(found)
    kept: list[Found] = []
    after: int | None = None
    for one in reversed(found):
        at = getattr(one, name)
        if after is not None and after - at < interval:
            left.append(one.left("too near to the next one"))
        else:
            kept.append(one)
            after = at
    return kept[::-1]


def _clock(found: Sequence[Found]) -> str:
    """Return what orders checkpoints in time: steps where all are known, else epochs."""
    if all(one.step is not None for one in found):
        return "step"
    _need(found, "epoch")
    return "epoch"


def _need(found: Sequence[Found], name: str) -> None:
    for one in found:
        if getattr(one, name) is None:
            hint = f"put it into the name, as in {name}=3.pt, or leave out the option"
            raise MergeError(f"its {name} is not known", where=one.path, hint=hint)


def gaps(chosen: Sequence[Candidate]) -> Iterator[str]:
    """Yield a note where neighbours lie much further from each other than others do."""
    for name in ("epoch", "step"):
        numbers = [getattr(one, name) for one in chosen]
        if len(numbers) < 3 or None in numbers:
            continue
        pairs = [(a, b) for a, b in itertools.pairwise(sorted(numbers)) if b > a]
        nearest = min((b - a for a, b in pairs), default=0)
        # Where a single checkpoint is missing, the distance is twice the smallest: no gap yet.
        wide = [(a, b) for a, b in pairs if b - a > 2 * nearest]
        if wide:
            a, b = wide[0]
            yield f"there is a gap between {name} {a} and {name} {b} of those chosen"
            return


# Metrics


def direction(metric: str) -> Mode | None:
    """Return whether lower or higher is better for a metric; None where its name does not tell."""
    words = [word for word in re.split(r"[^A-Za-z0-9]+|(?<=[a-z])(?=[A-Z])", metric) if word]
    lower = any(_LOWER.fullmatch(word) for word in words)
    higher = any(_HIGHER.fullmatch(word) for word in words)
    return None if lower == higher else "min" if lower else "max"


def deciding(found: Sequence[Found], criteria: Criteria) -> tuple[str | None, Mode | None]:
    """Return the metric that decides, if one does, and whether lower or higher is better."""
    if criteria.best is None and not criteria.one_best_per_fold and criteria.metric is None:
        return None, None
    metric = criteria.metric
    if metric is None:
        names = sorted({name for one in found for name in one.metadata.metrics} - {"step", "epoch"})
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


def measured(found: Sequence[Found], metric: str) -> list[Found]:
    """Return the same checkpoints with their values of a metric."""
    return [replace(one, metric=_value(one.metadata, metric)) for one in found]


def _value(known: Metadata, metric: str) -> float | None:
    """Return the metric of this name, or the only one that is spelt so or ends so.

    Frameworks put the same metric under names of their own: val/loss, val_loss, eval_loss.
    """
    if metric in known.metrics:
        return known.metrics[metric]
    plain = _plain(metric)
    for alike in (
        [name for name in known.metrics if _plain(name) == plain],
        [name for name in known.metrics if _plain(name).endswith(f"_{plain}")],
    ):
        if len(alike) == 1:
            return known.metrics[alike[0]]
    return None


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


# The last and the best


def pick(
    found: list[Found], criteria: Criteria, mode: Mode | None, left: list[Candidate]
) -> list[Candidate]:
    """Return the last or the best, as asked for, or all.

    Args:
        found: the checkpoints, the oldest first.
        criteria: what is asked for.
        mode: whether lower or higher is better, where the best are asked for.
        left: what is left out is added to it.

    Raises:
        MergeError: there are fewer than asked for, or they do not say what is needed.
    """
    if criteria.one_best_per_fold:
        folds: dict[Path, list[Found]] = {}
        for one in found:
            folds.setdefault(_fold(one), []).append(one)
        return [
            winner
            for fold, group in folds.items()
            for winner in _best(group, 1, mode, left, f"the best of {fold.name}")
        ]
    if criteria.best is not None:
        return _best(found, criteria.best, mode, left, f"among the best {criteria.best}")
    if criteria.last is not None:
        return _last(found, criteria.last, left)
    return [one.chosen("asked for") for one in found]


def _last(found: list[Found], count: int, left: list[Candidate]) -> list[Candidate]:
    # Steps that repeat were counted within each epoch.
    if _clock(found) == "epoch" or len({one.step for one in found}) < len(found):
        found = sorted(found, key=lambda one: (one.epoch or 0, *age(one)))
    _enough(found, count, "last", found)
    why = f"among the last {count}"
    left += [one.left(f"not {why}") for one in found[: len(found) - count]]
    return [one.chosen(why) for one in found[len(found) - count :]]


def _best(
    found: list[Found], count: int, mode: Mode | None, left: list[Candidate], why: str
) -> list[Candidate]:
    known: list[Found] = []
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
    winners = {one.path for one in ranked[len(ranked) - count :]}
    left += [one.left(f"not {why}") for one in known if one.path not in winners]
    return [one.chosen(why) for one in known if one.path in winners]


def _fold(one: Found) -> Path:
    """Return the folder that tells folds apart: fold*/ below or above, or that of the argument."""
    below = one.path.relative_to(one.folder).parts if one.path.is_relative_to(one.folder) else ()
    if len(below) > 1 and _FOLD.match(below[0]):
        return one.folder / below[0]
    return next((path for path in one.path.parents if _FOLD.match(path.name)), one.folder)


def _enough(found: Sequence[Found], count: int, what: str, everything: Sequence[Found]) -> None:
    if len(found) >= count:
        return
    noun = "checkpoint" if len(found) == 1 else "checkpoints"
    where = " with the metric" if what == "best" else ""
    raise MergeError(
        f"the {what} {count} are asked for, and there are {len(found)} {noun}{where}: "
        f"{_names(everything)}",
        hint="ask for fewer, or look at them with --dry-run",
    )


def _names(found: Sequence[Found]) -> str:
    return named([one.path.name for one in found], 8)
