"""The memory budget: how many threads there are, how large windows are, and how much is read.

Everything that grows with the work is held in buffers of a few sizes, so the peak is known before
anything is read. tests/plan/test_budget.py compares it with that of real processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from merge_avg.errors import MergeError, UsageError
from merge_avg.io import cores
from merge_avg.tuning import BLOCK, COMPARED, CONVERTED, WHOLE

MIB = 1 << 20
_DEFAULT = 64 * MIB
_MOST_THREADS = 8  # a disk, or the memory bus, serves no more

# Upper bounds, measured over dtypes and paths. For each element of its window a worker holds sums,
# the result, and what is known of those that are not finite, not equal or in doubt; and for each of
# the block that is summed at a time, the temporaries of the slowest path. Twice both for float64,
# which is summed in double-double, and for complex numbers.
_WINDOW_BYTES = 56
_BLOCK_BYTES = 104
# Measured: stacks and arenas of threads, and what torch sets up when it is first used.
_FIXED = 4 * MIB
# Measured with 20,000 tensors: what is known of a tensor of a checkpoint; and of one of the result,
# which has a unit, targets and a slot, and is compared.
_ENTRY_BYTES = 800
_TENSOR_BYTES = 4500
# For each output but the first. Measured: 40 to 55 KiB for an open file, the record, which is built
# twice, and the accumulators' objects of eight threads and six dtypes. Derived: four bytes for the
# CRC-32 of each tensor; and the checksums of the parts of one that is longer than a window.
_OUTPUT_BYTES = 64 << 10
_CRC_BYTES = 4
_SUM_BYTES = 2048

# In bytes: a few such windows are still in the cache that cores share.
_LARGEST_WINDOW = 1 << 19
# In elements: with smaller windows, the time that Python takes for each one shows.
_USUAL_WINDOW = 1 << 14
_LEAST_WINDOW = 1 << 10
_MOST_READ = 1 << 22  # bytes that a worker reads at a time: more rows are no faster


@dataclass(frozen=True)
class Budget:
    """The memory that workers may take, and what it is taken for.

    Attributes:
        threads: the number of workers.
        window: the largest window, in elements.
        rows: the number of checkpoints whose elements of a window a worker holds at a time.
        itemsize: the bytes of the widest element.
        entries: the number of tensors of all checkpoints together.
        outputs: the number of outputs.
        checkpoints: their number; they are compared by a part of each window.
        long: the number of tensors of the result that may be longer than a window.
    """

    threads: int
    window: int
    rows: int
    itemsize: int
    entries: int = 0
    outputs: int = 1
    checkpoints: int = 1
    long: int = 0

    @property
    def nbytes(self) -> int:
        """Return the most anonymous memory that the merge takes, beside what importing torch does.

        Mapped files are not anonymous: the kernel takes their pages back when it needs them.
        """
        wide = max(self.itemsize // 4, 1)
        # Some of what is read is held a second time, as float64.
        converted = 8 * max(min(self.rows * self.window, CONVERTED), self.window) * wide
        read = self.window * self.rows * self.itemsize + converted
        # Outputs share all but their sums, which take more for float64.
        sums = (self.outputs - 1) * (16 if self.itemsize < 8 else 48)
        # Checkpoints are compared by one number of 128, or by all of small tensors. A worker sets
        # them aside until there are enough to multiply.
        numbers = self.checkpoints * self.window
        compared = 2 * self.itemsize * (COMPARED + max(numbers // 128, min(numbers, WHOLE)))
        compared += 36 * wide * max(COMPARED, self.checkpoints)
        block = min(self.window, BLOCK) * _BLOCK_BYTES * wide
        worker = self.window * (_WINDOW_BYTES * wide + sums) + block + read + compared
        tensors = _tensors(self.entries, self.checkpoints)
        each = _OUTPUT_BYTES + tensors * _CRC_BYTES + self.long * _SUM_BYTES
        known = _known(self.entries, self.checkpoints) + (self.outputs - 1) * each
        return _FIXED + known + self.threads * worker

    def fitting(self, free: int) -> Budget:
        """Return the same with windows that fit `free` bytes of a device's memory.

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


def _tensors(entries: int, checkpoints: int) -> int:
    """Return how many tensors each checkpoint has, when all have as many."""
    return -(-entries // max(checkpoints, 1))


def _known(entries: int, checkpoints: int) -> int:
    """Return the bytes of all that is known of tensors before anything is read."""
    return entries * _ENTRY_BYTES + _tensors(entries, checkpoints) * _TENSOR_BYTES


def plan_budget(
    checkpoints: int,
    itemsize: int,
    entries: int,
    max_memory: int | None = None,
    threads: int | None = None,
    outputs: int = 1,
    lengths: Iterable[int] = (),
) -> Budget:
    """Divide a budget of memory into threads and windows.

    Args:
        checkpoints: their number.
        itemsize: the bytes of their widest element.
        entries: the number of all their tensors.
        max_memory: the budget in bytes; by default 64 MiB, or 32 MiB a thread where that is more,
            and what is known of very many tensors.
        threads: their number; by default that of the cores.
        outputs: their number.
        lengths: of the tensors of the result, in elements.

    Raises:
        UsageError: `threads` is below one.
        MergeError: the budget is too small for one thread; the hint says how much would do.
    """
    if threads is not None and threads < 1:
        raise UsageError("there must be a thread at least", hint="give --threads 1 or more")
    workers = threads or min(cores(), _MOST_THREADS)
    buffers = max(_DEFAULT, workers * _DEFAULT // 2)
    total = max_memory or buffers + max(_known(entries, checkpoints) - MIB, 0)
    least = Budget(1, _LEAST_WINDOW, 1, itemsize, entries, outputs, checkpoints)
    least = replace(least, long=sum(length > least.window for length in lengths))
    for count, window, rows in _tried(workers, checkpoints, itemsize):
        budget = replace(least, threads=count, window=window, rows=rows)
        if budget.nbytes <= total:
            return budget
    hint = f"give at least --max-memory {-(-least.nbytes // 1024)}KiB"
    raise MergeError("the memory budget is too small", hint=hint)


def _tried(workers: int, checkpoints: int, itemsize: int) -> Iterator[tuple[int, int, int]]:
    """Yield threads, window and rows, the fastest first."""
    for threads in range(workers, 0, -1):
        window = _LARGEST_WINDOW // max(itemsize, 2)
        while window >= _LEAST_WINDOW:
            rows = min(checkpoints, max(_MOST_READ // (window * itemsize), 1))
            # Rather smaller windows than fewer rows, unless the window would be tiny.
            fewest = 1 if window <= _USUAL_WINDOW else rows
            yield from ((threads, window, count) for count in range(rows, fewest - 1, -1))
            window //= 2
