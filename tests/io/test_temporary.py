"""merge_avg.io._temporary: what a dead run left is swept away, what a living one holds stays."""

import errno
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from merge_avg.io import _platform as platform
from merge_avg.io import _temporary as temporary
from merge_avg.io._platform import lock
from merge_avg.io._temporary import TEMPORARY, Lock, Temporary, remove, sweep


def make(folder, *, directory=False):
    made = Temporary(folder / "out.pt", directory=directory)
    if directory:
        (made.path / "sub").mkdir()
        (made.path / "sub" / "file").touch()
    return made


def abandon(made):
    """Drop the lock and keep the file, as if the process had died."""
    made.remove.detach()
    made.close()
    return made.path


@pytest.mark.parametrize("directory", [False, True])
def test_the_dead_go_and_the_living_stay(tmp_path, directory):
    """A sweep removes what nobody holds, and leaves what somebody does."""
    living = make(tmp_path, directory=directory)
    dead = abandon(make(tmp_path, directory=directory))
    sweep(tmp_path)
    assert not dead.exists()
    assert list(tmp_path.iterdir()) == [living.path]
    living.remove()
    living.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("directory", [False, True])
def test_the_lock_goes_with_the_process(tmp_path, directory):
    """Another process's temporary stays while it lives, and goes when it was killed."""
    code = (
        "import sys, time\nfrom pathlib import Path\n"
        "from merge_avg.io._temporary import Temporary\n"
        f"made = Temporary(Path(sys.argv[1]), directory={directory})\n"
        "print(made.path, flush=True)\ntime.sleep(60)\n"
    )
    command = [sys.executable, "-c", code, tmp_path / "out"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        path = tmp_path / other.stdout.readline().strip()
        sweep(tmp_path)
        assert list(tmp_path.iterdir()) == [path]
        other.send_signal(signal.SIGKILL)
    sweep(tmp_path)
    assert not list(tmp_path.iterdir())


def test_names_of_others_are_left(tmp_path):
    """Only names of our own making are looked at, and links are not followed."""
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "file").touch()
    names = [
        f".out.pt{TEMPORARY}",
        f".out.pt.0123abcd{TEMPORARY}",
        f"out.pt.{'0' * 8}-{'1' * 8}{TEMPORARY}",
        f".out.pt.{'0' * 8}-{'1' * 8}{TEMPORARY}.pt",
    ]
    for name in names:
        (tmp_path / name).touch()
    link = f".out.pt.{temporary._boot()}-{'1' * 8}{TEMPORARY}"
    (tmp_path / link).symlink_to("target")
    sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"target", link, *names}
    assert (tmp_path / "target" / "file").exists()


@pytest.mark.parametrize("directory", [False, True])
def test_of_another_boot_only_the_old_go(tmp_path, monkeypatch, directory):
    """Where locks may not reach, a temporary counts as dead after a day without writing."""
    with monkeypatch.context() as patch:
        patch.setattr(temporary, "_boot", lambda: "0123abcd")
        path = abandon(make(tmp_path, directory=directory))
    sweep(tmp_path)
    assert path.exists()
    then = time.time() - 90_000
    inside = [path / "sub" / "file", path / "sub", path] if directory else [path]
    for one in inside[1:] + inside[:1]:
        sweep(tmp_path)
        assert path.exists()
        os.utime(one, (then, then))
    sweep(tmp_path)
    assert not path.exists()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EBADF])
def test_without_locks_nothing_is_swept(tmp_path, monkeypatch, number):
    """Where a file system has no locks, a temporary can be made, and none is taken for dead."""

    def refuse(*_):
        raise OSError(number, "no locks")

    dead = abandon(make(tmp_path))
    monkeypatch.setattr(platform.fcntl, "flock", refuse)
    living = make(tmp_path)
    sweep(tmp_path)
    assert {dead, living.path} == set(tmp_path.iterdir())


