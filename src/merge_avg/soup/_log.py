"""The log of a soup: evaluations that were paid for once, kept from one run to the next.

It holds one JSON object a line. The first says what the soup is made of and how it is evaluated;
each other one is an evaluation: {"members": [2, 0], "score": 0.5}. Members are counted from 0 in
the order in which the checkpoints were named. An infinite score is the text "inf" or "-inf".
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from merge_avg.errors import MergeError
from merge_avg.formats import bounded, scan
from merge_avg.io import sync

Members = tuple[int, ...]


class Log:
    """Scores by the members that were evaluated, in memory and in a file, which a run adds to.

    A file that cannot be read or written, or is the log of another soup, is a MergeError.
    """

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path = path
        self.scores: dict[Members, float] = {}
        data = bounded.read(path) if path.exists() else b""
        # A kill may cut the last line. Whole lines are never written again, so that another kill
        # at this point loses nothing.
        whole = data[: data.rfind(b"\n") + 1]
        if not whole and _line(header).startswith(data):
            self._write(header, "wb")
            return
        try:
            first, *entries = map(bounded.loads, whole.splitlines())
            if first != header:
                # Before there is any score, the evaluation may have been mistyped.
                if entries or whole != data or set(first) != set(header):
                    raise ValueError
                self._write(header, "wb")
            for entry in entries:
                # Earlier versions tried a mean that was rounded twice, by way of a sum in float64.
                # Where the final soup was not that mean, they evaluated it as well and added an
                # entry with "exact": true. Such an entry comes after the trial's own and replaces
                # it here, as it is the score of the file that a trial writes today. Their other
                # scores stand: only last bits of the weights can differ.
                self.scores[tuple(map(int, entry["members"]))] = float(entry["score"])
        except (KeyError, TypeError, ValueError, OverflowError):
            what = "this is the log of another soup: of other checkpoints, another command or mode"
            raise MergeError(what, where=path, hint="remove it to begin anew") from None
        if len(whole) < len(data):
            with _explained(path):
                os.truncate(path, len(whole))

    def add(self, members: Members, score: float) -> None:
        """Remember an evaluation for good."""
        self.scores[members] = score
        self._write({"members": members, "score": score if math.isfinite(score) else str(score)})

    def _write(self, entry: Mapping[str, Any], mode: str = "ab") -> None:
        with _explained(self.path), self.path.open(mode) as file:
            file.write(_line(entry))
            file.flush()
            sync(file.fileno())  # an evaluation may take an hour


def identities(paths: Sequence[Path]) -> list[list[str | int]]:
    """Return path, size and time of each file that holds weights, which tell soups apart."""
    found: list[list[str | int]] = []
    for path in paths:
        files = [path]
        # An evaluation may write its results into a checkpoint's directory: only weights count.
        if path.is_dir():
            layout = scan(path)
            pairs = zip(layout.files, layout.members, strict=True)
            files = [file.path for file, member in pairs if member is not None]
        for file in files:
            with _explained(file):
                state = file.stat()
            found.append([str(file.absolute()), state.st_size, state.st_mtime_ns])
    return found


def _line(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry, allow_nan=False).encode() + b"\n"


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise MergeError(error.strerror or str(error), where=path) from None
