"""What a merge did or would do, as one table of plain values, and as lines for a person."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from merge_avg.agreement import LEAST_AGREEMENT
from merge_avg.errors import named
from merge_avg.options import REPORTED
from merge_avg.plan import Job
from merge_avg.report import sizes

if TYPE_CHECKING:
    from merge_avg.agreement import Agreement
    from merge_avg.engine import Result
    from merge_avg.selection import Choice

Report = dict[str, Any]
_KNOWN = ("step", "epoch", "metric")
_WIDEST = 100  # characters that a column is padded to


def describe(job: Job, result: Result | None, version: str, choice: Choice | None = None) -> Report:
    """The report of a merge that ran, or of a planned one. Sizes are in bytes, times in seconds.

    Args:
        job: the merge.
        result: what it did, if it ran.
        version: of this program.
        choice: how its checkpoints were chosen.
    """
    plan = job.plan
    template = job.layouts[0]
    averaged = job.averaged
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
        "output": str(job.outputs[0].path),
        "dry_run": result is None,
        "inputs": [
            {
                "path": str(layout.path),
                "format": layout.format,
                "bytes": layout.nbytes,
                "averaged": number in averaged,
            }
            for number, layout in enumerate(job.layouts)
        ],
        "outputs": [
            {"path": str(output.path), "weights": output.weights.normalized()}
            for output in job.outputs
        ],
        "template": str(template.path),
        "base": None if job.base is None else str(job.layouts[job.base].path),
        "tensors": {kind: kinds[kind] for kind in ("averaged", "integers", "kept")},
        "parameters": sum(info.numel for _, info in infos if info.dtype.kind != "int"),
        "dtypes": dict(Counter(plan.result(name).name for name, _ in infos)),
        "kept": [
            {"key": kept.key, "tensors": kept.tensors, "bytes": kept.nbytes}
            for kept in job.roles.kept
        ],
        "others": list(template.others),
        "whole": job.layout.whole,
        "available": {
            str(name): sum(row[number] is not None for number in averaged)
            for name, row in plan.aligned.rows.items()
            if None in row and name not in plan.aligned.skipped
        },
        "bytes_to_read": job.nbytes,
        "bytes_to_write": sum(job.layout.nbytes(job.record(output)) for output in job.outputs),
        "threads": job.budget.threads,
        "memory": job.budget.nbytes,
        "int_policy": job.options.int_policy,
        "policies": {key: getattr(job.options, key) for key in REPORTED},
        "notes": [*plan.aligned.notes, *job.notes],
        "warnings": list(plan.warnings if result is None else result.warnings),
    }
    if len(job.outputs) == 1:
        for entry, weight in zip(
            report["inputs"], job.outputs[0].weights.normalized(), strict=True
        ):
            entry["weight"] = weight
    report["candidates"] = _candidates(choice)
    if choice is not None:
        report["notes"] = [*choice.notes, *report["notes"]]
        known = {candidate["path"]: candidate for candidate in report["candidates"]}
        for entry in report["inputs"]:
            found = known.get(entry["path"], {})
            entry |= {key: found[key] for key in _KNOWN if found.get(key) is not None}
            if found and "weight" in entry:
                found["weight"] = entry["weight"]
    statistics = sum(
        name.key.endswith(("running_mean", "running_var")) and name not in plan.aligned.skipped
        for name, _ in infos
    )
    if statistics and len(averaged) > 1:
        what = f"{_counted(statistics, 'BatchNorm statistic')} averaged"
        how = "recompute them on training data: merge_avg.recalibrate_batch_norm(model, loader)"
        report["notes"].append(f"{what}; {how}")
    if result is not None:
        digests = () if result.hashes is None else result.hashes.read
        for entry, digest in zip(report["inputs"], digests, strict=False):
            if entry["averaged"]:
                entry["hash"] = f"{digest:032x}"
        if plan.factors and not result.warnings:
            note = "every LoRA factor A is the same, so this is the mean of what the adapters do"
            report["notes"].append(note)
        report["agreement"] = _agreement(job, result)
        report["warnings"] += _strangers(report["agreement"])
        report["bytes_read"] = result.nbytes
        report["seconds"] = round(result.seconds, 3)
        report["differing"] = list(result.differing)
        report["nonfinite"] = list(result.nonfinite)
    return report


def _agreement(job: Job, result: Result) -> dict[str, Any] | None:
    paths = [str(job.layouts[number].path) for number in result.compared]
    if result.agreement is None:
        return None
    centred = None if result.centred is None else _figures(result.centred, paths)
    base = None if job.base is None else str(job.layouts[job.base].path)
    return {**_figures(result.agreement, paths), "base": base, "centred": centred}


def _figures(found: Agreement, paths: Sequence[str]) -> dict[str, Any]:
    return {
        "mean": _rounded(found.mean),
        "error": _rounded(found.error),
        "each": [
            {"path": path, "mean": _rounded(value), "error": _rounded(error)}
            for path, value, error in zip(paths, found.each, found.errors, strict=True)
        ],
        "pairs": [[_rounded(value) for value in row] for row in found.pairs],
        "shrinkage": _rounded(found.shrinkage),
        "size": found.size,
        "elements": found.elements,
        "odd": None if found.odd is None else paths[found.odd],
        "tensors": [
            {
                "name": tensor.name,
                "size": tensor.size,
                "elements": tensor.elements,
                "mean": _rounded(tensor.mean),
                "error": _rounded(tensor.error),
                "norm": tensor.norm,
                "distances": [_rounded(distance) for distance in tensor.distances],
            }
            for tensor in found.tensors
        ],
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


def least_agreeing(agreement: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    """The tensors of which the checkpoints agree least, the least first."""
    known = [tensor for tensor in agreement["tensors"] if tensor["mean"] is not None]
    return sorted(known, key=lambda tensor: float(tensor["mean"]))[:count]


def precision(agreement: Mapping[str, Any]) -> str:
    """How precisely the agreement is known, in a few words."""
    if agreement["elements"] == agreement["size"]:
        return "exact"
    return f"sampled, +-{max(agreement['error'], 0.0001):.1g}"


def _strangers(agreement: Mapping[str, Any] | None) -> list[str]:
    """A warning where the mean is likely no working network."""
    if agreement is None or agreement["mean"] >= LEAST_AGREEMENT:
        odd = agreement["odd"] if agreement is not None else None
        return [f"{odd} agrees with none of the others; average without it"] if odd else []
    what = f"the checkpoints hardly agree (cosine {agreement['mean']:.2f})"
    advice = "average checkpoints of one initialisation, or average their outputs instead"
    if agreement["odd"]:
        advice = f"{agreement['odd']} agrees with none of the others; average without it"
    return [f"{what}, so their mean is most likely no working network: {advice}"]


def _candidates(choice: Choice | None) -> list[dict[str, Any]]:
    """Every checkpoint that was looked at, what is known of it, and why it was chosen or not."""
    found = choice.candidates if choice is not None else ()
    return [{**asdict(candidate), "path": str(candidate.path)} for candidate in found]


def _bars(agreement: Mapping[str, Any] | None) -> Iterator[str]:
    """The agreement, and for few checkpoints the share of each."""
    if agreement is None:
        return
    what = "mean cosine between the checkpoints' matrices"
    yield f"  agreement {agreement['mean']:.3f} ({precision(agreement)}; {what})"
    centred = agreement["centred"]
    if centred is not None:
        how = f"({precision(centred)}; by the differences to {agreement['base']})"
        yield f"  agreement {centred['mean']:.3f} {how}"
    elif agreement["base"] is not None:
        yield f"  no two checkpoints differ from {agreement['base']}"
    least = least_agreeing(agreement, 3)
    if least and least[0]["mean"] < agreement["mean"] - 0.05:
        worst = ", ".join(f"{tensor['name']!r} {tensor['mean']:.3f}" for tensor in least)
        yield f"  least of all about {worst}"
    each = [one for one in agreement["each"] if one["mean"] is not None]
    if len(each) > 16 or max(one["mean"] for one in each) - min(one["mean"] for one in each) < 0.05:
        return
    width = min(max(len(one["path"]) for one in each), _WIDEST)
    for one in each:
        bar = "#" * round(20 * max(one["mean"], 0.0))
        yield f"    {one['path'].ljust(width)} {one['mean']:6.3f} {bar}"


def _table(candidates: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The candidates for a person, in columns."""
    rows = [
        (
            "+" if one["chosen"] else "-",
            one["path"],
            *(f"{key} {one[key]:.10g}" if one[key] is not None else "" for key in _KNOWN),
            f"weight {one['weight']:.4g}" if "weight" in one else "",
            one["why"],
        )
        for one in candidates
    ]
    widths = [min(max(map(len, column)), _WIDEST) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True) if width]
        yield "  " + " ".join(cells).rstrip()


