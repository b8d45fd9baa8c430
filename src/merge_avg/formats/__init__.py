"""How is a checkpoint stored? Readers and writers for each file format, and for directories.

`scan` reads what a checkpoint holds and where; `copy` and `Format.create` lay out files to be
written. The table of formats is in `_table`.
"""

from __future__ import annotations

import os
from pathlib import Path

from merge_avg.checkpoint import File, Layout
from merge_avg.errors import MergeError
from merge_avg.formats._table import FORMATS, Format, copy, format_for, scan_file
from merge_avg.formats.directory import scan_directory

__all__ = ["FORMATS", "Format", "check", "copy", "format_for", "scan"]


def scan(path: str | os.PathLike[str]) -> Layout:
    """Return what a checkpoint holds and where, from its headers and pickles.

    No payload is read.

    Raises:
        MergeError: the checkpoint cannot be read, is not a checkpoint, or is damaged.
    """
    path = Path(path)
    try:
        if path.is_dir():
            return scan_directory(path)
        layout = scan_file(File.of(path))
    except OSError as error:
        raise MergeError(error.strerror or str(error), where=path) from None
    except MemoryError:
        what = "reading what it holds takes more memory than this process may have"
        raise MergeError(what, where=path) from None
    assert layout is not None  # noqa: S101 - a strict scan returns or raises
    return layout


def check(layout: Layout) -> None:
    """Ask the safetensors library whether it reads the same in each safetensors file of a layout.

    Raises:
        MergeError: the library refuses a file, or reads other tensors or metadata in it.
    """
    for one in layout.members or (layout,):
        if one is not None and one.format == "safetensors":
            from merge_avg.formats import safetensors

            safetensors.check(one)
