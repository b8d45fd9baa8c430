"""safetensors files: a JSON header with the ranges of the tensors' bytes, then the bytes.

    offset   bytes
    0        8       length of the header, little-endian
    8        length  {"__metadata__": {"format": "pt", ...},
                      "conv.weight": {"dtype": "F32", "shape": [64, 3], "data_offsets": [0, 768]},
                      ...}   and spaces up to a multiple of 8
    8+length         the data: ranges count from here, and leave no hole

The safetensors library is the reference for what is valid: see `check`.

Specification: https://github.com/huggingface/safetensors (README, "Format").
"""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from types import ModuleType
from typing import Any, BinaryIO
from weakref import WeakValueDictionary

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
from merge_avg.formats import bounded

_METADATA = "__metadata__"
_LARGEST = 1 << 63
_PER_BYTE = 20  # bytes of memory for each byte of a long header: entries of tensors take as many
_INT = frozenset((int,))
_ODD = (b"\\u", b":-", b",-", b"[-", b" -")
_AGAIN = "fetch or save the file again"


def scan(file: BinaryIO, stamp: File, number: int = 0) -> Layout:
    """Return the layout of a safetensors file.

    Raises:
        MergeError: the header is damaged, or the ranges leave holes, overlap or end elsewhere.
    """
    path, nbytes = stamp.path, stamp.nbytes
    length = int.from_bytes(file.read(8), "little")
    try:
        header = _header(file.read(length), number) if 8 + length <= nbytes else None
        end = header.base + header.nbytes if header else 8 + length
        if header is None or end > nbytes:
            what = f"it is cut short: {nbytes:,} bytes, expected {end:,}"
            raise MergeError(what, hint=_AGAIN)
        if end < nbytes:
            raise MergeError(f"{nbytes - end:,} bytes follow after the last tensor")
    except MergeError as error:
        raise error.at(path) from None
    about = path, "safetensors", (replace(stamp, base=header.base),), header.tensors
    layout = Layout(*about, metadata=header.metadata, shared=header)
    # The library imports torch or NumPy to open a file, which takes longer than many a merge. So
    # it is asked where one of them is loaded already, and where readers of JSON disagree.
    if header.odd or any(map(sys.modules.get, ("torch", "numpy"))):
        check(layout)
    return layout


@dataclass(frozen=True)
class _Header:
    """The content of a header: tensors in the order of their bytes."""

    tensors: tuple[TensorInfo, ...]
    metadata: tuple[tuple[str, str], ...]
    base: int  # where the data begins in the file
    nbytes: int  # of the data
    # Whether it has escapes, signs or keys that no usual writer needs: other readers of JSON refuse
    # half a surrogate pair, -0 as a whole number, and NaN.
    odd: bool


# Checkpoints of one run have the same headers to the byte: they are parsed once, and share their
# tensors. By all of their bytes, so that no file can vouch for another.
_HEADERS: WeakValueDictionary[tuple[int, bytes], _Header] = WeakValueDictionary()
# By the number of the file in its checkpoint.
_LAST: WeakValueDictionary[int, _Header] = WeakValueDictionary()


def _header(raw: bytes, number: int) -> _Header:
    known = _HEADERS.get((number, raw))
    if known is None:
        known, last = _parsed(raw, number), _LAST.get(number)
        if last is not None and last.tensors == known.tensors:  # other metadata
            known = replace(known, tensors=last.tensors)
        _HEADERS[number, raw] = _LAST[number] = known
    return known


def _parsed(raw: bytes, number: int) -> _Header:
    try:
        header = bounded.loads(raw, _PER_BYTE)
    except ValueError as error:
        raise MergeError(f"the safetensors header is damaged ({error})") from None
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise MergeError("the header's __metadata__ is not a table of texts")
    end = 0
    tensors = list(_tensors(header, number))
    tensors.sort(key=attrgetter("storage.offset", "storage.nbytes"))
    for tensor in tensors:
        storage = tensor.storage
        if storage.offset != end:
            where = "a hole before" if storage.offset > end else "an overlap at"
            raise MergeError(f"there is {where} tensor {storage.name!r}", tensor=storage.name)
        end += storage.nbytes
    odd = any(mark in raw for mark in _ODD) or any(len(entry) != 3 for entry in header.values())
    return _Header(tuple(tensors), tuple(metadata.items()), 8 + len(raw), end, odd)


