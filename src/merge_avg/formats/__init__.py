"""How is a checkpoint stored? Readers and writers for each file format, and for directories.

A format is a module with

    scan(file, stamp, number) -> Layout                         reads headers, never the payload
    copy(layout, converted, averaged, recorded=) -> FileLayout  a copy with slots for the weights
    create(tensors, metadata, recorded=) -> FileLayout          a new state dict; not every format

or, where one file tells of all others in its directory, with `scan_set(folder, files)` instead of
`scan`, and `rewrite(template, number, asked)`, which makes a `NewSet`. A module is imported when
the first file of its format is met.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge_avg.checkpoint import DType, File, FileLayout, Layout, NewTensor
from merge_avg.errors import MergeError

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # the first number that a legacy checkpoint pickles
_HEAD = 512
_LARGEST_HEADER = 100_000_000  # the limit of safetensors itself


@dataclass(frozen=True)
class Format:
    """A row of the table."""

    name: str  # what reports call it
    module: str  # in `merge_avg.formats`
    # Tells a file of the format by its first bytes; None for a set of files.
    begins: Callable[[bytes], bool] | None = None
    marker: str | None = None  # the name of the file that tells of the others in a set
    suffixes: tuple[str, ...] = ()  # endings that ask for the format where a new file is written
    views: bool = False  # whether tensors of a new file may share storages and have any strides

    @property
    def code(self) -> Any:
        """Return the module, imported now if it was not before."""
        return importlib.import_module(f"merge_avg.formats.{self.module}")

    def create(
        self, tensors: Sequence[NewTensor], metadata: Mapping[str, str], *, recorded: bool
    ) -> FileLayout:
        """Return the layout of a new file; see the format's module."""
        made: FileLayout = self.code.create(tensors, metadata, recorded=recorded)
        return made


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of a chunk's elements that is a chunk of its own in a new set."""

    file: str
    slot: str
    corner: tuple[int, ...]  # in the chunk
    shape: tuple[int, ...]
    start: int  # its first element in the chunk


@dataclass(frozen=True)
class NewSet:
    """The files of a set that is written anew."""

    files: Mapping[str, FileLayout]  # by name in its folder
    # Of each chunk that is not dropped, by the number of its file and the name of its storage.
    pieces: Mapping[tuple[int, str], Sequence[Piece]]
    callables: tuple[tuple[int, str], ...]  # as those of a layout, of the objects that are left


@dataclass(frozen=True)
class Asked:
    """The contents of a set that is written anew; chunks are known by their storages' names."""

    averaged: Mapping[int, set[str]]  # by the number of the template's file
    converted: Mapping[int, Mapping[str, DType]]
    dropped: Collection[tuple[int, str]] = ()  # chunks that are left out
    lean: bool = False  # whether objects of training state are left out as well
    limit: int | None = None  # bytes of a file; None for the template's files


def _is_legacy(head: bytes) -> bool:
    return head[:1] == b"\x80" and LEGACY_MAGIC.to_bytes(10, "little") in head[:40]


def _is_safetensors(head: bytes) -> bool:
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _LARGEST_HEADER


_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
# What a file is follows from its first bytes, never from its name.
FORMATS = (
    Format("torch-zip", "zip", lambda h: h[:4] == b"PK\x03\x04", suffixes=_SUFFIXES, views=True),
    Format("torch-legacy", "legacy", _is_legacy),
    Format("safetensors", "safetensors", _is_safetensors, suffixes=(".safetensors",)),
    Format("torch-dcp", "distributed", marker=".metadata"),
)


def format_for(suffix: str) -> Format | None:
    """Return the format that the ending of a new file's name asks for, if it asks for one."""
    return next((one for one in FORMATS if suffix.lower() in one.suffixes), None)


def set_format(name: str) -> Format | None:
    """Return the format of the set that a file of this name tells of, if it does."""
    return next((one for one in FORMATS if name == one.marker), None)


def scan(path: str | os.PathLike[str]) -> Layout:
    """Return what a checkpoint holds and where, from its headers and pickles.

    No payload is read.

    Raises:
        MergeError: the checkpoint cannot be read, is not a checkpoint, or is damaged.
    """
    path = Path(path)
    try:
        if path.is_dir():
            from merge_avg.formats.directory import scan_directory

            return scan_directory(path)
        layout = scan_file(File.of(path))
    except OSError as error:
        raise MergeError(error.strerror or str(error), where=path) from None
    except MemoryError:
        what = "reading what it holds takes more memory than this process may have"
        raise MergeError(what, where=path) from None
    assert layout is not None  # noqa: S101 - a strict scan returns or raises
    if layout.archive is not None:
        from merge_avg.formats.refused import refuse_alone

        refuse_alone(layout)
    return layout


def scan_file(stamp: File, number: int = 0, *, strict: bool = True) -> Layout | None:
    """Return the layout of a file; `number` is its place among the files of its checkpoint.

    Where it is not `strict`, None stands for a file that no format claims.

    Raises:
        MergeError: the file cannot be read, is not a checkpoint, or is damaged.
    """
    try:
        with stamp.path.open("rb") as file:
            head = file.read(_HEAD)
            file.seek(0)
            for one in FORMATS:
                if one.begins is not None and one.begins(head):
                    layout: Layout = one.code.scan(file, stamp, number)
                    return layout
    except OSError as error:
        raise MergeError(error.strerror or str(error), where=stamp.path) from None
    from merge_avg.formats import refused

    if strict or refused.is_placeholder(head):
        refused.refuse(stamp.path, head, stamp.nbytes)
    return None


def copy(
    layout: Layout, converted: Mapping[str, DType], averaged: set[str], *, recorded: bool = True
) -> FileLayout:
    """Return the layout of a copy of a file whose averaged storages, by name, are to be filled.

    Some are `converted` to another dtype. A copy that is `recorded` holds the provenance, where the
    format has room for it.

    Raises:
        MergeError: the format cannot hold the result.
    """
    code = next(one.code for one in FORMATS if one.name == layout.format)
    made: FileLayout = code.copy(layout, converted, averaged, recorded=recorded)
    return made


def check(layout: Layout) -> None:
    """Ask the safetensors library whether it reads the same in each safetensors file of a layout.

    Raises:
        MergeError: the library refuses a file, or reads other tensors or metadata in it.
    """
    for one in layout.members or (layout,):
        if one is not None and one.format == "safetensors":
            from merge_avg.formats import safetensors

            safetensors.check(one)
