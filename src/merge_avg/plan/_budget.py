"""How much memory a merge takes, and what it makes of it: threads, windows, and how much is read.

All that grows with the work is held in buffers of a few sizes, so the peak is known beforehand.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from merge_avg.errors import MergeError, UsageError
from merge_avg.tuning import BLOCK, COMPARED, CONVERTED, WHOLE

MIB = 1 << 20
_DEFAULT = 64 * MIB
_MOST_THREADS = 8  # a disk, or the memory bus, serves no more
# What a worker holds for each element of its window: sums, the result, and what is known of those
# that are not finite or not equal. And for each of the part that is summed at a time: temporaries
# of the slow paths. Twice both for float64, summed in double-double, and for complex numbers.
_WINDOW_BYTES = 56
_BLOCK_BYTES = 104
_FIXED = 4 * MIB  # threads, and what torch sets up when it is first used
_ENTRY_BYTES = 800  # what is known of a tensor of a checkpoint
_TENSOR_BYTES = 4500  # and of a tensor of the result: where it goes, and what it is compared by
_OUTPUT_BYTES = 384 << 10  # what laying an output out once more takes, beside what it describes
_LARGEST_WINDOW = 1 << 19  # bytes: a few of them are still in the cache that cores share
_USUAL_WINDOW = 1 << 14  # below this, Python's own time shows
_LEAST_WINDOW = 1 << 10
_MOST_READ = 1 << 22  # bytes


@dataclass(frozen=True)
class Budget:
    """What workers may take.

    Attributes:
        threads: how many workers there are.
        window: the largest window, in elements.
        rows: how many checkpoints' elements of a window a worker holds at a time.
        itemsize: the bytes of the widest element.
        entries: how many tensors all checkpoints have, together.
        outputs: how many averages are made at a time.
        checkpoints: how many there are, which are compared by a part of each window.
    """

    threads: int
    window: int
    rows: int
    itemsize: int
    entries: int = 0
    outputs: int = 1
    checkpoints: int = 1

    @property
    def nbytes(self) -> int:
        """The most anonymous memory that the merge takes, beside what importing torch does."""
        wide = max(self.itemsize // 4, 1)
        # Some of what is read is held a second time, as float64.
        converted = 8 * max(min(self.rows * self.window, CONVERTED), self.window) * wide
        read = self.window * self.rows * self.itemsize + converted
        # Averages share all but their sums, which for float64 are of two parts.
        sums = (self.outputs - 1) * (16 if self.itemsize < 8 else 48)
        numbers = self.checkpoints * self.window
        compared = 2 * self.itemsize * (COMPARED + max(numbers // 128, min(numbers, WHOLE)))
        compared += 36 * wide * max(COMPARED, self.checkpoints)
        block = min(self.window, BLOCK) * _BLOCK_BYTES * wide
        worker = self.window * (_WINDOW_BYTES * wide + sums) + block + read + compared
        known = _known(self.entries, self.checkpoints) + (self.outputs - 1) * _OUTPUT_BYTES
        return _FIXED + known + self.threads * worker

    def fitting(self, free: int) -> Budget:
        """The same with windows that fit `free` bytes of a device's memory.

        Raises:
            MergeError: none does.
        """
        fit = self
        # Twice: a device holds what was read in two slots, and allocates in larger blocks.
        while 2 * fit.nbytes > free:
            if fit.window <= _LEAST_WINDOW:
                hint = "use --device cpu, or free some memory of the device"
                raise MergeError("the device has not enough free memory", hint=hint)
            fit = replace(fit, window=fit.window // 2)
        return fit


def _known(entries: int, checkpoints: int) -> int:
    """The bytes that are known of tensors: names, places, what they are compared by."""
    return entries * _ENTRY_BYTES + -(-entries // max(checkpoints, 1)) * _TENSOR_BYTES


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
    checkpoints: int,
    itemsize: int,
    entries: int,
    max_memory: int | None = None,
    threads: int | None = None,
    outputs: int = 1,
) -> Budget:
    """Cuts a budget of memory into threads and windows.

    Args:
        checkpoints: how many there are.
        itemsize: the bytes of their widest element.
        entries: how many tensors they have, together.
        max_memory: the budget in bytes; by default 64 MiB, or 32 MiB a thread where that is more,
            and what is known of very many tensors.
        threads: how many, if not as many as there are cores.
        outputs: how many averages are made at a time.

    Raises:
        UsageError: `threads` is below one.
        MergeError: the budget is too small for one thread; the hint says how much would do.
    """
    if threads is not None and threads < 1:
        raise UsageError("there must be a thread at least", hint="give --threads 1 or more")
    workers = threads or min(cores(), _MOST_THREADS)
    buffers = max(_DEFAULT, workers * _DEFAULT // 2)
    total = max_memory or buffers + max(_known(entries, checkpoints) - MIB, 0)
    for count in range(workers, 0, -1):
        window = _LARGEST_WINDOW // max(itemsize, 2)
        while window >= _LEAST_WINDOW:
            rows = min(checkpoints, max(_MOST_READ // (window * itemsize), 1))
            budget = Budget(count, window, rows, itemsize, entries, outputs, checkpoints)
            if budget.nbytes <= total:
                return budget
            if window <= _USUAL_WINDOW:  # rather fewer rows than a tiny window
                fewer = (
                    Budget(count, window, fit, itemsize, entries, outputs, checkpoints)
                    for fit in range(rows - 1, 0, -1)
                )
                found = next((budget for budget in fewer if budget.nbytes <= total), None)
                if found is not None:
                    return found
            window //= 2
    least = Budget(1, _LEAST_WINDOW, 1, itemsize, entries, outputs, checkpoints).nbytes
    hint = f"give at least --max-memory {-(-least // 1024)}KiB"
    raise MergeError("the memory budget is too small", hint=hint)
