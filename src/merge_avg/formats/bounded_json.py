"""JSON from files that nobody vouches for, within bounds of memory.

    {"a": [1, {"b": 2}], "c": "text"}
    ^     ^ ^  ^      ^                 each of { [ , : can make a value of many bytes, so that
                                        counting them bounds the memory before anything is made

Specification: RFC 8259. Names in an object must differ: where they do not, programs disagree on
which one counts.
"""

from __future__ import annotations

import json
from typing import Any

_LARGEST = 180_000_000  # bytes that the values of any text may take
_PER_BYTE = 20  # bytes that a longer text of ASCII may take for each of its own
# Bytes that each of these characters can make at most: a dict, a list, and another value.
_COSTS = {b"{": 350, b"[": 100, b",": 70, b":": 70}


def loads(raw: bytes) -> dict[str, Any]:
    """Return the object that a text in UTF-8 holds.

    Raises:
        ValueError: the text holds none, names a key twice, or would take far more memory than its
            own size.
    """
    costs = sum(raw.count(mark) * nbytes for mark, nbytes in _COSTS.items())
    # Where a single character is outside of Latin-1, all others take two or four bytes, and each
    # text exists twice: in the whole, and as a value.
    plain = raw.isascii()
    costs += (2 if plain else 8) * len(raw)
    if costs > max(_LARGEST, _PER_BYTE * len(raw) if plain else 0):
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
