"""A nameless file for tensors and results that lie in another geometry for a while.

It is mapped, so that a copy of any size takes no memory of its own. The checkpoints themselves are
never mapped: they might shrink under the mapping.
"""

from __future__ import annotations

import mmap
import tempfile
from pathlib import Path

from merge_avg.errors import MergeError
from merge_avg.io._platform import read_fully, reserve


class Scratch:
    """A file without a name on the disk of `directory`, gone when it is closed."""

    def __init__(self, directory: Path) -> None:
        self._path = directory
        self._file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115 - closed by close()
        self._size = 0

    def read(self, into: memoryview, offset: int) -> None:
        """Fill `into` from `offset` on."""
        read_fully(self._file.fileno(), into, offset, self._path)

    def close(self) -> None:
        """Give the space back."""
        self._file.close()

    def map(self, offset: int, nbytes: int) -> mmap.mmap:
        """Return mapped bytes of the file, which grows; `offset` is a multiple of 64 KiB."""
        if offset + nbytes > self._size:
            # A write to a mapped hole kills the process (SIGBUS) when the disk is full.
            try:
                reserve(self._file.fileno(), offset + nbytes - self._size, self._size)
            except OSError as error:
                what = f"no room for strided copies ({error.strerror})"
                hint = f"{offset + nbytes:,} bytes are needed there for a while"
                raise MergeError(what, where=self._path, hint=hint) from None
            self._size = offset + nbytes
        return mmap.mmap(self._file.fileno(), nbytes, offset=offset)
