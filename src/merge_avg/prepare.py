"""Everything about a merge that is known before a byte of payload is read. Without torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from merge_avg.align import Missing, align
from merge_avg.dtypes import CONVERTIBLE
from merge_avg.errors import MergeError, UsageError, named
from merge_avg.formats import safetensors, scan, torch_zip_write
from merge_avg.integers import IntPolicy
from merge_avg.layout import Layout, TensorInfo, row_major
from merge_avg.output import refuse_output
from merge_avg.plan import Plan, Unit, make_plan
from merge_avg.roles import Name, Roles, assign
from merge_avg.skeleton import Skeleton
from merge_avg.weights import Weight, Weights

# Endings that stand for a zip checkpoint, where the template does not say so already.
ZIP_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")

# Elements of a window: a float64 accumulator of this many stays in a core's cache.
_WINDOW = 1 << 17
_LEAST_WINDOW = 1 << 12
# What a worker holds for each element of its window: buffers, and temporaries of the slow paths.
_BYTES_PER_ELEMENT = 256


@dataclass(frozen=True)
class Options:
    """How to merge. The names and meanings are those of the command's options."""

    weights: Sequence[Weight] | None = None
    dtype: str | None = None
    key: str | None = None
    missing: Missing = "error"
    int_policy: IntPolicy = "error"
    state_dict: bool = False
    allow_nonfinite: bool = False
    overwrite: bool = False
    device: str = "cpu"
    max_memory: int | None = None


@dataclass(frozen=True)
class Target:
    """Elements of a unit, counted from its start, and where in the output they go.

    `place` names room in the skeleton, `at` is an offset there in bytes. Tensors that are not
    contiguous go to a contiguous place by way of the scratch file: `view` is the tensor as a view
    of the unit.
    """

    start: int
    stop: int
    place: str
    at: int
    view: TensorInfo | None = None


@dataclass(frozen=True)
class Job:
    """A merge that is ready to run."""

    output: Path
    options: Options
    weights: Weights
    roles: Roles
    plan: Plan
    skeleton: Skeleton
    targets: tuple[tuple[Target, ...], ...]  # for each unit of the plan

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """The checkpoints, the template first."""
        return self.plan.layouts

    @property
    def nbytes(self) -> int:
        """How many bytes are read: each checkpoint's weights, and what is copied."""
        units = sum(
            len(unit) * source.dtype.itemsize for unit in self.plan.units for source in unit.sources
        )
        return units + sum(record.nbytes for record, _ in self.skeleton.copies)


def prepare(
    paths: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    options: Options,
) -> Job:
    """Scans the checkpoints and plans the merge.

    Raises:
        UsageError: the options do not fit each other or the number of checkpoints.
        MergeError: a checkpoint cannot be read or does not match the others, or the output cannot
            be written.
    """
    inputs = [Path(path) for path in paths]
    weights = _weights(inputs, options)
    if options.dtype is not None and options.dtype not in CONVERTIBLE:
        hint = f"choose one of {', '.join(CONVERTIBLE)}"
        raise UsageError(f"the dtype {options.dtype!r} cannot be written", hint=hint)
    window_limit(options.max_memory)
    target = Path(output)
    layouts = [scan(path) for path in inputs]
    for path in inputs:
        if target.exists() and target.samefile(path):
            hint = "choose another output; inputs are never written to"
            raise MergeError(f"the output is the input {path}", where=target, hint=hint)
    refuse_output(target, overwrite=options.overwrite)
    roles = [assign(layout, options.key) for layout in layouts]
    aligned = align(inputs, [role.weights for role in roles], options.missing)
    plan = make_plan(layouts, aligned, options.dtype)
    skeleton, targets = _output(target, options, plan, roles[0])
    return Job(target, options, weights, roles[0], plan, skeleton, targets)


