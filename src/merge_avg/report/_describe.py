"""From a job and its result to the report: what is worth saying is decided here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from merge_avg._version import __version__
from merge_avg.agreement import LEAST_AGREEMENT
from merge_avg.options import REPORTED
from merge_avg.report._report import (
    KNOWN,
    CheckpointAgreement,
    Figures,
    KeptEntry,
    Outcome,
    Report,
    ReportedAgreement,
    ReportedCandidate,
    ReportedInput,
    ReportedOutput,
    TensorCounts,
)
from merge_avg.report.sizes import counted

if TYPE_CHECKING:
    from merge_avg.agreement import Agreement
    from merge_avg.checkpoint import Name, TensorInfo
    from merge_avg.engine import Result
    from merge_avg.plan import Job
    from merge_avg.selection import Choice


def describe(job: Job, result: Result | None, choice: Choice | None = None) -> Report:
    """Return the report of a merge that ran, or of a planned one.

    Args:
        job: the merge.
        result: what it did, if it ran.
        choice: how its checkpoints were chosen.
    """
    plan, template = job.plan, job.layouts[0]
    aligned, averaged = plan.aligned, job.averaged
    infos = [(name, row[0]) for name, row in aligned.rows.items() if row[0] is not None]
    outcome = None if result is None else _outcome(job, result)
    agreement = None if outcome is None else outcome.agreement
    warnings = plan.warnings if result is None else result.warnings
    inputs = _inputs(job, result, choice)
    return Report(
        version=__version__,
        inputs=inputs,
        outputs=tuple(
            ReportedOutput(str(output.path), tuple(output.weights.normalized()))
            for output in job.outputs
        ),
        template=str(template.path),
        base=None if job.base is None else str(job.layouts[job.base].path),
        tensors=_counts(job, infos),
        parameters=sum(info.numel for _, info in infos if info.dtype.kind != "int"),
        dtypes=Counter(plan.result(name).name for name, _ in infos),
        kept=tuple(KeptEntry(kept.key, kept.tensors, kept.nbytes) for kept in job.roles.kept),
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
        notes=tuple(_notes(job, result, choice)),
        warnings=(*warnings, *_strangers(agreement)),
        candidates=_candidates(choice, inputs),
        outcome=outcome,
    )


def _inputs(job: Job, result: Result | None, choice: Choice | None) -> tuple[ReportedInput, ...]:
    averaged, count = job.averaged, len(job.layouts)
    weights = job.outputs[0].weights.normalized() if len(job.outputs) == 1 else [None] * count
    candidates = {one.path: one for one in choice.candidates} if choice is not None else {}
    # There is a digest for each checkpoint that was merged, so none for a base beside them.
    digests = () if result is None or result.hashes is None else result.hashes.read
    found = []
    for number, layout in enumerate(job.layouts):
        one = candidates.get(layout.path)
        known = {} if one is None else {key: getattr(one, key) for key in KNOWN}
        hashed = number in averaged and number < len(digests)
        found.append(
            ReportedInput(
                path=str(layout.path),
                format=layout.format,
                nbytes=layout.nbytes,
                averaged=number in averaged,
                weight=weights[number],
                hash=f"{digests[number]:032x}" if hashed else None,
                **known,
            )
        )
    return tuple(found)


def _candidates(
    choice: Choice | None, inputs: Sequence[ReportedInput]
) -> tuple[ReportedCandidate, ...]:
    weights = {entry.path: entry.weight for entry in inputs}
    return tuple(
        ReportedCandidate(
            **asdict(one) | {"path": str(one.path), "weight": weights.get(str(one.path))}
        )
        for one in (choice.candidates if choice is not None else ())
    )


def _counts(job: Job, infos: Sequence[tuple[Name, TensorInfo]]) -> TensorCounts:
    kinds = [info.dtype.kind for name, info in infos if name not in job.plan.aligned.skipped]
    # Bools are among the integers: both are compared and never averaged.
    averaged = sum(kind in ("float", "complex") for kind in kinds)
    return TensorCounts(averaged, len(kinds) - averaged, len(infos) - len(kinds))


def _notes(job: Job, result: Result | None, choice: Choice | None) -> Iterator[str]:
    aligned = job.plan.aligned
    yield from choice.notes if choice is not None else ()
    yield from aligned.notes
    yield from job.notes
    statistics = sum(
        name.key.endswith(("running_mean", "running_var")) and name not in aligned.skipped
        for name, row in aligned.rows.items()
        if row[0] is not None
    )
    if statistics and len(job.averaged) > 1:
        # The mean network has other activations, and so other statistics than the mean ones.
        what = f"{counted(statistics, 'BatchNorm statistic')} averaged"
        how = "recompute them on training data: merge_avg.recalibrate_batch_norm(model, loader)"
        yield f"{what}; {how}"
    if result is not None and job.plan.factors and not result.warnings:
        # (B1 A + B2 A) / 2 is the mean of B times A. With two different A it is not.
        yield "every LoRA factor A is the same, so this is the mean of what the adapters do"


def _outcome(job: Job, result: Result) -> Outcome:
    paths = [str(job.layouts[number].path) for number in result.compared]
    agreement = None
    if result.agreement is not None:
        agreement = ReportedAgreement(
            **vars(_figures(result.agreement, paths)),
            base=None if job.base is None else str(job.layouts[job.base].path),
            centred=None if result.centred is None else _figures(result.centred, paths),
        )
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
            CheckpointAgreement(path, _known(value), _rounded(error))
            for path, value, error in zip(paths, found.each, found.errors, strict=True)
        ),
        pairs=tuple(tuple(map(_known, row)) for row in found.pairs),
        shrinkage=_rounded(found.shrinkage),
        size=found.size,
        elements=found.elements,
        odd=None if found.odd is None else paths[found.odd],
        tensors=tuple(
            replace(
                tensor,
                mean=_known(tensor.mean),
                error=_rounded(tensor.error),
                distances=tuple(map(_rounded, tensor.distances)),
            )
            for tensor in found.tensors
        ),
    )


def _rounded(value: float) -> float:
    # A sample gives three places at best, and the JSON of a large model has many such numbers.
    return round(value, 6)


def _known(value: float | None) -> float | None:
    return None if value is None else _rounded(value)


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
