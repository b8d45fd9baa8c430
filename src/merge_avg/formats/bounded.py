"""Texts from files that nobody vouches for, within bounds of memory: the only way to read one.

    {"a": [1, {"b": 2}], "c": "text"}
    ^     ^ ^  ^      ^                 each of { [ , : can make a value of many bytes, so that
                                        counting them bounds the memory before anything is made

Specification: RFC 8259. Names in an object must differ: where they do not, programs disagree on
which one counts.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from xxhash import xxh3_128

from merge_avg.errors import MergeError, failure

_BLOCK = 1 << 16
LARGEST = 1 << 25  # bytes: the index of 250,000 tensors is shorter
_LARGEST = 160_000_000  # bytes that the values of any text may take
# Bytes that each of these characters can make at most: a dict, a list, and another value.
_COSTS = {b"{": 350, b"[": 100, b",": 70, b":": 70}


def read(path: Path, largest: int = LARGEST) -> bytes:
    """Return the content of a file; MergeError where it is longer than `largest` bytes."""
    try:
        with path.open("rb") as file:
            # Sparse files need no reading to be refused. Devices and pipes have the size zero.
            small = os.fstat(file.fileno()).st_size <= largest
            raw = file.read(largest + 1) if small else b""
    except OSError as error:
        raise failure(error, "cannot be read", path) from None
    if not small or len(raw) > largest:
        raise MergeError(f"longer than the {largest:,} bytes that such a file may have", where=path)
    return raw


def sketch(path: Path) -> tuple[bytes, int]:
    """Return the first bytes of a file, and a hash of all of it; memory is bounded."""
    try:
        with path.open("rb") as file:
            head = file.read(_BLOCK)
            digest = xxh3_128(head)
            for block in iter(lambda: file.read(_BLOCK), b""):
                digest.update(block)
    except OSError as error:
        raise failure(error, "cannot be read", path) from None
    return head, digest.intdigest()


def loads(raw: bytes, per_byte: int = 0) -> dict[str, Any]:
    """Return the object that a JSON text in UTF-8 holds.

    ValueError where it holds none, names a key twice, or would take too much memory.
    """
    costs = sum(raw.count(mark) * nbytes for mark, nbytes in _COSTS.items())
    # Where a single character is outside of Latin-1, all others take two or four bytes, and each
    # text exists twice: in the whole, and as a value. So may those of escapes.
    plain = raw.isascii() and b"\\u" not in raw
    costs += (2 if plain else 8) * len(raw)
    if costs > max(_LARGEST, per_byte * len(raw) if plain else 0):
        raise ValueError("its values would take more memory than they should")
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if not isinstance(value, dict):
        raise ValueError("it is not an object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key appears twice")
    return found
