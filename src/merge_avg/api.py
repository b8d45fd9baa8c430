"""The functions for files: what the command does, with its options as keywords."""

from __future__ import annotations

import contextlib
import inspect
import os
import re
import reprlib
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from importlib import import_module
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec

from merge_avg.brief import Brief
from merge_avg.engine import Opened, Result, run
from merge_avg.errors import (
    NAMES,
    MergeError,
    MergeWarning,
    UsageError,
    counted,
    in_keywords,
    named,
)
from merge_avg.options import (
    Criteria,
    Location,
    Options,
    Outputs,
    ResultDtype,
    Series,
    Weight,
    Weighting,
    choices,
    instead,
    meanings,
    numbers,
    option,
    parse_dtype,
    parse_range,
    parse_sliding,
    suggested,
)
from merge_avg.plan import Job, prepare, refuse_inputs
from merge_avg.report.inspect import Contents, contents
from merge_avg.report.values import notes_of
from merge_avg.selection import Candidate, Choice, choose, expand, refuse_place, refuse_trivial

if TYPE_CHECKING:
    import torch

P = ParamSpec("P")
Places = Location | Iterable[Location]
_META = {one.name: one.metadata for cls in (Options, Series, Weighting) for one in fields(cls)}
_KINDS: tuple[tuple[str, Any, str], ...] = (  # how a type begins, what fits it, and in words
    ("bool", bool, "True or False"),
    ("int | None", Integral, "a whole number"),
    ("float", Real, "a number"),
    ("str | os.PathLike[str] | int", (str, os.PathLike, Integral), "a path or a number"),
    ("str | os.PathLike[str] | N", (str, os.PathLike), "a path"),
    ("pathlib.", os.PathLike, "a path"),  # in Python 3.13 pathlib._local.Path
    ("str", str, "a text"),
    ("tuple", tuple, "a range, such as (1000, 5000)"),
    ("collections.abc.Sequence", Iterable, "a text, or several"),
)
_NOWHERE = Path(os.devnull)  # an output that is none of the checkpoints


@contextlib.contextmanager
def _hinted() -> Iterator[None]:
    """Give an error about a path that leads nowhere the hint that the command has."""
    try:
        yield
    except MergeError as error:
        error.hint = instead(error.where or "", error.hint)
        raise


@dataclass(frozen=True, kw_only=True)
class _Selecting(Criteria):
    last: int | None = option(None, "The last N by step or epoch.")
    weighting: str | None = field(default=None, metadata=_META["scheme"])
    phema: float | None = field(default=None, metadata=_META["sigma"])

    @property
    def series(self) -> Series:
        return Series(lasts=() if self.last is None else (self.last,))

    @_hinted()
    def choose(
        self,
        paths: Places,
        output: Any = _NOWHERE,
        weights: Any = None,
        *,
        listed: bool = False,
    ) -> Choice:
        values = {one.name: getattr(self, one.name) for one in fields(Criteria)}
        criteria = Criteria(**values | {"last": max(self.series.lasts, default=None)})
        weighting = Weighting(weights=weights, scheme=self.weighting, sigma=self.phema)
        return choose(_listed(paths), Path(output), criteria, self.series, weighting, listed=listed)


@dataclass(frozen=True, kw_only=True)
class _Merging(Options, _Selecting):
    last: int | Sequence[int] | None = option(  # type: ignore[assignment]
        None, "The last N by step or epoch; or several such averages."
    )
    leave_one_out: bool = field(default=False, metadata=_META["leave_one_out"])
    prefixes: bool = field(default=False, metadata=_META["prefixes"])
    sliding: Any = field(default=None, metadata=_META["sliding"])
    weights: Any = field(default=None, metadata=_META["weights"])
    dtype: ResultDtype | str | torch.dtype | None = field(  # type: ignore[assignment]
        default=None, metadata=_META["dtype"]
    )
    progress: bool | Callable[[int, int], object] = False

    @property
    def series(self) -> Series:
        given = [] if self.last is None else self.last
        lasts = tuple(given) if isinstance(given, Sequence) else (given,)
        numeric = all(isinstance(one, Integral) for one in lasts) and bool not in map(type, lasts)
        if self.last is not None and not (lasts and numeric):
            raise TypeError(f"last must be a number or several, not {self.last!r}")
        values = {one.name: getattr(self, one.name) for one in fields(Series)[1:]}
        return Series(lasts=lasts, **values)


