"""The report of a merge: its values, how they come from a job and its result, and their JSON.

Scripts read that JSON: a key may be added, but none renamed or removed.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from merge_avg._version import __version__
from merge_avg.agreement import Agreement, Verdict, groups_of
from merge_avg.errors import counted
from merge_avg.formats.directory import relative
from merge_avg.options import REPORTED

if TYPE_CHECKING:
    from merge_avg.checkpoint import Kept
    from merge_avg.engine import Result
    from merge_avg.parts import Part, Planned, RankRate
    from merge_avg.plan import Job
    from merge_avg.selection import Candidate, Choice

# What is known of checkpoints in a run, by the names of its fields.
KNOWN = ("step", "epoch", "metric")


@dataclass(frozen=True)
class ReportedInput:
    """A checkpoint that a merge reads."""

    path: str
    format: str
    nbytes: int
    averaged: bool  # a template or a base may only be copied, or compared with
    # After division by the sum. Of several outputs each has its own: see `ReportedOutput`.
    weight: float | None = None
    # What was found out when it was chosen from a run.
    step: int | None = None
    epoch: int | None = None
    metric: float | None = None
    # Of what the outputs have of it, in hexadecimal: the same number as in their provenance.
    hash: str | None = None


@dataclass(frozen=True)
class ReportedOutput:
    """An output, and the weights of all inputs in it, zeros included."""

    path: str
    weights: tuple[float, ...]


@dataclass(frozen=True)
class Report:
    """All that is said of a merge. Sizes are in bytes.

    Fields have the names and the order of the JSON's keys, but for the last four: of these
    `as_json` takes what scripts may know.
    """

    inputs: tuple[ReportedInput, ...]  # the template first, a base that is not averaged last
    outputs: tuple[ReportedOutput, ...]
    template: str
    base: str | None
    tensors: Mapping[str, int]  # the template's: "averaged", "integers", and "kept" by choice
    parameters: int  # elements that are averaged, those of tied tensors once
    dtypes: Mapping[str, int]  # of the outputs' weights, with the number of tensors
    # Entries whose tensors are not averaged, such as the optimizer's state, then entries without
    # tensors; and whether the outputs have these entries.
    kept: tuple[Kept, ...]
    others: tuple[str, ...]
    whole: bool
    # The template's files that the outputs lack, with their sizes: no entry of theirs is listed.
    left_out: Mapping[str, int]
    # What loading an output calls, as loading the template does, that is not known to be harmless.
    callables: tuple[str, ...]
    # Tensors that some checkpoint lacks, with the number of checkpoints that have them.
    available: Mapping[str, int]
    bytes_to_read: int
    bytes_to_write: int
    threads: int
    memory: int  # at most, and beside torch's own
    policies: Mapping[str, Any]  # options that decide what is averaged, and how: `REPORTED`
    # For the user, one sentence each; a warning says what may make the mean meaningless.
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    # All that were looked at, with the weights of those that are inputs; empty where the user named
    # each checkpoint.
    candidates: tuple[tuple[Candidate, float | None], ...]
    # Of the averaged inputs. None where it was not measured, or there was nothing to
    # compare; the latter also where fewer than two checkpoints differ from the base.
    agreement: Agreement | None = None
    verdict: Verdict | None = None
    centred: Agreement | None = None
    result: Result | None = None  # None for a dry run
    # The part that was made, where the merge is not finished; what each rank did; and in a dry run
    # what each part or rank is to do.
    part: Part | None = None
    ranks: tuple[RankRate, ...] | None = None
    shares: tuple[Planned, ...] | None = None

    @property
    def averaged(self) -> list[str]:
        """Return the paths of the averaged inputs, so without a template or base that is not."""
        return [entry.path for entry in self.inputs if entry.averaged]


def describe(
    job: Job,
    result: Result | None,
    choice: Choice | None = None,
    shares: Sequence[Planned] = (),
) -> Report:
    """Return the report of a merge that ran, or, without a result, of a planned one.

    `shares` are what each part or rank is to do.

    The choice is how its checkpoints were chosen, where the user did not name each.
    """
    plan, template = job.plan, job.layouts[0]
    aligned = plan.aligned
    infos = [(name, row[0]) for name, row in aligned.rows.items() if row[0] is not None]
    used = [(name, info.dtype.kind) for name, info in infos if name not in aligned.skipped]
    # Bools are among the integers: both are compared and never averaged.
    floats = sum(kind in ("float", "complex") for _, kind in used)
    composed = plan.composed.values()
    floats += len(composed)
    integers = len(used) + len(composed) - floats
    tensors = {"averaged": floats, "integers": integers, "kept": len(infos) - len(used)}
    means = (unit for unit in plan.units if unit.kind == "mean")
    gone = {number: relative(template, number) for number in job.layout.left_out}
    dropped = job.layout.dropped
    there = (
        info
        for info in template.tensors
        if any(p.file not in gone and (p.file, p.name) not in dropped for p in info.storage.ranges)
    )
    stays = {why.key for info in there if (why := job.roles.reasons.get(info.path))}
    candidates = () if choice is None else choice.candidates
    inputs = tuple(_inputs(job, result, candidates))
    weights = {entry.path: entry.weight for entry in inputs}
    return Report(
        inputs=inputs,
        outputs=tuple(
            ReportedOutput(str(output.path), tuple(output.weights.normalized()))
            for output in job.outputs
        ),
        template=str(template.path),
        base=None if job.base is None else str(job.layouts[job.base].path),
        tensors=tensors,
        # Members may share elements, and a unit may have holes.
        parameters=sum(min(len(u), sum(info.numel for _, info in u.members)) for u in means)
        + sum(math.prod(one.shape) for one in composed),
        dtypes=Counter(plan.result(name).name for name in (*aligned.rows, *plan.composed)),
        kept=tuple(one for one in job.roles.kept if one.key in stays),
        others=tuple(n for n in template.others if n not in gone.values() and n not in plan.texts),
        whole=job.layout.whole,
        left_out={name: template.files[number].nbytes for number, name in sorted(gone.items())},
        callables=job.layout.callables,
        available={
            str(name): sum(row[number] is not None for number in job.averaged)
            for name, row in aligned.rows.items()
            if None in row and name not in aligned.skipped
        },
        bytes_to_read=job.nbytes,
        bytes_to_write=sum(job.layout.nbytes(job.record(output)) for output in job.outputs),
        threads=job.budget.threads,
        memory=job.budget.nbytes,
        policies={key: getattr(job.options, key) for key in REPORTED},
        notes=notes_of(job, result, choice),
        warnings=plan.warnings if result is None else result.warnings,
        candidates=tuple((one, weights.get(str(one.path))) for one in candidates),
        agreement=None if result is None else result.agreement,
        verdict=None if result is None else result.verdict,
        centred=None if result is None or result.agreement is None else result.centred,
        result=result,
        part=None if result is None else result.part,
        ranks=(result.ranks or None) if result is not None else None,
        shares=tuple(shares) or None,
    )


def _inputs(
    job: Job, result: Result | None, candidates: Sequence[Candidate]
) -> Iterator[ReportedInput]:
    averaged, count = job.averaged, len(job.layouts)
    chosen = {one.path: one for one in candidates}
    weights = job.outputs[0].weights.normalized() if len(job.outputs) == 1 else [None] * count
    # There is a digest for each checkpoint that was merged, so none for a base beside them.
    digests = () if result is None or result.hashes is None else result.hashes.read
    for number, layout in enumerate(job.layouts):
        yield ReportedInput(
            path=str(layout.path),
            format=layout.format,
            nbytes=layout.nbytes,
            averaged=number in averaged,
            weight=weights[number],
            hash=f"{digests[number]:032x}" if digests and number in averaged else None,
            **{key: getattr(chosen.get(layout.path), key, None) for key in KNOWN},
        )


def notes_of(job: Job, result: Result | None, choice: Choice | None) -> tuple[str, ...]:
    """Return the notes on a merge, for the user, one sentence each."""
    chosen = () if choice is None else choice.notes
    notes = *_template(job, choice), *chosen, *job.plan.aligned.notes, *job.notes
    return (*notes, *_notes(job, result))


def _template(job: Job, choice: Choice | None) -> Iterator[str]:
    newest = None if choice is None else choice.newest(choice.paths)
    if newest is not None and job.options.template == newest and job.layout.whole:
        yield f"{newest} is the template, as the newest"


def _notes(job: Job, result: Result | None) -> Iterator[str]:
    aligned = job.plan.aligned
    used = (name for name in aligned.rows if aligned.rows[name][0] and name not in aligned.skipped)
    statistics = sum(name.key.endswith(("running_mean", "running_var")) for name in used)
    if statistics and len(job.averaged) > 1:
        # The mean network has other activations, and so other statistics than the mean ones.
        what = f"{counted(statistics, 'BatchNorm statistic')} averaged"
        how = "recompute them on training data: merge_avg.recalibrate_batch_norm(model, loader)"
        yield f"{what}; {how}"
    if (
        result is not None
        and not result.part
        and job.plan.factors
        and result.warnings[:1] != job.plan.warnings
    ):
        # (B1 A + B2 A) / 2 is the mean of B times A. With two different A it is not.
        yield "every LoRA factor A is the same, so this is the mean of what the adapters do"


def _rounded(value: Any) -> Any:
    """Return plain figures to six places."""
    # A sample gives three places at best, and the JSON of a large model has many such numbers.
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    if isinstance(value, dict):  # a norm has a unit, so a small one must not become 0
        return {key: item if key == "norm" else _rounded(item) for key, item in value.items()}
    return value


def _verdict(verdict: Verdict | None, paths: Sequence[str]) -> dict[str, Any] | None:
    groups = () if verdict is None else verdict.groups
    found = [[paths[i] for i in group] for group in groups]
    return None if verdict is None else {**plain(verdict), "groups": found}


def as_json(report: Report) -> dict[str, Any]:
    """Return the report as plain values."""
    bare = replace(report, candidates=(), agreement=None, centred=None)
    bare = replace(bare, verdict=None, result=None)  # which have keys of their own
    found = {
        "merge_avg": __version__,
        "output": report.outputs[0].path,
        "dry_run": report.result is None,
        "int_policy": report.policies["int_policy"],
        **plain(bare),
        "candidates": [
            {"path": str(one.path)}
            | {key: getattr(one, key) for key in (*KNOWN, "chosen", "why")}
            | ({} if weight is None else {"weight": weight})
            for one, weight in report.candidates
        ],
    }
    if report.result is not None:
        figures = _figures(report.agreement, report.averaged)
        if figures is not None:
            figures |= {"base": report.base, "centred": _figures(report.centred, report.averaged)}
            figures |= {"verdict": _verdict(report.verdict, report.averaged)}
        found["agreement"] = _rounded(figures)
        found["bytes_read"] = report.result.nbytes
        found["seconds"] = round(report.result.seconds, 3)
        found["differing"] = list(report.result.differing)
        found["nonfinite"] = list(report.result.nonfinite)
        found["approximated"] = _approximated(report.result.errors)
    return found


def relative_errors(errors: Mapping[str, tuple[float, float]]) -> tuple[float, dict[str, float]]:
    """Return the relative error of all that is approximated together, and of each by name."""
    each = {name: _relative(*one) for name, one in errors.items()}
    error, norm = (math.fsum(one[k] for one in errors.values()) for k in (0, 1))
    return _relative(error, norm), each


def _relative(error: float, norm: float) -> float:
    return math.sqrt(error / norm) if norm > 0 else 0.0


def _approximated(errors: Mapping[str, tuple[float, float]]) -> dict[str, Any] | None:
    if not errors:
        return None
    total, each = relative_errors(errors)
    return {"error": total, "tensors": [{"name": name, "error": one} for name, one in each.items()]}


def _figures(found: Agreement | None, paths: Sequence[str]) -> dict[str, Any] | None:
    if found is None:
        return None
    each = zip(paths, found.each, found.errors, strict=True)
    groups = groups_of(found)
    odd = groups[1][0] if len(groups) == 2 and len(groups[1]) == 1 < len(groups[0]) else None
    return {
        "mean": found.mean,
        "error": found.error,
        "each": [{"path": path, "mean": mean, "error": error} for path, mean, error in each],
        "pairs": plain(found.pairs),
        "shrinkage": found.shrinkage,
        "size": found.size,
        "elements": found.elements,
        "odd": None if odd is None else paths[odd],
        "tensors": plain(found.tensors),
    }


def plain(value: Any) -> Any:
    """Return a value with its dataclasses as dicts, its tuples as lists and its paths as texts.

    A field whose default is None is left out where it is None; NaN and infinity become None.
    """
    # Most values are numbers: a large model has figures of tens of thousands of tensors.
    if value is None or isinstance(value, int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return {
        # `bytes` is a type in Python.
        "bytes" if one.name == "nbytes" else one.name: plain(item)
        for one in fields(value)
        if (item := getattr(value, one.name)) is not None or one.default is not None
    }
