"""The metadata of a checkpoint: step, epoch and metrics, as frameworks write them.

What is inside counts first, then a Trainer's state beside it, then the name. Numbers are read as
numbers: step 10 is not step 100. Metrics may also come from a log beside a run:

    epoch,step,val_loss        [{"step": 10, "val_loss": 0.5}, ...]        {"a.pt": {"acc": 0.9}}
    0,10,0.5                   {"log_history": [{"step": 10, ...}, ...]}   {"a.pt": 0.9}

A row belongs to the checkpoint that it names, or to the one of its step, or of its epoch.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import io
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from merge_avg.checkpoint import PROVENANCE, Layout, Scalar, TreePath, is_metric
from merge_avg.errors import MergeError
from merge_avg.formats import bounded
from merge_avg.io import Reader
from merge_avg.selection._names import Metadata, read_names

STATE = "trainer_state.json"  # transformers' Trainer: where a run stands, and its log
_LONGEST_NAME = 200  # of a metric

# Entries at the top of a checkpoint; of several the first counts. `global_step`: Lightning, whose
# `step` beside it may be anything, and the state of transformers' Trainer; `num_updates`: fairseq;
# `iteration`: Megatron-LM, detectron2; the others: training loops of people's own.
_STEPS = ("global_step", "num_updates", "step", "iteration", "iter", "n_updates")
_EPOCHS = ("epoch", "current_epoch")
# fairseq keeps both further in: a list of optimizers, the last of which counts, and the iterator.
_UPDATES = ("optimizer_history", "num_updates")
_EPOCH_WITHIN = ("extra_state", "train_iterator", "epoch")
# Entries that hold metrics by name: Lightning's trainer, Keras-like callbacks, loops of one's own.
_TABLES = ("metrics", "metric", "scores", "results", "callback_metrics", "logs", "eval")
# Columns that name a checkpoint; tables that people make by hand agree on no name for it.
_PATHS = ("path", "file", "filename", "checkpoint", "ckpt", "name")
_MOST_NUMBERS = 1 << 20  # in a log; a row of its own counts for four
_MOST = 1 << 63  # no count is as large


def read_metadata(layout: Layout, name: Metadata | None = None) -> Metadata:
    """Return what a scanned checkpoint says about itself, inside, beside it and by its name.

    Among the names of a run its `name` says more than alone.
    """
    inside = _inside(dict(layout.scalars) | _scores(layout))
    state = _trainer_state(layout.path) if layout.members else Metadata()
    name = name or read_names([layout.path])[layout.path]
    return Metadata(
        _first(inside.step, state.step, name.step),
        _first(inside.epoch, state.epoch, name.epoch),
        {**name.metrics, **state.metrics, **inside.metrics},
        name.sigma,
        any(key == PROVENANCE for key, _ in layout.metadata),
        counted=inside.timed or state.timed,
    )


def _inside(scalars: Mapping[TreePath, Scalar]) -> Metadata:
    """Return what the numbers and texts beside the tensors say."""
    metrics: dict[str, float] = {}
    monitored: dict[str, float] = {}
    for path, value in scalars.items():
        name = str(path[-1])
        table = len(path) == 2 and str(path[0]).lower() in _TABLES
        if isinstance(value, str):
            # Lightning's ModelCheckpoint keeps the name of its metric and the score side by side.
            score = scalars.get((*path[:2], "current_score"))
            callback = len(path) == 3 and path[::2] == ("callbacks", "monitor")
            if callback and isinstance(score, int | float):
                monitored.setdefault(value, float(score))
        elif len(name) <= _LONGEST_NAME and (table or (len(path) == 1 and is_metric(name))):
            metrics[name] = float(value)
    updates = [value for path, value in scalars.items() if (path[0], path[-1]) == _UPDATES]
    steps = [*(scalars.get((name,)) for name in _STEPS), *reversed(updates)]
    epochs = [*(scalars.get((name,)) for name in _EPOCHS), scalars.get(_EPOCH_WITHIN)]
    return Metadata(_first(*map(_whole, steps)), _first(*map(_whole, epochs)), monitored | metrics)


def _scores(layout: Layout) -> dict[TreePath, Scalar]:
    """Return the scores of Lightning's callbacks: tensors of one number, all that is read here."""
    found: dict[TreePath, Scalar] = {}
    for info in layout.tensors:
        form = {"float32": "<f", "float64": "<d"}.get(info.dtype.name)
        score = len(info.path) == 3 and info.path[::2] == ("callbacks", "current_score")
        if not score or form is None or info.shape or info.storage.coded or info.trouble:
            continue
        raw = bytearray(info.dtype.itemsize)
        with contextlib.closing(Reader(layout, layout.path.parent)) as reader:
            reader.read(memoryview(raw), info.storage, info.start * len(raw))
        found[info.path] = struct.unpack(form, raw)[0]
    return found


