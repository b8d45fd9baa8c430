"""Tensors in a geometry other than that of their file."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from merge_avg.engine._restride import mask_members, restore, slabs
from merge_avg.io import Scratch


@given(shape=st.lists(st.integers(1, 6), max_size=4), limit=st.integers(1, 50), turn=st.booleans())
def test_slabs_are_the_tensor_in_order(shape, limit, turn):
    """Slabs, one after the other, hold a tensor's elements in row-major order, within the limit."""
    view = torch.arange(torch.Size(shape).numel()).view(shape)
    view = view.transpose(0, -1) if turn and shape else view
    parts = list(slabs(view, limit))
    assert all(part.numel() <= limit for part in parts)
    assert torch.equal(torch.cat([part.reshape(-1) for part in parts]), view.reshape(-1))


def test_what_no_tensor_reaches_is_restored(tmp_path):
    """Marks are set where views reach, and all other elements get the template's values."""
    scratch = Scratch(tmp_path)
    mask = scratch.map(0, 10)
    view = type("View", (), {"shape": (2, 2), "stride": (4, 1), "start": 103})
    mask_members(mask, [("a", view)], 102)
    assert list(mask[:]) == [0, 1, 1, 0, 0, 1, 1, 0, 0, 0]
    out, theirs = torch.zeros(6), torch.arange(6).bfloat16() + 1
    restore(out, theirs, mask, 1)
    assert out.tolist() == [0, 0, 3, 4, 0, 0]
    scratch.close()
