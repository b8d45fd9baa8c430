"""Logs of metrics that lie beside a run: CSV, JSON, or a Trainer's state."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge_avg.errors import MergeError
from merge_avg.selection._metadata import Metadata, log_rows, numbers

_PATHS = ("path", "file", "filename", "checkpoint", "ckpt", "name")
_LARGEST = 1 << 30


@dataclass(frozen=True)
class Log:
    """Metrics by the name of a checkpoint, by step and by epoch."""

    names: Mapping[str, Mapping[str, float]]
    steps: Mapping[int, Mapping[str, float]]
    epochs: Mapping[int, Mapping[str, float]]

    def of(self, path: Path, known: Metadata) -> Mapping[str, float]:
        """What is logged for a checkpoint: under its name, else at its step, else at its epoch."""
        for name in (str(path), path.name, path.stem):
            if name in self.names:
                return self.names[name]
        if known.step is not None and known.step in self.steps:
            return self.steps[known.step]
        if known.epoch is not None:
            return self.epochs.get(known.epoch, {})
        return {}


def read_log(path: Path) -> Log:
    """Reads a log: CSV with a header, a JSON list of rows, {checkpoint: row}, or a Trainer's state.

    Later rows for the same step or epoch add to earlier ones.

    Raises:
        MergeError: it cannot be read, or is neither.
    """
    try:
        if path.stat().st_size > _LARGEST:
            raise MergeError("it is absurdly large for a log", where=path)
        text = path.read_text("utf-8-sig")
        rows = list(_rows(path, text))
    except OSError as error:
        raise MergeError(error.strerror or str(error), where=path) from None
    except (ValueError, RecursionError, csv.Error) as error:
        hint = "give a CSV file with a header, or a JSON list of objects"
        raise MergeError(f"it cannot be read as a log ({error})", where=path, hint=hint) from None
    names: dict[str, dict[str, float]] = {}
    steps: dict[int, dict[str, float]] = {}
    epochs: dict[int, dict[str, float]] = {}
    for row in rows:
        found = dict(numbers(row))
        keys = {str(key).lower(): key for key in row}
        for one in _PATHS:
            if one in keys and isinstance(row[keys[one]], str) and row[keys[one]]:
                names.setdefault(row[keys[one]], {}).update(found)
        for one, table in (("step", steps), ("global_step", steps), ("epoch", epochs)):
            value = found.get(str(keys.get(one)))
            if value is not None and value == value // 1:
                table.setdefault(int(value), {}).update(found)
    return Log(names, steps, epochs)


def _rows(path: Path, text: str) -> Iterator[Mapping[str, Any]]:
    if path.suffix.lower() == ".json" or text.lstrip()[:1] in ("[", "{"):
        found = json.loads(text)
        if isinstance(found, dict) and "log_history" in found:
            yield from log_rows(found)
        elif isinstance(found, dict):
            for name, row in found.items():
                yield {"path": name, **(row if isinstance(row, dict) else {"metric": row})}
        elif isinstance(found, list):
            yield from (row for row in found if isinstance(row, dict))
        else:
            raise ValueError("it is no list of rows")
        return
    yield from csv.DictReader(io.StringIO(text))
