"""Words for a GitHub Actions job: annotations on its page, and a summary."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from merge_avg.cli._process import asked, say
from merge_avg.errors import MergeError
from merge_avg.report import printable


def annotate(kind: str, *lines: str, file: str | None = None) -> None:
    """Show an error or a warning on the page of the job, by a workflow command on stderr."""
    # Where stdout is the same stream, it would be in the middle of the JSON.
    if os.environ.get("GITHUB_ACTIONS") == "true" and not (
        asked("--json") and os.path.sameopenfile(1, 2)
    ):
        about = "title=merge-avg"
        if file is not None:
            about += f",file={_escaped(file).replace(':', '%3A').replace(',', '%2C')}"
        say(f"::{kind} {about}::{'%0A'.join(map(_escaped, lines))}", escaped=True)


def _escaped(text: str) -> str:
    return printable(text).replace("%", "%25")  # of line ends `printable` has left none


def summarize(
    title: str, told: Iterable[tuple[str, str]], rows: Sequence[Sequence[str]] = ()
) -> None:
    """Add to the page of the job, which GITHUB_STEP_SUMMARY names, unless this is a dry run."""
    name = os.environ.get("GITHUB_STEP_SUMMARY")
    if not name or asked("--dry-run"):
        return
    from merge_avg.report.text import append, section

    # After wrong usage nobody knows which word is a checkpoint, or the output.
    words = (re.sub(r"^(--[\w-]+=|-\w)", "", word) for word in sys.argv[1:])
    page, places = Path(name), [Path(word).resolve() for word in words if word]
    try:
        if any(page.resolve().is_relative_to(place) for place in places):
            raise MergeError("no summary was written, as the command names it", where=name)
        append(page, section(title, told, rows))
    except MergeError as error:  # what there is to sum up is done, or failed by itself
        say(f"note: {error.message}")
