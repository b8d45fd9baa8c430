"""What is said of a merge? A report as typed values, and one module for each way to show it.

describe(job, result, choice)       the report of a merge that ran, or of a planned one
as_json(report)                     the same as plain values, for --json
text, terminal, html                the same for readers; Markdown is in `text`
inspect                             the contents of a checkpoint
printable                           names, numbers and tables as they may be shown
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from merge_avg.report._report import Report, as_json, describe

__all__ = ["Report", "as_json", "describe"]


def __getattr__(name: str) -> Any:
    # Imported when first asked for: the command's help needs `printable`, and so this package, but
    # no report.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from merge_avg.report import _report

    return getattr(_report, name)
