"""The calls that not every system has, and what stands in for each where it is missing."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from typing import Any

from merge_avg.errors import MergeError, failure

try:
    import fcntl
except ImportError:
    import msvcrt

    # What is open there can be neither renamed nor removed, a directory cannot be opened, and a
    # rename never replaces anything.
    WINDOWS = True
else:
    WINDOWS = False

# What names of libraries end in.
LIBRARY_SUFFIX = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
_LARGEST_READ = 0x7FFFF000  # bytes that Linux moves in one call
_BLOCK = 1 << 20
_AT_FDCWD = -100
_EXCHANGE = 2  # RENAME_EXCHANGE of linux/fs.h, and RENAME_SWAP of sys/stdio.h of macOS
_LIBC: Any = None if WINDOWS else ctypes.CDLL(None, use_errno=True)
_SYNC_FILE_RANGE = getattr(_LIBC, "sync_file_range", None)
if not WINDOWS:
    _LIBC.memcmp.argtypes = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t
# By descriptor: who seeks and then reads must not be disturbed. A number that is used again keeps
# its lock.
_SEEKING: dict[int, threading.Lock] = {}
# What each file is opened with: child processes do not get it, and line ends are left alone.
FLAGS = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
# What others may have put there is opened with these: no link is followed, no pipe waited for.
CAUTION = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
# Names of devices, in any directory and with any suffix; and what no name may have or end in. After
# a colon comes the name of a hidden stream of a file.
# https://learn.microsoft.com/windows/win32/fileio/naming-a-file
_RESERVED = re.compile(
    r"(?i)(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9\xb9\xb2\xb3]) *(\..*)?"
    r"|.*[^.][. ]+|.*[\x00-\x1f<>:\"|?*\\].*",
    re.DOTALL,
)
# What a file system says that cannot do what it is asked for.
_UNABLE = errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY
_LONGEST = 259  # characters of a path, where longer ones are not switched on

if hasattr(os, "preadv"):

    def _read(fd: int, into: memoryview, offset: int) -> int:
        return os.preadv(fd, [into], offset)

else:

    def _read(fd: int, into: memoryview, offset: int) -> int:
        # FileIO reads into memory that is there already, `os.read` makes its own.
        with _at(fd, offset), open(fd, "rb", buffering=0, closefd=False) as file:
            return file.readinto(into) or 0


if hasattr(os, "pwrite"):

    def _write(fd: int, data: memoryview, offset: int) -> int:
        return os.pwrite(fd, data, offset)

else:

    def _write(fd: int, data: memoryview, offset: int) -> int:
        with _at(fd, offset):
            return os.write(fd, data)


@contextlib.contextmanager
def _at(fd: int, offset: int) -> Iterator[None]:
    """Keep a file at an offset, where other threads move it too."""
    with _SEEKING.setdefault(fd, threading.Lock()):
        os.lseek(fd, offset, os.SEEK_SET)
        yield


def read_fully(fd: int, into: memoryview, offset: int, path: Path) -> None:
    """Fill `into` from `offset` of a file on, or raise MergeError."""
    at, size = 0, len(into)
    while at < size:
        # Most reads need one call: slicing a memoryview would cost as much as the call itself.
        part = into[at : at + _LARGEST_READ] if at or size > _LARGEST_READ else into
        try:
            count = _read(fd, part, offset + at)
        except OSError as error:
            raise failure(error, "cannot be read", path) from None
        if not count:
            what = f"it ends at byte {offset + at:,}, in the middle of the weights"
            raise MergeError(what, where=path, hint="fetch or save the file again")
        at += count


_SPREADS = hasattr(os, "preadv")


def read_spread(fd: int, views: Sequence[memoryview], offset: int, path: Path) -> None:
    """Fill views one after the other from `offset` of a file on, or raise MergeError.

    It takes one call, where a system has such a call and it reads everything.
    """
    if _SPREADS:
        with contextlib.suppress(OSError):  # `read_fully` meets it again, and names the file
            if os.preadv(fd, views, offset) == sum(map(len, views)):
                return
    for view in views:
        read_fully(fd, view, offset, path)
        offset += len(view)


def write_all(fd: int, data: memoryview, offset: int) -> None:
    """Write all of `data` at `offset`, or raise OSError."""
    at = 0
    while at < len(data):
        at += _write(fd, data[at : at + _LARGEST_READ], offset + at)


def write_fully(fd: int, data: memoryview, offset: int, path: Path) -> None:
    """Write all of `data` at `offset`, or raise MergeError."""
    try:
        write_all(fd, data, offset)
    except OSError as error:
        raise failure(error, "cannot be written", path) from None


def reserve(fd: int, nbytes: int, start: int = 0) -> None:
    """Claim a file's space from `start` on, so that a full disk is an OSError now and not later."""
    if not nbytes:
        return
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(fd, start, nbytes)
        else:
            _fill(fd, nbytes, start)
    except OSError as error:
        # Some file systems cannot reserve: there the size is set, and a full disk shows later.
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        os.ftruncate(fd, start + nbytes)
    except OverflowError:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG)) from None


