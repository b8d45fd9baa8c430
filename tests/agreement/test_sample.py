"""Which elements are looked at follows from sizes, never from windows."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from merge_avg.agreement._sample import Sample, samples


def looked_at(sample, start, stop):
    segments = sample.segments(start, stop)
    found = [torch.arange(begin, begin + count) for begin, count in segments]
    return torch.cat([torch.arange(0), *found]) + start


@given(
    st.integers(1, 1_500_000),
    st.integers(0, 1_500_000),
    st.integers(1, 400_000),
    st.sampled_from([64, 200, 8191, 8192]),
    st.integers(1, 5),
)
def test_pieces_are_looked_at_like_the_whole(size, start, length, taken, every):
    """What is looked at in a part of a tensor is what of the whole lies there, and counted so."""
    sample = Sample(size, taken, every if taken < 8192 else 1)
    start = min(start, size - 1)
    stop = min(start + length, size)
    whole = looked_at(sample, 0, size)
    part = looked_at(sample, start, stop)
    assert torch.equal(part, whole[(whole >= start) & (whole < stop)])
    assert sample.before(stop) - sample.before(start) == len(part)
    assert sample.elements == len(whole) >= max(1, size // 128 // every // 2)


@given(st.lists(st.integers(1, 1 << 22), min_size=1, max_size=30), st.integers(1, 200))
def test_every_tensor_has_a_sample(sizes, checkpoints):
    """Each tensor has a sample of at least one element, and never of more than it has."""
    found = list(samples(sizes, checkpoints))
    assert [one.size for one in found] == sizes
    assert all(1 <= one.elements <= one.size for one in found)


def test_small_tensors_are_taken_first():
    """Beside a large tensor the smallest are looked at whole, up to a fixed number of elements."""
    found = list(samples([1 << 24, 1000, 20_000, 60_000], 2))
    assert [one.elements == one.size for one in found] == [False, True, True, False]


def test_of_more_checkpoints_less_is_looked_at():
    """A hundred checkpoints of a large model are compared in fewer spans than two are."""
    few, many = (next(samples([1 << 27], count)).elements for count in (2, 100))
    assert many < few / 4
