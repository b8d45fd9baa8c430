"""The command soup: a line for each evaluation, and on a terminal one for that which runs."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from merge_avg.cli._github import summarize
from merge_avg.cli._parameters import Display
from merge_avg.cli._process import collect_from_here, print_result, say
from merge_avg.engine import run
from merge_avg.options import Mode, Options
from merge_avg.plan import prepare
from merge_avg.report import printable
from merge_avg.selection import Choice
from merge_avg.soup import Soup, Trial, greedy, score


def make_soup(
    choice: Choice,
    options: Options,
    command: str,
    key: str | None,
    mode: Mode,
    display: Display,
) -> None:
    """Make a soup of the chosen checkpoints by a command's score, and show how."""
    (output,) = choice.outputs
    collect_from_here()

    # The score decides about a member. How far members agree is nowhere shown.
    alone = replace(options, agreement=False)

    def merge(paths: Sequence[Path], output: Path, *, overwrite: bool = False) -> None:
        # Scanned anew each time: an evaluation may have written beside the weights meanwhile.
        run(prepare(paths, output, replace(choice.templated(alone, paths), overwrite=overwrite)))

    prepare(choice.paths, output, alone)  # what forbids their mean shows before an evaluation
    with _shown(display.quiet) as (now, show):
        soup = greedy(
            choice.paths,
            output,
            evaluate=lambda path: score(command, path, key),
            merge=merge,
            mode=mode,
            # By this name the log knows the evaluation: with another key it is another one.
            command=command if key is None else f"{command} [{key}]",
            overwrite=options.overwrite,
            begin=lambda paths, number, total: now(
                f"[{number}/{total}] evaluating {_named(paths)}"
            ),
            show=show,
        )
    made = f"{len(soup.members)} of {len(choice.paths)} checkpoints, score {soup.score:.10g}"
    if not display.quiet:
        say(made)
    told = [("written", str(soup.output)), ("evaluated", f"{command}, {mode} is best")]
    head = "", "checkpoint", "score", ""
    summarize(f"a soup of {made}", told, [head, *map(_cells, soup.trials)])
    print_result(display.as_json, lambda: _as_json(soup), [str(soup.output)])


@contextlib.contextmanager
def _shown(quiet: bool) -> Iterator[tuple[Callable[[str], None], Callable[[Trial], None]]]:
    """Yield a function that shows on stderr what runs now, and one that shows an evaluation."""
    if quiet:
        yield (lambda _: None), (lambda _: None)
    elif not sys.stderr.isatty():
        yield say, _say
    else:
        from rich import progress as bars
        from rich.console import Console

        columns = bars.TextColumn("{task.description}", markup=False), bars.TimeElapsedColumn()
        console = Console(file=sys.stderr, force_terminal=True)
        with bars.Progress(*columns, console=console, transient=True) as running:
            task = running.add_task("", visible=False)

            def now(what: str) -> None:
                with contextlib.suppress(OSError):  # the terminal is gone
                    running.reset(task, description=printable(what), visible=True)

            def show(trial: Trial) -> None:
                running.update(task, visible=False)
                _say(trial)

            yield now, show


def _say(trial: Trial) -> None:
    number, what, score, verdict = _cells(trial)
    say(f"[{number}] {what}: {score}{', ' + verdict if verdict else ''}")


def _named(members: Sequence[Path]) -> str:
    newest, count = str(members[-1]), len(members)
    return newest if count == 1 else f"+ {newest} ({count} members)"


def _cells(trial: Trial) -> tuple[str, ...]:
    """Return an evaluation as its number, the members, the score and a verdict."""
    single = len(trial.members) == 1
    verdict = ("best so far" if trial.kept else "") if single else "kept" if trial.kept else "left"
    verdict = (verdict + " (from the log)" * trial.remembered).strip()
    number, score = f"{trial.number}/{trial.total}", f"{trial.score:.10g}"
    return number, _named(trial.members), score, verdict


def _as_json(soup: Soup) -> dict[str, object]:
    shown = ("members", "score", "kept", "remembered")
    return {
        "output": soup.output,
        "soup": "greedy",
        "members": soup.members,
        "score": soup.score,
        "singles": [{"path": path, "score": score} for path, score in soup.singles.items()],
        "trials": [{name: getattr(trial, name) for name in shown} for trial in soup.trials],
    }
