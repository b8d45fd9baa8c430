"""The report of a merge as values. Fields have the names and the order of the JSON's keys.

Scripts read that JSON: a key may be added, but none renamed or removed.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from merge_avg.agreement import TensorAgreement

# What is known of checkpoints in a run, by the names of its fields.
KNOWN = ("step", "epoch", "metric")
# `bytes` is a type in Python, and the program's own version goes by its name.
_KEYS = {"nbytes": "bytes", "version": "merge_avg"}


def optional() -> Any:
    """Return a dataclass field that is left out of the JSON where it is None."""
    return field(default=None, metadata={"optional": True})


@dataclass(frozen=True)
class ReportedInput:
    """A checkpoint that a merge reads."""

    path: str
    format: str
    nbytes: int
    # A template or a base may only be copied, or compared with.
    averaged: bool
    # After division by the sum. Of several outputs each has its own: see `ReportedOutput`.
    weight: float | None = optional()
    # What was found out when it was chosen from a run.
    step: int | None = optional()
    epoch: int | None = optional()
    metric: float | None = optional()
    # Of what the outputs have of it, in hexadecimal: the same number as in their provenance.
    hash: str | None = optional()


@dataclass(frozen=True)
class ReportedOutput:
    """An output, and the weights of all inputs in it, zeros included."""

    path: str
    weights: tuple[float, ...]


@dataclass(frozen=True)
class TensorCounts:
    """How many of the template's tensors are averaged, are integers, or are kept by choice."""

    averaged: int
    integers: int
    kept: int


@dataclass(frozen=True)
class KeptEntry:
    """An entry of the template that is not averaged, such as the optimizer's state."""

    key: str
    tensors: int
    nbytes: int


@dataclass(frozen=True)
class ReportedCandidate:
    """A checkpoint that was looked at, and why it was chosen or not."""

    # In a table of candidates an unknown value is a gap, so here None stays in the JSON.
    path: str
    step: int | None
    epoch: int | None
    metric: float | None
    chosen: bool
    why: str
    weight: float | None = optional()


@dataclass(frozen=True)
class CheckpointAgreement:
    """How far one checkpoint agrees with the others."""

    path: str
    mean: float | None
    error: float


@dataclass(frozen=True)
class Figures:
    """Cosines between checkpoints, as in `merge_avg.agreement.Agreement`, to six places."""

    mean: float
    error: float
    each: tuple[CheckpointAgreement, ...]
    pairs: tuple[tuple[float | None, ...], ...]
    shrinkage: float
    size: int
    elements: int
    # The path of the one checkpoint that agrees with no other.
    odd: str | None
    tensors: tuple[TensorAgreement, ...]

    @property
    def exact(self) -> bool:
        """Return whether every element was looked at."""
        return self.elements == self.size


@dataclass(frozen=True)
class ReportedAgreement(Figures):
    """How far the checkpoints agree; and what they learned since the base, if there is one."""

    base: str | None
    # None also where fewer than two checkpoints differ from the base.
    centred: Figures | None


@dataclass(frozen=True)
class Outcome:
    """The part of a report that is only known once a merge has run."""

    # None where it was not measured, or there was nothing to compare.
    agreement: ReportedAgreement | None
    bytes_read: int
    seconds: float
    # Integer tensors whose values the policy chose.
    differing: tuple[str, ...]
    # Tensors that hold NaN or infinity, where that was allowed.
    nonfinite: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """All that is said of a merge. Sizes are in bytes."""

    version: str
    # The template is the first, and a base that is not averaged the last.
    inputs: tuple[ReportedInput, ...]
    outputs: tuple[ReportedOutput, ...]
    template: str
    base: str | None
    tensors: TensorCounts
    # Elements of the template's weights, integers left out.
    parameters: int
    # Of the outputs' weights, with the number of tensors.
    dtypes: Mapping[str, int]
    # Entries with tensors that are not averaged, then entries without tensors; and whether the
    # outputs have these entries.
    kept: tuple[KeptEntry, ...]
    others: tuple[str, ...]
    whole: bool
    # Tensors that some checkpoint lacks, with the number of checkpoints that have them.
    available: Mapping[str, int]
    bytes_to_read: int
    bytes_to_write: int
    threads: int
    # At most, and beside torch's own.
    memory: int
    # Options that decide what is averaged, and how: `merge_avg.options.REPORTED`.
    policies: Mapping[str, Any]
    # For the user, one sentence each; a warning says what may make the mean meaningless.
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    # Empty where the user named each checkpoint.
    candidates: tuple[ReportedCandidate, ...]
    # None for a dry run.
    outcome: Outcome | None

    @property
    def dry_run(self) -> bool:
        """Return whether the merge was only planned."""
        return self.outcome is None

    @property
    def agreement(self) -> ReportedAgreement | None:
        """Return how far the checkpoints agree, if that was measured."""
        return None if self.outcome is None else self.outcome.agreement


def as_json(report: Report) -> dict[str, Any]:
    """Return the report as plain values. The outcome's keys stand beside the others."""
    found = plain(report)
    outcome = found.pop("outcome") or {}
    derived = {
        "output": report.outputs[0].path,
        "dry_run": report.dry_run,
        "int_policy": report.policies["int_policy"],
    }
    return {"merge_avg": found.pop("merge_avg"), **derived, **found, **outcome}


def plain(value: Any) -> Any:
    """Return a value with its dataclasses as dicts and its tuples as lists."""
    # Most values are numbers: a large model has figures of tens of thousands of tensors.
    if value is None or isinstance(value, float | int | str):
        return value
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return {
        key: plain(item)
        for name, key, wanted in _keys(value.__class__)
        if (item := getattr(value, name)) is not None or wanted
    }


@functools.cache
def _keys(cls: type) -> tuple[tuple[str, str, bool], ...]:
    """Return each field of a dataclass, its key, and whether it is wanted where it is None."""
    return tuple(
        (one.name, _KEYS.get(one.name, one.name), not one.metadata.get("optional"))
        for one in fields(cls)
    )
