"""merge_avg.files: reading by offset, and checksums of parts in any order."""

import itertools
import os
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merge_avg.errors import MergeError
from merge_avg.files import Checksum, Reader
from merge_avg.layout import Storage


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
    """A part that overlaps another cannot be combined and stays missing."""
    data = b"0123456789"
    sums = Checksum(10)
    sums.add(0, 6, zlib.crc32(data[:6]))
    sums.add(4, 6, zlib.crc32(data[4:]))
    assert sums.missing() == [(6, 10)]


def test_finish_reads_the_rest_and_finds_damage(tmp_path):
    """Bytes that nobody asked for are read for their checksum; a wrong one is an error."""
    path = tmp_path / "a"
    path.write_bytes(b"xx" + b"0123456789")
    good = Storage("data/0", 2, 10, zlib.crc32(b"0123456789"))
    for storage, damaged in ((good, False), (Storage("data/0", 2, 10, 1), True)):
        reader = Reader(path)
        part = bytearray(3)
        reader.read(memoryview(part), 5, storage)
        assert part == b"345"
        if damaged:
            with pytest.raises(MergeError, match="'data/0' is damaged"):
                reader.finish()
        else:
            reader.finish()
        reader.close()


def test_a_file_that_shrinks_or_changes_is_an_error(tmp_path):
    """A file that ends too early, or was written to meanwhile, is named."""
    path = tmp_path / "a"
    path.write_bytes(b"0123")
    reader = Reader(path)
    with pytest.raises(MergeError, match="ends at byte 4"):
        reader.read(memoryview(bytearray(8)), 0)
    os.truncate(path, 2)
    with pytest.raises(MergeError, match="changed while it was read"):
        reader.finish()
    reader.close()
