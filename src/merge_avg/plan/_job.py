"""The job: the inputs, the plan, the outputs and the budget of a merge, ready to run."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from merge_avg._version import __version__
from merge_avg.arithmetic import Weights
from merge_avg.checkpoint import (
    CONVERTIBLE,
    PROVENANCE,
    TEMPLATE,
    Layout,
    Name,
    Roles,
    TensorInfo,
    assign,
    parts_note,
)
from merge_avg.errors import MergeError, UsageError, failure, named
from merge_avg.formats import format_for, scan
from merge_avg.formats.beside import tracker_notes
from merge_avg.io import Site, refuse_loss, refuse_output, without_collector
from merge_avg.options import DOUBTS, Location, Options, Outputs, Weight, parse_lora, parse_part
from merge_avg.plan._alignment import align, match
from merge_avg.plan._budget import MOST_THREADS, Budget, plan_budget
from merge_avg.plan._composites import find_composites
from merge_avg.plan._masters import roles_of
from merge_avg.plan._notes import notes_of, stale_notes
from merge_avg.plan._provenance import Hashes, Record, is_made, write_record
from merge_avg.plan._rules import Rule, read_rules, ruled
from merge_avg.plan._targets import OutputLayout, lay_out
from merge_avg.plan._training import dropped_keys, serving, training_state
from merge_avg.plan._units import Plan, Unit, make_plan, with_base

_LAST_DIGITS = 2e-6  # of a recorded agreement, which has six places


@dataclass(frozen=True)
class OutputSpec:
    """One output of a merge: where it goes, and the weights of the checkpoints in it."""

    path: Path
    weights: Weights


@dataclass(frozen=True, repr=False)
class Job:
    """A merge that is ready to run."""

    outputs: tuple[OutputSpec, ...]
    layout: OutputLayout  # of every output
    options: Options
    roles: Roles  # of the template's tensors
    plan: Plan
    budget: Budget
    notes: tuple[str, ...]  # for the user, one sentence each
    base: int | None  # the number of the checkpoint that the others were fine-tuned from
    made_by: Record | None  # the record of an output that exists and is compared with the job's
    rules: tuple[Rule, ...] = ()  # of units that have weights of their own

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """Return the checkpoints, the template first and a base that is not one of them last."""
        return self.plan.layouts

    @property
    def averaged(self) -> tuple[int, ...]:
        """Return the numbers of the checkpoints that have a weight in some output."""
        rows = [weights.integers for weights in self.all_weights]
        return tuple(k for k in range(len(self.layouts)) if any(row[k] for row in rows))

    @property
    def all_weights(self) -> list[Weights]:
        """Return the weights of each output, and of each rule."""
        outputs = [output.weights for output in self.outputs]
        return outputs + [rule.weights for rule in self.rules]

    def weights(self, unit: Unit) -> list[Weights]:
        """Return the weights of a unit in each output."""
        if unit.rule >= 0:
            return [self.rules[unit.rule].weights]
        return [output.weights for output in self.outputs]

    @property
    def kept_texts(self) -> Iterator[bytes]:
        """Yield what the outputs have of the template beside its records: pickles and metadata."""
        # Hashed, like the bytes that are copied, so that `verify` can tell a template that changed
        # from an output that did.
        for number, layout in enumerate(self.layouts[0].members or self.layouts[:1]):
            if number in self.layout.left_out:
                continue
            if layout is not None and layout.archive is not None and self.layout.whole:
                yield layout.archive.pickle
                yield from layout.archive.around
            metadata = () if layout is None else layout.metadata
            yield repr([pair for pair in metadata if pair[0] != PROVENANCE]).encode()

    @property
    def nbytes(self) -> int:
        """Return the number of bytes to read: each checkpoint's weights, and what is copied."""
        units = sum(unit.nbytes for unit in self.plan.units)
        sources = (some for one in self.plan.composites for some in one.sources)
        units += sum(info.numel * info.dtype.itemsize for some in sources for info in some)
        return units + sum(storage.nbytes for _, storage in self.layout.copies)

    @property
    def made(self) -> bool:
        """Return whether this is a part of what is there already, made of the same inputs."""
        if self.options.part is None:
            return False
        return all(is_made(one.path, self.layouts, self.record(one)) for one in self.outputs)

    def record(
        self, output: OutputSpec, hashes: Hashes | None = None, agreement: float | None = None
    ) -> bytes:
        """Return the provenance record of an output; without hashes a draft of the same length.

        The agreement of an output that exists is the recorded one, unless they differ: how sums are
        rounded, and so perhaps the last digit, depends on the machine.
        """
        merged = self.layouts[: self.plan.aligned.checkpoints]  # without a base
        # Records of files know it by its older name, `state_dict`.
        only = self.options.weights_only and self.layout.directory
        version = __version__ if self.made_by is None else self.made_by.version
        recorded = None if self.made_by is None else self.made_by.agreement
        if agreement is not None and recorded is not None:
            agreement = recorded if abs(agreement - recorded) < _LAST_DIGITS else agreement
        made = merged, output.weights, replace(self.options, weights_only=only), version
        rules = [(rule.pattern, rule.weights) for rule in self.rules]
        return write_record(*made, hashes, agreement, rules, compared=len(self.outputs) == 1)


