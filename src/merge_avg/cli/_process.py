"""The command as a process: its streams, its signals and its exit codes.

0     done
1     refused or failed: each output is as it was, or the message says what was written
2     wrong usage
3     done, but a report of it was not written, or the outputs may not outlast a power failure
128+n stopped by signal n: 129 hung up, 130 interrupted, 143 terminated
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import itertools
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any, TextIO

from merge_avg import _signals
from merge_avg._version import __version__
from merge_avg.errors import MergeError, RankError, UsageError, WrittenError, failure
from merge_avg.options import instead
from merge_avg.report import printable, shown

_SCHEMA = 1  # of the JSON, as .github/JSON.md has it
_ANSWERED = threading.Event()  # that stdout has got its one result


def entry() -> None:
    """Run `main`, and leave the process the short way if all went well. The console script."""
    # A small merge is mostly imports, which make many objects and hardly any cycles of garbage.
    # Looking for those ninety times would take 3 % of it, and a tenth of a large one's plan.
    gc.disable()
    # Torch tells whoever imports it that NumPy is not installed. It is not needed.
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")
    try:
        main(last=True)
    except SystemExit as stop:
        if stop.code:
            raise
    # Python would take down torch's modules one by one, which takes longer than many a merge. The
    # functions registered with atexit are what is left to do: streams are flushed by each print.
    atexit._run_exitfuncs()  # noqa: SLF001 - as multiprocessing does for its children
    os._exit(0)


def collect_from_here() -> None:
    """Look for cycles of garbage in what is made from now on, if `entry` switched that off."""
    if gc.isenabled():
        return
    gc.freeze()
    gc.set_threshold(100_000)
    gc.enable()


def main(*, last: bool = False) -> None:
    """Run the command, and exit with its code; `last`: the process does nothing else after it."""
    _ANSWERED.clear()
    try:
        with _caught(last):
            try:
                _open_streams()
                from merge_avg.cli._app import app  # whose imports take longest: a signal may come

                app(prog_name="merge-avg")
            except (MergeError, OSError, MemoryError, _Stopped) as error:
                sys.exit(_fail(error))
    except KeyboardInterrupt:  # it came before the handler was installed
        sys.exit(_fail(_Stopped(130)))


class _Stopped(SystemExit):
    """A signal asked the command to end; temporary files are removed as it unwinds."""


@contextlib.contextmanager
def _caught(last: bool) -> Iterator[None]:
    """Make signals end the command by an exception, so that it cleans up."""
    code = 0

    def stop(signum: int, _: FrameType | None) -> None:
        nonlocal code
        code = code or 128 + signum  # the first signal decides, not the alarm that repeats it
        # An exception is lost where C code calls back into Python, as in a finalizer. So this is
        # called again every 0.1 s ...
        _signals.repeat(signum)
        # ... but it must not raise into code that is cleaning up because of the first exception.
        handled = sys.exception()
        while handled is not None:
            if isinstance(handled, _Stopped):
                return
            handled = handled.__context__
        raise _Stopped(code)

    def lost(what: sys.UnraisableHookArgs) -> None:
        # The exception that was lost is about to be printed as "Exception ignored in ...".
        if not isinstance(what.exc_value, _Stopped):
            hook(what)

    # One that is ignored stays so: nohup ignores SIGHUP, a shell SIGINT for jobs in the background.
    caught = [one for one in _signals.STOPS if signal.getsignal(one) is not signal.SIG_IGN]
    before = {one: signal.signal(one, stop) for one in (*_signals.ALARMS, *caught)}
    hook, sys.unraisablehook = sys.unraisablehook, lost
    try:
        yield
    finally:
        _signals.repeat_no_more()
        sys.unraisablehook = hook
        for one, handler in before.items():
            # All outputs are settled. While Python finalizes, a signal could only cause a traceback
            # or kill the process, and its exit code would belie what was done. In a process that
            # goes on, None stands for a handler not installed from Python: it cannot be restored.
            kept = signal.SIG_DFL if handler is None else handler
            signal.signal(one, signal.SIG_IGN if last else kept)


def _open_streams() -> None:
    """Open the standard streams that are closed, or messages land in a file that has a number."""
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(fd, "w" if fd else "r", closefd=False))  # noqa: SIM115
    # A name need not be valid in the locale's encoding; to print it must not fail a merge.
    for stream in (sys.stdout, sys.stderr):
        # What is not shown but read by another program has the same line ends on every system.
        newline = None if stream.isatty() else "\n"
        stream.reconfigure(errors="backslashreplace", newline=newline)  # type: ignore[union-attr]


def say(text: str, *, escaped: bool = False) -> None:
    """Print a line on stderr; names keep their letters, but control characters are escaped."""
    try:
        print(text if escaped else printable(text), file=sys.stderr, flush=True)
    except OSError:  # nobody listens, and that need not stop it
        discard(sys.stderr)


def asked(option: str) -> bool:
    """Return whether an option stands on the command line, which may be wrong in other ways."""
    words = itertools.takewhile(lambda word: word != "--", sys.argv[1:])
    return option in (word.partition("=")[0] for word in words)


def _fail(error: BaseException) -> int:
    """Say what is wrong with which file, and what to do about it; return the exit code."""
    found = _failure(error)
    if isinstance(error, RankError) and error.told:  # by the one rank that tells all
        return int(found["exit_code"])
    say(found["error"] if isinstance(error, _Stopped) else f"error: {found['error']}")
    if found["hint"]:
        say(f"hint: {found['hint']}")
    if asked("--json") and not _ANSWERED.is_set():
        with contextlib.suppress(WrittenError):  # stderr has it
            print_result(True, lambda: found, ())
    from merge_avg.cli._github import annotate, summarize

    lines = [f"hint: {found['hint']}"] if found["hint"] else []
    annotate("error", found["error"], *lines, file=found["file"])
    told = [(key, found[key]) for key in ("error", "hint", "tensor") if found[key] is not None]
    summarize(f"failed with exit code {found['exit_code']}", told)
    return int(found["exit_code"])


def _failure(error: BaseException | None) -> dict[str, Any]:
    """Return the JSON of a failure, which is empty for what is none or a crash."""
    code: Any = 2 if isinstance(error, UsageError) else 3 if isinstance(error, WrittenError) else 1
    if isinstance(error, OSError):
        error = failure(error)
    elif isinstance(error, MemoryError):
        error = MergeError("there is not enough memory", hint="lower --max-memory or --threads")
    elif isinstance(error, _Stopped):
        code, error = error.code, MergeError("stopped; each output is as it was, or complete")
    if not isinstance(error, MergeError):
        return {}
    hint = instead(error.where or "", error.hint)
    about = {"file": error.where, "tensor": error.tensor, "exit_code": code}
    return {"error": error.message, "hint": hint, **about}


def print_result(as_json: bool, value: Callable[[], Any], lines: Iterable[str]) -> None:
    """Print the result on stdout: its value as JSON where that is asked for, or else lines."""
    if as_json:
        import json

        from merge_avg.report.values import plain

        about, found = {"merge_avg": __version__, "schema": _SCHEMA}, plain(value())
        # What failed after a merge comes by here: stdout gets one object in any case.
        if failed := _failure(sys.exception()):
            found |= failed
        whole = [about | one for one in found] if isinstance(found, list) else about | found
        # GitHub's runner takes "##[" for a command to it, in JSON too.
        text = json.dumps(whole, allow_nan=False, indent=2).replace("##[", "#\\u0023[")
    else:
        text = "\n".join(map(printable, lines))
    _ANSWERED.set()
    try:
        if text:
            print(text, flush=True)
    except OSError as error:
        discard(sys.stdout)
        # A reader that left, such as `head`, has what it wanted. A full disk loses the result.
        if not isinstance(error, BrokenPipeError):
            what = f"all is done, but stdout cannot be written ({error.strerror})"
            raise WrittenError(what) from None


def discard(stream: TextIO) -> None:
    """Send to nowhere what a broken stream still holds: Python would flush it at exit, and fail."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


