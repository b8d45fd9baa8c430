"""What is a checkpoint? Names, dtypes and the places of bytes, once a file has been scanned.

Nothing here opens a file or imports torch.
"""

from __future__ import annotations

from merge_avg.checkpoint._dtypes import (
    BY_NAME,
    BY_SAFETENSORS,
    BY_STORAGE,
    CONVERTIBLE,
    TEMPLATE,
    DType,
)
from merge_avg.checkpoint._file_layout import FileLayout, Literal, NewTensor, RecordFile, Slot
from merge_avg.checkpoint._layout import (
    ATTRIBUTES,
    LARGEST_PROVENANCE,
    PROVENANCE,
    PROVENANCE_FILE,
    Archive,
    ClassSpan,
    File,
    Layout,
    Scalar,
    Storage,
    TensorInfo,
    TreePath,
    dotted,
    impossible,
    row_major,
)
from merge_avg.checkpoint._roles import Name, Roles, assign, is_kept

__all__ = [
    "ATTRIBUTES",
    "BY_NAME",
    "BY_SAFETENSORS",
    "BY_STORAGE",
    "CONVERTIBLE",
    "LARGEST_PROVENANCE",
    "PROVENANCE",
    "PROVENANCE_FILE",
    "TEMPLATE",
    "Archive",
    "ClassSpan",
    "DType",
    "File",
    "FileLayout",
    "Layout",
    "Literal",
    "Name",
    "NewTensor",
    "RecordFile",
    "Roles",
    "Scalar",
    "Slot",
    "Storage",
    "TensorInfo",
    "TreePath",
    "assign",
    "dotted",
    "impossible",
    "is_kept",
    "row_major",
]
