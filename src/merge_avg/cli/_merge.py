"""The command as such: a merge, and its report in each of the ways that are asked for."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from merge_avg.cli._github import annotate
from merge_avg.cli._parameters import Display
from merge_avg.cli._process import collect_from_here, discard, print_result, progress, say
from merge_avg.engine import read_ahead, run
from merge_avg.errors import MergeError, UsageError
from merge_avg.options import Options
from merge_avg.plan import prepare, refuse_inputs
from merge_avg.report.values import Report, as_json, describe
from merge_avg.selection import Choice


def merge(choice: Choice, options: Options, display: Display, dry_run: bool) -> None:
    """Average the chosen checkpoints, or plan to, and report it."""
    job = prepare(choice.paths, choice.outputs, choice.templated(options), *choice.scanned)
    collect_from_here()
    # The page of a GitHub Actions job, which this variable names, gets a summary.
    page = None if dry_run else os.environ.get("GITHUB_STEP_SUMMARY")
    if page:
        refuse_inputs(Path(page), job.layouts)
    if page and any(Path(page).resolve().is_relative_to(one.resolve()) for one in choice.outputs):
        raise UsageError("GITHUB_STEP_SUMMARY names the output", hint="choose another output")
    if display.page is not None:
        from merge_avg.report import html

        # Before the merge: who asks for a page that cannot be written gets no output either.
        html.refuse(display.page, job, dry_run=dry_run)
    result = None
    if not dry_run:
        read_ahead(job)
        what = f"averaging {len(job.averaged)} checkpoints"
        with progress(what, job.nbytes, display.quiet) as advance:
            result = run(job, advance)
    report = describe(job, result, choice)
    if not display.quiet:
        _show(report)
    if page:
        from merge_avg.report.text import append, markdown

        try:
            append(Path(page), markdown(report))
        except MergeError as error:  # the merge itself is done
            say(f"note: {error.message}")
    paths = [] if dry_run else [str(output.path) for output in job.outputs]
    try:
        if display.page is not None:
            html.write(display.page, report, overwrite=options.overwrite)
    finally:  # the result was made in any case
        print_result(display.as_json, lambda: as_json(report), paths)


def _show(report: Report) -> None:
    """Show the report on stderr: in colour on a terminal, but for the long lines of a plan."""
    if sys.stderr.isatty() and report.result is not None:
        from merge_avg.report.terminal import show

        try:
            show(report)
        except OSError:  # the terminal is gone, but the merge is done
            discard(sys.stderr)
    else:
        from merge_avg.report.text import lines

        for line in lines(report):
            say(line)
    from merge_avg.report.text import messages

    for fact in messages(report):
        if fact.label == "warning":
            annotate("warning", fact.value)
