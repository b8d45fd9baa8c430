"""Outputs that several processes make: begun once, written by all, and published by one."""

import os
from pathlib import Path

import pytest

from merge_avg.checkpoint import FileLayout, Slot
from merge_avg.errors import MergeError
from merge_avg.io import SharedOutput, Site

SLOTS = {"a": Slot(0, 4, 3), "b": Slot(1, 8, 4)}
LAYOUT = FileLayout(12, ((0, b"head"),), SLOTS)
FILES = [{".": LAYOUT}, {"x/w.bin": LAYOUT, "v.bin": LAYOUT}]
WHOLE = b"headabc\0defg"


def opened(path, files=FILES[0], plan=b"plan", *, overwrite=False):
    return SharedOutput(path, files, b"", plan, overwrite=overwrite)


def whole(path):
    """The bytes of a file, or of the files of a directory, that are all alike."""
    found = {one.read_bytes() for one in ([path] if path.is_file() else path.rglob("*.bin"))}
    assert len(found) == 1
    return found.pop()


@pytest.mark.parametrize("files", FILES, ids=["file", "directory"])
@pytest.mark.parametrize("old", [False, True])
def test_two_fill_one_output(tmp_path, files, old):
    """What either has written is in the output, which replaces the old one in one step."""
    path = tmp_path / "out"
    if old and "." in files:
        path.write_bytes(b"old")
    elif old:
        (path / "x").mkdir(parents=True)
        (path / "x/w.bin").write_bytes(b"old")
    with opened(path, files, overwrite=old) as one, opened(path, files, overwrite=old) as two:
        for number in range(len(files)):
            one.write(number, "a", 0, memoryview(b"abc"))
            two.write(number, "b", 0, memoryview(b"defg"))
        two.sync()
        one.commit()
        one.site.remove()
    assert whole(path) == WHOLE
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_what_was_written_stays(tmp_path):
    """Leaving without a commit keeps what was made, and its plan, for those who come later."""
    with opened(tmp_path / "out") as one:
        one.write(0, "a", 0, memoryview(b"abc"))
        inode = one.site.inode()
    site = Site(tmp_path / "out")
    assert site.there
    assert site.plan.read_bytes() == b"plan"
    with opened(tmp_path / "out", plan=b"other") as two:
        assert two.site.inode() == inode
        two.write(0, "b", 0, memoryview(b"defg"))
        two.commit()
    assert whole(tmp_path / "out") == WHOLE


def test_the_output_in_the_making_appears_whole(tmp_path, monkeypatch):
    """Whoever is second to rename its directory uses that of the first."""
    path, rename = tmp_path / "out", os.rename

    def late(a, b):
        monkeypatch.setattr(os, "rename", rename)
        with opened(path, plan=b"first"):
            pass
        rename(a, b)

    monkeypatch.setattr(os, "rename", late)
    with opened(path, plan=b"second") as one:
        assert one.site.plan.read_bytes() == b"first"
    assert [entry.name for entry in tmp_path.iterdir()] == [Site(path).folder.name]


def test_a_published_output_is_left_alone(tmp_path):
    """An output that has its name already is neither written nor renamed again."""
    path = tmp_path / "out"
    with opened(path) as one:
        one.write(0, "a", 0, memoryview(b"abc"))
        assert not one.site.published
        one.commit()
        assert one.site.published
    path.write_bytes(b"mine, in the same file")
    with opened(path) as two:
        two.write(0, "a", 0, memoryview(b"xyz"))
        two.commit()
    assert path.read_bytes() == b"mine, in the same file"
    path.unlink()
    path.write_bytes(b"mine")
    assert not Site(path).published


def test_only_the_dead_are_removed(tmp_path):
    """What a run works on is not removed by one that begins anew."""
    with opened(tmp_path / "out"), pytest.raises(MergeError, match="another run is at work on it"):
        Site(tmp_path / "out").begin_anew()
    Site(tmp_path / "out").begin_anew()
    assert list(tmp_path.iterdir()) == []
    Site(tmp_path / "out").begin_anew()


def test_files_beside_it_appear_whole(tmp_path, monkeypatch):
    """A ledger that cannot be written leaves nothing, and an older one as it was."""
    with opened(tmp_path / "out") as one:
        one.site.write("1.ledger", b"old")
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
            with pytest.raises(MergeError, match="cannot be written"):
                one.site.write("1.ledger", b"new")
        assert one.site.names(".part") == []
        assert (one.site.folder / "1.ledger").read_bytes() == b"old"


def test_a_lock_is_taken_once(tmp_path):
    """A name is locked by one process at a time, until it closes."""
    with opened(tmp_path / "out") as one:
        other = Site(tmp_path / "out")
        assert one.site.take("x")
        assert not other.take("x")
        one.site.close()
        assert other.take("x")
        other.close()


def test_checksums_travel(tmp_path):
    """Checksums are taken as parts and put into the file of another process, where they fit."""
    checked = FileLayout(12, (), SLOTS, checked=True)
    with (
        opened(tmp_path / "out", {".": checked}) as one,
        opened(tmp_path / "out", {".": checked}) as two,
    ):
        (ours,), (theirs,) = one.files, two.files
        one.write(0, "b", 2, memoryview(b"fg"))
        rows = ours.take()
        assert [row[:3] for row in rows] == [(1, 2, 4)]
        assert ours.take() == []
        theirs.put(*rows[0])
        two.write(0, "b", 0, memoryview(b"de"))
        assert theirs.lacks() == "a"
        two.write(0, "a", 0, memoryview(b"abc"))
        assert theirs.lacks() is None
        for row in ((2, 0, 1, 0), (0, 0, 4, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 0, 1, 1 << 32)):
            with pytest.raises(ValueError, match="no record has"):
                theirs.put(*row)


def test_long_names_have_sites_of_their_own(tmp_path):
    """Names that are as long as they may be, and differ at their end, have different sites."""
    names = [f"{'x' * 240}{end}.pt" for end in "ab"]
    folders = {Site(Path(tmp_path / name)).folder for name in names}
    assert len(folders) == 2
    for name in names:
        with opened(tmp_path / name) as one:
            one.commit()
            one.site.remove()
