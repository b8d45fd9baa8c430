"""Numbers as they are shown: bytes in decimal units, as disks and rich count them."""

from __future__ import annotations


def shown(nbytes: float) -> str:
    """Return a number of bytes in decimal units: 1.4 GB."""
    # Gigabytes are the last unit: people compare checkpoints in them, up to thousands.
    for unit in ("bytes", "kB", "MB", "GB"):
        if nbytes < 1000 or unit == "GB":
            break
        nbytes /= 1000
    return f"{nbytes:,.0f} {unit}" if unit == "bytes" else f"{nbytes:,.1f} {unit}"


def counted(count: int, noun: str) -> str:
    """Return a number of things: 1 tensor, 2 tensors."""
    return f"{count:,} {noun}{'s' * (count != 1)}"
