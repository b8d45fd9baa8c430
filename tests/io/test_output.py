"""merge_avg.io._output: the result appears whole, or not at all."""

import ctypes
import dataclasses
import errno
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from merge_avg.checkpoint import FileLayout, Slot, Storage
from merge_avg.errors import MergeError
from merge_avg.io import _platform as platform
from merge_avg.io._output import Output, refuse_loss, refuse_output, workplace
from merge_avg.io._temporary import Temporary

LAYOUT = FileLayout(6, ((0, b"ab"),), {"w": Slot(0, 2, 4)})


def write(path, *, overwrite=False, commit=True):
    with Output(path, {".": LAYOUT}, overwrite=overwrite) as out:
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
    with Output(path, {".": LAYOUT}, overwrite=False) as out:
        path.write_bytes(b"theirs")
        with pytest.raises(MergeError, match=": another output appeared there") as caught:
            out.commit()
    assert caught.value.where == str(path)
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
    with pytest.raises(MergeError, match="not a regular file"):
        refuse_output(tmp_path / "pipe", directory=False, overwrite=True)


def contents(path):
    files = (p for p in path.rglob("*") if p.is_file())
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in files}


def write_directory(path, *, overwrite=False, commit=True):
    files = {"w.bin": LAYOUT, "sub/w.bin": LAYOUT}
    with Output(path, files, overwrite=overwrite) as out:
        for number in range(2):
            out.write(number, "w", 0, memoryview(b"cdef"))
        if commit:
            out.commit()


