"""The report as one page of HTML: no script, nothing to load, so it works wherever it is kept.

Its charts are drawn when it is written. What draws in the browser (plotly, bokeh, vega) would put
megabytes of script into every page, and a page that holds scripts could not forbid them.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from merge_avg.agreement import LEAST_AGREEMENT
from merge_avg.checkpoint import FileLayout
from merge_avg.errors import MergeError, UsageError
from merge_avg.io import Output, refuse_output
from merge_avg.plan import FILE, Job, refuse_inputs
from merge_avg.report import sizes
from merge_avg.report.printable import printable
from merge_avg.report.report import (
    Report,
    averaged_count,
    exceptions,
    integers,
    kept_entries,
    least_agreeing,
    shortened,
)

_KNOWN = ("step", "epoch", "metric")
_LEAST = 20  # tensors in the table of those that agree least
_COLUMNS = 6  # weights of more averages than these are in the JSON only
_LAYER = re.compile(r"(?:.*?\.)?\d+(?=\.|$)")
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_CSS = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; color: #1f2933; background: #f4f6f8;
  margin: 0; }
main { max-width: 66rem; margin: 0 auto; padding: 1.5rem 1rem 3rem; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 0 0 .75rem; }
section { background: #fff; border: 1px solid #dfe4e9; border-radius: 8px; padding: 1rem 1.25rem;
  margin-top: 1rem; }
.sub { color: #5b6773; margin: 0; overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .75rem;
  margin-top: 1rem; }
.tile { background: #fff; border: 1px solid #dfe4e9; border-radius: 8px; padding: .6rem .9rem; }
.tile b { display: block; font-size: 1.15rem; font-weight: 600; overflow-wrap: anywhere; }
.tile span { color: #5b6773; font-size: .85rem; }
.charts { display: flex; flex-wrap: wrap; gap: 1rem; }
figure { margin: 0; flex: 1 1 20rem; min-width: 0; }
figure.wide { flex-basis: 100%; }
figcaption { color: #5b6773; font-size: .85rem; }
figure svg { max-width: 100%; height: auto; }
figure.wide svg { width: 100%; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; padding: .3rem .75rem .3rem 0; border-bottom: 1px solid #e8ecf0;
  vertical-align: top; overflow-wrap: anywhere; }
th { color: #5b6773; font-weight: 500; overflow-wrap: normal; }
td.t { min-width: 9rem; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.message { border-left: 4px solid #9aa3ad; padding: .4rem .8rem; margin: .5rem 0;
  background: #f4f6f8; overflow-wrap: anywhere; }
.warning { border-color: #d55e00; background: #fdf1e8; }
pre { overflow-x: auto; font-size: .8rem; }
"""


def refuse(path: Path, job: Job, *, dry_run: bool = False) -> None:
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
    for output in job.outputs:
        if path.resolve().is_relative_to(output.path.resolve()):
            hint = "choose another name for one of them"
            raise UsageError(f"the report {path} is the output, or lies in it", hint=hint)
    if importlib.util.find_spec("matplotlib") is None:
        hint = "pip install 'merge-avg[report]'"
        raise MergeError("a report needs matplotlib, which is not installed", hint=hint)
    refuse_inputs(path, job.layouts)
    refuse_output(path, directory=False, overwrite=job.options.overwrite)


def write(path: Path, report: Report, *, overwrite: bool) -> None:
    """Writes the page at once or not at all.

    Raises:
        MergeError: it cannot be written.
    """
    data = page(report).encode()
    try:
        files = {FILE: FileLayout(len(data), ((0, data),))}
        with Output(path, files, overwrite=overwrite) as output:
            output.commit()
    except MergeError as error:
        what = f"{error.what}; the average itself was written"
        raise MergeError(what, where=error.where, hint=error.hint) from None


def page(report: Report) -> str:
    """The page of a merge that ran. Nothing in a name is HTML, a formula or a control."""
    body = "\n".join(_sections(report))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>merge-avg: {_text(report['output'])}</title>\n<style>{_CSS}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _sections(report: Report) -> Iterator[str]:
    count, agreement = averaged_count(report), report["agreement"]
    outputs = report["outputs"]
    where = _text(report["output"]) if len(outputs) == 1 else f"{len(outputs):,} averages"
    yield f"<header><h1>{where}</h1>"
    what = f"the average of {count:,} checkpoint{'s' * (count != 1)}"
    version = _text(report["merge_avg"])
    yield f'<p class="sub">{what}, made by merge-avg {version}</p></header>'
    yield f'<div class="tiles">{"".join(_tiles(report))}</div>'
    messages = [("warning", text) for text in report["warnings"]]
    messages += [("note", text) for text in (*exceptions(report), *report["notes"])]
    if messages:
        shown = (
            f'<p class="message {kind}"><b>{kind}:</b> {_text(text)}</p>' for kind, text in messages
        )
        yield f'<section id="messages"><h2>Notes</h2>{"".join(shown)}</section>'
    numbers = [n for n, entry in enumerate(report["inputs"], 1) if entry["averaged"]]
    yield _section("checkpoints", "Checkpoints", _checkpoints(report))
    if agreement is None:
        nothing = "<p>It was not measured, or there are no two checkpoints with matrices.</p>"
        yield _section("agreement", "Agreement", nothing)
    else:
        yield _section("agreement", "Agreement", "".join(_agreement(agreement, numbers)))
        yield _section("least", "Where they agree least", _least(agreement, numbers))
    yield _section("what", "What was done", _facts(report))
    short = dict(report)
    if agreement is not None:
        short["agreement"] = _without_tensors(agreement)
    data = "\n".join(map(_text, json.dumps(short, indent=2).splitlines()))
    yield f"<section><details><summary>The report as JSON</summary><pre>{data}</pre></details>"
    yield "</section>"


