"""The memory budget: how many threads there are, and the windows that they work on, one at a time.

    units        | a ................................. | b ... | c .. |
    windows      |   a    |   a    |   a    |   a    | |  a, b, c    |

Everything that grows with the work is held in buffers of a few sizes, so the peak is known before
anything is read. tests/plan/test_budget.py compares it with that of real processes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from merge_avg.arithmetic.tuning import BLOCK, COMPARED, CONVERTED, WHOLE
from merge_avg.errors import MergeError
from merge_avg.io import cores
from merge_avg.plan._units import Unit

MIB = 1 << 20
_DEFAULT = 64 * MIB
_MOST_COMPOSED = 4096 * MIB
_MOST_THREADS = 8  # a disk, or the memory bus, serves no more
MOST_THREADS = 256

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
# Measured with 300 to 1000 checkpoints: products of all pairs, in 16 parts, and cosines of them.
_PAIR_BYTES = 256

# In bytes: a few such windows are still in the cache that cores share.
_LARGEST_WINDOW = 1 << 19
# In elements: with smaller windows, the time that Python takes for each one shows.
_USUAL_WINDOW = 1 << 14
_LEAST_WINDOW = 1 << 10
_MOST_READ = 1 << 22  # bytes that a worker reads at a time: more rows are no faster


@dataclass(frozen=True)
class Budget:
    """The memory that workers may take, and what it is taken for."""

    threads: int  # the number of workers
    window: int  # the largest window, in elements
    rows: int  # the number of checkpoints whose elements of a window a worker holds at a time
    itemsize: int  # the bytes of the widest element
    entries: int = 0  # the number of tensors of all checkpoints together
    outputs: int = 1
    checkpoints: int = 1  # their number; they are compared by a part of each window
    long: int = 0  # the number of tensors of the result that may be longer than a window
    pairs: int = 0  # of checkpoints that are compared, each with all
    composed: int = 0  # bytes that a worker takes for the largest composite

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
        worker += self.composed
        tensors, known = _known(self.entries, self.checkpoints)
        each = _OUTPUT_BYTES + tensors * _CRC_BYTES + self.long * _SUM_BYTES
        known += (self.outputs - 1) * each
        return _FIXED + known + self.pairs * _PAIR_BYTES + self.threads * worker

    def fitting(self, free: int) -> Budget:
        """Return the same with windows that fit `free` bytes of a device, or raise MergeError."""
        fit = self
        # Twice: a device holds what was read in two slots, and allocates in larger blocks.
        while 2 * fit.nbytes > free:
            if fit.window <= _LEAST_WINDOW:
                hint = "use --device cpu, or free some memory of the device"
                raise MergeError("the device has not enough free memory", hint=hint)
            fit = replace(fit, window=fit.window // 2)
        return fit


def _known(entries: int, checkpoints: int) -> tuple[int, int]:
    """Return how many tensors each checkpoint has, and the bytes of all that is known of them."""
    tensors = -(-entries // max(checkpoints, 1))  # when all have as many
    return tensors, entries * _ENTRY_BYTES + tensors * _TENSOR_BYTES


def plan_budget(
    checkpoints: int,
    itemsize: int,
    entries: int,
    max_memory: int | None = None,
    threads: int | None = None,
    outputs: int = 1,
    lengths: Iterable[int] = (),
    pairs: int = 0,
    composed: int = 0,
) -> Budget:
    """Divide a budget of memory, in bytes, into threads and windows; for the rest see `Budget`.

    The default is 64 MiB, or 32 MiB a thread where that is more, and what is known of very many
    tensors, pairs and composites; and a thread for each core. `lengths` are those of tensors, in
    elements.
    """
    workers = threads or min(cores(), _MOST_THREADS)
    buffers = max(_DEFAULT, workers * _DEFAULT // 2)
    buffers += max(_known(entries, checkpoints)[1] - MIB, 0) + min(pairs * _PAIR_BYTES, _DEFAULT)
    if composed <= _MOST_COMPOSED:  # more has to be asked for: any header may claim it
        buffers += min(workers * composed, max(composed, _DEFAULT))
    long = sum(length > _LEAST_WINDOW for length in lengths)
    about = entries, outputs, checkpoints, long, pairs, composed
    least = Budget(1, _LEAST_WINDOW, 1, itemsize, *about)
    for budget in _tried(least, workers):
        if budget.nbytes <= (buffers if max_memory is None else max_memory):
            return budget
    hint = f"give at least --max-memory {-(-least.nbytes // 1024)}KiB"
    if pairs * _PAIR_BYTES > _DEFAULT:
        hint += ", or --no-agreement: it compares each checkpoint with all"
    raise MergeError("the memory budget is too small", hint=hint)


def _tried(least: Budget, workers: int) -> Iterator[Budget]:
    """Yield the same with more threads, windows and rows, the fastest first."""
    for threads in range(workers, 0, -1):
        window = _LARGEST_WINDOW // max(least.itemsize, 2)
        while window >= _LEAST_WINDOW:
            rows = min(least.checkpoints, max(_MOST_READ // (window * least.itemsize), 1))
            # Rather smaller windows than fewer rows, unless the window would be tiny.
            fewest = 1 if window <= _USUAL_WINDOW else rows
            for count in range(rows, fewest - 1, -1):
                yield replace(least, threads=threads, window=window, rows=count)
            window //= 2


# In a window, however small its pieces are: how they are read is held by each worker.
_MOST_PIECES = 4096


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements of a unit, counted from the unit's start."""

    unit: Unit
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


