"""Writing an output: temporary files beside it, and one rename when all are complete.

    reserve the space   write at offsets, any order   close the layouts   fsync   rename   fsync

The rename is the only step that others can see, so a path holds what was there before or the whole
result. Space is claimed first, so that a full disk shows before hours of reading.

It replaces what was there when the output was begun. Where files came or changed since then, seen
before the rename or in what it took away, the output fails and all of them stay in their places.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from array import array
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol, Self

from zlib_ng import zlib_ng

from merge_avg.checkpoint import FileLayout, Literal
from merge_avg.errors import MergeError, WrittenError, failure, named
from merge_avg.io import _platform
from merge_avg.io._reader import Checksum
from merge_avg.io._temporary import Lock, Temporary, remove, sweep

# Bytes after which the disk is told to begin with them: then the last fsync of 1.4 GB takes 0.01 s
# instead of 0.35 s.
_WRITEBACK = 1 << 25


def refuse_output(path: Path, *, directory: bool, overwrite: bool) -> None:
    """Raise MergeError where an output cannot or must not be written."""
    if path.is_dir() and not directory:
        raise MergeError("it is a directory", where=path, hint="give the output a file name")
    if _platform.reserved(path.name):
        raise _reserved(path, path.name)
    if not path.parent.is_dir():
        hint = f"create it first: mkdir {'' if _platform.WINDOWS else '-p '}{path.parent}"
        raise MergeError("the directory of the output does not exist", where=path, hint=hint)
    if not os.path.lexists(path):
        return
    if directory and not path.is_dir():
        raise MergeError("it is a file", where=path, hint="choose another name for the directory")
    if path.exists() and not (path.is_file() or directory):
        raise MergeError("not a regular file", where=path, hint="choose another output")
    if _platform.mounted(path):
        raise MergeError("it is or holds a mount point", where=path, hint="choose another output")
    if not overwrite and (not directory or any(path.iterdir())):
        raise exists(path, "the output exists already")


def refuse_loss(path: Path, files: Container[str]) -> dict[str, tuple[int, ...]]:
    """Return the states of what would be replaced by `files`, or raise MergeError for others."""
    # A file that the output does not have may be the only copy of something.
    found = _states(path)
    lost = [name for name in found if name not in files]
    if lost:
        what = f"it holds {named(lost)}, which would be lost"
        raise MergeError(what, where=path, hint="choose another output, or remove this one")
    if path.resolve() == Path.cwd():
        raise MergeError("it is the current directory", where=path, hint="choose another output")
    return found


def _states(path: Path) -> dict[str, tuple[int, ...]]:
    """Return what changes with a file: for each at a path or below it, by relative name."""
    found: dict[str, tuple[int, ...]] = {}
    pending = [path] if os.path.lexists(path) else []
    while pending:  # unlike `os.walk`, this fails where a directory cannot be read
        one = pending.pop()
        if one.is_dir() and not one.is_symlink():
            pending += one.iterdir()
        else:
            s = one.lstat()
            found[one.relative_to(path).as_posix()] = s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns
    return dict(sorted(found.items()))


def _reserved(path: Path, name: str) -> MergeError:
    what = f"{name!r} is not a file name on Windows"
    return MergeError(what, where=path, hint="choose another name")


def exists(path: Path, what: str) -> MergeError:
    """Return the error for an output that must not be replaced."""
    hint = "choose another output, or replace this one with --overwrite"
    return MergeError(what, where=path, hint=hint)


class Sink(Protocol):
    """Where a mean goes: a new output, or one that exists and is compared with it."""

    folder: Path  # for nameless files of the merge

    def write(self, number: int, name: str, at: int, data: memoryview) -> None:
        """Take payload."""

    def complete(self, record: bytes) -> None:
        """Take the provenance record, after all payload."""

    def publish(self) -> None:
        """Make the result visible."""


class Place(Protocol):
    """A file or directory that becomes an output by a rename."""

    path: Path
    aside: Path  # for what it replaces, where the two cannot be exchanged
    fd: int  # of a file, open to be written

    def release(self) -> None:
        """Close the file where what is open gets no other name."""

    def close(self) -> None:
        """Give up what has not been renamed."""


class Output:
    """An output in the making. Leaving the context without `commit` removes every trace of it.

    The layouts of its files come by relative path; a single one called "." is a file, not a
    directory. `draft` stands for its provenance record, which is as long.
    """

    def __init__(
        self, path: Path, files: Mapping[str, FileLayout], draft: bytes = b"", *, overwrite: bool
    ) -> None:
        self.path = Path(os.path.realpath(path)) if path.is_symlink() else path
        self.folder = self.path.parent
        self._overwrite = overwrite
        self._directory = set(files) != {"."}
        sweep(self.folder)
        with _explained(self.path):
            self._seen = refuse_loss(self.path, files) if overwrite else {}
        self._temporary, self._files = self._begin(files, draft)

    def _begin(
        self, files: Mapping[str, FileLayout], draft: bytes
    ) -> tuple[Place, Sequence[OutputFile]]:
        """Return what becomes the output, and its open files."""
        with _explained(self.path):
            place = Temporary(self.path, directory=self._directory)
        try:
            return place, make_files(place, self.path, files, draft)
        except BaseException:  # Ctrl-C too must leave nothing behind
            place.close()
            raise

    def write(self, number: int, name: str, at: int, data: memoryview) -> None:
        """Write payload `at` bytes into the slot `name` of file `number`, from any thread."""
        self._files[number].fill(name, at, data)

    def commit(self) -> None:
        """Complete the files, force them to the disk and give the output its name."""
        self.complete(b"")
        self.publish()

    def complete(self, record: bytes) -> None:
        """Complete the files with the provenance record and force them to the disk."""
        for file in self._files:
            file.complete(record)
        with _explained(self.path):
            for file in self._files:
                _platform.sync(file.fd)
            if self._directory:
                for folder, _, _ in os.walk(self._temporary.path):
                    _platform.sync_directory(Path(folder))
            if self._overwrite:  # here too, so that of several outputs none gets its name
                self._refuse_changed(self.path)

    def publish(self) -> None:
        """Give the complete output its name, for good."""
        moves = self._directory or _platform.WINDOWS
        if _platform.WINDOWS:
            self._close()
        with _explained(self.path):
            try:
                if _platform.WINDOWS and self._directory:
                    with contextlib.suppress(OSError):  # only an empty one goes
                        self.path.rmdir()
                # Neither takes the place of a file, or of a directory that holds something.
                (os.rename if moves else os.link)(self._temporary.path, self.path)
            except OSError as error:
                taken = error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)
                if taken or (not self._directory and os.path.lexists(self.path)):
                    self._replace()
                elif moves:
                    raise
                else:  # a file system without hard links
                    os.replace(self._temporary.path, self.path)
        try:
            _platform.sync_directory(self.folder)
        except OSError as error:
            what = f"it is complete, but may not outlast a power failure ({error.strerror})"
            raise WrittenError(what, where=self.path) from None

    def _replace(self) -> None:
        """Replace the old output in one step, or two of which the next run undoes a lone first."""
        if not self._overwrite:
            raise exists(self.path, "another output appeared there in the meantime") from None
        temporary, aside = self._temporary.path, self._temporary.aside
        with _held(self.path):
            exchanged = _platform.exchange(temporary, self.path)
            old = temporary if exchanged else aside if self._directory else self.path
            try:
                if old == aside:
                    os.rename(self.path, aside)
                self._refuse_changed(old)
                if not exchanged:
                    (os.rename if self._directory else os.replace)(temporary, self.path)
            except BaseException:  # Ctrl-C too must leave the old one in its place
                back = exchanged and _platform.exchange(temporary, self.path)
                if not back and not os.path.lexists(self.path):
                    os.rename(old, self.path)
                raise
            remove(aside)

    def _refuse_changed(self, place: Path) -> None:
        """Raise MergeError where the old output, now at `place`, is not what it was at first."""
        lost = [name for name, state in _states(place).items() if self._seen.get(name) != state]
        if lost:
            what = "it" if lost == ["."] else named(lost)
            what += " came or changed while the average was made, and would be lost"
            raise MergeError(what, where=self.path, hint="run again, or choose another output")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._discard()

    def _discard(self) -> None:
        self._close()
        self._temporary.close()

    def _close(self) -> None:
        close_files(self._files if self._directory else ())
        self._files = ()
        self._temporary.release()


def _taken(path: Path) -> MergeError:
    return MergeError("another program has locked it", where=path, hint="run again later")


@contextlib.contextmanager
def _held(path: Path) -> Iterator[None]:
    """Keep other runs from replacing an output, and from sweeping it once it has another name."""
    if _platform.WINDOWS:
        with contextlib.closing(Lock.of(path)) as held:
            if held.take() is False:
                raise _taken(path)
            yield
        return
    fd = -1
    with contextlib.suppress(PermissionError):  # those of the same user cannot open it either
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | _platform.FLAGS)
    try:
        if fd >= 0 and _platform.lock(fd) is False:
            raise _taken(path)
        yield
    finally:
        with contextlib.suppress(OSError):  # nothing was written
            os.close(fd)


def make_files(
    place: Place, path: Path, files: Mapping[str, FileLayout], draft: bytes
) -> list[OutputFile]:
    """Make the files of an output, claim their space, and write what is known before the weights.

    If it fails, closing `place` removes them, but those that are open in a directory stay so.
    """
    made: list[OutputFile] = []
    try:
        for relative, layout in files.items():
            fd = place.fd
            if set(files) != {"."}:
                one = place.path / relative
                flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | _platform.FLAGS
                for name in filter(_platform.reserved, Path(relative).parts):
                    raise _reserved(path, name)
                with _explained(path):
                    one.parent.mkdir(parents=True, exist_ok=True)
                    fd = os.open(one, flags, 0o666)
            made.append(OutputFile(path, fd, layout, draft))
        # Claimed now, so that a full disk shows before anything is read.
        nbytes = sum(file.nbytes for file in made)
        with _explained(path, more=f"; {nbytes:,} bytes are needed"):
            for file in made:
                _platform.reserve(file.fd, file.nbytes)
        for file in made:
            for offset, data in file.layout.opening():
                file.write(memoryview(data), offset)
    except BaseException:  # Ctrl-C too must leave no file open
        close_files(made if set(files) != {"."} else ())
        raise
    return made


def close_files(files: Iterable[OutputFile]) -> None:
    """Close files of which all was forced to the disk, or nothing matters."""
    for file in files:
        with contextlib.suppress(OSError):
            os.close(file.fd)


@contextlib.contextmanager
def workplace(output: Path) -> Iterator[Path]:
    """Yield a directory beside an output, which is removed in the end as all temporaries are."""
    sweep(output.parent)
    with _explained(output):
        temporary = Temporary(output, directory=True)
    with contextlib.closing(temporary):
        yield temporary.path


class OutputFile:
    """One file of an output."""

    def __init__(self, path: Path, fd: int, layout: FileLayout, draft: bytes = b"") -> None:
        self.layout = layout
        self.fd = fd
        self.nbytes = layout.nbytes(draft)
        self.start = layout.start(draft)
        self._path = path  # for messages
        self._lock = threading.Lock()
        # By the numbers of slots. There may be very many slots, and each output has its own sums:
        # four bytes are held for each. Slots that nothing is written to are empty, with CRC-32 0.
        self._crcs = array("I", bytes(4 * layout.count)) if layout.checked else array("I")
        self._sums: dict[int, Checksum] = {}  # of slots that are filled in parts
        self._waiting = 0  # bytes; two threads may miscount it a little

    def fill(self, name: str, at: int, data: memoryview) -> None:
        """Write payload `at` bytes into a slot."""
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
        """Write bytes at an offset of the file."""
        _platform.write_fully(self.fd, data, offset, self._path)
        self._waiting += len(data)
        if self._waiting >= _WRITEBACK:
            self._waiting = 0
            _platform.start_writeback(self.fd)

    def closing(self, record: bytes) -> Iterable[Literal]:
        """Return the last literals, made from the record and the checksums of what was written."""
        for number, sums in self._sums.items():
            self._crcs[number] = sums.value()
        return self.layout.closing(record, self._crcs)

    def complete(self, record: bytes) -> None:
        """Write the last literals."""
        for offset, data in self.closing(record):
            self.write(memoryview(data), offset)


@contextlib.contextmanager
def _explained(path: Path, what: str = "cannot be written", more: str = "") -> Iterator[None]:
    try:
        yield
    except OSError as error:
        # Not by way of a variable: a cycle of garbage would keep what is to be removed alive.
        raise _failed(error, what, path, more) from None


def _failed(error: OSError, what: str, path: Path, more: str) -> MergeError:
    found = failure(error, what, path, more)
    # A temporary's name is up to 40 characters longer, and it is a file that is missing then.
    if error.errno == errno.ENOENT and _platform.too_long(path, 40):
        found.hint = "choose a shorter path, or switch on long paths in Windows"
    return found
