"""Values that are shown in a few lines, in a console as in a notebook, however much they hold."""

from __future__ import annotations

import html
from collections.abc import Iterator

_LONGEST = 400  # of a line: names in checkpoints come from strangers
_MOST = 12  # lines


class Brief:
    """A value whose `repr` is a headline and a few labelled facts."""

    def brief(self) -> Iterator[tuple[str, str]]:
        """Yield labels and texts; the first label is the headline's, which stands before it."""
        raise NotImplementedError

    def __repr__(self) -> str:
        (label, headline), *facts = self._rows()
        return "\n".join([f"{label}: {headline}", *(f"  {name}: {text}" for name, text in facts)])

    def _repr_html_(self) -> str:
        rows = [tuple(map(html.escape, row)) for row in self._rows()]
        cells = "".join(f"<tr><th>{name}</th><td>{text}</td></tr>" for name, text in rows)
        return f"<table>{cells}</table>"

    def _rows(self) -> list[tuple[str, str]]:
        rows = [(label, _line(text)) for label, text in self.brief()]
        more = [("more", f"{len(rows) - _MOST:,} lines")] if len(rows) > _MOST else []
        return [*rows[:_MOST], *more]


def _line(text: str) -> str:
    """Return a text without what would steer a terminal, and shortened in the middle."""
    safe = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    half = _LONGEST // 2
    return safe if len(safe) <= _LONGEST else f"{safe[:half]} ... {safe[-half:]}"