@pytest.mark.parametrize("swaps", [True, False])
def test_a_directory_appears_whole(tmp_path, monkeypatch, swaps):
    """A directory comes with one rename; an old one is replaced, an empty one filled."""
    if not swaps:
        monkeypatch.setattr(platform, "exchange", lambda *_: False)
    whole = {"w.bin": b"abcdef", "sub/w.bin": b"abcdef"}
    write_directory(tmp_path / "out", commit=False)
    assert not list(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    write_directory(tmp_path / "out")
    assert contents(tmp_path / "out") == whole
    (tmp_path / "out" / "w.bin").write_bytes(b"old")
    (tmp_path / "out" / "empty").mkdir()
    write_directory(tmp_path / "out", overwrite=True, commit=False)
    assert contents(tmp_path / "out") == {**whole, "w.bin": b"old"}
    write_directory(tmp_path / "out", overwrite=True)
    assert contents(tmp_path) == {f"out/{name}": data for name, data in whole.items()}


def test_a_directory_that_came_meanwhile_is_not_replaced(tmp_path):
    """Without overwrite, a directory that another program filled in the meantime stays."""
    with Output(tmp_path / "out", {"a": LAYOUT}, overwrite=False) as out:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").touch()
        with pytest.raises(MergeError, match=": another output appeared there") as caught:
            out.commit()
    assert caught.value.where == str(tmp_path / "out")
    assert contents(tmp_path) == {"out/theirs": b""}


@dataclasses.dataclass(frozen=True)
class Closing(FileLayout):
    """A layout that remembers the checksums it is closed with, and ends in what it is given."""

    end: tuple[tuple[int, bytes], ...] = ()
    told: list[tuple[bytes, list[int]]] = dataclasses.field(default_factory=list)

    def closing(self, record, checksums):
        self.told.append((record, list(checksums)))
        return self.end


def test_checksums_of_slots_and_copies(tmp_path):
    """A layout is closed with the CRC-32 of every slot and copy, whatever the order of writes."""
    slots = {"w": Slot(0, 1, 4), "none": Slot(1, 5, 0)}
    copied = ((Storage("c", 0, 4), Slot(2, 5, 4)),)
    layout = Closing(12, ((0, b"x"),), slots, copied, checked=True, end=((9, b"end"),))
    with Output(tmp_path / "out", {".": layout}, overwrite=False) as out:
        for name, at, data in (("w", 2, b"ef"), ("c", 0, b"1234"), ("w", 0, b"cd")):
            out.write(0, name, at, memoryview(data))
        out.commit()
    assert (tmp_path / "out").read_bytes() == b"xcdef1234end"
    assert layout.told == [(b"", [zlib.crc32(b"cdef"), 0, zlib.crc32(b"1234")])]


FAILURES = [
    (False, "open", 1, errno.EACCES, "cannot be written (Permission denied)"),
    (True, "mkdir", 3, errno.EDQUOT, "cannot be written (Disk quota exceeded)"),
    (True, "open", 2, errno.EMFILE, "cannot be written (Too many open files)"),
    (False, "posix_fallocate", 1, errno.ENOSPC, "6 bytes are needed"),
    (False, "pwrite", 1, errno.ENOSPC, "cannot be written (No space left on device)"),
    (False, "fsync", 1, errno.EIO, "cannot be written (Input/output error)"),
    (True, "fsync", 3, errno.EIO, "cannot be written (Input/output error)"),
    (False, "open", 2, errno.EIO, "cannot be written (Input/output error)"),
    (True, "rename", 1, errno.EACCES, "cannot be written (Permission denied)"),
]


def failing(monkeypatch, name, number, code):
    """Let the n-th call of a function of `os` fail."""
    real, calls = getattr(os, name), []

    def call(*args, **kwargs):
        calls.append(args)
        if len(calls) == number:
            raise OSError(code, os.strerror(code))
        return real(*args, **kwargs)

    monkeypatch.setattr(os, name, call)


@pytest.mark.parametrize(("directory", "name", "number", "code", "says"), FAILURES)
def test_failures_name_the_output(tmp_path, monkeypatch, directory, name, number, code, says):
    """Whatever fails, the message is about the output, and only what was there stays."""
    path = tmp_path / "out"
    if directory:
        made(path)
    else:
        path.write_bytes(b"old")
    before = contents(tmp_path)
    failing(monkeypatch, name, number, code)
    with pytest.raises(MergeError) as caught:
        (write_directory if directory else write)(path, overwrite=True)
    assert caught.value.where == str(path)
    assert says in str(caught.value)
    assert contents(tmp_path) == before


def test_a_result_that_may_not_last_is_an_error(tmp_path, monkeypatch):
    """Where the name cannot be forced to the disk the file is complete, and the message says so."""
    failing(monkeypatch, "fsync", 2, errno.EIO)
    with pytest.raises(
        MergeError, match=f"^{tmp_path}/out: it is complete, but may not outlast"
    ) as caught:
        write(tmp_path / "out")
    assert caught.value.where == str(tmp_path / "out")
    assert contents(tmp_path) == {"out": b"abcdef"}


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS])
def test_directories_that_cannot_be_forced_are_left(tmp_path, monkeypatch, code):
    """A file system that cannot force a directory to the disk does not fail the merge."""
    failing(monkeypatch, "fsync", 2, code)
    write(tmp_path / "out")
    assert contents(tmp_path) == {"out": b"abcdef"}


def test_directories_that_cannot_be_opened_are_left(tmp_path, monkeypatch):
    """Nor does a directory that may be written to but not read."""
    failing(monkeypatch, "open", 2, errno.EACCES)
    write(tmp_path / "out")
    assert contents(tmp_path) == {"out": b"abcdef"}


def test_everything_is_forced_to_the_disk(tmp_path, monkeypatch):
    """Each file and each directory of the result, before its name; its parent after."""
    forced, real = [], os.fsync

    def fsync(fd):
        forced.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}")))  # noqa: PTH115, PTH119
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    write_directory(tmp_path / "out")
    temporary = forced[2]
    assert temporary.endswith(".merge-avg-tmp")
    assert forced == ["w.bin", "w.bin", temporary, "sub", tmp_path.name]


def test_what_a_dead_run_left_is_removed(tmp_path):
    """Making an output removes the temporary of a run that has died, there or beside it."""
    for name in ("out", "other"):
        dead = Temporary(tmp_path / name, directory=False)
        dead.remove.detach()
        dead.close()
    assert len(contents(tmp_path)) == 2
    write(tmp_path / "out")
    assert contents(tmp_path) == {"out": b"abcdef"}


