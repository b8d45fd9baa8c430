"""What is read first is asked for early, and failing to ask is not a failure."""

import os
import time

import pytest
import torch
from safetensors.torch import save_file

from merge_avg.engine import _readahead as ahead
from merge_avg.engine._readahead import read_ahead, steps
from merge_avg.io import _platform as platform
from merge_avg.options import Options
from merge_avg.plan import prepare


@pytest.fixture
def job(tmp_path):
    """A merge of two files with 24 MB of weights each, the optimizer before them."""
    paths = []
    for number in range(2):
        state = {"optimizer": {"m": torch.zeros(1 << 21)}, "state_dict": {}}
        state["state_dict"] = {key: torch.randn(1 << 20) for key in "abcdef"}
        paths.append(tmp_path / f"{number}.pt")
        torch.save(state, paths[-1])
    return prepare(paths, tmp_path / "out.pt", Options())


def test_the_weights_are_asked_for_in_the_order_of_the_merge(job):
    """Every step that holds weights is named once, of all files by turns; no other is."""
    found = list(steps(job))
    assert len(set(found)) == len(found)
    assert {path for path, _ in found[:2]} == {str(layout.path) for layout in job.layouts}
    for layout in job.layouts:
        weights = [info.storage for info in layout.tensors if info.path[0] == "state_dict"]
        begins = {layout.offset(storage) // ahead._STEP * ahead._STEP for storage in weights}
        offsets = [offset for path, offset in found if path == str(layout.path)]
        assert begins <= set(offsets)
        assert offsets == sorted(offsets)
        assert min(offsets) > 0  # the optimizer's bytes stay where they are


def test_what_is_not_in_memory_comes_there(job):
    """What the cache does not hold is read in the background."""
    path = job.layouts[0].path
    (_, offset), *_ = [step for step in steps(job) if step[0] == str(path)]
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        try:
            there = platform._cached(file.fileno(), offset)
        except OSError:
            return  # this file system does not tell
        read_ahead(job)
        limit = time.monotonic() + 20
        while not there and time.monotonic() < limit:
            there = platform._cached(file.fileno(), offset)
        assert there


@pytest.mark.parametrize("what", ["no file", "no thread"])
def test_it_is_only_a_hint(job, monkeypatch, what):
    """A file that has gone, or a thread that cannot be had, is left to who reads in earnest."""
    if what == "no file":
        job.layouts[1].path.unlink()
        ahead._ask(job)
    else:
        monkeypatch.setattr(ahead.threading.Thread, "start", _refuse)
        read_ahead(job)


def _refuse(_):
    raise RuntimeError("can't start new thread")


def test_no_more_than_so_much_is_asked_for(tmp_path, monkeypatch):
    """However large the files, little more than the limit is asked for."""
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.zeros(6 << 20)}, path)
    job = prepare([path, path], tmp_path / "o.safetensors", Options())
    asked = []
    monkeypatch.setattr(ahead, "_MOST", 2 * ahead._STEP)
    monkeypatch.setattr(platform, "_cached", lambda *_: False)
    monkeypatch.setattr(ahead.os, "posix_fadvise", lambda *args: asked.append(args))
    ahead._ask(job)
    assert [offset for _, offset, *_ in asked] == [0, ahead._STEP]
