"""merge_avg.arithmetic: where integers differ, and what becomes of them."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merge_avg.arithmetic._integers import is_counter, settle, unequal, values_of
from merge_avg.arithmetic._weights import Weights
from merge_avg.checkpoint._dtypes import BY_NAME


@given(
    rows=st.integers(0, 12).flatmap(
        lambda size: st.lists(st.binary(min_size=8 * size, max_size=8 * size), min_size=2)
    ),
    itemsize=st.sampled_from([1, 2, 4, 8]),
)
def test_places_are_those_that_differ_in_some_pair(rows, itemsize):
    """Each place comes once and in order, whichever of its bytes differ, in however many pairs."""
    first, *others = map(memoryview, rows)
    ranges = range(0, len(first), itemsize)
    wanted = [
        at // itemsize
        for at in ranges
        if any(first[at : at + itemsize] != other[at : at + itemsize] for other in others)
    ]
    assert list(unequal(((first, other) for other in others), itemsize)) == wanted


INTEGERS = {
    "int8": [-1, 2],
    "uint8": [255, 2],
    "uint16": [65535, 1],
    "uint32": [1 << 31, 1],
    "int64": [-(1 << 63), 5],
    "uint64": [1 << 63, 1],
    "bool": [True, False],
}


@pytest.mark.parametrize(("name", "values"), INTEGERS.items())
def test_bytes_are_read_and_written_as_their_dtype(name, values):
    """Bytes are read with the dtype's sign and size, and writing changes the bytes."""
    size = BY_NAME[name].itemsize
    signed = values[0] < 0
    raw = bytearray(b"".join(int(v).to_bytes(size, "little", signed=signed) for v in values))
    view = values_of(memoryview(raw), BY_NAME[name])
    assert list(view) == values
    view[1] = values[0]
    assert raw[size:] == raw[:size]


def test_what_becomes_of_values():
    """Values become the largest, the exact mean rounded with ties to even, or the template's."""
    weights = Weights.of([1, 2, 1])
    assert settle([3, 9, 4], "max", weights) == 9
    assert settle([3, 9, 4], "template", weights) == 3
    values = [3, 4, 3]
    assert settle(values, "mean", weights) == round(Fraction(14, 4)) == 4
    assert settle([1 << 62, 1 << 62, (1 << 62) + 4], "mean", weights) == (1 << 62) + 1


def test_counters_are_told_by_name_and_shape():
    """Scalars and num_batches_tracked are counters; bools never are."""
    assert is_counter("step", 0, is_bool=False)
    assert is_counter("bn.num_batches_tracked", 1, is_bool=False)
    assert not is_counter("ids", 1, is_bool=False)
    assert not is_counter("flag", 0, is_bool=True)
