"""The report as lines of text, for stderr where it is not a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from merge_avg.report._facts import Fact, aligned, averaged_count, facts, headline, weights_of
from merge_avg.report._report import KNOWN, Figures, Report, ReportedCandidate

# Labels that are not the first words of a sentence, as in "kept from a.pt: epoch".
_COLON = ("integers", "left out", "note", "warning")
_BAR = 20
_MOST_BARS = 16
# Cosines that lie nearer together have bars that look alike.
_SPREAD = 0.05


def lines(report: Report) -> Iterator[str]:
    """Yield the report, a line at a time. Names in it may hold controls: see `printable`."""
    yield headline(report)
    count = averaged_count(report)
    # After a merge, candidates that were all taken would only repeat what was named.
    if report.candidates and (report.dry_run or len(report.candidates) > count):
        for line in aligned([_candidate(one) for one in report.candidates]):
            yield f"  {line}"
    weights = weights_of(report, 0)
    if len(report.outputs) == 1 and len(set(weights)) > 1:
        yield f"  weights {', '.join(weights)}"
    for fact in facts(report):
        yield _line(fact)
        if fact.label == "agreement" and report.agreement is not None:
            yield from _bars(report.agreement)


def _line(fact: Fact) -> str:
    colon = ":" * (fact.label in _COLON)
    return f"  {fact.label}{colon} {fact.value}"


def _candidate(one: ReportedCandidate) -> list[str]:
    known = ((key, getattr(one, key)) for key in KNOWN)
    return [
        "+" if one.chosen else "-",
        one.path,
        *("" if value is None else f"{key} {value:.10g}" for key, value in known),
        "" if one.weight is None else f"weight {one.weight:.4g}",
        one.why,
    ]


def _bars(figures: Figures) -> Iterator[str]:
    """Yield a line for each checkpoint where there are few and they differ."""
    known = [(one.path, one.mean) for one in figures.each if one.mean is not None]
    means = [mean for _, mean in known]
    if len(known) > _MOST_BARS or max(means) - min(means) < _SPREAD:
        return
    rows = [(path, f"{mean:6.3f}", "#" * round(_BAR * max(mean, 0.0))) for path, mean in known]
    for line in aligned(rows):
        yield f"    {line}"
