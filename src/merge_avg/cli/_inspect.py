"""The command with --inspect: what is in checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from merge_avg.cli._console import print_result
from merge_avg.cli._options import Display
from merge_avg.report.inspect import as_json, contents, lines


def inspect(checkpoints: Sequence[Path], key: str | None, display: Display) -> None:
    """List what is in checkpoints."""
    found = [contents(path, key) for path in checkpoints]
    text = (line for one in found for line in lines(one))
    print_result(display, lambda: [as_json(one) for one in found], text)
