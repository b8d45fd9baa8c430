"""The job: everything about a merge that is known before a byte of payload is read."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from merge_avg._version import __version__
from merge_avg.arithmetic import Weights
from merge_avg.checkpoint import CONVERTIBLE, PROVENANCE, TEMPLATE, Layout, Roles, assign
from merge_avg.errors import MergeError, UsageError, failure, named
from merge_avg.formats import scan
from merge_avg.formats.directory import shard_of
from merge_avg.io import refuse_output
from merge_avg.options import Location, Options, Outputs, Weight
from merge_avg.plan._budget import Budget, plan_budget
from merge_avg.plan._names import NameFilter, align, match
from merge_avg.plan._provenance import Hashes, write_record
from merge_avg.plan._targets import OutputLayout, lay_out
from merge_avg.plan._units import Plan, make_plan, with_base


@dataclass(frozen=True)
class OutputSpec:
    """One of the outputs of a merge: where it goes, and the weights of the checkpoints in it."""

    path: Path
    weights: Weights


@dataclass(frozen=True)
class Job:
    """A merge that is ready to run.

    Attributes:
        outputs: what is written.
        layout: of every output.
        options: how the checkpoints are merged.
        roles: of the template's tensors.
        plan: what is averaged.
        budget: threads and windows.
        notes: for the user, one sentence each.
        base: the number of the checkpoint that the others were fine-tuned from, if it is named.
        version: the version of merge-avg that the outputs name.
    """

    outputs: tuple[OutputSpec, ...]
    layout: OutputLayout
    options: Options
    roles: Roles
    plan: Plan
    budget: Budget
    notes: tuple[str, ...]
    base: int | None = None
    version: str = __version__

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """Return the checkpoints, the template first; a base that is none of them is the last."""
        return self.plan.layouts

    @property
    def averaged(self) -> tuple[int, ...]:
        """Return the numbers of the checkpoints that have a weight in some output."""
        rows = [output.weights.integers for output in self.outputs]
        return tuple(k for k in range(len(self.layouts)) if any(row[k] for row in rows))

    @property
    def kept_texts(self) -> Iterator[bytes]:
        """Yield what the outputs have of the template beside its records: pickles and metadata."""
        for layout in self.layouts[0].members or self.layouts[:1]:
            if layout is not None and layout.archive is not None and self.layout.whole:
                yield layout.archive.pickle
                yield from layout.archive.around
            metadata = () if layout is None else layout.metadata
            yield repr([pair for pair in metadata if pair[0] != PROVENANCE]).encode()

    @property
    def nbytes(self) -> int:
        """Return how many bytes are read: each checkpoint's weights, and what is copied."""
        units = sum(
            len(unit) * source.dtype.itemsize for unit in self.plan.units for source in unit.sources
        )
        return units + sum(storage.nbytes for _, storage in self.layout.copies)

    def record(
        self, output: OutputSpec, hashes: Hashes | None = None, agreement: float | None = None
    ) -> bytes:
        """Return the provenance record of an output; without hashes a draft of the same length."""
        merged = self.layouts[: self.plan.aligned.checkpoints]
        found = self.version, hashes, agreement
        single = len(self.outputs) == 1
        return write_record(merged, output.weights, self.options, *found, compared=single)


def prepare(
    paths: Sequence[Location],
    outputs: Outputs,
    options: Options,
    *,
    made_by: str | None = None,
    layouts: Mapping[Path, Layout] | None = None,
) -> Job:
    """Scan the checkpoints and plan the merge.

    Args:
        paths: the checkpoints.
        outputs: the output; or several, with the weights of the checkpoints for each.
        options: how to merge; its weights are those of a single output.
        made_by: where the output exists and is to be compared, the version that made it.
        layouts: of checkpoints that have been scanned already.

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
    if not options.agreement and (options.base is not None or options.min_agreement is not None):
        hint = "leave out --no-agreement, or --base and --min-agreement"
        raise UsageError("the agreement is asked for, and not to be measured", hint=hint)
    try:
        inputs, order = _template_first(inputs, options.template)
        if options.base is not None and _number_of(inputs, Path(options.base)) is None:
            order = [*order, None]
        ordered = {path: _ordered(weights, order, options) for path, weights in rows.items()}
        with without_collector():
            job = _prepared(inputs, ordered, options, made_by or __version__, layouts or {})
            if made_by is None:
                _refuse_outputs(job)
            return job
    except OSError as error:  # a name too long, a directory that may not be looked into
        raise failure(error) from None


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """Looks for no cycles of garbage meanwhile.

    A scan makes none, nor does importing torch, of which it would take a third and a sixth.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _prepared(
    inputs: Sequence[Path],
    rows: Mapping[Path, Weights],
    options: Options,
    version: str,
    scanned: Mapping[Path, Layout],
) -> Job:
    options = replace(options, include=[*options.include], exclude=[*options.exclude])
    found = (scanned.get(path) or scan(path) for path in inputs)
    # Only a copy of the template needs its pickle and list of records.
    layouts = [layout.source if number else layout for number, layout in enumerate(found)]
    roles = [assign(layout, options.key) for layout in layouts]
    chosen = NameFilter(tuple(options.include), tuple(options.exclude))
    aligned = align(inputs, [role.weights for role in roles], options.missing, chosen)
    plan = make_plan(layouts, aligned, options.dtype)
    base = None if options.base is None else _number_of(inputs, Path(options.base))
    notes: tuple[str, ...] = ()
    if options.base is not None and base is None:
        base = len(inputs)
        plan, notes = _based(plan, Path(options.base), roles[0], options.key)
    entries = sum(len(layout.tensors) for layout in plan.layouts)
    budget = plan_budget(
        len(plan.layouts),
        plan.itemsize,
        entries,
        options.max_memory,
        options.threads,
        len(rows),
    )
    first, *more = rows
    for path in more:
        if path.suffix != first.suffix:
            hint = "averages that are made at a time are of one format"
            raise UsageError(f"{first.name} and {path.name} end differently", hint=hint)
    layout = lay_out(
        first,
        plan,
        roles[0].weights,
        state_dict=options.state_dict,
        shard_size=options.max_shard_size,
    )
    outputs = tuple(OutputSpec(path, weights) for path, weights in rows.items())
    notes = (*_notes(layouts, options, layout), *notes)
    return Job(outputs, layout, options, roles[0], plan, budget, notes, base, version)


