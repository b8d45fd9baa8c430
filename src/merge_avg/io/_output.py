"""Writing the result: temporary files beside the output, and one rename when all are complete."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import threading
from array import array
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from zlib_ng import zlib_ng

from merge_avg.checkpoint import FileLayout, Literal
from merge_avg.errors import MergeError, failure
from merge_avg.io._reader import Checksum, reserve, start_writeback, write_fully
from merge_avg.io._temporary import Temporary, lock, remove, sweep

_AT_FDCWD = -100
_WRITEBACK = 1 << 25  # bytes after which the disk is told to begin with them


def refuse_output(path: Path, *, directory: bool, overwrite: bool) -> None:
    """Raises MergeError where an output cannot be or must not be written."""
    if path.is_dir() and not directory:
        raise MergeError("it is a directory", where=path, hint="give the output a file name")
    if not path.parent.is_dir():
        hint = f"create it first: mkdir -p {path.parent}"
        raise MergeError("the directory of the output does not exist", where=path, hint=hint)
    if not os.path.lexists(path):
        return
    if directory and not path.is_dir():
        raise MergeError("it is a file", where=path, hint="choose another name for the directory")
    if path.exists() and not (path.is_file() or directory):
        raise MergeError("it is no regular file", where=path, hint="choose another output")
    empty = directory and not any(path.iterdir())
    if not overwrite and not empty:
        raise _exists(path, "the output exists already")


def _exists(path: Path, what: str) -> MergeError:
    hint = "choose another output, or replace this one with --overwrite"
    return MergeError(what, where=path, hint=hint)


class Sink(Protocol):
    """Where an average goes: an output, or what compares it with one that is there."""

    @property
    def folder(self) -> Path:
        """Where there is room for files of a merge that have no name."""

    def write(self, number: int, name: str, at: int, data: memoryview) -> None:
        """Takes payload."""

    def complete(self, record: bytes) -> None:
        """Takes the provenance record, after all payload."""

    def publish(self) -> None:
        """Takes the end."""


class Output:
    """The result in the making. Leaving the context without `commit` removes every trace of it.

    Args:
        path: what it will be called.
        files: their layouts by relative path; a single one called "." is a file, not a directory.
        draft: stands for its provenance record, which is as long.
        overwrite: whether it may replace what is there.
    """

    def __init__(
        self, path: Path, files: Mapping[str, FileLayout], draft: bytes = b"", *, overwrite: bool
    ) -> None:
        self.path = Path(os.path.realpath(path)) if path.is_symlink() else path
        self._overwrite = overwrite
        self._directory = set(files) != {"."}
        self._files: list[OutputFile] = []
        sweep(self.path.parent)
        with _explained(self.path):
            self._temporary = Temporary(self.path, directory=self._directory)
        try:
            for relative, layout in files.items():
                fd = self._opened(relative) if self._directory else self._temporary.fd
                self._files.append(OutputFile(self.path, fd, layout, draft))
            self._reserve()
        except BaseException:  # Ctrl-C as well must leave nothing behind; it goes on from here
            self._discard()
            raise

    def _opened(self, relative: str) -> int:
        place = self._temporary.path / relative
        with _explained(self.path):
            place.parent.mkdir(parents=True, exist_ok=True)
            return os.open(place, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o666)

    def _reserve(self) -> None:
        """Claims the space, so that a full disk shows before anything is read."""
        nbytes = sum(file.nbytes for file in self._files)
        with _explained(self.path, more=f"; {nbytes:,} bytes are needed"):
            for file in self._files:
                reserve(file.fd, file.nbytes)
        for file in self._files:
            for offset, data in file.layout.opening():
                file.write(memoryview(data), offset)

    def write(self, number: int, name: str, at: int, data: memoryview) -> None:
        """Writes payload `at` bytes into a slot of a file, from any thread.

        Args:
            number: of the file.
            name: of a slot in its layout.
            at: where in the slot, in bytes.
            data: the bytes.
        """
        self._files[number].fill(name, at, data)

    @property
    def folder(self) -> Path:
        """Where there is room for files of a merge that have no name."""
        return self.path.parent

    def commit(self) -> None:
        """Completes the files, forces them to the disk and gives the result its name."""
        self.complete(b"")
        self.publish()

    def complete(self, record: bytes) -> None:
        """Completes the files with the provenance record and forces them to the disk."""
        for file in self._files:
            file.complete(record)
        with _explained(self.path):
            for file in self._files:
                os.fsync(file.fd)
            if self._directory:
                for folder, _, _ in os.walk(self._temporary.path):
                    _sync_directory(Path(folder))

    def publish(self) -> None:
        """Gives the complete result its name, for good."""
        with _explained(self.path):
            if self._directory:
                self._publish_directory()
            else:
                self._publish()
        with _explained(self.path, "it is complete, but may not outlast a power failure"):
            _sync_directory(self.path.parent)

    def _publish(self) -> None:
        temporary = self._temporary.path
        if self._overwrite:
            os.replace(temporary, self.path)
            return
        # Unlike a rename, a link never replaces what came to be there in the meantime.
        try:
            os.link(temporary, self.path)
        except FileExistsError:
            raise _exists(self.path, "the output came into being while it was made") from None
        except OSError:  # a file system without hard links
            refuse_output(self.path, directory=False, overwrite=False)
            os.rename(temporary, self.path)

    def _publish_directory(self) -> None:
        temporary = self._temporary.path
        try:  # replaces an empty directory, and no other
            os.rename(temporary, self.path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
        else:
            return
        if not self._overwrite:
            raise _exists(self.path, "the output came into being while it was made")
        if not _exchanged(temporary, self.path):
            self._swap(temporary, self._temporary.aside)

    def _swap(self, temporary: Path, aside: Path) -> None:
        """Replaces a directory in two steps; the next run undoes the first where it stays alone."""
        old = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            lock(old)
            try:
                os.rename(self.path, aside)
                os.rename(temporary, self.path)
            except BaseException:  # Ctrl-C as well must leave the old one in its place; it goes on
                if not os.path.lexists(self.path):
                    os.rename(aside, self.path)
                raise
            remove(aside)
        finally:
            os.close(old)

    def _discard(self) -> None:
        if self._directory:
            for file in self._files:
                file.close()
        self._files.clear()
        self._temporary.remove()
        self._temporary.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._discard()


class OutputFile:
    """One file of the result."""

    def __init__(self, path: Path, fd: int, layout: FileLayout, draft: bytes = b"") -> None:
        self.layout = layout
        self.fd = fd
        self.nbytes = layout.nbytes(draft)
        self.start = layout.start(draft)
        self._path = path  # what messages call it
        self._lock = threading.Lock()
        # By the numbers of slots. There may be very many slots, and each output has its own sums:
        # four bytes are held for each. Slots that nothing is written to are empty, with CRC-32 0.
        self._crcs = array("I", bytes(4 * layout.count)) if layout.checked else array("I")
        self._sums: dict[int, Checksum] = {}  # of slots that are filled in parts
        self._waiting = 0  # bytes; two threads may miscount it a little

    def fill(self, name: str, at: int, data: memoryview) -> None:
        """Writes payload `at` bytes into a slot."""
        slot = self.layout.rooms[name]
        self.write(data, self.start + slot.offset + at)
        if not self.layout.checked:
            return
        crc = zlib_ng.crc32(data)
        if len(data) == slot.nbytes:
            self._crcs[slot.number] = crc
            return
        with self._lock:
            sums = self._sums.setdefault(slot.number, Checksum(slot.nbytes))
        sums.add(at, len(data), crc)

    def write(self, data: memoryview, offset: int) -> None:
        """Writes bytes at an offset of the file."""
        write_fully(self.fd, data, offset, self._path)
        self._waiting += len(data)
        if self._waiting >= _WRITEBACK:
            self._waiting = 0
            start_writeback(self.fd)

    def closing(self, record: bytes) -> Iterable[Literal]:
        """Returns the last literals, made from the record and the checksums of what was written."""
        for number, sums in self._sums.items():
            self._crcs[number] = sums.value()
        return self.layout.closing(record, self._crcs)

    def complete(self, record: bytes) -> None:
        """Writes the last literals."""
        for offset, data in self.closing(record):
            self.write(memoryview(data), offset)

    def close(self) -> None:
        """Closes the file."""
        with contextlib.suppress(OSError):  # what was written has been forced to the disk before
            os.close(self.fd)


def _exchanged(a: Path, b: Path) -> bool:
    """Lets two directories swap their names in one step, where the system can (Linux)."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    return bool(renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), 2) == 0)


@contextlib.contextmanager
def _explained(path: Path, what: str = "cannot be written", more: str = "") -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise failure(error, what, path, more) from None


def _sync_directory(path: Path) -> None:
    """Forces names to the disk, where a directory may be opened and forced at all."""
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
