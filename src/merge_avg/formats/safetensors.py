"""safetensors files: a JSON header with byte ranges, then the bytes.

Format: https://github.com/huggingface/safetensors (README, "Format").
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from merge_avg.checkpoint import (
    BY_SAFETENSORS,
    MARK,
    DType,
    File,
    Layout,
    Place,
    Skeleton,
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


def fresh(
    tensors: Sequence[tuple[str, DType, tuple[int, ...]]], metadata: Mapping[str, str]
) -> Skeleton:
    """The skeleton of a safetensors file.

    Args:
        tensors: name, dtype and shape of each, in the order of their bytes.
        metadata: texts for `__metadata__`; "format": "pt" is added, as transformers asks for it.

    Raises:
        MergeError: the format has no code for a dtype.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    places: dict[str, Place] = {}
    at = 0
    for name, dtype, shape in tensors:
        if name == "__metadata__":
            raise MergeError("safetensors cannot hold a tensor of the name '__metadata__'")
        if dtype.safetensors is None:
            hint = "write a .pt file, which can"
            raise MergeError(f"safetensors cannot hold {name!r}: {dtype.name}", hint=hint)
        end = at + math.prod(shape) * dtype.itemsize
        places[name] = Place(at, end - at)
        entry = {"dtype": dtype.safetensors, "shape": list(shape), "data_offsets": [at, end]}
        header[name] = entry
        at = end
    try:
        raw = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:
        bad = next(name for name in header if name != name.encode("utf-8", "replace").decode())
        raise MergeError(f"safetensors cannot hold the name {bad!a}") from None
    raw += b" " * (-len(raw) % 8)
    base = 8 + len(raw)
    moved = {name: Place(base + place.offset, place.nbytes) for name, place in places.items()}
    return Skeleton(base + at, ((0, len(raw).to_bytes(8, "little") + raw),), moved)


def rebuilt(
    layout: Layout, converted: Mapping[str, DType], averaged: set[str], mark: str = ""
) -> Skeleton:
    """The skeleton of a copy of a safetensors file whose averaged tensors are to be filled.

    Args:
        layout: the file that is copied.
        converted: the dtypes of tensors that get another one.
        averaged: the names of the tensors that are weights.
        mark: what to say in the metadata about this merge.
    """
    entries = [
        (info.storage.name, converted.get(info.storage.name, info.dtype), info.shape)
        for info in layout.tensors
    ]
    skeleton = fresh(entries, marked(layout, mark))
    kept = [info.storage for info in layout.tensors if info.storage.name not in averaged]
    places = {name: place for name, place in skeleton.places.items() if name in averaged}
    copies = tuple((storage, skeleton.places[storage.name]) for storage in kept)
    return Skeleton(skeleton.nbytes, skeleton.literals, places, copies)


def marked(layout: Layout, mark: str) -> dict[str, str]:
    """A checkpoint's metadata with another mark, or with none."""
    metadata = {key: value for key, value in layout.metadata if key != MARK}
    return metadata | ({MARK: mark} if mark else {})
