"""Everything about a merge that is known before a byte of payload is read. Without torch."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from merge_avg._version import __version__
from merge_avg.arithmetic import Weight, Weights
from merge_avg.checkpoint import CONVERTIBLE, MARK, TEMPLATE, Layout, Roles, Skeleton, assign
from merge_avg.errors import MergeError, UsageError, failure, named
from merge_avg.formats import scan
from merge_avg.formats.directory import shard_of
from merge_avg.io import refuse_output
from merge_avg.options import IntPolicy, Missing
from merge_avg.plan._budget import Budget, plan_budget
from merge_avg.plan._names import NameFilter, align, match
from merge_avg.plan._targets import Draft, make_draft
from merge_avg.plan._units import Plan, make_plan, with_base

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
    base: str | os.PathLike[str] | None = None
    agreement: bool = True
    hashes: bool = True


@dataclass(frozen=True)
class Average:
    """One of the averages that a merge makes: where it goes, and the weights of the checkpoints."""

    output: Path
    weights: Weights
    draft: Draft


@dataclass(frozen=True)
class Hashes:
    """What was read, as sums of the XXH3 of its chunks modulo 2^128.

    Attributes:
        read: of each checkpoint: its weights, in the order of the job's layouts.
        kept: of what the outputs have from the template beside the weights that were averaged.
    """

    read: tuple[int, ...]
    kept: int


@dataclass(frozen=True)
class Job:
    """A merge that is ready to run.

    `base` is the number of the checkpoint that options call so, and `version` the one of merge-avg
    that the outputs name.
    """

    averages: tuple[Average, ...]
    options: Options
    roles: Roles
    plan: Plan
    budget: Budget
    notes: tuple[str, ...]
    base: int | None = None
    version: str = __version__

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """The checkpoints, the template first; a base that is none of them is the last."""
        return self.plan.layouts

    @property
    def kept_texts(self) -> Iterator[bytes]:
        """What the outputs have of the template beside its records: pickles and metadata."""
        for layout in self.layouts[0].members or self.layouts[:1]:
            if layout is not None and layout.archive is not None and self.draft.whole:
                yield layout.archive.pickle
                yield from layout.archive.around
            metadata = () if layout is None else layout.metadata
            yield repr([pair for pair in metadata if pair[0] != MARK]).encode()

    @property
    def averaged(self) -> tuple[int, ...]:
        """The numbers of the checkpoints that some average is of."""
        rows = [average.weights.integers for average in self.averages]
        return tuple(k for k in range(len(self.layouts)) if any(row[k] for row in rows))

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
    *,
    made_by: str | None = None,
) -> Job:
    """Scans the checkpoints and plans the merge.

    Args:
        paths: the checkpoints.
        outputs: the output; or several, with the weights of the checkpoints for each.
        options: how to merge; its weights are those of a single output.
        made_by: where the output is there and to be compared, the version that made it.

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
            job = _prepared(inputs, ordered, options, made_by or __version__)
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
    inputs: Sequence[Path], rows: Mapping[Path, Weights], options: Options, version: str
) -> Job:
    template, *others = inputs
    layouts = [scan(template), *(scan(path).source for path in others)]
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
    averages = []
    for path, weights in rows.items():
        draft = make_draft(
            path,
            plan,
            roles[0].weights,
            state_dict=options.state_dict,
            shard_size=options.max_shard_size,
            mark=make_mark(layouts, weights, options, version, compared=len(rows) == 1),
        )
        averages.append(Average(path, weights, draft))
        if path.suffix != averages[0].output.suffix:
            hint = "averages that are made at a time are of one format"
            names = f"{averages[0].output.name} and {path.name}"
            raise UsageError(f"{names} end differently", hint=hint)
    notes = (*_notes(layouts, options, draft), *notes)
    return Job(tuple(averages), options, roles[0], plan, budget, notes, base, version)


def _refuse_outputs(job: Job) -> None:
    """Raises MergeError where an output cannot or must not be written."""
    for average in job.averages:
        path, directory = average.output, average.draft.directory
        _refuse_inputs(path, job.layouts)
        refuse_output(path, directory=directory, overwrite=job.options.overwrite)
        if directory and path.is_dir():
            _refuse_loss(path, average.draft)


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


