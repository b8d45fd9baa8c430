"""Temporary files and directories beside an output: locked while their run lives, else swept away.

A name is .OUTPUT.BOOT-RANDOM.merge-avg-tmp. The run that makes one holds a `flock` on it, which the
system drops with the process, however that ends. So if the lock is free, its run is dead. Some file
systems keep such locks to one machine, though: what another boot of a machine made is taken for
dead only when nothing has written to it for a day.
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
from pathlib import Path

from merge_avg.io._platform import lock

TEMPORARY = ".merge-avg-tmp"
# In a name, .old marks an output that was moved aside to be replaced.
_NAME = re.compile(
    rf"\.(?P<stem>.*)\.(?P<boot>[0-9a-f]{{8}})-[0-9a-f]{{8}}(?P<old>\.old)?{re.escape(TEMPORARY)}",
    re.DOTALL,
)
_ATTEMPTS = 100  # to make one, while other runs sweep the directory


class Temporary:
    """A new file or directory beside an output, removed with the object or the interpreter.

    The open descriptor `fd` holds the lock; that of a file is writable.
    """

    def __init__(self, output: Path, *, directory: bool) -> None:
        # The longest name that a file may have is 255 bytes on most file systems.
        stem = output.name
        if len(raw := os.fsencode(stem)) > 200:
            stem = raw[:197].decode("utf-8", "ignore") + "..."
        for attempt in itertools.count(1):
            self.path = output.with_name(f".{stem}.{_boot()}-{secrets.token_hex(4)}{TEMPORARY}")
            # For what it replaces, where the two cannot be exchanged.
            self.aside = self.path.with_suffix(f".old{TEMPORARY}")
            # Before it exists, so that a signal at any moment finds somebody to remove it.
            self.remove = weakref.finalize(self, _undo, self.path, os.getpid())
            flags = os.O_RDONLY if directory else os.O_RDWR | os.O_CREAT | os.O_EXCL
            try:
                if directory:
                    self.path.mkdir()
                self.fd = os.open(self.path, flags | os.O_CLOEXEC, 0o666)
            except FileExistsError:  # another run's
                self.remove.detach()
                continue
            except FileNotFoundError:
                # Another run's sweep removed it already; but no sweep is as quick each time. In
                # /proc, or in a directory that was removed, nothing can be made at all.
                if attempt == _ATTEMPTS or not output.parent.is_dir():
                    raise
                continue
            # Or removes it between opening and locking.
            if lock(self.fd) is not False:
                with contextlib.suppress(FileNotFoundError):
                    if os.path.samestat(self.path.lstat(), os.fstat(self.fd)):
                        return
            self.close()

    def close(self) -> None:
        """Remove it, where it has not been renamed, and drop the lock."""
        self.remove()
        with contextlib.suppress(OSError):  # all was forced to the disk before
            os.close(self.fd)


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
        with contextlib.suppress(OSError):
            kind = os.O_RDONLY if path.is_dir() else os.O_RDWR  # NFS locks only what is writable
            fd = os.open(path, kind | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                if not lock(fd) or (match["boot"] != _boot() and _touched(path)):
                    continue
                home = folder / match["stem"]
                if match["old"] and not os.path.lexists(home):
                    os.rename(path, home)
                else:
                    remove(path)
            finally:
                os.close(fd)


def _undo(path: Path, owner: int) -> None:
    if os.getpid() != owner:  # a child that was forked meanwhile
        return
    try:
        remove(path)
    except BaseException:  # a signal that came just now, and does not come twice
        remove(path)
        raise


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
    try:
        text = Path("/proc/sys/kernel/random/boot_id").read_bytes()
    except OSError:
        text = os.uname().nodename.encode()
    return f"{zlib.crc32(text):08x}"
