"""The formats of files, as data: what tells them apart, and the module that reads and writes each.

A format is a module with

    scan(file, stamp, number) -> Layout                         reads headers, never the payload
    copy(layout, converted, averaged, recorded=) -> FileLayout  a copy with slots for the weights
    create(tensors, metadata, recorded=) -> FileLayout          a new state dict; not every format

or, where one file tells of all others in its directory, with `scan_set(folder, files)` instead of
`scan`. A module is imported when the first file of its format is met.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merge_avg.checkpoint import DType, File, FileLayout, Layout, NewTensor
from merge_avg.errors import MergeError

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # the first number that a legacy checkpoint pickles
_HEAD = 512
_LARGEST_HEADER = 100_000_000  # the limit of safetensors itself


@dataclass(frozen=True)
class Format:
    """A row of the table.

    Attributes:
        name: what reports call it.
        module: the name of its module in `merge_avg.formats`.
        begins: tells a file of the format by its first bytes; None for a set of files.
        marker: the name of the file that tells of the others in a set.
        suffixes: endings that ask for the format where a new file is written.
        views: whether tensors of a new file may share storages and have any strides.
    """

    name: str
    module: str
    begins: Callable[[bytes], bool] | None = None
    marker: str | None = None
    suffixes: tuple[str, ...] = ()
    views: bool = False

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


def _is_zip(head: bytes) -> bool:
    return head.startswith(b"PK\x03\x04")


def _is_legacy(head: bytes) -> bool:
    return head[:1] == b"\x80" and LEGACY_MAGIC.to_bytes(10, "little") in head[:40]


def _is_safetensors(head: bytes) -> bool:
    length = int.from_bytes(head[:8], "little")
    return len(head) > 8 and head[8:9] == b"{" and length <= _LARGEST_HEADER


# What a file is follows from its first bytes, never from its name.
FORMATS = (
    Format("torch-zip", "zip", _is_zip, suffixes=(".pt", ".pth", ".bin", ".ckpt"), views=True),
    Format("torch-legacy", "legacy", _is_legacy),
    Format("safetensors", "safetensors", _is_safetensors, suffixes=(".safetensors",)),
    Format("torch-dcp", "distributed", marker=".metadata"),
)
_BY_NAME = {one.name: one for one in FORMATS}
_BY_SUFFIX = {suffix: one for one in FORMATS for suffix in one.suffixes}
_BY_MARKER = {one.marker: one for one in FORMATS if one.marker}


def format_of(head: bytes) -> Format | None:
    """Return the format of a file that begins so, if there is one."""
    return next((one for one in FORMATS if one.begins is not None and one.begins(head)), None)


def format_for(suffix: str) -> Format | None:
    """Return the format that the ending of a new file's name asks for, if it asks for one."""
    return _BY_SUFFIX.get(suffix.lower())


def set_format(name: str) -> Format | None:
    """Return the format of the set that a file of this name tells of, if it does."""
    return _BY_MARKER.get(name)


def scan_file(stamp: File, number: int = 0, *, strict: bool = True) -> Layout | None:
    """Return the layout of a file; `number` is its place among the files of its checkpoint.

    Args:
        stamp: the file.
        number: of the file in its checkpoint.
        strict: whether a file that no format claims is an error; else None stands for it.

    Raises:
        MergeError: the file cannot be read, is not a checkpoint, or is damaged.
    """
    try:
        with stamp.path.open("rb") as file:
            head = file.read(_HEAD)
            file.seek(0)
            found = format_of(head)
            if found is not None:
                layout: Layout = found.code.scan(file, stamp, number)
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
    """Return the layout of a copy of a file whose averaged storages are to be filled.

    Args:
        layout: the file.
        converted: the dtypes of storages that get another one, by name.
        averaged: the names of the storages that hold weights.
        recorded: whether the copy holds the provenance, where the format has room for it.

    Raises:
        MergeError: the format cannot hold the result.
    """
    code = _BY_NAME[layout.format].code
    made: FileLayout = code.copy(layout, converted, averaged, recorded=recorded)
    return made
