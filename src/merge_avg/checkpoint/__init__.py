"""What is a checkpoint? Names, dtypes and the places of bytes: what a scan of a file yields.

A `Layout` lists the tensors of a checkpoint, and where each one's bytes lie. From it follow the
`Roles` of tensors: which are weights, and which are kept. A `FileLayout` tells the same of a file
that is to be written. Nothing here opens a file or imports torch.
"""

from __future__ import annotations

from merge_avg.checkpoint._composite import Access, Composed, Composite
from merge_avg.checkpoint._derived import low_rank, parts_note, refuse_quantised, unit_or_mask
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
    LARGEST_PROVENANCE,
    NO_CHECKSUMS,
    PROVENANCE,
    PROVENANCE_FILE,
    Archive,
    BytesAt,
    Checksums,
    ClassSpan,
    File,
    Key,
    Layout,
    Scalar,
    Shard,
    Storage,
    TensorInfo,
    TreePath,
    dotted,
    impossible,
    is_matrix,
    row_major,
)
from merge_avg.checkpoint._metrics import direction, is_metric, turned, words
from merge_avg.checkpoint._reasons import ATTRIBUTES, MASTERS, kind_of
from merge_avg.checkpoint._roles import UNASKED, Kept, Name, Roles, assign

__all__ = [
    "ATTRIBUTES",
    "BY_NAME",
    "BY_SAFETENSORS",
    "BY_STORAGE",
    "CONVERTIBLE",
    "LARGEST_PROVENANCE",
    "MASTERS",
    "NO_CHECKSUMS",
    "PROVENANCE",
    "PROVENANCE_FILE",
    "TEMPLATE",
    "UNASKED",
    "Access",
    "Archive",
    "BytesAt",
    "Checksums",
    "ClassSpan",
    "Composed",
    "Composite",
    "DType",
    "File",
    "FileLayout",
    "Kept",
    "Key",
    "Layout",
    "Literal",
    "Name",
    "NewTensor",
    "RecordFile",
    "Roles",
    "Scalar",
    "Shard",
    "Slot",
    "Storage",
    "TensorInfo",
    "TreePath",
    "assign",
    "direction",
    "dotted",
    "impossible",
    "is_matrix",
    "is_metric",
    "kind_of",
    "low_rank",
    "parts_note",
    "refuse_quantised",
    "row_major",
    "turned",
    "unit_or_mask",
    "words",
]
