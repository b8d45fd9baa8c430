"""Blocks, strips and windows: each element is in one window, and each block in one strip."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from merge_avg.scaled import _numbers as of
from merge_avg.scaled._blocks import Blocks, cut, extents


@st.composite
def layouts(draw):
    """A shape, and the extents of a block that `cut` understands."""
    shape = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    block = [draw(st.integers(1, extent)) for extent in shape]
    for k in range(len(shape) - 2):  # leading dimensions are cut into ones, or not at all
        block[k] = 1
    if draw(st.booleans()):
        block = shape[:]
        first = draw(st.integers(0, len(shape)))
        block[:first] = [1] * first
    return tuple(shape), tuple(block)


def numbered(shape, block):
    """The number of each element's block, in the order in which scales lie."""
    counts = [-(-extent // size) for extent, size in zip(shape, block, strict=True)]
    places = torch.zeros(shape, dtype=torch.long)
    for axis, (extent, size) in enumerate(zip(shape, block, strict=True)):
        step = math.prod(counts[axis + 1 :])
        along = (torch.arange(extent) // size * step).view(
            [-1 if k == axis else 1 for k in range(len(shape))]
        )
        places = places + along
    return places.view(-1), math.prod(counts)


@given(layouts(), st.integers(1, 40))
def test_every_element_and_block_once(layout, most):
    """Windows follow each other, and what they say of elements and blocks is so."""
    shape, block = layout
    places, count = numbered(shape, block)
    blocks = cut(shape, block)
    assert (blocks.count, blocks.numel) == (count, len(places))
    at = number = 0
    values = torch.arange(1.0, len(places) + 1, dtype=torch.float64)
    for strip in blocks.strips(most):
        assert (strip.start, strip.first) == (at, number)
        number += strip.blocks
        found = torch.zeros(strip.blocks, dtype=torch.float64)
        for window in strip.windows(most):
            assert window.start == at
            assert window.stop - at <= max(most, 1)
            at = window.stop
            inside = torch.arange(strip.first, number)
            ours = of.spread(inside, strip, window).reshape(-1)
            assert torch.equal(ours, places[window.start : window.stop])
            of.largest(values[window.start : window.stop], strip, window, found)
        for k in range(strip.blocks):
            assert found[k] == values[places == strip.first + k].max()
    assert (at, number) == (len(places), count)


def test_unusual_blocks():
    """Blocks over several of the leading dimensions are not understood."""
    assert cut((4, 4, 4), (2, 2, 2)) is None
    assert cut((4, 4, 4), (2, 4, 4)) == Blocks(1, 1, 64, (1, 32))


@pytest.mark.parametrize(
    ("shape", "scales", "usual", "found"),
    [
        ((256, 384), (2, 3), (), (128, 128)),
        ((200, 300), (2, 3), (), (100, 100)),
        ((200, 300), (2, 3), (128, 128), (128, 128)),
        ((201, 300), (2, 3), (), None),
        ((6, 70), (6, 1), (), (1, 70)),
        ((6, 70), (70,), (), (6, 1)),
        ((6, 6), (6,), (), None),  # a row or a column
        ((6, 70), (1, 1), (), (6, 70)),
        ((6, 70), (), (), (6, 70)),
        ((6,), (3,), (), (2,)),
        ((6,), (3,), (128, 128), (2,)),
        ((6, 70), (6, 70), (), None),
        ((6, 70), (3, 0), (), None),
        ((2, 256, 384), (2, 2, 3), (128, 128), (1, 128, 128)),
        ((2, 256, 384), (2, 1, 1), (128, 128), (1, 256, 384)),
        ((6, 70), (2, 6, 70), (), None),
    ],
)
def test_extents_of_blocks(shape, scales, usual, found):
    """The extents of a block follow from shapes; where these leave it open, from what is usual."""
    assert extents(shape, scales, usual) == found
