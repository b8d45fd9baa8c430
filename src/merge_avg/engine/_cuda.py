"""The lane of a GPU: what is read travels on one stream, while another adds."""

from __future__ import annotations

import torch
from torch import Tensor

from merge_avg.engine._device import HostLane
from merge_avg.errors import MergeError
from merge_avg.io import Buffer, Matrix


class CudaLane(HostLane):
    """A GPU's lane: two slots in turn, copies on one stream and arithmetic on another."""

    slots = 2

    def __init__(self, nbytes: int, device: str) -> None:
        self._device = torch.device(device)
        self._copies = torch.cuda.Stream(self._device)
        self._sums = torch.cuda.Stream(self._device)
        self._entered = torch.cuda.stream(self._sums)
        self._rooms = [Buffer(nbytes) for _ in range(self.slots)]
        # When a slot's host memory may be filled again, and when its device memory may be written.
        self._copied = [torch.cuda.Event() for _ in range(self.slots)]
        self._used = [torch.cuda.Event() for _ in range(self.slots)]
        self._locked: list[int] = []
        try:
            self._memory = [
                torch.empty(nbytes, dtype=torch.uint8, device=self._device)
                for _ in range(self.slots)
            ]
        except torch.cuda.OutOfMemoryError:
            hint = "use a smaller --max-memory, or --device cpu"
            raise MergeError(f"{device} has not enough free memory", hint=hint) from None
        for room in self._rooms:
            # From page-locked memory a copy is asynchronous; where it cannot be had, only slower.
            if torch.cuda.cudart().cudaHostRegister(room.address, nbytes, 0) == 0:
                self._locked.append(room.address)
        # From here on, whatever this thread asks torch for is asked of the stream of sums.
        self._entered.__enter__()

    def room(self, slot: int) -> Buffer:
        self._copied[slot].synchronize()
        return self._rooms[slot]

    def send(self, slot: int, rows: Matrix) -> Tensor:
        stack = rows.tensor()
        flat = stack.reshape(-1)
        there = self._memory[slot][: flat.numel() * flat.itemsize].view(flat.dtype)
        with torch.cuda.stream(self._copies):
            self._copies.wait_event(self._used[slot])
            there.copy_(flat, non_blocking=True)
            self._copied[slot].record(self._copies)
        return there.view(stack.shape)

    def arrived(self, slot: int) -> None:
        self._sums.wait_event(self._copied[slot])

    def release(self, slot: int) -> None:
        self._used[slot].record(self._sums)

    def close(self) -> None:
        self._entered.__exit__(None, None, None)
        # Memory that a copy still reads from must not be unlocked.
        torch.cuda.synchronize(self._device)
        for pointer in self._locked:
            torch.cuda.cudart().cudaHostUnregister(pointer)
        self._locked.clear()


def find_device(name: str) -> tuple[str, int | None]:
    """Return the device of a name such as "cuda:1", and the bytes that are free on it if a GPU."""
    try:
        device = torch.device(name)
    except RuntimeError:
        hint = "use cpu, cuda, or cuda:N"
        raise MergeError(f"there is no device {name!r}", hint=hint) from None
    if device.type == "cpu":
        return "cpu", None
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type != "cuda" or (device.index or 0) >= count:
        hint = f"CUDA devices found: {count}; use --device cpu"
        raise MergeError(f"there is no device {name!r}", hint=hint)
    free, _ = torch.cuda.mem_get_info(device)
    return name, free
