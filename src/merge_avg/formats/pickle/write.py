r"""Torch's pickles, written: a copy with other classes of storages, and a new state dict.

    80 02                                 PROTO 2
    ccollections\nOrderedDict\n ) R (     the state dict, and a mark for its entries
    X len 'weight'                        for each tensor: its name
    ctorch._utils\n_rebuild_tensor_v2\n (
      ( X 'storage' ctorch\nFloatStorage\n
      X '0' X 'cpu' J 6 t Q               a storage: its class, key and size
      J 0 ( J 2 J 3 t ( J 3 J 1 t         start, shape and strides
      89 ccollections\nOrderedDict\n ) R  no gradient, no hooks
    t R
    u .                                   set the entries, and STOP

Nothing is put into the memo: that costs a few bytes, and no reader needs it. Dtypes without a class
of storage are views of an UntypedStorage, by _rebuild_tensor_v3.

Specification: CPython's Lib/pickletools.py and torch/_utils.py.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

from merge_avg.checkpoint import Archive, DType, Layout, NewTensor
from merge_avg.errors import MergeError

_ORDERED_DICT = b"ccollections\nOrderedDict\n)R"


def with_classes(layout: Layout, archive: Archive, changed: Mapping[str, DType]) -> bytes:
    """Return a checkpoint's pickle with new dtypes for some storages, by their names.

    Raises:
        MergeError: a storage has no class that says its dtype.
    """
    # Every class is spelled out where it was put on the stack, since a memo entry can serve
    # storages that change and storages that do not.
    # A frame tells the length of what follows, which changes. Readers need no frames: without them
    # they read opcode by opcode.
    edits = [(at, at + 9, b"") for at in archive.frames]
    for span in archive.classes:
        cls = span.cls
        name = f"{archive.prefix}{span.storage}"
        if name in changed:
            storage = changed[name].storage
            if storage is None or cls.endswith("UntypedStorage"):
                what = f"the dtype of record {name!r} cannot be changed in a copy of it"
                hint = "write a bare state dict with --state-dict, or a .safetensors file"
                raise MergeError(what, where=layout.path, hint=hint)
            cls = f"torch\n{storage}"
        edits.append((span.start, span.stop, f"c{cls}\n".encode()))
    parts, at = [], 0
    for start, stop, new in sorted(edits):
        parts += [archive.pickle[at:start], new]
        at = stop
    return b"".join([*parts, archive.pickle[at:]])


def _text(value: str) -> bytes:
    raw = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def _int(value: int) -> bytes:
    # LONG1 holds up to 255 bytes; the shapes, strides and sizes here need at most 9.
    if value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    raw = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def _ints(values: Sequence[int]) -> bytes:
    return b"(" + b"".join(map(_int, values)) + b"t"


def pickled(tensors: Sequence[NewTensor], keys: Mapping[str, str]) -> bytes:
    """Return a state dict as torch.save pickles it; `keys` are those of its storages, by name."""
    parts = [b"\x80\x02", _ORDERED_DICT, b"("]
    for tensor in tensors:
        size, typed = tensor.storage_nbytes, tensor.dtype.storage is not None
        cls = f"ctorch\n{tensor.dtype.storage}\n" if typed else "ctorch.storage\nUntypedStorage\n"
        count = size // tensor.dtype.itemsize if typed else size
        parts += [
            _text(tensor.name),
            f"ctorch._utils\n_rebuild_tensor_v{2 if typed else 3}\n(".encode(),
            b"(" + _text("storage") + cls.encode(),
            _text(keys[tensor.storage]) + _text("cpu") + _int(count) + b"tQ",
            _int(tensor.start) + _ints(tensor.shape) + _ints(tensor.stride),
            b"\x89" + _ORDERED_DICT,
            b"" if typed else f"ctorch\n{tensor.dtype.name}\n".encode(),
            b"tR",
        ]
    return b"".join([*parts, b"u."])
