"""The calls that not every system has, and what stands in for each where it is missing."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
from pathlib import Path

from merge_avg.errors import MergeError, failure

_LARGEST_READ = 0x7FFFF000  # bytes that Linux moves in one call
_AT_FDCWD = -100
_EXCHANGE = 2  # RENAME_EXCHANGE, of linux/fs.h
_LIBC = ctypes.CDLL(None, use_errno=True)
_SYNC_FILE_RANGE = getattr(_LIBC, "sync_file_range", None)
memcmp = _LIBC.memcmp
memcmp.argtypes = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t


def read_fully(fd: int, into: memoryview, offset: int, path: Path) -> None:
    """Fill `into` from `offset` of a file on, or raise MergeError."""
    at, size = 0, len(into)
    while at < size:
        # Most reads need one call: slicing a memoryview would cost as much as the call itself.
        part = into[at : at + _LARGEST_READ] if at or size > _LARGEST_READ else into
        try:
            count = os.preadv(fd, [part], offset + at)
        except OSError as error:
            raise failure(error, "cannot be read", path) from None
        if not count:
            what = f"it ends at byte {offset + at:,}, in the middle of the weights"
            raise MergeError(what, where=path, hint="fetch or save the file again")
        at += count


def write_fully(fd: int, data: memoryview, offset: int, path: Path) -> None:
    """Write all of `data` at `offset`, or raise MergeError."""
    at = 0
    while at < len(data):
        try:
            at += os.pwrite(fd, data[at : at + _LARGEST_READ], offset + at)
        except OSError as error:
            raise failure(error, "cannot be written", path) from None


def reserve(fd: int, nbytes: int, start: int = 0) -> None:
    """Claim a file's space from `start` on, so that a full disk is an OSError now and not later."""
    if not nbytes:
        return
    try:
        os.posix_fallocate(fd, start, nbytes)
    except OSError as error:
        # Some file systems cannot reserve: there the size is set, and a full disk shows later.
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        os.ftruncate(fd, start + nbytes)
    except OverflowError:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG)) from None


def start_writeback(fd: int) -> None:
    """Let the disk begin with what was written to a file, while more is made (Linux)."""
    # This is a hint: where it cannot be given, `fsync` does all of it in the end.
    if _SYNC_FILE_RANGE is not None:
        _SYNC_FILE_RANGE(fd, ctypes.c_int64(0), ctypes.c_int64(0), ctypes.c_uint(2))


def exchange(a: Path, b: Path) -> bool:
    """Swap two names in one step; return False where the system cannot."""
    names = _AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b)
    renameat2 = getattr(_LIBC, "renameat2", None)
    return renameat2 is not None and renameat2(*names, _EXCHANGE) == 0


def mounted(path: Path, table: Path = Path("/proc/self/mountinfo")) -> bool:
    """Return whether something is mounted at a path or below it, which no rename replaces."""
    lines = table.read_bytes().splitlines() if table.exists() else []  # it is Linux's
    # proc(5): the fifth field is the mount point, with blanks and the like in octal.
    points = (re.sub(rb"\\(\d{3})", lambda m: bytes([int(m[1], 8)]), x.split()[4]) for x in lines)
    real = os.path.realpath(path)
    return os.path.ismount(path) or any(Path(os.fsdecode(p)).is_relative_to(real) for p in points)


def sync_directory(path: Path) -> None:
    """Force the names in a directory to the disk, where a directory can be opened and forced."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except PermissionError:
        return
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
    finally:
        os.close(fd)


def lock(fd: int) -> bool | None:
    """Lock a file while it is open. Return False if another process has it, None if none can."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno == errno.EWOULDBLOCK else None
    return True


def cores(limit: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Return how many cores this process may use, by its affinity and its control group."""
    count = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    # Linux, cgroup version 2: a quota in each period, which may be "max", rounded up to cores.
    with contextlib.suppress(OSError, ValueError):
        quota, period = map(int, limit.read_text("ascii").split())
        count = min(count, -(-quota // period))
    return max(1, count)