@pytest.mark.parametrize("comes", [False, True])
def test_without_hard_links(tmp_path, monkeypatch, comes):
    """Where there are no hard links a rename does it, unless a file came meanwhile."""
    path = tmp_path / "out"
    failing(monkeypatch, "link", 1, errno.EPERM)
    with Output(path, {".": LAYOUT}, overwrite=False) as out:
        out.write(0, "w", 0, memoryview(b"cdef"))
        if comes:
            path.write_bytes(b"theirs")
            with pytest.raises(MergeError, match="appeared there in the meantime"):
                out.commit()
        else:
            out.commit()
    assert contents(tmp_path) == {"out": b"theirs" if comes else b"abcdef"}


def test_deep_directories_and_their_permissions(tmp_path):
    """Files lie as deep as they are named, and get the permissions that files usually get."""
    before = os.umask(0)
    try:
        with Output(tmp_path / "out", {"a/b/w.bin": LAYOUT}, overwrite=False) as out:
            out.write(0, "w", 0, memoryview(b"cdef"))
            out.commit()
    finally:
        os.umask(before)
    assert contents(tmp_path) == {"out/a/b/w.bin": b"abcdef"}
    assert (tmp_path / "out/a/b/w.bin").stat().st_mode & 0o777 == 0o666


def test_directories_are_exchanged_where_that_is_possible(tmp_path, monkeypatch):
    """Linux swaps an old directory and the new one in one step; no moment is without one."""
    one, other = (made(tmp_path / name) for name in "ab")
    names = (-100, os.fsencode(one), -100, os.fsencode(other))
    try:
        able = not ctypes.CDLL(None).renameat2(*names, 2)
    except AttributeError:  # not on Linux
        able = False
    (one / "more").touch()
    assert platform.exchange(one, other) == able
    assert not able or (other / "more").exists()
    assert not platform.exchange(one, tmp_path / "none")
    if able:
        failing(monkeypatch, "rename", 2, errno.EIO)  # the first finds a directory in its place
    made(tmp_path / "out")
    write_directory(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "w.bin").exists()


def made(path):
    path.mkdir()
    (path / "w.bin").touch()
    return path


def test_two_steps_are_undone(tmp_path, monkeypatch):
    """Where directories cannot be exchanged and the second step fails, the first is undone."""
    made(tmp_path / "out")
    monkeypatch.setattr(platform, "exchange", lambda *_: False)
    failing(monkeypatch, "rename", 3, errno.EIO)
    with pytest.raises(MergeError, match="Input/output"):
        write_directory(tmp_path / "out", overwrite=True)
    assert contents(tmp_path) == {"out/w.bin": b""}
    assert len(list(tmp_path.iterdir())) == 1


def test_a_file_never_lacks_its_name(tmp_path, monkeypatch):
    """Where names cannot be exchanged, a file is replaced by one rename, and not moved aside."""
    path, real, renamed = tmp_path / "out", os.replace, []
    path.write_bytes(b"old")
    monkeypatch.setattr(platform, "exchange", lambda *_: False)
    monkeypatch.setattr(os, "replace", lambda *names: renamed.append(names[1]) or real(*names))
    write(path, overwrite=True)
    assert renamed == [path]


@pytest.mark.parametrize("commit", [True, False])
def test_each_descriptor_is_closed_once(tmp_path, monkeypatch, commit):
    """None is left open, nor closed again, when its number may be that of another file."""
    before, real = set(Path("/proc/self/fd").iterdir()), os.close
    for make in (write, write_directory):
        with monkeypatch.context() as patch:
            failed = []

            def close(fd, failed=failed):
                try:
                    real(fd)
                except OSError as error:
                    failed.append(error)
                    raise

            patch.setattr(os, "close", close)
            make(tmp_path / make.__name__, commit=commit)
        assert not failed
    assert set(Path("/proc/self/fd").iterdir()) == before


