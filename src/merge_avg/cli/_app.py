"""The commands: their parameters, and which of the tasks they ask for.

This module is all that --help waits for, so what a task needs is imported when it is called.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperOption
from typer.main import get_command

from merge_avg._version import __version__
from merge_avg.cli._help import CODES, COMMANDS, EXAMPLES, Command
from merge_avg.cli._parameters import Action, Display, SoupOptions, expanded
from merge_avg.cli._process import print_result, say
from merge_avg.errors import UsageError
from merge_avg.options import Criteria, Options, Series, Weighting, meanings

# Options that work as before the commands were there, and are not in the help.
_FORMER = ("inspect", "verify", "inputs", "recipe", "evaluation", "eval_json")


class _First(Command):
    """The merge, or the command that the first word names. Only that one is built."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        for one in self.params:
            if isinstance(one, TyperOption):
                one.hidden = one.name in _FORMER

    def make_context(self, info_name: str | None, args: list[str], *more: Any, **extra: Any) -> Any:
        """Return the context of what is asked for."""
        if args and args[0] in COMMANDS:
            made = get_command(_application(_TASKS[args[0]], Command, COMMANDS[args[0]]))
            return made.make_context(f"{info_name} {args[0]}", args[1:], *more, **extra)
        return super().make_context(info_name, args, *more, **extra)

    def invoke(self, ctx: Any) -> Any:
        """Run what the context is of."""
        return super().invoke(ctx) if ctx.command is self else ctx.command.invoke(ctx)


def _application(
    function: Callable[..., None], cls: type[Command], usage: str, examples: str = ""
) -> typer.Typer:
    # Errors reach `main`, which knows how to show them; of a crash, Python's own traceback says
    # more than one that leaves out what lies in libraries.
    made = typer.Typer(
        add_completion=cls is _First, rich_markup_mode=None, pretty_exceptions_enable=False
    )
    settings = {"help_option_names": ["-h", "--help"], "max_content_width": 1000}
    epilog = examples + CODES
    made.command(cls=cls, context_settings=settings, options_metavar=usage, epilog=epilog)(function)
    return made


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"merge-avg {__version__}")
        raise typer.Exit


def _started(incomplete: str) -> list[str]:
    """Return the commands that begin so; where nothing is typed, the shell offers files."""
    return [name for name in COMMANDS if incomplete and name.startswith(incomplete)]


_Checkpoints = Annotated[
    list[str],
    typer.Argument(
        help="Files (.pt, .pth, .bin, .ckpt, .safetensors), directories, runs, or quoted "
        "patterns. The output is a copy of the first with other weights.",
        metavar="CHECKPOINT...",
        autocompletion=_started,
    ),
]
_Output = Annotated[
    str | None,
    typer.Option(
        "--output",
        "-o",
        metavar="OUTPUT",
        help="File or directory to write; its ending sets the format. For several: "
        "'avg-{name}.pt'.",
    ),
]


