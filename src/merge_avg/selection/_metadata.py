"""What a checkpoint says about itself: step, epoch and metrics, as frameworks write them.

What is inside counts first, then the name. Numbers are read as numbers: step 10 is not step 100.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from merge_avg.checkpoint import MARK, Layout, Scalar, TreePath
from merge_avg.formats import bounded_json as json_text

STATE = "trainer_state.json"  # transformers' Trainer: where a run stands, and its log
_LARGEST_STATE = 100_000_000
_LONGEST_NAME = 200  # of a metric
_STEPS = ("global_step", "num_updates", "step", "iteration", "iter", "n_updates")
_EPOCHS = ("epoch", "current_epoch")
# Where fairseq keeps them.
_UPDATES = ("optimizer_history", "num_updates")
_EPOCH_WITHIN = ("extra_state", "train_iterator", "epoch")
# Names of entries that hold the values of metrics by name.
_TABLES = ("metrics", "metric", "scores", "results", "callback_metrics", "logs", "eval")
# Names of single entries that are metrics.
_METRIC = re.compile(
    r"(.*[_/.-])?(loss|acc|accuracy|bleu|f1|auc|auroc|miou|iou|dice|map|wer|cer|ppl|perplexity|mse|mae"
    r"|rmse|nll|fid|psnr|ssim|rouge[a-z0-9]*|score|error|fitness|metric|top[-_]?[15]|precision"
    r"|recall|r2)([_/.@-].*)?",
    re.IGNORECASE,
)
_NUMBER = r"[-+]?(?:\d+\.\d+|\d+|\.\d+)(?:[eE][-+]?\d+)?"
_PAIR = re.compile(
    rf"(?P<name>[A-Za-z][\w/@.]*?)=(?P<value>{_NUMBER}|nan|inf)(?=[-_.=,]|$)", re.IGNORECASE
)
_NAMED = re.compile(
    r"(?:^|[-_./])(?P<kind>step|epoch|iter|checkpoint|ckpt)s?[-_]?(?P<n>\d+)(?!\.?\d)",
    re.IGNORECASE,
)
_FAIRSEQ_BEST = re.compile(rf"^checkpoint[._]best_(?P<name>[A-Za-z][\w/]*)_(?P<value>{_NUMBER})$")
_FAIRSEQ = re.compile(r"^checkpoint_?(?P<epoch>\d+)_(?P<step>\d+)$")
_SNAPSHOT = re.compile(r"snapshot-(?P<step>\d+)-(?P<sigma>\d*\.\d+)$")
_SUFFIXES = re.compile(r"(\.(pt|pth|bin|ckpt|safetensors|tar|pkl|th))+$", re.IGNORECASE)


@dataclass(frozen=True)
class Metadata:
    """What is known of a checkpoint.

    Attributes:
        step: optimizer steps until then.
        epoch: as the framework counts it.
        metrics: values by the names that the framework uses.
        sigma: the relative width of a stored power-function EMA (Karras et al. 2024).
        ours: whether it is the output of an earlier merge.
    """

    step: int | None = None
    epoch: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    sigma: float | None = None
    ours: bool = False


def read_metadata(layout: Layout) -> Metadata:
    """What a scanned checkpoint says about itself, inside first and then by its name."""
    scalars = dict(layout.scalars)
    inside = _inside(scalars | _scores(layout))
    state = _trainer_state(layout.path) if layout.members else Metadata()
    name = name_metadata(layout.path)
    metrics = {**name.metrics, **state.metrics, **inside.metrics}
    return Metadata(
        _first(inside.step, state.step, name.step),
        _first(inside.epoch, state.epoch, name.epoch),
        metrics,
        name.sigma,
        any(key == MARK for key, _ in layout.metadata),
    )


def name_metadata(path: Path) -> Metadata:
    """What a name says, in the ways of Lightning, fairseq, timm and transformers."""
    stem = _SUFFIXES.sub("", path.name)
    step = epoch = None
    metrics: dict[str, float] = {}
    for pair in _PAIR.finditer(stem):
        name, value = pair["name"].lstrip("_-."), float(pair["value"])
        whole = int(value) if math.isfinite(value) and value == int(value) else None
        if name.lower() in _STEPS:
            step = whole
        elif name.lower() in _EPOCHS:
            epoch = whole
        else:
            metrics[name] = value
    if found := _SNAPSHOT.search(stem):
        return Metadata(int(found["step"]), sigma=float(found["sigma"]))
    if found := _FAIRSEQ_BEST.match(stem):
        metrics[found["name"]] = float(found["value"])
        return Metadata(step, epoch, metrics)
    if found := _FAIRSEQ.match(stem):
        return Metadata(int(found["step"]), int(found["epoch"]), metrics)
    for found in _NAMED.finditer(stem):
        number, kind = int(found["n"]), found["kind"].lower()
        if kind in ("step", "iter"):
            step = _first(step, number)
        elif kind == "epoch":
            epoch = _first(epoch, number)
        elif path.is_dir():  # checkpoint-1000/ of transformers counts steps
            step = _first(step, number)
        else:  # checkpoint12.pt of fairseq and checkpoint-12.pth.tar of timm count epochs
            epoch = _first(epoch, number)
    return Metadata(step, epoch, metrics)


def _inside(scalars: Mapping[TreePath, Scalar]) -> Metadata:
    metrics: dict[str, float] = {}
    for path, value in scalars.items():
        name = str(path[-1])
        if isinstance(value, str):
            continue
        table = len(path) == 2 and str(path[0]).lower() in _TABLES
        if len(name) > _LONGEST_NAME:
            continue
        if table or (len(path) == 1 and _METRIC.fullmatch(name)):
            metrics[name] = float(value)
    for path, value in scalars.items():  # Lightning's ModelCheckpoint: its monitor and score
        if len(path) == 3 and path[0] == "callbacks" and path[2] == "monitor":
            score = scalars.get((*path[:2], "current_score"))
            if isinstance(value, str) and isinstance(score, int | float):
                metrics.setdefault(value, float(score))
    updates = [_whole(value) for path, value in scalars.items() if (path[0], path[-1]) == _UPDATES]
    return Metadata(
        _first(_counted(scalars, _STEPS), *reversed(updates)),
        _first(_counted(scalars, _EPOCHS), _whole(scalars.get(_EPOCH_WITHIN))),
        metrics,
    )


def _scores(layout: Layout) -> dict[TreePath, Scalar]:
    """The scores of Lightning's callbacks, which are tensors of one number."""
    found: dict[TreePath, Scalar] = {}
    for info in layout.tensors:
        path, storage = info.path, info.storage
        form = {"float32": "<f", "float64": "<d"}.get(info.dtype.name)
        if len(path) != 3 or path[0] != "callbacks" or path[2] != "current_score" or info.shape:
            continue
        if form is None or storage.coded or info.trouble:
            continue
        with layout.where(info).open("rb") as file:
            file.seek(storage.offset + info.start * info.dtype.itemsize)
            raw = file.read(info.dtype.itemsize)
        if len(raw) == info.dtype.itemsize:
            found[path] = struct.unpack(form, raw)[0]
    return found