def _tensors(header: Mapping[str, Any], number: int) -> Iterator[TensorInfo]:
    """Yield the tensors of a header."""
    # Layers repeat their shapes: the strides and the product are computed once for each, and held.
    shapes: dict[tuple[int, ...], tuple[tuple[int, ...], tuple[int, ...], int]] = {}
    for name, entry in header.items():
        # With match and cases this takes three times as long, for each of many tensors.
        try:
            code, shape = entry["dtype"], entry["shape"]
            start, stop = entry["data_offsets"]
        except (KeyError, TypeError, ValueError):
            code = shape = start = stop = None
        if not (type(code) is str and type(shape) is list and type(start) is type(stop) is int):
            raise MergeError(f"tensor {name!r} is described in an unknown way", tensor=name)
        dtype = BY_SAFETENSORS.get(code)
        if dtype is None:
            raise MergeError(f"tensor {name!r} is of the unknown dtype {code!r}", tensor=name)
        extents = tuple(shape)
        # True and 2.0 are equal to 1 and 2, so that a shape of theirs would be found in the table.
        known = shapes.get(extents) if _INT.issuperset(map(type, extents)) else None
        if known is None:
            if impossible(extents, extents, 0, _LARGEST):
                raise MergeError(f"tensor {name!r} has an impossible shape", tensor=name)
            known = shapes[extents] = extents, row_major(extents), math.prod(extents)
        extents, strides, count = known
        if not 0 <= start <= stop < _LARGEST:
            raise MergeError(f"tensor {name!r} has an impossible range", tensor=name)
        size = _nbytes(dtype, count)
        if stop - start != size:
            expected = f"{size:,}" if size >= 0 else "whole bytes"
            found = f"{stop - start:,} bytes, expected {expected} for its shape and dtype"
            raise MergeError(f"tensor {name!r} has {found}", tensor=name)
        trouble = f"a tensor of {dtype.name} codes" if dtype.kind == "code" else None
        storage = Storage(name, start, size, number)
        yield TensorInfo((name,), dtype, extents, strides, 0, storage, trouble)


def _nbytes(dtype: DType, count: int) -> int:
    """Return the bytes that elements take: F4 has two in each. No whole number of them is -1."""
    if dtype.safetensors != "F4":
        return count * dtype.itemsize
    return -1 if count % 2 else count // 2


def check(layout: Layout) -> None:
    """Compare a scanned file with what the safetensors library reads in its header.

    Two readers that see different tensors in the same bytes are how a file shows one model to a
    scanner and another to a user, so it is refused.

    Raises:
        MergeError: the library refuses the file, or sees other tensors or metadata in it.
    """
    from safetensors import SafetensorError

    path = layout.path
    # The framework is one that the library imports to open the file: the cheapest one.
    numpy, stub = importlib.util.find_spec("numpy"), None
    torch = sys.modules.get("torch") or (not numpy and importlib.util.find_spec("torch"))
    if not torch and not numpy:  # an empty module will do: it is asked for names and shapes only
        stub = sys.modules.setdefault("numpy", ModuleType("numpy"))
    try:
        with _opened(path, "pt" if torch else "numpy") as file:
            # Releases before 0.6 do not tell the order.
            ordered = hasattr(file, "offset_keys")
            names, metadata = (file.offset_keys if ordered else file.keys)(), file.metadata() or {}
            views = [(name, file.get_slice(name)) for name in names]
            theirs = [(name, view.get_dtype(), tuple(view.get_shape())) for name, view in views]
    except (SafetensorError, ImportError) as error:  # the latter of a broken torch or NumPy
        what, hint = f"the safetensors library does not accept it ({error})", _AGAIN
        if any(info.dtype.safetensors in _NEW for info in layout.tensors):
            hint += ", or update the library: pip install -U safetensors"
        raise MergeError(what, where=path, hint=hint) from None
    finally:
        if stub is not None:
            sys.modules.pop("numpy", None)
    ours = [(info.storage.name, info.dtype.safetensors, info.shape) for info in layout.tensors]
    # The order is that of their bytes, in which tensors without any may come in any.
    order = _in_order if ordered else sorted
    if (order(theirs), dict(layout.metadata)) != (order(ours), metadata):
        what = "the safetensors library reads its header in another way"
        raise MergeError(what, where=path, hint=_AGAIN)


