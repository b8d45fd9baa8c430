"""How a command is shown: its usage, and its options below the questions that they answer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from typer.core import TyperCommand

# What options are for, and the options: those of every day come first, and fit on a screen.
QUESTIONS = {
    "Options": "output evaluation eval_json weights lasts best metric inputs dry_run overwrite "
    "page as_json quiet help",
    "Which checkpoints": "mode steps epochs min_interval metrics_file one_best_per_fold",
    "How much of each, in which averages": "scheme sigma normalize leave_one_out prefixes",
    "What is averaged, and what is written": "key include exclude missing int_policy "
    "allow_nonfinite dtype template state_dict max_shard_size hashes strict_pickle",
    "Does the mean make sense": "agreement min_agreement base",
    "By which means, and by which program": "device threads max_memory version install_completion "
    "show_completion",
}
# The commands beside the merge, and what they take.
COMMANDS = {
    "verify": "OUTPUT... [OPTIONS]",
    "inspect": "CHECKPOINT... [OPTIONS]",
    "soup": "CHECKPOINT... -o OUTPUT --eval COMMAND --mode min|max [OPTIONS]",
}
CODES = """

\b
Exit codes: 0 done, 1 refused or failed, 2 wrong usage, 3 done but for a
report of it, 129 hung up, 130 interrupted, 143 terminated."""
EXAMPLES = """\b
Commands, each with a --help of its own:
  merge-avg verify merged.pt     derive it from its inputs again, and compare
  merge-avg inspect a.pt         list what is in it, and why it is averaged
  merge-avg soup ...             average only what goes well together
A checkpoint that is called like a command is written ./verify.

\b
Examples:
  merge-avg fold*.pt -o merged.pt                the mean of all folds
  merge-avg a.pt b.pt -w 0.7,0.3 -o merged.pt    a weighted mean
  merge-avg run -o merged.ckpt --last 5          the last five of a run
  merge-avg run -o merged.ckpt --best 3 --metric val_loss
"""
_COLUMN = 24  # of what options mean


class Command(TyperCommand):
    """A command whose help answers questions; `options_metavar` is all of its usage."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:  # noqa: ARG002
        """Return the usage behind the command's name."""
        return [self.options_metavar or ""]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments, and options by question, with their meanings in one column."""
        params: dict[str | None, Any] = {one.name: one for one in self.get_params(ctx)}
        arguments = [one for one in params.values() if one.param_type_name == "argument"]
        formatter.write_paragraph()
        with formatter.indentation():
            _write(formatter, [(one.metavar, one.help) for one in arguments])
        for question, names in QUESTIONS.items():
            shown = [params[name].get_help_record(ctx) for name in names.split() if name in params]
            if any(shown):
                with formatter.section(question):
                    _write(formatter, filter(None, shown))


def _write(formatter: Any, rows: Iterable[tuple[str, str]]) -> None:
    formatter.write_dl([(f"{name:<{_COLUMN}}", text) for name, text in rows], _COLUMN)
