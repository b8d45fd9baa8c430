"""Asking the system to read the beginning of the checkpoints while the merge is set up.

Otherwise the disk would be idle while outputs are laid out, and torch is imported if it is needed.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from itertools import islice

from merge_avg.io import FLAGS, READS_AHEAD, ask_for
from merge_avg.plan import Job

# Bytes that are asked for at a time: enough to keep a disk busy between two calls.
_STEP = 1 << 23
# Bytes that are asked for in all. Importing torch takes two to three seconds, in which few disks
# read more; and what is read too early could be dropped before the merge comes to it.
_MOST = 1 << 30


def read_ahead(job: Job) -> None:
    """Let the system read what a merge reads first, from now on and in the background.

    It is a hint: where it cannot be given, nothing happens.
    """
    if READS_AHEAD:
        thread = threading.Thread(target=_ask, args=(job,), name="merge-avg-ahead", daemon=True)
        with contextlib.suppress(RuntimeError):  # there may be no more threads
            thread.start()


def _ask(job: Job) -> None:
    fds: dict[str, int] = {}
    try:
        for path, offset in islice(steps(job), _MOST // _STEP):
            if path not in fds:
                fds[path] = os.open(path, os.O_RDONLY | FLAGS)
            ask_for(fds[path], offset, _STEP)
    except OSError:
        return  # whoever reads it will say what is wrong
    finally:
        for fd in fds.values():
            with contextlib.suppress(OSError):
                os.close(fd)


def steps(job: Job) -> Iterator[tuple[str, int]]:
    """Yield the files and offsets of what is read, a step each, about in the order of the merge."""
    seen: set[tuple[str, int]] = set()
    for unit in job.plan.units:
        widest = max(dtype.itemsize for dtype in unit.dtypes)
        for at in range(0, len(unit), _STEP // widest):
            for source in unit.sources:
                if source.storage is None:
                    continue
                storage, layout = source.storage.ranges[0], job.layouts[source.checkpoint]
                begin = layout.offset(storage) + source.offset + at * source.dtype.itemsize
                path = os.fspath(layout.files[storage.file].path)
                step = path, begin // _STEP * _STEP
                if step not in seen:
                    seen.add(step)
                    yield step
