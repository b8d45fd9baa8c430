"""The merge and the other commands: their parameters, and which task they ask for.

This module is all that --help waits for, so what a task needs is imported when it is called.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from merge_avg._version import __version__
from merge_avg.cli._github import summarize
from merge_avg.cli._help import COMMANDS, Command, words
from merge_avg.cli._parameters import Action, Display, SoupOptions, expanded
from merge_avg.cli._process import collect_from_here, print_result, say
from merge_avg.cli._ranks import joined, leaves_it
from merge_avg.errors import UsageError, counted
from merge_avg.options import Criteria, Options, Series, Weighting, suggested

if TYPE_CHECKING:
    from merge_avg.parts import Ranks

# Errors reach `main`, which knows how to show them; of a crash, Python's own traceback says more
# than one that leaves out what lies in libraries.
app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib import metadata

        from merge_avg.arithmetic import LOOPS

        torch = [one.version for one in metadata.distributions(name="torch")] or ["is missing"]
        loops = f"{'no ' if LOOPS is None else ''}compiled loops"
        typer.echo(f"merge-avg {__version__} (torch {torch[0]}, {loops})")
        raise typer.Exit


@app.command(
    cls=Command, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 1000}
)
@expanded
def command(
    *,
    checkpoints: Annotated[
        list[str],
        typer.Argument(
            metavar="CHECKPOINT...",
            autocompletion=words,
        ),
    ],
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            metavar="OUTPUT",
            help="File or directory to write; its ending sets the format. For several: "
            "'avg-{name}.pt'.",
        ),
    ] = None,
    series: Series,
    criteria: Criteria,
    weighting: Weighting,
    options: Options,
    soup: SoupOptions,
    action: Action,
    display: Display,
    # Eager, so that it needs no checkpoints.
    version: Annotated[  # noqa: ARG001 - its callback does the work
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Average the weights of PyTorch checkpoints, exactly and in bounded memory.

    CHECKPOINT is a file (.pt, .pth, .bin, .ckpt, .safetensors), a directory, a run, or a quoted
    pattern. The output is a copy of the newest, or of the first where that is not known, with other
    weights. verify, inspect and soup are commands; write ./verify for a checkpoint of that name.
    """
    if "" in (*checkpoints, output, options.template):
        raise UsageError("a path is empty", hint="is a variable of the shell not set?")
    single = "soup" if soup.recipe else "inspect" if action.inspect or action.verify else None
    if single and leaves_it(single):
        return
    if action.inspect:
        _inspect(checkpoints, options.key, display)
    elif action.verify:
        _verify(checkpoints, action.inputs, options, display)
    elif output is None:
        raise UsageError("there is no output", hint=_instead(checkpoints[0]))
    else:
        with joined() as crew:
            tasks = series, criteria, weighting, options, soup, action, display
            _make(checkpoints, output, *tasks, crew)


def _make(
    checkpoints: list[str],
    output: str,
    series: Series,
    criteria: Criteria,
    weighting: Weighting,
    options: Options,
    soup: SoupOptions,
    action: Action,
    display: Display,
    crew: Ranks | None,
) -> None:
    """Choose checkpoints, and average them or make a soup of them."""
    from merge_avg.cli._usage import refuse_misfits
    from merge_avg.plan import refuse_inputs, refuse_values
    from merge_avg.selection import choose, refuse_place, refuse_trivial

    refuse_misfits(series, criteria, weighting, options, soup, action, display)
    refuse_values(options)
    mode, command = criteria.mode, soup.evaluation
    if command is not None and criteria.best is None and not criteria.one_best_per_fold:
        criteria = replace(criteria, mode=None)  # it is that of the score only
    criteria = replace(criteria, last=max(series.lasts, default=None))
    listed = bool(options.weights_for)
    choice = choose(checkpoints, Path(output), criteria, series, weighting, listed=listed)
    refuse_place(output, choice, options)
    if not criteria.allow_trivial:
        refuse_trivial(choice)
    if criteria.metrics_file is not None:
        pages = display.page, os.environ.get("GITHUB_STEP_SUMMARY")
        for path in (*choice.outputs, *(Path(one) for one in pages if one)):
            refuse_inputs(path, (), [criteria.metrics_file])
    # A dry run evaluates nothing: it shows what a soup would choose from.
    if command is not None and mode is not None and not action.dry_run:
        from merge_avg.cli._soup import make_soup

        make_soup(choice, options, command, soup.eval_json, mode, display)
    else:
        from merge_avg.cli._merge import merge

        merge(choice, options, display, action.dry_run, crew)


def _instead(word: str) -> str | None:
    """Return the hint for a line without an output, which may be a misspelt command's."""
    if word in COMMANDS:
        return f"write the command first: merge-avg {word} ..."
    near = () if os.path.lexists(word) else COMMANDS
    return suggested(word, near, "name one, as in -o merged.pt")


def _inspect(checkpoints: list[str], key: str | None, display: Display) -> None:
    from merge_avg.report.inspect import as_json, contents, lines
    from merge_avg.selection import expand

    found = [contents(path, key) for place in expand(checkpoints) for path in place.checkpoints]
    text = (line for one in found for line in lines(one))
    print_result(display.as_json, lambda: [as_json(one) for one in found], text)


def _verify(outputs: list[str], inputs: Path | None, options: Options, display: Display) -> None:
    from merge_avg.verify import verify_output

    collect_from_here()
    found, told = [], []
    for output in outputs:
        one = verify_output(output, inputs, options.threads, options.max_memory)
        found.append({"output": one.output, "inputs": one.inputs, "bytes": one.nbytes})
        told.append(f"{output}: {one.said}")
        if not display.quiet:
            say(told[-1])
    summarize(f"{counted(len(told), 'output')} verified", [("verified", line) for line in told])
    print_result(display.as_json, lambda: found, map(str, outputs))
