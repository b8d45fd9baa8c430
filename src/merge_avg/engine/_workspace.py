"""A merge under way: what its workers share, and what they report."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from merge_avg.agreement import Comparison
from merge_avg.checkpoint import Name
from merge_avg.io import Reader, Scratch, Sink
from merge_avg.plan import Job


@dataclass
class Findings:
    """Findings that the workers of a merge report, from any thread."""

    progress: Callable[[int], None] | None  # called with the bytes read since the last call
    hashes: list[int]  # sums of the hashes of chunks, by checkpoint; behind them, of what is kept
    nbytes: int = 0  # read
    differing: set[str] = field(default_factory=set)  # integer tensors
    nonfinite: set[str] = field(default_factory=set)
    varying: set[Name] = field(default_factory=set)  # derived values that differ; see _observers
    # By the name of a composite, the squared norms of its results' error and of what it stands for.
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)
    theirs: BaseException | None = None  # what `progress` raised, which is the caller's own
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add_hashes(self, hashes: Sequence[int]) -> None:
        """Add one worker's sums of hashes."""
        with self._lock:
            self.hashes = [ours + theirs for ours, theirs in zip(self.hashes, hashes, strict=True)]

    def approximated(self, name: str, error: float, norm: float) -> None:
        """Add the squared norms of an error in a composite, and of what it should be."""
        with self._lock:
            before = self.errors.get(name, (0.0, 0.0))
            self.errors[name] = before[0] + error, before[1] + norm

    def take(self) -> tuple[list[int], int, tuple[set[str], set[str], set[Name]]]:
        """Return the hashes, bytes and names that were found, and forget them."""
        taken = self.hashes, self.nbytes, (self.differing, self.nonfinite, self.varying)
        self.hashes, self.nbytes = [0] * len(self.hashes), 0
        self.differing, self.nonfinite, self.varying = set(), set(), set()
        return taken

    def put(
        self, hashes: Sequence[int], nbytes: int, found: tuple[set[str], set[str], set[Name]]
    ) -> None:
        """Add what was taken, here or elsewhere."""
        self.add_hashes(hashes)
        self.nbytes += nbytes
        self.differing |= found[0]
        self.nonfinite |= found[1]
        self.varying |= found[2]

    def count(self, nbytes: int) -> None:
        """Count bytes that were read."""
        # Under the lock, so that the callback need not be ready for two threads at a time.
        with self._lock:
            self.nbytes += nbytes
            try:
                if self.progress is not None:
                    self.progress(nbytes)
            except BaseException as error:  # Ctrl-C in it too: `run` lets all that is theirs pass
                self.theirs = error
                raise


@dataclass(frozen=True)
class Workspace:
    """Everything that the workers of a merge share."""

    job: Job
    readers: Sequence[Reader]  # one for each checkpoint
    sinks: Sequence[Sink]  # one for each output
    scratch: Scratch  # where restrided tensors lie
    findings: Findings
    comparison: Comparison
    device: str  # where sums are kept
    load_torch: Callable[[], None]  # called before its first use
    # By a unit's number: mapped room for the result of each output, where outputs hold it in other
    # strides; and a mapped byte for each element, 0 where no tensor reaches it.
    results: dict[int, Sequence[mmap.mmap]] = field(default_factory=dict)
    masks: dict[int, mmap.mmap] = field(default_factory=dict)