def worker_count() -> int:
    """How many threads take windows: one a core that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def window_limit(max_memory: int | None) -> int:
    """The largest window, in elements, for a budget of memory in bytes.

    Raises:
        MergeError: the budget is too small for any.
    """
    workers = worker_count()
    if max_memory is None:
        return _WINDOW
    fits = max_memory // (workers * _BYTES_PER_ELEMENT)
    if fits < _LEAST_WINDOW:
        least = workers * _LEAST_WINDOW * _BYTES_PER_ELEMENT
        hint = f"give at least --max-memory {-(-least // 1024)}KiB"
        raise MergeError("the memory budget is too small", hint=hint)
    return min(fits, _WINDOW)


def _weights(inputs: Sequence[Path], options: Options) -> Weights:
    if not inputs:
        raise UsageError("there are no checkpoints to average", hint="name at least one")
    if options.weights is None:
        return Weights.uniform(len(inputs))
    if len(options.weights) != len(inputs):
        counts = f"{len(options.weights)} weights for {len(inputs)} checkpoints"
        raise UsageError(counts, hint="give one weight a checkpoint, in the same order")
    return Weights.of(options.weights)


def _output(
    path: Path, options: Options, plan: Plan, roles: Roles
) -> tuple[Skeleton, tuple[tuple[Target, ...], ...]]:
    """The skeleton of the output, and where in it each unit goes."""
    template = plan.layouts[0]
    suffix = path.suffix.lower()
    if suffix == ".safetensors":
        return _fresh_safetensors(path, plan, roles)
    if template.archive is not None and not options.state_dict:
        averaged = {unit.storage.name for unit in plan.units}
        skeleton = torch_zip_write.rebuilt(template, plan.converted(), averaged)
        return skeleton, tuple((_in_storage(unit),) for unit in plan.units)
    if template.archive is None and suffix not in ZIP_SUFFIXES:
        hint = f"end its name in .safetensors, or in {', '.join(ZIP_SUFFIXES)}"
        raise UsageError(f"the name {path.name!r} does not say which format to write", hint=hint)
    return _fresh_zip(path, plan, roles)


def _in_storage(unit: Unit) -> Target:
    return Target(0, len(unit), unit.storage.name, unit.start * unit.dtype.itemsize)


def _short_names(path: Path, roles: Roles) -> dict[Name, str]:
    """Names as keys of the one state dict that the output holds."""
    dicts = {name.state_dict for name in roles.weights}
    if len(dicts) > 1:
        found = named(sorted(str(Name(d[:-1], str(d[-1]))) if d else "" for d in dicts), 8)
        hint = "name the one to write with --key"
        raise MergeError(f"it can hold one state dict, not {found}", where=path, hint=hint)
    return {name: name.key for name in roles.weights}


def _fresh_safetensors(
    path: Path, plan: Plan, roles: Roles
) -> tuple[Skeleton, tuple[tuple[Target, ...], ...]]:
    short = _short_names(path, roles)
    entries = [(short[name], plan.result(info), info.shape) for name, info in roles.weights.items()]
    try:
        skeleton = safetensors.fresh(entries, dict(plan.layouts[0].metadata))
    except MergeError as error:
        raise MergeError(error.what, where=path, hint=error.hint) from None
    targets = []
    for unit in plan.units:
        views = [
            (short[name], info, info.start - unit.start, info.stop - unit.start)
            for name, info in unit.members
        ]
        targets.append(
            tuple(
                Target(start, stop, name, 0, None if info.contiguous else info)
                for name, info, start, stop in views
            )
        )
    return skeleton, tuple(targets)


def _fresh_zip(
    path: Path, plan: Plan, roles: Roles
) -> tuple[Skeleton, tuple[tuple[Target, ...], ...]]:
    short = _short_names(path, roles)
    homes = {name: (i, unit) for i, unit in enumerate(plan.units) for name, _ in unit.members}
    tensors = []
    sizes: dict[str, int] = {}
    for name, info in roles.weights.items():
        dtype = plan.result(info)
        if name not in homes:  # it has no elements
            storage = f"empty {dtype.name}"
            sizes.setdefault(storage, 0)
            tensors.append((short[name], dtype, info.shape, row_major(info.shape), 0, storage))
            continue
        index, unit = homes[name]
        sizes[str(index)] = len(unit) * dtype.itemsize
        start = info.start - unit.start
        tensors.append((short[name], dtype, info.shape, info.stride, start, str(index)))
    skeleton = torch_zip_write.fresh([torch_zip_write.FreshTensor(*t) for t in tensors], sizes)
    return skeleton, tuple(
        (Target(0, len(unit), str(index), 0),) if str(index) in sizes else ()
        for index, unit in enumerate(plan.units)
    )
