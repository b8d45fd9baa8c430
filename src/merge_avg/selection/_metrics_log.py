"""Logs of metrics beside a run: CSV, JSON, or a Trainer's state.

    epoch,step,val_loss        [{"step": 10, "val_loss": 0.5}, ...]        {"a.pt": {"acc": 0.9}}
    0,10,0.5                   {"log_history": [{"step": 10, ...}, ...]}   {"a.pt": 0.9}

A row belongs to the checkpoint that it names, or to the one of its step, or of its epoch.
"""

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

# Columns that name a checkpoint; tables that people make by hand agree on no name for it.
_PATHS = ("path", "file", "filename", "checkpoint", "ckpt", "name")
_LARGEST = 1 << 30


@dataclass(frozen=True)
class Log:
    """The metrics of a log, by the name of a checkpoint, by step and by epoch."""

    names: Mapping[str, Mapping[str, float]]
    steps: Mapping[int, Mapping[str, float]]
    epochs: Mapping[int, Mapping[str, float]]

    def of(self, path: Path, metadata: Metadata) -> Mapping[str, float]:
        """Return what is logged under a checkpoint's name, else at its step, else at its epoch."""
        for name in (str(path), path.name, path.stem):
            if name in self.names:
                return self.names[name]
        if metadata.step is not None and metadata.step in self.steps:
            return self.steps[metadata.step]
        if metadata.epoch is not None:
            return self.epochs.get(metadata.epoch, {})
        return {}


def read_log(path: Path) -> Log:
    """Read a log.

    Raises:
        MergeError: the file cannot be read, or is not a log.
    """
    try:
        if path.stat().st_size > _LARGEST:
            raise MergeError(f"a log may have up to {_LARGEST:,} bytes", where=path)
        text = path.read_text("utf-8-sig")
        rows = list(_rows(path, text))
    except OSError as error:
        raise MergeError(error.strerror or str(error), where=path) from None
    except (ValueError, RecursionError, csv.Error) as error:
        hint = "give a CSV file with a header, or a JSON list of objects"
        raise MergeError(f"cannot be read as a log ({error})", where=path, hint=hint) from None
    names: dict[str, dict[str, float]] = {}
    steps: dict[int, dict[str, float]] = {}
    epochs: dict[int, dict[str, float]] = {}
    for row in rows:
        found = dict(numbers(row))
        keys = {str(key).lower(): key for key in row}
        for one in _PATHS:
            if one in keys and isinstance(row[keys[one]], str) and row[keys[one]]:
                names.setdefault(row[keys[one]], {}).update(found)
        # Rows of one step add up: Lightning's CSVLogger writes the metrics of training and those of
        # validation in rows of their own.
        for one, table in (("step", steps), ("global_step", steps), ("epoch", epochs)):
            value = found.get(str(keys.get(one)))
            if value is not None and value == value // 1:
                table.setdefault(int(value), {}).update(found)
    return Log(names, steps, epochs)


def _rows(path: Path, text: str) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of a log; raise ValueError where it has none."""
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
            raise ValueError("not a list of rows")
        return
    yield from csv.DictReader(io.StringIO(text))
