"""What a checkpoint holds and where: a file's or a directory's layout."""

from __future__ import annotations

import os
from pathlib import Path

from merge_avg.checkpoint import File, Layout
from merge_avg.errors import MergeError
from merge_avg.formats._registry import scan_file
from merge_avg.formats.directory import scan_directory


def scan(path: str | os.PathLike[str]) -> Layout:
    """What a checkpoint holds and where, from its headers and pickles; no payload is read.

    Raises:
        MergeError: it cannot be read, is no checkpoint, or is damaged.
    """
    path = Path(path)
    try:
        if path.is_dir():
            return scan_directory(path)
        stamp = File.of(path)
        layout = scan_file(stamp)
    except OSError as error:
        raise MergeError(error.strerror or str(error), where=path) from None
    except MemoryError:
        what = "reading what it holds takes more memory than this process may have"
        raise MergeError(what, where=path) from None
    assert layout is not None  # noqa: S101 - a strict scan returns or raises
    return layout
