"""Where a worker's elements travel: from files into host memory, and on to where sums are kept.

On the CPU that is one step. For a GPU, elements are read into page-locked host memory and copied on
a stream of their own, while the next ones are read and the last ones are added on another stream.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from merge_avg.buffer import Buffer
from merge_avg.errors import MergeError

T = TypeVar("T")


class Lane(Protocol):
    """One worker's way to the device. `host`: the device is the CPU, whose memory is one."""

    slots: int
    host: bool

    def room(self, slot: int) -> Buffer:
        """Host memory to fill, once nothing reads from it any more."""

    def send(self, slot: int, stack: Tensor) -> Tensor:
        """Starts a copy of what lies in a slot to the device; returns where it goes."""

    def arrived(self, slot: int) -> None:
        """Lets arithmetic that is asked for from now on wait for the copy."""

    def release(self, slot: int) -> None:
        """Lets the next copy into the slot wait for arithmetic that was asked for until now."""

    def fetch(self, values: Tensor, out: Tensor) -> None:
        """Copies a result to host memory, and waits for it."""

    def close(self) -> None:
        """Waits for everything, and gives the memory back."""


def travel(
    lane: Lane, items: Iterable[T], fill: Callable[[T, Buffer], Tensor]
) -> Iterator[tuple[T, Tensor]]:
    """Each item with its elements on the device, while the next is read.

    Args:
        lane: the way.
        items: what is to be read.
        fill: reads an item into a slot's memory, and returns a view of that.
    """
    ahead: deque[tuple[int, T, Tensor]] = deque()

    def use() -> Iterator[tuple[T, Tensor]]:
        slot, item, stack = ahead.popleft()
        lane.arrived(slot)
        yield item, stack
        lane.release(slot)

    for number, item in enumerate(items):
        slot = number % lane.slots
        if len(ahead) == lane.slots:
            yield from use()
        ahead.append((slot, item, lane.send(slot, fill(item, lane.room(slot)))))
        if lane.slots == 1:
            yield from use()
    while ahead:
        yield from use()


class HostLane:
    """The CPU's: what was read is where it is needed."""

    slots = 1
    host = True

    def __init__(self, nbytes: int) -> None:
        self._buffer = Buffer(nbytes)

    def room(self, slot: int) -> Buffer:  # noqa: ARG002 - there is one
        return self._buffer

    def send(self, slot: int, stack: Tensor) -> Tensor:  # noqa: ARG002
        return stack

    def arrived(self, slot: int) -> None:
        pass

    def release(self, slot: int) -> None:
        pass

    def fetch(self, values: Tensor, out: Tensor) -> None:
        if values.data_ptr() != out.data_ptr():
            out.copy_(values)

    def close(self) -> None:
        pass


class CudaLane:
    """A GPU's: two slots in turn, copies on one stream and arithmetic on another.

    Raises:
        MergeError: the device or the system has no memory left for it.
    """

    slots = 2
    host = False

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self._device = device
        self._copies = torch.cuda.Stream(device)
        self._sums = torch.cuda.Stream(device)
        self._entered = torch.cuda.stream(self._sums)
        self._rooms = [Buffer(nbytes) for _ in range(self.slots)]
        self._copied = [torch.cuda.Event() for _ in range(self.slots)]
        self._used = [torch.cuda.Event() for _ in range(self.slots)]
        self._locked: list[int] = []
        try:
            self._places = [
                torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(self.slots)
            ]
        except torch.cuda.OutOfMemoryError:
            hint = "use a smaller --max-memory, or --device cpu"
            raise MergeError(f"{device} has not enough free memory", hint=hint) from None
        for room in self._rooms:
            # Page-locked, so that copies need not wait; a failure costs speed only.
            pointer = room.tensor(1, torch.uint8).data_ptr()
            if torch.cuda.cudart().cudaHostRegister(pointer, nbytes, 0) == 0:
                self._locked.append(pointer)
        self._entered.__enter__()

    def room(self, slot: int) -> Buffer:
        self._copied[slot].synchronize()
        return self._rooms[slot]

    def send(self, slot: int, stack: Tensor) -> Tensor:
        flat = stack.reshape(-1)
        place = self._places[slot][: flat.numel() * flat.itemsize].view(flat.dtype)
        with torch.cuda.stream(self._copies):
            self._copies.wait_event(self._used[slot])
            place.copy_(flat, non_blocking=True)
            self._copied[slot].record(self._copies)
        return place.view(stack.shape)

    def arrived(self, slot: int) -> None:
        self._sums.wait_event(self._copied[slot])

    def release(self, slot: int) -> None:
        self._used[slot].record(self._sums)

    def fetch(self, values: Tensor, out: Tensor) -> None:
        out.copy_(values)

    def close(self) -> None:
        self._entered.__exit__(None, None, None)
        torch.cuda.synchronize(self._device)
        for pointer in self._locked:
            torch.cuda.cudart().cudaHostUnregister(pointer)
        self._locked.clear()


def make_lane(nbytes: int, device: torch.device) -> Lane:
    """The lane of a device, for `nbytes` bytes at a time."""
    return HostLane(nbytes) if device.type == "cpu" else CudaLane(nbytes, device)
