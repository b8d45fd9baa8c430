"""A soup in the making, for a person: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from merge_avg.report.printable import printable
from merge_avg.soup import Soup, Trial


@contextlib.contextmanager
def watched(say: Callable[[str], None], *, quiet: bool) -> Iterator[Callable[[Trial], None]]:
    """Shows evaluations on stderr as they are told; `say` prints a line there."""
    if quiet:
        yield lambda _: None
    elif not sys.stderr.isatty():
        yield lambda trial: say(line(trial))
    else:
        table = Table("", "checkpoint", "members", "score", "")
        console = Console(file=sys.stderr, force_terminal=True)
        with Live(table, console=console, refresh_per_second=4):
            yield lambda trial: table.add_row(*map(Text, _cells(trial)))


def line(trial: Trial) -> str:
    """An evaluation as one line."""
    number, name, members, score, verdict = _cells(trial)
    what = name if len(trial.members) == 1 else f"+ {name} ({members} members)"
    return f"[{number}] {what}: {score}{', ' + verdict if verdict else ''}"


def described(soup: Soup) -> dict[str, object]:
    """The soup as plain values."""
    return {
        "output": str(soup.output),
        "soup": "greedy",
        "members": [str(path) for path in soup.members],
        "score": soup.score,
        "singles": [{"path": str(path), "score": score} for path, score in soup.singles.items()],
        "trials": [
            {
                "members": [str(path) for path in trial.members],
                "score": trial.score,
                "kept": trial.kept,
                "remembered": trial.remembered,
            }
            for trial in soup.trials
        ],
    }


def _cells(trial: Trial) -> tuple[str, ...]:
    single = len(trial.members) == 1
    verdict = ("best so far" if trial.kept else "") if single else "kept" if trial.kept else "left"
    verdict += " (from the log)" if trial.remembered else ""
    name = printable(str(trial.members[-1]))
    number, members = f"{trial.number}/{trial.total}", str(len(trial.members))
    return number, name, members, f"{trial.score:.10g}", verdict.strip()