def make_mark(
    layouts: Sequence[Layout],
    weights: Weights,
    options: Options,
    version: str = __version__,
    hashes: Hashes | None = None,
    agreement: float | None = None,
    *,
    compared: bool = True,
) -> str:
    """What an output says about how it was made, as JSON; the same for the same inputs.

    Hashes and agreement are known only after the reading. Until then, zeros of the same length
    stand for them, so that the output can be laid out before. Inputs are named from the deepest
    directory that holds all of them: moving it changes nothing.

    Args:
        layouts: the checkpoints, the template first.
        weights: of the checkpoints. One with the weight zero is named only where it had a say: as
            the template, or in what every checkpoint has.
        options: how they are merged.
        version: of merge-avg.
        hashes: of what was read of each.
        agreement: the mean cosine, if it was measured.
        compared: whether it is recorded; of several averages it is not that of each.
    """
    all_named = options.missing != "error"
    numbers = [k for k in range(len(layouts)) if all_named or weights.integers[k]]
    places = {k: Path(os.path.abspath(layouts[k].path)) for k in {0, *numbers}}  # noqa: PTH100 - links stay
    root = os.path.commonpath([place.parent for place in places.values()])
    names = {k: place.relative_to(root).as_posix() for k, place in places.items()}

    def digest(value: int) -> str | None:
        return f"{value:032x}" if options.hashes else None

    inputs = [
        {
            "name": names[k],
            "bytes": layouts[k].nbytes,
            "weight": f"{weights.integers[k]}/{weights.total}",
            # How much is read of what has no weight depends on what else is made of it.
            "hash": digest(hashes.read[k] if hashes else 0) if weights.integers[k] else None,
        }
        for k in numbers
    ]
    template = {
        "name": names[0],
        "bytes": layouts[0].nbytes,
        "hash": digest(hashes.kept if hashes else 0),
    }
    cosine = "n/a      " if agreement is None and hashes else f"{agreement or 0:+.6f}"
    return json.dumps(
        {
            "merge_avg": version,
            "inputs": sorted(inputs, key=lambda entry: str(entry["name"])),
            "template": template,
            "agreement": cosine if options.agreement and compared else None,
            **{name: getattr(options, name) for name in RECORDED},
            "include": list(options.include),
            "exclude": list(options.exclude),
        }
    )


# The options that decide which bytes come out; --include and --exclude too.
RECORDED = tuple(
    "normalize dtype key missing int_policy state_dict allow_nonfinite max_shard_size".split()
)


def marked(
    job: Job, average: Average, hashes: Hashes, agreement: float | None
) -> Mapping[str, Skeleton]:
    """The skeletons of an output once more, with what it says about itself now complete."""
    weights, options = average.weights, job.options
    merged = job.layouts[: job.plan.aligned.checkpoints]
    single = len(job.averages) == 1
    return make_draft(
        average.output,
        job.plan,
        job.roles.weights,
        state_dict=options.state_dict,
        shard_size=options.max_shard_size,
        mark=make_mark(merged, weights, options, job.version, hashes, agreement, compared=single),
    ).files


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


def refuse_report(path: Path, job: Job, *, dry_run: bool = False) -> None:
    """Refuses a page about a merge that cannot or must not be written, before the merge.

    Raises:
        UsageError: its name is none of a page, or is an output's; or the merge is not run.
        MergeError: matplotlib is not installed, it is an input or a part of one, it exists and may
            not be overwritten, or there is no such directory.
    """
    if dry_run:
        raise UsageError("a dry run has no results for a page", hint="leave out --report")
    if path.suffix.lower() not in (".html", ".htm"):
        hint = "give it a name such as report.html"
        raise UsageError(f"the report {path} is a page and has another ending", hint=hint)
    for average in job.averages:
        if path.resolve().is_relative_to(average.output.resolve()):
            hint = "choose another name for one of them"
            raise UsageError(f"the report {path} is the output, or lies in it", hint=hint)
    if importlib.util.find_spec("matplotlib") is None:
        hint = "pip install 'merge-avg[report]'"
        raise MergeError("a report needs matplotlib, which is not installed", hint=hint)
    _refuse_inputs(path, job.layouts)
    refuse_output(path, directory=False, overwrite=job.options.overwrite)


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
