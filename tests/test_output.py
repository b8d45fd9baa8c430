"""merge_avg.output: the result appears whole, or not at all."""

import errno
import os

import pytest

from merge_avg import output
from merge_avg.errors import MergeError
from merge_avg.output import Output, refuse_output
from merge_avg.skeleton import Place, Skeleton

SKELETON = Skeleton(6, ((0, b"ab"),), {"w": Place(2, 4)})


def write(path, *, overwrite=False, commit=True):
    with Output(path, {".": SKELETON}, overwrite=overwrite) as out:
        out.write(0, "w", 0, memoryview(b"cdef"))
        if commit:
            out.commit()


def test_without_commit_nothing_is_left(tmp_path):
    """Leaving the context early removes the temporary file and keeps what was there."""
    (tmp_path / "out").write_bytes(b"old")
    write(tmp_path / "out", overwrite=True, commit=False)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("out", b"old")]


def test_commit_publishes_by_name(tmp_path):
    """After commit the file is complete under its name, with the usual permissions."""
    before = os.umask(0o027)
    try:
        write(tmp_path / "out")
    finally:
        os.umask(before)
    assert (tmp_path / "out").read_bytes() == b"abcdef"
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o640
    assert len(list(tmp_path.iterdir())) == 1


def test_a_file_that_came_meanwhile_is_not_replaced(tmp_path):
    """Without overwrite, what another program wrote in the meantime stays."""
    path = tmp_path / "out"
    with Output(path, {".": SKELETON}, overwrite=False) as out:
        path.write_bytes(b"theirs")
        with pytest.raises(MergeError, match="came into being"):
            out.commit()
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("out", b"theirs")]


def test_overwriting_a_link_replaces_its_target(tmp_path):
    """A symbolic link stays one; the file that it points to is replaced."""
    (tmp_path / "target").write_bytes(b"old")
    (tmp_path / "link").symlink_to("target")
    write(tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_bytes() == b"abcdef"


def test_a_full_disk_is_one_clear_error(tmp_path, monkeypatch):
    """No space shows before anything is read, and leaves nothing."""

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(MergeError, match=r"No space left.*6 bytes are needed") as caught:
        write(tmp_path / "out")
    assert "free some space" in str(caught.value.hint)
    assert not list(tmp_path.iterdir())


def test_impossible_outputs_are_refused(tmp_path):
    """A directory, a missing directory, a device and an existing file are each named."""
    (tmp_path / "file").touch()
    for path, says in (
        (tmp_path, "directory"),
        (tmp_path / "none" / "out", "does not exist"),
        (tmp_path / "file", "exists already"),
    ):
        with pytest.raises(MergeError, match=says):
            refuse_output(path, directory=False, overwrite=False)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(MergeError, match="no regular file"):
        refuse_output(tmp_path / "pipe", directory=False, overwrite=True)


def contents(path):
    files = (p for p in path.rglob("*") if p.is_file())
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in files}


def write_directory(path, *, overwrite=False, commit=True):
    files = {"w.bin": SKELETON, "sub/w.bin": SKELETON}
    with Output(path, files, overwrite=overwrite) as out:
        for number in range(2):
            out.write(number, "w", 0, memoryview(b"cdef"))
        if commit:
            out.commit()


@pytest.mark.parametrize("swaps", [True, False])
def test_a_directory_appears_whole(tmp_path, monkeypatch, swaps):
    """A directory comes with one rename; an old one is replaced, an empty one filled."""
    if not swaps:
        monkeypatch.setattr(output, "_exchanged", lambda *_: False)
    whole = {"w.bin": b"abcdef", "sub/w.bin": b"abcdef"}
    write_directory(tmp_path / "out", commit=False)
    assert not list(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    write_directory(tmp_path / "out")
    assert contents(tmp_path / "out") == whole
    (tmp_path / "out" / "old").touch()
    write_directory(tmp_path / "out", overwrite=True, commit=False)
    assert contents(tmp_path / "out") == {**whole, "old": b""}
    write_directory(tmp_path / "out", overwrite=True)
    assert contents(tmp_path) == {f"out/{name}": data for name, data in whole.items()}


def test_a_directory_that_came_meanwhile_is_not_replaced(tmp_path):
    """Without overwrite, a directory that another program filled in the meantime stays."""
    with Output(tmp_path / "out", {"a": SKELETON}, overwrite=False) as out:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").touch()
        with pytest.raises(MergeError, match="came into being"):
            out.commit()
    assert contents(tmp_path) == {"out/theirs": b""}
