"""Several averages of the same checkpoints: which go into each, and what it is called.

A merge is a matrix of weights, outputs by inputs, over one reading of the inputs. This module makes
its rows; it never opens a file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from merge_avg.errors import UsageError
from merge_avg.options import Series, Weight

PLACEHOLDER = "{name}"  # in the output's path, for the name of an average


def members(checkpoints: Sequence[Path], series: Series) -> dict[str, tuple[int, ...]]:
    """Return the numbers of the checkpoints that go into each average, by the average's name.

    Args:
        checkpoints: those that were chosen, the oldest first.
        series: what is asked for.

    Raises:
        UsageError: more than one kind of series is asked for, or there are too few checkpoints.
    """
    asked = [series.leave_one_out, series.prefixes, len(series.lasts) > 1]
    if sum(asked) > 1:
        what = "--leave-one-out, --prefixes and a second --last exclude each other"
        raise UsageError(what, hint="run them one after the other")
    count = len(checkpoints)
    if series.several and count < 2:
        raise UsageError("several averages need at least two checkpoints", hint="name more of them")
    everything = range(count)
    if series.leave_one_out:
        names = distinct_names(checkpoints)
        return {
            f"without-{names[left]}": tuple(i for i in everything if i != left)
            for left in everything
        }
    if series.prefixes:
        return {f"first-{size}": tuple(range(size)) for size in range(2, count + 1)}
    # A single --last is a criterion: the selection has seen to it.
    if len(series.lasts) > 1:
        for number in series.lasts:
            if not 1 <= number <= count:
                hint = "choose a smaller number for --last"
                raise UsageError(f"--last {number} of {count} checkpoints", hint=hint)
        return {
            f"last-{number}": tuple(everything[count - number :])
            for number in dict.fromkeys(series.lasts)
        }
    return {"": tuple(everything)}


def distinct_names(paths: Sequence[Path]) -> tuple[str, ...]:
    """Return a name for each path, of as many of its last parts as tell all of them apart."""
    for depth in range(1, max((len(path.parts) for path in paths), default=1) + 1):
        names = tuple("-".join(path.with_suffix("").parts[-depth:]) for path in paths)
        if len(set(names)) == len(names):
            return tuple(name.lstrip("/") for name in names)
    # The same checkpoint twice, or paths that differ in their suffix only.
    return tuple(f"{number}-{path.stem}" for number, path in enumerate(paths, 1))


def outputs(
    pattern: Path,
    groups: Mapping[str, Sequence[int]],
    count: int,
    weigh: Callable[[Sequence[int]], Sequence[Weight]],
) -> dict[Path, tuple[Weight, ...]]:
    """Return the output of each average, with a weight for every checkpoint: 0 if left out.

    Args:
        pattern: the outputs' path, in which {name} stands for the average's name.
        groups: what goes into each average.
        count: how many checkpoints there are.
        weigh: returns the weights of some checkpoints, given their numbers.

    Raises:
        UsageError: there are several averages, and no {name} in the pattern.
    """
    text = str(pattern)
    if len(groups) > 1 and PLACEHOLDER not in text:
        hint = "put {name} into it, as in -o 'avg-{name}.pt'"
        raise UsageError(f"{len(groups)} averages need as many outputs, not {text}", hint=hint)
    table: dict[Path, tuple[Weight, ...]] = {}
    for name, chosen in groups.items():
        row: list[Weight] = [0] * count
        for index, weight in zip(chosen, weigh(chosen), strict=True):
            row[index] = weight
        table[Path(text.replace(PLACEHOLDER, name) if name else text)] = tuple(row)
    return table
