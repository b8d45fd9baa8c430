"""Reading checkpoints: one module a format, each with a function scan(path, file, size) -> Layout.

What a file is follows from its first bytes, never from its name.
"""

from __future__ import annotations

import os
from pathlib import Path

from merge_avg.errors import MergeError
from merge_avg.formats import safetensors, torch_zip
from merge_avg.formats.strangers import refuse
from merge_avg.layout import Layout


def scan(path: str | os.PathLike[str]) -> Layout:
    """What a checkpoint holds and where, from its header or its pickle; no payload is read.

    Raises:
        MergeError: it cannot be read, is no checkpoint, or is damaged.
    """
    path = Path(path)
    if path.is_dir():
        hint = "pass the checkpoint files inside it"
        raise MergeError("a directory, not a checkpoint file", where=path, hint=hint)
    try:
        with path.open("rb") as file:
            nbytes = os.fstat(file.fileno()).st_size
            head = file.read(512)
            file.seek(0)
            if head.startswith(torch_zip.MAGIC):
                return torch_zip.scan(path, file, nbytes)
            if safetensors.looks_like(head):
                return safetensors.scan(path, file, nbytes)
            refuse(path, head, nbytes)
    except OSError as error:
        raise MergeError(error.strerror or str(error), where=path) from None
