"""The report of a merge as values. Fields have the names and the order of the JSON's keys.

Scripts read that JSON: a key may be added, but none renamed or removed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
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
    """A checkpoint that a merge reads.

    Attributes:
        path: as the user named it.
        format: as `inspect` names it.
        nbytes: of its files.
        averaged: False for a template or base that is only copied or compared.
        weight: after division by the sum; None where there are several outputs.
        step: where it was found in a run, as are the next two.
        epoch: as the framework counts it.
        metric: its value of the metric that decided.
        hash: of what was read of it, in hexadecimal.
    """

    path: str
    format: str
    nbytes: int
    averaged: bool
    weight: float | None = optional()
    step: int | None = optional()
    epoch: int | None = optional()
    metric: float | None = optional()
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
    """Cosines between checkpoints: see `merge_avg.agreement.Agreement`. Rounded to six places.

    Attributes:
        odd: the path of the one checkpoint that agrees with no other.
    """

    mean: float
    error: float
    each: tuple[CheckpointAgreement, ...]
    pairs: tuple[tuple[float | None, ...], ...]
    shrinkage: float
    size: int
    elements: int
    odd: str | None
    tensors: tuple[TensorAgreement, ...]

    @property
    def exact(self) -> bool:
        """Return whether every element was looked at."""
        return self.elements == self.size


@dataclass(frozen=True)
class ReportedAgreement(Figures):
    """How far the checkpoints agree; and what they learned since the base, if there is one.

    Attributes:
        base: the path of the base.
        centred: figures of the differences to the base; None where fewer than two differ from it.
    """

    base: str | None
    centred: Figures | None


@dataclass(frozen=True)
class Outcome:
    """What is only known once a merge has run.

    Attributes:
        agreement: None where it was not measured, or there was nothing to compare.
        bytes_read: from the checkpoints.
        seconds: wall time of reading, averaging and writing.
        differing: integer tensors that differ and were decided by the policy.
        nonfinite: tensors that hold NaN or infinity, where that was allowed.
    """

    agreement: ReportedAgreement | None
    bytes_read: int
    seconds: float
    differing: tuple[str, ...]
    nonfinite: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """All that is said of a merge.

    Attributes:
        version: of merge-avg.
        inputs: the template first; a base that is not averaged last.
        outputs: with the weights of the inputs in each.
        template: the path of the input that the outputs are copies of.
        base: the path of what the others were fine-tuned from.
        tensors: counts.
        parameters: elements of the template's weights, integers left out.
        dtypes: of the outputs' weights, with the number of tensors.
        kept: entries with tensors that are not averaged.
        others: entries without tensors.
        whole: whether `kept` and `others` are in the outputs.
        available: tensors that some checkpoint lacks, with the number of checkpoints that have
            them.
        bytes_to_read: from all inputs.
        bytes_to_write: to all outputs.
        threads: that work at a time.
        memory: bytes taken at most, beside torch's own.
        policies: the options that decide what is averaged, and how.
        notes: for the user, one sentence each.
        warnings: what may make the mean meaningless, one sentence each.
        candidates: checkpoints that were looked at; empty where the user named each.
        outcome: None for a dry run.
    """

    version: str
    inputs: tuple[ReportedInput, ...]
    outputs: tuple[ReportedOutput, ...]
    template: str
    base: str | None
    tensors: TensorCounts
    parameters: int
    dtypes: Mapping[str, int]
    kept: tuple[KeptEntry, ...]
    others: tuple[str, ...]
    whole: bool
    available: Mapping[str, int]
    bytes_to_read: int
    bytes_to_write: int
    threads: int
    memory: int
    policies: Mapping[str, Any]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    candidates: tuple[ReportedCandidate, ...]
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
    if is_dataclass(value):
        pairs = ((one, getattr(value, one.name)) for one in fields(value))
        return {
            _KEYS.get(one.name, one.name): plain(item)
            for one, item in pairs
            if item is not None or not one.metadata.get("optional")
        }
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value
