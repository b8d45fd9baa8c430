"""The log of a soup: evaluations that were paid for once, kept from one run to the next.

It holds one JSON object a line. The first says what the soup is made of and how it is evaluated;
each other one is an evaluation: {"members": [2, 0], "score": 0.5}. Members are counted from 0 in
the order in which the checkpoints were named.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from merge_avg.errors import MergeError
from merge_avg.formats import scan

Members = tuple[int, ...]


@dataclass
class Log:
    """Scores by the members that were evaluated, in memory and in a file."""

    path: Path
    header: dict[str, Any]
    scores: dict[Members, float] = field(default_factory=dict)

    def open(self) -> None:
        """Read what an earlier run left, or begin the file.

        Raises:
            MergeError: the file cannot be read or written, or is the log of another soup.
        """
        with _explained(self.path):
            data = self.path.read_bytes() if self.path.exists() else b""
        # A kill may cut the last line. Whole lines are never written again, so that another kill
        # at this point loses nothing.
        whole = data[: data.rfind(b"\n") + 1]
        if not whole:
            if not _line(self.header).startswith(data):
                raise self._of_another()
            self._write(self.header, "wb")
            return
        try:
            header, *entries = map(json.loads, whole.splitlines())
            if header != self.header:
                raise ValueError
            for entry in entries:
                # Earlier versions tried a mean that was rounded twice, by way of a sum in float64.
                # Where the final soup was not that mean, they evaluated it as well and added an
                # entry with "exact": true. Such an entry comes after the trial's own and replaces
                # it here, as it is the score of the file that a trial writes today. Their other
                # scores stand: only last bits of the weights can differ.
                self.scores[tuple(map(int, entry["members"]))] = float(entry["score"])
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
            raise self._of_another() from None
        if len(whole) < len(data):
            with _explained(self.path):
                os.truncate(self.path, len(whole))

    def add(self, members: Members, score: float) -> None:
        """Remember an evaluation for good."""
        self.scores[members] = score
        self._write({"members": members, "score": score})

    def _write(self, entry: Mapping[str, Any], mode: str = "ab") -> None:
        with _explained(self.path), self.path.open(mode) as file:
            file.write(_line(entry))
            file.flush()
            os.fsync(file.fileno())  # an evaluation may take an hour

    def _of_another(self) -> MergeError:
        what = "this is the log of another soup: of other checkpoints, another command or mode"
        return MergeError(what, where=self.path, hint="remove it to begin anew")


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
    return json.dumps(entry).encode() + b"\n"


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise MergeError(error.strerror or str(error), where=path) from None
