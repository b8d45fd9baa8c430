"""safetensors files: a JSON header with byte ranges, then the bytes.

Format: https://github.com/huggingface/safetensors (README, "Format").
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from merge_avg.checkpoint import (
    BY_SAFETENSORS,
    PROVENANCE,
    DType,
    File,
    FileLayout,
    Layout,
    Literal,
    NewTensor,
    Slot,
    Storage,
    TensorInfo,
    impossible,
    row_major,
)
from merge_avg.errors import MergeError
from merge_avg.formats import bounded_json as json_text


def scan(file: BinaryIO, stamp: File, number: int = 0) -> Layout:
    """The layout of a safetensors file; `number` is that of the file in the checkpoint.

    Raises:
        MergeError: the header is damaged, or the ranges leave holes, overlap or end elsewhere.
    """
    path, nbytes = stamp.path, stamp.nbytes
    length = int.from_bytes(file.read(8), "little")
    base = 8 + length
    if base > nbytes:
        raise _cut_short(path, base, nbytes)
    header = _header(path, file.read(length))
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise MergeError("the header's __metadata__ is no table of texts", where=path)
    tensors = [_tensor(path, name, entry, base, number) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.storage.offset, tensor.storage.nbytes))
    end = base
    for tensor in tensors:
        if tensor.storage.offset != end:
            where = "a hole before" if tensor.storage.offset > end else "an overlap at"
            raise MergeError(f"there is {where} tensor {tensor.storage.name!r}", where=path)
        end += tensor.storage.nbytes
    if end > nbytes:
        raise _cut_short(path, end, nbytes)
    if end < nbytes:
        raise MergeError(f"{nbytes - end:,} bytes follow after the last tensor", where=path)
    return Layout(path, "safetensors", (stamp,), tuple(tensors), metadata=tuple(metadata.items()))


def _cut_short(path: Path, expected: int, found: int) -> MergeError:
    what = f"it is cut short: {found:,} bytes, expected {expected:,}"
    return MergeError(what, where=path, hint="fetch or save the file again")


def _header(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        header = json_text.table(raw)
    except ValueError as error:
        raise MergeError(f"the safetensors header is damaged ({error})", where=path) from None
    return header


def _tensor(path: Path, name: str, entry: Any, base: int, number: int) -> TensorInfo:
    match entry:
        case {"dtype": str() as code, "shape": list() as shape, "data_offsets": [a, b]} if (
            type(a) is type(b) is int
        ):
            pass
        case _:
            raise MergeError(f"tensor {name!r} is described in an unknown way", where=path)
    dtype = BY_SAFETENSORS.get(code)
    if dtype is None:
        raise MergeError(f"tensor {name!r} is of the unknown dtype {code!r}", where=path)
    if impossible(shape, shape, 0, b - a) or not 0 <= a <= b < 1 << 63:
        raise MergeError(f"tensor {name!r} has an impossible shape or range", where=path)
    size = math.prod(shape) * dtype.itemsize
    if dtype.name.startswith("float4"):
        size = math.prod(shape) // 2
    if b - a != size:
        found = f"{b - a:,} bytes, expected {size:,} for its shape and dtype"
        raise MergeError(f"tensor {name!r} has {found}", where=path)
    trouble = f"a tensor of {dtype.name} codes" if dtype.kind == "code" else None
    storage = Storage(name, base + a, size, file=number)
    extents = tuple(shape)
    return TensorInfo((name,), dtype, extents, row_major(extents), 0, storage, trouble)


@dataclass(frozen=True)
class SafetensorsLayout(FileLayout):
    """The layout of a safetensors file, whose header holds the provenance among its metadata.

    Attributes:
        metadata: the header up to the end of its metadata.
        tensors: the rest of the header.
        recorded: whether the provenance is part of the metadata.
    """

    metadata: bytes = b""
    tensors: bytes = b""
    recorded: bool = True

    def start(self, record: bytes) -> int:
        """Return the offset of the first tensor, which the length of the record decides."""
        return len(self._head(record))

    def nbytes(self, record: bytes) -> int:
        """Return the size of the file with a record."""
        return self.size + self.start(record)

    def closing(self, record: bytes, checksums: Sequence[int]) -> Iterator[Literal]:  # noqa: ARG002
        """Yield the header."""
        yield 0, self._head(record)

    def _head(self, record: bytes) -> bytes:
        provenance = b""
        if self.recorded and record:
            text = json.dumps(record.decode(), ensure_ascii=False)
            provenance = f',"{PROVENANCE}":{text}'.encode()
        header = self.metadata + provenance + self.tensors
        header += b" " * (-len(header) % 8)
        return len(header).to_bytes(8, "little") + header


def create(
    tensors: Sequence[NewTensor], metadata: Mapping[str, str], *, recorded: bool = True
) -> SafetensorsLayout:
    """Return the layout of a safetensors file; its slots have the names of the tensors.

    Args:
        tensors: its entries, in the order of their bytes; each has a storage of its own.
        metadata: texts for `__metadata__`; "format": "pt" is added, as transformers asks for it.
        recorded: whether the metadata holds the provenance.

    Raises:
        MergeError: the format has no code for a dtype.
    """
    return _layout([(one.name, one.dtype, one.shape) for one in tensors], metadata, recorded)


def copy(
    layout: Layout, converted: Mapping[str, DType], averaged: set[str], *, recorded: bool = True
) -> SafetensorsLayout:
    """Return the layout of a copy of a safetensors file whose averaged tensors are to be filled.

    Args:
        layout: the file that is copied.
        converted: the dtypes of tensors that get another one.
        averaged: the names of the tensors that are weights.
        recorded: whether the metadata holds the provenance.
    """
    entries = [
        (info.storage.name, converted.get(info.storage.name, info.dtype), info.shape)
        for info in layout.tensors
    ]
    whole = _layout(entries, dict(layout.metadata), recorded)
    kept = [info.storage for info in layout.tensors if info.storage.name not in averaged]
    slots = {name: slot for name, slot in whole.slots.items() if name in averaged}
    copies = tuple((storage, whole.slots[storage.name]) for storage in kept)
    return replace(whole, slots=slots, copies=copies)


def _layout(
    tensors: Sequence[tuple[str, DType, tuple[int, ...]]],
    metadata: Mapping[str, str],
    recorded: bool,
) -> SafetensorsLayout:
    texts = {key: value for key, value in metadata.items() if key != PROVENANCE}
    header: dict[str, Any] = {}
    slots: dict[str, Slot] = {}
    at = 0
    for number, (name, dtype, shape) in enumerate(tensors):
        if name == "__metadata__":
            raise MergeError("safetensors cannot hold a tensor of the name '__metadata__'")
        if dtype.safetensors is None:
            hint = "write a .pt file, which can"
            raise MergeError(f"safetensors cannot hold {name!r}: {dtype.name}", hint=hint)
        end = at + math.prod(shape) * dtype.itemsize
        slots[name] = Slot(number, at, end - at)
        entry = {"dtype": dtype.safetensors, "shape": list(shape), "data_offsets": [at, end]}
        header[name] = entry
        at = end
    try:
        before, after = _encoded({"__metadata__": {"format": "pt", **texts}}), _encoded(header)
    except UnicodeEncodeError:
        bad = next(name for name in header if name != name.encode("utf-8", "replace").decode())
        raise MergeError(f"safetensors cannot hold the name {bad!a}") from None
    # Both texts are cut where the provenance goes: before the brace that ends the metadata.
    rest = b"}," + after[1:] if header else b"}}"
    return SafetensorsLayout(at, (), slots, metadata=before[:-2], tensors=rest, recorded=recorded)


def _encoded(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
