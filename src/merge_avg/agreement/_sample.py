"""Which elements of a tensor are looked at: a function of sizes alone.

Nothing here depends on windows, so the figures depend neither on threads nor on memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from merge_avg.tuning import WHOLE

# The rule of thumb: about one element in 128, which costs next to nothing beside the reading. The
# first 64 of every 8192 are taken, and not every 128th: 64 neighbours lie in a few cache lines, and
# 64 that lie apart in 64.
BLOCK = 8192
_TAKEN = BLOCK // 128
# A model of 2^24 elements already gives 131,072 of them, by which a cosine is known to 0.003. From
# there on whole spans of blocks are left out, so that products do not grow with the model; but not
# more than 63 of 64, or parts of a model would have no say.
_SPAN = 16 * BLOCK
_LARGE = 1 << 24
_MOST_EVERY = 64
_MANY = 16  # checkpoints, from which products (of all pairs) cost more than what is read


@dataclass(frozen=True, slots=True)
class Sample:
    """Which elements of a tensor of `size` elements are looked at."""

    size: int
    taken: int = BLOCK  # of each block, from its start; of a shorter last block as large a part
    every: int = 1  # the blocks of every span, of every second one from the first, ...

    def before(self, place: int) -> int:
        """Return how many of the elements before a place are looked at."""
        if self.taken == BLOCK:
            return place
        last = self.size // BLOCK * BLOCK
        inside = min(min(place, last) % (self.every * _SPAN), _SPAN)
        count = min(place, last) // (self.every * _SPAN) * (_SPAN // BLOCK * self.taken)
        count += inside // BLOCK * self.taken + min(inside % BLOCK, self.taken)
        if place > last and last // _SPAN % self.every == 0:
            count += min(place - last, self._taken_of_last)
        return count

    def segments(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Yield where elements from `start` to `stop` are looked at, from `start`, and how many."""
        if self.taken == BLOCK:
            yield 0, stop - start
            return
        last = self.size // BLOCK * BLOCK
        first, period = start // BLOCK * BLOCK, self.every * _SPAN
        blocks = (
            block
            for span in range(start // period * period, stop, period)
            for block in range(max(span, first), min(span + _SPAN, stop), BLOCK)
        )
        for block in blocks:
            taken = self.taken if block < last else self._taken_of_last
            begin, end = max(start, block), min(stop, block + taken)
            if begin < end:
                yield begin - start, end - begin

    @property
    def _taken_of_last(self) -> int:
        # Rounded up: of the smallest tensor one element is looked at.
        return -(-(self.size % BLOCK) * self.taken // BLOCK)

    @property
    def elements(self) -> int:
        """Return how many elements are looked at."""
        return self.before(self.size)


def samples(sizes: Sequence[int], checkpoints: int) -> Iterator[Sample]:
    """Yield the sample of each tensor of a model, by their sizes."""
    total, checkpoints = max(sum(sizes), 1), max(checkpoints, 1)
    # Of small models more is looked at, up to all: WHOLE numbers of all checkpoints cost nothing.
    taken = min(max(BLOCK * WHOLE // (total * checkpoints), _TAKEN), BLOCK)
    every = min(max(total * max(checkpoints, _MANY) // (_MANY * _LARGE), 1), _MOST_EVERY)
    # As many numbers again are spent on the smallest tensors, which are looked at whole: a part of
    # a few hundred elements says nothing about the tensor that they are of.
    left = WHOLE // checkpoints
    whole = set()
    for number in sorted(range(len(sizes)), key=sizes.__getitem__):
        left -= sizes[number]
        if left < 0:
            break
        whole.add(number)
    for number, size in enumerate(sizes):
        yield Sample(size) if number in whole else Sample(size, taken, every)