@dataclass(frozen=True, repr=False)
class Selection(Brief):
    """The chosen checkpoints with their weights, and all that were looked at, if any was found."""

    paths: tuple[Path, ...]
    weights: tuple[Weight, ...]
    candidates: tuple[Candidate, ...]
    notes: tuple[str, ...]  # for the user, one sentence each

    def brief(self) -> Iterator[str]:
        """Yield which checkpoints are chosen, with what share, which are not, and why."""
        yield counted(len(self.paths), "checkpoint")
        yield from (f"note: {text}" for text in self.notes)
        weights = dict(zip(self.paths, map(float, self.weights), strict=True))
        total = sum(weights.values()) or 1
        for one in self.candidates or map(Candidate, self.paths):
            share = f"weight {weights[one.path] / total:.3g}, " if one.chosen else ""
            yield f"{'+' if one.chosen else '-'} {one.path}: {share}{one.why}"


def _listed(given: Any) -> list[Location]:
    """Return the paths that a caller gave, or raise an error that says what is expected."""
    # A set has no order, and of a dict of tensors the values would be lost.
    single = isinstance(given, str | bytes | dict | set | frozenset)
    listed = list(given) if isinstance(given, Iterable) and not single else [given]
    for path in listed:
        models = "; AverageModelMerger averages models" if hasattr(path, "state_dict") else ""
        _check(path, "paths must be a path or several, such as a list or a pattern", models)
    return listed


def _check(path: Any, expected: str, more: str = "") -> None:
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"{expected}, not {type(path).__name__}{more}")
    if not os.fspath(path):
        raise UsageError("a path is empty", hint="the current directory is '.'")


def _understood(cls: Any, given: dict[str, Any]) -> Any:
    """Return options with the values of keywords; texts that the command takes are parsed."""
    types = {one.name: str(one.type).removeprefix("<class '") for one in fields(cls)}
    for name in given.keys() - types.keys():
        close = f"did you mean {NAMES[name]}?" if name in NAMES else suggested(name, types)
        raise TypeError(f"there is no keyword {name!r}; {close or 'see help()'}")
    for name, meaning in meanings(cls):
        value, allowed = given.get(name, getattr(cls, name)), choices(cls, name)
        if value is getattr(cls, name):
            continue
        if meaning.parse in (parse_range, parse_sliding) and isinstance(value, int | tuple | list):
            bounds = [value] if isinstance(value, int) else value
            value = ":".join("" if bound is None else str(bound) for bound in bounds)
        if meaning.parse is parse_dtype or name == "device":
            value = str(value)  # of torch too
        if meaning.parse and (isinstance(value, str) or meaning.parse is numbers):
            value = meaning.parse(value)
        elif isinstance(value, str) and getattr(cls, name) == ():
            value = (value,)
        elif name == "weights_for" and isinstance(value, Mapping):
            value = [f"{key}={','.join(map(str, numbers(row)))}" for key, row in value.items()]
        if allowed and value not in allowed:
            raise UsageError(f"{name} is {value!r}", hint=f"choose one of {', '.join(allowed)}")
        given[name] = _fitting(name, value, types[name])
    return cls(**given)


def _fitting(name: str, value: Any, kind: str) -> Any:
    """Return the value of a keyword, or raise TypeError for one that does not fit its type."""
    for start, fits, expected in _KINDS:
        if kind.startswith(start):
            if fits is Integral and isinstance(value, float) and value.is_integer():
                value = int(value)  # as of 2e9
            if isinstance(value, bool) is not (fits is bool) or not isinstance(value, fits):
                raise TypeError(f"{name} must be {expected}, not {reprlib.repr(value)}")
            break
    return value


@contextlib.contextmanager
def _bar() -> Iterator[Callable[[int, int], object]]:
    from rich.console import Console
    from rich.progress import Progress

    console, due = Console(stderr=True), 0.0

    def said(done: int, total: int) -> dict[str, str]:
        text = f"averaging {100 * done // max(total, 1)} %"
        bar = f"<progress value={done} max={total}></progress>"
        return {"text/plain": text, "text/html": f"{bar} {text}"}

    if not console.is_jupyter:
        with Progress(console=console) as bar:
            task = bar.add_task("averaging")
            yield lambda done, total: bar.update(task, completed=done, total=total)
        return
    shown = import_module("IPython.display")  # with which rich could do only by ipywidgets
    handle = shown.display(said(0, 1), display_id=True, raw=True)

    def show(done: int, total: int) -> None:
        nonlocal due
        if done >= total or time.monotonic() > due:
            handle.update(said(done, total), raw=True)
            due = time.monotonic() + 0.1

    yield show