@contextlib.contextmanager
def progress(what: str, nbytes: int, quiet: bool) -> Iterator[Callable[[int], None] | None]:
    """Show that a merge runs; yield what it has to call as `engine.run` does."""
    if quiet or not sys.stderr.isatty():
        if not quiet:
            say(f"{what}, {shown(nbytes)}")
        yield None
        return
    # Rich takes longer to import than a small merge takes.
    from rich import progress as bars
    from rich.console import Console

    bar = bars.Progress(
        bars.TextColumn("{task.description}", markup=False),
        bars.BarColumn(),
        bars.DownloadColumn(),
        bars.TransferSpeedColumn(),
        bars.TimeRemainingColumn(),
        # Told so, because rich would believe TTY_COMPATIBLE and the like rather than the terminal.
        console=Console(file=sys.stderr, force_terminal=True),
        transient=True,
    )
    # A terminal may be closed at any time: the merge goes on.
    with contextlib.suppress(OSError):
        bar.start()
    try:
        task = bar.add_task(what, total=nbytes)

        def advance(more: int) -> None:
            bar.advance(task, more)
            if not more:  # how much the system has written already is not known
                bar.columns = (*bar.columns[:2], bars.TimeElapsedColumn())
                bar.tasks[0].total = None
                with contextlib.suppress(OSError):
                    bar.reset(task, description="writing to disk")

        yield advance
    finally:
        with contextlib.suppress(OSError):
            bar.stop()
