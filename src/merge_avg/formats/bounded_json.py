"""JSON from files that nobody vouches for, within bounds of memory."""

from __future__ import annotations

import json
from typing import Any

_LARGEST = 180_000_000  # bytes that the values of any text may take
_PER_BYTE = 20  # what a longer text of ASCII may take for each of its own bytes
# What each of these characters can make at most: a table, a list, and another value.
_COSTS = {b"{": 350, b"[": 100, b",": 70, b":": 70}


def table(raw: bytes) -> dict[str, Any]:
    """The object, whose keys differ, that a text in UTF-8 holds.

    Raises:
        ValueError: it is no such text, or its values would take much more memory than it.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key appears twice")
        return found

    costs = sum(raw.count(mark) * nbytes for mark, nbytes in _COSTS.items())
    # Where a single character is outside of Latin-1, all others take two or four bytes, and the
    # texts are there twice: in the whole, and as values.
    plain = raw.isascii()
    costs += (2 if plain else 8) * len(raw)
    if costs > max(_LARGEST, _PER_BYTE * len(raw) if plain else 0):
        raise ValueError("its values would take more memory than they should")
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if not isinstance(value, dict):
        raise ValueError("it is no table")
    return value
