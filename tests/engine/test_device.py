"""What travels to a device arrives whole, in order, and is never overwritten."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from merge_avg.arithmetic import _mean
from merge_avg.checkpoint._dtypes import BY_NAME
from merge_avg.engine import _worker as work
from merge_avg.engine._device import HostLane, travel
from merge_avg.errors import MergeError
from merge_avg.io import Buffer
from merge_avg.io._reader import Tap
from merge_avg.plan._budget import Budget, plan_budget
from tests.helpers import merge_checkpoints


class DelayedLane:
    """Stands in for a GPU's lane: a copy happens as late as its streams and events allow.

    Until then the place holds garbage, and host memory that is filled too early, or a place that is
    used too long, shows as a wrong value.
    """

    host = False

    def __init__(self, nbytes, slots=2):
        self.slots = slots
        self._rooms = [Buffer(nbytes) for _ in range(slots)]
        self._places = [Buffer(nbytes) for _ in range(slots)]
        self._pending = {}
        self._used = [True] * slots
        self.closed = False

    def room(self, slot):
        self._copy(slot)
        return self._rooms[slot]

    def send(self, slot, rows):
        self._copy(slot)
        stack = rows.tensor()
        place = self._places[slot].tensor(stack.numel(), stack.dtype).view(stack.shape)
        self._pending[slot] = (place, stack)
        return place

    def _copy(self, slot):
        if slot in self._pending:
            place, stack = self._pending.pop(slot)
            assert self._used[slot], "a copy would overwrite what arithmetic still reads"
            self._used[slot] = False
            place.copy_(stack)
            stack.view(torch.uint8).fill_(0xFF)  # whoever reads it again reads garbage

    def arrived(self, slot):
        self._copy(slot)

    def release(self, slot):
        self._used[slot] = True
        self._places[slot].tensor(8, torch.uint8).fill_(0xFF)

    def fetch(self, values, out):
        out.copy_(values)

    def close(self):
        assert not self._pending
        self.closed = True


@given(values=st.lists(st.integers(-9, 9), max_size=12), slots=st.integers(1, 4))
def test_everything_arrives_once_and_in_order(values, slots):
    """Whatever the number of slots, each item comes with its own elements."""
    lane = DelayedLane(64, slots)

    def fill(value, room):
        room.tensor(4, torch.float32).fill_(value)
        return room.rows(1, 4, BY_NAME["float32"])

    seen = [(item, stack.tolist()) for item, stack in travel(lane, values, fill)]
    assert seen == [(value, [[value] * 4]) for value in values]
    lane.close()


def test_items_are_read_ahead():
    """With two slots the next item is read before the last one is used."""
    events = []

    def fill(item, room):
        events.append(f"read {item}")
        return room.rows(1, 1, BY_NAME["float32"])

    for item, _ in travel(DelayedLane(64), "abc", fill):
        events.append(f"use {item}")
    assert events == ["read a", "read b", "use a", "read c", "use b", "use c"]
    events.clear()
    for item, _ in travel(HostLane(64), "ab", fill):
        events.append(f"use {item}")
    assert events == ["read a", "use a", "read b", "use b"]


DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.complex64, torch.int64]


@pytest.mark.parametrize("count", [1, 3, 7])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_merge_by_way_of_a_device_is_the_same_to_the_bit(tmp_path, monkeypatch, dtype, count):
    """The code path of a GPU, on the stand-in, gives the bytes that the CPU's gives."""
    paths = [tmp_path / f"{fold}.pt" for fold in range(count)]
    for fold, path in enumerate(paths):
        generator = torch.Generator().manual_seed(fold)
        real = torch.randn(50_000, generator=generator) * 100
        same = torch.arange(50_000) if dtype == torch.int64 else real
        odd = torch.where(real > 300, torch.inf, real).to(dtype) if dtype != torch.int64 else same
        torch.save({"w": same.to(dtype), "t": same.to(dtype).view(500, 100).t(), "odd": odd}, path)
    options = {"allow_nonfinite": True, "max_memory": 7 << 20}
    merge_checkpoints(paths, tmp_path / "cpu.pt", **options)
    lanes = []

    def make(nbytes, _):
        lanes.append(DelayedLane(nbytes))
        return lanes[-1]

    monkeypatch.setattr(_mean, "LOOPS", None)  # what a GPU adds, torch adds
    monkeypatch.setattr(work, "make_lane", make)
    merge_checkpoints(paths, tmp_path / "device.pt", **options)
    assert (tmp_path / "cpu.pt").read_bytes() == (tmp_path / "device.pt").read_bytes()
    assert lanes
    assert all(lane.closed for lane in lanes)


@pytest.mark.parametrize("memory", [7 << 20, 64 << 20])
def test_each_file_is_read_once_and_in_order(tmp_path, monkeypatch, memory):
    """By way of a device too: every byte of the weights once, each file from front to back."""
    paths = [tmp_path / f"{fold}.safetensors" for fold in range(3)]
    for fold, path in enumerate(paths):
        generator = torch.Generator().manual_seed(fold)
        big = torch.randn(600_000, generator=generator)
        save_file({"a": big, "b": big[:70_001] * 2, "c": big[:9].bfloat16()}, path)
    taken = {path: [] for path in paths}
    read = Tap.read

    def noted(self, into, at, *, again=False):
        taken[self.path].append((self.offset + at, len(into)))
        read(self, into, at, again=again)

    monkeypatch.setattr(Tap, "read", noted)
    monkeypatch.setattr(_mean, "LOOPS", None)
    monkeypatch.setattr(work, "make_lane", lambda nbytes, _: DelayedLane(nbytes))
    result = merge_checkpoints(paths, tmp_path / "o.safetensors", threads=1, max_memory=memory)
    assert result.nbytes == 3 * 4 * 670_001 + 3 * 2 * 9
    for ranges in taken.values():
        assert ranges == sorted(ranges)
        ends = [at + nbytes for at, nbytes in ranges]
        assert all(at >= end for (at, _), end in zip(ranges[1:], ends, strict=False))
        assert sum(nbytes for _, nbytes in ranges) * 3 == result.nbytes


def test_windows_fit_the_device():
    """Free device memory cuts the window; too little of it is one clear error."""
    plan = plan_budget(8, 4, 10, threads=2)
    small = plan.fitting(40 << 20)
    assert small.window < plan.window
    assert 2 * small.nbytes <= 40 << 20
    assert plan.fitting(1 << 40) == plan
    with pytest.raises(MergeError, match="not enough free memory"):
        Budget(2, 1 << 17, 8, 4).fitting(1 << 20)