def test_what_was_moved_aside_comes_back(tmp_path):
    """A run that died between two renames left no output: the sweep gives the old one its name."""
    made = Temporary(tmp_path / "out", directory=True)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    held = os.open(tmp_path / "out", os.O_RDONLY)
    assert lock(held)
    (tmp_path / "out").rename(made.aside)
    sweep(tmp_path)  # while that run lives
    assert made.aside.exists()
    os.close(held)
    abandon(made)
    sweep(tmp_path)
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["out", "out/old"]
    (tmp_path / "out").rename(made.aside)
    (tmp_path / "out").mkdir()
    sweep(tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["out"]


def test_a_sweep_that_comes_between_is_seen(tmp_path, monkeypatch):
    """A temporary that was swept before it was locked is made again under another name."""
    real, taken = temporary.lock, []

    def stolen(fd):
        if len(taken) < 2:
            (path,) = tmp_path.iterdir()
            taken.append(path)
            if len(taken) == 1:
                path.unlink()  # the other one is through
            else:
                return False  # the other one is about to
        return real(fd)

    monkeypatch.setattr(temporary, "lock", stolen)
    made = make(tmp_path)
    assert [made.path] == list(tmp_path.iterdir())
    assert made.path not in taken


def test_a_directory_that_was_swept_before_it_was_opened(tmp_path, monkeypatch):
    """It is made again; a directory that is not there to make it in is an error."""
    real = os.open

    def late(path, *args):
        monkeypatch.setattr(os, "open", real)
        path.rmdir()
        return real(path, *args)

    monkeypatch.setattr(os, "open", late)
    made = Temporary(tmp_path / "out", directory=True)
    assert made.path.is_dir()
    made.close()
    for directory in (False, True):
        with pytest.raises(FileNotFoundError):
            Temporary(tmp_path / "none" / "out", directory=directory)


def test_it_goes_with_its_object_and_not_with_a_fork(tmp_path):
    """Whoever forgets it loses it; a child that was forked meanwhile does not remove it."""
    made = make(tmp_path)
    pid = os.fork()
    if not pid:
        made.remove()
        os._exit(0)
    os.waitpid(pid, 0)
    assert made.path.exists()
    fd = made.fd
    del made
    os.close(fd)
    assert not list(tmp_path.iterdir())


def test_an_interruption_of_the_removal_leaves_nothing(tmp_path, monkeypatch):
    """A signal that comes while a temporary is removed does not keep it."""
    made = make(tmp_path)
    real, calls = os.unlink, []

    def unlink(path):
        calls.append(path)
        if len(calls) == 1:
            raise KeyboardInterrupt
        real(path)

    monkeypatch.setattr(os, "unlink", unlink)
    with pytest.raises(KeyboardInterrupt):
        made.remove()
    made.close()
    assert not list(tmp_path.iterdir())


def test_a_taken_name_is_left_alone(tmp_path, monkeypatch):
    """What somebody else has under the same name is not removed."""
    names = iter(["0" * 8, "1" * 8])
    monkeypatch.setattr(temporary.secrets, "token_hex", lambda _: next(names))
    theirs = tmp_path / f".out.pt.{temporary._boot()}-{'0' * 8}{TEMPORARY}"
    theirs.touch()
    made = make(tmp_path)
    assert theirs.exists()
    assert made.path.name == f".out.pt.{temporary._boot()}-{'1' * 8}{TEMPORARY}"


def test_a_lock_has_three_answers(tmp_path):
    """A lock is taken, or held by another process, or the file cannot have one."""
    with (tmp_path / "a").open("w") as ours, (tmp_path / "a").open() as theirs:
        assert lock(ours.fileno()) is True
        assert lock(theirs.fileno()) is False
    fd = os.open(tmp_path, os.O_PATH)
    assert lock(fd) is None
    os.close(fd)


def test_what_can_be_removed_is_removed(tmp_path, monkeypatch):
    """One file that stays keeps no other from being removed."""
    made = make(tmp_path, directory=True)
    for name in "abc":
        (made.path / "sub" / name).touch()
    real, calls = os.unlink, []

    def unlink(*args, **kwargs):
        calls.append(args[0])
        if args[0] == stays:
            raise OSError(errno.EIO, "Input/output error")
        real(*args, **kwargs)

    monkeypatch.setattr(os, "unlink", unlink)
    stays = "b"
    made.remove()
    assert set(calls) == {"a", "b", "c", "file"}
    assert [path.name for path in (made.path / "sub").iterdir()] == ["b"]
    stays = ""
    remove(made.path)
    assert not list(tmp_path.iterdir())


def test_what_fails_once_is_tried_again(tmp_path, monkeypatch):
    """A removal that failed half-way is done again."""
    made = make(tmp_path, directory=True)
    real, calls = os.rmdir, []

    def rmdir(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise OSError(errno.EBADF, "Bad file descriptor")
        real(*args, **kwargs)

    monkeypatch.setattr(os, "rmdir", rmdir)
    made.remove()
    assert len(calls) == 3
    assert not list(tmp_path.iterdir())


def test_the_usual_permissions(tmp_path):
    """A temporary has the permissions that files usually get."""
    before = os.umask(0)
    try:
        made = make(tmp_path)
    finally:
        os.umask(before)
    assert made.path.stat().st_mode & 0o777 == 0o666
    made.close()


@pytest.mark.parametrize("name", ["x" * 255, "é" * 127, "\udcff" * 255])
def test_long_and_odd_names(tmp_path, name):
    """A temporary can be made beside any output, however long its name, and is recognised."""
    made = Temporary(tmp_path / name, directory=False)
    path = abandon(made)
    assert path.exists()
    stem = {"x": "x" * 197 + "...", "é": "é" * 98 + "...", "\udcff": "..."}[name[0]]
    assert path.name.startswith(f".{stem}.{temporary._boot()}-")
    assert len(os.fsencode(made.aside.name)) <= 255
    sweep(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["é" * 100, "\udcff" * 200])
def test_names_are_cut_only_where_they_are_too_long(tmp_path, name):
    """A name of 200 bytes is whole in that of its temporary."""
    made = Temporary(tmp_path / name, directory=False)
    assert made.path.name.startswith(f".{name}.")


def test_a_folder_that_cannot_be_listed_is_left(tmp_path):
    """Sweeping a directory that does not exist or cannot be listed does nothing."""
    sweep(tmp_path / "none")


@pytest.mark.parametrize("directory", [False, True])
def test_a_folder_in_which_nothing_can_be_made_is_an_error(tmp_path, monkeypatch, directory):
    """A folder that was removed, or one such as /proc, is reported, and not tried for ever."""
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    places = [Path("out.pt"), Path("/proc/out.pt")] if Path("/proc/self").exists() else [Path("o")]
    for place in places:
        with pytest.raises(FileNotFoundError):
            Temporary(place, directory=directory)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def windows(monkeypatch):
    """Locks of Windows, which say EACCES where another has one."""
    flock, flags = platform.fcntl.flock, platform.fcntl.LOCK_EX | platform.fcntl.LOCK_NB

    def locking(fd, mode, nbytes):
        assert (mode, nbytes) == (2, 1)
        try:
            flock(fd, flags)
        except BlockingIOError:
            raise PermissionError(errno.EACCES, "Permission denied") from None

    module = types.SimpleNamespace(locking=locking, LK_NBLCK=2)
    monkeypatch.setattr(platform, "msvcrt", module, raising=False)
    for one in (platform, temporary):
        monkeypatch.setattr(one, "WINDOWS", True)
    return module


@pytest.mark.parametrize("directory", [False, True])
def test_locks_lie_beside_on_windows(tmp_path, windows, directory):
    """There a living temporary has a locked file beside it; a dead one goes, with its file."""
    living = make(tmp_path, directory=directory)
    dead = make(tmp_path, directory=directory)
    dead.remove.detach()
    dead.release()
    os.close(dead._lock._fd)
    begun = Temporary(tmp_path / "begun", directory=directory)  # died before there was more
    begun.remove.detach()
    begun.release()
    os.close(begun._lock._fd)
    remove(begun.path)
    aside = tmp_path / dead.aside.name.replace(".out.pt.", ".moved.")
    aside.write_bytes(b"old")
    assert len(list(tmp_path.iterdir())) == 6
    sweep(tmp_path)
    left = {living.path, living._lock._path, tmp_path / "moved"}
    assert set(tmp_path.iterdir()) == left
    assert (tmp_path / "moved").read_bytes() == b"old"
    living.close()
    assert [one.name for one in tmp_path.iterdir()] == ["moved"]


def test_one_run_replaces_an_output_on_windows(tmp_path, windows):
    """Of an output there is one lock, which nobody gets while another has it."""
    name = "long" * 60 + ".pt"
    first, second = (Lock.of(tmp_path / name) for _ in range(2))
    assert first.take()
    assert second.take() is False
    second.close()
    sweep(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    first.close()
    assert second.take()
    second.close()
    assert not list(tmp_path.iterdir())


def test_nothing_is_swept_on_windows_where_there_are_no_locks(tmp_path, windows):
    """A lock that cannot be had tells nobody's death."""
    living = make(tmp_path)
    living.release()

    def refuse(*_):
        raise OSError(errno.ENOTSUP, "no locks")

    windows.locking = refuse
    other = make(tmp_path)
    sweep(tmp_path)
    assert {living.path, other.path} <= set(tmp_path.iterdir())
