"""merge_avg.io._platform: whole reads and writes, and what stands in for missing calls."""

import contextlib
import errno
import importlib.util
import itertools
import os
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merge_avg.errors import MergeError
from merge_avg.io import Buffer
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


def without(monkeypatch, *names):
    """The module, as it would be imported where `os` has no such functions."""
    for name in names:
        monkeypatch.delattr(os, name)
    spec = importlib.util.spec_from_file_location("merge_avg.io._platform_here", platform.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_threads_that_seek_do_not_disturb_each_other(tmp_path, monkeypatch):
    """Without positioned calls, many threads write and read one file, each its own parts."""
    module = without(monkeypatch, "preadv", "pwrite")
    parts = [bytes([n]) * 4096 for n in range(200)]
    with (tmp_path / "a").open("w+b") as file, ThreadPoolExecutor(8) as pool:

        def both(n):
            into = bytearray(4096)
            module.write_fully(file.fileno(), memoryview(parts[n]), 4096 * n, tmp_path)
            module.read_fully(file.fileno(), memoryview(into), 4096 * n, tmp_path)
            return into

        assert list(pool.map(both, range(200))) == parts
        assert (tmp_path / "a").read_bytes() == b"".join(parts)
        with pytest.raises(MergeError, match="it ends at byte 819,200"):
            module.read_fully(file.fileno(), memoryview(bytearray(1)), 819200, tmp_path)


def test_space_is_claimed_by_zeros(tmp_path, monkeypatch):
    """Without posix_fallocate a file has its blocks, and a full disk shows as well."""
    monkeypatch.delattr(os, "posix_fallocate")
    with (tmp_path / "a").open("w+b") as file:
        file.write(b"abc")
        file.flush()
        reserve(file.fileno(), (1 << 21) + 5, 3)
        assert (tmp_path / "a").read_bytes() == b"abc" + bytes((1 << 21) + 5)
        assert (tmp_path / "a").stat().st_blocks * 512 >= 1 << 21
        with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
            reserve(file.fileno(), 1 << 70)

        def full(*_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            reserve(file.fileno(), 9)


@pytest.mark.parametrize(
    ("code", "told"), [(0, [51]), (errno.ENOTSUP, [51, "fsync"]), (errno.EIO, [51])]
)
def test_a_drive_is_told_to_empty_its_memory(monkeypatch, code, told):
    """On macOS the file is forced through the drive; where it cannot be, `fsync` has to do."""
    calls = []

    def control(fd, command):
        calls.append(command)
        if code:
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(platform.fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(platform.fcntl, "fcntl", control)
    monkeypatch.setattr(os, "fsync", lambda _: calls.append("fsync"))
    with pytest.raises(OSError) if code == errno.EIO else contextlib.nullcontext():
        platform.sync(0)
    assert calls == told


def test_names_are_swapped_by_the_call_of_macos(monkeypatch):
    """Where libc has renamex_np instead of renameat2, that exchanges two names."""
    told = []
    libc = types.SimpleNamespace(renamex_np=lambda *args: told.append(args) or 0)
    monkeypatch.setattr(platform, "_LIBC", libc)
    assert platform.exchange(Path("a"), Path("b"))
    assert told == [(b"a", b"b", 2)]
    monkeypatch.setattr(platform, "_LIBC", None)
    assert not platform.exchange(Path("a"), Path("b"))


def test_memory_is_compared_without_libc(monkeypatch):
    """All bytes are compared, and none behind them."""
    size = 3 << 20
    a, b = Buffer(size + 1), Buffer(size + 1)
    a.bytes(size + 1)[size] = 1
    for libc in (platform._LIBC, None):
        monkeypatch.setattr(platform, "_LIBC", libc)
        assert platform.same_memory(a.address, b.address, size)
        assert platform.same_memory(a.address, b.address, 0)
        assert not platform.same_memory(a.address, b.address, size + 1)


def test_a_machine_has_a_name_where_boots_have_none(monkeypatch):
    """Without Linux's identity of a boot the name of the machine stands for it."""
    assert platform.boot() == Path("/proc/sys/kernel/random/boot_id").read_bytes()

    def missing(_):
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_bytes", missing)
    assert platform.boot() == os.uname().nodename.encode()
    monkeypatch.delattr(os, "uname")
    monkeypatch.setenv("COMPUTERNAME", "DESKTOP")
    assert platform.boot() == b"DESKTOP"


@pytest.mark.parametrize(
    ("name", "linux", "windows"),
    [
        ("a/b.pt", False, False),
        ("a..b/c", False, False),
        ("", True, True),
        ("/etc/x", True, True),
        ("a/../../x", True, True),
        ("..\\x", False, True),
        ("a\\..\\..\\x", False, True),
        ("C:\\x", False, True),
        ("C:x", False, True),
        ("\\\\host\\share\\x", False, True),
    ],
)
def test_names_that_lead_out(monkeypatch, name, linux, windows):
    """A name that leads out of a directory is told, on Windows with its drives and backslashes."""
    assert platform.leads_elsewhere(name) == linux
    monkeypatch.setattr(platform, "WINDOWS", True)
    assert platform.leads_elsewhere(name) == windows


def test_names_that_windows_keeps(monkeypatch):
    """Devices, streams and ends that Windows drops are no names there; elsewhere all are."""
    kept = "CON nul.pt Aux.tar.gz com1 LPT9.txt a:b a. a? a* a|b <a> NUL_ a\x01 CONOUT$".split()
    kept = [name.replace("_", " ") for name in kept]
    fine = "console.pt nully com10 a.b .a lpt model-00001-of-00002.safetensors \xe9 a=1 ..".split()
    assert not any(map(platform.reserved, kept + fine))
    monkeypatch.setattr(platform, "WINDOWS", True)
    assert list(filter(platform.reserved, kept + fine)) == kept
