"""Logs of a run: metrics by the checkpoint, the step or the epoch that a row is about.

    CSV           epoch,step,val_loss        JSON    [{"step": 10, "val_loss": 0.5}, ...]
                  0,10,0.5                           {"log_history": [{"step": 10, ...}, ...]}
    JSON Lines    {"step": 10, "loss": 1}            {"a.pt": {"acc": 0.9}, "b.pt": 0.8}
                  {"step": 20, "loss": 2}
    TensorBoard   events.out.tfevents.*, or the directory that holds them: tags by step

A row belongs to the checkpoint that it names, or to the one of its step, or of its epoch. The last
object or event of a log that is still being written may be cut short, and is passed over.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import io
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from merge_avg.errors import MergeError, failure
from merge_avg.formats import bounded
from merge_avg.selection._names import Metadata

# Columns that name a checkpoint; tables that people make by hand agree on no name for it.
_PATHS = ("path", "file", "filename", "checkpoint", "ckpt", "name")
# Columns that count steps: `iteration` is detectron2's, the last one Lightning's for W&B.
_STEPS = ("step", "global_step", "iteration", "num_updates", "trainer/global_step")
_CLOCKS = (*((column, "step") for column in _STEPS), ("epoch", "epoch"))
_MOST_NUMBERS = 1 << 20  # in a log; a row of its own counts for four
_MOST_EVENTS = 1 << 28  # bytes of TensorBoard's files, whose reader checks 10 MB/s


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
        for column, kind in _CLOCKS:
            number = found.get(keys.get(column, column))
            if number is not None and number == number // 1:
                self.setdefault((kind, number), {}).update(found)
        return len(found)


def read_log(path: Path) -> Log:
    """Read a log; raise MergeError where it cannot be read or is not one."""
    log, numbers = Log(), 0
    try:
        for row in _rows(path):
            numbers += log.add(row) + 4
            if numbers > _MOST_NUMBERS:
                raise ValueError("it has too many rows")
    except MergeError:
        raise
    except OSError as error:
        raise failure(error, "cannot be read", path) from None
    except (ValueError, csv.Error) as error:
        hint = "give a CSV file with a header, a JSON list of objects, or an object a line"
        raise MergeError(f"cannot be read as a log ({error})", where=path, hint=hint) from None
    return log


def rows_of(log: object) -> list[Mapping[str, Any]]:
    """Return the rows of a list, if it is one."""
    return [row for row in log if isinstance(row, dict)] if isinstance(log, list) else []


def _rows(path: Path) -> Iterable[Mapping[str, Any]]:
    """Return the rows of a log; raise ValueError where it has none."""
    if path.is_dir() or "tfevents" in path.name:
        return _events(path)
    raw = bounded.read(path).removeprefix(codecs.BOM_UTF8)
    kind, first = path.suffix.lower(), raw.lstrip()[:1]
    if kind in (".jsonl", ".ndjson"):
        return _lines(raw)
    if kind != ".json" and first not in (b"[", b"{"):
        lines = csv.reader(io.TextIOWrapper(io.BytesIO(raw), "utf-8", newline=""))
        header = next(lines, [])
        return (dict(zip(header, line)) for line in lines)  # noqa: B905 - what a line has of it
    try:  # a list is read as that of a Trainer's state
        found = bounded.loads(raw if first == b"{" else b'{"log_history":%b}' % raw)
    except ValueError:
        # Frameworks call JSON Lines .json too, as detectron2 does.
        with contextlib.suppress(ValueError):
            bounded.loads(raw.lstrip().partition(b"\n")[0])
            return _lines(raw)
        raise
    if "log_history" in found:
        if not isinstance(found["log_history"], list):
            raise ValueError("not a list of rows")
        return rows_of(found["log_history"])
    if not found.keys().isdisjoint(column for column, _ in _CLOCKS):  # a single line
        return [found]
    rows = {name: row if isinstance(row, dict) else {"metric": row} for name, row in found.items()}
    return [{"path": name, **row} for name, row in rows.items()]


def _lines(raw: bytes) -> Iterator[Mapping[str, Any]]:
    """Yield the objects of JSON Lines; raise ValueError for a line that is none."""
    *lines, last = raw.split(b"\n")
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield bounded.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from None
    with contextlib.suppress(ValueError):  # it may not be whole yet
        yield bounded.loads(last)


def _events(path: Path) -> Iterable[Mapping[str, Any]]:
    """Return the scalars in TensorBoard's event files, a row for each step."""
    files = sorted(path.glob("*tfevents*")) if path.is_dir() else [path]
    if not any(map(Path.is_file, files)):
        hint = "give the directory that holds events.out.tfevents.*, or one of these"
        raise MergeError("it holds no event files of TensorBoard", where=path, hint=hint)
    if sum(file.stat().st_size for file in files) > _MOST_EVENTS:
        raise ValueError(f"it is longer than {_MOST_EVENTS:,} bytes")
    rows: dict[int, dict[str, float]] = {}
    numbers = 0
    for file in files:  # the oldest first: a run that was resumed writes some steps anew
        for step, tag, number in _scalars(file):
            rows.setdefault(step, {})[tag] = number
            numbers += 1
            if numbers > _MOST_NUMBERS:
                raise ValueError("it has too many numbers")
    return [{**row, "step": step} for step, row in rows.items()]


def _scalars(path: Path) -> Iterator[tuple[int, str, float]]:
    """Yield the step, the tag and the value of each scalar in an event file."""
    try:
        # Not by its loaders: these import TensorFlow if they can, and take damage for the end.
        from google.protobuf.message import DecodeError
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.tensorflow_stub import errors
        from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import PyRecordReader_New
    except ImportError:
        what = "event files are read by the package tensorboard, which is not installed"
        hint = "pip install 'merge-avg[tensorboard]'"
        raise MergeError(what, where=path, hint=hint) from None
    reader = PyRecordReader_New(str(path.resolve()))
    while True:
        try:
            reader.GetNext()
            event = Event.FromString(reader.record())
        except errors.OutOfRangeError:
            return
        except (errors.DataLossError, DecodeError, OverflowError, MemoryError) as error:
            if "truncated record" in str(error):
                return
            raise MergeError(f"the event file is damaged ({error})", where=path) from None
        for value in event.summary.value:
            tensor, kind = value.tensor, value.WhichOneof("value")
            if kind == "simple_value":
                yield event.step, value.tag, value.simple_value
            elif kind == "tensor" and not tensor.tensor_shape.dim:  # as TensorFlow 2 writes it
                found = [*tensor.float_val]
                if len(tensor.tensor_content) == 4 and tensor.dtype == 1:  # DT_FLOAT
                    found = [*struct.unpack("<f", tensor.tensor_content)]
                yield from ((event.step, value.tag, number) for number in found[:1])


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the entries of a row that are numbers, or texts of numbers as in CSV."""
    found = {}
    for name, value in row.items():
        if isinstance(value, int | float | str) and not isinstance(value, bool):
            with contextlib.suppress(ValueError, OverflowError):
                found[str(name)] = float(value)
    return found
