"""Everyone who watches what a worker reads: hashes, the agreement, and derived values.

All see a window by the same calls, for each source while its bytes are still in the cache.

The hash of a checkpoint, by which `verify` knows an input again, is a sum: of the XXH3 of each
chunk of each unit, seeded by the chunk's place. So neither the order of windows nor their size
matters, and threads add what they have.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from xxhash import xxh3_128, xxh3_128_intdigest

from merge_avg.agreement import Sampler
from merge_avg.checkpoint import Name
from merge_avg.engine._workspace import Findings, Workspace
from merge_avg.plan import Hashes, Job, Piece, Unit, Window, spans

# Bytes of the template in a chunk. Recorded hashes depend on it: it can never change. Most windows
# are as large, so that a window is one chunk and is hashed in one call.
_CHUNK = 1 << 19
_KEPT = -1  # the last of the sums: of what outputs have of the template, beside averaged weights

_Span = tuple[int, int, int, bool, bool]


class Observer(Protocol):
    """Watches what one worker reads."""

    def begin(self, window: Window) -> None:
        """Get ready for a window."""

    def see(self, k: int, data: memoryview) -> None:
        """Look at the window as source number k of its units has it."""

    def close(self) -> None:
        """Report what was found."""


def chunk(unit: Unit) -> int:
    """Return how many elements of a unit are hashed at a time, from multiples of that on."""
    return _CHUNK // unit.sources[0].dtype.itemsize


def _seed(unit: int, number: int) -> int:
    # By its place, or two chunks could be swapped. Copied records count down from unit -1.
    return (unit << 32 | number) & 0xFFFFFFFFFFFFFFFF


def _spans(window: Window) -> Iterator[_Span]:
    """Cut a window into parts of chunks: start, stop, seed, and whether it begins and ends one."""
    for piece, begin, _ in spans(window):
        unit, at, start, length = piece.unit, begin, piece.start, chunk(piece.unit)
        while start < piece.stop:
            number, inside = divmod(start, length)
            stop = min(start - inside + length, piece.stop)
            end = at + stop - start
            ends = stop % length == 0 or stop == len(unit)
            yield at, end, _seed(unit.number, number), not inside, ends
            start, at = stop, end


class Hasher:
    """One worker's sums of hashes; an observer, and also told what outputs keep of the template.

    Windows that share a chunk have to come to the same worker, in order. `batches` sees to that:
    the sizes of windows and of chunks are powers of two, so that none lies across two batches.
    """

    def __init__(self, job: Job, findings: Findings) -> None:
        self._findings = findings
        self._sums = [0] * len(findings.hashes)
        self._on = job.options.hashes
        # By checkpoint, the hash of a chunk that the next windows complete.
        self._begun: dict[int, xxh3_128] = {}

    def begin(self, window: Window) -> None:
        """Find the chunks of a window: they are the same in all sources."""
        self._unit, self._spans = window[0].unit, list(_spans(window))

    def see(self, k: int, data: memoryview) -> None:
        """Add the hashes of the window's chunks as source number k has them."""
        source = self._unit.sources[k]
        found = self._digests(self._spans, data, source.dtype.itemsize, source.checkpoint)
        self._sums[source.checkpoint] += found
        if not source.checkpoint and self._unit.kind != "mean":
            self._sums[_KEPT] += found

    def keep(self, piece: Piece, data: memoryview) -> None:
        """Add the hashes of a piece that is averaged, and of which outputs keep some elements."""
        if self._on:
            size = piece.unit.sources[0].dtype.itemsize
            self._sums[_KEPT] += self._digests(_spans((piece,)), data, size, _KEPT)

    @contextlib.contextmanager
    def copying(self, index: int) -> Iterator[Callable[[memoryview], None]]:
        """Yield what takes the bytes of copied record number `index`, in order."""
        digest = xxh3_128(seed=_seed(-1 - index, 0))
        yield digest.update if self._on else lambda _: None
        self._sums[_KEPT] += digest.intdigest()

    def close(self) -> None:
        """Report the sums."""
        self._findings.add_hashes(self._sums)

    def _digests(self, spans: Iterable[_Span], data: memoryview, size: int, owner: int) -> int:
        total = 0
        for start, stop, seed, begins, ends in spans:
            part = data[start * size : stop * size]
            if begins and ends:
                total += xxh3_128_intdigest(part, seed)
                continue
            if begins:
                self._begun[owner] = xxh3_128(seed=seed)
            self._begun[owner].update(part)
            if ends:
                total += self._begun[owner].intdigest()
        return total


def total(job: Job, findings: Findings) -> Hashes:
    """Return the hashes of a whole merge, with what else the outputs have of the template."""
    kept = findings.hashes[_KEPT] + sum(map(xxh3_128_intdigest, job.kept_texts))
    read = tuple(value % (1 << 128) for value in findings.hashes[:_KEPT])
    return Hashes(read, kept % (1 << 128))


class DerivedWatch:
    """Notes which values that follow from others, or from which others do, differ."""

    # Where one factor of a product is the same everywhere, the mean of the products is the product
    # of the means; and where vectors or masks are, they are those of the mean too.

    def __init__(self, job: Job, findings: Findings) -> None:
        self._findings = findings
        self._names = watched(job)
        self._averaged = frozenset(job.averaged)  # a base may have others

    def begin(self, window: Window) -> None:
        """Find such values in a window."""
        self._spans: list[tuple[int, int, frozenset[Name]]] = []
        self._first: dict[int, int] = {}  # by the start of a span, its digest
        self._unit = window[0].unit
        for piece, start, stop in spans(window) if self._unit.kind == "mean" else ():
            if names := self._names.intersection(name for name, _ in piece.unit.members):
                self._spans.append((start, stop, names))

    def see(self, k: int, data: memoryview) -> None:
        """Compare them with those of the first source."""
        source = self._unit.sources[k]
        size = source.dtype.itemsize
        for start, stop, names in self._spans if source.checkpoint in self._averaged else ():
            digest = xxh3_128_intdigest(data[start * size : stop * size])
            if self._first.setdefault(start, digest) != digest:
                self._findings.varying.update(names)

    def close(self) -> None:
        """Do nothing: differences have been reported."""


def watched(job: Job) -> frozenset[Name]:
    """Return the tensors of which a merge has to know whether they differ."""
    return frozenset(job.plan.derived).union(*job.plan.factors)


def observers(space: Workspace) -> list[Observer]:
    """Return those who watch one worker."""
    job, some = space.job, list[Observer]()
    if job.options.hashes:
        some.append(Hasher(job, space.findings))
    if watched(job):
        some.append(DerivedWatch(job, space.findings))
    if not space.comparison.empty:
        some.append(Sampler(space.comparison, space.load_torch))
    return some