def _opened(path: object, framework: str) -> Any:
    """Open a file with the library: without a map ("pread"), which its releases have since 0.8.

    A mapped file kills the process if it is cut short meanwhile.
    """
    from safetensors import safe_open

    try:
        return safe_open(path, framework, backend="pread")
    except TypeError:
        return safe_open(path, framework)


_NEW = "F4 F8_E8M0 C64 F8_E4M3FNUZ F8_E5M2FNUZ".split()  # since 0.6, 0.6, 0.7, 0.8 and 0.8
_Entry = tuple[str, str | None, tuple[int, ...]]


def _in_order(entries: Sequence[_Entry]) -> tuple[list[_Entry], list[_Entry]]:
    """Return entries that have bytes in their order, and the others in the order of names."""
    full = [entry for entry in entries if 0 not in entry[2]]
    return full, sorted(entry for entry in entries if 0 in entry[2])


@dataclass(frozen=True)
class SafetensorsLayout(FileLayout):
    """The layout of a safetensors file, whose header holds the provenance among its metadata."""

    metadata: bytes = b""  # the header up to the end of its metadata
    tensors: bytes = b""  # the rest of the header
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
    """Return the layout of a new safetensors file; its slots have the names of the tensors.

    Each tensor has a storage of its own, and their bytes lie in the order of `tensors`.

    Raises:
        MergeError: the format has no code for a dtype.
    """
    entries = [(one.name, one.dtype, one.shape) for one in tensors]
    return _layout(entries, metadata, recorded=recorded)


def copy(
    layout: Layout, converted: Mapping[str, DType], averaged: set[str], *, recorded: bool = True
) -> SafetensorsLayout:
    """Return the layout of a copy of a safetensors file; see `formats.copy`."""
    entries = [
        (info.storage.name, converted.get(info.storage.name, info.dtype), info.shape)
        for info in layout.tensors
    ]
    whole = _layout(entries, dict(layout.metadata), recorded=recorded)
    slots = {name: slot for name, slot in whole.slots.items() if name in averaged}
    stored = [info.storage for info in layout.tensors if info.storage.name not in averaged]
    copies = tuple((storage, whole.slots[storage.name]) for storage in stored)
    return replace(whole, slots=slots, copies=copies)


def _layout(
    tensors: Sequence[tuple[str, DType, tuple[int, ...]]],
    metadata: Mapping[str, str],
    *,
    recorded: bool,
) -> SafetensorsLayout:
    texts = {key: value for key, value in metadata.items() if key != PROVENANCE}
    header: dict[str, Any] = {}
    slots: dict[str, Slot] = {}
    at = 0
    for number, (name, dtype, shape) in enumerate(tensors):
        if name == _METADATA:
            raise MergeError("safetensors cannot hold a tensor of the name '__metadata__'")
        if dtype.safetensors is None:
            hint = "write a .pt file, which can"
            raise MergeError(f"safetensors cannot hold {name!r}: {dtype.name}", hint=hint)
        end = at + _nbytes(dtype, math.prod(shape))
        slots[name] = Slot(number, at, end - at)
        header[name] = {"dtype": dtype.safetensors, "shape": shape, "data_offsets": [at, end]}
        at = end
    try:
        before, after = _encoded({_METADATA: {"format": "pt", **texts}}), _encoded(header)
    except UnicodeEncodeError:
        bad = next(name for name in header if name != name.encode("utf-8", "replace").decode())
        raise MergeError(f"safetensors cannot hold the name {bad!a}") from None
    # Both texts are cut where the provenance goes: before the brace that ends the metadata.
    rest = b"}," + after[1:] if header else b"}}"
    return SafetensorsLayout(at, (), slots, metadata=before[:-2], tensors=rest, recorded=recorded)


def _encoded(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
