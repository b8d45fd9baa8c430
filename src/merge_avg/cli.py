"""The command. It parses options, shows progress, and turns errors into exit codes.

Exit codes: 0 done, 1 refused or failed, 2 wrong usage, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from merge_avg import __version__, sizes
from merge_avg.errors import MergeError, UsageError
from merge_avg.policies import FloatName, IntPolicy, Missing

if TYPE_CHECKING:
    from merge_avg.prepare import Job

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"merge-avg {__version__}")
        raise typer.Exit


@app.command(context_settings={"help_option_names": ["-h", "--help"]})
def merge(
    checkpoints: Annotated[
        list[Path],
        typer.Argument(
            help="Files (.pt, .pth, .bin, .ckpt, .safetensors) or directories to average. The "
            "first is the template: the output is a copy of it with its weights replaced.",
            metavar="CHECKPOINTS...",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="OUTPUT",
            show_default=False,
            help="The file or directory to write; the ending .safetensors asks for that format.",
        ),
    ],
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights",
            "-w",
            metavar="W,W,...",
            help="One number a checkpoint, as in 0.5,0.3,0.2; they need not sum to one.",
        ),
    ] = None,
    dtype: Annotated[
        FloatName | None, typer.Option(help="Convert the averaged float tensors.")
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Average only this state dict, as in state_dict_ema."),
    ] = None,
    missing: Annotated[
        Missing,
        typer.Option(
            help="Tensors that not every checkpoint has: refuse, keep the template's, or average "
            "where they are."
        ),
    ] = "error",
    include: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN", help="Average only tensors with such names, as in 'enc.*'."
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Keep tensors with such names from the template."),
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(
            metavar="N|PATH",
            help="Copy checkpoint number N, or another one that is not averaged, not the first.",
        ),
    ] = None,
    int_policy: Annotated[
        IntPolicy,
        typer.Option(
            help="Integers that differ: refuse (but counters are the template's), the template's, "
            "the largest, or the rounded mean."
        ),
    ] = "error",
    state_dict: Annotated[
        bool,
        typer.Option("--state-dict", help="Write the averaged state dict and nothing around it."),
    ] = False,
    allow_nonfinite: Annotated[
        bool, typer.Option("--allow-nonfinite", help="Average NaN and infinity too.")
    ] = False,
    device: Annotated[
        str, typer.Option(metavar="DEVICE", help="Where sums are kept: cpu, cuda or cuda:N.")
    ] = "cpu",
    threads: Annotated[
        int | None,
        typer.Option(metavar="N", help="How many threads to use; by default one a core, up to 8."),
    ] = None,
    max_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Memory to take beside torch's own, as in 32MiB; default 64MiB."
        ),
    ] = None,
    max_shard_size: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Write a directory of shards of this size, as in 5GB."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the output if it exists.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done, and write nothing.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the report as one JSON object.")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print errors only, and the output's path.")
    ] = False,
    version: Annotated[  # noqa: ARG001 - its callback does the work
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Average the weights of PyTorch checkpoints, exactly and in bounded memory."""
    from merge_avg.prepare import Options, prepare  # after --help has had its answer
    from merge_avg.report import describe, lines

    options = Options(
        dtype=dtype,
        key=key,
        missing=missing,
        include=include or (),
        exclude=exclude or (),
        template=template,
        int_policy=int_policy,
        state_dict=state_dict,
        allow_nonfinite=allow_nonfinite,
        overwrite=overwrite,
        device=device,
        weights=None if weights is None else weights.split(","),
        threads=threads,
        max_memory=None if max_memory is None else sizes.parse(max_memory),
        max_shard_size=None if max_shard_size is None else sizes.parse(max_shard_size),
    )
    job = prepare(checkpoints, output, options)
    result = None
    if not dry_run:
        with _progress(job, quiet=quiet) as advance:
            from merge_avg.merge import run  # torch, whose import takes seconds

            result = run(job, advance)
    report = describe(job, result, __version__)
    if not quiet:
        _say("\n".join(lines(report)))
    if as_json:
        _print(json.dumps(report, ensure_ascii=True, indent=2))
    elif not dry_run:
        _print(_printable(str(job.output)))


@contextlib.contextmanager
def _progress(job: Job, *, quiet: bool) -> Iterator[Callable[[int], None] | None]:
    """A bar where a person watches, a line elsewhere."""
    if quiet:
        yield None
        return
    what = f"averaging {len(job.layouts)} checkpoints, {sizes.shown(job.nbytes)}"
    if not sys.stderr.isatty():
        _say(what)
        yield None
        return
    from rich import progress
    from rich.console import Console

    bar = progress.Progress(
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
        console=Console(file=sys.stderr, force_terminal=True),
        transient=True,
    )
    with bar:
        task = bar.add_task(f"averaging {len(job.layouts)} checkpoints", total=job.nbytes)
        yield lambda nbytes: bar.advance(task, nbytes)


def _printable(text: str) -> str:
    """Text of a file or its name, without what would steer a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def _say(text: str) -> None:
    """Prints to stderr; names keep their letters, controls are escaped."""
    print(_printable(text), file=sys.stderr, flush=True)


def _print(text: str) -> None:
    """Prints the result. A reader that has gone away is no failure of the merge."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(error: MergeError) -> None:
    where = "" if error.where is None else f"{error.where}: "
    _say(f"error: {where}{error.what}".replace("\n", "\\n"))
    if error.hint:
        _say(f"hint: {error.hint}".replace("\n", "\\n"))


def _terminate(signum: int, _: FrameType | None) -> NoReturn:
    raise SystemExit(128 + signum)


def main() -> None:
    """The console script."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    signal.signal(signal.SIGTERM, _terminate)
    try:
        app(prog_name="merge-avg")
    except UsageError as error:
        _fail(error)
        sys.exit(2)
    except MergeError as error:
        _fail(error)
        sys.exit(1)
    except KeyboardInterrupt:
        _say("interrupted; nothing was written")
        sys.exit(130)
