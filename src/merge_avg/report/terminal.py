"""The report as tables, on stderr where it is a terminal."""

from __future__ import annotations

import contextlib
import os
import sys

from rich.console import Console
from rich.table import Table
from rich.text import Text

from merge_avg.report import printable
from merge_avg.report.text import columns, facts, headline, left_out, shortened, style
from merge_avg.report.values import KNOWN, Report

_BAR = 10
# Below so many columns, bars and what is known of checkpoints are left out: names need the room.
_NARROW = 60
_COLOURS = {"": "", "good": "green", "doubtful": "yellow"}


def show(report: Report, console: Console | None = None) -> None:
    """Print the report of a merge that ran, by default on stderr. Names in it stay names."""
    if console is None:
        # As wide as its terminal, which rich does not ask for where TERM is dumb. An extent of 0 is
        # that of a terminal which nobody has told its size.
        width = height = None
        with contextlib.suppress(OSError):
            width, height = (extent or None for extent in os.get_terminal_size(sys.stderr.fileno()))
        console = Console(file=sys.stderr, force_terminal=True, width=width, height=height)
    # Everything is printed as `Text`: a plain str would be searched for markup and emoji.
    console.print(Text(printable(headline(report))))
    console.print(_checkpoints(report, console))
    about = Table(box=None, show_header=False, padding=(0, 1, 0, 0))
    about.add_column(style="dim", no_wrap=True)
    about.add_column(overflow="fold")
    others = left_out(report)
    if others:
        about.add_row("others", Text(printable("; ".join(f"{n:,} {why}" for why, n in others))))
    for fact in facts(report):
        about.add_row(fact.label, Text(printable(fact.value), _COLOURS[fact.style]))
    console.print(about)


def _checkpoints(report: Report, console: Console) -> Table:
    """Return a row for each checkpoint: its weight, and how far it agrees with the others."""
    narrow = console.width < _NARROW
    full, rest = "#." if console.is_dumb_terminal or console.options.ascii_only else "━╌"
    hidden = ("format", "size", *(KNOWN if narrow else ()))
    # Rich folds a cell rather than the table, so what may be folded is said for each column.
    table = Table(box=None, pad_edge=False, header_style="dim")
    cells: list[list[Text]] = []
    for column in columns(report):
        # The weights in one of several outputs are in its line.
        if column.title in hidden or column.title.startswith("in "):
            continue
        if column.title == "checkpoint":
            table.add_column(column.title, overflow="fold", ratio=1 if narrow else None)
        else:
            # On a narrow terminal the last one may take two lines, rather than be cut.
            fits = not (narrow and column.title == "from base")
            table.add_column(column.title, justify="right", no_wrap=fits)
        # Cosines of differences to a base are small where all is well, so these have no colour.
        means = [mean for mean, _ in column.cosines] if column.title == "agrees" else []
        colours = [_COLOURS[style(mean)] for mean in means] or [""] * len(column.cells)
        cells.append(list(map(Text, map(printable, column.cells), colours)))
        if means and not narrow:
            table.add_column("", no_wrap=True)
            bars = (
                "" if mean is None else (full * round(_BAR * max(mean, 0.0))).ljust(_BAR, rest)
                for mean in means
            )
            cells.append(list(map(Text, bars, colours)))
    rows = [list(row) for row in zip(*cells, strict=True)]
    blank = [Text("")] * (len(cells) - 1)
    for row in shortened(rows, lambda more: [Text(f"... {more:,} more ..."), *blank]):
        table.add_row(*row)
    return table
