"""Several averages over the same checkpoints: which checkpoints go into each, and its name.

A merge is a matrix of weights, outputs by inputs, over one reading of the inputs. Here its rows are
made; nothing here knows of files' contents.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from merge_avg.arithmetic import Weight
from merge_avg.errors import UsageError

PLACEHOLDER = "{name}"


@dataclass(frozen=True)
class Series:
    """Which averages are asked for.

    Attributes:
        lasts: of the last so many checkpoints, for each number.
        leave_one_out: one for each checkpoint, of all others.
        prefixes: of the first two, of the first three, and so on.
    """

    lasts: tuple[int, ...] = ()
    leave_one_out: bool = False
    prefixes: bool = False

    @property
    def several(self) -> bool:
        """Whether there is more than one output."""
        return self.leave_one_out or self.prefixes or len(self.lasts) > 1


def members(checkpoints: Sequence[Path], series: Series) -> dict[str, tuple[int, ...]]:
    """The numbers of the checkpoints that go into each average, by its name.

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
        raise UsageError("several averages need two checkpoints at least", hint="name more of them")
    everything = range(count)
    if series.leave_one_out:
        names = distinct_names(checkpoints)
        return {
            f"without-{names[left]}": tuple(i for i in everything if i != left)
            for left in everything
        }
    if series.prefixes:
        return {f"first-{size}": tuple(range(size)) for size in range(2, count + 1)}
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
    """A name for each path, from as many of its last parts as it takes to tell them apart."""
    for depth in range(1, max((len(path.parts) for path in paths), default=1) + 1):
        names = tuple("-".join(path.with_suffix("").parts[-depth:]) for path in paths)
        if len(set(names)) == len(names):
            return tuple(name.lstrip("/") for name in names)
    return tuple(f"{number}-{path.stem}" for number, path in enumerate(paths, 1))


def outputs(
    pattern: Path,
    groups: Mapping[str, Sequence[int]],
    count: int,
    weigh: Callable[[Sequence[int]], Sequence[Weight]],
) -> dict[Path, tuple[Weight, ...]]:
    """The output of each average, with a weight for every checkpoint: 0 for those left out.

    Args:
        pattern: the outputs' path, in which {name} stands for the average's name.
        groups: what goes into each average.
        count: how many checkpoints there are.
        weigh: the weights of some checkpoints.

    Raises:
        UsageError: several averages, and no {name} in the pattern; or a name, and one average.
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
