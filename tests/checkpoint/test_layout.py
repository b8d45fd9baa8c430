"""merge_avg.checkpoint._layout: files, storages, and what a strided view of a storage reaches."""

import itertools
import os
from pathlib import Path

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from merge_avg.checkpoint import (
    BY_NAME,
    Archive,
    File,
    Layout,
    Storage,
    TensorInfo,
    dotted,
    impossible,
    row_major,
)

F32 = BY_NAME["float32"]
FILES = tuple(File(Path(f"d/{k}.pt"), 10 + k, 0, 0, 0) for k in range(3))
ARCHIVE = Archive((), (), b"", "data.pkl", (), ())
dimensions = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6)), max_size=3)


def view(pairs, start=5):
    """A tensor with dimensions of the given extents and steps."""
    shape, stride = [tuple(one) for one in zip(*pairs, strict=True)] or ((), ())
    return TensorInfo(("a",), F32, shape, stride, start, Storage("s", 0, 0))


def reached(info):
    """The elements that each index of a tensor reaches, in row-major order."""
    return [
        info.start + sum(i * step for i, step in zip(index, info.stride, strict=True))
        for index in itertools.product(*map(range, info.shape))
    ]


@given(dimensions)
@example([(2, 0), (2, 3)])  # as many elements as from first to last, but not those
def test_dense_is_every_element_once(pairs):
    """Of the elements from the first to the last each is reached, by one index."""
    info = view(pairs)
    assert info.stop == max(reached(info), default=4) + 1
    assert info.dense == (sorted(reached(info)) == list(range(5, info.stop)))


@given(dimensions)
def test_contiguous_is_in_order(pairs):
    """A contiguous tensor reaches neighbours one after the other, whatever its idle steps are."""
    info = view(pairs)
    assert info.contiguous == (reached(info) == list(range(5, 5 + info.numel)))


@given(dimensions)
def test_overlaps_are_seen(pairs):
    """Indices that differ where a step is not zero and reach one element are an overlap."""
    info = view(pairs)
    moving = view([(extent, step) for extent, step in pairs if step])
    assume(info.numel)
    if len(set(reached(moving))) < moving.numel:
        assert info.overlaps_itself


@given(st.lists(st.integers(1, 4), max_size=4))
def test_row_major_is_torchs_order(shape):
    """The strides of a contiguous tensor are those that torch gives it."""
    assert row_major(tuple(shape)) == torch.empty(shape).stride()


def test_steps_of_single_elements_do_not_count():
    """Torch leaves the step of a dimension with one element at whatever it was."""
    assert view([(1, 99), (4, 1)]).geometry == ((4, 1),)
    assert view([(1, 99), (4, 1)]).contiguous


@pytest.mark.parametrize(
    ("shape", "stride", "start", "held", "says"),
    [
        ([2, 3], [3, 1], 0, 6, None),
        ([2, 3], [0, 0], 0, 1, None),
        ([0, 1 << 40], [1 << 40, 1], 0, 0, None),
        ("23", [3, 1], 0, 6, "no shape or no strides"),
        ([2], (1, 1), 0, 6, "1 dimensions with 2 strides"),
        ([1] * 65, [1] * 65, 0, 6, "65 dimensions"),
        ([2], [-1], 0, 6, "impossible strides"),
        ([2], [1], True, 6, "impossible strides"),
        ([2.0], [1], 0, 6, "impossible strides"),
        ([2], [1 << 63], 0, 6, "impossible strides"),
        ([0, 1 << 62, 4], [0, 0, 0], 0, 6, "more elements than can be counted"),
        ([1 << 31], [0], 0, 1, "2,147,483,648 elements, but a storage of 1"),
        ([1 << 31], [0], 0, 1 << 27, None),
    ],
)
def test_claims_that_no_tensor_meets(shape, stride, start, held, says):
    """Shapes and strides of a damaged file are refused before anything is computed from them."""
    found = impossible(shape, stride, start, held)
    assert found is None if says is None else says in str(found)


def test_a_storage_is_made_of_ranges():
    """A storage is one range of a file, or the ranges of its parts, or of its tiles."""
    one, two = Storage("a", 0, 8), Storage("b", 8, 8, file=1)
    assert one.ranges == (one,)
    assert Storage("c", 0, 16, parts=(one, two)).ranges == (one, two)
    tiles = tuple(
        ((k,), TensorInfo(("t",), F32, (2,), (1,), 0, s)) for k, s in ((0, one), (2, two))
    )
    assert Storage("d", 0, 16, tiles=tiles).ranges == (one, two)


def test_only_what_is_read_as_it_lies_is_not_coded():
    """Deflated and big-endian storages are decoded first."""
    assert not Storage("s", 0, 8).coded
    assert Storage("s", 0, 8, packed=5).coded
    assert Storage("s", 0, 8, swapped=4).coded


def test_a_file_is_stamped(tmp_path):
    """A stamp has what would change if another file took its place; only regular files have one."""
    (tmp_path / "a").write_bytes(b"12345")
    found, stat = File.of(tmp_path / "a"), (tmp_path / "a").stat()
    assert (found.nbytes, found.mtime_ns) == (5, stat.st_mtime_ns)
    assert (found.device, found.inode) == (stat.st_dev, stat.st_ino)
    os.mkfifo(tmp_path / "pipe")
    for other in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(OSError, match="not a regular file"):
            File.of(other)


def test_paths_are_dotted():
    """A path in an object tree reads as in torch, with the numbers of lists."""
    assert dotted(("nets", 0, "conv.weight")) == "nets.0.conv.weight"


def tensor(storage):
    """A vector of two elements in a storage."""
    return TensorInfo(("w",), F32, (2,), (1,), 0, storage)


def test_a_layout_is_as_large_as_its_files():
    """The size of a directory is the sum of the sizes of its files."""
    assert Layout(Path("d"), "directory", FILES, ()).nbytes == 33


def test_messages_name_the_file_a_tensor_begins_in():
    """For a tensor in parts or in tiles that is the file of the first one."""
    layout = Layout(Path("d"), "directory", FILES, ())
    first, second = Storage("a", 0, 4, file=1), Storage("b", 0, 4, file=2)
    assert layout.where(tensor(second)) == Path("d/2.pt")
    assert layout.where(tensor(Storage("c", 0, 8, parts=(first, second)))) == Path("d/1.pt")
    tiles = (((0,), tensor(second)), ((1,), tensor(first)))
    assert layout.where(tensor(Storage("c", 0, 8, tiles=tiles))) == Path("d/2.pt")


def test_a_source_has_no_archives():
    """What only a copy needs is dropped, in the files of a directory too; all else stays."""
    member = Layout(Path("d/0.pt"), "torch-zip", FILES[:1], (), archive=ARCHIVE)
    layout = Layout(Path("d"), "directory", FILES, (), archive=ARCHIVE, members=(member, None))
    source = layout.source
    assert source.archive is None
    assert [one and one.archive for one in source.members] == [None, None]
    assert source.members[0].path == member.path
    assert (source.path, source.files) == (layout.path, layout.files)
