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
_WIDE = 8  # a worker has a float64 for each element that it reads at once, beside the element
# And for each element of its window: sums, results, and temporaries of the slow paths.
_WINDOW_BYTES = 160
_LARGEST_WINDOW = 1 << 17
_USUAL_WINDOW = 1 << 14  # below this, Python's own time shows
_LEAST_WINDOW = 1 << 10
_MOST_READ = 1 << 20


@dataclass(frozen=True)
class Budget:
    """What workers may take.

    Attributes:
        threads: how many workers there are.
        window: the largest window, in elements.
        rows: how many checkpoints' elements of a window a worker holds at a time.
        itemsize: the bytes of the widest element.
    """

    threads: int
    window: int
    rows: int
    itemsize: int

    @property
    def nbytes(self) -> int:
        """The memory that all workers take at the most."""
        return self.threads * self.window * (_WINDOW_BYTES + self.rows * (self.itemsize + _WIDE))


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


def plan_budget(
    checkpoints: int, itemsize: int, max_memory: int | None = None, threads: int | None = None
) -> Budget:
    """Cuts a budget of memory into threads and windows.

    Args:
        checkpoints: how many there are.
        itemsize: the bytes of their widest element.
        max_memory: the budget in bytes; by default 64 MiB, or 32 MiB a thread where that is more.
        threads: how many, if not as many as there are cores.

    Raises:
        UsageError: `threads` is below one.
        MergeError: the budget is too small for one thread; the hint says how much would do.
    """
    if threads is not None and threads < 1:
        raise UsageError("there must be a thread at least", hint="give --threads 1 or more")
    workers = threads or min(cores(), _MOST_THREADS)
    total = max_memory or max(_DEFAULT, workers * _DEFAULT // 2)
    for count in range(workers, 0, -1):
        window = _LARGEST_WINDOW
        while window >= _LEAST_WINDOW:
            rows = min(checkpoints, max(_MOST_READ // window, 1))
            budget = Budget(count, window, rows, itemsize)
            if budget.nbytes <= total:
                return budget
            if window <= _USUAL_WINDOW:  # rather fewer rows than a tiny window
                budget = Budget(count, window, 1, itemsize)
                if budget.nbytes <= total:
                    room = total // count // window - _WINDOW_BYTES
                    return Budget(count, window, room // (itemsize + _WIDE), itemsize)
            window //= 2
    least = Budget(1, _LEAST_WINDOW, 1, itemsize).nbytes
    hint = f"give at least --max-memory {-(-least // 1024)}KiB"
    raise MergeError("the memory budget is too small", hint=hint)
