"""The report in words: facts and a table for all who show it, and both as lines or as Markdown."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from merge_avg.agreement import LEAST_AGREEMENT, Agreement, TensorAgreement
from merge_avg.errors import MergeError, counted, named
from merge_avg.report import aligned, printable, shown
from merge_avg.report.values import KNOWN, Report, relative_errors
from merge_avg.selection import Candidate

T = TypeVar("T")
Style = Literal["", "good", "doubtful"]
# Outputs up to which each has a column of weights; of more, the facts alone have the weights.
_MOST_WEIGHTS = 6
_MOST_NAMES = 8
MOST_ROWS = 16  # of checkpoints
# So many tensors are named at most, and only where the checkpoints agree so much less about them.
_LEAST = 3
_LESS = 0.05
# Labels that are not the first words of a sentence, as in "kept from a.pt: epoch".
_COLON = ("integers", "left out", "note", "warning")
_BAR = 20
_MOST_BARS = 16
# Cosines that lie nearer together have bars that look alike.
_SPREAD = 0.05


@dataclass(frozen=True, slots=True)
class Fact:
    """One thing to say, in a few words; a label may come more than once."""

    label: str
    value: str
    style: Style = ""


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the table of checkpoints, with a cell for each input."""

    title: str
    cells: tuple[str, ...]
    cosines: tuple[tuple[float | None, float], ...] = ()  # that the cells show, and their errors


def headline(report: Report) -> str:
    """Return the one sentence that stands above all others."""
    outputs = report.outputs
    done = "would average" if report.result is None else "averaged"
    if report.part is not None:
        done = f"made part {report.part.number} of {report.part.of}, averaging"
    where = outputs[0].path if len(outputs) == 1 else counted(len(outputs), "average")
    return f"{done} {counted(len(report.averaged), 'checkpoint')} into {where}"


def facts(report: Report, most: int = _MOST_NAMES) -> Iterator[Fact]:
    """Yield all there is to say beside the headline and the table of checkpoints.

    Of the entries that are kept, at most `most` are named.
    """
    if report.verdict is not None:
        verdict = report.verdict
        why = f"; {verdict.reason}" if verdict.reason else ""
        kind: Style = "good" if verdict.word == "agree" else "doubtful"
        yield Fact("verdict", f"{verdict.word} ({verdict.number:.3f}{why})", kind)
    parameters = f"{report.parameters:,} parameters ({', '.join(report.dtypes)})"
    if report.part is not None and report.result is not None:
        missing = ", ".join(map(str, report.part.missing[:_MOST_NAMES]))
        missing += f" and {len(report.part.missing) - _MOST_NAMES:,} more" * (
            len(report.part.missing) > _MOST_NAMES
        )
        yield Fact("missing", f"part {missing}" if missing else "nothing: another run finishes it")
        yield Fact("read", " ".join(reading(report.result.nbytes, report.result.seconds)))
        yield from messages(report)
        return
    done, written = ("averaged", "written") if report.result else ("would average", "would write")
    yield Fact(done, f"{counted(report.tensors['averaged'], 'tensor')}, {parameters}")
    # A single output is in the headline, and its weights are in the table.
    if len(report.outputs) > 1:
        for number, output in enumerate(report.outputs):
            weights = shortened(weights_of(report, number), lambda left: f"({left} more)")
            yield Fact(written, f"{output.path} (weights {', '.join(weights)})")
    yield from _integers(report)
    if report.result is not None and report.result.errors:
        total, each = relative_errors(report.result.errors)
        worst = max(each, key=each.__getitem__)
        largest = f"; the largest {each[worst]:.3g} of {worst!r}" if len(each) > 1 else ""
        yield Fact("nearly", f"the mean: the relative error is {total:.3g}{largest}")
    kept = [
        f"{entry.key} ({counted(entry.tensors, 'tensor')}, {shown(entry.nbytes)})"
        for entry in report.kept
    ]
    if names := [*kept, *report.others]:
        more = f" and {len(names) - most:,} more" if len(names) > most else ""
        what = ", ".join(names[:most]) + more
        label = "kept" if report.whole else "left out"
        yield Fact(label, f"from {report.template}: {what}" if report.whole else what)
    if report.left_out:
        files = f"{counted(len(report.left_out), 'file')}, {shown(sum(report.left_out.values()))}"
        yield Fact("left out", f"{files}: {named(report.left_out, most)}")
    if report.callables:
        calls = named(report.callables, most)
        yield Fact("loading", f"it, like {report.template}, calls {calls}", "doubtful")
    yield from _agreement(report)
    if report.result is None:
        size = shown(report.bytes_to_read)
        yield Fact("would read", f"{size} and write {shown(report.bytes_to_write)}")
        memory = f"{report.memory / (1 << 20):.0f} MiB of memory"
        threads = counted(report.threads, "thread")
        yield Fact("would take", f"at most {memory} beside torch's own, with {threads}")
        for one in report.shares or ():
            takes = f"and take at most {one.memory / (1 << 20):.0f} MiB"
            yield Fact(f"share {one.number}", f"would read {shown(one.nbytes)} {takes}")
    else:
        yield Fact("read", " ".join(reading(report.result.nbytes, report.result.seconds)))
        yield from _ranks(report)
    yield from messages(report)


