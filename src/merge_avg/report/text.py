"""The report as lines: of text, for stderr where it is not a terminal, and of Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from merge_avg.errors import MergeError
from merge_avg.report._facts import columns, facts, headline, weights_of
from merge_avg.report.printable import aligned, counted, printable
from merge_avg.report.values import KNOWN, Report
from merge_avg.selection import Candidate

# Labels that are not the first words of a sentence, as in "kept from a.pt: epoch".
_COLON = ("integers", "left out", "note", "warning")
_BAR = 20
_MOST_BARS = 16
# Cosines that lie nearer together have bars that look alike.
_SPREAD = 0.05


def lines(report: Report) -> Iterator[str]:
    """Yield the report, a line at a time. Names in it may hold controls: see `printable`."""
    yield headline(report)
    # After a merge, candidates that were all taken would only repeat what was named.
    if report.dry_run or len(report.candidates) > len(report.averaged):
        for line in aligned([_candidate(*pair) for pair in report.candidates]):
            yield f"  {line}"
    weights = weights_of(report, 0)
    if len(report.outputs) == 1 and len(set(weights)) > 1:
        yield f"  weights {', '.join(weights)}"
    for fact in facts(report):
        yield f"  {fact.label}{':' * (fact.label in _COLON)} {fact.value}"
        if fact.label == "agreement" and report.agreement is not None:
            yield from _bars(report.averaged, report.agreement.each)


def _candidate(one: Candidate, weight: float | None) -> list[str]:
    known = ((key, getattr(one, key)) for key in KNOWN)
    return [
        "+" if one.chosen else "-",
        str(one.path),
        *("" if value is None else f"{key} {value:.10g}" for key, value in known),
        "" if weight is None else f"weight {weight:.4g}",
        one.why,
    ]


def _bars(paths: Sequence[str], each: Sequence[float | None]) -> Iterator[str]:
    """Yield a line for each checkpoint where there are few and they differ."""
    known = [(path, one) for path, one in zip(paths, each, strict=True) if one is not None]
    means = [mean for _, mean in known]
    if len(known) <= _MOST_BARS and max(means) - min(means) >= _SPREAD:
        rows = [(path, f"{mean:6.3f}", "#" * round(_BAR * max(mean, 0.0))) for path, mean in known]
        for line in aligned(rows):
            yield f"    {line}"


def markdown(report: Report) -> str:
    """Return the report of a merge that ran in GitHub's Markdown. Names in it stay names."""
    table = [column for column in columns(report) if column.title != "format"]
    written = [("written", report.outputs[0].path)] if len(report.outputs) == 1 else []
    told = written + [(fact.label, fact.value) for fact in facts(report)]
    return "\n".join(
        [
            f"### merge-avg: {counted(len(report.averaged), 'checkpoint')} averaged",
            "",
            _row([column.title for column in table]),
            _row(["---" for _ in table]),
            *map(_row, zip(*(column.cells for column in table), strict=True)),
            "",
            *(
                f"- {'**warning**' if label == 'warning' else label}: {_escaped(value)}"
                for label, value in told
            ),
            "",
        ]
    )


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


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(_escaped, cells))} |"


def _escaped(value: str) -> str:
    """Return text in which nothing means more than itself in Markdown, HTML or a terminal."""
    # On GitHub an "@" would notify somebody, and a "#" link to an issue.
    return "".join(f"&#{ord(c)};" if c in "|`*_<>[]\\&#!~@" else c for c in printable(value))
