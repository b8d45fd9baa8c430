"""Outputs that several processes make, at the same time or one after the other.

    .OUTPUT.merge-avg-parts/    beside the output, and kept until that has its name
        plan.json               what is made, so that a run that would make something else keeps off
        output                  the output in the making, a file or a directory
        0007.ledger             what is known of part 7 of the work, whose bytes are on the disk
        token                   a random text that ledgers repeat: they are of this output, not of
                                one that was made here before
        complete                which file is to get the output's name, once all is done

Whoever comes first makes the directory under another name and renames it, so that it appears whole.
Files in it are renamed into place too. It is not a temporary: only who has published the output, or
begins anew, removes it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from zlib_ng import zlib_ng

from merge_avg.checkpoint import FileLayout
from merge_avg.errors import MergeError, failure
from merge_avg.io import _platform
from merge_avg.io._output import Output, OutputFile, Place, close_files, exists, make_files
from merge_avg.io._reader import Checksum
from merge_avg.io._temporary import Temporary, beside, remove

_SUFFIX = ".merge-avg-parts"
_PLAN, _OUTPUT, _COMPLETE, _TOKEN = "plan.json", "output", "complete", "token"
_AT_WORK = "at-work-"
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | _platform.FLAGS
_OPEN = os.O_RDWR | _platform.FLAGS


class Site:
    """The directory of an output that several processes make; a `Place` for what becomes it."""

    def __init__(self, output: Path) -> None:
        self.output = Path(os.path.realpath(output)) if output.is_symlink() else output
        stem = self.output.name
        if len(raw := os.fsencode(stem)) > 200:  # a name has at most 255 bytes
            stem = f"{raw[:180].decode('utf-8', 'ignore')}...{zlib.crc32(raw):08x}"
        self.folder = self.output.with_name(f".{stem}{_SUFFIX}")
        self.path = self.folder / _OUTPUT
        self.aside = beside(self.output, old=True)
        self.plan = self.folder / _PLAN
        self.fd = -1
        self._held: dict[Path, int] = {}

    @property
    def there(self) -> bool:
        """Return whether somebody has begun."""
        return self.plan.exists()

    def inode(self) -> int:
        """Return what names the output in the making, and as it is published."""
        place = self.output if self.published else self.path
        with _explained(place):
            return place.lstat().st_ino

    def token(self) -> str:
        """Return the random text by which ledgers know the output in the making."""
        with _explained(self.folder / _TOKEN):
            return _begin_of(self.folder / _TOKEN).decode("ascii", "replace")

    def write(self, name: str, data: bytes) -> None:
        """Write a file that appears whole, and only when it is on the disk."""
        part = self.folder / f"{name}.{secrets.token_hex(4)}.part"
        try:
            with _explained(self.folder / name):
                _write(part, data)
                os.replace(part, self.folder / name)
                _platform.sync_directory(self.folder)
        except BaseException:  # Ctrl-C too must leave nothing behind
            remove(part)
            raise

    def names(self, suffix: str) -> list[str]:
        """Return the names of files in it that end so, in order."""
        with _explained(self.folder):
            return sorted(one.name for one in self.folder.iterdir() if one.name.endswith(suffix))

    def take(self, name: str) -> bool:
        """Lock a file of this name until `close`; return False where another process has it."""
        path = self.folder / name
        with _explained(path):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | _platform.FLAGS, 0o666)
        if _platform.lock(fd) is False:
            os.close(fd)
            return False
        self._held[path] = fd
        return True

    def enter(self) -> None:
        """Show that a process is at work here, for as long as it lives, or until `close`."""
        self.take(f"{_AT_WORK}{secrets.token_hex(4)}")

    def leave(self) -> None:
        """Show that this process is no more at work here: it writes nothing before it finishes."""
        for path in [path for path in self._held if path.name.startswith(_AT_WORK)]:
            remove(path)
            os.close(self._held.pop(path))

    def busy(self) -> bool:
        """Return whether another process is at work here."""
        with contextlib.closing(Site(self.output)) as other:
            return any(not other.take(path.name) for path in self.folder.glob(f"{_AT_WORK}*"))

    def begin_anew(self) -> None:
        """Remove what earlier runs left; MergeError where one is at work still."""
        if not os.path.lexists(self.folder):
            return
        with contextlib.closing(Site(self.output)) as other:
            if other.busy():
                hint = "wait for it; or, if it makes parts of the same merge, use --resume"
                what = "another run is at work on it"
                raise MergeError(what, where=self.output, hint=hint)
        self.remove()

    def remove(self) -> None:
        """Remove it in one step, as others see it."""
        gone = beside(self.output)
        try:
            os.rename(self.folder, gone)
        except OSError:  # of Windows, where something in it is open
            gone = self.folder
        remove(gone)  # from here on another may begin at the old place

    def make(self, files: Mapping[str, FileLayout], draft: bytes, plan: bytes) -> None:
        """Make it, unless another process does so first."""
        with contextlib.closing(Temporary(self.output, directory=True)) as room:
            inner = _Inner(room.path / _OUTPUT, directory=set(files) != {"."})
            try:
                made = make_files(inner, self.output, files, draft)
                try:
                    for file in made:
                        _platform.sync(file.fd)
                finally:
                    close_files(made if inner.fd < 0 else ())
            finally:
                inner.close()
            _write(room.path / _TOKEN, secrets.token_hex(16).encode())
            _write(room.path / _PLAN, plan)
            for folder, _, _ in os.walk(room.path):
                _platform.sync_directory(Path(folder))
            room.release()
            try:
                os.rename(room.path, self.folder)
            except OSError:
                if not self.there:
                    raise
            _platform.sync_directory(self.folder.parent)

    @property
    def published(self) -> bool:
        """Return whether the output has its name, and all that is left is to remove this."""
        try:
            inode = int(_begin_of(self.folder / _COMPLETE))
        except (OSError, ValueError):
            return False
        with contextlib.suppress(OSError):
            return self.output.lstat().st_ino == inode
        return False

    def complete(self) -> None:
        """Note which file is about to get the output's name."""
        self.write(_COMPLETE, str(self.inode()).encode())

    def release(self) -> None:
        """Close the output where what is open gets no other name."""
        if _platform.WINDOWS:
            self._close()

    def close(self) -> None:
        """Give back the locks, and what was opened; all stays for others."""
        self._close()
        for path, fd in self._held.items():
            if path.name.startswith(_AT_WORK):
                remove(path)
            os.close(fd)
        self._held.clear()

    def _close(self) -> None:
        if self.fd >= 0:
            with contextlib.suppress(OSError):
                os.close(self.fd)
            self.fd = -1


