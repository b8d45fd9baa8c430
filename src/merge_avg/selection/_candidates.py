"""Which of the checkpoints found count: not earlier outputs, and no checkpoint twice."""

from __future__ import annotations

import filecmp
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from merge_avg.selection._expand import natural
from merge_avg.selection._metadata import Metadata, name_metadata


@dataclass(frozen=True)
class Candidate:
    """A checkpoint that was looked at, and why it was chosen or not."""

    path: Path
    step: int | None = None
    epoch: int | None = None
    metric: float | None = None
    chosen: bool = True
    why: str = "named"


@dataclass(frozen=True)
class Found:
    """A checkpoint that is neither chosen nor left out yet.

    Attributes:
        path: the checkpoint.
        folder: the directory of the run that it was found in, or its own.
        metadata: what is known of it.
        metric: its value of the metric that decides.
    """

    path: Path
    folder: Path
    metadata: Metadata
    metric: float | None = None

    @property
    def step(self) -> int | None:
        """The step that its metadata tells."""
        return self.metadata.step

    @property
    def epoch(self) -> int | None:
        """The epoch that its metadata tells."""
        return self.metadata.epoch

    def chosen(self, why: str) -> Candidate:
        """Return it as one that was chosen."""
        return Candidate(self.path, self.step, self.epoch, self.metric, chosen=True, why=why)

    def left(self, why: str) -> Candidate:
        """Return it as one that was left out."""
        return Candidate(self.path, self.step, self.epoch, self.metric, chosen=False, why=why)


def age(one: Found | Candidate) -> tuple[object, ...]:
    """Return a key that sorts by step, epoch and name; what tells neither number comes last."""
    return (
        one.step is None and one.epoch is None,
        -1 if one.step is None else one.step,
        -1 if one.epoch is None else one.epoch,
        natural(str(one.path)),
    )


def without_outputs(
    found: Sequence[Found], output: Path | None, left: list[Candidate]
) -> list[Found]:
    """Return those that no merge has written and that this one is not to write."""
    kept = []
    for one in found:
        is_output = output is not None and output.exists() and one.path.samefile(output)
        if one.metadata.ours or is_output:
            left.append(one.left("an earlier output of merge-avg"))
        else:
            kept.append(one)
    return kept


def without_copies(found: Sequence[Found], left: list[Candidate]) -> tuple[list[Found], list[str]]:
    """Return each checkpoint once, the oldest first, and a note for each copy."""
    kept: list[Found] = []
    notes: list[str] = []
    # Of a checkpoint and its copy last.ckpt, the one whose name says something is kept.
    for one in sorted(found, key=lambda one: name_metadata(one.path) == Metadata()):
        twin = next((other for other in kept if _is_copy(one, other)), None)
        if twin is None:
            kept.append(one)
            continue
        why = f"a copy of {twin.path.name}"
        left.append(one.left(why))
        notes.append(f"{one.path} is {why} and is counted once")
    return sorted(kept, key=age), notes


def _is_copy(one: Found, other: Found) -> bool:
    a, b = one.path, other.path
    if a.samefile(b):
        return True
    # Bytes are compared only where step, epoch and size leave a doubt: checkpoints are large.
    if (one.step, one.epoch) != (other.step, other.epoch) or a.is_dir() or b.is_dir():
        return False
    return a.stat().st_size == b.stat().st_size and filecmp.cmp(a, b, shallow=False)