def prepare(
    paths: Sequence[Location],
    outputs: Outputs,
    options: Options,
    layouts: Mapping[Path, Layout] | None = None,
    sources: Mapping[Path, Layout] | None = None,
    *,
    made_by: Record | None = None,
) -> Job:
    """Scan the checkpoints and plan the merge.

    The options' weights are those of a single output; several come with weights of their own. Where
    the output exists and is to be compared, `made_by` is its record. Checkpoints that have been
    scanned already are not scanned again: `layouts` has them, or `sources` those that may not be
    the template.
    """
    inputs = [Path(path) for path in paths]
    asked = _asked(inputs, outputs, options)
    refuse_values(options)
    if made_by is None and (options.weights_only or options.state_dict):
        options = replace(options, weights_only=True, state_dict=True)
    try:
        places = _template_first(inputs, options.template)
        inputs, order = [path for path, _ in places], [number for _, number in places]
        if options.base is not None and _number_of(inputs, Path(options.base)) is None:
            order.append(None)
        # A template or a base that is not one of the inputs has the weight zero.
        specs = []
        for path, row in asked.items():
            numbers = [0 if k is None else row[k] for k in order]
            specs.append(OutputSpec(path, Weights.of(numbers, normalize=options.normalize)))
        given = options.weights_for, order, len(paths)
        rules = read_rules(*given, normalize=options.normalize)
        if rules and len(specs) > 1:
            hint = "make one average, or leave out --weights-for"
            raise UsageError("rules by name are of a single average", hint=hint)
        with without_collector():
            scanned = layouts or {}, sources or {}
            job = _prepared(inputs, tuple(specs), rules, options, made_by, *scanned)
            directory = job.layout.directory
            # An output to compare with exists, and is not written.
            for path in asked if made_by is None else ():
                refuse_inputs(path, job.layouts)
                # It may be all but finished, or made of parts that came before this one.
                if options.shared and (Site(path).there or job.made):
                    continue
                refuse_output(path, directory=directory, overwrite=options.overwrite)
                if directory and path.is_dir():
                    refuse_loss(path, job.layout.files)
            return job
    except OSError as error:  # a name too long, a directory that may not be looked into
        raise failure(error) from None


def refuse_values(options: Options) -> None:
    """Raise UsageError for values that are out of range, or options that exclude each other."""
    if options.dtype is not None and options.dtype not in (*CONVERTIBLE, TEMPLATE):
        hint = f"choose one of {', '.join((*CONVERTIBLE, TEMPLATE))}"
        raise UsageError(f"the dtype {options.dtype!r} cannot be written", hint=hint)
    if options.fail_on not in (None, *DOUBTS):
        what = f"{options.fail_on!r} is not a verdict to fail on"
        raise UsageError(what, hint=f"choose one of {', '.join(DOUBTS)}")
    asked_for = options.base, options.min_agreement, options.fail_on
    if not options.agreement and asked_for != (None, None, None):
        hint = "leave out --no-agreement, or --base, --min-agreement and --fail-on"
        raise UsageError("the agreement is asked for, and not to be measured", hint=hint)
    least = options.min_agreement
    if least is not None and not -1 <= least <= 1:  # nor NaN, below which nothing is
        hint = "give a cosine between -1 and 1"
        raise UsageError(f"the minimum agreement {least:g} is out of range", hint=hint)
    if options.threads is not None and not 1 <= options.threads <= MOST_THREADS:
        hint = f"give a number from 1 to {MOST_THREADS:,}"
        raise UsageError("the number of threads is out of range", hint=hint)
    parse_lora(options.lora)
    if options.lora != "factors" and options.fail_on is not None:
        hint = "leave out --fail-on, or ask for a cosine with --min-agreement"
        raise UsageError("there is no verdict on what adapters do", hint=hint)
    if options.part is not None:
        parse_part("/".join(map(str, options.part)))
    if sum(map(bool, (options.resume, options.part, options.finish))) > 1:
        hint = "a part goes on with what is there by itself; --resume makes all parts that lack"
        raise UsageError("--resume, --part and --finish exclude each other", hint=hint)
    if not re.fullmatch(r"cpu|cuda(:\d+)?", options.device):
        raise UsageError(f"there is no device {options.device!r}", hint="use cpu, cuda, or cuda:N")