def _ranks(report: Report) -> Iterator[Fact]:
    worked = sorted((one for one in report.ranks or () if one.nbytes), key=lambda one: one.rate)
    if not worked or report.ranks is None:
        return
    slow, fast = worked[0], worked[-1]
    rates = (f"{one.rank} on {one.host} ({shown(one.rate)}/s)" for one in (slow, fast))
    yield Fact("ranks", "{}; slowest {}, fastest {}".format(len(report.ranks), *rates))


def messages(report: Report) -> Iterator[Fact]:
    """Yield the notes, then the warnings."""
    for name, number in list(report.available.items())[:_MOST_NAMES]:
        many = f"{number} of {len(report.averaged)} checkpoints"
        yield Fact("note", f"{name!r} is averaged over {many}")
    compared = report.agreement is not None and report.base is not None
    whole = report.result is None or not report.result.job.plan.composites
    if compared and whole and report.centred is None:
        yield Fact("note", f"no two checkpoints differ from {report.base}")
    yield from (Fact("note", text) for text in report.notes)
    if report.result is not None and report.result.nonfinite:
        names = named(report.result.nonfinite)
        yield Fact("warning", f"NaN or infinity in {names}", "doubtful")
    word = "agree" if report.verdict is None else report.verdict.word
    for text in report.warnings:
        strict = f" (--fail-on {word} makes it an error)" if text.startswith(f"{word}:") else ""
        yield Fact("warning", text + strict, "doubtful")


def weights_of(report: Report, number: int) -> list[str]:
    """Return the weights in an output, without that of a base that is not averaged."""
    weights = report.outputs[number].weights
    some = ((report.inputs[i], weights[i]) for i in in_order(report))
    return [f"{w:.4g}" for entry, w in some if entry.averaged or entry.path != report.base]


def in_order(report: Report) -> list[int]:
    """Return the numbers of the inputs as they were chosen: by age, or as they were named."""
    places = {str(one.path): number for number, (one, _) in enumerate(report.candidates)}
    # What was not chosen among others is the template, which comes first, or a base.
    places = {entry.path: places.get(entry.path, len(places)) for entry in report.inputs}
    if report.candidates and not any(
        str(one.path) == report.template for one, _ in report.candidates
    ):
        places[report.template] = -1
    return sorted(range(len(report.inputs)), key=lambda i: places[report.inputs[i].path])


