"""The command. It parses options, shows progress, and turns errors into exit codes.

Exit codes: 0 done, 1 refused or failed, 2 wrong usage, 129 hung up, 130 interrupted,
143 terminated.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from merge_avg._version import __version__
from merge_avg.errors import MergeError, UsageError, failure
from merge_avg.options import IntPolicy, Missing, Mode, Recipe, ResultDtype
from merge_avg.report import sizes
from merge_avg.report.printable import printable

if TYPE_CHECKING:
    from merge_avg.options import Options
    from merge_avg.plan import Job
    from merge_avg.report.report import Report
    from merge_avg.selection import Choice

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
            help="Files (.pt, .pth, .bin, .ckpt, .safetensors), directories, runs that hold many, "
            "or quoted patterns. The first checkpoint is the template: the output is a copy of it "
            "with its weights replaced.",
            metavar="CHECKPOINTS...",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="OUTPUT",
            show_default=False,
            help="The file or directory to write; the ending .safetensors asks for that format. "
            "For several averages with {name}, as in 'avg-{name}.pt'.",
        ),
    ] = None,
    last: Annotated[
        list[int] | None,
        typer.Option(metavar="N", help="The last N by step or epoch; twice for two averages."),
    ] = None,
    best: Annotated[int | None, typer.Option(metavar="N", help="The best N by --metric.")] = None,
    metric: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="What best means, as in val_loss."),
    ] = None,
    mode: Annotated[
        Mode | None, typer.Option(help="Whether lower or higher is better, where not obvious.")
    ] = None,
    steps: Annotated[
        str | None, typer.Option(metavar="A:B[:EVERY]", help="Only those of these steps.")
    ] = None,
    epochs: Annotated[
        str | None, typer.Option(metavar="A:B", help="Only those of these epochs.")
    ] = None,
    min_interval: Annotated[
        int | None, typer.Option(metavar="N", help="Steps that lie between chosen ones at least.")
    ] = None,
    metrics: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A CSV or JSON log with steps, epochs and metrics."),
    ] = None,
    one_best_per_fold: Annotated[
        bool,
        typer.Option("--one-best-per-fold", help="The best of each of the folders, as in fold*/."),
    ] = False,
    leave_one_out: Annotated[
        bool,
        typer.Option("--leave-one-out", help="An average without each checkpoint, in one reading."),
    ] = False,
    prefixes: Annotated[
        bool,
        typer.Option("--prefixes", help="Averages of the first 2, 3, ... N, in one reading."),
    ] = False,
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights",
            "-w",
            metavar="W,W,...",
            help="One number a checkpoint, as in 0.5,0.3,0.2; they need not sum to one.",
        ),
    ] = None,
    weighting: Annotated[
        str | None,
        typer.Option(
            metavar="SCHEME",
            help="Weights by order, the oldest first: uniform, linear, ema:DECAY, 1-sqrt, metric.",
        ),
    ] = None,
    phema: Annotated[
        float | None,
        typer.Option(
            metavar="SIGMA", help="Weights that make an EMA of this width from stored ones (EDM2)."
        ),
    ] = None,
    no_normalize: Annotated[
        bool,
        typer.Option(
            "--no-normalize",
            help="Do not divide by the sum of the weights, which may then be negative.",
        ),
    ] = False,
    soup: Annotated[
        Recipe | None,
        typer.Option(help="Add checkpoints one at a time, and keep what does not hurt --eval."),
    ] = None,
    evaluation: Annotated[
        str | None,
        typer.Option(
            "--eval",
            metavar="COMMAND",
            help="Prints the score of the checkpoint {}, as its last number.",
        ),
    ] = None,
    eval_json: Annotated[
        str | None,
        typer.Option(metavar="KEY", help="The score is this key of the JSON that --eval prints."),
    ] = None,
    dtype: Annotated[
        ResultDtype | None,
        typer.Option(
            help="Convert the averaged float tensors; template: where checkpoints differ in dtype."
        ),
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
    min_agreement: Annotated[
        float | None,
        typer.Option(
            metavar="X", help="Refuse checkpoints whose matrices agree less (mean cosine)."
        ),
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(
            metavar="CHECKPOINT",
            help="What the others were fine-tuned from: say how far what they learned agrees.",
        ),
    ] = None,
    no_agreement: Annotated[
        bool, typer.Option("--no-agreement", help="Do not measure how far checkpoints agree.")
    ] = False,
    no_hashes: Annotated[
        bool, typer.Option("--no-hashes", help="Do not record hashes of the checkpoints.")
    ] = False,
    page: Annotated[
        Path | None,
        typer.Option(
            "--report",
            metavar="FILE.html",
            help="Write a page of what was done, with the agreement as pictures.",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the output if it exists.")
    ] = False,
    inspect: Annotated[
        bool,
        typer.Option("--inspect", help="List what is in the checkpoints, and average nothing."),
    ] = False,
    verifying: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Derive what earlier merges wrote from its inputs again, and compare every byte.",
        ),
    ] = False,
    inputs: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where the inputs are that --verify looks for."),
    ] = None,
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
    from merge_avg.engine import read_ahead  # after --help has had its answer
    from merge_avg.options import Criteria, Options, Series, Weighting, parse_range
    from merge_avg.plan import prepare
    from merge_avg.report.report import describe
    from merge_avg.selection import choose

    if inspect:
        _inspect(checkpoints, key, as_json=as_json)
        return
    if verifying:
        limit = None if max_memory is None else sizes.parse(max_memory)
        _verify(checkpoints, inputs, threads, limit, as_json=as_json, quiet=quiet)
        return
    if output is None:
        raise UsageError("there is no output", hint="name one, as in -o merged.pt")
    lasts = tuple(last or ())
    options = Options(
        normalize=not no_normalize,
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
        threads=threads,
        max_memory=None if max_memory is None else sizes.parse(max_memory),
        max_shard_size=None if max_shard_size is None else sizes.parse(max_shard_size),
        min_agreement=min_agreement,
        base=base,
        agreement=not no_agreement,
        hashes=not no_hashes,
    )
    criteria = Criteria(
        last=max(lasts, default=None),
        best=best,
        metric=metric,
        mode=mode,
        steps=None if steps is None else parse_range(steps),
        epochs=None if epochs is None else parse_range(epochs),
        min_interval=min_interval,
        metrics_file=metrics,
        one_best_per_fold=one_best_per_fold,
    )
    choice = choose(
        checkpoints,
        output,
        criteria,
        Series(lasts=lasts, leave_one_out=leave_one_out, prefixes=prefixes),
        Weighting(
            weights=None if weights is None else weights.split(","), scheme=weighting, sigma=phema
        ),
    )
    if (soup is not None or evaluation is not None) and not dry_run:
        if page is not None or base is not None:
            raise UsageError("a soup has no report", hint="leave out --report and --base")
        if weights or weighting or phema or no_normalize or template or dtype:
            hint = (
                "leave out --weights, --weighting, --phema, --no-normalize, --template and --dtype"
            )
            raise UsageError("a soup is the plain mean of its members", hint=hint)
        _soup(choice, options, soup, evaluation, eval_json, mode, as_json=as_json, quiet=quiet)
        return
    job = prepare(choice.paths, choice.outputs, options)
    if page is not None:
        from merge_avg.report import html

        html.refuse(page, job, dry_run=dry_run)
    result = None
    if not dry_run:
        read_ahead(job)
        with _progress(job, quiet=quiet) as advance:
            from merge_avg.engine import run

            result = run(job, advance)
    report = describe(job, result, __version__, choice)
    if page is not None:
        from merge_avg.report.html import write

        write(page, report, overwrite=overwrite)
    _tell(report, job, as_json=as_json, quiet=quiet)


def _tell(report: Report, job: Job, *, as_json: bool, quiet: bool) -> None:
    """Shows a report to a person, to what reads stdout, and to the page of a CI job."""
    if not quiet and sys.stderr.isatty() and not report["dry_run"]:
        from merge_avg.report.terminal import show

        try:
            show(report)
        except OSError:  # the terminal has gone; the merge went well
            _drop(sys.stderr)
    elif not quiet:
        from merge_avg.report.report import lines

        for line in lines(report):
            _say(line)
    if as_json:
        _print(_json(report))
    elif not report["dry_run"]:
        _print("\n".join(printable(str(output.path)) for output in job.outputs))
    if not report["dry_run"]:
        _summarise(report)


def _inspect(checkpoints: Sequence[Path], key: str | None, *, as_json: bool) -> None:
    """Prints what is in checkpoints."""
    from merge_avg.report.inspect import contents, lines

    found = [contents(path, key) for path in checkpoints]
    if as_json:
        _print(_json(found))
    else:
        _print("\n".join(printable(line) for f in found for line in lines(f)))


def _verify(
    outputs: Sequence[Path],
    inputs: Path | None,
    threads: int | None,
    max_memory: int | None,
    *,
    as_json: bool,
    quiet: bool,
) -> None:
    """Verifies outputs of earlier merges."""
    from merge_avg.verify import verify_output

    found = []
    for output in outputs:
        one = verify_output(output, inputs, threads, max_memory)
        paths = [str(path) for path in one.inputs]
        found.append({"output": str(one.output), "inputs": paths, "bytes": one.nbytes})
        if not quiet:
            hashes = "; their hashes are as recorded" if one.hashed else ""
            what = f"all {one.nbytes:,} bytes are what its {len(paths)} inputs give{hashes}"
            _say(f"{output}: {what}")
    if as_json:
        _print(_json(found))
    else:
        _print("\n".join(printable(str(output)) for output in outputs))


def _soup(
    choice: Choice,
    options: Options,
    recipe: Recipe | None,
    command: str | None,
    key: str | None,
    mode: Mode | None,
    *,
    as_json: bool,
    quiet: bool,
) -> None:
    """Makes a soup, and shows how."""
    from merge_avg.cli._soup import described, watched
    from merge_avg.engine import run
    from merge_avg.plan import prepare
    from merge_avg.soup import greedy, score

    if recipe is None or command is None or mode is None:
        hint = "write --soup greedy --eval 'python eval.py {}' --mode max"
        raise UsageError("a soup needs --soup, --eval and --mode", hint=hint)
    if len(choice.outputs) > 1:
        raise UsageError("a soup is one output", hint="leave out --leave-one-out or --prefixes")
    (output,) = choice.outputs

    def merge(paths: Sequence[Path], output: Path, *, overwrite: bool = False) -> None:
        alone = replace(options, min_agreement=None, agreement=False, overwrite=overwrite)
        run(prepare(paths, output, alone))

    with watched(_say, quiet=quiet) as show:
        soup = greedy(
            choice.paths,
            output,
            evaluate=lambda path: score(command, path, key),
            merge=merge,
            mode=mode,
            command=command if key is None else f"{command} [{key}]",
            overwrite=options.overwrite,
            show=show,
        )
    if not quiet:
        _say(f"{len(soup.members)} of {len(choice.paths)} checkpoints, score {soup.score:.10g}")
    _print(_json(described(soup)) if as_json else printable(str(soup.output)))


def _summarise(report: Report) -> None:
    """Adds a summary to the page of a GitHub Actions job."""
    page = os.environ.get("GITHUB_STEP_SUMMARY")
    if page:
        from merge_avg.report.markdown import append, markdown

        try:
            append(Path(page), markdown(report))
        except MergeError as error:  # the merge itself went well
            _say(f"note: {error}")


@contextlib.contextmanager
def _progress(job: Job, *, quiet: bool) -> Iterator[Callable[[int], None] | None]:
    """A bar where a person watches, a line elsewhere."""
    if quiet:
        yield None
        return
    what = f"averaging {len(job.averaged)} checkpoints, {sizes.shown(job.nbytes)}"
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
    with contextlib.suppress(OSError):  # the terminal has gone; the merge goes on
        bar.start()
    try:
        task = bar.add_task(f"averaging {len(job.averaged)} checkpoints", total=job.nbytes)
        yield lambda nbytes: bar.advance(task, nbytes)
    finally:
        with contextlib.suppress(OSError):
            bar.stop()


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=True, indent=2).replace("##[", "#\\u0023[")


def _say(text: str) -> None:
    """Prints a line to stderr; names keep their letters, controls are escaped."""
    try:
        print(printable(text), file=sys.stderr, flush=True)
    except OSError:  # nobody listens; the merge goes on
        _drop(sys.stderr)


def _print(text: str) -> None:
    """Prints the result. A reader that has gone away is no failure of the merge."""
    try:
        print(text, flush=True)
    except OSError as error:
        _drop(sys.stdout)
        if not isinstance(error, BrokenPipeError):
            what = f"all is done, but stdout cannot be written ({error.strerror})"
            raise MergeError(what) from None


def _drop(stream: TextIO) -> None:
    """Sends the rest to nowhere: Python would try again at its end, and fail."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