class _Inner:
    """The place of an output within a directory that does not have its name yet."""

    def __init__(self, path: Path, *, directory: bool) -> None:
        self.path = self.aside = path
        self.fd = -1
        if directory:
            path.mkdir()
        else:
            self.fd = os.open(path, _NEW, 0o666)

    def release(self) -> None:
        """Close nothing: it is closed before anything is renamed."""

    def close(self) -> None:
        """Close the file."""
        if self.fd >= 0:
            os.close(self.fd)


class SharedOutput(Output):
    """An output that several processes make. What was made stays until the output has its name.

    `plan` tells what is made, for those who come later.
    """

    def __init__(
        self,
        path: Path,
        files: Mapping[str, FileLayout],
        draft: bytes,
        plan: bytes,
        *,
        overwrite: bool,
    ) -> None:
        self.site = Site(path)
        self._plan = plan
        self.files: list[SharedFile] = []
        super().__init__(path, files, draft, overwrite=overwrite)

    def _begin(
        self, files: Mapping[str, FileLayout], draft: bytes
    ) -> tuple[Place, Sequence[OutputFile]]:
        site = self.site
        with _explained(self.path):
            if not site.there:
                try:
                    site.make(files, draft, self._plan)
                except MergeError:
                    if not site.there:  # or another process has made it, and there is room for one
                        raise
            try:
                site.enter()
                # What has been published may be a file that others have now: hands off.
                for relative, layout in () if site.published else files.items():
                    fd = os.open(site.path / ("" if relative == "." else relative), _OPEN)
                    if not self._directory:
                        site.fd = fd
                    self.files.append(SharedFile(self.path, fd, layout, draft))
            except BaseException as error:  # Ctrl-C too must give the locks back
                close_files(self.files if self._directory else ())
                site.close()
                if isinstance(error, MergeError | OSError) and not site.there:
                    # Another process has finished it just now.
                    raise exists(self.path, "the output exists already") from None
                raise
        return site, self.files

    def write(self, number: int, name: str, at: int, data: memoryview) -> None:
        """Write payload, unless the output has its name already."""
        if self.files:
            super().write(number, name, at, data)

    def sync(self) -> None:
        """Force what was written to the disk."""
        with _explained(self.path):
            for file in self.files:
                _platform.sync(file.fd)

    def complete(self, record: bytes) -> None:
        """Complete the files, and note that the output only lacks its name."""
        if self.files:
            super().complete(record)
            self.site.complete()

    def publish(self) -> None:
        """Give the complete output its name, if it has another."""
        if self.files:
            super().publish()


class SharedFile(OutputFile):
    """A file of it, whose checksums come from several processes."""

    def fill(self, name: str, at: int, data: memoryview) -> None:
        """Write payload into a slot, and keep its checksum to be taken."""
        slot = self.layout.rooms[name]
        self.write(data, self.start + slot.offset + at)
        if self.layout.checked:
            self._sum(slot.number, slot.nbytes).add(at, len(data), zlib_ng.crc32(data))

    def take(self) -> list[tuple[int, ...]]:
        """Return the number of each slot with start, stop and CRC-32 of its parts; forget them."""
        taken: list[tuple[int, ...]] = [
            (n, *part) for n, sums in self._sums.items() for part in sums.parts()
        ]
        self._sums.clear()
        return taken

    def put(self, number: int, start: int, stop: int, crc: int) -> None:
        """Add a checksum that was taken; ValueError where it cannot be of this file."""
        size = self._sizes.get(number, 0)
        if not self.layout.checked or not 0 <= start < stop <= size or not 0 <= crc < 1 << 32:
            raise ValueError("a part that no record has")
        self._sum(number, size).add(start, stop - start, crc)

    def lacks(self) -> str | None:
        """Return the name of a slot of which no process told the checksum, if there is one."""
        for name, slot in self.layout.rooms.items() if self.layout.checked else ():
            sums = self._sums.get(slot.number)
            if slot.nbytes and (sums is None or sums.missing()):
                return name
        return None

    @property
    def _sizes(self) -> dict[int, int]:
        if not hasattr(self, "_known"):
            self._known = {one.number: one.nbytes for one in self.layout.rooms.values()}
        return self._known

    def _sum(self, number: int, nbytes: int) -> Checksum:
        with self._lock:
            return self._sums.setdefault(number, Checksum(nbytes))


def _begin_of(path: Path) -> bytes:
    fd = os.open(path, os.O_RDONLY | _platform.FLAGS)
    try:
        return os.read(fd, 40)
    finally:
        os.close(fd)


def _write(path: Path, data: bytes) -> None:
    fd = os.open(path, _NEW, 0o666)
    try:
        _platform.write_all(fd, memoryview(data), 0)
        _platform.sync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise failure(error, "cannot be written", path) from None