def averaged_count(report: Report) -> int:
    """How many of the inputs are averaged: not a template or base that is none of them."""
    return sum(entry["averaged"] for entry in report["inputs"])


def lines(report: Report) -> Iterator[str]:
    """The report for a person, a line each."""
    count = averaged_count(report)
    verb = "would average" if report["dry_run"] else "averaged"
    outputs = report["outputs"]
    where = report["output"] if len(outputs) == 1 else _counted(len(outputs), "average")
    yield f"{verb} {_counted(count, 'checkpoint')} into {where}"
    if report["candidates"] and (report["dry_run"] or len(report["candidates"]) > count):
        yield from _table(report["candidates"])
    tensors = report["tensors"]
    what = f"{_counted(tensors['averaged'], 'tensor')}, {report['parameters']:,} parameters"
    yield f"  {what} ({', '.join(report['dtypes'])})"
    for entry in outputs:
        pairs = zip(report["inputs"], entry["weights"], strict=True)
        weights = [w for one, w in pairs if one["averaged"] or one["path"] != report["base"]]
        label = "" if len(outputs) == 1 else f"{entry['path']}: "
        if label or len(set(weights)) > 1:
            yield f"  {label}weights {', '.join(f'{weight:.4g}' for weight in weights)}"
    yield from (f"  {what}" for what in integers(report))
    kept, where = kept_entries(report)
    if kept:
        yield f"  {where}: {shortened(kept)}"
    yield from _bars(report.get("agreement"))
    yield from (f"  {what}" for what in exceptions(report))
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


