"""Deriving an output from its inputs once more, and comparing it bit for bit."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from merge_avg._version import __version__
from merge_avg.checkpoint import MARK, File, Layout, Skeleton, dotted
from merge_avg.engine import run
from merge_avg.errors import MergeError, UsageError, failure
from merge_avg.formats import scan
from merge_avg.io import OutputFile, read_fully
from merge_avg.plan import RECORDED, Average, Hashes, Job, Options, prepare

_BLOCK = 1 << 20
_MOST_INPUTS = 10_000


@dataclass(frozen=True)
class Input:
    """What an output says of one of its inputs; `name` is a path from the directory of all.

    The hash is that of the weights; of the template, as such, that of what else the output has.
    """

    name: str
    nbytes: int
    hash: int | None
    weight: str = "0"


@dataclass(frozen=True)
class Record:
    """What an output says about how it was made, and by which version."""

    inputs: tuple[Input, ...]
    template: Input
    options: Options
    version: str

    @property
    def all(self) -> tuple[Input, ...]:
        """The inputs, and the template."""
        return (*self.inputs, self.template)


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
    options = {
        **{name: getattr(record.options, name) for name in (*RECORDED, "include", "exclude")},
        "weights": [one.weight for one in record.inputs],
        "template": folder / record.template.name,
        "agreement": record.options.agreement,
        "hashes": record.options.hashes,
        "threads": threads,
        "max_memory": max_memory,
    }
    paths = [folder / one.name for one in record.inputs]
    job = prepare(paths, path, Options(**options), made_by=record.version)
    _refuse_others(layout, job)
    compared: list[_Compared] = []

    @contextlib.contextmanager
    def opened(average: Average) -> Iterator[_Compared]:
        with contextlib.closing(_Compared(path, average.draft.files)) as one:
            compared.append(one)
            yield one

    result = run(job, opened=opened)
    if result.hashes is not None:
        _refuse_changed(job, result.hashes, record, folder, path)
    differences = compared[0].differences
    if differences:
        raise _different(layout, differences, record.version)
    return Verification(path, tuple(paths), job.averages[0].draft.nbytes, record.options.hashes)


def read_record(layout: Layout) -> Record:
    """What an output says about how it was made.

    Raises:
        MergeError: it says nothing, or nothing that makes sense.
    """
    text = dict(layout.metadata).get(MARK)
    if text is None:
        what = "it does not say what it was made of"
        hint = (
            "only what merge-avg wrote can be verified, and no file in the format before torch 1.6"
        )
        raise MergeError(what, where=layout.path, hint=hint)
    try:
        record = _record(json.loads(text))
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError, UsageError):
        what = "what it says about how it was made is damaged, or of another version of merge-avg"
        raise MergeError(what, where=layout.path) from None
    return record


def _record(value: Any) -> Record:
    inputs = tuple(
        Input(
            _inside(one["name"]),
            int(one["bytes"]),
            _hash(one["hash"]),
            _text(one["weight"]),
        )
        for one in value["inputs"]
    )
    if not 0 < len(inputs) <= _MOST_INPUTS:
        raise ValueError("it has no inputs, or too many")
    described = value["template"]
    name, nbytes, kept = _inside(described["name"]), int(described["bytes"]), described["hash"]
    template = Input(name, nbytes, _hash(kept))
    options = Options(
        normalize=bool(value["normalize"]),
        dtype=_maybe(value["dtype"]),
        key=_maybe(value["key"]),
        missing=_one_of(value["missing"], ("error", "skip", "available")),
        int_policy=_one_of(value["int_policy"], ("error", "template", "max", "mean")),
        state_dict=bool(value["state_dict"]),
        allow_nonfinite=bool(value["allow_nonfinite"]),
        max_shard_size=None if value["max_shard_size"] is None else int(value["max_shard_size"]),
        include=tuple(map(_text, value["include"])),
        exclude=tuple(map(_text, value["exclude"])),
        agreement=value["agreement"] is not None,
        hashes=template.hash is not None,
    )
    return Record(inputs, template, options, _text(value["merge_avg"]))


def _hash(value: Any) -> int | None:
    return None if value is None else int(_text(value), 16)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("no text")
    return value


def _maybe(value: Any) -> str | None:
    return None if value is None else _text(value)


def _one_of(value: Any, allowed: Sequence[str]) -> Any:
    if value not in allowed:
        raise ValueError("an unknown option")
    return value


def _inside(value: Any) -> str:
    """A path that stays within a directory."""
    path = PurePosixPath(_text(value))
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise ValueError("a path that leads elsewhere")
    return str(path)


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
        if file.path.relative_to(layout.path).as_posix() not in job.draft.files:
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
    """Bytes of an output that differ: in which file and place, from where on, and how many."""

    file: str
    place: str | None
    offset: int
    count: int


def _different(layout: Layout, differences: Sequence[_Difference], version: str) -> MergeError:
    first = min(differences, key=lambda one: (one.file, one.offset))
    total = sum(one.count for one in differences)
    where = "its header or what lies between the records"
    if first.place is not None:
        names = [
            repr(dotted(info.path))
            for info in layout.tensors
            if info.storage.name.rpartition("/")[2] == first.place.rpartition("/")[2]
        ]
        where = f"tensor {names[0]}" if names else f"record {first.place!r}"
    path = layout.path if first.file == "." else layout.path / first.file
    what = f"{total:,} bytes are not what its inputs give, the first at {first.offset:,} in {where}"
    hint = "merge again, or fetch the file again"
    if version != __version__:
        hint = f"merge-avg {version} made it, and this is {__version__}: {hint}"
    return MergeError(what, where=path, hint=hint)


class _Compared:
    """An output that is there already: what would be written is compared with it."""

    def __init__(self, path: Path, files: Mapping[str, Skeleton]) -> None:
        self.folder = Path(tempfile.gettempdir())
        self._opened = contextlib.ExitStack()
        self._files: list[_ComparedFile] = []
        for relative, skeleton in files.items():
            place = path if relative == "." else path / relative
            try:
                file = self._opened.enter_context(place.open("rb"))
            except OSError as error:
                self._opened.close()
                what = f"cannot be opened ({error.strerror})"
                raise MergeError(what, where=place) from None
            self._files.append(_ComparedFile(place, file.fileno(), skeleton, relative))

    @property
    def differences(self) -> list[_Difference]:
        """What differs."""
        return [one for file in self._files for one in file.differences]

    def write(self, number: int, name: str, at: int, data: memoryview) -> None:
        """Compares payload."""
        self._files[number].fill(name, at, data)

    def complete(self, files: Mapping[str, Skeleton] | None = None) -> None:
        """Compares all the rest."""
        for file, skeleton in zip(self._files, (files or {}).values(), strict=True):
            file.finish(skeleton)

    def publish(self) -> None:
        """Has nothing to do."""

    def close(self) -> None:
        """Closes the files."""
        self._opened.close()


def _gaps(spans: Iterable[tuple[int, int]], end: int) -> Iterator[tuple[int, int]]:
    """What lies between spans from start to stop, up to an end."""
    at = 0
    for start, stop in sorted(spans):
        if start > at:
            yield at, start
        at = max(at, stop)
    if at < end:
        yield at, end


class _ComparedFile(OutputFile):
    """One file of it."""

    def __init__(self, path: Path, fd: int, skeleton: Skeleton, relative: str) -> None:
        super().__init__(path, fd, skeleton)
        self._relative = relative
        self._where = path
        self._guard = threading.Lock()
        self._size = os.fstat(fd).st_size
        self.differences: list[_Difference] = []

    def write(self, data: memoryview, offset: int) -> None:
        """Compares bytes."""
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
        place = self._place(offset)
        with self._guard:
            self.differences.append(_Difference(self._relative, place, offset + first, count))

    def _place(self, offset: int) -> str | None:
        return next(
            (
                name
                for name, place in self._places.items()
                if place.offset <= offset < place.offset + place.nbytes
            ),
            None,
        )

    def finish(self, skeleton: Skeleton) -> None:
        """Compares what is not payload: headers, padding, and the file's end."""
        self.skeleton = skeleton
        literals = [*skeleton.literals, *self.closing()]
        spans = [(place.offset, place.offset + place.nbytes) for place in self._places.values()]
        for offset, data in literals:
            self.write(memoryview(data), offset)
            spans.append((offset, offset + len(data)))
        for start, stop in _gaps(spans, skeleton.nbytes):
            for at in range(start, stop, _BLOCK):
                self.write(memoryview(bytes(min(_BLOCK, stop - at))), at)
        if self._size > skeleton.nbytes:
            extra = self._size - skeleton.nbytes
            self.differences.append(_Difference(self._relative, None, skeleton.nbytes, extra))