Window = tuple[Piece, ...]


def spans(window: Window) -> Iterator[tuple[Piece, int, int]]:
    """Yield the pieces of a window, and where in it each begins and ends."""
    at = 0
    for piece in window:
        yield piece, at, (at := at + piece.stop - piece.start)


def windows(units: Iterable[Unit | Piece], limit: int) -> Iterator[Window]:
    """Yield units, or pieces that begin at a multiple of `limit`, in windows of so many elements.

    The pieces of a window are alike: same kind, same checkpoints, same dtypes. Each piece starts at
    a multiple of `limit` in its unit, and is as long or reaches to the end of what is given of it.
    """
    # Whole windows of one unit are the fast case: one read per checkpoint, into one row of one
    # matrix, and its hash is that of one chunk. What is left of each unit would cost as much as a
    # whole window for a few elements: a model has many biases and norms. So rests share windows.
    open_: dict[object, list[Piece]] = defaultdict(list)
    sizes: dict[object, int] = defaultdict(int)
    for one in units:
        if isinstance(one, Piece):
            unit, first, stop = one.unit, one.start, one.stop
        else:
            unit, first, stop = one, 0, len(one)
        start = stop // limit * limit
        yield from ((Piece(unit, at, at + limit),) for at in range(first, start, limit))
        if start == stop:
            continue
        alike = unit.alike
        if sizes[alike] + stop - start > limit or len(open_[alike]) == _MOST_PIECES:
            yield tuple(open_.pop(alike))
            sizes[alike] = 0
        open_[alike].append(Piece(unit, start, stop))
        sizes[alike] += stop - start
    yield from (tuple(pieces) for pieces in open_.values())


def batches(units: Iterable[Unit | Piece], limit: int, chunk: int) -> Iterator[tuple[Window, ...]]:
    """Yield windows of at most `limit` elements; those that share a chunk of a unit come together.

    A chunk is so many elements of a unit, from a multiple of that on, or to the unit's end.
    """
    # The hash of a chunk takes its bytes in order, and a chunk is of one size whatever the memory
    # budget is: else the same file would have another hash. Where windows are smaller than chunks,
    # one worker gets all windows of a chunk in order, and no second reading is needed.
    for window in windows(units, max(limit, chunk)):
        yield (window,) if limit >= chunk else tuple(_cut(window, limit))


def _cut(window: Window, limit: int) -> Iterator[Window]:
    """Yield a window as smaller ones, in order; pieces that fit stay whole."""
    packed: list[Piece] = []
    size = 0
    for piece in window:
        if len(piece) > limit:
            # What is packed need not come first: its pieces are whole chunks.
            for at in range(piece.start, piece.stop, limit):
                yield (Piece(piece.unit, at, min(at + limit, piece.stop)),)
            continue
        if size + len(piece) > limit:
            yield tuple(packed)
            packed, size = [], 0
        packed.append(piece)
        size += len(piece)
    if packed:
        yield tuple(packed)
