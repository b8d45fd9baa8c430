"""Several averages of the same checkpoints: which go into each, and what it is called."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from merge_avg.errors import UsageError
from merge_avg.options import Series, Weight


def members(
    checkpoints: Sequence[Path],
    series: Series,
    order: Sequence[int] = (),
    steps: Sequence[int] = (),
) -> dict[str, tuple[int, ...]]:
    """Return the numbers of the checkpoints in each average, by its name.

    They come in an `order`, which is that of the checkpoints or has the oldest first; and they have
    `steps`, if these are known and differ.
    """
    count = len(checkpoints)
    if series.several and count < 2:
        raise UsageError("several averages need at least two checkpoints", hint="name more of them")
    everything = tuple(order or range(count))
    if series.leave_one_out:
        names = enumerate(distinct_names(checkpoints))
        return {f"without-{name}": tuple(k for k in everything if k != i) for i, name in names}
    if series.prefixes:
        return {f"first-{size}": everything[:size] for size in range(2, count + 1)}
    if series.sliding is not None:
        size, stride = series.sliding
        if size > count:
            hint = "choose a smaller window"
            raise UsageError(f"--sliding {size} of {count} checkpoints", hint=hint)
        # Named by the last step of each, as is a checkpoint that it may stand for.
        known = [f"step-{step}" for step in steps] or distinct_names(checkpoints)
        ends = range(size, count + 1, stride)
        return {known[everything[end - 1]]: everything[end - size : end] for end in ends}
    # A single --last is a criterion: the selection has seen to it.
    if len(series.lasts) < 2:
        return {"": everything}
    for number in series.lasts:
        if not 1 <= number <= count:
            hint = "choose a smaller number for --last"
            raise UsageError(f"--last {number} of {count} checkpoints", hint=hint)
    return {f"last-{number}": everything[-number:] for number in series.lasts}


def distinct_names(paths: Sequence[Path]) -> tuple[str, ...]:
    """Return a name for each path, of as many of its last parts as tell all of them apart."""
    paths = [path if path.name.strip(".") else path.resolve() for path in paths]  # of "." and ".."
    for depth in range(1, max((len(path.parts) for path in paths), default=1) + 1):
        parts = ([*path.parts[:-1], path.stem][-depth:] for path in paths)
        # A root, and the drive before it, do not belong to a name.
        roots = {path.anchor for path in paths}
        names = tuple("-".join("" if one in roots else one for one in part) for part in parts)
        if len(set(names)) == len(names):
            return names
    # The same checkpoint twice, or paths that differ in their suffix only.
    return tuple(f"{number}-{path.stem}" for number, path in enumerate(paths, 1))


def outputs(
    pattern: Path,
    groups: Mapping[str, Sequence[int]],
    count: int,
    weigh: Callable[[Sequence[int]], Sequence[Weight]],
) -> dict[Path, tuple[Weight, ...]]:
    """Return each output, with `count` weights: those that `weigh` gives to a group, and zeros."""
    if len(groups) > 1 and "{name}" not in str(pattern):
        hint = "put {name} into it, as in avg-{name}.pt"
        raise UsageError(f"{len(groups)} averages need as many outputs, not {pattern}", hint=hint)
    table: dict[Path, tuple[Weight, ...]] = {}
    for name, chosen in groups.items():
        weights = dict(zip(chosen, weigh(chosen), strict=True))
        # Without a series the average has no name, and the path is taken as it is.
        path = Path(str(pattern).replace("{name}", name)) if name else pattern
        table[path] = tuple(weights.get(index, 0) for index in range(count))
    return table
