"""Stretches: a merge cut into runs of work, whoever does them, and the shares of several workers.

    units      | a ................. | b ... | c | d .......... |  copied records
    stretches  |    0    |    1    |    2       |   3    |   4  |      5
    2 workers  |  the first                     |  the second            |

They depend on the plan alone: not on memory, threads, or the number of workers. So what is known of
a stretch counts for every run that makes the same merge, on as many machines as it has.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from merge_avg.plan import Job, Piece, Unit

# Shares differ by about a stretch, and what is lost with a process that dies is half of one. But
# each ends with a barrier and two writes to the disk, which 4 MiB take as long as to be read.
_MOST, _USUAL, _LARGE, _LEAST = 512, 64, 1 << 31, 1 << 22

Spot = tuple[int, int]  # the place of a unit among those of the work, and an element of it


@dataclass(frozen=True, slots=True)
class Stretch:
    """A run of work: units from one spot up to another, and copies of records."""

    number: int
    start: Spot
    stop: Spot
    copies: tuple[int, int]  # the first, and one past the last
    nbytes: int  # to read
    whole: bool = False  # whether it has the tensors that lie otherwise than the template's


@dataclass(frozen=True)
class Work:
    """All that there is to do for a merge, as stretches in order."""

    units: tuple[Unit, ...]  # that go anywhere, in the order of work
    stretches: tuple[Stretch, ...]

    def pieces(self, stretch: Stretch) -> Iterator[Piece]:
        """Yield the runs of units of a stretch."""
        (first, begin), (last, end) = stretch.start, stretch.stop
        for place in range(first, min(last + 1, len(self.units))):
            unit = self.units[place]
            start, stop = begin if place == first else 0, end if place == last else len(unit)
            if start < stop:
                yield Piece(unit, start, stop)

    @property
    def nbytes(self) -> int:
        """Return the bytes to read."""
        return sum(one.nbytes for one in self.stretches)


def cut(job: Job, chunk: int) -> Work:
    """Cut a merge into stretches, at multiples of `chunk` elements or where units end."""
    viewed = {
        unit.number
        for unit, targets in zip(job.plan.units, job.layout.targets, strict=True)
        if any(target.view is not None for target in targets)
    }
    plain: list[Unit] = []
    odd: list[Unit] = []
    for unit in job.plan.units:
        if job.layout.targets[unit.number]:
            apart = unit.number in viewed or unit.number in job.plan.holed
            if job.plan.restrides and not apart:
                apart = any(source.storage is None for source in unit.sources)
            (odd if apart else plain).append(unit)
    copies = [record.nbytes for _, record in job.layout.copies]
    total = sum(unit.nbytes for unit in (*plain, *odd)) + sum(copies)
    size = max(-(-total // min(max(total // _LARGE, _USUAL), _MOST)), _LEAST)
    found = [*_cut(plain, size, chunk)]
    if odd or job.plan.restrides:
        # In one stretch, so that only who works on it copies them into the scratch file.
        start, stop = (len(plain), 0), (len(plain) + len(odd), 0)
        nbytes = sum(unit.nbytes for unit in odd)
        found.append(Stretch(len(found), start, stop, (0, 0), nbytes, whole=True))
    end = len(plain) + len(odd), 0
    first = held = 0
    for number, nbytes in enumerate(copies):
        held += nbytes
        if held >= size or number == len(copies) - 1:
            found.append(Stretch(len(found), end, end, (first, number + 1), held))
            first, held = number + 1, 0
    return Work((*plain, *odd), tuple(found))


def _width(unit: Unit) -> int:
    """Return the bytes of an element in all checkpoints together."""
    return unit.nbytes // len(unit)


def _cut(units: Sequence[Unit], size: int, chunk: int) -> Iterator[Stretch]:
    begin, held, number = (0, 0), 0, 0
    for place, unit in enumerate(units):
        width, at = _width(unit), 0
        while at < len(unit):
            chunks = max((size - held) // (width * chunk), 1)
            left = (len(unit) - at) * width
            stop = len(unit) if held + left <= size else min(at + chunks * chunk, len(unit))
            held += (stop - at) * width
            at = stop
            if held >= size or at < len(unit):
                end = (place, at) if at < len(unit) else (place + 1, 0)
                yield Stretch(number, begin, end, (0, 0), held)
                begin, held, number = end, 0, number + 1
    if held:
        yield Stretch(number, begin, (len(units), 0), (0, 0), held)


def share(stretches: Sequence[Stretch], count: int) -> list[Sequence[Stretch]]:
    """Return the stretches of each of `count` workers: neighbours, and about as many bytes."""
    ends = [0, *accumulate(one.nbytes for one in stretches)]
    middles = [(a + b) / 2 for a, b in pairwise(ends)]
    limits = [bisect_left(middles, ends[-1] * k / count) for k in range(1, count)]
    limits = [0, *limits, len(stretches)]
    return [stretches[a:b] for a, b in pairwise(limits)]
