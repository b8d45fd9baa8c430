"""Text from files and their names, made safe to show."""

from __future__ import annotations

import re

# GitHub's runner takes "::" at the start of a line, and "##[" anywhere, for commands to it.
_COMMAND = re.compile(r"^( *):(?=:)|#(?=#\[)")


def printable(text: str) -> str:
    """Return a line in which everything that would steer a terminal or a CI runner is escaped."""
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return _COMMAND.sub(lambda found: found[0][:-1] + f"\\x{ord(found[0][-1]):02x}", shown)