_Merge = Callable[Concatenate[Places, Outputs, P], Result]
_Load = Callable[Concatenate["torch.nn.Module", Places, P], "Loaded"]


def _described(options: Callable[P, Any]) -> Callable[[Callable[..., Result]], _Merge[P]]:
    """Give a function the keywords of options, so that each is declared in one place."""

    def described(function: Any) -> Any:
        *first, _ = inspect.signature(function).parameters.values()
        # Type checkers see the ParamSpec; `help()` and editors see these.
        named = inspect.signature(options).parameters.values()
        function.__signature__ = inspect.Signature([*first, *named])
        helps = ((name, in_keywords(one.help)) for name, one in meanings(options))  # type: ignore[arg-type]
        texts = [f"{name}: {text}" for name, text in helps]
        if function.__doc__:  # not with `python -OO`
            # Since Python 3.13 lines are indented less in a docstring than in its source.
            before, indent, after = re.split(r"( *)options: by name\.", function.__doc__)
            function.__doc__ = before + "\n".join(indent + text for text in texts) + after
        return function

    return described


def _loading(options: Callable[P, Any]) -> Callable[[Callable[..., Loaded]], _Load[P]]:
    return _described(options)  # type: ignore[return-value]


@_described(_Merging)
def merge_checkpoints(paths: Places, output: Outputs, **options: Any) -> Result:
    """Average checkpoints into a new one, in bounded memory.

    The output is a copy of one checkpoint, the template, with its weights replaced by their mean.
    It is the newest where they tell a step or epoch, and else the first. Float and complex tensors
    get the exact weighted mean, rounded once to their dtype; so the result does not depend on the
    order of the checkpoints, nor on threads, memory or device. What may make the mean meaningless
    is in the result's `warnings`, and is raised as `MergeWarning`.

    Args:
        paths: checkpoints of one architecture: files (.pt, .pth, .bin, .ckpt, .safetensors),
            directories, runs that hold many, or patterns; one of these or a list.
        output: the file or directory to write; the ending .safetensors asks for that format. For
            several averages, made in one reading, a pattern: 'avg-{name}.pt'. Or a mapping of
            outputs, with the weights of the checkpoints for each.
        options: by name.
        progress: True for a bar, in a terminal or a notebook; or a function, which is called with
            the bytes read and all there are to read, from any thread.

    Raises:
        MergeError: nothing was written; the message names the file and the tensor.
        UsageError: the options do not fit each other.
        TypeError: an argument is of another kind than is meant.
    """
    asked = _understood(_Merging, options)
    several = isinstance(output, Mapping)
    if several and (asked.weighting or asked.phema or asked.series.several):
        hint = "leave out --weighting, --phema, and what makes several averages"
        raise UsageError("each output has weights of its own", hint=hint)
    places = [*output] if isinstance(output, Mapping) else [output]
    for place in places:
        _check(place, "output must be a path, or a mapping of paths to weights")
    if not (isinstance(asked.progress, bool | None) or callable(asked.progress)):
        raise TypeError(f"progress must be True or a function, not {asked.progress!r}")
    weights = None if several else asked.weights
    listed = several or bool(asked.weights_for)
    choice = asked.choose(paths, *places[:1], weights=weights, listed=listed)
    for place in () if several else places:
        refuse_place(place, choice, asked)
    if not asked.allow_trivial:
        refuse_trivial(choice)
    outputs = choice.outputs
    if isinstance(output, Mapping):
        outputs = {Path(path): numbers(row) for path, row in output.items()}
    for path in outputs if asked.metrics_file else ():
        refuse_inputs(Path(path), (), [asked.metrics_file])
    values = {one.name: getattr(asked, one.name) for one in fields(Options)}
    merging = Options(**values | {"weights": asked.weights if several else None})
    job = prepare(choice.paths, outputs, choice.templated(merging), *choice.scanned)
    return _run(job, choice, asked.progress)


