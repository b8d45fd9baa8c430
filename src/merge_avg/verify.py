"""Deriving an output from its inputs once more, and comparing it bit for bit."""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from merge_avg._version import __version__
from merge_avg.checkpoint import File, FileLayout, Layout, dotted
from merge_avg.engine import run
from merge_avg.errors import MergeError, failure
from merge_avg.formats import scan
from merge_avg.io import OutputFile, read_fully
from merge_avg.plan import FILE, Hashes, Job, OutputSpec, Record, prepare, read_record

_BLOCK = 1 << 20


@dataclass(frozen=True)
class Verification:
    """What was found to be the mean of what.

    Attributes:
        output: what was verified.
        inputs: its inputs, as they were found.
        nbytes: how many bytes of the output were compared: all of them.
        hashed: whether the inputs' hashes were recorded, and compared too.
    """

    output: Path
    inputs: tuple[Path, ...]
    nbytes: int
    hashed: bool


def verify_output(
    output: str | os.PathLike[str],
    inputs: str | os.PathLike[str] | None = None,
    threads: int | None = None,
    max_memory: int | None = None,
) -> Verification:
    """Makes sure that an output is what merging its inputs gives.

    Args:
        output: what a merge wrote.
        inputs: the directory from which its inputs are named; by default where the output is, or
            the current directory.
        threads: as for a merge.
        max_memory: as for a merge, in bytes.

    Raises:
        MergeError: the output does not say what it was made of, an input is missing or has changed,
            or bytes of the output differ; the message says which.
    """
    path = Path(output)
    layout = scan(path)
    record = read_record(layout)
    folder = _folder(record, path, inputs)
    for one in record.all:
        place = folder / one.name
        size = _size(place)
        if size != one.nbytes:
            what = f"it has {size:,} bytes, and had {one.nbytes:,} when {path} was made of it"
            raise MergeError(what, where=place, hint="find the checkpoint as it was then")
    options = replace(
        record.options,
        weights=[one.weight for one in record.inputs],
        template=folder / record.template.name,
        threads=threads,
        max_memory=max_memory,
    )
    paths = [folder / one.name for one in record.inputs]
    job = prepare(paths, path, options, made_by=record.version)
    _refuse_others(layout, job)
    compared: list[_Compared] = []

    @contextlib.contextmanager
    def opened(output: OutputSpec) -> Iterator[_Compared]:
        draft = job.record(output)
        with contextlib.closing(_Compared(path, job.layout.files, draft)) as one:
            compared.append(one)
            yield one

    result = run(job, opened=opened)
    if result.hashes is not None:
        _refuse_changed(job, result.hashes, record, folder, path)
    differences = compared[0].differences
    if differences:
        raise _different(layout, differences, record.version)
    return Verification(path, tuple(paths), compared[0].nbytes, record.options.hashes)


def _there(path: Path) -> bool:
    return os.path.exists(path)  # noqa: PTH110 - for which a name too long is no error


def _folder(record: Record, output: Path, given: str | os.PathLike[str] | None) -> Path:
    """The directory that all inputs are in."""
    folders = [Path(given)] if given is not None else [output.parent, Path()]
    wanted = {one.name: one.nbytes for one in record.all}
    for folder in folders:
        if all(_there(folder / name) for name in wanted):
            return folder
    best = min(folders, key=lambda folder: sum(not _there(folder / name) for name in wanted))
    lost = next(name for name in wanted if not _there(best / name))
    hint = "name the directory that the inputs are in: --inputs DIR"
    known = {output, *(best / name for name in wanted)}
    for path in sorted(best.iterdir()) if best.is_dir() else ():
        if path not in known and path.is_file() and path.stat().st_size == wanted[lost]:
            hint = f"{path} has the same size: was it renamed?"
            break
    raise MergeError(f"its input {lost} is not in {best}", where=output, hint=hint)


def _size(place: Path) -> int:
    """The size of a checkpoint; that of a file is known without looking into it."""
    if place.is_dir():
        return scan(place).nbytes
    try:
        return File.of(place).nbytes
    except OSError as error:
        raise failure(error, where=place) from None


def _refuse_others(layout: Layout, job: Job) -> None:
    """Raises MergeError for a file in an output that its inputs do not give."""
    for file in layout.files if layout.members else ():
        if file.path.relative_to(layout.path).as_posix() not in job.layout.files:
            what = "its inputs give no such file"
            raise MergeError(what, where=file.path, hint="remove it if it is yours")


def _refuse_changed(job: Job, hashes: Hashes, record: Record, folder: Path, output: Path) -> None:
    """Raises MergeError for an input that is not what it was."""
    numbers = {layout.path: k for k, layout in enumerate(job.layouts)}
    found = [hashes.read[numbers[folder / one.name]] for one in record.inputs]
    for one, digest in zip(record.all, [*found, hashes.kept], strict=True):
        if one.hash not in (None, digest):
            what = (
                "what it has beside its weights is not what"
                if one is record.template
                else ("its weights are not those that")
            )
            raise MergeError(
                f"{what} {output} was made of (their hash differs)",
                where=folder / one.name,
                hint="find the checkpoint as it was then",
            )


