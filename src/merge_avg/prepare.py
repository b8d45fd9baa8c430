"""Everything about a merge that is known before a byte of payload is read. Without torch."""

from __future__ import annotations

import contextlib
import gc
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from merge_avg import __version__
from merge_avg.align import Chosen, align
from merge_avg.budget import Budget, plan_budget
from merge_avg.draft import Draft, make_draft
from merge_avg.dtypes import CONVERTIBLE, TEMPLATE
from merge_avg.errors import MergeError, UsageError, failure, named
from merge_avg.formats.directory import shard_of
from merge_avg.layout import Layout
from merge_avg.output import refuse_output
from merge_avg.plan import Plan, make_plan
from merge_avg.policies import IntPolicy, Missing
from merge_avg.roles import Roles, assign
from merge_avg.scan import scan
from merge_avg.weights import Weight, Weights

# One output, or several with the weights of the checkpoints for each.
Outputs = str | os.PathLike[str] | Mapping[str, Sequence[Weight]] | Mapping[Path, Sequence[Weight]]


@dataclass(frozen=True)
class Options:
    """How to merge. The names and meanings are those of the command's options."""

    weights: Sequence[Weight] | None = None
    normalize: bool = True
    dtype: str | None = None
    key: str | None = None
    missing: Missing = "error"
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    template: int | str | os.PathLike[str] | None = None
    int_policy: IntPolicy = "error"
    state_dict: bool = False
    allow_nonfinite: bool = False
    overwrite: bool = False
    device: str = "cpu"
    threads: int | None = None
    max_memory: int | None = None
    max_shard_size: int | None = None
    min_agreement: float | None = None


@dataclass(frozen=True)
class Average:
    """One of the averages that a merge makes: where it goes, and the weights of the checkpoints."""

    output: Path
    weights: Weights
    draft: Draft


@dataclass(frozen=True)
class Job:
    """A merge that is ready to run."""

    averages: tuple[Average, ...]
    options: Options
    roles: Roles
    plan: Plan
    budget: Budget
    notes: tuple[str, ...]

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """The checkpoints, the template first."""
        return self.plan.layouts

    @property
    def draft(self) -> Draft:
        """What the outputs have in common: all but what each says about itself."""
        return self.averages[0].draft

    @property
    def nbytes(self) -> int:
        """How many bytes are read: each checkpoint's weights, and what is copied."""
        units = sum(
            len(unit) * source.dtype.itemsize for unit in self.plan.units for source in unit.sources
        )
        return units + sum(storage.nbytes for _, storage in self.draft.copies)


