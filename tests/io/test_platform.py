"""merge_avg.io._platform: whole reads and writes, and what stands in for missing calls."""

import errno
import itertools
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merge_avg.io import _platform as platform
from merge_avg.io._platform import read_fully, reserve, write_fully


@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=12))
def test_short_counts_move_everything(tmp_path_factory, sizes):
    """However few bytes a call moves, all are read and written, each to its place."""
    path = tmp_path_factory.mktemp("short") / "a"
    data = bytes(range(sum(sizes)))
    real = os.preadv, os.pwrite
    with pytest.MonkeyPatch.context() as patch:
        steps = itertools.cycle(sizes)
        patch.setattr(os, "preadv", lambda f, parts, at: real[0](f, [parts[0][: next(steps)]], at))
        patch.setattr(os, "pwrite", lambda f, part, at: real[1](f, part[: next(steps)], at))
        with path.open("w+b") as file:
            write_fully(file.fileno(), memoryview(data), 3, path)
            assert path.read_bytes() == b"\0\0\0" + data
            into = bytearray(len(data))
            read_fully(file.fileno(), memoryview(into), 3, path)
    assert into == data


def test_calls_move_no_more_than_linux_does(tmp_path, monkeypatch):
    """No call is asked for more bytes than it can move."""
    asked = []
    monkeypatch.setattr(platform, "_LARGEST_READ", 4)
    real = os.preadv, os.pwrite
    monkeypatch.setattr(
        os, "preadv", lambda f, parts, at: asked.append(len(parts[0])) or real[0](f, parts, at)
    )
    monkeypatch.setattr(
        os, "pwrite", lambda f, part, at: asked.append(len(part)) or real[1](f, part, at)
    )
    with (tmp_path / "a").open("w+b") as file:
        write_fully(file.fileno(), memoryview(b"0123456789"), 0, tmp_path)
        into = bytearray(10)
        read_fully(file.fileno(), memoryview(into), 0, tmp_path)
    assert into == b"0123456789"
    assert asked == [4, 4, 2] * 2


def test_space_is_claimed_from_a_place_on(tmp_path, monkeypatch):
    """A file grows to what was claimed, also where the file system only lengthens it."""
    with (tmp_path / "a").open("w+b") as file:
        for nbytes, start, size in ((10, 0, 10), (5, 10, 15), (0, 99, 15)):
            reserve(file.fileno(), nbytes, start)
            assert (tmp_path / "a").stat().st_size == size
        with pytest.raises(OSError, match=os.strerror(errno.EFBIG)) as caught:
            reserve(file.fileno(), 1 << 70)
        assert caught.value.errno == errno.EFBIG
        assert reserve(file.fileno(), 20) is None
        assert (tmp_path / "a").stat().st_size == 20
        for code in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.ENOSPC):

            def refuse(*_, code=code):
                raise OSError(code, os.strerror(code))

            monkeypatch.setattr(os, "posix_fallocate", refuse)
            file.truncate(0)
            if code == errno.ENOSPC:
                with pytest.raises(OSError, match=os.strerror(code)):
                    reserve(file.fileno(), 6, 3)
            else:
                reserve(file.fileno(), 6, 3)
                assert (tmp_path / "a").stat().st_size == 9


@pytest.mark.parametrize(
    ("text", "cores"), [("150000 100000\n", 2), ("max 100000\n", 9), ("nonsense", 9)]
)
def test_cores_of_a_control_group(tmp_path, monkeypatch, text, cores):
    """The quota of a control group counts, rounded up, where there is one."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(9))
    (tmp_path / "cpu.max").write_text(text)
    assert platform.cores(tmp_path / "cpu.max") == cores
    assert platform.cores(tmp_path / "none") == 9


def test_mount_points_by_their_table(tmp_path):
    """A mount point, and what holds one, is told by its name in the system's table."""
    table = tmp_path / "mountinfo"
    table.write_bytes(b"36 35 98:0 / /a\\040b/c\\134 rw,noatime - ext3 /dev/root rw\n")
    for name, expected in (("a b", True), ("a b/c\\", True), ("a b/c\\/d", False), ("a", False)):
        assert platform.mounted(Path("/", name), table) == expected
    assert not platform.mounted(tmp_path, tmp_path / "none")