def _fail(error: MergeError) -> None:
    where = "" if error.where is None else f"{error.where}: "
    _say(f"error: {where}{error.what}")
    if error.hint:
        _say(f"hint: {error.hint}")


class _Stopped(SystemExit):
    """A signal asked for the end."""


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """Lets signals end the command in good order; what was ignored (nohup) stays so."""
    code = 0

    def stop(signum: int, _: FrameType | None) -> None:
        nonlocal code
        code = code or 128 + signum
        # Where Python calls back from C an exception is lost: so again, until it is on its way.
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        handled = sys.exception()
        while handled is not None:
            if isinstance(handled, _Stopped):
                return
            handled = handled.__context__
        raise _Stopped(code)

    def lost(what: sys.UnraisableHookArgs) -> None:
        if not isinstance(what.exc_value, _Stopped):
            hook(what)

    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    caught = [one for one in numbers if signal.getsignal(one) is not signal.SIG_IGN]
    before = {one: signal.signal(one, stop) for one in (signal.SIGALRM, *caught)}
    for one in before:
        atexit.register(signal.signal, one, signal.SIG_IGN)  # while Python ends
    hook, sys.unraisablehook = sys.unraisablehook, lost
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.unraisablehook = hook
        for one, handler in before.items():
            signal.signal(one, signal.SIG_DFL if handler is None else handler)


