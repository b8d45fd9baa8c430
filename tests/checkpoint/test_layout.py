"""merge_avg.checkpoint: the layout of a checkpoint answers for its files."""

from pathlib import Path

from merge_avg.checkpoint import Archive, File, Layout, Storage, TensorInfo
from merge_avg.checkpoint._dtypes import BY_NAME

FILES = tuple(File(Path(f"d/{k}.pt"), 10 + k, 0, 0, 0) for k in range(3))
ARCHIVE = Archive((), b"", "data.pkl", (), ())


def tensor(storage):
    """A vector of two elements in a storage."""
    return TensorInfo(("w",), BY_NAME["float32"], (2,), (1,), 0, storage)


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
