"""What is said of a merge? A report as typed values, and one module for each way to show it.

describe(job, result, choice)       the report of a merge that ran, or of a planned one
as_json(report)                     the same as plain values, for --json
text, terminal, markdown, html      the same for readers
inspect                             the contents of a checkpoint
printable, sizes                    text and numbers of bytes as they may be shown
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from merge_avg.report._describe import describe
    from merge_avg.report._report import Report, as_json

__all__ = ["Report", "as_json", "describe"]

# Imported when they are first asked for: the command's help needs `printable`, and so this package,
# but no report.
_HOMES = {"Report": "_report", "as_json": "_report", "describe": "_describe"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