def integers(report: Report) -> Iterator[str]:
    """What became of integers, a sentence each."""
    count, differing = report["tensors"]["integers"], report.get("differing", [])
    if count and report["dry_run"]:
        yield f"{_counted(count, 'integer tensor')} to compare"
    elif count > len(differing):
        yield f"{_counted(count - len(differing), 'integer tensor')} equal everywhere, copied"
    if differing:
        many = _counted(len(differing), "integer tensor")
        how = {"max": "the largest value", "mean": "the rounded mean"}
        chosen = how.get(report["int_policy"], "the template's value")
        yield f"{many} with different values, {chosen} taken: {named(differing)}"


def kept_entries(report: Report) -> tuple[list[str], str]:
    """What is not averaged, with its size; and what becomes of it."""
    kept = [
        f"{entry['key']} ({_counted(entry['tensors'], 'tensor')}, {sizes.shown(entry['bytes'])})"
        for entry in report["kept"]
    ]
    what = f"kept from {report['template']}" if report["whole"] else "left out"
    return kept + report["others"], what


def shortened(names: Sequence[str], most: int = 8) -> str:
    """The first of some names, and how many more there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def exceptions(report: Report) -> Iterator[str]:
    """Tensors that are not the mean of all checkpoints, or hold NaN, a sentence each."""
    count = averaged_count(report)
    for name, number in list(report["available"].items())[:8]:
        yield f"{name!r} is averaged over {number} of {count} checkpoints"
    if report.get("nonfinite"):
        yield f"warning: NaN or infinity in {named(report['nonfinite'])}"


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' * (count != 1)}"
