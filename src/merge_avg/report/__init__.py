"""What is said of a merge? A report as typed values, and one module for each way to show it.

values                 the report of a merge that ran, or of a planned one, and its JSON
text, terminal, html   the same for readers; Markdown is in `text`
inspect                the contents of a checkpoint

Here are names, numbers and tables as they may be shown, which the command's help needs too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

# GitHub's runner takes "::" at the start of a line, and "##[" anywhere, for commands to it.
_COMMAND = re.compile(r"^( *):(?=:)|#(?=#\[)")


def printable(text: str) -> str:
    """Return a line in which everything that would steer a terminal or a CI runner is escaped."""
    safe = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return _COMMAND.sub(lambda found: found[0][:-1] + f"\\x{ord(found[0][-1]):02x}", safe)


def shown(nbytes: float) -> str:
    """Return a number of bytes in decimal units, as disks and rich count them: 1.4 GB."""
    # Gigabytes are the last unit: people compare checkpoints in them, up to thousands.
    for unit in ("bytes", "kB", "MB", "GB"):
        if nbytes < 1000 or unit == "GB":
            break
        nbytes /= 1000
    return f"{nbytes:,.0f} {unit}" if unit == "bytes" else f"{nbytes:,.1f} {unit}"


def aligned(rows: Sequence[Sequence[str]], gap: str = " ", widest: int = 100) -> Iterator[str]:
    """Yield rows of equal length as lines with aligned cells; empty columns are left out.

    Cells are padded to `widest` characters at most: one long name would widen every line.
    """
    widths = [min(max(map(len, column)), widest) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True) if width)
        yield gap.join(cells).rstrip()
