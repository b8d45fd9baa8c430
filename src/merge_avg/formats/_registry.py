"""The formats of single files. What a file is follows from its first bytes, never from its name.

A format is a module with `scan(file, stamp, number) -> Layout` and, there or in another,
`rebuilt(layout, converted, averaged, mark) -> Skeleton`. To add one, add what it looks like to
`format_of`, and a line to `_FORMATS`. Modules are imported when the first file of theirs is met.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import BinaryIO, TypeAlias

from merge_avg.checkpoint import DType, File, Layout, Skeleton
from merge_avg.errors import MergeError

DCP = "torch-dcp"  # what the files of a set of torch.distributed.checkpoint are
DCP_METADATA = ".metadata"  # the name of the file that tells of the others

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # the first that a legacy checkpoint pickles

_HEAD = 512
_LARGEST_HEADER = 100_000_000  # the limit of safetensors itself
_ZIP = b"PK\x03\x04"

_Scan: TypeAlias = Callable[[BinaryIO, File, int], Layout]
_Rebuilt: TypeAlias = Callable[[Layout, Mapping[str, DType], set[str], str], Skeleton]


def format_of(head: bytes) -> str | None:
    """What a file that begins so is, or is meant to be."""
    if head.startswith(_ZIP):
        return "torch-zip"
    if head[:1] == b"\x80" and LEGACY_MAGIC.to_bytes(10, "little") in head[:40]:
        return "torch-legacy"
    header = int.from_bytes(head[:8], "little")
    if len(head) > 8 and head[8:9] == b"{" and header <= _LARGEST_HEADER:
        return "safetensors"
    return None


def _torch_zip() -> tuple[_Scan, _Rebuilt]:
    from merge_avg.formats.zip import read as torch_zip
    from merge_avg.formats.zip import write as torch_zip_write

    return torch_zip.scan, torch_zip_write.rebuilt


def _torch_legacy() -> tuple[_Scan, _Rebuilt]:
    from merge_avg.formats import legacy as torch_legacy

    return torch_legacy.scan, torch_legacy.rebuilt


def _safetensors() -> tuple[_Scan, _Rebuilt]:
    from merge_avg.formats import safetensors

    return safetensors.scan, safetensors.rebuilt


_FORMATS = {"torch-zip": _torch_zip, "torch-legacy": _torch_legacy, "safetensors": _safetensors}


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
            name = format_of(head)
            if name is not None:
                scan, _ = _FORMATS[name]()
                return scan(file, stamp, number)
    except OSError as error:
        raise MergeError(error.strerror or str(error), where=stamp.path) from None
    from merge_avg.formats import refused as strangers

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
    if layout.format == DCP:
        from merge_avg.formats import distributed as dcp

        return dcp.rebuilt(layout, converted, averaged)
    _, build = _FORMATS[layout.format]()
    return build(layout, converted, averaged, mark)