@dataclass(frozen=True)
class _Difference:
    """Bytes of an output that differ: in which file and slot, from where on, and how many."""

    file: str
    slot: str | None
    offset: int
    count: int


def _different(layout: Layout, differences: Sequence[_Difference], version: str) -> MergeError:
    first = min(differences, key=lambda one: (one.file, one.offset))
    total = sum(one.count for one in differences)
    where = "its header or what lies between the records"
    if first.slot is not None:
        names = [
            repr(dotted(info.path))
            for info in layout.tensors
            if info.storage.name.rpartition("/")[2] == first.slot.rpartition("/")[2]
        ]
        where = f"tensor {names[0]}" if names else f"record {first.slot!r}"
    path = layout.path if first.file == FILE else layout.path / first.file
    what = f"{total:,} bytes are not what its inputs give, the first at {first.offset:,} in {where}"
    hint = "merge again, or fetch the file again"
    if version != __version__:
        hint = f"merge-avg {version} made it, and this is {__version__}: {hint}"
    return MergeError(what, where=path, hint=hint)


class _Compared:
    """An output that exists: what would be written is compared with it."""

    def __init__(self, path: Path, files: Mapping[str, FileLayout], draft: bytes) -> None:
        self.folder = Path(tempfile.gettempdir())
        self._opened = contextlib.ExitStack()
        self._files: list[_ComparedFile] = []
        for relative, layout in files.items():
            place = path if relative == FILE else path / relative
            try:
                file = self._opened.enter_context(place.open("rb"))
            except OSError as error:
                self._opened.close()
                what = f"cannot be opened ({error.strerror})"
                raise MergeError(what, where=place) from None
            self._files.append(_ComparedFile(place, file.fileno(), layout, draft, relative))

    @property
    def nbytes(self) -> int:
        """Return how many bytes are compared."""
        return sum(file.nbytes for file in self._files)

    @property
    def differences(self) -> list[_Difference]:
        """Return what differs."""
        return [one for file in self._files for one in file.differences]

    def write(self, number: int, name: str, at: int, data: memoryview) -> None:
        """Compare payload."""
        self._files[number].fill(name, at, data)

    def complete(self, record: bytes) -> None:
        """Compare all the rest."""
        for file in self._files:
            file.complete(record)

    def publish(self) -> None:
        """Do nothing: the output has its name."""

    def close(self) -> None:
        """Close the files."""
        self._opened.close()


def _gaps(spans: Iterable[tuple[int, int]], end: int) -> Iterator[tuple[int, int]]:
    """Yield what lies between spans from start to stop, up to an end."""
    at = 0
    for start, stop in sorted(spans):
        if start > at:
            yield at, start
        at = max(at, stop)
    if at < end:
        yield at, end


class _ComparedFile(OutputFile):
    """One file of it."""

    def __init__(
        self, path: Path, fd: int, layout: FileLayout, draft: bytes, relative: str
    ) -> None:
        super().__init__(path, fd, layout, draft)
        self._relative = relative
        self._where = path
        self._guard = threading.Lock()
        self._size = os.fstat(fd).st_size
        self._spans = {
            name: (self.start + slot.offset, self.start + slot.offset + slot.nbytes)
            for name, slot in layout.rooms.items()
        }
        self.differences: list[_Difference] = []

    def write(self, data: memoryview, offset: int) -> None:
        """Compare bytes."""
        there = memoryview(bytearray(max(min(len(data), self._size - offset), 0)))
        if there:
            read_fully(self.fd, there, offset, self._where)
        if there == data:
            return
        first, count = len(there), len(data) - len(there)
        differs = int.from_bytes(data[: len(there)], "little") ^ int.from_bytes(there, "little")
        if differs:
            first = ((differs & -differs).bit_length() - 1) // 8
            count += len(there) - differs.to_bytes(len(there), "little").count(0)
        spans = self._spans.items()
        slot = next((name for name, (a, b) in spans if a <= offset < b), None)
        with self._guard:
            self.differences.append(_Difference(self._relative, slot, offset + first, count))

    def complete(self, record: bytes) -> None:
        """Compare all that is not payload: headers, padding, and the file's end."""
        spans = list(self._spans.values())
        for offset, data in (*self.layout.opening(), *self.closing(record)):
            self.write(memoryview(data), offset)
            spans.append((offset, offset + len(data)))
        for start, stop in _gaps(spans, self.nbytes):
            for at in range(start, stop, _BLOCK):
                self.write(memoryview(bytes(min(_BLOCK, stop - at))), at)
        if self._size > self.nbytes:
            extra = self._size - self.nbytes
            self.differences.append(_Difference(self._relative, None, self.nbytes, extra))
