"""Every option of a merge, declared once.

A field says what it means, how the command takes it, and whether it is part of an output's
provenance and of the report. The command's parameters, the keywords of `merge_checkpoints`, the
provenance record and the report are derived from these fields. So a new option is one more field
here, and the code that acts on it.
"""

# Without `annotations` of __future__: types that are text would be compiled each time one is asked
# for, and while a file is verified nothing is compiled.

import contextlib
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, fields
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from merge_avg.errors import UsageError

Missing = Literal["error", "skip", "available"]  # of tensors that not every checkpoint has
IntPolicy = Literal["error", "template", "max", "mean"]  # of integers that differ
# Dtypes that averaged float tensors can be converted to: every format, and every torch, holds them.
FloatName = Literal["float64", "float32", "float16", "bfloat16"]
ResultDtype = Literal[FloatName, "template"]  # or the one that each tensor has in the template
Mode = Literal["min", "max"]  # whether a metric is better where it is lower, or higher
Doubt = Literal["drifted", "strangers"]  # verdicts on a mean that may not work, the worst last
DOUBTS = get_args(Doubt)
Recipe = Literal["greedy"]  # how a soup chooses its members

Weight = int | float | Fraction | str
MOST_BITS = 14_000  # of weights as integers: records hold them in decimal, and `int` takes 4,300
Location = str | os.PathLike[str]
Outputs = Location | Mapping[str, Sequence[Weight]] | Mapping[Path, Sequence[Weight]]
Bounds = tuple[int | None, int | None, int | None]  # first, last, and a divisor
Share = tuple[int, int]  # the number of a part, from 1, and how many there are
MOST_PARTS = 10_000


@dataclass(frozen=True)
class Meaning:
    """The meaning of a field of an options class."""

    help: str  # one or two sentences, for the command's help and the library's documentation
    metavar: str | None = None  # what stands for the value in the command's help
    names: tuple[str, ...] = ()  # how the command spells it, where that is not the field's name
    parse: Callable[[str], Any] | None = None  # turns the command's text into the value
    recorded: bool = False  # it decides which bytes are written, and is part of the provenance
    reported: bool = False  # the report lists it among the policies
    command: bool = True  # the command has it


def option(default: Any, help: str, **meaning: Any) -> Any:  # noqa: A002 - as in typer
    """Return a dataclass field that carries its `Meaning`."""
    return field(default=default, metadata={"meaning": Meaning(help, **meaning)})


def recorded(default: Any, help: str, **meaning: Any) -> Any:  # noqa: A002
    """Return an option that decides which bytes are written; the report has it too."""
    return option(default, help, recorded=True, **{"reported": True, **meaning})


def meanings(cls: type) -> Iterator[tuple[str, Meaning]]:
    """Yield the name and the meaning of each option of a class, in the order of its fields."""
    for one in fields(cls):
        if "meaning" in one.metadata:
            yield one.name, one.metadata["meaning"]


def choices(cls: type, name: str) -> tuple[str, ...]:
    """Return the values that a field of a Literal type may have; none where any text may stand."""
    (hint,) = (one.type for one in fields(cls) if one.name == name)
    kinds = () if str in get_args(hint) else (hint, *get_args(hint))  # it may be None, too
    return next((get_args(one) for one in kinds if get_origin(one) is Literal), ())


def suggested(word: str, words: Iterable[str], otherwise: str | None = None) -> str | None:
    """Return the hint for a word that may be a misspelt one of some, or another hint."""
    from difflib import get_close_matches  # which takes time squared in the lengths

    close = get_close_matches(word[:99], [one[:99] for one in itertools.islice(words, 999)], 1, 0.8)
    return f"did you mean {close[0]}?" if close else otherwise