def _section(name: str, title: str, content: str) -> str:
    return f'<section id="{name}"><h2>{title}</h2>{content}</section>'


def _tiles(report: Report) -> Iterator[str]:
    agreement = report["agreement"]
    if agreement is not None:
        yield _tile(_known(agreement["mean"]), f"agreement, {_precise(agreement)}")
        if agreement["centred"] is not None:
            centred = agreement["centred"]
            yield _tile(_known(centred["mean"]), f"from the base, {_precise(centred)}")
        yield _tile(_known(agreement["shrinkage"]), "norm of the mean over mean of the norms")
    yield _tile(f"{report['tensors']['averaged']:,}", "tensors averaged")
    yield _tile(f"{report['parameters']:,}", "parameters")
    rate = sizes.shown(report["bytes_read"] / max(report["seconds"], 1e-9))
    yield _tile(sizes.shown(report["bytes_read"]), f"read in {report['seconds']:.2f} s ({rate}/s)")


def _tile(value: str, label: str) -> str:
    return f'<div class="tile"><b>{value}</b><span>{label}</span></div>'


def _precise(agreement: Mapping[str, Any]) -> str:
    if agreement["elements"] == agreement["size"]:
        return "exact"
    return f"&plusmn; {agreement['error']:.1g} by sampling"


def _checkpoints(report: Report) -> str:
    inputs, outputs, agreement = report["inputs"], report["outputs"], report["agreement"]
    centred = agreement["centred"] if agreement is not None else None
    known = [key for key in _KNOWN if any(key in entry for entry in inputs)]
    weights = outputs if len(outputs) <= _COLUMNS else ()
    head = ["#", "checkpoint", "format", "size", *known]
    head += ["weight" if len(outputs) == 1 else f"in {output['path']}" for output in weights]
    head += ["agrees with the others"] if agreement is not None else []
    head += ["by the differences to the base"] if centred is not None else []
    rows = []
    number = 0
    for index, entry in enumerate(inputs):
        size = sizes.shown(entry["bytes"])
        is_base = agreement is not None and entry["path"] == agreement["base"]
        path = entry["path"] + (" (base)" if is_base else "")
        row = [str(index + 1), path, entry["format"], size]
        row += [_known(entry.get(key), "g") for key in known]
        row += [f"{output['weights'][index]:.4g}" for output in weights]
        for found in (agreement, centred):
            if found is not None:
                row.append(_with_error(found["each"][number]) if entry["averaged"] else "")
        number += entry["averaged"]
        rows.append(row)
    return _table(head, rows, left=(1, 2))


def _agreement(agreement: Mapping[str, Any], numbers: Sequence[int]) -> Iterator[str]:
    """Pictures, and how the figures come about."""
    if agreement["elements"] == agreement["size"]:
        looked = "all elements of the matrices were looked at, so the figures are exact"
    else:
        share = f"{agreement['elements']:,} of the {agreement['size']:,} elements"
        looked = (
            f"{share} of each checkpoint's matrices were looked at; the errors are standard errors "
            "of that sample"
        )
    yield (
        "<p>The cosine between the checkpoints over their tensors of two dimensions or more: 1 is "
        f"the same direction, 0 nothing in common; below {LEAST_AGREEMENT:g} the mean is most "
        f"likely no working network. Here {looked}.</p>"
    )
    from merge_avg.report import _charts as charts  # needs matplotlib

    yield '<div class="charts">'
    caption = f"Cosine of each checkpoint with each ({_precise(agreement)} on the mean)"
    yield _figure("heat-map", caption, charts.heat_map(agreement["pairs"], numbers))
    centred = agreement["centred"]
    if centred is not None:
        caption = f"The same by the differences to {_text(agreement['base'])}"
        picture = charts.heat_map(centred["pairs"], numbers)
        yield _figure("heat-map-centred", caption, picture)
    names, distances = _layers(agreement["tensors"])
    if names:
        caption = "Distance of each checkpoint from the mean, over the norm, by layer"
        picture = charts.distances(names, distances, numbers)
        yield _figure("distances", caption, picture, wide=True)
    yield "</div>"


