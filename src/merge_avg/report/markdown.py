"""The report as Markdown, for the page of a CI job."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from merge_avg.errors import MergeError
from merge_avg.report import sizes
from merge_avg.report.printable import printable
from merge_avg.report.report import Report, averaged_count, precision

_KNOWN = ("step", "epoch", "metric")


def markdown(report: Report) -> str:
    """A short summary in GitHub's Markdown; names in it stay names."""
    return "\n".join(_lines(report)) + "\n"


def append(path: Path, text: str) -> None:
    """Adds text to a file, such as the one that GITHUB_STEP_SUMMARY names.

    Raises:
        MergeError: it cannot be written.
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise MergeError(f"no summary was written ({error.strerror})", where=path) from None


def _lines(report: Report) -> Iterator[str]:
    inputs, outputs = report["inputs"], report["outputs"]
    count, agreement = averaged_count(report), report.get("agreement")
    yield f"### merge-avg: {count} checkpoint{'s' * (count != 1)} averaged"
    yield ""
    known = [key for key in _KNOWN if any(key in entry for entry in inputs)]
    columns = ["checkpoint", "size", *known, *("weight" for _ in outputs)]
    yield _row(columns)
    yield _row(["---"] * len(columns))
    for number, entry in enumerate(inputs):
        cells = [_text(entry["path"]), sizes.shown(entry["bytes"])]
        cells += [_number(entry.get(key)) for key in known]
        cells += [_number(output["weights"][number]) for output in outputs]
        yield _row(cells)
    yield ""
    for output in outputs:
        yield f"- written: {_text(output['path'])}"
    tensors = report["tensors"]["averaged"]
    yield f"- averaged: {tensors:,} tensors, {report['parameters']:,} parameters"
    if agreement is not None:
        yield f"- agreement: {agreement['mean']:.3f} ({precision(agreement)})"
        if agreement["centred"] is not None:
            mean = f"{agreement['centred']['mean']:.3f} ({precision(agreement['centred'])})"
            yield f"- agreement by the differences to {_text(agreement['base'])}: {mean}"
    yield from (f"- note: {_text(note)}" for note in report["notes"])
    yield from (f"- **warning**: {_text(warning)}" for warning in report["warnings"])


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.6g}"


def _text(value: str) -> str:
    """Text without what Markdown, HTML or a terminal would take for more."""
    return "".join(f"&#{ord(c)};" if c in "|`*_<>[]\\&#!~@" else c for c in printable(value))
