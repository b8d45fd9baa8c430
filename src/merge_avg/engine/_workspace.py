"""A merge under way: what its workers share, and what they report."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from merge_avg.agreement import Comparison
from merge_avg.io import Reader, Scratch, Sink
from merge_avg.plan import Job


@dataclass
class Findings:
    """Findings that the workers of a merge report, from any thread.

    Attributes:
        progress: called with the number of bytes read since the last call.
        hashes: sums of the hashes of chunks, by checkpoint; behind them, of what is kept.
        nbytes: bytes read.
        differing: integer tensors that differ between the checkpoints.
        nonfinite: tensors that hold NaN or infinity.
        factors_differ: whether factors of low-rank products differ between the checkpoints.
    """

    progress: Callable[[int], None] | None
    hashes: list[int]
    nbytes: int = 0
    differing: set[str] = field(default_factory=set)
    nonfinite: set[str] = field(default_factory=set)
    factors_differ: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add_hashes(self, hashes: Sequence[int]) -> None:
        """Add one worker's sums of hashes."""
        with self._lock:
            self.hashes = [ours + theirs for ours, theirs in zip(self.hashes, hashes, strict=True)]

    def count(self, nbytes: int) -> None:
        """Count bytes that were read."""
        # Under the lock, so that the callback need not be ready for two threads at a time.
        with self._lock:
            self.nbytes += nbytes
            if self.progress is not None:
                self.progress(nbytes)


@dataclass(frozen=True)
class Workspace:
    """Everything that the workers of a merge share.

    Attributes:
        job: the merge.
        readers: one for each checkpoint.
        sinks: one for each output.
        scratch: where restrided tensors lie.
        findings: what is reported.
        comparison: how far the checkpoints agree.
        device: where sums are kept.
        load_torch: imports torch; called before its first use.
        results: by a unit's number, mapped room for the result of each output, where outputs hold
            it in other strides.
        masks: by a unit's number, a mapped byte for each element: 0 where no tensor reaches it.
    """

    job: Job
    readers: Sequence[Reader]
    sinks: Sequence[Sink]
    scratch: Scratch
    findings: Findings
    comparison: Comparison
    device: str
    load_torch: Callable[[], None]
    results: dict[int, Sequence[mmap.mmap]] = field(default_factory=dict)
    masks: dict[int, mmap.mmap] = field(default_factory=dict)