@expanded
def merge(
    *,
    checkpoints: _Checkpoints,
    output: _Output = None,
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

    Other commands are verify, inspect and soup.
    """
    former = [name for name in ("inspect", "verify") if getattr(action, name)]
    former += ["soup"] if soup.recipe is not None else []
    if former and not display.quiet:
        say(f"note: --{former[0]} is now a command, merge-avg {former[0]}; the option will go")
    if action.inspect:
        _inspect(checkpoints, options.key, display)
    elif action.verify:
        _verify(checkpoints, action.inputs, options, display)
    else:
        _merge(checkpoints, output, criteria, series, weighting, options, soup, action, display)


@partial(expanded, only={"inputs", "threads", "max_memory", "as_json", "quiet"})
def verify(
    *,
    outputs: Annotated[
        list[str], typer.Argument(help="Outputs of earlier merges.", metavar="OUTPUT...")
    ],
    action: Action,
    options: Options,
    display: Display,
) -> None:
    """Derive outputs of earlier merges from their inputs again, and compare every byte."""
    _verify(outputs, action.inputs, options, display)


@partial(expanded, only={"key", "as_json"})
def inspect(
    *,
    checkpoints: Annotated[
        list[str],
        typer.Argument(help="Files and directories, of merge-avg or not.", metavar="CHECKPOINT..."),
    ],
    options: Options,
    display: Display,
) -> None:
    """List what is in checkpoints, and whether and why each tensor would be averaged."""
    _inspect(checkpoints, options.key, display)


# A soup is the plain mean of its members, in one output, and has no report.
_NOT_OF_A_SOUP = {
    *("scheme", "weights", "sigma", "normalize", "template", "dtype", "base", "min_agreement"),
    *("agreement", "page", "leave_one_out", "prefixes", "recipe", "inspect", "verify", "inputs"),
}
_DECLARED = (Series, Criteria, Options, SoupOptions, Action, Display)


@partial(expanded, only={n for cls in _DECLARED for n, _ in meanings(cls)} - _NOT_OF_A_SOUP)
def soup(
    *,
    checkpoints: _Checkpoints,
    output: _Output = None,
    series: Series,
    criteria: Criteria,
    options: Options,
    soup: SoupOptions,
    action: Action,
    display: Display,
) -> None:
    """Average what goes well together: add one checkpoint at a time, and keep what does not hurt.

    A command of yours prints the score of an average, as in --eval 'python eval.py {}'.
    """
    asked = replace(soup, recipe="greedy")
    _merge(checkpoints, output, criteria, series, Weighting(), options, asked, action, display)


_TASKS = {"verify": verify, "inspect": inspect, "soup": soup}
app = _application(merge, _First, "CHECKPOINT... -o OUTPUT [OPTIONS]", EXAMPLES)


def _merge(
    checkpoints: list[str],
    output: str | None,
    criteria: Criteria,
    series: Series,
    weighting: Weighting,
    options: Options,
    soup: SoupOptions,
    action: Action,
    display: Display,
) -> None:
    _refuse_empty(*checkpoints, output, options.template)
    if output is None:
        raise UsageError("there is no output", hint="name one, as in -o merged.pt")
    from merge_avg.selection import choose

    criteria = replace(criteria, last=max(series.lasts, default=None))
    choice = choose(checkpoints, Path(output), criteria, series, weighting)
    if criteria.metrics_file is not None:
        from merge_avg.plan import refuse_inputs

        pages = display.page, os.environ.get("GITHUB_STEP_SUMMARY")
        for path in (*choice.outputs, *(Path(one) for one in pages if one)):
            refuse_inputs(path, (), [criteria.metrics_file])
    # A dry run evaluates nothing: it shows what a soup would choose from.
    if not action.dry_run and (soup.recipe is not None or soup.evaluation is not None):
        from merge_avg.cli._soup import make_soup

        make_soup(choice, weighting, options, soup, criteria.mode, display)
    else:
        from merge_avg.cli._merge import merge

        merge(choice, options, display, action.dry_run)


def _refuse_empty(*paths: object) -> None:
    if "" in paths:
        raise UsageError("a path is empty", hint="is a variable of the shell not set?")


def _inspect(checkpoints: list[str], key: str | None, display: Display) -> None:
    _refuse_empty(*checkpoints)
    from merge_avg.report.inspect import as_json, contents, lines

    found = [contents(path, key) for path in checkpoints]
    text = (line for one in found for line in lines(one))
    print_result(display.as_json, lambda: [as_json(one) for one in found], text)


def _verify(outputs: list[str], inputs: Path | None, options: Options, display: Display) -> None:
    _refuse_empty(*outputs)
    from merge_avg.verify import verify_output

    found = []
    for output in outputs:
        one = verify_output(output, inputs, options.threads, options.max_memory)
        found.append({"output": one.output, "inputs": one.inputs, "bytes": one.nbytes})
        if not display.quiet:
            hashes = "; their hashes are as recorded" if one.hashed else ""
            given = f"what its {len(one.inputs)} inputs give{hashes}"
            say(f"{output}: all {one.nbytes:,} bytes are {given}")
    print_result(display.as_json, lambda: found, map(str, outputs))
