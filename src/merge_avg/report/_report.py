"""The report of a merge: its values, how they come from a job and its result, and their JSON.

Fields have the names and the order of the JSON's keys. Scripts read that JSON: a key may be added,
but none renamed or removed.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from merge_avg._version import __version__
from merge_avg.agreement import LEAST_AGREEMENT, TensorAgreement
from merge_avg.options import REPORTED
from merge_avg.report.printable import counted

if TYPE_CHECKING:
    from merge_avg.agreement import Agreement
    from merge_avg.checkpoint import Kept, Name
    from merge_avg.engine import Result
    from merge_avg.plan import Job
    from merge_avg.selection import Choice

# What is known of checkpoints in a run, by the names of its fields.
KNOWN = ("step", "epoch", "metric")
# `bytes` is a type in Python, and the program's own version goes by its name.
_KEYS = {"nbytes": "bytes", "version": "merge_avg"}


def optional() -> Any:
    """Return a dataclass field that is left out of the JSON where it is None."""
    return field(default=None, metadata={"optional": True})


@dataclass(frozen=True)
class ReportedInput:
    """A checkpoint that a merge reads."""

    path: str
    format: str
    nbytes: int
    # A template or a base may only be copied, or compared with.
    averaged: bool
    # After division by the sum. Of several outputs each has its own: see `ReportedOutput`.
    weight: float | None = optional()
    # What was found out when it was chosen from a run.
    step: int | None = optional()
    epoch: int | None = optional()
    metric: float | None = optional()
    # Of what the outputs have of it, in hexadecimal: the same number as in their provenance.
    hash: str | None = optional()


@dataclass(frozen=True)
class ReportedOutput:
    """An output, and the weights of all inputs in it, zeros included."""

    path: str
    weights: tuple[float, ...]


@dataclass(frozen=True)
class TensorCounts:
    """How many of the template's tensors are averaged, are integers, or are kept by choice."""

    averaged: int
    integers: int
    kept: int


@dataclass(frozen=True)
class ReportedCandidate:
    """A checkpoint that was looked at, and why it was chosen or not."""

    # In a table of candidates an unknown value is a gap, so here None stays in the JSON.
    path: str
    step: int | None
    epoch: int | None
    metric: float | None
    chosen: bool
    why: str
    weight: float | None = optional()


@dataclass(frozen=True)
class CheckpointAgreement:
    """How far one checkpoint agrees with the others."""

    path: str
    mean: float | None
    error: float


@dataclass(frozen=True)
class Figures:
    """Cosines between checkpoints, as in `merge_avg.agreement.Agreement`, to six places."""

    mean: float
    error: float
    each: tuple[CheckpointAgreement, ...]
    pairs: tuple[tuple[float | None, ...], ...]
    shrinkage: float
    size: int
    elements: int
    # The path of the one checkpoint that agrees with no other.
    odd: str | None
    tensors: tuple[TensorAgreement, ...]

    @property
    def exact(self) -> bool:
        return self.elements == self.size


@dataclass(frozen=True)
class ReportedAgreement(Figures):
    """How far the checkpoints agree; and what they learned since the base, if there is one."""

    base: str | None
    # None also where fewer than two checkpoints differ from the base.
    centred: Figures | None


