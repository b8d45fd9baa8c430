"""The words of a report, whoever shows it: facts with a label, and a table of its checkpoints."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from merge_avg.agreement import LEAST_AGREEMENT, Agreement, TensorAgreement
from merge_avg.errors import named
from merge_avg.report.printable import counted, shown
from merge_avg.report.values import KNOWN, Report

Style = Literal["", "good", "doubtful"]
# Outputs up to which each has a column of weights; of more, the facts alone have the weights.
_MOST_WEIGHTS = 6
_MOST_NAMES = 8
# So many tensors are named at most, and only where the checkpoints agree so much less about them.
_LEAST = 3
_LESS = 0.05


@dataclass(frozen=True, slots=True)
class Fact:
    """One thing to say, in a few words; a label may come more than once."""

    label: str
    value: str
    style: Style = ""


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the table of checkpoints, with a cell for each input."""

    kind: Literal["name", "file", "known", "weight", "agreement"]
    title: str
    cells: tuple[str, ...]
    # Where the cells show cosines, these and their errors.
    cosines: tuple[tuple[float | None, float], ...] = ()


def headline(report: Report) -> str:
    """Return the one sentence that stands above all others."""
    outputs = report.outputs
    where = outputs[0].path if len(outputs) == 1 else counted(len(outputs), "average")
    return f"{_verb(report)} {counted(len(report.averaged), 'checkpoint')} into {where}"


def facts(report: Report, most: int = _MOST_NAMES) -> Iterator[Fact]:
    """Yield all there is to say beside the headline and the table of checkpoints.

    Of the entries that are kept, at most `most` are named.
    """
    tensors = counted(report.tensors["averaged"], "tensor")
    what = f"{tensors}, {report.parameters:,} parameters ({', '.join(report.dtypes)})"
    yield Fact(_verb(report), what)
    # A single output is in the headline, and its weights are in the table.
    if len(report.outputs) > 1:
        for number, output in enumerate(report.outputs):
            weights = f"(weights {', '.join(weights_of(report, number))})"
            yield Fact("would write" if report.dry_run else "written", f"{output.path} {weights}")
    yield from _integers(report)
    yield from _kept(report, most)
    yield from _agreement(report)
    if report.result is None:
        size = shown(report.bytes_to_read)
        yield Fact("would read", f"{size} and write {shown(report.bytes_to_write)}")
        memory = f"{report.memory / (1 << 20):.0f} MiB of memory"
        threads = counted(report.threads, "thread")
        yield Fact("would take", f"at most {memory} beside torch's own, with {threads}")
    else:
        yield Fact("read", " ".join(reading(report.result.nbytes, report.result.seconds)))
    yield from messages(report)


def messages(report: Report) -> Iterator[Fact]:
    """Yield the notes, then the warnings."""
    for name, number in list(report.available.items())[:_MOST_NAMES]:
        of = f"{number} of {len(report.averaged)} checkpoints"
        yield Fact("note", f"{name!r} is averaged over {of}")
    if report.agreement is not None and report.base is not None and report.centred is None:
        yield Fact("note", f"no two checkpoints differ from {report.base}")
    yield from (Fact("note", text) for text in report.notes)
    if report.result is not None and report.result.nonfinite:
        names = named(report.result.nonfinite)
        yield Fact("warning", f"NaN or infinity in {names}", "doubtful")
    yield from (Fact("warning", text, "doubtful") for text in report.warnings)


def _verb(report: Report) -> str:
    return "would average" if report.dry_run else "averaged"


def weights_of(report: Report, number: int) -> list[str]:
    """Return the weights in an output, without that of a base that is not averaged."""
    pairs = zip(report.inputs, report.outputs[number].weights, strict=True)
    return [f"{w:.4g}" for entry, w in pairs if entry.averaged or entry.path != report.base]


def _integers(report: Report) -> Iterator[Fact]:
    differing = () if report.result is None else report.result.differing
    rest = report.tensors["integers"] - len(differing)
    if rest:
        what = "to compare" if report.dry_run else "equal everywhere, copied"
        yield Fact("integers", f"{counted(rest, 'tensor')} {what}")
    if differing:
        taken = {"max": "the largest value", "mean": "the rounded mean"}
        how = taken.get(report.policies["int_policy"], "the template's value")
        many = f"{counted(len(differing), 'tensor')} with different values"
        yield Fact("integers", f"{many}, {how} taken: {named(differing)}")


