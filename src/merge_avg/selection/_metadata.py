"""The metadata of a checkpoint: step, epoch and metrics, as frameworks write them.

What is inside counts first, then a Trainer's state beside it, then the name. Numbers are read as
numbers: step 10 is not step 100.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Mapping
from pathlib import Path

from merge_avg.checkpoint import PROVENANCE, Layout, Scalar, TreePath, is_metric
from merge_avg.formats import bounded
from merge_avg.io import Reader
from merge_avg.selection._logs import Log, rows_of
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
        guessed=name.guessed,
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
    # The log holds the whole run up to here: only rows of this very step are of this checkpoint.
    log, step = Log(), _whole(state.get("global_step"))
    for row in rows_of(state.get("log_history")):
        log.add(row)
    rows = log.get(("step", step), {})
    metrics = {name: rows[name] for name in rows if name not in _STEPS + _EPOCHS}
    return Metadata(step, _whole(state.get("epoch")), metrics)


def _first(*values: int | None) -> int | None:
    return next((value for value in values if value is not None), None)
