"""Text that comes from files or their names, as it may be shown."""

from __future__ import annotations


def printable(text: str, *, lines: bool = False) -> str:
    """Text without what would steer a terminal: controls are escaped.

    Args:
        text: of a file, or its name.
        lines: whether line breaks stay.
    """
    return "".join(c if c.isprintable() or (lines and c == "\n") else ascii(c)[1:-1] for c in text)
