"""The report in GitHub's Markdown, for the summary of a CI job."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from merge_avg.errors import MergeError
from merge_avg.report._facts import averaged_count, columns, facts
from merge_avg.report._report import Report
from merge_avg.report.printable import printable
from merge_avg.report.sizes import counted


def markdown(report: Report) -> str:
    """Return the report of a merge that ran. Names in it stay names."""
    return "\n".join(_lines(report)) + "\n"


def append(path: Path, text: str) -> None:
    """Add text to a file, such as the one that GITHUB_STEP_SUMMARY names.

    Raises:
        MergeError: the file cannot be written.
    """
    # Other steps of the job have written to the same file, so it is added to.
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise MergeError(f"no summary was written ({error.strerror})", where=path) from None


def _lines(report: Report) -> Iterator[str]:
    yield f"### merge-avg: {counted(averaged_count(report), 'checkpoint')} averaged"
    yield ""
    table = [column for column in columns(report) if column.title != "format"]
    yield _row([column.title for column in table])
    yield _row(["---" for _ in table])
    yield from map(_row, zip(*(column.cells for column in table), strict=True))
    yield ""
    if len(report.outputs) == 1:
        yield f"- written: {_text(report.outputs[0].path)}"
    for fact in facts(report):
        label = f"**{fact.label}**" if fact.label == "warning" else fact.label
        yield f"- {label}: {_text(fact.value)}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(_text, cells))} |"


def _text(value: str) -> str:
    """Return text in which nothing means more than itself in Markdown, HTML or a terminal."""
    # On GitHub an "@" would notify somebody, and a "#" link to an issue.
    return "".join(f"&#{ord(c)};" if c in "|`*_<>[]\\&#!~@" else c for c in printable(value))