def shortened(rows: Sequence[T], rest: Callable[[int], T], most: int = MOST_ROWS) -> list[T]:
    """Return rows, of which those in the middle are one row if there are too many."""
    if len(rows) <= most:
        return [*rows]
    left = len(rows) - most + 1
    return [*rows[: most // 2], rest(left), *rows[most // 2 + left :]]


def _integers(report: Report) -> Iterator[Fact]:
    differing = () if report.result is None else report.result.differing
    rest = report.tensors["integers"] - len(differing)
    if rest:
        what = "to compare" if report.result is None else "equal everywhere, copied"
        yield Fact("integers", f"{counted(rest, 'tensor')} {what}")
    if differing:
        taken = {"max": "the largest value", "mean": "the rounded mean"}
        how = taken.get(report.policies["int_policy"], "the template's value")
        many = f"{counted(len(differing), 'tensor')} with different values"
        yield Fact("integers", f"{many}, {how} taken: {named(differing)}")


def _agreement(report: Report) -> Iterator[Fact]:
    agreement = report.agreement
    if agreement is None:
        return
    what = f"({precision(agreement)}; mean cosine between the checkpoints' matrices)"
    yield Fact("agreement", f"{agreement.mean:.3f} {what}", style(agreement.mean))
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
    order, outputs = in_order(report), report.outputs
    inputs = [report.inputs[i] for i in order]
    names = (entry.path + " (base)" * (entry.path == report.base) for entry in inputs)
    yield Column("checkpoint", tuple(names))
    yield Column("format", tuple(entry.format for entry in inputs))
    yield Column("size", tuple(shown(entry.nbytes) for entry in inputs))
    for key in KNOWN:
        values: list[float | None] = [getattr(entry, key) for entry in inputs]
        if any(value is not None for value in values):
            # Of steps all digits count: six would make 1234567 and 1234568 the same.
            cells = (
                f"{v:.6g}" if isinstance(v, float) else "" if v is None else str(v) for v in values
            )
            yield Column(key, tuple(cells))
    for output in outputs if len(outputs) <= _MOST_WEIGHTS else ():
        title = "weight" if len(outputs) == 1 else f"in {output.path}"
        yield Column(title, tuple(f"{output.weights[i]:.4g}" for i in order))
    for title, figures in (("agrees", report.agreement), ("from base", report.centred)):
        if figures is not None:
            # Figures are those of the averaged inputs, in their order. A path may come twice.
            each = iter(zip(figures.each, figures.errors, strict=True))
            known = [next(each) if entry.averaged else (None, 0.0) for entry in report.inputs]
            ones = tuple(known[i] for i in order)
            cells = ("" if mean is None else f"{mean:.3f}" for mean, _ in ones)
            yield Column(title, tuple(cells), ones)


def lines(report: Report) -> Iterator[str]:
    """Yield the report, a line at a time. Names in it may hold controls: see `printable`."""
    yield headline(report)
    yield from _chosen(report)
    for fact in facts(report):
        yield f"  {fact.label}{':' * (fact.label in _COLON)} {fact.value}"
        if fact.label == "agreement" and report.agreement is not None:
            yield from _bars(report.averaged, report.agreement.each)


def _chosen(report: Report) -> Iterator[str]:
    """Yield a line for each checkpoint with its weight, and for those left out with the reason."""
    looked_at = [*report.candidates]
    if not looked_at:
        averaged = [entry for entry in report.inputs if entry.averaged]
        looked_at = [(Candidate(Path(entry.path)), entry.weight) for entry in averaged]
    chosen = [_candidate(*pair) for pair in looked_at if pair[0].chosen]
    left = [_candidate(*pair) for pair in looked_at if not pair[0].chosen]
    blank = [""] * (len(KNOWN) + 2)
    rows = shortened(chosen, lambda more: ["", f"... {more:,} more ...", *blank])
    if not left:  # then it goes without saying which are chosen, and why
        rows = [row[1:-1] for row in rows]
    for line in aligned([*rows, *(left if len(left) <= MOST_ROWS else ())]):
        yield f"  {line}"
    for why, count in left_out(report) if len(left) > MOST_ROWS else ():
        yield f"  - {count:,} more: {why}"


def left_out(report: Report) -> list[tuple[str, int]]:
    """Return why candidates are left out, and how many, the most frequent reason first."""
    whys = (one.why.partition(":")[0] for one, _ in report.candidates if not one.chosen)
    return Counter(whys).most_common()


def _candidate(one: Candidate, weight: float | None) -> list[str]:
    known = ((key, getattr(one, key)) for key in KNOWN)
    return [
        "+" if one.chosen else "-",
        str(one.path),
        *("" if value is None else f"{key} {value:.10g}" for key, value in known),
        "" if weight is None else f"weight {weight:.4g}",
        one.why,
    ]


def _bars(paths: Sequence[str], each: Sequence[float | None]) -> Iterator[str]:
    """Yield a line for each checkpoint where there are few and they differ."""
    known = [(path, one) for path, one in zip(paths, each, strict=True) if one is not None]
    means = [mean for _, mean in known]
    if len(known) <= _MOST_BARS and max(means) - min(means) >= _SPREAD:
        rows = [(path, f"{mean:6.3f}", "#" * round(_BAR * max(mean, 0.0))) for path, mean in known]
        for line in aligned(rows):
            yield f"    {line}"


def markdown(report: Report) -> str:
    """Return the report of a merge that ran in GitHub's Markdown. Names in it stay names."""
    table = [column for column in columns(report) if column.title != "format"]
    written = [("written", report.outputs[0].path)] if len(report.outputs) == 1 else []
    told = written + [(fact.label, fact.value) for fact in facts(report)]
    cells = [[*row] for row in zip(*(column.cells for column in table), strict=True)]
    rows = shortened(cells, lambda more: [f"... {more:,} more ...", *[""] * (len(table) - 1)])
    head = [column.title for column in table]
    return section(f"{counted(len(report.averaged), 'checkpoint')} averaged", told, [head, *rows])


def section(title: str, told: Iterable[tuple[str, str]], rows: Sequence[Sequence[str]] = ()) -> str:
    """Return a table, whose first row is its head, and a list of labels and values in Markdown."""
    loud = {label: f"**{label}**" for label in ("error", "warning")}
    table = (
        [_row(rows[0]), _row(["---" for _ in rows[0]]), *map(_row, rows[1:]), ""] if rows else []
    )
    items = (f"- {loud.get(label, label)}: {_escaped(value)}" for label, value in told)
    return "\n".join([f"### merge-avg: {title}", "", *table, *items, ""])


def append(path: Path, text: str) -> None:
    """Add text to a file, such as the one that GITHUB_STEP_SUMMARY names, or raise a MergeError."""
    # Other steps of the job have written to the same file, so it is added to.
    try:
        if path.is_file():  # of a pipe nothing could be read
            with path.open("rb") as file:
                if b"\0" in file.read(1 << 12):  # as in every checkpoint
                    raise MergeError("no summary was written, for it holds no text", where=path)
        with path.open("a", encoding="utf-8", newline="\n") as file:
            file.write(text)
    except OSError as error:
        raise MergeError(f"no summary was written ({error.strerror})", where=path) from None


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(_escaped, cells))} |"


def _escaped(value: str) -> str:
    """Return text in which nothing means more than itself in Markdown, HTML or a terminal."""
    # On GitHub an "@" would notify somebody, and a "#" link to an issue.
    return "".join(f"&#{ord(c)};" if c in "|`*_<>[]\\&#!~@" else c for c in printable(value))
