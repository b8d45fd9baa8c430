r"""An inert value, pickled again: what was read of a pickle, perhaps with other entries.

    80 04                               PROTO 4
    ctorch.distributed...\nMetadata\n    a class, by its name: nothing is imported here either
    ) 81                                NEWOBJ: an object that was made without arguments
    } ( X 'size' ... u b                its state, and BUILD
    ctorch\\nSize\n J 4 85 R            a call with arguments
    .                                   STOP

Texts, classes and containers that appear again come from the memo (MEMOIZE, BINGET), so
that the pickle is about as long as the one that was read.

Specification: CPython's Lib/pickletools.py.
"""

from __future__ import annotations

import struct

from merge_avg.formats.pickle.values import (
    Global,
    InertDict,
    Instance,
    PickleError,
    Sized,
    Value,
)

_SIZE = Global("torch", "Size")
_DEEPEST = 100  # containers in each other; metadata of torch has ten


def pickled_again(value: Value) -> bytes:
    """Return a pickle of a value; PickleError where something in it was not kept."""
    writer = _Writer()
    writer.add(value, 0)
    return b"\x80\x04" + b"".join(writer.parts) + b"."


class _Writer:
    def __init__(self) -> None:
        self.parts: list[bytes] = []
        # Texts and classes by what they say; objects by their identity, which `_held` keeps theirs.
        self._memo: dict[object, int] = {}
        self._held: list[Value] = []

    def add(self, value: Value, depth: int) -> None:
        """Write a value."""
        if depth > _DEEPEST:
            raise PickleError("its values are nested too deep to be written again")
        plain = _plain(value)
        if plain is not None:
            self.parts.append(plain)
            return
        key = value if isinstance(value, str | Global) else id(value)
        known = self._memo.get(key)
        if known is not None:
            short = known < 256
            self.parts.append(b"h" + bytes([known]) if short else b"j" + struct.pack("<I", known))
            return
        self._write(value, depth)
        # Only now: what contains itself, which nothing here should, ends at the depth.
        self.parts.append(b"\x94")
        self._memo[key] = len(self._memo)
        self._held.append(value)

    def _write(self, value: Value, depth: int) -> None:
        parts = self.parts
        match value:
            case str():
                raw = value.encode("utf-8", "surrogatepass")
                short = len(raw) < 256
                size = b"\x8c" + bytes([len(raw)]) if short else b"X" + struct.pack("<I", len(raw))
                parts.append(size + raw)
            case Global():
                parts.append(f"c{value.module}\n{value.name}\n".encode())
            case Sized():
                self.add(_SIZE, depth + 1)
                parts += [b"(", *(_plain(one) or b"" for one in value), b"t\x85R"]
            case tuple():
                parts.append(b"(")
                for one in value:
                    self.add(one, depth + 1)
                parts.append(b"t")
            case list():
                self._items(b"](", value, b"e", depth)
            case InertDict(state=None) | dict():
                flat = [part for pair in value.items() for part in pair]
                self._items(b"}(", flat, b"u", depth)
            case Instance():
                self._instance(value, depth)
            case _:
                what = f"a {type(value).__name__} in it is not kept, and cannot be written again"
                raise PickleError(what)

    def _items(self, opening: bytes, items: list[Value], closing: bytes, depth: int) -> None:
        self.parts.append(opening)
        for one in items:
            self.add(one, depth + 1)
        self.parts.append(closing)

    def _instance(self, value: Instance, depth: int) -> None:
        self.add(value.function, depth + 1)
        self.add(value.args, depth + 1)
        # Pickles make an object without arguments by its class's __new__, and set its state; its
        # __init__ may want arguments. What has arguments was called.
        self.parts.append(b"R" if value.args else b"\x81")
        if value.items:
            self._items(b"(", value.items, b"e", depth)
        if value.pairs:
            self._items(b"(", [part for pair in value.pairs for part in pair], b"u", depth)
        if value.state is not None:
            self.add(value.state, depth + 1)
            self.parts.append(b"b")


def _plain(value: Value) -> bytes | None:
    """Return the opcodes of a value without parts, which is not worth a place in the memo."""
    match value:
        case None:
            return b"N"
        case bool():
            return b"\x88" if value else b"\x89"
        case int() if 0 <= value < 256:
            return b"K" + bytes([value])
        case int() if 0 <= value < 1 << 16:
            return b"M" + struct.pack("<H", value)
        case int() if value.bit_length() <= 2000:
            raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            return b"\x8a" + bytes([len(raw)]) + raw
        case float():
            return b"G" + struct.pack(">d", value)
        case bytes():
            return b"B" + struct.pack("<I", len(value)) + value
        case tuple() if not value and not isinstance(value, Sized):
            return b")"
    return None
