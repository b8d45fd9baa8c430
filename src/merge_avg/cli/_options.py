"""The options that only the command has; those of a merge are in `merge_avg.options`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from merge_avg.options import Recipe, option


@dataclass(frozen=True, kw_only=True)
class Action:
    """What to do instead of a merge."""

    inspect: bool = option(False, "List what is in the checkpoints, and average nothing.")
    verify: bool = option(
        False, "Derive earlier outputs from their inputs again, and compare every byte."
    )
    inputs: Path | None = option(
        None, "Where the inputs are that --verify looks for.", metavar="DIR"
    )
    dry_run: bool = option(False, "Say what would be done, and write nothing.")


@dataclass(frozen=True, kw_only=True)
class SoupOptions:
    """Whether to make a soup of the checkpoints rather than their mean, and how."""

    recipe: Recipe | None = option(
        None,
        "Add checkpoints one at a time, and keep what does not hurt --eval.",
        names=("--soup",),
    )
    evaluation: str | None = option(
        None,
        "Prints the score of the checkpoint {}, as its last number.",
        metavar="COMMAND",
        names=("--eval",),
    )
    eval_json: str | None = option(
        None, "The score is this key of the JSON that --eval prints.", metavar="KEY"
    )


@dataclass(frozen=True, kw_only=True)
class Display:
    """What is shown, and where."""

    page: Path | None = option(
        None,
        "Write a page of what was done, with the agreement as pictures.",
        metavar="FILE.html",
        names=("--report",),
    )
    as_json: bool = option(False, "Print the report as one JSON object.", names=("--json",))
    quiet: bool = option(
        False, "Print errors only, and the output's path.", names=("--quiet", "-q")
    )
