"""Linux as macOS and Windows are: what they lack is taken away, and what they refuse is refused.

`take_away` changes the process that calls it, before merge_avg is imported in it. As a module
called sitecustomize, on the path, this does so in each process of a test run.
"""

import builtins
import contextlib
import ctypes
import errno
import io
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import types
from pathlib import Path

__all__ = ["take_away"]
LACKING = {
    "macos": "posix_fadvise posix_fallocate sched_getaffinity RWF_NOWAIT RWF_HIPRI",
    "windows": "posix_fadvise posix_fallocate sched_getaffinity RWF_NOWAIT RWF_HIPRI pread preadv "
    "pwrite pwritev readv writev fdatasync statvfs fstatvfs fchmod chown lchown "
    "O_CLOEXEC O_NOFOLLOW O_NONBLOCK O_DIRECTORY O_SYNC O_DSYNC",
}
SIGNALS = "SIGHUP SIGALRM setitimer getitimer alarm pthread_sigmask sigwait siginterrupt"
TABLES = "/proc/self/mountinfo", "/proc/sys/kernel/random/boot_id", "/sys/fs/cgroup/cpu.max"
CALLS = "renameat2", "sync_file_range"  # of libc
BINARY = 1 << 29  # no flag of Linux
FULL = 51  # F_FULLFSYNC of macOS
TAKEN: list[str] = []  # what stands in for a missing call, as it is called


def take_away(system):
    """Make this process find what `system` has: "macos", "windows" or "linux"."""
    if system == "linux":
        return
    for name in LACKING[system].split():
        if hasattr(os, name):
            delattr(os, name)
    _hide_tables()
    _MACOS() if system == "macos" else _WINDOWS()


def _hide_tables():
    """Hide what Linux tells in files."""
    real, stat = io.open, os.stat

    def opened(file, *args, **options):
        if str(file) in TABLES:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(file))
        return real(file, *args, **options)

    def told(path, **options):
        if str(path) in TABLES:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        return stat(path, **options)

    io.open = builtins.open = opened
    os.stat = told


class _Library(ctypes.CDLL):
    """A library without the calls of Linux."""

    def __getattr__(self, name):
        if name in CALLS:
            raise AttributeError(name)
        return super().__getattr__(name)


def _MACOS():  # noqa: N802
    import fcntl

    real = fcntl.fcntl

    def control(fd, command, *args):
        if command != FULL:
            return real(fd, command, *args)
        TAKEN.append("full")
        return os.fsync(fd)

    fcntl.fcntl, fcntl.F_FULLFSYNC = control, FULL
    ctypes.CDLL = _Library


def _WINDOWS():  # noqa: N802
    import fcntl

    def locking(fd, mode, nbytes):
        """Lock as msvcrt does, which says EACCES where somebody else has the lock."""
        TAKEN.append("locking")
        assert (mode, nbytes) == (2, 1)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PermissionError(errno.EACCES, "Permission denied") from None

    for name in ("fcntl", "resource", "termios", "pwd", "grp"):
        sys.modules[name] = None
    assert not subprocess._mswindows
    module = types.ModuleType("msvcrt")
    module.locking, module.LK_NBLCK = locking, 2
    sys.modules["msvcrt"] = module
    for name in SIGNALS.split():
        delattr(signal, name)
    os.O_BINARY = BINARY
    library = ctypes.CDLL

    def loaded(name, *args, **options):
        if name is None and _ours(2):
            raise TypeError("LoadLibrary() argument 1 must be str, not None")
        return library(name, *args, **options)

    ctypes.CDLL = loaded
    shutil._use_fd_functions = False
    if hasattr(shutil, "_rmtree_impl"):  # Python 3.14
        shutil._rmtree_impl = shutil._rmtree_unsafe
    _refuse_as_windows()


def _ours(depth):
    return sys._getframe(depth).f_globals.get("__name__", "").startswith("merge_avg")


def _is_open(path):
    """Return whether this process has a file open, or one in a directory."""
    home = os.path.realpath(path)
    for fd in os.listdir("/proc/self/fd"):  # noqa: PTH208
        with contextlib.suppress(OSError):
            place = os.readlink(f"/proc/self/fd/{fd}")  # noqa: PTH115
            if place == home or place.startswith(f"{home}/"):
                return True
    return False


def _refuse_as_windows():
    """Refuse what Windows does: to open directories, to move what is open, to replace by renaming.

    Line ends in what was not opened as binary would change: that is refused too.
    """
    real = {name: getattr(os, name) for name in ("open", "rename", "replace", "rmdir")}
    unlink = os.unlink

    def denied(path):
        return PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    def opened(path, flags, mode=0o777, **options):
        nameless = getattr(os, "O_TMPFILE", 0)
        if os.path.isdir(path) and not (nameless and flags & nameless == nameless):  # noqa: PTH112
            raise denied(path)
        assert not _ours(2) or path == os.devnull or flags & BINARY, f"{path} is opened as text"
        return real["open"](path, flags & ~BINARY, mode, **options)

    def rename(old, new, **options):
        if os.path.lexists(new):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(old))
        if _is_open(old):
            raise denied(old)
        return real["rename"](old, new, **options)

    def replace(old, new, **options):
        if _is_open(old) or os.path.isdir(new) or (os.path.lexists(new) and _is_open(new)):  # noqa: PTH112
            raise denied(old)
        return real["replace"](old, new, **options)

    def remove(path, **options):
        if not os.path.islink(path) and _is_open(path):  # noqa: PTH114
            raise denied(path)
        return unlink(path, **options)

    os.open, os.rename, os.replace = opened, rename, replace
    os.unlink = os.remove = remove
    assert tempfile._O_TMPFILE_WORKS


if Path(__file__).stem == "sitecustomize":
    take_away(os.environ["MERGE_AVG_TEST_SYSTEM"])