def _figure(name: str, caption: str, picture: str, *, wide: bool = False) -> str:
    kind = ' class="wide"' if wide else ""
    # Two charts of one page have no ids in common, and each says what it is of.
    picture = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", picture)
    picture = picture.replace("<svg ", f'<svg role="img" aria-label="{caption}" ', 1)
    return f'<figure id="{name}"{kind}>{picture}<figcaption>{caption}</figcaption></figure>'


def _least(agreement: Mapping[str, Any], numbers: Sequence[int]) -> str:
    rows = []
    for tensor in least_agreeing(agreement, _LEAST):
        whole = tensor["elements"] == tensor["size"]
        far = max(range(len(numbers)), key=tensor["distances"].__getitem__)
        rows.append(
            [
                tensor["name"],
                _with_error(tensor),
                f"{tensor['size']:,}",
                "all" if whole else f"{tensor['elements']:,}",
                f"{tensor['distances'][far]:.3f} (#{numbers[far]})",
            ]
        )
    head = ["tensor", "agreement", "elements", "looked at", "largest distance from the mean"]
    rest = len(agreement["tensors"]) - len(rows)
    more = f'<p class="sub">{rest:,} more are in the output of --json.</p>' if rest else ""
    return _table(head, rows, left=(0,)) + more


def _facts(report: Report) -> str:
    kept, where = kept_entries(report)
    dtypes = (f"{name} ({count:,})" for name, count in report["dtypes"].items())
    rows = [
        *(["written", output["path"]] for output in report["outputs"]),
        ["template", report["template"]],
        ["tensors", ", ".join(f"{count:,} {kind}" for kind, count in report["tensors"].items())],
        ["dtypes", ", ".join(dtypes)],
        *(["integers", what] for what in integers(report)),
        *([[where, shortened(kept, 40)]] if kept else []),
        ["written bytes", f"{report['bytes_to_write']:,}"],
        ["threads, memory", f"{report['threads']}, {sizes.shown(report['memory'])}"],
        *([name, _setting(value)] for name, value in report["policies"].items()),
    ]
    return _table(["", ""], [list(map(str, row)) for row in rows], left=(0, 1))


def _setting(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(value) if isinstance(value, list | tuple) else str(value or "")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int]) -> str:
    """A table of texts from anywhere; the columns `left` are text, the others numbers."""
    kinds = [' class="t"' if number in left else ' class="n"' for number in range(len(head))]
    cells = "".join(f"<th{kind}>{_text(text)}</th>" for kind, text in zip(kinds, head, strict=True))
    top = f"<thead><tr>{cells}</tr></thead>" if any(head) else ""
    lines = (
        "".join(f"<td{kind}>{_text(text)}</td>" for kind, text in zip(kinds, row, strict=True))
        for row in rows
    )
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll"><table>{top}<tbody>{body}</tbody></table></div>'


def _layers(tensors: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[float]]]:
    """Layers by name, and how far each checkpoint is from the mean there, over the norm.

    A layer is what names have in common up to their first number; what all begin with is left out.
    """
    sums: dict[str, list[float]] = {}
    for tensor in tensors:
        match = _LAYER.match(tensor["name"])
        layer = match[0] if match else tensor["name"].rpartition(".")[0] or tensor["name"]
        square = tensor["norm"] ** 2
        row = sums.setdefault(layer, [0.0] * (1 + len(tensor["distances"])))
        row[0] += square
        for number, distance in enumerate(tensor["distances"], 1):
            row[number] += distance**2 * square
    parts = [layer.split(".")[:-1] for layer in sums]
    start = os.path.commonprefix(parts)  # noqa: RUF071 - of lists, part by part
    names = [".".join(layer.split(".")[len(start) :]) for layer in sums]
    return names, [[(one / (row[0] or 1)) ** 0.5 for one in row[1:]] for row in sums.values()]


def _without_tensors(agreement: Mapping[str, Any]) -> dict[str, Any]:
    short = {key: value for key, value in agreement.items() if key != "tensors"}
    if short.get("centred") is not None:
        short["centred"] = _without_tensors(short["centred"])
    return short


def _with_error(one: Mapping[str, Any]) -> str:
    if one["mean"] is None:
        return ""
    return f"{one['mean']:.3f}" + (f" ± {one['error']:.1g}" if one["error"] else "")


def _known(value: float | None, form: str = ".3f") -> str:
    return "" if value is None else format(value, form)


def _text(value: str) -> str:
    """A line as HTML."""
    return escape(printable(value))
