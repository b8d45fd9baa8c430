"""What a merge did or would do, as one table of plain values, and as lines for a person."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from merge_avg import sizes
from merge_avg.errors import named
from merge_avg.prepare import Job

if TYPE_CHECKING:
    from merge_avg.merge import Result

Report = dict[str, Any]


def describe(job: Job, result: Result | None, version: str) -> Report:
    """The report of a merge that ran, or of a planned one. Sizes are in bytes, times in seconds."""
    plan = job.plan
    template = job.layouts[0]
    infos = [(name, row[0]) for name, row in plan.aligned.rows.items() if row[0] is not None]
    kinds = Counter(
        "kept"
        if name in plan.aligned.skipped
        else "averaged"
        if info.dtype.kind in ("float", "complex")
        else "integers"
        for name, info in infos
    )
    report: Report = {
        "merge_avg": version,
        "output": str(job.output),
        "dry_run": result is None,
        "inputs": [
            {"path": str(layout.path), "format": layout.format, "bytes": layout.nbytes, "weight": w}
            for layout, w in zip(job.layouts, job.weights.normalized(), strict=True)
        ],
        "template": str(template.path),
        "tensors": {kind: kinds[kind] for kind in ("averaged", "integers", "kept")},
        "parameters": sum(info.numel for _, info in infos if info.dtype.kind != "int"),
        "dtypes": dict(Counter(plan.result(name).name for name, _ in infos)),
        "kept": [
            {"key": kept.key, "tensors": kept.tensors, "bytes": kept.nbytes}
            for kept in job.roles.kept
        ],
        "others": list(template.others),
        "whole": job.draft.whole,
        "available": {
            str(name): len(row) - row.count(None)
            for name, row in plan.aligned.rows.items()
            if None in row and name not in plan.aligned.skipped
        },
        "bytes_to_read": job.nbytes,
        "bytes_to_write": job.draft.nbytes,
        "threads": job.budget.threads,
        "memory": job.budget.nbytes,
        "int_policy": job.options.int_policy,
        "notes": [*plan.aligned.notes, *job.notes],
        "warnings": list(plan.warnings if result is None else result.warnings),
    }
    if result is not None:
        if plan.factors and not result.warnings:
            note = "every LoRA factor A is the same, so this is the mean of what the adapters do"
            report["notes"].append(note)
        report["bytes_read"] = result.nbytes
        report["seconds"] = round(result.seconds, 3)
        report["differing"] = list(result.differing)
        report["nonfinite"] = list(result.nonfinite)
    return report


def lines(report: Report) -> Iterator[str]:
    """The report for a person, a line each."""
    count = len(report["inputs"])
    verb = "would average" if report["dry_run"] else "averaged"
    yield f"{verb} {_counted(count, 'checkpoint')} into {report['output']}"
    tensors = report["tensors"]
    averaged = f"{_counted(tensors['averaged'], 'tensor')}, {report['parameters']:,} parameters"
    yield f"  {averaged} ({', '.join(report['dtypes'])})"
    weights = [entry["weight"] for entry in report["inputs"]]
    if len(set(weights)) > 1:
        yield f"  weights {', '.join(f'{weight:.4g}' for weight in weights)}"
    differing = report.get("differing", [])
    if tensors["integers"] and report["dry_run"]:
        yield f"  {_counted(tensors['integers'], 'integer tensor')} to compare"
    elif tensors["integers"] > len(differing):
        equal = _counted(tensors["integers"] - len(differing), "integer tensor")
        yield f"  {equal} equal everywhere, copied"
    if differing:
        many = _counted(len(differing), "integer tensor")
        how = {"max": "the largest value", "mean": "the rounded mean"}
        chosen = how.get(report["int_policy"], "the template's value")
        yield f"  {many} with different values, {chosen} taken: {named(differing)}"
    tensors_kept = [
        f"{entry['key']} ({_counted(entry['tensors'], 'tensor')}, {sizes.shown(entry['bytes'])})"
        for entry in report["kept"]
    ]
    kept = tensors_kept + report["others"]
    if kept:
        shown = ", ".join(kept[:8]) + (f" and {len(kept) - 8:,} more" if len(kept) > 8 else "")
        what = f"kept from {report['template']}" if report["whole"] else "left out"
        yield f"  {what}: {shown}"
    for name, number in list(report["available"].items())[:8]:
        yield f"  {name!r} is averaged over {number} of {count} checkpoints"
    if report.get("nonfinite"):
        yield f"  warning: NaN or infinity in {named(report['nonfinite'])}"
    yield from (f"  note: {note}" for note in report["notes"])
    yield from (f"  warning: {warning}" for warning in report["warnings"])
    if report["dry_run"]:
        size = sizes.shown(report["bytes_to_read"])
        yield f"  would read {size} and write {sizes.shown(report['bytes_to_write'])}"
        memory = f"{report['memory'] / (1 << 20):.0f} MiB"
        threads = _counted(report["threads"], "thread")
        yield f"  would take at most {memory} of memory beside torch's own, with {threads}"
    else:
        rate = sizes.shown(report["bytes_read"] / max(report["seconds"], 1e-9))
        size = sizes.shown(report["bytes_read"])
        yield f"  {size} read in {report['seconds']:.2f} s ({rate}/s)"


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' * (count != 1)}"
