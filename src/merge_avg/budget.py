"""How much memory a merge takes, and what it makes of it: threads, windows, and how much is read.

All that grows with the work is held in buffers of a few sizes, so the peak is known beforehand.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from merge_avg.errors import MergeError, UsageError

MIB = 1 << 20
_DEFAULT = 64 * MIB
_MOST_THREADS = 8  # a disk, or the memory bus, serves no more
# What a worker holds for each element that it reads at once: it as it is, its size, it as float64,
# and room for one of the three to be copied.
_READ_BYTES = 32
# And for each element of its window: sums, results, and temporaries of the slow paths.
_WINDOW_BYTES = 192
_LARGEST_WINDOW = 1 << 17
_USUAL_WINDOW = 1 << 14  # below this, Python's own time shows
_LEAST_WINDOW = 1 << 10
_MOST_READ = 1 << 18


@dataclass(frozen=True)
class Budget:
    """What workers may take.

    Attributes:
        threads: how many workers there are.
        window: the largest window, in elements.
        read: how many elements a worker holds at a time, of all checkpoints together.
    """

    threads: int
    window: int
    read: int

    @property
    def nbytes(self) -> int:
        """The memory that all workers take at the most."""
        return self.threads * (self.window * _WINDOW_BYTES + self.read * _READ_BYTES)


def cores() -> int:
    """How many cores this process may use, as its affinity and its control group say."""
    count = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    return max(1, min(count, _control_group() or count))


def _control_group(path: Path = Path("/sys/fs/cgroup/cpu.max")) -> int | None:
    """The cores that the control group allows, rounded up (Linux, cgroup version 2)."""
    try:
        quota, period = path.read_text("ascii").split()
        return None if quota == "max" else -(-int(quota) // int(period))
    except (OSError, ValueError):
        return None


def plan_budget(checkpoints: int, max_memory: int | None, threads: int | None) -> Budget:
    """Cuts a budget of memory, in bytes, into threads and windows.

    Raises:
        UsageError: `threads` is below one.
        MergeError: the budget is too small for one thread; the hint says how much would do.
    """
    if threads is not None and threads < 1:
        raise UsageError("there must be a thread at least", hint="give --threads 1 or more")
    workers = threads or min(cores(), _MOST_THREADS)
    total = max_memory or max(_DEFAULT, workers * _DEFAULT // 4)
    least = Budget(1, _LEAST_WINDOW, _LEAST_WINDOW).nbytes
    if total < least:
        hint = f"give at least --max-memory {-(-least // 1024)}KiB"
        raise MergeError("the memory budget is too small", hint=hint)
    while True:
        share = total // workers
        rows = min(checkpoints, max(_MOST_READ // _USUAL_WINDOW, 1))
        window = share // (_WINDOW_BYTES + rows * _READ_BYTES)
        if window < _USUAL_WINDOW:  # fewer rows at a time, rather than tiny windows
            window = min(_USUAL_WINDOW, share // (_WINDOW_BYTES + _READ_BYTES))
        if window >= _LEAST_WINDOW or workers == 1:
            break
        workers -= 1
    window = min(window, _LARGEST_WINDOW, max(_MOST_READ * 2 // checkpoints, _USUAL_WINDOW))
    window = 1 << (window.bit_length() - 1)
    read = min((share - window * _WINDOW_BYTES) // _READ_BYTES, window * checkpoints)
    return Budget(workers, window, max(read, window))