def _asked(
    inputs: Sequence[Path], outputs: Outputs, options: Options
) -> Mapping[Path, Sequence[Weight]]:
    if not isinstance(outputs, Mapping):
        asked = {Path(outputs): options.weights or [1] * len(inputs)}
    elif options.weights is not None:
        raise UsageError("the weights are given twice", hint="give them with the outputs only")
    else:
        asked = {Path(path): weights for path, weights in outputs.items()}
    if not inputs or not asked:
        what = "outputs to write" if inputs else "checkpoints to average"
        raise UsageError(f"there are no {what}", hint="name at least one")
    for weights in asked.values():
        if len(weights) != len(inputs):
            counts = f"{len(weights)} weights for {len(inputs)} checkpoints"
            raise UsageError(counts, hint="give one weight per checkpoint, in the same order")
    first = next(iter(asked))
    for path in asked:
        if path.suffix != first.suffix:
            hint = "averages that are made in one run have one format"
            raise UsageError(f"{first.name} and {path.name} end differently", hint=hint)
    return asked


def _prepared(
    inputs: Sequence[Path],
    outputs: tuple[OutputSpec, ...],
    rules: tuple[Rule, ...],
    options: Options,
    made_by: Record | None,
    scanned: Mapping[Path, Layout],
    sources: Mapping[Path, Layout],
) -> Job:
    # Copies: the caller may change its lists before the record is written.
    options = replace(
        options,
        include=[*options.include],
        exclude=[*options.exclude],
        weights_for=[*options.weights_for],
    )
    # Only a copy of the template needs its pickle and list of records. A record that `verify` reads
    # may name one checkpoint ten thousand times.
    known = {**sources, **scanned}
    once = functools.cache(lambda path: (known.get(path) or scan(path)).source)
    layouts = [scanned.get(inputs[0]) or scan(inputs[0]), *map(once, inputs[1:])]
    roles, masters = roles_of(layouts, options.key)
    weights = [role.weights for role in roles]
    bare = {name: info for name, info in weights[0].items() if name not in masters}
    rows, folder = [one.weights for one in outputs], format_for(outputs[0].path.suffix) is None
    together = find_composites(inputs, layouts, weights, rows, options, folder=folder)
    about = options.missing, options.include, options.exclude, masters
    aligned = align(inputs, together.left, *about, besides=bool(together.composites))
    made = make_plan(layouts, aligned, options.dtype)
    made = replace(
        made,
        composites=together.composites,
        texts=together.texts,
        metadata=together.metadata,
    )
    plan, ruled_notes = ruled(made, rules, masters, inputs[0])
    base = None if options.base is None else _number_of(inputs, Path(options.base))
    notes = [*ruled_notes, *together.notes, *stale_notes(roles[0], together, options)]
    if options.base is not None and base is None:
        base = len(inputs)
        plan, more = _based(plan, Path(options.base), bare, options.key)
        notes += more
    entries = sum(len(layout.tensors) for layout in plan.layouts)
    counts = len(plan.layouts), plan.itemsize, entries
    limits = options.max_memory, options.threads
    pairs = len(inputs) ** 2 * (2 if options.base else 1) if options.agreement else 0
    largest = max((one.memory for one in plan.composites), default=0)
    budget = plan_budget(*counts, *limits, len(outputs), map(len, plan.units), pairs, largest)
    serve = serving(roles[0], bare.values()) if options.weights_only else None
    layout = lay_out(outputs[0].path, plan, bare, options, serve)
    if gone := dropped_keys(layouts[0], layout.dropped, roles[0]):
        notes = [*notes, f"left out of distributed checkpoints: {named(gone, 5)}"]
    if serve is not None and layout.directory and layouts[0].members:
        left_out, doubts = training_state(layouts[0], serve)
        layout, notes = layout.without(left_out, layouts[0]), [*notes, *doubts]
    if options.strict_pickle and layout.callables:
        what = f"loading it calls {named(layout.callables, 3)}, which is not known to be harmless"
        hint = "write a .safetensors file, or the weights alone with --weights-only"
        raise MergeError(what, where=inputs[0], hint=hint)
    if masters:
        what = "the float32 copies of weights in the optimizer's state are averaged as well"
        notes.append(f"{what}: {named(masters)}")
    averaged = {n: aligned.template(n) for n in aligned.rows if n not in aligned.skipped}
    parts = parts_note(averaged if len(layouts) > 1 else {})
    said = (*notes_of(plan, options, layout, len(layouts)), *parts, *notes)
    if layout.directory and layouts[0].members and len(outputs) == 1 and made_by is None:
        said = (*said, *tracker_notes(layouts[0].path, outputs[0].path))
    job = Job(outputs, layout, options, roles[0], plan, budget, said, base, made_by, rules)
    some = (unit for unit in plan.units if unit.kind == "mean" and len(unit.sources) < len(inputs))
    for unit, row in ((one, row) for one in some for row in job.weights(one)):
        if not any(row.integers[k] for k in unit.checkpoints):
            what = f"every checkpoint that has {str(unit.members[0][0])!r} has the weight zero"
            raise MergeError(what, where=inputs[0])
    return job


