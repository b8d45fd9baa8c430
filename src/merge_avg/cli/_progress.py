"""How far a merge is: a bar on a terminal, a line elsewhere."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from merge_avg.cli._console import say
from merge_avg.plan import Job
from merge_avg.report.printable import shown


@contextlib.contextmanager
def progress(job: Job, *, quiet: bool) -> Iterator[Callable[[int], None] | None]:
    """Show that a merge runs; yield what it has to call with the bytes it has read since."""
    what = f"averaging {len(job.averaged)} checkpoints"
    if quiet or not sys.stderr.isatty():
        if not quiet:
            say(f"{what}, {shown(job.nbytes)}")
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
        task = bar.add_task(what, total=job.nbytes)
        yield lambda nbytes: bar.advance(task, nbytes)
    finally:
        with contextlib.suppress(OSError):
            bar.stop()