def test_an_old_directory_that_cannot_be_removed_is_no_failure(tmp_path, monkeypatch):
    """The result is in its place; what is left of the old one goes with the next run."""
    made(tmp_path / "out")
    monkeypatch.setattr(platform, "exchange", lambda *_: False)

    def refuse(*_, **__):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", refuse)
        write_directory(tmp_path / "out", overwrite=True)
    assert len(list(tmp_path.iterdir())) == 2
    write_directory(tmp_path / "out", overwrite=True)
    assert contents(tmp_path).keys() == {"out/w.bin", "out/sub/w.bin"}
    assert len(list(tmp_path.iterdir())) == 1


def test_outputs_that_are_directories(tmp_path):
    """A directory may replace an empty one, or a full one with --overwrite, but never a file."""
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    made(tmp_path / "full")
    for overwrite in (False, True):
        with pytest.raises(MergeError, match="it is a file"):
            refuse_output(tmp_path / "file", directory=True, overwrite=overwrite)
        refuse_output(tmp_path / "empty", directory=True, overwrite=overwrite)
        refuse_output(tmp_path / "new", directory=True, overwrite=overwrite)
    with pytest.raises(MergeError, match=r"(?m): the output exists already$") as caught:
        refuse_output(tmp_path / "full", directory=True, overwrite=False)
    assert caught.value.where == str(tmp_path / "full")
    refuse_output(tmp_path / "full", directory=True, overwrite=True)


