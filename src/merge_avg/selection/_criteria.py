"""Candidates, and which of them are asked for: some steps or epochs, the last, or the best.

Each function returns the candidates that stay, and adds those that go to `left`, with the reason.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from merge_avg.checkpoint import direction, turned
from merge_avg.errors import MergeError, UsageError, named
from merge_avg.options import Bounds, Criteria, Mode, suggested
from merge_avg.selection._names import CLOCKS, Clock, Metadata, series


def natural(text: str) -> list[tuple[int, int | str]]:
    """Return a key that sorts the numbers in names as numbers: fold10 comes after fold9."""
    parts = re.split(r"(\d+)", text)
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in parts]


Age = tuple[int, int]
NAMED = "named"  # why a candidate is one, where nothing speaks against it


@dataclass(frozen=True)
class Candidate:
    """A checkpoint that was looked at, its value of the metric that decides, and its fate."""

    path: Path
    step: int | None = None
    epoch: int | None = None
    metric: float | None = None
    chosen: bool = True
    why: str = NAMED
    said: Metadata = field(default_factory=Metadata, repr=False)  # all that is known of it
    name: Metadata = field(default_factory=Metadata, repr=False)  # of that, what its name says
    fold: Path = Path()  # the folder of its fold
    listed: int = 0  # the number of the argument, or of what its pattern matched
    rough: int | None = None  # a rough sum of its weights

    @property
    def moment(self) -> Age:
        """Return its epoch and step, -1 for what is not known."""
        return (-1 if self.epoch is None else self.epoch, -1 if self.step is None else self.step)

    def left(self, why: str) -> Candidate:
        """Return it as one that is left out."""
        return replace(self, chosen=False, why=why)


Found = list[Candidate]


def age_of(found: Iterable[Candidate]) -> Callable[[Candidate], Age]:
    """Return what tells which of candidates is older: their steps, then their epochs.

    Epochs come first where steps are not known of all, or repeat, as they do within epochs.
    """
    timed = [one for one in found if one.said.timed]
    steps = {one.step for one in timed}
    within = None in steps or len(steps) < len(timed)
    within &= all(one.epoch is not None for one in timed)
    return lambda one: one.moment if within else one.moment[::-1]


def by_age(found: Iterable[Candidate]) -> Found:
    """Return candidates by age, then as they are listed; those that do not tell it come last."""
    found = list(found)
    age = age_of(found)

    def key(one: Candidate) -> tuple[object, ...]:
        return not one.said.timed, age(one), one.listed, natural(str(one.path))

    return sorted(found, key=key)


def refuse_unordered(chosen: Found, what: str) -> None:
    """Raise MergeError where it is not known which of the chosen ones is older than another."""
    hint = "give weights with -w, in the order of the checkpoints"
    kinds = [{one.path for one in chosen if getattr(one, clock) is None} for clock in CLOCKS]
    if all(kinds):
        unknown = next(one.path for one in chosen if any(one.path in kind for kind in kinds))
        told = f"{what} goes by age, and its step or epoch is not known"
        raise MergeError(told, where=unknown, hint=hint)
    age = age_of(chosen)
    for a, b in itertools.pairwise(by_age(chosen)):
        if age(a) == age(b):
            same = f"{what} goes by age, and {a.path} is of the same {_when(a)}"
            raise MergeError(same, where=b.path, hint=hint)


def without_copies(
    found: Found,
    whole: Callable[[Path], int | None],
    left: Found,
    criteria: Criteria,
    *,
    listed: bool = False,
) -> tuple[Found, list[str]]:
    """Return each checkpoint once, the oldest first, and a note for each copy.

    Those with the same rough sum of weights are told apart by the `whole` one. A copy has another
    name, such as last.ckpt. Two of one series, such as two folds, are a mistake, and so are two
    arguments that tell no time: an error in a plain merge. Where weights are `listed`, every two
    arguments are.
    """
    alike: dict[object, Found] = {}
    whole = functools.cache(whole)
    counts = Counter(series(one.path) for one in found)

    def same(a: Candidate, b: Candidate) -> bool:
        # Two names that say different epochs are believed, and so are two files. A name may count
        # from one where the file counts from zero.
        apart = a.said.counted == b.said.counted and _same_time(a, b) is False
        told = a.rough is not None and not apart and whole(a.path) is not None
        return a.path.samefile(b.path) or (told and whole(a.path) == whole(b.path))

    def by_mistake(a: Candidate, b: Candidate) -> bool:
        apart = a.listed != b.listed and (listed or not (a.said.timed or b.said.timed))
        return criteria.empty and (apart or series(a.path) == series(b.path))

    notes = []

    def rank(one: Candidate) -> tuple[bool, bool, int]:
        return one.name == Metadata(), not one.said.timed, -counts[series(one.path)]

    # Of a checkpoint and its copies last.ckpt and best_epoch_3.pth, the one that is named like the
    # others is kept: it may be the template.
    for one in sorted(found, key=rank):
        group = one.fold if criteria.one_best_per_fold else None
        alone = one.path.resolve() if one.rough is None else None
        others = alike.setdefault((one.rough, alone, group), [])
        at = next((at for at, other in enumerate(others) if same(one, other)), None)
        if at is None or (by_mistake(one, others[at]) and criteria.allow_trivial):
            others.append(one)
            continue
        twin, why = others[at], f"a copy of {others[at].path.name}"
        if by_mistake(one, twin):
            what = f"it has the weights of {twin.path}"
            if one.path == twin.path:
                what = "it is named twice"
            hint = "leave one out, or count both with --allow-trivial"
            raise MergeError(what, where=one.path, hint=hint)
        left.append(one.left(why))
        notes.append(f"{one.path} is {why} and is counted once")
        # checkpoint_best_bleu_27.5.pt tells what checkpoint12.pt does not.
        metrics = {**one.said.metrics, **twin.said.metrics}
        others[at] = replace(twin, said=replace(twin.said, metrics=metrics))
    return by_age(itertools.chain(*alike.values())), notes


def told_apart(found: Found) -> bool:
    """Return whether their times alone tell that none is a copy of another."""
    times = ({getattr(one, clock) for one in found} - {None} for clock in CLOCKS)
    same = len({one.said.counted for one in found}) == 1
    return same and any(len(some) == len(found) for some in times)


def _same_time(a: Candidate, b: Candidate) -> bool | None:
    """Return whether two have the same step and epoch, as far as both tell; None where none do."""
    pairs = ((a.step, b.step), (a.epoch, b.epoch))
    known = [x == y for x, y in pairs if x is not None and y is not None]
    return all(known) if known else None


def check(criteria: Criteria) -> None:
    """Raise UsageError where criteria exclude each other, or a number of them is too small."""
    for name in ("last", "best", "min_interval"):
        number = getattr(criteria, name)
        if number is not None and number < 1:
            raise UsageError(f"--{name.replace('_', '-')} is {number}", hint="give one or more")
    if sum(map(bool, (criteria.last, criteria.best, criteria.one_best_per_fold))) > 1:
        what = "--last, --best and --one-best-per-fold exclude each other"
        raise UsageError(what, hint="give one of them")


def _keep(found: Found, wanted: Iterable[bool], why: str, left: Found) -> Found:
    """Return the wanted ones; `why` the others are left out."""
    pairs = list(zip(found, wanted, strict=True))
    left += [one.left(why) for one, kept in pairs if not kept]
    return [one for one, kept in pairs if kept]


def _within(found: Found, criteria: Criteria, left: Found) -> Found:
    """Return those whose step and epoch are asked for, and that lie far enough apart."""
    for name, bounds in (("step", criteria.steps), ("epoch", criteria.epochs)):
        if bounds is None:
            continue
        known = _told(found, name, left)
        inside = [_inside(getattr(one, name), bounds) for one in known]
        found = _keep(known, inside, f"its {name} is not asked for", left)
        if not found:
            what = f"no checkpoint has one of the {name}s asked for: there are {_names(known)}"
            raise MergeError(what)
    if criteria.min_interval is None:
        return found
    # From the newest back, each that lies far enough from the last one kept.
    found, clock = _timed(found, left)
    spaced: Found = []
    for one in reversed(found):
        if spaced and getattr(spaced[-1], clock) - getattr(one, clock) < criteria.min_interval:
            left.append(one.left("too near to the next one"))
        else:
            spaced.append(one)
    return spaced[::-1]


def _inside(number: int, bounds: Bounds) -> bool:
    first, last, every = bounds
    high = math.inf if last is None else last
    return (first or 0) <= number <= high and number % (every or 1) == 0


def _timed(found: Found, left: Found) -> tuple[Found, Clock]:
    """Return those that tell a step, or an epoch if more tell that, and which it is."""
    steps, epochs = (sum(getattr(one, name) is not None for one in found) for name in CLOCKS)
    clock: Clock = "step" if steps and steps >= epochs else "epoch"
    return by_age(_told(found, clock, left)), clock


def _told(found: Found, name: str, left: Found) -> Found:
    """Return those that tell their step or epoch; raise MergeError where none does."""
    told = [getattr(one, name) is not None for one in found]
    if not any(told):
        hint = f"put it into the name, as in {name}=3.pt, or leave out the option"
        what = name if any(one.said.timed for one in found) else "step or epoch"
        raise MergeError(f"its {what} is not known", where=found[0].path, hint=hint)
    return _keep(found, told, f"its {name} is not known", left)


def _when(one: Candidate) -> str:
    return f"step {one.step}" if one.epoch is None else f"epoch {one.epoch}"


def _twins(found: Found) -> Iterator[tuple[Candidate, Candidate]]:
    """Yield pairs of checkpoints of one run, and of the same step or epoch."""
    ordered = sorted(found, key=lambda one: (str(one.fold), one.moment))
    for a, b in itertools.pairwise(ordered):
        if a.fold == b.fold and _same_time(a, b):
            yield a, b


def _refuse_mixture(found: Found) -> None:
    """Raise MergeError where series of names go through the same steps or epochs: G_1 and D_1."""
    counts = Counter(series(one.path) for one in found)
    for a, b in _twins(found):
        if series(a.path) != series(b.path) and min(counts[series(x.path)] for x in (a, b)) > 1:
            what = (
                f"{a.path.name} and {b.path.name} are of the same time, but of two series of names"
            )
            hint = "name the files of one series, or give a pattern that fits only them"
            raise MergeError(what, where=b.path.parent, hint=hint)


def _doubts(chosen: Found) -> Iterator[str]:
    """Yield notes on those that may not belong together, and where some may be missing."""
    for clock in reversed(CLOCKS):
        numbers = {getattr(one, clock) for one in chosen}
        pairs = [] if None in numbers else list(itertools.pairwise(sorted(numbers)))
        # Where a single checkpoint is missing, the distance is twice the smallest: no gap yet.
        nearest = min((b - a for a, b in pairs), default=0)
        gaps = [(a, b) for a, b in pairs if b - a > 2 * nearest]
        if gaps:
            a, b = gaps[0]
            yield f"there is a gap between {clock} {a} and {clock} {b} of those chosen"
            break
    for x, y in _twins(chosen):
        # Names of one series that tell no time tell something else, such as folds.
        if series(x.path) != series(y.path) or x.name.timed:
            when = _when(x)
            yield f"{x.path.name} and {y.path.name} are both of {when}, with other weights"
            break
    mute = [one.path for one in chosen if not one.said.timed and one.metric is None]
    if 0 < len(mute) < len(chosen):
        names = named([path.name or path for path in mute])  # the name of . is empty
        yield f"counted although no step or epoch is known, unlike for the others: {names}"


def _deciding(known: set[str], criteria: Criteria) -> tuple[str | None, Mode | None]:
    """Return the metric that decides, if one does, and whether lower or higher is better."""
    metric = criteria.metric
    if metric is None and (criteria.best is not None or criteria.one_best_per_fold):
        names = sorted(known - {"step", "epoch"})
        if len(names) != 1:
            told = f"known are {named(names, 8)}" if names else "no checkpoint tells one"
            hint = "name the one that decides with --metric" + ", its log with --metrics" * (
                not names
            )
            raise UsageError(f"what is best depends on a metric; {told}", hint=hint)
        metric = names[0]
    if metric is None:
        return None, None
    if _value(dict.fromkeys(known, 0.0), metric) is None:
        others = f"known are {named(sorted(known), 8)}" if known else "name its log with --metrics"
        what = f"no checkpoint has the metric {metric!r}"
        raise MergeError(what, hint=suggested(metric, known, others))
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
    plain = {name: re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") for name in metrics}
    wanted = re.sub(r"[^a-z0-9]+", "_", metric.lower()).strip("_")
    same = [name for name in plain if plain[name] == wanted]
    # The loss is not what neg_loss tells, which is best where it is high.
    ending = [name for name, one in plain.items() if one.endswith(f"_{wanted}")]
    ending = [name for name in ending if not turned(plain[name].removesuffix(wanted))]
    return next((metrics[alike[0]] for alike in (same, ending) if len(alike) == 1), None)


def pick(
    found: Found, criteria: Criteria, left: Found, *, mixed: bool = False
) -> tuple[Found, Mode | None, list[str]]:
    """Return those asked for of candidates by age, the direction of the metric, and notes.

    They may be of `mixed` series where the user named each.
    """
    found = _within(found, criteria, left)
    metric, mode = _deciding({name for one in found for name in one.said.metrics}, criteria)
    notes = []
    if metric is not None:
        found = [replace(one, metric=_value(one.said.metrics, metric)) for one in found]
        notes.append(f"best is the {'lowest' if mode == 'min' else 'highest'} {metric}")
    if not mixed:
        _refuse_mixture([one for one in found if metric is None or one.metric is not None])
    if criteria.one_best_per_fold:
        chosen = []
        for fold in dict.fromkeys(one.fold for one in found):
            group = [one for one in found if one.fold == fold]
            chosen += _best(group, 1, mode, left, f"the best of {fold.name}")
    elif criteria.best is not None:
        chosen = _best(found, criteria.best, mode, left, f"among the best {criteria.best}")
    elif criteria.last is not None:
        timed, _ = _timed(found, left)
        _enough(timed, criteria.last, "last", timed)
        chosen = _take(timed, timed[-criteria.last :], left, f"among the last {criteria.last}")
    else:
        chosen = [replace(one, why="asked for") for one in found]
    return chosen, mode, [*notes, *_doubts(chosen)]


def _best(found: Found, count: int, mode: Mode | None, left: Found, why: str) -> Found:
    told = [one.metric is not None for one in found]
    known = _keep(found, told, "its metric is not known", left)
    numbers = [not math.isnan(one.metric or 0) for one in known]
    known = _keep(known, numbers, "its metric is not a number", left)
    _enough(known, count, "best", found)
    sign = 1 if mode == "max" else -1
    # Of equals, the later one counts: sorting is stable, and `found` is sorted by age.
    ranked = sorted(known, key=lambda one: sign * (one.metric or 0.0))
    return _take(known, ranked[-count:], left, why)


def _take(found: Found, winners: Found, left: Found, why: str) -> Found:
    """Return the winners, by age, and `why` they are."""
    paths = {one.path for one in winners}
    kept = _keep(found, [one.path in paths for one in found], f"not {why}", left)
    return [replace(one, why=why) for one in kept]


def _enough(known: Found, count: int, what: str, found: Found) -> None:
    if len(known) < count:
        noun = "checkpoint" if len(known) == 1 else "checkpoints"
        where = " with the metric" if what == "best" else ""
        there = f"there are {len(known)} {noun}{where}: {_names(found)}"
        hint = "ask for fewer, or look at them with --dry-run"
        raise MergeError(f"the {what} {count} are asked for, and {there}", hint=hint)


def _names(found: Found) -> str:
    return named([one.path.name for one in found], 8)
