"""merge_avg.formats.distributed.metadata: boxes that cover a tensor, each element once."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from merge_avg.formats.distributed.metadata import tile


@pytest.mark.parametrize(
    ("boxes", "fits"),
    [
        ([((0, 0), (2, 3)), ((2, 0), (1, 3))], True),
        ([((0, 0), (2, 3)), ((1, 0), (1, 3))], False),  # overlap, and a hole
        ([((0, 0), (2, 2)), ((0, 2), (2, 1)), ((2, 0), (1, 3))], True),
        ([((0, 0), (2, 2)), ((1, 1), (2, 2)), ((0, 2), (1, 1))], False),
        ([((0, 0), (3, 3))], True),
        ([((0, 0), (3, 3)), ((0, 0), (1, 1))], False),
        ([((0, 0), (3, 4))], False),  # reaches outside
        ([], False),
    ],
)
def test_boxes_that_tile(boxes, fits):
    """Boxes that overlap, leave a hole or reach outside are told from those that tile."""
    assert tile(boxes, (3, 3)) == fits


def test_any_way_of_cutting_is_a_tiling():
    """A thousand boxes of a grid tile it, and do not if one lacks or is there twice."""
    edges = [range(10)] * 3
    boxes = [((a, 2 * b, 3 * c), (1, 2, 3)) for a, b, c in itertools.product(*edges)]
    assert tile(boxes, (10, 20, 30))
    assert not tile(boxes[1:], (10, 20, 30))
    assert not tile([*boxes, boxes[0]], (10, 20, 30))
    assert not tile([*boxes[1:], boxes[1]], (10, 20, 30))


EXTENTS = st.tuples(st.integers(0, 3), st.integers(0, 3))


@given(
    boxes=st.lists(st.tuples(EXTENTS, st.tuples(st.integers(1, 3), st.integers(1, 3))), max_size=5),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3)),
)
def test_a_tiling_counts_each_element_once(boxes, shape):
    """The corners say what painting every box into a grid says."""
    grid = np.zeros((7, 7), int)
    for (row, column), (height, width) in boxes:
        grid[row : row + height, column : column + width] += 1
    inside = np.zeros((7, 7), int)
    inside[: shape[0], : shape[1]] = 1
    assert tile(boxes, shape) == bool((grid == inside).all())


def test_a_tensor_without_elements_has_no_boxes():
    """Nothing covers nothing; a box there is one too many, as is one of other dimensions."""
    assert tile([], (0, 3))
    assert not tile([((0, 0), (1, 1))], (0, 3))
    assert not tile([((0,), (3,))], (3, 1))


def test_a_tensor_that_is_cut_along_too_many_dimensions_is_refused():
    """A box of seven dimensions has 128 corners: nobody cuts like that."""
    halves = itertools.product((0, 1), repeat=7)
    assert not tile([(corner, (1,) * 7) for corner in halves], (2,) * 7)