def _based(
    plan: Plan, path: Path, template: Mapping[Name, TensorInfo], key: str | None
) -> tuple[Plan, list[str]]:
    layout = scan(path).source
    weights, note = match(plan.layouts[0].path, template, path, assign(layout, key).weights)
    based = with_base(plan, layout, weights)
    # The base's source is the last of each unit that it could be compared with.
    matrices = [unit for unit in based.units if unit.is_matrix]
    lacking = sum(unit.sources[-1].checkpoint != len(plan.layouts) for unit in matrices)
    notes = [note] if note else []
    if matrices and lacking == len(matrices):
        hint = "the base is the checkpoint that the others were fine-tuned from"
        raise MergeError("it has no matrix that the checkpoints have", where=path, hint=hint)
    if lacking:
        what = f"{lacking:,} of {len(matrices):,} matrices are not in it, or of another shape"
        notes.append(f"{path}: {what}; they are compared without it")
    return based, notes


def _template_first(
    inputs: Sequence[Path], template: int | Location | None
) -> list[tuple[Path, int | None]]:
    """Return the checkpoints with their numbers among the inputs, the template first."""
    places: list[tuple[Path, int | None]] = [(path, k) for k, path in enumerate(inputs)]
    if template is None:
        return places
    text = str(template)
    # A file that is called 3 wins over the third checkpoint, unless an int asks for that one.
    if text.isdecimal() and (isinstance(template, int) or not Path(text).exists()):
        index = int(text[:19]) - 1  # of more digits Python may refuse to make an int
        if not 0 <= index < len(inputs):
            hint = f"give a number from 1 to {len(inputs)}, or the path of a checkpoint"
            raise UsageError(f"there is no checkpoint number {text}", hint=hint)
        return [places.pop(index), *places]
    found = _number_of(inputs, Path(text))
    return [(Path(text), None) if found is None else places.pop(found), *places]


def _number_of(inputs: Sequence[Path], path: Path) -> int | None:
    """Return which of the checkpoints a path leads to, if to one of them."""
    if not path.exists():
        return None
    return next((i for i, one in enumerate(inputs) if one.exists() and one.samefile(path)), None)


def refuse_inputs(target: Path, layouts: Sequence[Layout], logs: Sequence[Path] = ()) -> None:
    """Raise MergeError where the output is an input, lies within one, or holds one."""
    inputs = [(layout.path, [file.path for file in layout.files]) for layout in layouts]
    for path, files in (*inputs, *((log, [log]) for log in logs)):
        if target.exists() and target.samefile(path):
            relation = "is"
        elif path.is_dir() and target.resolve().is_relative_to(path.resolve()):
            relation = "lies in"
        elif target.is_dir() and any(
            one.resolve().is_relative_to(target.resolve()) for one in (path, *files)
        ):
            relation = "holds"
        elif target.is_file() and any(target.samefile(file) for file in files):
            relation = "is a part of"
        else:
            continue
        hint = "choose another output; inputs are never written to"
        raise MergeError(f"the output {relation} the input {path}", where=target, hint=hint)
