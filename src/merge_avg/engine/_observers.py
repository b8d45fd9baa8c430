"""Everyone who watches what a worker reads: hashes, the agreement, and low-rank factors.

All see a window by the same calls, for each source while its bytes are still in the cache.
"""

from __future__ import annotations

from typing import Protocol

from xxhash import xxh3_128

from merge_avg.agreement import Sampler
from merge_avg.engine._hashing import Hasher
from merge_avg.engine._workspace import Findings, Workspace
from merge_avg.plan import Job, Unit, Window


class Observer(Protocol):
    """Watches what one worker reads."""

    def begin(self, window: Window) -> None:
        """Get ready for a window."""

    def see(self, k: int, data: memoryview) -> None:
        """Look at the window as source number k of its units has it."""

    def close(self) -> None:
        """Report what was found."""


class FactorWatch:
    """Notes whether factors A of low-rank products B @ A differ between the checkpoints.

    Where they are the same everywhere, the mean of the products is the product of the means.
    """

    def __init__(self, job: Job, findings: Findings) -> None:
        self._findings = findings
        self._names = job.plan.factors
        self._averaged = frozenset(job.averaged)  # a base may have other factors
        self._unit: Unit | None = None
        self._spans: list[tuple[int, int]] = []
        self._last: int | None = None

    def begin(self, window: Window) -> None:
        """Find the factors in a window."""
        self._unit, self._spans, self._last = window[0].unit, [], None
        at = 0
        for piece in window if self._unit.kind == "mean" else ():
            end = at + piece.stop - piece.start
            if any(name in self._names for name, _ in piece.unit.members):
                self._spans.append((at, end))
            at = end

    def see(self, k: int, data: memoryview) -> None:
        """Compare the factors with those of the source before."""
        if self._unit is None or not self._spans:
            return
        source = self._unit.sources[k]
        if source.checkpoint in self._averaged:
            digest, size = xxh3_128(), source.dtype.itemsize
            for start, stop in self._spans:
                digest.update(data[start * size : stop * size])
            value = digest.intdigest()
            if self._last not in (None, value):
                self._findings.factors_differ = True
            self._last = value

    def close(self) -> None:
        """Do nothing: differences have been reported."""


def observers(space: Workspace) -> list[Observer]:
    """Return those who watch one worker."""
    job, some = space.job, list[Observer]()
    if job.options.hashes:
        some.append(Hasher(job, space.findings))
    if job.plan.factors:
        some.append(FactorWatch(job, space.findings))
    if not space.comparison.empty:
        some.append(Sampler(space.comparison, space.load_torch))
    return some
