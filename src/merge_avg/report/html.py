"""The report as one page of HTML: no script and nothing to load, so it works wherever it is kept.

Its charts are drawn when it is written. A library that draws in the browser (plotly, bokeh, vega)
would put megabytes of script into every page, and a page that holds scripts could not forbid them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from html import escape
from importlib.resources import files
from importlib.util import find_spec
from itertools import starmap
from pathlib import Path
from typing import Any

from merge_avg._version import __version__
from merge_avg.agreement import LEAST_AGREEMENT, Agreement
from merge_avg.checkpoint import FileLayout
from merge_avg.errors import MergeError, UsageError, WrittenError
from merge_avg.io import Output, refuse_output
from merge_avg.plan import FILE, Job, refuse_inputs
from merge_avg.report import counted, printable, shown
from merge_avg.report.text import columns, facts, least_agreeing, messages, precision, reading
from merge_avg.report.values import Report, as_json

_LEAST = 20  # tensors in the table of those that agree least
_MOST_NAMES = 40  # entries that are named where they are kept
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
    # Looked for without importing it, which takes longer than many a merge.
    if find_spec("matplotlib") is None:
        hint = "pip install 'merge-avg[report]'"
        raise MergeError("a report needs matplotlib, which is not installed", hint=hint)
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
    css = files("merge_avg.report").joinpath("page.css").read_text(encoding="utf-8")
    body = "\n".join(_sections(report))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>merge-avg: {_text(report.outputs[0].path)}</title>\n<style>\n{css}</style>\n"
        f"</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _sections(report: Report) -> Iterator[str]:
    outputs = report.outputs
    title = outputs[0].path if len(outputs) == 1 else counted(len(outputs), "average")
    what = f"the average of {counted(len(report.averaged), 'checkpoint')}"
    yield f"<header><h1>{_text(title)}</h1>"
    yield f'<p class="sub">{what}, made by merge-avg {_text(__version__)}</p></header>'
    tiles = (f'<div class="tile"><b>{one}</b><span>{of}</span></div>' for one, of in _tiles(report))
    yield f'<div class="tiles">{"".join(tiles)}</div>'
    # Lines that scroll by end with the warnings, and a page begins with them.
    told = [
        f'<p class="message {fact.label}"><b>{fact.label}:</b> {_text(fact.value)}</p>'
        for fact in sorted(messages(report), key=lambda fact: fact.label != "warning")
    ]
    if told:
        yield _section("messages", "Notes", "".join(told))
    yield _section("checkpoints", "Checkpoints", _checkpoints(report))
    numbers = [number for number, entry in enumerate(report.inputs, 1) if entry.averaged]
    yield _section("agreement", "Agreement", "".join(_agreement(report, numbers)))
    if report.agreement is not None:
        yield _section("least", "Where they agree least", _least(report.agreement, numbers))
    yield _section("what", "What was done", _done(report))
    # Without the figures of each tensor, of which there may be thousands.
    found = as_json(report)
    for figures in (agreement := found.get("agreement") or {}, agreement.get("centred") or {}):
        figures.pop("tensors", None)
    # Line by line, as `printable` would escape the ends of lines.
    data = "\n".join(map(_text, json.dumps(found, allow_nan=False, indent=2).splitlines()))
    yield f"<section><details><summary>The report as JSON</summary><pre>{data}</pre></details>"
    yield "</section>"


def _section(name: str, title: str, content: str) -> str:
    return f'<section id="{name}"><h2>{title}</h2>{content}</section>'


def _tiles(report: Report) -> Iterator[tuple[str, str]]:
    """Yield the headline figures, each with its label."""
    agreement = report.agreement
    if report.verdict is not None:
        yield report.verdict.word, f"the verdict, by {report.verdict.number:.3f}"
    if agreement is not None:
        yield f"{agreement.mean:.3f}", f"agreement, {_precise(agreement)}"
        if report.centred is not None:
            yield f"{report.centred.mean:.3f}", f"from the base, {_precise(report.centred)}"
        yield f"{agreement.shrinkage:.3f}", "norm of the mean over mean of the norms"
    yield f"{report.tensors['averaged']:,}", "tensors averaged"
    yield f"{report.parameters:,}", "parameters"
    if report.result is not None:
        size, how = reading(report.result.nbytes, report.result.seconds)
        yield size, f"read {how}"


def _precise(figures: Agreement) -> str:
    return precision(figures).replace("+-", "&plusmn; ")


def _checkpoints(report: Report) -> str:
    table = list(columns(report))
    cells = [starmap(_cosine, one.cosines) if one.cosines else one.cells for one in table]
    rows = zip(map(str, range(1, 1 + len(report.inputs))), *cells, strict=True)
    left = [n for n, column in enumerate(table, 1) if column.title in ("checkpoint", "format")]
    return _table(["#", *(column.title for column in table)], list(rows), left)


def _cosine(mean: float | None, error: float) -> str:
    return "" if mean is None else f"{mean:.3f}" + (f" ± {error:.1g}" if error else "")


def _agreement(report: Report, numbers: Sequence[int]) -> Iterator[str]:
    """Yield pictures, and how the figures come about."""
    agreement = report.agreement
    if agreement is None:
        yield "<p>It was not measured, or there are no two checkpoints with matrices.</p>"
        return
    looked = "all elements of the matrices were looked at, so the figures are exact"
    if agreement.elements != agreement.size:
        share = f"{agreement.elements:,} of the {agreement.size:,} elements of each checkpoint's"
        looked = f"{share} matrices were looked at; the errors are standard errors of that sample"
    yield (
        "<p>The cosine between the checkpoints over their tensors of two dimensions or more: 1 is "
        "the same direction, 0 nothing in common. What is the same in all does not count. From "
        f"{LEAST_AGREEMENT:g} on checkpoints agree, if matrices in a row do. Here {looked}.</p>"
    )
    # Late, as this imports matplotlib, which a page without an agreement does not need.
    from merge_avg.report._charts import distances, heat_map, svg

    yield '<div class="charts">'
    caption = f"Cosine of each checkpoint with each ({_precise(agreement)})"
    yield _figure("heat-map", caption, svg(heat_map, agreement.pairs, numbers))
    if report.centred is not None:
        caption = f"The same by the differences to {_text(str(report.base))}"
        yield _figure("heat-map-centred", caption, svg(heat_map, report.centred.pairs, numbers))
    if agreement.tensors:
        caption = "Distance of each checkpoint from the mean, over the norm, by layer"
        yield _figure("distances", caption, svg(distances, agreement.tensors, numbers), wide=True)
    yield "</div>"


def _figure(name: str, caption: str, picture: str, *, wide: bool = False) -> str:
    kind = ' class="wide"' if wide else ""
    # Matplotlib numbers its ids anew in each chart, so two charts of a page would share some.
    picture = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", picture)
    picture = picture.replace("<svg ", f'<svg role="img" aria-label="{caption}" ', 1)
    return f'<figure id="{name}"{kind}>{picture}<figcaption>{caption}</figcaption></figure>'


def _least(agreement: Agreement, numbers: Sequence[int]) -> str:
    rows = []
    for tensor in least_agreeing(agreement, _LEAST):
        far = max(range(len(numbers)), key=tensor.distances.__getitem__)
        looked = "all" if tensor.elements == tensor.size else f"{tensor.elements:,}"
        distance = f"{tensor.distances[far]:.3f} (#{numbers[far]})"
        cosine = _cosine(tensor.mean, tensor.error)
        rows.append([tensor.name, cosine, f"{tensor.size:,}", looked, distance])
    head = ["tensor", "agreement", "elements", "looked at", "largest distance from the mean"]
    rest = len(agreement.tensors) - len(rows)
    more = f'<p class="sub">{rest:,} more are in the output of --json.</p>' if rest else ""
    return _table(head, rows, left=(0,)) + more


def _done(report: Report) -> str:
    dtypes = (f"{name} ({counted(count, 'tensor')})" for name, count in report.dtypes.items())
    told = [(one.label, one.value) for one in facts(report, _MOST_NAMES)]
    rows = [
        ("template", report.template),
        *(pair for pair in told if pair[0] not in ("note", "warning")),
        ("dtypes", ", ".join(dtypes)),
        ("written bytes", f"{report.bytes_to_write:,}"),
        ("threads, memory", f"{report.threads}, {shown(report.memory)}"),
        *((name, _setting(value)) for name, value in report.policies.items()),
    ]
    return _table(["", ""], rows, left=(0, 1))


def _setting(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(value) if isinstance(value, list | tuple) else str(value or "")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int]) -> str:
    """Return a table of texts from anywhere; the columns `left` are text, the others numbers."""
    kinds = [' class="t"' if number in left else ' class="n"' for number in range(len(head))]
    cells = "".join(f"<th{kind}>{_text(text)}</th>" for kind, text in zip(kinds, head, strict=True))
    top = f"<thead><tr>{cells}</tr></thead>" if any(head) else ""
    lines = (
        "".join(f"<td{kind}>{_text(text)}</td>" for kind, text in zip(kinds, row, strict=True))
        for row in rows
    )
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll"><table>{top}<tbody>{body}</tbody></table></div>'


def _text(value: str) -> str:
    return escape(printable(value))