@dataclass(frozen=True)
class Outcome:
    """The part of a report that is only known once a merge has run."""

    # None where it was not measured, or there was nothing to compare.
    agreement: ReportedAgreement | None
    bytes_read: int
    seconds: float
    # Integer tensors whose values the policy chose.
    differing: tuple[str, ...]
    # Tensors that hold NaN or infinity, where that was allowed.
    nonfinite: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """All that is said of a merge. Sizes are in bytes."""

    version: str
    # The template is the first, and a base that is not averaged the last.
    inputs: tuple[ReportedInput, ...]
    outputs: tuple[ReportedOutput, ...]
    template: str
    base: str | None
    tensors: TensorCounts
    # Elements of the template's weights, integers left out.
    parameters: int
    # Of the outputs' weights, with the number of tensors.
    dtypes: Mapping[str, int]
    # Entries whose tensors are not averaged, such as the optimizer's state, then entries without
    # tensors; and whether the outputs have these entries.
    kept: tuple[Kept, ...]
    others: tuple[str, ...]
    whole: bool
    # Tensors that some checkpoint lacks, with the number of checkpoints that have them.
    available: Mapping[str, int]
    bytes_to_read: int
    bytes_to_write: int
    threads: int
    # At most, and beside torch's own.
    memory: int
    # Options that decide what is averaged, and how: `merge_avg.options.REPORTED`.
    policies: Mapping[str, Any]
    # For the user, one sentence each; a warning says what may make the mean meaningless.
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    # Empty where the user named each checkpoint.
    candidates: tuple[ReportedCandidate, ...]
    # None for a dry run.
    outcome: Outcome | None

    @property
    def dry_run(self) -> bool:
        return self.outcome is None

    @property
    def averaged(self) -> int:
        """Return how many inputs are averaged, so without a template or base that is not."""
        return sum(entry.averaged for entry in self.inputs)

    @property
    def agreement(self) -> ReportedAgreement | None:
        """Return how far the checkpoints agree, if that was measured."""
        return None if self.outcome is None else self.outcome.agreement


def describe(job: Job, result: Result | None, choice: Choice | None = None) -> Report:
    """Return the report of a merge that ran, or, without a result, of a planned one.

    The choice is how its checkpoints were chosen, where the user did not name each.
    """
    plan, template = job.plan, job.layouts[0]
    aligned, averaged = plan.aligned, job.averaged
    infos = [(name, row[0]) for name, row in aligned.rows.items() if row[0] is not None]
    used = [(name, info.dtype.kind) for name, info in infos if name not in aligned.skipped]
    # Bools are among the integers: both are compared and never averaged.
    floats = sum(kind in ("float", "complex") for _, kind in used)
    inputs = _inputs(job, result, choice)
    weights = {entry.path: entry.weight for entry in inputs}
    base = None if job.base is None else str(job.layouts[job.base].path)
    outcome = None if result is None else _outcome(job, result, base)
    agreement = None if outcome is None else outcome.agreement
    warnings = plan.warnings if result is None else result.warnings
    return Report(
        version=__version__,
        inputs=inputs,
        outputs=tuple(
            ReportedOutput(str(output.path), tuple(output.weights.normalized()))
            for output in job.outputs
        ),
        template=str(template.path),
        base=base,
        tensors=TensorCounts(floats, len(used) - floats, len(infos) - len(used)),
        parameters=sum(info.numel for _, info in infos if info.dtype.kind != "int"),
        dtypes=Counter(plan.result(name).name for name, _ in infos),
        kept=job.roles.kept,
        others=tuple(template.others),
        whole=job.layout.whole,
        available={
            str(name): sum(row[number] is not None for number in averaged)
            for name, row in aligned.rows.items()
            if None in row and name not in aligned.skipped
        },
        bytes_to_read=job.nbytes,
        bytes_to_write=sum(job.layout.nbytes(job.record(output)) for output in job.outputs),
        threads=job.budget.threads,
        memory=job.budget.nbytes,
        policies={key: getattr(job.options, key) for key in REPORTED},
        notes=(
            *(choice.notes if choice is not None else ()),
            *aligned.notes,
            *job.notes,
            *_notes(job, result, [name for name, _ in used]),
        ),
        warnings=(*warnings, *_strangers(agreement)),
        candidates=tuple(
            ReportedCandidate(
                **asdict(one) | {"path": str(one.path), "weight": weights.get(str(one.path))}
            )
            for one in (choice.candidates if choice is not None else ())
        ),
        outcome=outcome,
    )


def _inputs(job: Job, result: Result | None, choice: Choice | None) -> tuple[ReportedInput, ...]:
    averaged, count = job.averaged, len(job.layouts)
    candidates = {one.path: one for one in choice.candidates} if choice is not None else {}
    weights = job.outputs[0].weights.normalized() if len(job.outputs) == 1 else [None] * count
    # There is a digest for each checkpoint that was merged, so none for a base beside them.
    digests = () if result is None or result.hashes is None else result.hashes.read
    return tuple(
        ReportedInput(
            path=str(layout.path),
            format=layout.format,
            nbytes=layout.nbytes,
            averaged=number in averaged,
            weight=weights[number],
            hash=f"{digests[number]:032x}" if digests and number in averaged else None,
            **{key: getattr(candidates.get(layout.path), key, None) for key in KNOWN},
        )
        for number, layout in enumerate(job.layouts)
    )