def _counted(scalars: Mapping[TreePath, Scalar], names: tuple[str, ...]) -> int | None:
    """The value of the first of these names at the top."""
    return _first(*(_whole(scalars.get((name,))) for name in names))


def _whole(value: object) -> int | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return int(value) if math.isfinite(value) and value == int(value) and value >= 0 else None


def _trainer_state(folder: Path) -> Metadata:
    """What transformers' Trainer wrote beside a checkpoint."""
    path = folder / STATE
    try:
        if not path.is_file() or path.stat().st_size > _LARGEST_STATE:
            return Metadata()
        state = json_text.table(path.read_bytes())
    except (OSError, ValueError):
        return Metadata()  # it decides nothing: the name or a log may
    step = _whole(state.get("global_step"))
    metrics: dict[str, float] = {}
    for row in log_rows(state):
        if _whole(row.get("step")) in (None, step):
            metrics |= {name: value for name, value in numbers(row) if name not in _STEPS + _EPOCHS}
    return Metadata(step, _whole(state.get("epoch")), metrics)


def log_rows(state: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The rows of a Trainer's log."""
    rows = state.get("log_history")
    for row in rows if isinstance(rows, list) else ():
        if isinstance(row, dict):
            yield row


def numbers(row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The entries of a row that are numbers, or texts of numbers."""
    for name, value in row.items():
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            continue
        try:
            yield str(name), float(value)
        except (ValueError, OverflowError):
            continue


def _first(*values: int | None) -> int | None:
    return next((value for value in values if value is not None), None)