def _whole(value: object) -> int | None:
    """Return a count, which some frameworks store as a float; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < _MOST:
        return None
    return int(value) if value == int(value) else None


def _trainer_state(folder: Path) -> Metadata:
    """Return what transformers' Trainer wrote beside a checkpoint."""
    try:
        state = bounded.loads(bounded.read(folder / STATE))
    except ValueError:  # none, or a broken one: it must not keep weights from being averaged
        return Metadata()
    step = _whole(state.get("global_step"))
    metrics: dict[str, float] = {}
    # The log holds the whole run up to here: only rows of this very step are of this checkpoint.
    for row in _objects(state.get("log_history")):
        if _whole(row.get("step")) in (None, step):
            metrics |= _numbers(row)
    metrics = {name: metrics[name] for name in metrics if name not in _STEPS + _EPOCHS}
    return Metadata(step, _whole(state.get("epoch")), metrics)


def _first(*values: int | None) -> int | None:
    return next((value for value in values if value is not None), None)


class Log(dict[tuple[str, object], dict[str, float]]):
    """The metrics of a log, by ("path", name), ("step", number) and ("epoch", number)."""

    def of(self, path: Path, metadata: Metadata) -> Mapping[str, float]:
        """Return what is logged under a checkpoint's name, else at its step, else at its epoch."""
        names = [("path", name) for name in (str(path), path.name, path.stem)]
        keys = [*names, ("step", metadata.step), ("epoch", metadata.epoch)]
        return next((self[key] for key in keys if key in self), {})

    def add(self, row: Mapping[str, Any]) -> int:
        """Add the numbers of a row under what it names, and return how many; rows add up."""
        found = _numbers(row)
        keys = {str(key).lower(): key for key in row}
        for column in _PATHS:
            name = row.get(keys.get(column, column))
            if isinstance(name, str) and name:
                self.setdefault(("path", name), {}).update(found)
        # Lightning's CSVLogger writes metrics of training and of validation in rows of their own.
        for column, kind in (("step", "step"), ("global_step", "step"), ("epoch", "epoch")):
            number = found.get(keys.get(column, column))
            if number is not None and number == number // 1:
                self.setdefault((kind, number), {}).update(found)
        return len(found)


def read_log(path: Path) -> Log:
    """Read a log; raise MergeError where the file cannot be read or is not one."""
    raw = bounded.read(path).removeprefix(codecs.BOM_UTF8)
    log, numbers = Log(), 0
    try:
        for row in _rows(path, raw):
            numbers += log.add(row) + 4
            if numbers > _MOST_NUMBERS:
                raise ValueError("it has too many rows")
    except (ValueError, csv.Error) as error:
        hint = "give a CSV file with a header, or a JSON list of objects"
        raise MergeError(f"cannot be read as a log ({error})", where=path, hint=hint) from None
    return log


def _rows(path: Path, raw: bytes) -> Iterable[Mapping[str, Any]]:
    """Return the rows of a log; raise ValueError where it has none."""
    if path.suffix.lower() != ".json" and raw.lstrip()[:1] not in (b"[", b"{"):
        lines = csv.reader(io.TextIOWrapper(io.BytesIO(raw), "utf-8", newline=""))
        header = next(lines, [])
        return (dict(zip(header, line)) for line in lines)  # noqa: B905 - what a line has of it
    listed = raw.lstrip()[:1] != b"{"  # a list is read as that of a Trainer's state
    found = bounded.loads(b'{"log_history":%b}' % raw if listed else raw)
    if "log_history" not in found:
        rows = {n: row if isinstance(row, dict) else {"metric": row} for n, row in found.items()}
        return [{"path": name, **row} for name, row in rows.items()]
    if not isinstance(found["log_history"], list):
        raise ValueError("not a list of rows")
    return _objects(found["log_history"])


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the entries of a row that are numbers, or texts of numbers as in CSV."""
    found = {}
    for name, value in row.items():
        if isinstance(value, int | float | str) and not isinstance(value, bool):
            with contextlib.suppress(ValueError, OverflowError):
                found[str(name)] = float(value)
    return found


def _objects(log: object) -> list[Mapping[str, Any]]:
    """Return the rows of a log in JSON."""
    return [row for row in log if isinstance(row, dict)] if isinstance(log, list) else []
