"""Files of a distributed checkpoint, read: each chunk is an archive within a file.

    offset  __0_0.distcp
    0       PK 3 4 ... archive/data.pkl, archive/data/0 ...  PK 5 6     a chunk: one bare tensor
    1234    PK 3 4 ... PK 5 6                                           another
    2468    ...                                                         bytes of an object
    ...     gaps may lie between them, and are copied as they are

Where each begins, and how many bytes it has, stands in `.metadata`.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from merge_avg.checkpoint import Archive, File, Layout, Storage, TensorInfo
from merge_avg.errors import MergeError
from merge_avg.formats.distributed.metadata import Chunk, Metadata
from merge_avg.formats.zip import Within
from merge_avg.formats.zip import scan as zip_scan

_NAME, _MARKER = "torch-dcp", ".metadata"
_LARGEST = 1 << 27  # bytes of `.metadata`


class _Section(io.RawIOBase):
    """A range of a file as a file of its own."""

    def __init__(self, file: BinaryIO, offset: int, nbytes: int) -> None:
        self._file, self._offset, self._nbytes, self._at = file, offset, nbytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = max(0, (0, self._at, self._nbytes)[whence] + offset)
        return self._at

    def readinto(self, into: object) -> int:
        view = memoryview(into)  # type: ignore[arg-type]
        self._file.seek(self._offset + self._at)
        data = self._file.read(min(len(view), max(self._nbytes - self._at, 0)))
        view[: len(data)] = data
        self._at += len(data)
        return len(data)


def scan_set(folder: Path, files: Mapping[str, tuple[int, File]]) -> dict[int, Layout]:
    """Return the layouts of the files of one directory, by their numbers.

    Args:
        folder: the directory that holds `.metadata`.
        files: the number and the file of each name in the directory.

    Returns:
        A layout for each file of chunks, and one for `.metadata` that has all the tensors.

    Raises:
        MergeError: something is damaged, missing, or packed in a way that only torch can read.
    """
    number, stamp = files[_MARKER]
    if stamp.nbytes > _LARGEST:
        raise MergeError("it is absurdly large", where=stamp.path)
    try:
        return dict(_layouts(folder, files, number, Metadata(stamp.path.read_bytes())))
    except MergeError as error:
        raise error.at(stamp.path) from None


def _layouts(
    folder: Path, files: Mapping[str, tuple[int, File]], number: int, metadata: Metadata
) -> Iterator[tuple[int, Layout]]:
    """Yield each file's number and layout, that of `.metadata` last."""
    parts: dict[str, list[tuple[Storage, Layout | None]]] = {}
    stored: dict[tuple[str, tuple[int, ...]], TensorInfo] = {}
    for name, chunks in metadata.by_file().items():
        if name not in files:
            hint = "fetch the checkpoint again"
            raise MergeError(f"it lacks the file {name!r}", where=folder, hint=hint)
        parts[name] = list(_chunks(*files[name], chunks, metadata, stored))
    for name, found in parts.items():
        records = tuple((storage.name, storage) for storage, _ in found)
        members = tuple(layout for _, layout in found)
        archive = Archive(records, b"", "", (), ())
        file = files[name][1]
        layout = Layout(
            file.path, _NAME, (file,), (), archive=archive, members=members, set_member=True
        )
        yield files[name][0], layout
    # The tensors belong to the file that tells of them; files of chunks have none of their own.
    tensors = tuple(metadata.tensor(fqn, stored) for fqn in metadata.sizes)
    stamp = files[_MARKER][1]
    yield number, Layout(stamp.path, _NAME, (stamp,), tensors, metadata.others(), set_member=True)


def _chunks(
    number: int,
    stamp: File,
    chunks: Sequence[Chunk],
    metadata: Metadata,
    stored: dict[tuple[str, tuple[int, ...]], TensorInfo],
) -> Iterator[tuple[Storage, Layout | None]]:
    """Yield the chunks of one file in order, and add them to `stored` by name and offset."""
    end = 0
    with stamp.path.open("rb") as file:
        # In the order of their bytes: chunks may not overlap, or a copy could not fill both.
        for chunk in sorted(chunks, key=lambda chunk: chunk.start):
            stop = chunk.start + chunk.nbytes
            if chunk.start < end or stop > stamp.nbytes:
                what = f"the chunk of {chunk.fqn!r} is not where it should be"
                raise MergeError(what, where=stamp.path, hint="fetch or save it again")
            end = stop
            name = f"{chunk.fqn} at {list(chunk.offset or ())}"
            whole = Storage(name, chunk.start, chunk.nbytes, file=number)
            if chunk.offset is None or chunk.fqn not in metadata.sizes:
                yield whole, None
                continue
            # The archive reader sees nothing but the chunk, so that no record reaches outside.
            within = Within(chunk.start, f"{name}: ")
            section = io.BufferedReader(_Section(file, chunk.start, chunk.nbytes))
            layout = zip_scan(section, stamp, number, within)
            if len(layout.tensors) != 1 or layout.tensors[0].path:
                raise MergeError(f"the chunk of {chunk.fqn!r} is not a tensor", where=stamp.path)
            stored[chunk.fqn, chunk.offset] = layout.tensors[0]
            yield whole, layout