def instead(path: str, hint: str | None) -> str | None:
    """Return what to do about a path that leads nowhere, where nothing better is known."""
    if path.startswith("~") and not os.path.lexists(path):  # then mkdir ~ would be a bad hint
        return f"the shell expands ~ outside of quotes only; write {Path(path).expanduser()}"
    if hint and re.match(r"\w+:/", path) and hint.startswith("create it"):
        return "outputs are written on this machine only; name a file here, and upload it"
    if not path or hint or os.path.lexists(path):
        return hint
    if re.match(r"\w{2,}:/", path):  # C:/ is a drive
        return "only files of this machine are read; download it first"
    folder, name = os.path.split(path)
    if re.fullmatch(r"[\w-]+/[\w-]+(\.v?\d[\w-]*)*", path) and not os.path.lexists(folder):
        return f"if it is a model of the Hugging Face Hub: hf download {path} --local-dir {name}"
    with contextlib.suppress(OSError):
        return suggested(name, [one.name for one in Path(folder).iterdir()])
    return None


_DTYPES = get_args(ResultDtype)
_SHORT = {"fp64": "float64", "fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_SHORT |= {"double": "float64", "float": "float32", "half": "float16"}


def parse_dtype(text: str) -> str:
    """Return the name of a dtype that is written in full, or as in fp16, bf16 and half."""
    name = text.lower().removeprefix("torch.")
    name = _SHORT.get(name, name)
    if name not in _DTYPES:
        hint = suggested(name, _DTYPES, f"choose one of {', '.join(_DTYPES)}")
        raise UsageError(f"--dtype: {text!r} is not a dtype to write", hint=hint)
    return name


# As ls and dd take them: a letter alone and KiB count in powers of 1024, kB in powers of 1000.
_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _UNITS |= {_letter: 1024**_power, f"{_letter}IB": 1024**_power, f"{_letter}B": 1000**_power}


def parse_size(text: str) -> int:
    """Return the bytes in a text such as 512MiB, 2GB or 1.5G; K, M, G and T are powers of 1024."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?(?:I?B)?)", text.strip().upper())
    nbytes = float(match[1]) * _UNITS.get(match[2], 0) if match else 0
    if not 1 <= nbytes < 1 << 63:
        hint = "write a number and a unit, such as 512MiB or 2GB"
        raise UsageError(f"{text!r} is not a size", hint=hint)
    return int(nbytes)


def parse_range(text: str) -> Bounds:
    """Return the bounds in "A:B" or "A:B:EVERY"; each may be left out, and one number is both."""
    parts = text.split(":")
    try:
        bounds = [int(part) if part.strip() else None for part in parts]
    except ValueError:
        bounds = []
    if len(bounds) == 1 and bounds[0] is not None:
        bounds *= 2
    if not 2 <= len(bounds) <= 3 or any(bound is not None and bound < 0 for bound in bounds):
        hint = "write it as 1000:5000, 1000: or 1000:5000:500"
        raise UsageError(f"the range {text!r} is not understood", hint=hint)
    first, last, every = [*bounds, None][:3]
    if every == 0 or (first is not None and last is not None and first > last):
        raise UsageError(f"the range {text!r} is empty", hint="write it as FIRST:LAST[:EVERY]")
    return first, last, every


def parse_sliding(text: str) -> tuple[int, int]:
    """Return how many neighbours an average has, and the stride, in "K" or "K:STRIDE"."""
    match = re.fullmatch(r"([0-9]{1,9})(?::([0-9]{1,9}))?", text.strip())
    size, stride = (int(match[1]), int(match[2] or 1)) if match else (0, 0)
    if size < 2 or stride < 1:
        hint = "write how many checkpoints go into each, as in 10, or 10:5 for every fifth"
        raise UsageError(f"the window {text!r} is not understood", hint=hint)
    return size, stride


def parse_lora(text: str) -> str:
    """Return how adapters are averaged, where it is written as it should be."""
    if text not in ("factors", "exact") and not re.fullmatch(r"rank:[1-9][0-9]{0,5}", text):
        hint = "write factors, exact, or a rank as in rank:8"
        raise UsageError(f"there is no way {text!r} to average adapters", hint=hint)
    return text


def parse_part(text: str) -> Share:
    """Return the numbers of a part such as 2/4: which one, and of how many."""
    match = re.fullmatch(r"(\d{1,5})/(\d{1,5})", text.strip())
    number, of = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= number <= of <= MOST_PARTS:
        hint = "write it as 2/4, the second of four"
        raise UsageError(f"{text!r} is not a part", hint=hint)
    return number, of


def numbers(given: Any) -> list[Weight]:
    """Return weights as a list; TypeError for a value that is not several or has no order."""
    if isinstance(given, str):
        return [*given.split(",")]
    if isinstance(given, Mapping | AbstractSet) or not isinstance(given, Iterable):
        raise TypeError(f"weights must be a list of numbers, not {type(given).__name__}")
    return [one.item() if hasattr(one, "detach") else one for one in given]


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to merge: what is averaged, what is written, and with which means.

    The recorded options come first: the order of fields is that of the provenance record, whose
    bytes must not change. A new one goes to their end.
    """

    weights: Sequence[Weight] | None = option(
        None,
        "One number per checkpoint, of any sum; negative only without `normalize`. By default all "
        "count the same.",
        command=False,  # where `Weighting` has them
    )
    normalize: bool = recorded(True, "Divide the weighted sum by the sum of the weights.")
    # Any text, so that the library's callers need no cast; `prepare` refuses what is not a dtype.
    dtype: ResultDtype | str | None = recorded(
        None,
        "Convert to float64, float32, float16 or bfloat16; template: where checkpoints differ.",
        metavar="DTYPE",
        parse=parse_dtype,
    )
    key: str | None = recorded(
        None, "Average only this state dict, as in state_dict_ema.", metavar="PATH"
    )
    missing: Missing = recorded(
        "error", "Tensors that some checkpoint lacks: refuse, skip, or average where present."
    )
    int_policy: IntPolicy = recorded(
        "error", "Integers that differ; error spares counters, which are the template's."
    )
    # The older name of `weights_only`, by which the records of files know it.
    state_dict: bool = recorded(False, "The same as `weights_only`.", command=False)
    allow_nonfinite: bool = recorded(False, "Average NaN and infinity too.")
    max_shard_size: int | None = recorded(
        None,
        "Write a directory of shards of at most this size, as in 5GB.",
        metavar="SIZE",
        parse=parse_size,
        reported=False,
    )
    include: Sequence[str] = recorded(
        (), "Average only tensors with such names, as in 'enc.*'.", metavar="PATTERN"
    )
    exclude: Sequence[str] = recorded(
        (), "Keep tensors with such names from the template.", metavar="PATTERN"
    )
    weights_only: bool = recorded(
        False,
        "Write the weights and what is needed to serve them, without optimizer or other training "
        "state.",
        names=("--weights-only", "--state-dict"),
    )
    weights_for: Sequence[str] = recorded(
        (),
        "Other weights for tensors with such names, as in 'head.*=1,0'.",
        metavar="PATTERN=W,W,...",
    )
    lora: str = recorded(
        "factors",
        "Of adapters, average the factors, or what they do: exact, or as well as rank:R can.",
        metavar="HOW",
        parse=parse_lora,
    )
    # For the command a text, not a path: Path("./3") would be "3", the third checkpoint.
    template: Location | int | None = option(
        None,
        "Copy checkpoint number N, or one that is not averaged, instead of the newest or first.",
        metavar="N|PATH",
    )
    base: Location | None = option(
        None,
        "The checkpoint that the others were fine-tuned from: compare what they changed.",
        metavar="CHECKPOINT",
    )
    min_agreement: float | None = option(
        None, "Refuse checkpoints whose verdict has a lower number.", metavar="X"
    )
    fail_on: Doubt | None = option(None, "Refuse checkpoints with this verdict, or a worse one.")
    agreement: bool = option(True, "Measure how far checkpoints agree.")
    hashes: bool = option(True, "Record hashes of the checkpoints.")
    strict_pickle: bool = option(
        False, "Refuse a template that calls what is not known to be harmless when it is loaded."
    )
    overwrite: bool = option(
        False, "Replace the output if it exists.", names=("--overwrite", "--force", "-f")
    )
    device: str = option(
        "cpu", "Where sums are kept: cpu, cuda or cuda:N.", metavar="DEVICE", reported=True
    )
    threads: int | None = option(
        None, "Number of threads; by default one per core, up to 8.", metavar="N"
    )
    max_memory: int | None = option(
        None,
        "Memory to take beside torch's own, as in 32MiB; 64MiB by default.",
        metavar="SIZE",
        parse=parse_size,
    )
    resume: bool = option(False, "Go on with what an earlier run left, after it was stopped.")
    part: Share | None = option(
        None,
        "Make part I of N, on any machine at any time; the last to be made finishes.",
        metavar="I/N",
        parse=parse_part,
    )
    finish: bool = option(False, "Finish from parts that are all made.")

    @property
    def shared(self) -> bool:
        """Return whether a merge goes on with what other processes left, or leaves it to them."""
        return self.resume or self.part is not None or self.finish


RECORDED = tuple(name for name, meaning in meanings(Options) if meaning.recorded)
REPORTED = tuple(name for name, meaning in meanings(Options) if meaning.reported)


@dataclass(frozen=True, kw_only=True)
class Criteria:
    """Which of the checkpoints found are wanted; None where nothing is asked for."""

    last: int | None = None  # for the command, the largest of `Series.lasts`
    best: int | None = option(None, "The best N by --metric.", metavar="N")
    metric: str | None = option(None, "The metric that decides, as in val_loss.", metavar="NAME")
    mode: Mode | None = option(
        None, "Whether lower or higher is better, where that is not obvious."
    )
    steps: Bounds | None = option(
        None, "Only checkpoints of these steps.", metavar="A:B[:EVERY]", parse=parse_range
    )
    epochs: Bounds | None = option(
        None, "Only checkpoints of these epochs.", metavar="A:B", parse=parse_range
    )
    min_interval: int | None = option(
        None, "Minimum number of steps between chosen checkpoints.", metavar="N"
    )
    metrics_file: Path | None = option(
        None,
        "A log of metrics: CSV, JSON, JSONL or TensorBoard.",
        metavar="FILE",
        names=("--metrics",),
        parse=Path,
    )
    one_best_per_fold: bool = option(False, "The best of each of the folders, as in fold*/.")
    allow_trivial: bool = option(
        False, "Allow a single checkpoint, and the same one more than once."
    )

    @property
    def empty(self) -> bool:
        """Return whether nothing is asked for, so that all are taken."""
        return self == Criteria(mode=self.mode, allow_trivial=self.allow_trivial)


@dataclass(frozen=True, kw_only=True)
class Series:
    """Which averages to make, where more than one is wanted."""

    lasts: tuple[int, ...] = option(
        (),
        "The last N by step or epoch; twice: two averages.",
        metavar="N",
        names=("--last",),
    )
    leave_one_out: bool = option(False, "An average without each checkpoint, in one reading.")
    prefixes: bool = option(False, "Averages of the first 2, 3, ... N, in one reading.")
    sliding: tuple[int, int] | None = option(
        None,
        "Averages of each K neighbours by age, in one reading.",
        metavar="K[:STRIDE]",
        parse=parse_sliding,
    )

    @property
    def several(self) -> bool:
        """Return whether there is more than one output."""
        return bool(self.leave_one_out or self.prefixes or self.sliding or len(self.lasts) > 1)


@dataclass(frozen=True, kw_only=True)
class Weighting:
    """How much of each checkpoint: numbers, or a scheme, or a width for post-hoc EMA; or equal."""

    weights: Sequence[Weight] | None = option(
        None,
        "One number per checkpoint, of any sum; negative only with --no-normalize.",
        metavar="W,W,...",
        names=("--weights", "-w"),
        parse=numbers,
    )
    scheme: str | None = option(
        None,
        "Weights by age: uniform, linear, ema:DECAY, 1-sqrt, power:SIGMA; or metric.",
        metavar="SCHEME",
        names=("--weighting",),
    )
    sigma: float | None = option(
        None,
        "Weights that make an EMA of this width from stored ones (EDM2).",
        metavar="SIGMA",
        names=("--phema",),
    )
