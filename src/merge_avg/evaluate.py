"""The user's own evaluation of a checkpoint: a command whose output holds a score."""

from __future__ import annotations

import json
import math
import re
import shlex
import subprocess
from pathlib import Path

from merge_avg.errors import MergeError, UsageError

PLACEHOLDER = "{}"
_NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?(?!\w)")
_TAIL = 2000


def score(command: str, checkpoint: Path, key: str | None = None) -> float:
    """Runs a command on a checkpoint and reads its score.

    Args:
        command: split as a shell does, but run without one; {} stands for the checkpoint's path,
            which is added at the end where there is no {}.
        checkpoint: what is evaluated.
        key: which entry of the last JSON object on stdout is the score, with dots for entries
            within entries; without it the score is the last number on stdout.

    Raises:
        UsageError: the command cannot be split.
        MergeError: it fails, or prints no score.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise UsageError(f"the command {command!r} is not understood ({error})") from None
    if not words:
        raise UsageError("the evaluation command is empty", hint="give --eval 'python eval.py {}'")
    if not any(PLACEHOLDER in word for word in words):
        words.append(PLACEHOLDER)
    arguments = [word.replace(PLACEHOLDER, str(checkpoint)) for word in words]
    try:
        # It is the user's command, and no shell sees the path.
        done = subprocess.run(  # noqa: S603
            arguments, stdin=subprocess.DEVNULL, capture_output=True, check=False
        )
    except OSError as error:
        what = f"the evaluation {words[0]!r} cannot be run ({error.strerror})"
        raise MergeError(what, hint="check --eval") from None
    output, errors = (text.decode("utf-8", "replace") for text in (done.stdout, done.stderr))
    if done.returncode:
        how = f"code {done.returncode}" if done.returncode > 0 else f"signal {-done.returncode}"
        what = f"the evaluation {command!r} failed ({how}): {_end(errors or output)}"
        raise MergeError(what, where=checkpoint, hint="mend it and run again: it goes on from here")
    value = _last_number(output) if key is None else _of_json(output, key)
    if value is None or math.isnan(value):
        found = "no number" if key is None else f"no number {key!r} in a JSON object"
        what = f"the evaluation {command!r} printed {found}: {_end(output or errors)}"
        raise MergeError(what, where=checkpoint, hint="print the score as the last thing on stdout")
    return value


def _last_number(output: str) -> float | None:
    numbers = _NUMBER.findall(output)
    return float(numbers[-1]) if numbers else None


def _of_json(output: str, key: str) -> float | None:
    """The entry of the whole output, or of the last line that is a JSON object."""
    for text in (output, *reversed(output.splitlines())):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if not isinstance(value, dict):
            continue
        for name in [key] if key in value else key.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    return None


def _end(text: str) -> str:
    text = text.strip()
    return text if len(text) <= _TAIL else "..." + text[-_TAIL:]