def test_only_links_to_files_are_followed(tmp_path):
    """A path through a linked directory stays as it was given."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "linked").symlink_to("folder")
    with Output(tmp_path / "linked" / "out", {".": LAYOUT}, overwrite=False) as out:
        assert out.path == tmp_path / "linked" / "out"


def test_many_threads_write_at_once(tmp_path):
    """Parts from many threads at once make one file and one checksum."""
    layout = Closing(4000, (), {"w": Slot(0, 0, 4000)}, checked=True)
    data = bytes(range(250)) * 16
    with Output(tmp_path / "out", {".": layout}, overwrite=False) as out:
        with ThreadPoolExecutor(8) as pool:
            parts = range(0, 4000, 10)
            list(pool.map(lambda at: out.write(0, "w", at, memoryview(data)[at : at + 10]), parts))
        out.commit()
    assert (tmp_path / "out").read_bytes() == data
    assert layout.told == [(b"", [zlib.crc32(data)])]


def test_the_record_is_written_last(tmp_path):
    """A file is closed with the final record; sums are kept only for layouts that ask for them."""
    layout = Closing(8, ((0, b"ab"),), {"w": Slot(0, 2, 4)}, end=((6, b"yz"),))
    with Output(tmp_path / "out", {".": layout}, b"00", overwrite=False) as out:
        out.write(0, "w", 0, memoryview(b"cdef"))
        out.complete(b"17")
        out.publish()
    assert (tmp_path / "out").read_bytes() == b"abcdefyz"
    assert layout.told == [(b"17", [])]


def test_outputs_share_a_layout(tmp_path):
    """Two outputs with records of other lengths are written by one layout, each at its offset."""

    class Headed(FileLayout):
        def start(self, record):
            return len(record)

        def nbytes(self, record):
            return self.size + len(record)

        def closing(self, record, checksums):
            return ((0, record),)

    layout = Headed(4, (), {"w": Slot(0, 0, 4)})
    for record in (b"a", b"longer"):
        with Output(tmp_path / "out", {".": layout}, bytes(len(record)), overwrite=True) as out:
            out.write(0, "w", 0, memoryview(b"data"))
            out.complete(record)
            out.publish()
        assert (tmp_path / "out").read_bytes() == record + b"data"


def test_the_disk_begins_while_more_is_made(tmp_path, monkeypatch):
    """Each 32 MiB the system is asked to write what it has, and nowhere else does that matter."""
    nbytes = 80 << 20
    layout = FileLayout(nbytes, (), {"w": Slot(0, 0, nbytes)})
    asked = []
    real = platform.start_writeback
    monkeypatch.setattr(platform, "start_writeback", lambda fd: asked.append((fd, real(fd))))
    block = memoryview(bytes(1 << 20))
    with Output(tmp_path / "out", {".": layout}, overwrite=False) as out:
        for at in range(0, nbytes, len(block)):
            out.write(0, "w", at, block)
            if at == 63 << 20:
                assert asked == [(out._files[0].fd, None)] * 2
    assert len(asked) == 2
    monkeypatch.setattr(platform, "_SYNC_FILE_RANGE", None)
    platform.start_writeback(-1)


# What comes or changes while an output is made.


def edit(path):
    """Write to a file, in place."""
    with path.open("ab") as file:
        file.write(b"!")


def replace(path):
    """Give a file other bytes by way of a rename, with the size and the time of the old ones."""
    before = path.stat()
    (path.parent / "new").write_bytes(bytes(before.st_size))
    os.utime(path.parent / "new", ns=(before.st_atime_ns, before.st_mtime_ns))
    (path.parent / "new").rename(path)


DISTURBED = {
    "a file came": lambda out: (out / "eval.json").write_text("{}"),
    "a link came": lambda out: (out / "best").symlink_to("sub"),
    "a folder came": lambda out: ((out / "logs").mkdir(), (out / "logs" / "a").touch()),
    "a file was edited": lambda out: edit(out / "w.bin"),
    "a file was replaced": lambda out: replace(out / "sub" / "w.bin"),
    "all was replaced": lambda out: (out.rename(out.parent / "away"), made(out)),
    "it became a file": lambda out: (out.rename(out.parent / "away"), out.touch()),
}


def late(monkeypatch, disturb, *, swaps):
    """Disturb at the last moment, when two names are about to be exchanged, or cannot be."""
    real, waiting = platform.exchange, [disturb]

    def exchange(*names):
        while waiting:
            waiting.pop()()
        return swaps and real(*names)

    monkeypatch.setattr(platform, "exchange", exchange)


@pytest.mark.parametrize("swaps", [True, False])
@pytest.mark.parametrize("moment", ["while it is made", "before it is published", "last"])
@pytest.mark.parametrize("what", DISTURBED)
def test_what_came_into_a_directory_is_never_lost(tmp_path, monkeypatch, what, moment, swaps):
    """Whatever came or changed since the output was begun: an error, and all stays as it is."""
    path = tmp_path / "out"
    write_directory(path)
    found = {}

    def disturb():
        DISTURBED[what](path)
        found.update(contents(tmp_path))

    if moment == "last":
        late(monkeypatch, disturb, swaps=swaps)
    elif not swaps:
        monkeypatch.setattr(platform, "exchange", lambda *_: False)
    files = {"w.bin": LAYOUT, "sub/w.bin": LAYOUT}
    with Output(path, files, overwrite=True) as out:
        if moment == "while it is made":
            disturb()
        if moment == "before it is published":
            out.complete(b"")
            disturb()
        finish = out.publish if moment == "before it is published" else out.commit
        with pytest.raises(MergeError, match="came or changed while") as caught:
            finish()
        assert caught.value.where == str(path)
    kept = {name: data for name, data in found.items() if "merge-avg-tmp" not in name}
    assert kept
    assert contents(tmp_path) == kept


FILES = {
    "it was edited": (b"old", edit),
    "it was replaced": (b"old", replace),
    "it came": (None, lambda path: path.write_bytes(b"theirs")),
    "it became a folder": (b"old", lambda path: (path.unlink(), made(path))),
    "it became a link": (
        b"old",
        lambda path: (path.rename(path.parent / "a"), path.symlink_to("a")),
    ),
}


@pytest.mark.parametrize("swaps", [True, False])
@pytest.mark.parametrize("moment", ["while it is made", "last"])
@pytest.mark.parametrize("what", FILES)
def test_a_file_that_another_program_wrote_is_never_lost(
    tmp_path, monkeypatch, what, moment, swaps
):
    """With overwrite, only the file that was there at first is replaced."""
    before, disturb = FILES[what]
    path = tmp_path / "out"
    if before is not None:
        path.write_bytes(before)
    if moment == "last" and before is not None:
        late(monkeypatch, lambda: disturb(path), swaps=swaps)
    elif not swaps:
        monkeypatch.setattr(platform, "exchange", lambda *_: False)
    with Output(path, {".": LAYOUT}, overwrite=True) as out:
        if moment != "last":
            disturb(path)
        elif before is None:
            out.complete(b"")
            disturb(path)
        with pytest.raises(MergeError, match="came or changed while"):
            out.commit()
    found = {name: data for name, data in contents(tmp_path).items() if name != "out"}
    assert not path.is_file() or path.read_bytes() != b"abcdef"
    assert set(found) <= {"a", "out/w.bin"}
    assert path.is_symlink() == (what == "it became a link")
    assert not [one for one in tmp_path.iterdir() if "tmp" in one.name]


@pytest.mark.parametrize("swaps", [True, False])
def test_what_is_gone_or_empty_is_no_loss(tmp_path, monkeypatch, swaps):
    """Files that were removed meanwhile, and folders without files, do not stop an output."""
    if not swaps:
        monkeypatch.setattr(platform, "exchange", lambda *_: False)
    for directory in (False, True):
        path = tmp_path / f"out{directory}"
        files = {"w.bin": LAYOUT} if directory else {".": LAYOUT}
        made(path) if directory else path.touch()
        with Output(path, files, overwrite=True) as out:
            out.write(0, "w", 0, memoryview(b"cdef"))
            if directory:
                (path / "w.bin").unlink()
                (path / "empty" / "deep").mkdir(parents=True)
            else:
                path.unlink()
            out.commit()
    assert contents(tmp_path) == {"outFalse": b"abcdef", "outTrue/w.bin": b"abcdef"}


@pytest.mark.parametrize("directory", [False, True])
def test_an_output_that_another_run_replaces(tmp_path, directory):
    """While another program has the old output locked, it is not replaced."""
    path = tmp_path / "out"
    if directory:
        made(path)
    else:
        path.touch()
    files = {"w.bin": LAYOUT} if directory else {".": LAYOUT}
    held = os.open(path, os.O_RDONLY)
    assert platform.lock(held)
    with Output(path, files, overwrite=True) as out:
        with pytest.raises(MergeError, match="another program has locked it"):
            out.commit()
        os.close(held)
        out.publish()
    assert len(contents(tmp_path)) == 1
    assert next(iter(contents(tmp_path).values())).startswith(b"ab")


@pytest.mark.parametrize("directory", [False, True])
def test_the_old_output_is_locked_while_it_has_no_name(tmp_path, monkeypatch, directory):
    """A sweep by another run, between the exchange and the look at it, does not remove it."""
    path = tmp_path / "out"
    real = platform.exchange

    def exchange(*names):
        done = real(*names)
        other = os.open(names[0], os.O_RDONLY)
        assert platform.lock(other) is False
        os.close(other)
        edit(names[0] / "w.bin" if directory else names[0])
        monkeypatch.setattr(platform, "exchange", real)
        return done

    if directory:
        made(path)
    else:
        path.touch()
    monkeypatch.setattr(platform, "exchange", exchange)
    files = {"w.bin": LAYOUT} if directory else {".": LAYOUT}
    with Output(path, files, overwrite=True) as out, pytest.raises(MergeError, match="changed"):
        out.commit()
    assert list(contents(tmp_path).values()) == [b"!"]


def test_an_old_output_gets_its_name_back_where_the_new_one_was_removed(tmp_path, monkeypatch):
    """It does even if somebody removes what it was exchanged for at that very moment."""
    path = tmp_path / "out"
    path.write_bytes(b"old")
    real = platform.exchange

    def exchange(*names):
        monkeypatch.setattr(platform, "exchange", lambda *names: path.unlink() or real(*names))
        done = real(*names)
        edit(names[0])
        return done

    monkeypatch.setattr(platform, "exchange", exchange)
    files = {".": LAYOUT}
    with Output(path, files, overwrite=True) as out, pytest.raises(MergeError, match="changed"):
        out.commit()
    assert contents(tmp_path) == {"out": b"old!"}


def test_a_directory_that_would_lose_files_is_refused_when_it_is_begun(tmp_path):
    """A file that the output has none in place of is named, before anything is written."""
    made(tmp_path / "out")
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(MergeError, match="it holds 'mine', which would be lost"):
        Output(tmp_path / "out", {"w.bin": LAYOUT}, overwrite=True)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_directory_that_cannot_be_read_is_not_replaced(tmp_path, monkeypatch):
    """What lies in a folder that cannot be listed would be lost: an error that names it."""
    made(tmp_path / "out")
    (tmp_path / "out" / "sub").mkdir()
    real = Path.iterdir

    def iterdir(path):
        if path.name == "sub":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    with pytest.raises(PermissionError) as caught:
        refuse_loss(tmp_path / "out", {"w.bin"})
    assert caught.value.filename == str(tmp_path / "out" / "sub")


@pytest.mark.skipif(not os.path.ismount("/proc"), reason="needs a mount point")
def test_mount_points_are_refused():
    """Neither a mount point nor a directory that holds one can be replaced: seen at once."""
    for path in (Path("/proc"), Path("/")):
        with pytest.raises(MergeError, match="mount point"):
            refuse_output(path, directory=True, overwrite=True)


def test_a_place_for_work_goes_with_it(tmp_path):
    """A directory beside an output is hidden, and is gone afterwards."""
    with workplace(tmp_path / "out.pt") as place:
        assert place.parent == tmp_path
        assert place.name.startswith(".out.pt.")
        (place / "file").touch()
    assert not list(tmp_path.iterdir())
    with pytest.raises(MergeError, match="cannot be written") as caught:
        workplace(tmp_path / "none" / "out").__enter__()
    assert caught.value.where == str(tmp_path / "none" / "out")


def test_an_old_output_that_cannot_be_opened_is_replaced(tmp_path, monkeypatch):
    """A file that only its owner may read is no obstacle where its name may be given to another."""
    (tmp_path / "out").write_bytes(b"old")
    failing(monkeypatch, "open", 2, errno.EACCES)
    write(tmp_path / "out", overwrite=True)
    assert contents(tmp_path) == {"out": b"abcdef"}


def test_a_lock_that_cannot_be_closed_is_no_failure(tmp_path, monkeypatch):
    """The output has its name by then."""
    (tmp_path / "out").write_bytes(b"old")
    failing(monkeypatch, "close", 1, errno.EIO)
    write(tmp_path / "out", overwrite=True)
    assert contents(tmp_path) == {"out": b"abcdef"}


def test_windows_names_are_refused(tmp_path, monkeypatch):
    """On Windows no output has the name of a device, nor has a file of one."""
    monkeypatch.setattr(platform, "reserved", lambda name: name.lower().startswith("aux"))
    with pytest.raises(MergeError, match=r"'AUX\.pt' is not a file name on Windows"):
        refuse_output(tmp_path / "AUX.pt", directory=False, overwrite=False)
    with pytest.raises(MergeError, match="'aux' is not a file name on Windows") as caught:
        Output(tmp_path / "out", {"a": LAYOUT, "sub/aux/b": LAYOUT}, overwrite=False)
    assert caught.value.where == str(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_path_that_may_be_too_long_has_a_hint(tmp_path, monkeypatch):
    """Windows says that a file with a long path is missing; the hint says what it may be."""
    monkeypatch.setattr(platform, "WINDOWS", True)
    for length, hint in ((10, None), (230, "choose a shorter path, or switch on long paths")):
        path = Path("/", "none", "a" * length)
        with pytest.raises(MergeError, match="cannot be written") as caught:
            Output(path, {".": LAYOUT}, overwrite=False)
        assert (caught.value.hint or "").startswith(hint or "")
        assert bool(caught.value.hint) == bool(hint)
