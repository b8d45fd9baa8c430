"""The user's own evaluation of a checkpoint: a command that prints a score."""

from __future__ import annotations

import json
import math
import re
import shlex
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen

from merge_avg.errors import MergeError, UsageError
from merge_avg.io import WINDOWS

# A number that is not part of a word, such as epoch3, checkpoint-500.pt or 1.5s. NaN counts as a
# number, so that it is refused: a number printed before it is not the score.
_NUMBER = re.compile(
    r"(?<![\w.])(?<!\w[-+])[-+]?"
    r"(?:(?:\d+(?:\.\d*)?|\.\d+)(?:e[-+]?\d+)?|nan|inf|infinity)(?!\w|\.\w)",
    re.IGNORECASE,
)
# How many characters of the command, and of the end of its output, a message shows.
_COMMAND, _TAIL = 300, 1400


def score(command: str, checkpoint: Path, key: str | None = None) -> float:
    """Run a command on a checkpoint and return the score that it prints.

    The command is split as a shell does, but run without one. In it, {} stands for the checkpoint's
    path, which is added at the end where there is no {}. The score is the last number on stdout;
    with a key, it is that entry of the last JSON object there, with dots for entries in entries.
    A command that fails, or prints no score or NaN, is a MergeError.
    """
    try:
        lexer = shlex.shlex(command, posix=True, punctuation_chars=False)
        lexer.whitespace_split, lexer.commenters = True, ""  # as `shlex.split` does
        if WINDOWS:  # C:\eval.py
            lexer.escape = ""
        words = list(lexer)
    except ValueError as error:
        raise UsageError(f"the command {command!r} is not understood ({error})") from None
    if not words:
        raise UsageError("the evaluation command is empty", hint="give --eval 'python eval.py {}'")
    if not any("{}" in word for word in words):
        words.append("{}")
    name = command if len(command) <= _COMMAND else command[:_COMMAND] + "..."
    try:
        code, output, errors = _run([word.replace("{}", str(checkpoint)) for word in words])
    except OSError as error:
        what = f"the evaluation {words[0][:_COMMAND]!r} cannot be run ({error.strerror})"
        raise MergeError(what, where=checkpoint, hint="check --eval") from None
    if code:
        how = f"code {code}" if code > 0 else f"signal {-code}"
        hint = "fix it and run again: finished evaluations are not repeated"
        what = f"the evaluation {name!r} failed ({how}): {_end(errors or output)}"
        raise MergeError(what, where=checkpoint, hint=hint)
    if key is None:
        numbers = _NUMBER.findall(output)
        value, found = float(numbers[-1]) if numbers else None, "no number"
    else:
        value, found = _of_json(output, key), f"no number {key!r} in a JSON object"
    if value is None or math.isnan(value):
        found = found if value is None else "NaN"
        what = f"the evaluation {name!r} printed {found}: {_end(output or errors)}"
        raise MergeError(what, where=checkpoint, hint="print the score as the last thing on stdout")
    return value


def _run(arguments: list[str]) -> tuple[int, str, str]:
    """Return the exit status of a command, and its stdout and stderr."""
    # Without a shell, a path with spaces or a semicolon is one argument and nothing else.
    with Popen(arguments, stdin=DEVNULL, stdout=PIPE, stderr=PIPE) as process:  # noqa: S603
        try:
            output, errors = process.communicate()
        except BaseException:  # Ctrl-C too must not leave an evaluation running
            # `subprocess.run` would kill it as well, but after a KeyboardInterrupt it waits only a
            # moment for the end.
            process.kill()
            process.wait()
            raise
    return process.returncode, output.decode("utf-8", "replace"), errors.decode("utf-8", "replace")


def _of_json(output: str, key: str) -> float | None:
    """Return the entry of the whole output, or of the last line that is an object with it."""
    for text in (output, *reversed(output.splitlines())):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            continue
        # Keys with dots in them, such as "eval.acc", come before entries within entries.
        for name in [key] if isinstance(value, dict) and key in value else key.split("."):
            if not isinstance(value, dict) or name not in value:
                break
            value = value[name]
        else:
            try:
                return float(value) if type(value) in (int, float) else None
            except OverflowError:  # JSON has integers of any length
                return None
    return None


def _end(text: str) -> str:
    text = text.strip()
    return text if len(text) <= _TAIL else "..." + text[-_TAIL:]
