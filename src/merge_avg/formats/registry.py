"""The formats of single files. What a file is follows from its first bytes, never from its name.

A format is a module with `looks_like(head)`, `scan(file, stamp, number) -> Layout` and
`rebuilt(layout, converted, averaged, mark) -> Skeleton`. To add one, add a line to `FORMATS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import BinaryIO

from merge_avg.dtypes import DType
from merge_avg.errors import MergeError
from merge_avg.formats import (
    dcp,
    safetensors,
    strangers,
    torch_legacy,
    torch_zip,
    torch_zip_write,
)
from merge_avg.layout import File, Layout
from merge_avg.skeleton import Skeleton

_HEAD = 512


@dataclass(frozen=True)
class Format:
    """How files of a format are told, read, and written anew with other weights."""

    name: str
    looks_like: Callable[[bytes], bool]
    scan: Callable[[BinaryIO, File, int], Layout]
    rebuilt: Callable[[Layout, Mapping[str, DType], set[str], str], Skeleton]


FORMATS = (
    Format("torch-zip", torch_zip.looks_like, torch_zip.scan, torch_zip_write.rebuilt),
    Format("torch-legacy", torch_legacy.looks_like, torch_legacy.scan, torch_legacy.rebuilt),
    Format("safetensors", safetensors.looks_like, safetensors.scan, safetensors.rebuilt),
)


def scan_file(stamp: File, number: int = 0, *, strict: bool = True) -> Layout | None:
    """The layout of a file; `number` is its place among the files of its checkpoint.

    Args:
        stamp: the file.
        number: of the file in its checkpoint.
        strict: whether a file that no format claims is an error; else None stands for it.

    Raises:
        MergeError: it cannot be read, is no checkpoint, or is damaged.
    """
    try:
        with stamp.path.open("rb") as file:
            head = file.read(_HEAD)
            file.seek(0)
            for one in FORMATS:
                if one.looks_like(head):
                    return one.scan(file, stamp, number)
    except OSError as error:
        raise MergeError(error.strerror or str(error), where=stamp.path) from None
    if strict or strangers.is_placeholder(head):
        strangers.refuse(stamp.path, head, stamp.nbytes)
    return None


def rebuilt(
    layout: Layout, converted: Mapping[str, DType], averaged: set[str], mark: str = ""
) -> Skeleton:
    """The skeleton of a copy of a file whose averaged storages are to be filled.

    Args:
        layout: the file.
        converted: the dtypes of storages that get another one, by name.
        averaged: the names of the storages that hold weights.
        mark: what to say in it about this merge, where the format has room for that.

    Raises:
        MergeError: the format cannot hold the result.
    """
    if layout.format == dcp.NAME:
        return dcp.rebuilt(layout, converted, averaged)
    return next(one for one in FORMATS if one.name == layout.format).rebuilt(
        layout, converted, averaged, mark
    )
