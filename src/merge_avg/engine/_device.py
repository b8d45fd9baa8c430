"""The way of elements from files into host memory, and on to where sums are kept.

On the CPU that is one step. For a GPU, elements are read into page-locked host memory and copied on
a stream of their own, while the next ones are read and the last ones are added on another stream.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from merge_avg.io import Buffer, Matrix, Stack

T = TypeVar("T")


class HostLane:
    """One worker's way to the device, with room for `slots` things at a time.

    This is the CPU's: what was read is where it is needed, and there is nothing to wait for.
    """

    slots = 1

    def __init__(self, nbytes: int) -> None:
        self._buffer = Buffer(nbytes)

    def room(self, slot: int) -> Buffer:  # noqa: ARG002 - there is one
        """Return host memory to fill, once nothing reads from it any more."""
        return self._buffer

    def send(self, slot: int, rows: Matrix) -> Stack:  # noqa: ARG002
        """Start a copy of what lies in a slot to the device, and return where it goes."""
        return rows

    def arrived(self, slot: int) -> None:
        """Let arithmetic that is asked for from now on wait for the copy."""

    def release(self, slot: int) -> None:
        """Let the next copy into the slot wait for arithmetic that was asked for until now."""

    def close(self) -> None:
        """Wait for everything, and give the memory back."""


def travel(
    lane: HostLane, items: Iterable[T], fill: Callable[[T, Buffer], Matrix]
) -> Iterator[tuple[T, Stack]]:
    """Yield each item with its elements on the device, while the next is read.

    `fill` reads an item into a slot's memory, and returns where its elements lie.
    """
    ahead: deque[tuple[int, T, Stack]] = deque()

    def use() -> Iterator[tuple[T, Stack]]:
        slot, item, stack = ahead.popleft()
        lane.arrived(slot)
        yield item, stack
        lane.release(slot)

    for number, item in enumerate(items):
        # A slot is taken again only when what was in it has been used: with two slots, one item is
        # read and copied while the one before is added.
        slot = number % lane.slots
        if len(ahead) == lane.slots:
            yield from use()
        ahead.append((slot, item, lane.send(slot, fill(item, lane.room(slot)))))
        if lane.slots == 1:
            yield from use()
    while ahead:
        yield from use()


def make_lane(nbytes: int, device: str) -> HostLane:
    """Return the lane of a device, for `nbytes` bytes at a time."""
    if device == "cpu":
        return HostLane(nbytes)
    from merge_avg.engine._cuda import CudaLane

    return CudaLane(nbytes, device)
