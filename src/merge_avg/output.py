"""Writing the result: a temporary file beside the output, and one rename when it is complete."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from zlib_ng import zlib_ng

from merge_avg.errors import MergeError
from merge_avg.files import Checksum, write_fully
from merge_avg.skeleton import Place, Skeleton

TEMPORARY = ".merge-avg-tmp"


def refuse_output(path: Path, *, overwrite: bool) -> None:
    """Raises MergeError where an output cannot be or must not be written."""
    if path.is_dir():
        raise MergeError("it is a directory", where=path, hint="give the output a file name")
    if not path.parent.is_dir():
        hint = f"create it first: mkdir -p {path.parent}"
        raise MergeError("the directory of the output does not exist", where=path, hint=hint)
    if not os.path.lexists(path):
        return
    if path.exists() and not path.is_file():
        raise MergeError("it is no regular file", where=path, hint="choose another output")
    if not overwrite:
        hint = "choose another output, or replace this one with --overwrite"
        raise MergeError("the output exists already", where=path, hint=hint)


class Output:
    """The result in the making. Leaving the context without `commit` removes every trace of it."""

    def __init__(self, path: Path, skeleton: Skeleton, *, overwrite: bool) -> None:
        self.path = path.resolve() if path.is_symlink() else path
        self._skeleton = skeleton
        self._overwrite = overwrite
        self._lock = threading.Lock()
        self._sums: dict[str, Checksum] = {}
        # The longest name that a file may have is 255 bytes on most file systems.
        stem = os.fsencode(self.path.name)[:200].decode("utf-8", "ignore")
        name = f".{stem}.{secrets.token_hex(4)}{TEMPORARY}"
        self._temporary = self.path.with_name(name)
        flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC
        with _explained(self.path):
            self._fd = os.open(self._temporary, flags, 0o666)
        try:
            self._reserve(skeleton.nbytes)
            for offset, data in skeleton.literals:
                self._write(memoryview(data), offset)
        except BaseException:
            self._discard()
            raise

    def _reserve(self, nbytes: int) -> None:
        """Claims the space, so that a full disk shows before anything is read."""
        if not nbytes:
            return
        with _explained(self.path, f"{nbytes:,} bytes are needed"):
            try:
                os.posix_fallocate(self._fd, 0, nbytes)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                    raise
                os.ftruncate(self._fd, nbytes)

    def place(self, name: str) -> Place:
        """Room for payload, by the skeleton's name for it."""
        return self._skeleton.places[name]

    def write(self, name: str, place: Place, at: int, data: memoryview) -> None:
        """Writes payload `at` bytes into a place, from any thread."""
        self._write(data, place.offset + at)
        if self._skeleton.checked:
            crc = zlib_ng.crc32(data)
            with self._lock:
                self._sums.setdefault(name, Checksum(place.nbytes)).add(at, len(data), crc)

    def commit(self) -> None:
        """Completes the file, forces it to the disk and gives it its name."""
        crcs = {name: sums.value() for name, sums in self._sums.items()}
        # Empty places are never written to.
        names = [*self._skeleton.places, *(record.name for record, _ in self._skeleton.copies)]
        for offset, data in self._skeleton.close({name: crcs.get(name, 0) for name in names}):
            self._write(memoryview(data), offset)
        with _explained(self.path):
            os.fsync(self._fd)
            self._publish()
            _sync_directory(self.path.parent)

    def _publish(self) -> None:
        if self._overwrite:
            os.replace(self._temporary, self.path)
            return
        # Unlike a rename, a link never replaces what came to be there in the meantime.
        try:
            os.link(self._temporary, self.path)
        except FileExistsError:
            hint = "choose another output, or replace this one with --overwrite"
            what = "the output came into being while it was made"
            raise MergeError(what, where=self.path, hint=hint) from None
        except OSError:  # a file system without hard links
            refuse_output(self.path, overwrite=False)
            os.rename(self._temporary, self.path)
        else:
            os.unlink(self._temporary)

    def _write(self, data: memoryview, offset: int) -> None:
        write_fully(self._fd, data, offset, self.path)

    def _discard(self) -> None:
        os.close(self._fd)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._temporary)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._discard()


@contextlib.contextmanager
def _explained(path: Path, more: str = "") -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        hint = None
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            hint = "free some space, or choose another place for the output"
        what = f"cannot be written ({reason}{'; ' + more if more else ''})"
        raise MergeError(what, where=path, hint=hint) from None


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