def _kept(report: Report, most: int) -> Iterator[Fact]:
    names = [
        f"{entry.key} ({counted(entry.tensors, 'tensor')}, {shown(entry.nbytes)})"
        for entry in report.kept
    ]
    names += report.others
    if names:
        more = f" and {len(names) - most:,} more" if len(names) > most else ""
        what = ", ".join(names[:most]) + more
        from_template = Fact("kept", f"from {report.template}: {what}")
        yield from_template if report.whole else Fact("left out", what)


def _agreement(report: Report) -> Iterator[Fact]:
    agreement = report.agreement
    if agreement is None:
        return
    what = "mean cosine between the checkpoints' matrices"
    value = f"{agreement.mean:.3f} ({precision(agreement)}; {what})"
    yield Fact("agreement", value, style(agreement.mean))
    if report.centred is not None:
        how = f"({precision(report.centred)}; by the differences to {report.base})"
        yield Fact("from base", f"{report.centred.mean:.3f} {how}")
    for tensor in least_agreeing(agreement, _LEAST):
        if tensor.mean is not None and tensor.mean < agreement.mean - _LESS:
            yield Fact("least", f"{tensor.mean:.3f} about {tensor.name!r}")


def style(cosine: float | None) -> Style:
    """Return how a cosine is shown, if it is known."""
    return "" if cosine is None else "good" if cosine >= LEAST_AGREEMENT else "doubtful"


def precision(figures: Agreement) -> str:
    """Return how precisely the mean cosine is known, in a few words."""
    if figures.elements == figures.size:
        return "exact"
    # The error is an estimate too, so one digit of it is enough, and none below the fourth place.
    return f"sampled, +-{max(figures.error, 0.0001):.1g}"


def least_agreeing(figures: Agreement, count: int) -> list[TensorAgreement]:
    """Return the tensors that the checkpoints agree least about, the least first."""
    # A large model has tens of thousands of tensors, of which few are asked for.
    known = (tensor for tensor in figures.tensors if tensor.mean is not None)
    return heapq.nsmallest(count, known, key=lambda tensor: tensor.mean or 0.0)


def reading(nbytes: int, seconds: float) -> tuple[str, str]:
    """Return how much was read, and how fast."""
    return shown(nbytes), f"in {seconds:.2f} s ({shown(nbytes / max(seconds, 1e-9))}/s)"


def columns(report: Report) -> Iterator[Column]:
    """Yield the table of checkpoints, whose rows are the inputs, by its columns."""
    inputs, outputs = report.inputs, report.outputs
    paths = (e.path + " (base)" * (e.path == report.base) for e in inputs)
    yield Column("name", "checkpoint", tuple(paths))
    yield Column("file", "format", tuple(entry.format for entry in inputs))
    yield Column("file", "size", tuple(shown(entry.nbytes) for entry in inputs))
    for key in KNOWN:
        values: list[float | None] = [getattr(entry, key) for entry in inputs]
        if any(value is not None for value in values):
            # Of steps all digits count: six would make 1234567 and 1234568 the same.
            cells = (
                f"{v:.6g}" if isinstance(v, float) else "" if v is None else str(v) for v in values
            )
            yield Column("known", key, tuple(cells))
    for output in outputs if len(outputs) <= _MOST_WEIGHTS else ():
        title = "weight" if len(outputs) == 1 else f"in {output.path}"
        yield Column("weight", title, tuple(f"{weight:.4g}" for weight in output.weights))
    for title, figures in (("agrees", report.agreement), ("from base", report.centred)):
        if figures is not None:
            # Figures are those of the averaged inputs, in their order. A path may come twice.
            each = iter(zip(figures.each, figures.errors, strict=True))
            ones = tuple(next(each) if entry.averaged else (None, 0.0) for entry in inputs)
            cells = ("" if mean is None else f"{mean:.3f}" for mean, _ in ones)
            yield Column("agreement", title, tuple(cells), ones)
