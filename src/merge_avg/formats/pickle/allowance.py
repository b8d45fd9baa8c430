"""A bound on the memory and time that reading one pickle may take.

A pickle of a few kilobytes can ask for gigabytes of objects, or for hours of work. So each object
is paid for before it is made, from an allowance that grows with the bytes read so far:

    limit
      |                             ______----   24 bytes for each byte of the pickle
    180 MB  . . . .______-----------
      |         /
      |       /   200 bytes for each byte of the pickle
    300 kB  /
      +------------------------------------------  bytes of the pickle that were read

A state dict of torch.save takes about 16 bytes for each byte of its pickle (measured with 20,000
tensors), so no honest checkpoint comes near the limit.
"""

from __future__ import annotations

from dataclasses import dataclass

from merge_avg.formats.pickle.values import PickleError

_FIRST = 300_000
_SMALL, _STEEP = 180_000_000, 200
_FLAT = 24


@dataclass(slots=True)
class Allowance:
    """The bytes that the objects of a pickle take, by an estimate on the high side.

    Work that takes only time is paid in bytes too, at about one for each 10 ns.

    Attributes:
        density: how much each byte of the pickle counts; below 1 where the pickle was compressed.
        used: bytes spent so far.
        limit: bytes that may be spent, for the part of the pickle that was read so far.
        read: bytes of the pickle read so far.
    """

    density: float = 1.0
    used: int = 0
    limit: int = _FIRST
    read: int = 0

    def spend(self, nbytes: int) -> None:
        """Pay for an object, or raise PickleError if it is too large."""
        self.used += nbytes
        if self.used > self.limit:
            read = int(self.density * self.read)
            self.limit = max(self.limit, min(_FIRST + _STEEP * read, _SMALL), _FLAT * read)
        if self.used > self.limit:
            raise PickleError("the objects of its pickle would take more memory than they should")