def prepare(
    paths: Sequence[str | os.PathLike[str]],
    outputs: Outputs,
    options: Options,
) -> Job:
    """Scans the checkpoints and plans the merge.

    Args:
        paths: the checkpoints.
        outputs: the output; or several, with the weights of the checkpoints for each.
        options: how to merge; its weights are those of a single output.

    Raises:
        UsageError: the options do not fit each other or the number of checkpoints.
        MergeError: a checkpoint cannot be read or does not match the others, or the output cannot
            be written.
    """
    inputs = [Path(path) for path in paths]
    if isinstance(outputs, Mapping):
        if options.weights is not None:
            raise UsageError("the weights are given twice", hint="give them with the outputs only")
        asked = {Path(path): weights for path, weights in outputs.items()}
    else:
        asked = {Path(outputs): options.weights or [1] * len(inputs)}
    rows = {path: _checked(inputs, weights, options) for path, weights in asked.items()}
    if options.dtype is not None and options.dtype not in (*CONVERTIBLE, TEMPLATE):
        hint = f"choose one of {', '.join((*CONVERTIBLE, TEMPLATE))}"
        raise UsageError(f"the dtype {options.dtype!r} cannot be written", hint=hint)
    try:
        inputs, order = _template_first(inputs, options.template)
        ordered = {path: _ordered(weights, order, options) for path, weights in rows.items()}
        with _without_collector():
            return _prepared(inputs, ordered, options)
    except OSError as error:  # a name too long, a directory that may not be looked into
        raise failure(error) from None


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
    """A scan makes no cycles, but looking for such garbage would take a third of its time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _prepared(inputs: Sequence[Path], rows: Mapping[Path, Weights], options: Options) -> Job:
    layouts = [scan(path) for path in inputs]
    roles = [assign(layout, options.key) for layout in layouts]
    chosen = Chosen(tuple(options.include), tuple(options.exclude))
    aligned = align(inputs, [role.weights for role in roles], options.missing, chosen)
    plan = make_plan(layouts, aligned, options.dtype)
    entries = sum(len(layout.tensors) for layout in layouts)
    budget = plan_budget(
        len(inputs), plan.itemsize, entries, options.max_memory, options.threads, len(rows)
    )
    averages = []
    for path, weights in rows.items():
        draft = make_draft(
            path,
            plan,
            roles[0].weights,
            state_dict=options.state_dict,
            shard_size=options.max_shard_size,
            mark=make_mark(layouts, weights, options),
        )
        averages.append(Average(path, weights, draft))
        if path.suffix != averages[0].output.suffix:
            hint = "averages that are made at a time are of one format"
            names = f"{averages[0].output.name} and {path.name}"
            raise UsageError(f"{names} end differently", hint=hint)
        _refuse_inputs(path, layouts)
        refuse_output(path, directory=draft.directory, overwrite=options.overwrite)
        if draft.directory and path.is_dir():
            _refuse_loss(path, draft)
    notes = _notes(layouts, options, draft)
    return Job(tuple(averages), options, roles[0], plan, budget, notes)


def _template_first(
    inputs: list[Path], template: int | str | os.PathLike[str] | None
) -> tuple[list[Path], list[int | None]]:
    """The checkpoints with the template in front, and the number that each had, if it had one."""
    numbers: list[int | None] = list(range(len(inputs)))
    if template is None:
        return inputs, numbers
    text = str(template)
    path = Path(template) if not isinstance(template, int) else None
    if text.isdecimal() and not (path is not None and path.exists()):
        index = int(text) - 1
        if not 0 <= index < len(inputs):
            hint = f"give a number from 1 to {len(inputs)}, or the path of a checkpoint"
            raise UsageError(f"there is no checkpoint number {text}", hint=hint)
    else:
        path = Path(text)
        index = next((i for i, one in enumerate(inputs) if _is_same(one, path)), -1)
        if index < 0:
            return [path, *inputs], [None, *numbers]
    order = [index, *(i for i in range(len(inputs)) if i != index)]
    return [inputs[i] for i in order], list(order)


def _ordered(weights: Sequence[Weight], order: Sequence[int | None], options: Options) -> Weights:
    """The weights in the order of the checkpoints; a template that is not averaged has none."""
    values = [0 if number is None else weights[number] for number in order]
    return Weights.of(values, normalize=options.normalize)


def _is_same(a: Path, b: Path) -> bool:
    return a.exists() and b.exists() and a.samefile(b)


def make_mark(layouts: Sequence[Layout], weights: Weights, options: Options) -> str:
    """What an output says about how it was made, as JSON; the same for the same inputs."""
    shares = zip(layouts, weights.integers, strict=True)
    inputs = [(one.path.name, one.nbytes, f"{w}/{weights.total}") for one, w in shares if w]
    return json.dumps(
        {
            "merge_avg": __version__,
            "inputs": [
                {"name": name, "bytes": nbytes, "weight": weight}
                for name, nbytes, weight in sorted(inputs)
            ],
            "template": layouts[0].path.name,
            "dtype": options.dtype,
            "key": options.key,
            "missing": options.missing,
            "include": list(options.include),
            "exclude": list(options.exclude),
            "int_policy": options.int_policy,
        }
    )


def _refuse_inputs(target: Path, layouts: Sequence[Layout]) -> None:
    """Raises MergeError where the output is an input, lies within one, or holds one."""
    for layout in layouts:
        path = layout.path
        hint = "choose another output; inputs are never written to"
        if target.exists() and target.samefile(path):
            raise MergeError(f"the output is the input {path}", where=target, hint=hint)
        if path.is_dir() and target.resolve().is_relative_to(path.resolve()):
            raise MergeError(f"the output lies in the input {path}", where=target, hint=hint)
        inside = (path, *(file.path for file in layout.files))
        if target.is_dir() and any(
            one.resolve().is_relative_to(target.resolve()) for one in inside
        ):
            raise MergeError(f"the output holds the input {path}", where=target, hint=hint)
        if target.is_file():
            for file in layout.files:
                if target.samefile(file.path):
                    what = f"the output is a part of the input {path}"
                    raise MergeError(what, where=target, hint=hint)


def _refuse_loss(target: Path, draft: Draft) -> None:
    """Raises MergeError where replacing a directory would lose what the new one does not have."""
    found = (path for path in sorted(target.rglob("*")) if path.is_symlink() or not path.is_dir())
    names = [path.relative_to(target).as_posix() for path in found]
    lost = [name for name in names if name not in draft.files]
    if lost:
        what = f"it holds {named(lost)}, which would be lost"
        raise MergeError(what, where=target, hint="choose another output, or remove this one")
    if target.resolve() == Path.cwd():
        raise MergeError("it is the current directory", where=target, hint="choose another output")


def _notes(layouts: Sequence[Layout], options: Options, draft: Draft) -> tuple[str, ...]:
    """What a person should hear of beside what the names needed."""
    notes = [note for layout in layouts for note in layout.notes]
    shards = [layout for layout in layouts if not layout.members and shard_of(layout.path)]
    if shards:
        path = shards[0].path
        what = f"one of {shard_of(path)} shards; to average all of them, pass their directory"
        notes.append(f"{path} is {what}")
    if draft.directory:
        for name in ("config.json", "adapter_config.json"):
            found = [layout.path / name for layout in layouts]
            texts = {path.read_bytes() for path in found if path.is_file()}
            if len(texts) > 1:
                notes.append(f"{name} differs between the checkpoints; the template's is kept")
            if texts and options.dtype not in (None, TEMPLATE):
                notes.append(f"{name} is the template's, and may still name another dtype")
    return tuple(notes)


def _checked(
    inputs: Sequence[Path], weights: Sequence[Weight], options: Options
) -> Sequence[Weight]:
    if not inputs:
        raise UsageError("there are no checkpoints to average", hint="name at least one")
    if len(weights) != len(inputs):
        counts = f"{len(weights)} weights for {len(inputs)} checkpoints"
        raise UsageError(counts, hint="give one weight a checkpoint, in the same order")
    Weights.of(weights, normalize=options.normalize)
    return weights
