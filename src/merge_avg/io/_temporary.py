"""Temporary files and directories beside an output: locked while their run lives, else swept away.

A name is .OUTPUT.BOOT-RANDOM.merge-avg-tmp. The run that makes one holds a `flock` on it, which the
system drops with the process, however that ends. So if the lock is free, its run is dead. Some file
systems keep such locks to one machine, though: what another boot of a machine made is taken for
dead only when nothing has written to it for a day.

Windows cannot lock a directory, and what is open there gets no other name. So there the lock is on
an empty file beside it, .OUTPUT.BOOT-RANDOM.lock.merge-avg-tmp, made first and removed last.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import re
import secrets
import shutil
import time
import weakref
import zlib
from collections.abc import Iterator
from pathlib import Path

from merge_avg.io._platform import CAUTION, FLAGS, WINDOWS, boot, lock

TEMPORARY = ".merge-avg-tmp"
# In a name, .old marks an output that was moved aside to be replaced.
_NAME = re.compile(
    r"(?P<whole>\.(?P<stem>.*)\.(?P<boot>[0-9a-f]{8})-[0-9a-f]{8})((?P<old>\.old)|\.lock)?"
    + re.escape(TEMPORARY),
    re.DOTALL,
)
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | FLAGS
_ATTEMPTS = 100  # to make one, while other runs sweep the directory


class Temporary:
    """A new file or directory beside an output, removed with the object or the interpreter.

    Of a file, `fd` is open to be written. It holds the lock, and so does that of a directory; where
    the lock is on another file, a directory has -1.
    """

    def __init__(self, output: Path, *, directory: bool) -> None:
        for attempt in itertools.count(1):
            self.fd = -1
            whole = _whole(output, secrets.token_hex(4))
            self.path = output.with_name(whole + TEMPORARY)
            # For what it replaces, where the two cannot be exchanged.
            self.aside = output.with_name(f"{whole}.old{TEMPORARY}")
            self._lock = Lock(output.with_name(whole)) if WINDOWS else None
            # Before it exists, so that a signal at any moment finds somebody to remove it.
            self.remove = weakref.finalize(self, _undo, self.path, os.getpid(), self._lock)
            try:
                if self._lock is not None and self._lock.take() is False:
                    self.close()
                    continue
                if directory:
                    self.path.mkdir()
                if not directory:
                    self.fd = os.open(self.path, _NEW, 0o666)
                elif not WINDOWS:
                    self.fd = os.open(self.path, os.O_RDONLY | FLAGS)
            except FileExistsError:  # another run's
                self.remove.detach()
                if self._lock is not None:
                    self._lock.close()
                continue
            except FileNotFoundError:
                # Another run's sweep removed it already; but no sweep is as quick each time. In
                # /proc, or in a directory that was removed, nothing can be made at all.
                if attempt == _ATTEMPTS or not output.parent.is_dir():
                    raise
                continue
            # Or removes it between opening and locking.
            if WINDOWS or _locked(self.fd, self.path) is not False:
                return
            self.close()

    def release(self) -> None:
        """Close the file where what is open gets no other name, and is not removed."""
        if WINDOWS:
            self._close()

    def close(self) -> None:
        """Remove it, where it has not been renamed, and drop the lock."""
        self.release()
        self.remove()
        self._close()

    def _close(self) -> None:
        if self.fd >= 0:
            with contextlib.suppress(OSError):  # all was forced to the disk before
                os.close(self.fd)
            self.fd = -1


class Lock:
    """The lock of a temporary, or of an output, on an empty file beside it (Windows)."""

    def __init__(self, beside: Path) -> None:
        self._path = beside.with_name(f"{beside.name}.lock{TEMPORARY}")
        self._fd = -1

    @classmethod
    def of(cls, output: Path) -> Lock:
        """Return the one lock of an output, for as long as it is replaced."""
        return cls(output.with_name(_whole(output, f"{0:08x}")))

    def take(self) -> bool | None:
        """Return whether the lock is this object's from now on; None where there are no locks."""
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | FLAGS, 0o666)
        locked = _locked(self._fd, self._path)
        if locked is False:
            os.close(self._fd)
            self._fd = -1
        return locked

    def close(self) -> None:
        """Give it back, if it was taken."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)
            remove(self._path)


def beside(output: Path, *, old: bool = False) -> Path:
    """Return a new name for what is removed, or is `old` and moved aside to be replaced."""
    return output.with_name(f"{_whole(output, secrets.token_hex(4))}{'.old' * old}{TEMPORARY}")


def _whole(output: Path, key: str) -> str:
    """Return the name of a temporary, without what all end in."""
    # The longest name that a file may have is 255 bytes on most file systems.
    stem = output.name
    if len(raw := os.fsencode(stem)) > 200:
        stem = raw[:197].decode("utf-8", "ignore") + "..."
    return f".{stem}.{_boot()}-{key}"


def _locked(fd: int, path: Path) -> bool | None:
    """Lock an open file, if it has its name still; return what `lock` does."""
    locked = lock(fd)
    with contextlib.suppress(FileNotFoundError):
        if locked is not False and os.path.samestat(path.lstat(), os.fstat(fd)):
            return locked
    return False


def sweep(folder: Path) -> None:
    """Remove what dead runs left in a directory, as far as that is possible.

    An output that was moved aside to be replaced gets its name back where that is free.
    """
    try:
        with os.scandir(folder) as entries:
            found = [match for entry in entries if (match := _NAME.fullmatch(entry.name))]
    except OSError:  # a directory may be writable but not readable
        return
    for match in found:
        path = folder / match[0]
        with contextlib.suppress(OSError), _dead(path, match) as dead:
            if not dead or (match["boot"] != _boot() and _touched(path)):
                continue
            home = folder / match["stem"]
            if match["old"] and not os.path.lexists(home):
                os.rename(path, home)
            else:
                remove(path)


@contextlib.contextmanager
def _dead(path: Path, match: re.Match[str]) -> Iterator[bool | None]:
    """Yield whether the lock of a temporary is free, and hold it meanwhile."""
    if WINDOWS:
        held = Lock(path.with_name(match["whole"]))
        with contextlib.closing(held):
            yield held.take()
        return
    kind = os.O_RDONLY if path.is_dir() else os.O_RDWR  # NFS locks only what is writable
    fd = os.open(path, kind | CAUTION | FLAGS)
    try:
        yield lock(fd)
    finally:
        os.close(fd)


def _undo(path: Path, owner: int, held: Lock | None) -> None:
    if os.getpid() != owner:  # a child that was forked meanwhile
        return
    try:
        remove(path)
    except BaseException:  # a signal that came just now, and does not come twice
        remove(path)
        raise
    finally:
        if held is not None:
            held.close()


def remove(path: Path) -> None:
    """Remove a file or a directory, as far as that is possible."""
    for _ in range(2):  # a signal within the first may end as an OSError of shutil's
        with contextlib.suppress(OSError):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()
        if not os.path.lexists(path):
            return


def _touched(path: Path) -> bool:
    """Return whether anything was written to it within a day."""
    return time.time() - max(one.lstat().st_mtime for one in (path, *path.rglob("*"))) < 86400


@functools.cache
def _boot() -> str:
    """Return a name for this boot of this machine, the same in its containers."""
    return f"{zlib.crc32(boot()):08x}"