def _notes(job: Job, result: Result | None, used: Sequence[Name]) -> Iterator[str]:
    statistics = sum(name.key.endswith(("running_mean", "running_var")) for name in used)
    if statistics and len(job.averaged) > 1:
        # The mean network has other activations, and so other statistics than the mean ones.
        what = f"{counted(statistics, 'BatchNorm statistic')} averaged"
        how = "recompute them on training data: merge_avg.recalibrate_batch_norm(model, loader)"
        yield f"{what}; {how}"
    if result is not None and job.plan.factors and not result.warnings:
        # (B1 A + B2 A) / 2 is the mean of B times A. With two different A it is not.
        yield "every LoRA factor A is the same, so this is the mean of what the adapters do"


def _outcome(job: Job, result: Result, base: str | None) -> Outcome:
    paths = [str(job.layouts[number].path) for number in result.compared]
    agreement = None
    if result.agreement is not None:
        centred = None if result.centred is None else _figures(result.centred, paths)
        figures = vars(_figures(result.agreement, paths))
        agreement = ReportedAgreement(**figures, base=base, centred=centred)
    return Outcome(
        agreement,
        bytes_read=result.nbytes,
        seconds=round(result.seconds, 3),
        differing=tuple(result.differing),
        nonfinite=tuple(result.nonfinite),
    )


def _figures(found: Agreement, paths: Sequence[str]) -> Figures:
    return Figures(
        mean=_rounded(found.mean),
        error=_rounded(found.error),
        each=tuple(
            CheckpointAgreement(*one)
            for one in zip(paths, _rounded(found.each), _rounded(found.errors), strict=True)
        ),
        pairs=_rounded(found.pairs),
        shrinkage=_rounded(found.shrinkage),
        size=found.size,
        elements=found.elements,
        odd=None if found.odd is None else paths[found.odd],
        tensors=tuple(
            replace(
                tensor,
                mean=_rounded(tensor.mean),
                error=_rounded(tensor.error),
                distances=_rounded(tensor.distances),
            )
            for tensor in found.tensors
        ),
    )


def _rounded(value: Any) -> Any:
    """Return a number, or those in a tuple, to six places; None stays None."""
    # A sample gives three places at best, and the JSON of a large model has many such numbers.
    if isinstance(value, tuple):
        return tuple(map(_rounded, value))
    return None if value is None else round(value, 6)


def _strangers(agreement: ReportedAgreement | None) -> Iterator[str]:
    """Yield a warning where the mean is most likely not a working network."""
    if agreement is None:
        return
    odd = agreement.odd and f"{agreement.odd} agrees with none of the others; average without it"
    if agreement.mean < LEAST_AGREEMENT:
        what = f"the checkpoints hardly agree (cosine {agreement.mean:.2f})"
        other = "average checkpoints of one initialisation, or average their outputs instead"
        yield f"{what}, so their mean is most likely no working network: {odd or other}"
    elif odd:
        yield odd


def as_json(report: Report) -> dict[str, Any]:
    """Return the report as plain values. The outcome's keys stand beside the others."""
    found = plain(report)
    outcome = found.pop("outcome") or {}
    return {
        "merge_avg": found.pop("merge_avg"),
        "output": report.outputs[0].path,
        "dry_run": report.dry_run,
        "int_policy": report.policies["int_policy"],
        **found,
        **outcome,
    }


def plain(value: Any) -> Any:
    """Return a value with its dataclasses as dicts and its tuples as lists."""
    # Most values are numbers: a large model has figures of tens of thousands of tensors.
    if value is None or isinstance(value, float | int | str):
        return value
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return {
        key: plain(item)
        for name, key, wanted in _keys(value.__class__)
        if (item := getattr(value, name)) is not None or wanted
    }


@functools.cache
def _keys(cls: type) -> tuple[tuple[str, str, bool], ...]:
    """Return each field of a dataclass, its key, and whether it is wanted where it is None."""
    return tuple(
        (one.name, _KEYS.get(one.name, one.name), not one.metadata.get("optional"))
        for one in fields(cls)
    )
