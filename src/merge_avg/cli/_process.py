"""The command as a process: its streams, its signals and its exit codes.

0     done
1     refused or failed: each output is as it was
2     wrong usage
128+n stopped by signal n: 129 hung up, 130 interrupted, 143 terminated
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from types import FrameType

from merge_avg.cli._console import fail, say
from merge_avg.errors import MergeError, UsageError


def entry() -> None:
    """Run `main`, and leave the process the short way if all went well. The console script."""
    # A small merge is mostly imports, which make many objects and hardly any cycles of garbage.
    # Looking for those ninety times would take 3 % of it.
    gc.set_threshold(100_000)
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


def main(*, last: bool = False) -> None:
    """Run the command, and exit with its code; `last`: the process does nothing else after it."""
    try:
        with _signals(last=last):
            _run()
    except KeyboardInterrupt:  # it came before the handler was installed
        sys.exit(130)


def _run() -> None:
    """Run the command; an error is a message and an exit code."""
    try:
        _open_streams()
        from merge_avg.cli._app import app  # whose imports take longest: a signal may come

        app(prog_name="merge-avg")
    except (MergeError, OSError, MemoryError) as error:
        fail(error)
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except _Stopped as stop:
        say("stopped; each output is as it was, or complete")
        sys.exit(stop.code)


class _Stopped(SystemExit):
    """A signal asked the command to end; temporary files are removed as it unwinds."""


@contextlib.contextmanager
def _signals(*, last: bool) -> Iterator[None]:
    """Make signals end the command by an exception, so that it cleans up.

    A signal that is ignored stays so: nohup ignores SIGHUP, and a shell ignores SIGINT for jobs in
    the background.
    """
    code = 0

    def stop(signum: int, _: FrameType | None) -> None:
        nonlocal code
        code = code or 128 + signum  # the first signal decides, not the alarm that repeats it
        # An exception is lost where C code calls back into Python, as in a finalizer. So an alarm
        # calls this function again every 0.1 s ...
        signal.setitimer(signal.ITIMER_REAL, 0.1)
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

    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    caught = [one for one in numbers if signal.getsignal(one) is not signal.SIG_IGN]
    before = {one: signal.signal(one, stop) for one in (signal.SIGALRM, *caught)}
    hook, sys.unraisablehook = sys.unraisablehook, lost
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.unraisablehook = hook
        for one, handler in before.items():
            # All outputs are settled. While Python finalizes, a signal could only cause a traceback
            # or kill the process, and its exit code would belie what was done. In a process that
            # goes on, None stands for a handler not installed from Python: it cannot be restored.
            kept = signal.SIG_DFL if handler is None else handler
            signal.signal(one, signal.SIG_IGN if last else kept)


def _open_streams() -> None:
    """Open the standard streams that are closed.

    A file that the merge opens would get the number of one: then a message written to stderr would
    land in the output.
    """
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(fd, "w" if fd else "r", closefd=False))  # noqa: SIM115
    # A name need not be valid in the locale's encoding; to print it must not fail a merge.
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