def _refuse_outputs(job: Job) -> None:
    """Raises MergeError where an output cannot or must not be written."""
    directory = job.layout.directory
    for path in (output.path for output in job.outputs):
        refuse_inputs(path, job.layouts)
        refuse_output(path, directory=directory, overwrite=job.options.overwrite)
        if directory and path.is_dir():
            _refuse_loss(path, job.layout)


def _based(
    plan: Plan, path: Path, template: Roles, key: str | None
) -> tuple[Plan, tuple[str, ...]]:
    """The plan with a base, and what a person should hear of that."""
    layout = scan(path).source
    ours = template.weights
    weights, note = match(plan.layouts[0].path, ours, path, assign(layout, key).weights)
    based = with_base(plan, layout, weights)
    matrices = [unit for unit in based.units if unit.is_matrix]
    number = len(plan.layouts)
    lacking = sum(unit.sources[-1].checkpoint != number for unit in matrices)
    notes = [note] if note else []
    if matrices and lacking == len(matrices):
        hint = "the base is the checkpoint that the others were fine-tuned from"
        raise MergeError("no matrix in it is one of the checkpoints'", where=path, hint=hint)
    if lacking:
        what = f"{lacking:,} of {len(matrices):,} matrices are not in it, or of another shape"
        notes.append(f"{path}: {what}; they are compared without it")
    return based, tuple(notes)


def _template_first(
    inputs: list[Path], template: int | Location | None
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
        found = _number_of(inputs, path)
        if found is None:
            return [path, *inputs], [None, *numbers]
        index = found
    order = [index, *(i for i in range(len(inputs)) if i != index)]
    return [inputs[i] for i in order], list(order)


def _ordered(weights: Sequence[Weight], order: Sequence[int | None], options: Options) -> Weights:
    """The weights in the order of the checkpoints; a template that is not averaged has none."""
    values = [0 if number is None else weights[number] for number in order]
    return Weights.of(values, normalize=options.normalize)


def _number_of(inputs: Sequence[Path], path: Path) -> int | None:
    """Which of the checkpoints a path is of."""
    if not path.exists():
        return None
    return next((i for i, one in enumerate(inputs) if one.exists() and one.samefile(path)), None)


def refuse_inputs(target: Path, layouts: Sequence[Layout]) -> None:
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


def _refuse_loss(target: Path, layout: OutputLayout) -> None:
    """Raises MergeError where replacing a directory would lose what the new one does not have."""
    found = (path for path in sorted(target.rglob("*")) if path.is_symlink() or not path.is_dir())
    names = [path.relative_to(target).as_posix() for path in found]
    lost = [name for name in names if name not in layout.files]
    if lost:
        what = f"it holds {named(lost)}, which would be lost"
        raise MergeError(what, where=target, hint="choose another output, or remove this one")
    if target.resolve() == Path.cwd():
        raise MergeError("it is the current directory", where=target, hint="choose another output")


def _notes(layouts: Sequence[Layout], options: Options, output: OutputLayout) -> tuple[str, ...]:
    """What a person should hear of beside what the names needed."""
    notes = [note for layout in layouts for note in layout.notes]
    shards = [layout for layout in layouts if not layout.members and shard_of(layout.path)]
    if shards:
        path = shards[0].path
        what = f"one of {shard_of(path)} shards; to average all of them, pass their directory"
        notes.append(f"{path} is {what}")
    if output.directory:
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
