"""Finding what has a mean only together: products of factors, and codes with their scales."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from merge_avg.arithmetic import Weights
from merge_avg.checkpoint import BY_NAME, TEMPLATE, Composite, DType, Layout, Name, TensorInfo
from merge_avg.errors import UsageError
from merge_avg.options import Options
from merge_avg.plan._alignment import is_chosen, match

Tensors = Mapping[Name, TensorInfo]


@dataclass(frozen=True)
class Together:
    """The composites of a merge, and the weights of each checkpoint that have a mean alone."""

    left: list[dict[Name, TensorInfo]]
    composites: tuple[Composite, ...] = ()
    texts: Mapping[str, bytes] = field(default_factory=dict)  # see `Plan`
    metadata: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def find_composites(
    inputs: Sequence[Path],
    layouts: Sequence[Layout],
    weights: list[dict[Name, TensorInfo]],
    rows: Sequence[Weights],
    options: Options,
    *,
    folder: bool,
) -> Together:
    """Return what is averaged only together; each output has a row of weights.

    An output may be a `folder`: its name has no ending of a file.
    """
    counted = [k for k in range(len(inputs)) if any(row.integers[k] for row in rows)]
    found = _adapters(
        inputs, layouts, Together(weights), counted, options, len(rows), folder=folder
    )
    return _scaled(inputs, layouts, found, counted, options, len(rows))


def _adapters(
    inputs: Sequence[Path],
    layouts: Sequence[Layout],
    so_far: Together,
    counted: Sequence[int],
    options: Options,
    outputs: int,
    *,
    folder: bool,
) -> Together:
    """Add adapters, if their products are to be averaged."""
    if options.lora == "factors":
        return so_far
    from merge_avg.adapters import find

    if options.weights_for:
        hint = "leave out --weights-for, or use --lora factors"
        raise UsageError("rules by name are for tensors, not for products of factors", hint=hint)
    if options.base is not None:
        hint = "leave out --base: what adapters do is a change of it already"
        raise UsageError("adapters are not compared with a base", hint=hint)
    if outputs > 1:  # each may have another rank
        hint = "make one average at a time, or use --lora factors"
        raise UsageError("the products of adapters are of a single average", hint=hint)
    columns = _columns(inputs, so_far.left)
    patterns = options.include, options.exclude
    chosen = [{n: i for n, i in one.items() if is_chosen(n, *patterns)} for one in columns]
    rank = None if options.lora == "exact" else int(options.lora.partition(":")[2])
    kept = {name: info for name, info in columns[0].items() if name not in chosen[0]}
    about = counted, rank, _asked(options), kept
    found = find(layouts, chosen, *about, folder=folder and bool(layouts[0].members))
    left = _without(so_far.left, found.products, columns)
    return Together(left, found.products, found.texts, found.metadata, found.notes)


def _scaled(
    inputs: Sequence[Path],
    layouts: Sequence[Layout],
    so_far: Together,
    counted: Sequence[int],
    options: Options,
    outputs: int,
) -> Together:
    """Add tensors that are codes with scales."""
    # Few checkpoints have tensors of bytes: most merges need not import what looks at them.
    tables = {id(one): one for one in so_far.left}.values()
    if not any(info.dtype.itemsize == 1 for one in tables for info in one.values()):
        return so_far
    from merge_avg.scaled import find, may_have, refuse_scaled

    if not may_have(so_far.left[0]):
        for number in counted:
            refuse_scaled(layouts[number], so_far.left[number], layouts[0].path)
        return so_far
    columns = _columns(inputs, so_far.left)
    found = find(
        layouts,
        columns,
        counted,
        lambda name: is_chosen(name, options.include, options.exclude),
        _asked(options),
        outputs,
        allow_nonfinite=options.allow_nonfinite,
    )
    if found.tensors and options.weights_for:
        hint = "leave out --weights-for, or average the checkpoints before you quantise them"
        raise UsageError("rules by name are not for tensors with scales", hint=hint)
    notes = found.notes
    if found.tensors and options.base is not None:
        notes = (*notes, f"tensors with scales are not compared with {options.base}")
    return Together(
        _without(so_far.left, found.tensors, columns) if found.tensors else so_far.left,
        (*so_far.composites, *found.tensors),
        {**so_far.texts, **found.texts},
        so_far.metadata,
        (*so_far.notes, *notes),
    )


def _asked(options: Options) -> DType | None:
    """Return the dtype that is asked for, if one is."""
    return None if options.dtype in (None, TEMPLATE) else BY_NAME[str(options.dtype)]


def _columns(inputs: Sequence[Path], weights: Sequence[Tensors]) -> list[Tensors]:
    """Return the weights of each checkpoint by the template's names."""
    first = weights[0]
    pairs = zip(inputs[1:], weights[1:], strict=True)
    others = (first if w is first else match(inputs[0], first, path, w)[0] for path, w in pairs)
    return [first, *others]


def _without(
    weights: Sequence[Tensors], composites: Sequence[Composite], columns: Sequence[Tensors]
) -> list[dict[Name, TensorInfo]]:
    """Return the weights of each checkpoint without those that composites consist of."""
    left: list[dict[Name, TensorInfo]] = []
    named = {name for one in composites for name in one.consumed}
    done: dict[int, dict[Name, TensorInfo]] = {}  # those of a run most often share their tensors
    for k, some in enumerate(weights):
        if id(some) not in done:
            gone = {columns[k][name].path for name in named if name in columns[k]}
            rest = {n: i for n, i in some.items() if i.path not in gone}
            done[id(some)] = rest
        left.append(done[id(some)])
    return left
