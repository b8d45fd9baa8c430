"""The words that are commands, and how each is shown: usage, options by question, and errors."""

from __future__ import annotations

import glob
import itertools
import os
import re
import sys
from typing import Any

import typer
from typer.core import TyperCommand

from merge_avg.cli._process import say
from merge_avg.errors import UsageError
from merge_avg.options import suggested

# What options are for, and the options: those of every day come first, and fit on a screen.
QUESTIONS = {
    "Options": "output evaluation eval_json weights lasts best metric inputs dry_run overwrite "
    "page as_json quiet help",
    "Which checkpoints": "mode steps epochs min_interval metrics_file one_best_per_fold "
    "allow_trivial",
    "How much of each, in which averages": "scheme sigma weights_for normalize "
    "leave_one_out prefixes sliding lora",
    "What is averaged, and what is written": "key include exclude missing int_policy "
    "allow_nonfinite dtype template weights_only max_shard_size hashes strict_pickle",
    "Does the mean make sense": "agreement min_agreement fail_on base",
    "Past one process": "part resume finish",
    "By which means, and by which program": "device threads max_memory version install_completion "
    "show_completion",
}
# The commands beside the merge: their usage, what they do, and which of its options they take.
COMMANDS = {
    "verify": (
        "OUTPUT... [OPTIONS]",
        "Derive outputs of earlier merges from their inputs again, and compare every byte.",
        "inputs threads max_memory as_json quiet",
    ),
    "inspect": (
        "CHECKPOINT... [OPTIONS]",
        "List what is in checkpoints: what would be averaged or kept of each, and why.",
        "key as_json",
    ),
    "soup": (
        "CHECKPOINT... -o OUTPUT --eval COMMAND --mode min|max [OPTIONS]",
        "Add one checkpoint at a time, and keep what does not hurt the score of their mean.",
        """output evaluation eval_json lasts best metric mode steps epochs min_interval metrics_file
        one_best_per_fold key include exclude missing int_policy allow_nonfinite weights_only
        max_shard_size hashes strict_pickle device threads max_memory overwrite dry_run as_json
        quiet allow_trivial""",
    ),
}
# The options that were commands, and those that only such a command takes.
_FORMER = {"verify": "verify", "inspect": "inspect", "soup": "recipe"}
_HIDDEN = (*_FORMER.values(), "inputs", "evaluation", "eval_json")
EXAMPLES = """\b
merge-avg fold*.pt -o merged.pt                the mean of all folds
merge-avg a.pt b.pt -w 0.7,0.3 -o merged.pt    a weighted mean
merge-avg run -o merged.ckpt --last 5          the last five of a run
merge-avg verify merged.pt                     is it what its inputs give?

"""
CODES = """\b
Exit codes: 0 done, 1 refused or failed, 2 wrong usage, 3 done but for a
report of it, 129 hung up, 130 interrupted, 143 terminated."""


class Command(TyperCommand):
    """The merge, or the command that the first word names, whatever files there are."""

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run the command; what typer says of wrong usage is an error like any other."""
        extra["standalone_mode"] = False
        try:
            sys.exit(super().main(*args, **extra) or 0)
        # Its base class, of all that typer raises for wrong usage, has no public name.
        except typer.BadParameter.__mro__[1] as error:  # type: ignore[misc]
            raise _told(error) from None

    def make_context(self, info_name: str | None, args: list[str], *more: Any, **extra: Any) -> Any:
        """Become what is asked for, and return the context of it."""
        params: list[Any] = self.params
        self.options_metavar, self.epilog = "CHECKPOINT... -o OUTPUT [OPTIONS]", EXAMPLES + CODES
        if args and args[0] in COMMANDS:
            info_name, *args = f"{info_name} {args[0]}", *args[1:]
            self.options_metavar, self.help, takes = COMMANDS[info_name.split()[-1]]
            self.params = [params[0], *(one for one in params if one.name in takes.split())]
            self.epilog, params[0].metavar = CODES, self.options_metavar.split()[0]
        else:
            for one in params[1:]:
                one.hidden = one.name in _HIDDEN
        if not extra.get("resilient_parsing"):
            _refuse_one_dash(args, {name for one in self.params for name in one.opts} | {"--help"})
        return super().make_context(info_name, args, *more, **extra)

    def invoke(self, ctx: Any) -> Any:
        """Run the command, and say the new word for an option that has become one."""
        for word, option in _FORMER.items():
            if ctx.params.get(option) and not ctx.params["quiet"]:
                new = f"is now the command merge-avg {word}"
                say(f"note: --{word} {new}; the option will be removed")
            if ctx.info_name.endswith(f" {word}"):
                ctx.params[option] = "greedy" if word == "soup" else True
        return super().invoke(ctx)

    def collect_usage_pieces(self, ctx: Any) -> list[str]:  # noqa: ARG002
        """Return the usage behind the command's name."""
        return [self.options_metavar or ""]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options by question, with their meanings in one column."""
        params = {one.name: one for one in self.get_params(ctx)}
        for question, names in QUESTIONS.items():
            rows = [params[name].get_help_record(ctx) for name in names.split() if name in params]
            if any(rows):
                with formatter.section(question):
                    formatter.write_dl([(f"{row[0]:<24}", row[1]) for row in rows if row], 24)


def words(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return the commands and files that a first word may become; files alone a shell completes."""
    first = incomplete and " " not in str(ctx.info_name) and not ctx.params.get("checkpoints")
    found = [word for word in COMMANDS if first and word.startswith(incomplete)]
    return [*found, *glob.glob(f"{glob.escape(incomplete)}*")] if found else []  # noqa: PTH207


def _refuse_one_dash(args: list[str], names: set[str]) -> None:
    """Raise UsageError for -output, which would be an output called utput, and for its like."""
    for arg in itertools.takewhile(lambda arg: arg != "--", args):
        word = f"-{arg.partition('=')[0]}"
        if re.fullmatch(r"--[a-z][a-z-]+", word):
            # What follows -o and -w may be like an option by accident.
            begun = [one for one in names if one.startswith(word) and (one == word or word[4:])]
            hint = f"did you mean {min(begun, key=len)}?" if begun else suggested(word, names)
            if begun or (hint and word[2] not in "ow"):
                raise UsageError(f"no such option: {word[1:]}", hint=hint)


def _told(error: Any) -> UsageError:
    """Return what typer says of wrong usage in the words of all errors, with the next step."""
    path, what = error.ctx.command_path if error.ctx else "merge-avg", error.format_message()
    hint, word = f"see {path} --help", path.split()[-1]
    if getattr(error, "possibilities", None):
        what, hint = error.message, f"did you mean {error.possibilities[0]}?"
    elif odd := re.search("'([^']*)' is not one of (.*)", what):
        hint = suggested(odd[1], re.findall("'([^']*)'", odd[2]), hint) or hint
    elif word in COMMANDS and os.path.lexists(word):
        hint = f"write ./{word} for a checkpoint of that name"
    # Where the library that checks types shows through.
    what = what.replace("Value error, ", "").replace("Input should", "it should")
    return UsageError(what[0].lower() + what[1:].partition(", unable")[0].rstrip("."), hint=hint)