def _fill(fd: int, nbytes: int, start: int) -> None:
    """Write zeros, which are written over later."""
    # Looking for free space and lengthening the file would be faster. But that leaves holes: when
    # another program fills the disk, a mapped one kills the process, and an output fails after
    # hours. Windows' C library would write zeros too, 4 KiB at a time, to lengthen a file.
    if start + nbytes >= 1 << 63:
        raise OverflowError
    zeros = memoryview(bytes(min(_BLOCK, nbytes)))
    for at in range(0, nbytes, _BLOCK):
        write_all(fd, zeros[: nbytes - at], start + at)


def start_writeback(fd: int) -> None:
    """Let the disk begin with what was written to a file, while more is made (Linux)."""
    # This is a hint: where it cannot be given, `fsync` does all of it in the end.
    if _SYNC_FILE_RANGE is not None:
        _SYNC_FILE_RANGE(fd, ctypes.c_int64(0), ctypes.c_int64(0), ctypes.c_uint(2))


def exchange(a: Path, b: Path) -> bool:
    """Swap two names in one step; return False where the system cannot."""
    names = os.fsencode(a), os.fsencode(b)
    if (renameat2 := getattr(_LIBC, "renameat2", None)) is not None:
        return bool(renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _EXCHANGE) == 0)
    renamex_np = getattr(_LIBC, "renamex_np", None)  # of macOS
    return renamex_np is not None and renamex_np(*names, _EXCHANGE) == 0


def mounted(path: Path, table: Path = Path("/proc/self/mountinfo")) -> bool:
    """Return whether something is mounted at a path or below it, which no rename replaces."""
    lines = table.read_bytes().splitlines() if table.exists() else []  # it is Linux's
    # proc(5): the fifth field is the mount point, with blanks and the like in octal.
    points = (re.sub(rb"\\(\d{3})", lambda m: bytes([int(m[1], 8)]), x.split()[4]) for x in lines)
    real = os.path.realpath(path)
    return os.path.ismount(path) or any(Path(os.fsdecode(p)).is_relative_to(real) for p in points)


def sync(fd: int) -> None:
    """Force a file to the disk."""
    # fsync(2) of macOS leaves it in the drive's own memory; some file systems know no other way.
    if not WINDOWS and hasattr(fcntl, "F_FULLFSYNC"):
        try:
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
        except OSError as error:
            if error.errno not in _UNABLE:  # after a failure, `fsync` could say that all is well
                raise
        else:
            return
    os.fsync(fd)


def sync_directory(path: Path) -> None:
    """Force the names in a directory to the disk, where a directory can be opened and forced."""
    try:
        fd = os.open(path, os.O_RDONLY | FLAGS)
    except PermissionError:  # always so on Windows, where NTFS keeps a journal of names
        return
    try:
        sync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
    finally:
        os.close(fd)


def lock(fd: int) -> bool | None:
    """Lock a file while it is open. Return False if another process has it, None if none can."""
    try:
        if WINDOWS:
            # One byte from the file's position on, which nobody else can read or write either.
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        else:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno == (errno.EACCES if WINDOWS else errno.EWOULDBLOCK) else None
    return True


def boot() -> bytes:
    """Return what names this boot of this machine in its containers too, or only the machine."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_bytes()
    except OSError:
        name = os.uname().nodename if hasattr(os, "uname") else os.environ.get("COMPUTERNAME", "")
        return name.encode()


def same_memory(a: int, b: int, nbytes: int) -> bool:
    """Return whether as many bytes at two addresses are the same."""
    if _LIBC is not None:
        return not _LIBC.memcmp(a, b, nbytes)
    sizes = ((at, min(_BLOCK, nbytes - at)) for at in range(0, nbytes, _BLOCK))
    return all(ctypes.string_at(a + at, n) == ctypes.string_at(b + at, n) for at, n in sizes)


# RWF_NOWAIT tells what is cached already; without it each step would be read for nothing.
READS_AHEAD = hasattr(os, "posix_fadvise") and hasattr(os, "preadv") and hasattr(os, "RWF_NOWAIT")


def ask_for(fd: int, offset: int, nbytes: int) -> None:
    """Let the system begin to read what it does not hold yet, where `READS_AHEAD`."""
    if not _cached(fd, offset):
        os.posix_fadvise(fd, offset, nbytes, os.POSIX_FADV_WILLNEED)


def _cached(fd: int, offset: int) -> bool:
    with contextlib.suppress(BlockingIOError):
        os.preadv(fd, [bytearray(1)], offset, os.RWF_NOWAIT)
        return True
    return False


def leads_elsewhere(name: str) -> bool:
    """Return whether a name with slashes, of a file in a directory, would lead out of it here."""
    kinds: tuple[type[PurePath], ...] = (PurePosixPath, *([PureWindowsPath] if WINDOWS else []))
    paths = [kind(name) for kind in kinds]
    return any(one.anchor or ".." in one.parts or not one.parts for one in paths)


def reserved(name: str) -> bool:
    """Return whether the system keeps a name for itself, and would write elsewhere or nowhere."""
    return WINDOWS and _RESERVED.fullmatch(name) is not None


def too_long(path: Path, more: int = 0) -> bool:
    """Return whether a path, and that many characters, may be longer than Windows takes."""
    return WINDOWS and len(str(path.absolute())) + more > _LONGEST


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
