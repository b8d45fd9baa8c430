"""What a merge did, for a person at a terminal: tables. Elsewhere report.lines says the same."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from merge_avg.agreement import LEAST_AGREEMENT
from merge_avg.report import sizes
from merge_avg.report.printable import printable
from merge_avg.report.report import (
    Report,
    averaged_count,
    exceptions,
    integers,
    kept_entries,
    least_agreeing,
    precision,
    shortened,
)

_KNOWN = ("step", "epoch", "metric")
_BAR = 10
_NARROW = 60  # columns, below which bars and what is known of checkpoints are left out


def show(report: Report, console: Console | None = None) -> None:
    """Prints the report of a merge that ran. Names in it stay names.

    Args:
        report: of `report.describe`.
        console: where to; by default stderr.
    """
    console = console or _console()
    count, outputs = averaged_count(report), report["outputs"]
    where = report["output"] if len(outputs) == 1 else f"{len(outputs)} averages"
    console.print(Text(f"averaged {count} checkpoint{'s' * (count != 1)} into {printable(where)}"))
    plain = console.is_dumb_terminal or console.options.ascii_only
    console.print(
        _checkpoints(report, narrow=console.width < _NARROW, bars="#." if plain else "━╌")
    )
    about = Table(box=None, show_header=False, padding=(0, 1, 0, 0))
    about.add_column(style="dim", no_wrap=True)
    about.add_column(overflow="fold")
    for label, value, style in _facts(report):
        about.add_row(label, Text(printable(value), style))
    console.print(about)


def _console() -> Console:
    """Stderr, with the columns of its terminal, which rich does not ask for where TERM is dumb."""
    width = height = None
    with contextlib.suppress(OSError):
        width, height = (extent or None for extent in os.get_terminal_size(sys.stderr.fileno()))
    return Console(file=sys.stderr, force_terminal=True, width=width, height=height)


def _checkpoints(report: Report, *, narrow: bool, bars: str) -> Table:
    """A row for each checkpoint: its weights, how far it agrees with the others."""
    inputs, outputs = report["inputs"], report["outputs"]
    agreement = report.get("agreement")
    centred = agreement["centred"] if agreement else None
    known = [key for key in _KNOWN if not narrow and any(key in entry for entry in inputs)]
    columns = [*known, *(["weight"] if len(outputs) == 1 else [])]
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("checkpoint", overflow="fold", ratio=1 if narrow else None)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    if agreement:
        table.add_column("agrees", justify="right", no_wrap=True)
        if not narrow:
            table.add_column("", no_wrap=True)
    if centred:
        table.add_column("from base", justify="right", no_wrap=not narrow)
    ours, theirs = _by_path(agreement), _by_path(centred)
    for number, entry in enumerate(inputs):
        is_base = agreement and entry["path"] == agreement["base"]
        cells = [Text(printable(entry["path"]) + (" (base)" if is_base else ""))]
        cells += [Text(_number(entry.get(key))) for key in known]
        if len(outputs) == 1:
            cells.append(Text(_number(outputs[0]["weights"][number], 4)))
        if agreement:
            value = ours.get(entry["path"])
            cells.append(Text("" if value is None else f"{value:.3f}", _style(value)))
            if not narrow:
                cells.append(Text(_bar(value, bars), _style(value)))
        if centred:
            away = theirs.get(entry["path"])
            cells.append(Text("" if away is None else f"{away:.3f}"))
        table.add_row(*cells)
    return table


def _facts(report: Report) -> Iterator[tuple[str, str, str]]:
    """What there is to say: a label, a text, its style."""
    tensors, agreement = report["tensors"], report.get("agreement")
    dtypes = ", ".join(report["dtypes"])
    yield "tensors", f"{tensors['averaged']:,} averaged ({dtypes})", ""
    yield from (("integers", what, "") for what in integers(report))
    yield "parameters", f"{report['parameters']:,}", ""
    rate = sizes.shown(report["bytes_read"] / max(report["seconds"], 1e-9))
    read = sizes.shown(report["bytes_read"])
    yield "read", f"{read} in {report['seconds']:.2f} s ({rate}/s)", ""
    if len(report["outputs"]) > 1:
        for output in report["outputs"]:
            weights = ", ".join(_number(weight, 4) for weight in output["weights"])
            yield "written", f"{output['path']} (weights {weights})", ""
    if agreement:
        style = _style(agreement["mean"])
        yield "agreement", f"{agreement['mean']:.3f} ({precision(agreement)})", style
        centred = agreement["centred"]
        if centred:
            what = f"{centred['mean']:.3f} ({precision(centred)}), by the differences to "
            yield "from base", what + agreement["base"], ""
        elif agreement["base"]:
            yield "from base", f"no two checkpoints differ from {agreement['base']}", ""
        for tensor in least_agreeing(agreement, 3):
            if tensor["mean"] < agreement["mean"] - 0.05:
                yield "least", f"{tensor['mean']:.3f} {tensor['name']}", ""
    kept, where = kept_entries(report)
    if kept:
        yield "kept" if report["whole"] else "left out", f"{shortened(kept)} ({where})", ""
    yield from (("", what, "") for what in exceptions(report))
    yield from (("note", note, "") for note in report["notes"])
    yield from (("warning", warning, "yellow") for warning in report["warnings"])


def _by_path(agreement: Mapping[str, Any] | None) -> dict[str, float | None]:
    return {one["path"]: one["mean"] for one in agreement["each"]} if agreement else {}


def _number(value: float | None, digits: int = 6) -> str:
    return "" if value is None else f"{value:.{digits}g}"


def _bar(value: float | None, signs: str) -> str:
    if value is None:
        return ""
    full = round(_BAR * max(value, 0.0))
    return signs[0] * full + signs[1] * (_BAR - full)


def _style(value: float | None) -> str:
    if value is None:
        return ""
    return "green" if value >= LEAST_AGREEMENT else "yellow"
