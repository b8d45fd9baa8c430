"""Numbers of bytes as people write and read them."""

from __future__ import annotations

import re

from merge_avg.errors import UsageError

_UNITS = {"": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _UNITS |= {_letter: 1024**_power, f"{_letter}IB": 1024**_power, f"{_letter}B": 1000**_power}


def parse(text: str) -> int:
    """The bytes in a text such as 512MiB, 2GB or 1.5G; K, M, G and T alone are powers of 1024.

    Raises:
        UsageError: it is no size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?(?:I?B)?)", text.strip().upper())
    if match is None or (match[2] not in _UNITS and match[2] != "B"):
        hint = "write a number and a unit, such as 512MiB or 2GB"
        raise UsageError(f"{text!r} is not a size", hint=hint)
    return int(float(match[1]) * _UNITS.get(match[2], 1))


def shown(nbytes: float) -> str:
    """A number of bytes in decimal units, as disks and rich count them: 1.4 GB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if nbytes < 1000 or unit == "GB":
            break
        nbytes /= 1000
    return f"{nbytes:,.0f} {unit}" if unit == "bytes" else f"{nbytes:,.1f} {unit}"
