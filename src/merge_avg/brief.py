"""Values that are shown in a few lines, in a console as in a notebook, however much they hold."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

_HALF, _MOST = 200, 16  # of a line, and lines


class Brief(ABC):
    """A value whose `repr` is a headline and a few facts."""

    @abstractmethod
    def brief(self) -> Iterator[str]:
        """Yield lines; names in them may hold controls."""

    def __repr__(self) -> str:
        lines = [*self.brief()]
        lines[_MOST:] = [f"... {len(lines) - _MOST:,} more"] * (len(lines) > _MOST)
        for i, line in enumerate(lines):
            safe = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
            lines[i] = safe if len(safe) <= 2 * _HALF else f"{safe[:_HALF]} ... {safe[-_HALF:]}"
        return f"{type(self).__name__}: " + "\n  ".join(lines)

    def _repr_html_(self) -> str:
        import html  # which is of use in notebooks only

        # Else a long warning would leave the page, and nbconvert show it in another font.
        style = "font-family: monospace; white-space: pre-wrap"
        return f'<pre style="{style}">{html.escape(repr(self))}</pre>'
