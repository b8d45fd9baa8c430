"""The command as such: a merge, and its report in each of the ways that are asked for."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from merge_avg.cli._github import annotate
from merge_avg.cli._parameters import Display
from merge_avg.cli._process import collect_from_here, discard, print_result, progress, say
from merge_avg.engine import Result, read_ahead, run, shares
from merge_avg.errors import MergeError, UsageError
from merge_avg.options import Options
from merge_avg.plan import Job, prepare, refuse_inputs
from merge_avg.report.values import Report, as_json, describe
from merge_avg.selection import Choice

if TYPE_CHECKING:
    from merge_avg.parts import Planned, Ranks


def merge(
    choice: Choice, options: Options, display: Display, dry_run: bool, ranks: Ranks | None = None
) -> None:
    """Average the chosen checkpoints, or plan to, and report it; of several `ranks`, the first."""
    if ranks is not None:
        options, display = _of_a_rank(options, display, ranks)
    job = prepare(choice.paths, choice.outputs, choice.templated(options), *choice.scanned)
    collect_from_here()
    # The page of a GitHub Actions job, which this variable names, gets a summary.
    quiet = dry_run or (ranks is not None and ranks.rank > 0)
    page = None if quiet else os.environ.get("GITHUB_STEP_SUMMARY")
    if page:
        refuse_inputs(Path(page), job.layouts)
    if page and any(Path(page).resolve().is_relative_to(one.resolve()) for one in choice.outputs):
        raise UsageError("GITHUB_STEP_SUMMARY names the output", hint="choose another output")
    if display.page is not None:
        from merge_avg.report import html

        # Before the merge: who asks for a page that cannot be written gets no output either.
        html.refuse(display.page, job, dry_run=dry_run)
    result, planned = _run(job, display, dry_run, ranks)
    if ranks is not None and ranks.rank:
        return
    made = result is not None and result.part is None
    report = describe(job, result, choice, planned)
    if not display.quiet:
        _show(report)
    if page and made:
        from merge_avg.report.text import append, markdown

        try:
            append(Path(page), markdown(report))
        except MergeError as error:  # the merge itself is done
            say(f"note: {error.message}")
    paths = [] if not made else [str(output.path) for output in job.outputs]
    try:
        if display.page is not None and (made or dry_run):
            html.write(display.page, report, overwrite=options.overwrite)
    finally:  # the result was made in any case
        print_result(display.as_json, lambda: as_json(report), paths)


def _run(
    job: Job, display: Display, dry_run: bool, ranks: Ranks | None
) -> tuple[Result | None, tuple[Planned, ...]]:
    """Run the merge, or plan to: then return what each part or rank is to do, if there are any."""
    shared = ranks is not None or job.options.shared
    if dry_run:
        return None, shares(job, ranks) if shared else ()
    if not shared:
        read_ahead(job)
    what = f"averaging {len(job.averaged)} checkpoints"
    with progress(what, job.nbytes, display.quiet) as advance:
        return run(job, advance, crew=ranks), ()


def _of_a_rank(options: Options, display: Display, ranks: Ranks) -> tuple[Options, Display]:
    """Return the options of a rank: its own GPU, and but for the first nothing to be shown."""
    if options.part is not None or options.finish:
        hint = "ranks share out the work; leave out --part and --finish"
        raise UsageError("parts are made by a process each", hint=hint)
    if options.device == "cuda":
        import torch

        device = ranks.seat.device(options.device, torch.cuda.device_count())
        options = replace(options, device=device)
    return options, Display(quiet=True) if ranks.rank else display


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
