"""The report as one page of HTML: no script and nothing to load, so it works wherever it is kept.

Its charts are drawn when it is written. A library that draws in the browser (plotly, bokeh, vega)
would put megabytes of script into every page, and a page that holds scripts could not forbid them.
What the page says is in `report.html.jinja`; here are the values that it shows.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any

from merge_avg._version import __version__
from merge_avg.agreement import LEAST_AGREEMENT, Agreement, TensorAgreement, groups_of
from merge_avg.checkpoint import FileLayout
from merge_avg.errors import MergeError, UsageError, WrittenError, counted, named
from merge_avg.formats import bounded
from merge_avg.io import Output, refuse_output
from merge_avg.plan import FILE, Job, refuse_inputs
from merge_avg.report import printable, shown, text
from merge_avg.report.values import Report, as_json

_LEAST = 20  # tensors in the table of those that agree least, and layers in that of outliers
_MOST_NAMES = 40  # entries that are named where they are kept
# Facts that have places of their own on the page.
_ABOVE = ("verdict", "agreement", "from base", "least", "note", "warning")
_NAMED = 8  # outputs that are named, and groups of checkpoints, and members of each
# Tensors on the page, and in each part of it: 20,000 take 4 MB, which open in half a second, since
# a browser lays out only the parts that are open.
_MOST_TENSORS, _PART = 20_000, 1000
# A checkpoint stands out where it agrees so much less than any other. And in a layer, where it is
# half as far again from the mean as any other, and so far that it matters: one of three that is
# elsewhere is twice as far as the others, since it draws the mean to it.
_APART = 0.05
_FARTHER, _FAR = 1.5, 0.05
# Should escaping ever fail: the browser then still runs no script and loads nothing.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def refuse(path: Path, job: Job, *, dry_run: bool = False) -> None:
    """Refuse, before the merge, a page that cannot or must not be written."""
    if dry_run:
        raise UsageError("a dry run has no results for a page", hint="leave out --report")
    if path.suffix.lower() not in (".html", ".htm"):
        hint = "give it a name such as report.html"
        raise UsageError(f"the report {path} is a page and has another ending", hint=hint)
    if any(path.resolve().is_relative_to(output.path.resolve()) for output in job.outputs):
        hint = "choose another name for one of them"
        raise UsageError(f"the report {path} is the output, or lies in it", hint=hint)
    # Looked for without importing them, which takes longer than many a merge.
    for needed in ("matplotlib", "jinja2"):
        if find_spec(needed) is None:
            hint = "pip install 'merge-avg[report]'"
            raise MergeError(f"a report needs {needed}, which is not installed", hint=hint)
    refuse_inputs(path, job.layouts)
    refuse_output(path, directory=False, overwrite=job.options.overwrite)


def write(path: Path, report: Report, *, overwrite: bool) -> None:
    """Write the page at once or not at all; a MergeError says that it cannot be."""
    # Like an output: written beside its place, then renamed. A path that appeared meanwhile is
    # refused.
    data = page(report).encode()
    try:
        layout = {FILE: FileLayout(len(data), ((0, data),))}
        with Output(path, layout, overwrite=overwrite) as output:
            output.commit()
    except MergeError as error:
        what = f"{error.what}; the average itself was written"
        raise WrittenError(what, where=error.where, hint=error.hint) from None


def page(report: Report) -> str:
    """Return the page of a merge that ran. Nothing in a name is HTML, a formula or a control."""
    # Late, as it may be missing, which is refused before.
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("merge_avg", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # Whatever is not HTML already is text, perhaps of a stranger's.
        finalize=lambda value: value if hasattr(value, "__html__") else printable(str(value)),
    )
    # Without the figures of each tensor, of which there may be thousands.
    found = as_json(report)
    for figures in (agreement := found.get("agreement") or {}, agreement.get("centred") or {}):
        figures.pop("tensors", None)
    # Line by line, as `printable` would escape the ends of lines.
    data = json.dumps(found, allow_nan=False, indent=2).splitlines()
    report = _ordered(report)
    numbers = [number for number, entry in enumerate(report.inputs, 1) if entry.averaged]
    values: dict[str, Any] = {}
    if report.agreement is not None:
        values = _compared(report, report.agreement, numbers)
    if report.result is not None:
        values |= _origin(report.result.job) | _tensors(report, report.result.job, numbers)
    # Lines that scroll by end with the warnings, and a page begins with them. What the verdict
    # warns of stands above them.
    verdict = report.verdict
    doubt = "" if verdict is None else f"{verdict.word}: {verdict.reason}"
    said = [one for one in text.messages(report) if not (doubt and one.value.startswith(doubt))]
    said.sort(key=lambda one: one.label != "warning")
    return environment.get_template("report.html.jinja").render(
        values,
        report=report,
        verdict=verdict,
        where=named(verdict.tensors, 3) if verdict is not None and verdict.tensors else "",
        policy=_POLICY,
        version=__version__,
        counted=counted,
        zip=zip,
        precise=lambda figures: text.precision(figures).replace("+-", "± "),
        enough=LEAST_AGREEMENT,
        messages=said,
        columns=text.columns(report),
        cosine=_cosine,
        reading=text.reading,
        done=_done(report),
        data=data,
    )


def _ordered(report: Report) -> Report:
    """Return the report with its inputs as they were chosen; in the job the template is first."""
    order = text.in_order(report)
    compared = [i for i, entry in enumerate(report.inputs) if entry.averaged]
    places = [compared.index(i) for i in order if report.inputs[i].averaged]

    def some(values: Any, chosen: Sequence[int] = places) -> Any:
        return tuple([values[i] for i in chosen])

    def figures(found: Agreement | None) -> Agreement | None:
        if found is None:
            return None
        pairs = some([some(row) for row in found.pairs])
        tensors = tuple([replace(one, distances=some(one.distances)) for one in found.tensors])
        moved: Any = {key: some(getattr(found, key)) for key in ("each", "errors", "norms")}
        return replace(found, pairs=pairs, tensors=tensors, **moved)

    outputs = tuple(replace(one, weights=some(one.weights, order)) for one in report.outputs)
    moved: Any = {key: figures(getattr(report, key)) for key in ("agreement", "centred")}
    return replace(report, inputs=some(report.inputs, order), outputs=outputs, **moved)


def _cosine(mean: float | None, error: float) -> str:
    return "" if mean is None else f"{mean:.3f}" + (f" ± {error:.1g}" if error else "")


def _compared(report: Report, agreement: Agreement, numbers: Sequence[int]) -> dict[str, Any]:
    """Return charts of the agreement, and what stands out in it."""
    # Late, as this imports matplotlib, which a page without an agreement does not need.
    from merge_avg.report._charts import distances, heat_map, layers, svg

    charts = {"heat-map": svg(heat_map, agreement.pairs, numbers)}
    if report.centred is not None:
        charts["heat-map-centred"] = svg(heat_map, report.centred.pairs, numbers)
    if agreement.tensors:
        charts["distances"] = svg(distances, agreement.tensors, numbers)
    names = [f"#{n} {path}" for n, path in zip(numbers, report.averaged, strict=True)]
    far = []
    for layer, row in zip(*layers(agreement.tensors), strict=True):
        *_, next_one, most = sorted((0.0, *row))
        if len(row) > 2 and most >= max(_FARTHER * next_one, _FAR):
            figures = f"{most:.3f}", f"{next_one:.3f}"
            far.append((most, layer, names[row.index(most)], *figures))
    far.sort(key=lambda one: -one[0])
    most_often = Counter(name for _, _, name, *_ in far).most_common(_NAMED)
    strays = (f"{name} stands apart in {counted(n, 'layer')}" for name, n in most_often)
    least = []
    for one in text.least_agreeing(agreement, _LEAST):
        looked = "all" if one.elements == one.size else f"{one.elements:,}"
        cosine, distance = _figures(one, numbers)
        least.append((one.name, cosine, f"{one.size:,}", looked, distance))
    return {
        # Matplotlib numbers its ids anew in each chart, so two charts of a page would share some.
        "charts": {
            name: re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", picture)
            for name, picture in charts.items()
        },
        "outliers": [*_outliers(agreement, names), *strays],
        "layers": [row for _, *row in far[:_LEAST]],
        "odd_layers": len(far),
        "least": least,
    }


def _figures(tensor: TensorAgreement, numbers: Sequence[int]) -> tuple[str, str]:
    """Return how far checkpoints agree about a tensor, and which is the farthest from the mean."""
    far = max(range(len(numbers)), key=tensor.distances.__getitem__)
    return _cosine(tensor.mean, tensor.error), f"{tensor.distances[far]:.3f} (#{numbers[far]})"


def _outliers(agreement: Agreement, names: Sequence[str]) -> Iterator[str]:
    """Yield what is to be said of each group of checkpoints, or of one that agrees least."""
    groups = groups_of(agreement) if len(names) > 2 else ()
    if len(groups) == len(names):
        yield "no two checkpoints have anything in common"
        return
    for number, group in enumerate(groups[:_NAMED], 1):
        more = f" and {len(group) - _NAMED:,} more" if len(group) > _NAMED else ""
        members = ", ".join(names[i] for i in group[:_NAMED])
        yield f"group {number} of {len(groups)}: {members}{more}"
    known = sorted((mean, i) for i, mean in enumerate(agreement.each) if mean is not None)
    if len(known) > 2 and not groups and known[1][0] - known[0][0] >= _APART:
        (least, i), (others, _) = known[:2]
        yield f"{names[i]} agrees least: {least:.3f}, where all others have {others:.3f} or more"


def _origin(job: Job) -> dict[str, Any]:
    """Return the commands that verify the outputs, one for those whose inputs are named alike."""
    found: dict[str, list[str]] = {}
    template = job.layouts[0].path
    for output in job.outputs[:_NAMED]:
        record = job.record(output)
        if job.layout.nbytes(record) == job.layout.nbytes(b""):
            break  # the format has no room for it
        # Inputs are named from the directory of all; links stay, as in the record.
        parts = PurePosixPath(bounded.loads(record)["template"]["name"]).parts
        root = Path(os.path.abspath(template)).parents[len(parts) - 1]  # noqa: PTH100
        folder = str(root) if template.is_absolute() else os.path.relpath(root)
        beside = os.path.abspath(output.path.parent) == str(root)  # noqa: PTH100
        inputs = "" if beside else f" --inputs {shlex.quote(folder)}"
        # A name such as -x.pt would be an option.
        path = os.path.join("." * (str(output.path)[0] == "-"), output.path)  # noqa: PTH118
        found.setdefault(inputs, []).append(shlex.quote(path))
    commands = [f"merge-avg verify {' '.join(paths)}{inputs}" for inputs, paths in found.items()]
    return {"commands": commands, "more_commands": len(job.outputs[_NAMED:])}


def _tensors(report: Report, job: Job, numbers: Sequence[int]) -> dict[str, Any]:
    """Return rows of all tensors of the template's weights, in its order."""
    agreement, aligned = report.agreement, job.plan.aligned
    figures = {one.name: one for one in agreement.tensors} if agreement is not None else {}
    rows = []
    for name in list(aligned.rows)[:_MOST_TENSORS]:
        info, one = aligned.template(name), figures.get(str(name))
        used = "averaged" if info.dtype.kind in ("float", "complex") else "compared"
        what = "kept" if name in aligned.skipped else used
        shape = "x".join(map(str, info.shape)) or "one value"
        compared = ("", "") if one is None else _figures(one, numbers)
        rows.append((str(name), what, job.plan.result(name).name, shape, *compared))
    return {"tensors": rows, "part": _PART, "all_tensors": len(aligned.rows)}


def _done(report: Report) -> list[tuple[str, str]]:
    dtypes = (f"{name} ({counted(count, 'tensor')})" for name, count in report.dtypes.items())
    told = (one for one in text.facts(report, _MOST_NAMES) if one.label not in _ABOVE)
    rows = [
        ("template", report.template),
        *((one.label, one.value) for one in told),
        ("dtypes", ", ".join(dtypes)),
        ("written bytes", f"{report.bytes_to_write:,}"),
        ("threads, memory", f"{report.threads}, {shown(report.memory)}"),
        *((name, _setting(value)) for name, value in report.policies.items()),
    ]
    return [row for row in rows if row[1]]


def _setting(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(value) if isinstance(value, list | tuple) else str(value or "")