def _run(job: Job, choice: Choice, progress: Any, opened: Opened | None = None) -> Result:
    """Run a merge with its progress, raise its doubts as warnings, and note what else is known."""
    done = 0

    def advance(more: int) -> None:
        nonlocal done
        done += more
        show(done, job.nbytes)

    with _bar() if progress is True else contextlib.nullcontext(progress) as show:
        result = run(job, advance if show else None, opened)
    notes = tuple(map(in_keywords, notes_of(job, result, choice)))
    for text in result.warnings:
        warnings.warn(text, MergeWarning, stacklevel=3)
    return replace(result, notes=notes)


@dataclass(frozen=True, kw_only=True)
class _Loading(Options, _Selecting):
    strict: bool = option(
        default=True, help="Refuse names that only the model, or the checkpoints, have."
    )
    weights: Any = field(default=None, metadata=_META["weights"])
    dtype: ResultDtype | str | torch.dtype | None = field(  # type: ignore[assignment]
        default=None, metadata=_META["dtype"]
    )
    progress: bool | Callable[[int, int], object] = False


@dataclass(frozen=True, repr=False)
class Loaded(Brief):
    """An average that was loaded into a model, and the names that only one of them has."""

    result: Result
    missing_keys: tuple[str, ...]  # of the model, which the checkpoints lack
    unexpected_keys: tuple[str, ...]  # of the checkpoints, which the model lacks

    def brief(self) -> Iterator[str]:
        """Yield what was averaged, and which names have no partner."""
        yield f"{counted(len(self.result.job.averaged), 'checkpoint')} averaged into a model"
        yield from list(self.result.brief())[1:]
        for label in ("missing_keys", "unexpected_keys"):
            names = getattr(self, label)
            yield from [f"{label}: {named(names, 3)}"] if names else []


@_loading(_Loading)
def load_average(model: torch.nn.Module, paths: Places, **options: Any) -> Loaded:
    """Fill a model with the average of checkpoints, in place, with one window beside it in memory.

    Its parameters and persistent buffers, on any device, get what `merge_checkpoints` would write
    for them, bit for bit; those of another dtype get it rounded to theirs. After an error the model
    holds parts of both: load it anew.

    Args:
        model: the module that the checkpoints are of.
        paths: checkpoints, as `merge_checkpoints` takes them.
        options: by name.
        progress: True for a bar, or a function, as `merge_checkpoints` takes it.

    Raises:
        MergeError: names or shapes differ; or as `merge_checkpoints` does.
        UsageError: the options do not fit each other.
        TypeError: an argument is of another kind than is meant.
    """
    from merge_avg.engine.model import ModelSink, match

    if not hasattr(model, "state_dict"):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    asked = _understood(_Loading, options)
    if asked.shared or asked.lora != "factors":
        hint = "leave out --resume, --part, --finish and --lora"
        raise UsageError("a model is filled by one process, from its own tensors", hint=hint)
    with tempfile.TemporaryDirectory(prefix="merge-avg-") as name:
        # An output that is never made: a bare state dict, in which each tensor stands alone.
        place = Path(name) / "average.safetensors"
        listed = bool(asked.weights_for)
        choice = asked.choose(paths, place, weights=asked.weights, listed=listed)
        if not asked.allow_trivial:
            refuse_trivial(choice)
        values = {one.name: getattr(asked, one.name) for one in fields(Options)}
        merging = choice.templated(Options(**values | {"weights": None, "state_dict": True}))
        try:
            job = prepare(choice.paths, choice.outputs, merging, *choice.scanned)
        except MergeError as error:
            if error.where == str(place):  # of an output that nobody asked for
                error.where, error.hint = None, "write a file with merge_checkpoints instead"
            raise
        matched = match(model, job, strict=asked.strict)
        sink = ModelSink(matched, place.parent)
        result = _run(job, choice, asked.progress, lambda _: contextlib.nullcontext(sink))
    return Loaded(result, matched.missing, matched.unexpected)


def select_checkpoints(paths: Places, **options: Any) -> Selection:
    """Choose checkpoints of runs and patterns as `merge_checkpoints` does, by the same keywords."""
    choice = _understood(_Selecting, options).choose(paths)
    notes = tuple(map(in_keywords, choice.notes))
    return Selection(choice.paths, choice.outputs[_NOWHERE], choice.candidates, notes)


@_hinted()
def inspect_checkpoints(paths: Places, key: str | None = None) -> tuple[Contents, ...]:
    """Return what is in checkpoints: their tensors, and which would be averaged or kept, and why.

    The weights are the tensors of the state dict `key`; by default they are found.
    """
    found = expand(_listed(paths))
    return tuple(contents(path, key) for place in found for path in place.checkpoints)
