"""merge_avg.scratch: strided copies through a nameless file."""

import errno
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from merge_avg.errors import MergeError
from merge_avg.scratch import Scratch, slabs


@given(shape=st.lists(st.integers(1, 6), max_size=4), limit=st.integers(1, 50), turn=st.booleans())
def test_slabs_are_the_tensor_in_order(shape, limit, turn):
    """Slabs, one after the other, hold a tensor's elements in row-major order, within the limit."""
    view = torch.arange(torch.Size(shape).numel()).view(shape)
    view = view.transpose(0, -1) if turn and shape else view
    parts = list(slabs(view, limit))
    assert all(part.numel() <= limit for part in parts)
    assert torch.equal(torch.cat([part.reshape(-1) for part in parts]), view.reshape(-1))


def test_the_file_has_no_name_and_grows(tmp_path):
    """Nothing is to be seen in the directory, and what is mapped can be read back."""
    scratch = Scratch(tmp_path)
    scratch.map(1 << 16, 4).copy_(torch.tensor([1, 2, 3, 4], dtype=torch.uint8))
    assert not list(tmp_path.iterdir())
    buffer = bytearray(4)
    scratch.read(memoryview(buffer), 1 << 16)
    assert bytes(buffer) == b"\1\2\3\4"
    scratch.close()


def test_no_room_is_an_error(tmp_path, monkeypatch):
    """A full disk is told before anything is written to a mapping, where it would be fatal."""

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    scratch = Scratch(tmp_path)
    with pytest.raises(MergeError, match="No space left") as caught:
        scratch.map(0, 1 << 16)
    assert "65,536 bytes" in str(caught.value.hint)
    scratch.close()