def _streams() -> None:
    """Opens the standard streams that are closed: a file of the merge would get their place."""
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest that is free
        if getattr(sys, name) is None:
            setattr(sys, name, open(fd, "w" if fd else "r", closefd=False))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def main() -> None:
    """The console script."""
    try:
        with _signals():
            _command()
    except KeyboardInterrupt:  # before the handler was there
        sys.exit(130)


def _command() -> None:
    """The command, whose errors are a message and an exit code."""
    try:
        _streams()
        app(prog_name="merge-avg")
    except UsageError as error:
        _fail(error)
        sys.exit(2)
    except MergeError as error:
        _fail(error)
        sys.exit(1)
    except OSError as error:
        _fail(failure(error))
        sys.exit(1)
    except MemoryError:
        _fail(MergeError("there is not enough memory", hint="lower --max-memory or --threads"))
        sys.exit(1)
    except _Stopped as stop:
        _say("stopped; each output is as it was, or complete")
        sys.exit(stop.code)


def entry() -> None:
    """The console script: `main`, and a short way out where all went well."""
    # Torch tells whoever imports it that NumPy is not installed. It is not needed.
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")
    try:
        main()
    except SystemExit as stop:
        if stop.code:
            raise
    # Taking down torch's modules one by one would take longer than many a merge.
    atexit._run_exitfuncs()  # noqa: SLF001 - as multiprocessing does for its children
    os._exit(0)
