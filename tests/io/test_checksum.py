"""merge_avg.io._checksum: the CRC-32 of parts that arrive in any order."""

import itertools
import zlib

from hypothesis import given
from hypothesis import strategies as st

from merge_avg.io._checksum import Checksum


@given(data=st.binary(max_size=60), cuts=st.lists(st.integers(0, 60)), order=st.randoms())
def test_parts_in_any_order_give_the_checksum(data, cuts, order):
    """The combined CRC-32 is that of the whole, in whatever order its parts arrive."""
    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    parts = list(itertools.pairwise(edges))
    order.shuffle(parts)
    sums = Checksum(len(data))
    left = parts.pop() if parts else None
    for start, stop in parts:
        sums.add(start, stop - start, zlib.crc32(data[start:stop]))
    missing = sums.missing()
    assert sum(stop - start for start, stop in missing) == (left[1] - left[0] if left else 0)
    for start, stop in missing:
        sums.add(start, stop - start, zlib.crc32(data[start:stop]))
    assert sums.value() == zlib.crc32(data)


def test_overlapping_parts_are_left_to_be_read():
    """Of parts that overlap, the longest counts, or the first; what others have is missing."""
    data = b"0123456789"
    for parts, missing in (
        ([(0, 6), (4, 10)], [(6, 10)]),
        ([(0, 6), (4, 9), (2, 10)], [(0, 2)]),
        ([(4, 10), (0, 4), (2, 6)], []),
    ):
        sums = Checksum(10)
        for start, stop in parts:
            sums.add(start, stop - start, zlib.crc32(data[start:stop]))
        assert sums.missing() == missing


@given(data=st.data(), size=st.integers(1, 90))
def test_parts_that_overlap_give_the_checksum_too(data, size):
    """Whatever parts come, and however they overlap, with those missing they give the checksum."""
    whole = bytes(range(size))
    sums = Checksum(size)
    edge = st.integers(0, size)
    parts = data.draw(st.lists(st.tuples(edge, edge).map(sorted), max_size=80))
    for start, stop in parts:
        sums.add(start, stop - start, zlib.crc32(whole[start:stop]))
    for start, stop in sums.missing():
        sums.add(start, stop - start, zlib.crc32(whole[start:stop]))
    assert sums.missing() == []
    assert sums.value() == zlib.crc32(whole)


def test_a_checksum_of_nothing_and_of_all():
    """Nothing is missing where all has been added, or where there is nothing."""
    assert Checksum(0).missing() == []
    sums = Checksum(4)
    assert sums.missing() == [(0, 4)]
    sums.add(0, 4, zlib.crc32(b"0123"))
    assert sums.missing() == []


def test_a_complete_run_holds_one_part():
    """Parts that arrive in order are combined with the last one, however few they were."""
    sums = Checksum(30)
    for start in range(0, 30, 10):
        sums.add(start, 10, zlib.crc32(bytes(10)))
    assert (len(sums._parts), len(sums._fresh)) == (1, 0)
    assert sums.value() == zlib.crc32(bytes(30))
