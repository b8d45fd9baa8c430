"""Text and progress for people on stderr, and the result on stdout."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TextIO

from merge_avg.errors import MergeError, failure
from merge_avg.report.printable import printable, shown


def say(text: str) -> None:
    """Print a line on stderr; names keep their letters, but control characters are escaped."""
    try:
        print(printable(text), file=sys.stderr, flush=True)
    except OSError:  # nobody listens, which is no reason to stop
        discard(sys.stderr)


def fail(error: MergeError | OSError | MemoryError) -> None:
    """Say what is wrong with which file, and what to do about it."""
    if isinstance(error, OSError):
        error = failure(error)
    elif isinstance(error, MemoryError):
        hint = "lower --max-memory or --threads"
        error = MergeError("there is not enough memory", hint=hint)
    where = "" if error.where is None else f"{error.where}: "
    say(f"error: {where}{error.what}")
    if error.hint:
        say(f"hint: {error.hint}")


def print_result(as_json: bool, value: Callable[[], Any], lines: Iterable[str]) -> None:
    """Print the result on stdout: its value as JSON where that is asked for, or else lines."""
    if as_json:
        import json

        # Paths are text. GitHub's runner takes "##[" for a command to it, in JSON too.
        text = json.dumps(value(), ensure_ascii=True, indent=2, default=os.fspath)
        text = text.replace("##[", "#\\u0023[")
    else:
        text = "\n".join(map(printable, lines))
    try:
        if text:
            print(text, flush=True)
    except OSError as error:
        discard(sys.stdout)
        # A reader that left, such as `head`, has what it wanted. A full disk loses the result.
        if not isinstance(error, BrokenPipeError):
            what = f"all is done, but stdout cannot be written ({error.strerror})"
            raise MergeError(what) from None


def discard(stream: TextIO) -> None:
    """Send what else is written to a broken stream to nowhere.

    Its buffer still holds text, which Python would flush at exit, and fail with exit code 120.
    """
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


@contextlib.contextmanager
def progress(what: str, nbytes: int, quiet: bool) -> Iterator[Callable[[int], None] | None]:
    """Show that a merge runs; yield what it has to call with the bytes it has read since."""
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
        yield lambda more: bar.advance(task, more)
    finally:
        with contextlib.suppress(OSError):
            bar.stop()
