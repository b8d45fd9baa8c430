"""merge_avg.files: reading by offset, and checksums of parts in any order."""

import contextlib
import itertools
import os
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merge_avg.errors import MergeError
from merge_avg.files import Checksum, Reader
from merge_avg.layout import File, Layout, Storage


def opened(*paths):
    return Reader(Layout(paths[0], "?", tuple(map(File.of, paths)), ()), paths[0].parent)


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
        reader = opened(path)
        part = bytearray(3)
        reader.read(memoryview(part), storage, 3)
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
    reader = opened(path)
    with pytest.raises(MergeError, match="ends at byte 4"):
        reader.read(memoryview(bytearray(8)), Storage("all", 0, 8), 0)
    os.truncate(path, 2)
    with pytest.raises(MergeError, match="changed while it was read"):
        reader.finish()
    reader.close()


def test_a_file_that_was_replaced_after_the_scan_is_an_error(tmp_path):
    """What is opened has to be what was scanned."""
    path = tmp_path / "a"
    path.write_bytes(b"0123")
    reader = opened(path)
    (tmp_path / "b").write_bytes(b"4567")
    (tmp_path / "b").replace(path)
    with pytest.raises(MergeError, match="changed while it was read"):
        reader.read(memoryview(bytearray(4)), Storage("all", 0, 4), 0)
    reader.close()


@given(
    sizes=st.lists(st.integers(0, 7), min_size=1, max_size=6),
    where=st.tuples(st.integers(0, 30), st.integers(0, 30)),
)
def test_parts_read_as_one(tmp_path_factory, sizes, where):
    """A storage of parts, in several files, reads as their bytes one after the other."""
    folder = tmp_path_factory.mktemp("parts")
    whole, parts, paths = b"", [], []
    for number, size in enumerate(sizes):
        data = bytes(range(len(whole), len(whole) + size))
        paths.append(folder / str(number))
        paths[-1].write_bytes(b"xyz" + data)
        parts.append(Storage(str(number), 3, size, file=number))
        whole += data
    start, stop = sorted(min(place, len(whole)) for place in where)
    reader = opened(*paths)
    into = bytearray(stop - start)
    reader.read(memoryview(into), Storage("all", 0, len(whole), parts=tuple(parts)), start)
    assert into == whole[start:stop]
    reader.close()


@given(data=st.binary(max_size=3000), word=st.sampled_from([1, 2, 4, 8]), packed=st.booleans())
def test_coded_storages_read_as_what_they_stand_for(tmp_path_factory, data, word, packed):
    """Deflated bytes are inflated, and words in big-endian order turned; checksums are held."""
    data = data[: len(data) // 8 * 8]
    path = tmp_path_factory.mktemp("coded") / "a"
    packer = zlib.compressobj(wbits=-15)
    stored = packer.compress(data) + packer.flush() if packed else data
    path.write_bytes(b"xx" + stored)
    storage = Storage(
        "r", 2, len(data), zlib.crc32(data), packed=len(stored) if packed else None, swapped=word
    )
    words = [data[at : at + word][::-1] for at in range(0, len(data), word)]
    reader = opened(path)
    into = bytearray(len(data))
    reader.read(memoryview(into), storage, 0)
    assert into == b"".join(words)
    reader.close()


@pytest.mark.parametrize("lie", [{"nbytes": 99}, {"nbytes": 101}, {"crc": 1}, {"packed": 5}])
def test_a_deflated_storage_that_lies_is_damaged(tmp_path, lie):
    """A wrong size, a wrong checksum and a stream cut short are damage, before any byte is used."""
    packer = zlib.compressobj(wbits=-15)
    data = bytes(range(100))
    stored = packer.compress(data) + packer.flush()
    (tmp_path / "a").write_bytes(stored)
    true = {"nbytes": 100, "crc": zlib.crc32(data), "packed": len(stored)}
    reader = opened(tmp_path / "a")
    with contextlib.closing(reader), pytest.raises(MergeError, match="'r' is damaged"):
        reader.read(memoryview(bytearray(4)), Storage("r", 0, **(true | lie)), 0)
