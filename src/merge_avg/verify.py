"""Verification: an output is derived from its inputs once more, and compared bit for bit.

A verification is a merge whose outputs compare what they are given with what is there. So it takes
the same memory, and whatever a merge refuses it refuses too.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from merge_avg._version import __version__
from merge_avg.brief import Brief
from merge_avg.checkpoint import File, FileLayout, Layout, dotted
from merge_avg.engine import run
from merge_avg.errors import MergeError, UsageError, counted, failure
from merge_avg.formats import check, scan
from merge_avg.io import OutputFile, read_fully
from merge_avg.plan import FILE, Hashes, Job, Record, prepare, read_record

_BLOCK = 1 << 20
_AS_IT_WAS = "find the checkpoint as it was then"


@dataclass(frozen=True, repr=False)
class Verification(Brief):
    """An output that is what its inputs give."""

    output: Path  # the file or directory
    inputs: tuple[Path, ...]  # as they were found
    nbytes: int  # of the output; all of them were compared
    hashed: bool  # whether the inputs' hashes were recorded, and compared too

    @property
    def said(self) -> str:
        """Return what was compared."""
        one = len(self.inputs) == 1
        hashes = f"; {'its hash is' if one else 'their hashes are'} as recorded"
        given = f"what its {counted(len(self.inputs), 'input')} give{'s' * one}"
        return f"all {self.nbytes:,} bytes are {given}{hashes * self.hashed}"

    def brief(self) -> Iterator[str]:
        """Yield what was compared, and the inputs."""
        yield f"{self.output}: {self.said}"
        yield from map(str, self.inputs)


def verify_output(
    output: str | os.PathLike[str],
    inputs: str | os.PathLike[str] | None = None,
    threads: int | None = None,
    max_memory: int | None = None,
) -> Verification:
    """Make sure that an output, the file or directory that a merge wrote, is what its inputs give.

    The inputs are named from the directory `inputs`; by default that is where the output is, or the
    current directory. `threads` and `max_memory`, in bytes, are as for a merge.

    Raises:
        MergeError: the output has no provenance record, an input is missing or has changed, or
            bytes of the output differ; the message says which.
    """
    path = Path(output)
    layout = scan(path)
    record = read_record(layout)
    folder = _folder(record, path, inputs)
    for one in {one.name: one for one in record.all}.values():
        place = folder / one.name
        try:  # the size of a file is known without a look into it
            size = (scan(place) if place.is_dir() else File.of(place)).nbytes
        except OSError as error:
            raise failure(error, where=place) from None
        if size != one.nbytes:
            what = f"{size:,} bytes, expected {one.nbytes:,} as when {path} was made of it"
            raise MergeError(what, where=place, hint=_AS_IT_WAS)
    # From here on it is the merge that the record describes, with this machine's resources.
    options = replace(
        record.options,
        weights=[one.weight for one in record.inputs],
        template=folder / record.template.name,
        threads=threads,
        max_memory=max_memory,
    )
    paths = [folder / one.name for one in record.inputs]
    try:
        job = prepare(paths, path, options, made_by=record)
    except UsageError as error:  # the record asks for it, not the user
        what = f"its provenance record cannot be gone by: {error.what}"
        raise MergeError(what, where=path) from None
    # A merge asks the safetensors library only where that costs little.
    for found in (layout, *job.layouts):
        check(found)
    _refuse_others(layout, job)
    with contextlib.ExitStack() as stack:
        compared = _Compared(job, stack)
        result = run(job, opened=lambda _: contextlib.nullcontext(compared))
    # First the inputs: one that changed is why the output differs.
    if result.hashes is not None:
        _refuse_changed(job, result.hashes, record, folder, path)
    differences = [one for file in compared.files for one in file.differences]
    if differences:
        raise _different(layout, differences, record.version)
    nbytes = sum(file.nbytes for file in compared.files)
    return Verification(path, tuple(paths), nbytes, record.options.hashes)


def _folder(record: Record, output: Path, given: str | os.PathLike[str] | None) -> Path:
    """Return the directory that all inputs are in."""
    # Inputs are named from the directory of all, wherever that is by now.
    folders = [Path(given)] if given is not None else [output.parent, Path()]
    wanted = {one.name: one.nbytes for one in record.all}
    there = os.path.exists  # for which, unlike `Path.exists`, a name too long is not an error
    lost = {folder: [n for n in wanted if not there(folder / n)] for folder in folders}
    best = min(folders, key=lambda folder: len(lost[folder]))
    if not lost[best]:
        return best
    name = lost[best][0]
    below = (one for folder in folders for depth in ("*/", "*/*/") for one in folder.glob(depth))
    whole = next((one for one in below if all(there(one / each) for each in wanted)), "DIR")
    hint = f"name the directory that the inputs are in: --inputs {whole}"
    # Of a file that was only renamed the size is a good hint, and costs nothing.
    known = {output, *(best / name for name in wanted)}
    for path in sorted(best.iterdir()) if best.is_dir() else ():
        if path not in known and path.is_file() and path.stat().st_size == wanted[name]:
            hint = f"{path} has the same size: was it renamed?"
            break
    raise MergeError(f"its input {name} is not in {best}", where=output, hint=hint)


def _refuse_others(layout: Layout, job: Job) -> None:
    """Raise MergeError for a file in an output that its inputs do not give."""
    for file in layout.files if layout.members else ():
        if file.path.relative_to(layout.path).as_posix() not in job.layout.files:
            what = "its inputs give no such file"
            raise MergeError(what, where=file.path, hint="remove it if it is yours")


def _refuse_changed(job: Job, hashes: Hashes, record: Record, folder: Path, output: Path) -> None:
    """Raise MergeError for an input that is not the one that the output was made of."""
    # The plan has the template first; the record has the inputs by name.
    numbers = {layout.path: k for k, layout in enumerate(job.layouts)}
    found = [hashes.read[numbers[folder / one.name]] for one in record.inputs]
    for one, digest in zip(record.all, [*found, hashes.kept], strict=True):
        if one.hash not in (None, digest):
            what = "its weights are not those that"
            if one is record.template:
                what = "beside its weights it is not what"
            what += f" {output} was made of (their hash differs)"
            raise MergeError(what, where=folder / one.name, hint=_AS_IT_WAS)


@dataclass(frozen=True)
class _Difference:
    """Bytes of an output that differ: in which file and slot, from where on, and how many."""

    file: Path
    slot: str | None
    offset: int
    count: int


def _different(layout: Layout, differences: Sequence[_Difference], version: str) -> MergeError:
    first = min(differences, key=lambda one: (one.file, one.offset))
    total = sum(one.count for one in differences)
    where, info = "its header or what lies between the records", None
    if first.slot is not None:
        # A slot has the name of a storage in the template, whose archive may be called otherwise.
        wanted = first.slot.rpartition("/")[2]
        found = (
            info
            for info in layout.tensors
            for part in info.storage.ranges
            if part.name.rpartition("/")[2] == wanted and layout.files[part.file].path == first.file
        )
        info = next(found, None)
        where = f"tensor {dotted(info.path)!r}" if info else f"record {first.slot!r}"
    what = f"{total:,} bytes are not what its inputs give, the first at {first.offset:,} in {where}"
    hint = "merge again, or fetch the file again"
    if version != __version__:
        hint = f"merge-avg {version} made it, and this is {__version__}: {hint}"
    tensor = dotted(info.path) if info else None
    return MergeError(what, where=first.file, hint=hint, tensor=tensor)


class _Compared:
    """An output that exists, compared with what would be written; a `Sink`."""

    def __init__(self, job: Job, stack: contextlib.ExitStack) -> None:
        self.files: list[_ComparedFile] = []
        (output,) = job.outputs
        beside = output.path.parent  # where is more room than in many a directory for such files
        self.folder = beside if os.access(beside, os.W_OK) else Path(tempfile.gettempdir())
        draft = job.record(output)
        for relative, layout in job.layout.files.items():
            place = output.path / ("" if relative == FILE else relative)
            try:
                file = stack.enter_context(place.open("rb"))
            except OSError as error:
                raise failure(error, "cannot be opened", place) from None
            self.files.append(_ComparedFile(place, file.fileno(), layout, draft))

    def write(self, number: int, name: str, at: int, data: memoryview) -> None:
        self.files[number].fill(name, at, data)

    def complete(self, record: bytes) -> None:
        for file in self.files:
            file.complete(record)

    def publish(self) -> None:
        """Do nothing: the output has its name."""


class _ComparedFile(OutputFile):
    """A file of it: where an output would write, this one reads and compares."""

    def __init__(self, path: Path, fd: int, layout: FileLayout, draft: bytes) -> None:
        super().__init__(path, fd, layout, draft)
        self._place = path
        self._size = os.fstat(fd).st_size
        self._spans = {
            name: (self.start + slot.offset, self.start + slot.offset + slot.nbytes)
            for name, slot in layout.rooms.items()
        }
        self.differences: list[_Difference] = []

    def write(self, data: memoryview, offset: int) -> None:
        there = memoryview(bytearray(max(min(len(data), self._size - offset), 0)))
        if there:
            read_fully(self.fd, there, offset, self._place)
        if there == data:
            return
        # Bytes that are missing differ. Of the others, large integers find the first, and count
        # them, faster than a loop.
        first, count = len(there), len(data) - len(there)
        differs = int.from_bytes(data[: len(there)], "little") ^ int.from_bytes(there, "little")
        if differs:
            first = ((differs & -differs).bit_length() - 1) // 8
            count += len(there) - differs.to_bytes(len(there), "little").count(0)
        spans = self._spans.items()
        slot = next((name for name, (a, b) in spans if a <= offset < b), None)
        self.differences.append(_Difference(self._place, slot, offset + first, count))

    def complete(self, record: bytes) -> None:
        """Compare all that is not payload: headers, padding, and the file's end."""
        spans = list(self._spans.values())
        for offset, data in (*self.layout.opening(), *self.closing(record)):
            self.write(memoryview(data), offset)
            spans.append((offset, offset + len(data)))
        done = 0
        for start, stop in (*sorted(spans), (self.nbytes, self.nbytes)):
            for at in range(done, start, _BLOCK):
                self.write(memoryview(bytes(min(_BLOCK, start - at))), at)
            done = max(done, stop)
        if self._size > self.nbytes:
            extra = self._size - self.nbytes
            self.differences.append(_Difference(self._place, None, self.nbytes, extra))
