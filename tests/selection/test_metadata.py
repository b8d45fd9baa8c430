"""Step, epoch and metrics: inside a checkpoint, beside it, and in its name."""

import json
import math
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from merge_avg.formats import scan
from merge_avg.selection._metadata import read_metadata
from merge_avg.selection._names import Metadata, read_names
from tests.helpers import merge_checkpoints

WEIGHTS = {"w": torch.ones(3)}


def name_metadata(path):
    return read_names([path])[path]


def saved(path, value):
    torch.save(value, path)
    return read_metadata(scan(path))


@pytest.mark.parametrize(
    ("name", "step", "epoch", "metrics"),
    [
        ("epoch=3-step=1000-val_loss=0.12.ckpt", 1000, 3, {"val_loss": 0.12}),
        ("epoch=3-step=1000-v1.ckpt", 1000, 3, {}),
        ("model-epoch=07-val_acc=0.91.ckpt", None, 7, {"val_acc": 0.91}),
        ("epoch=1-val/f1=1e-3.ckpt".replace("/", "_"), None, 1, {"val_f1": 1e-3}),
        ("checkpoint_best_bleu_10.5.pt", None, None, {"bleu": 10.5}),
        ("checkpoint.best_loss_2.pt", None, None, {"loss": 2.0}),
        ("checkpoint12.pt", None, 12, {}),
        ("checkpoint_3_5000.pt", 5000, 3, {}),
        ("checkpoint-12.pth.tar", None, 12, {}),
        ("model_step_1000.pt", 1000, None, {}),
        ("epoch_12.safetensors", None, 12, {}),
        ("fold3.pt", None, None, {}),
        ("last.ckpt", None, None, {}),
        ("model-2.5b.pt", None, None, {}),
    ],
)
def test_names_are_read(name, step, epoch, metrics):
    """Step, epoch and metrics are read from names that frameworks give to their files."""
    found = name_metadata(Path(name))
    assert (found.step, found.epoch, found.metrics) == (step, epoch, metrics)
    # Of the word checkpoint it is not sure what it counts.
    assert found.guessed == (name in ("checkpoint12.pt", "checkpoint-12.pth.tar"))


def test_a_folder_of_a_trainer_counts_steps(tmp_path):
    """The number of a folder checkpoint-1000 is a step; that of a file checkpoint12.pt an epoch."""
    (tmp_path / "checkpoint-1000").mkdir()
    assert name_metadata(tmp_path / "checkpoint-1000").step == 1000


def test_a_stored_ema_tells_its_width():
    """A snapshot of EDM2 has its step and the relative width of its EMA in its name."""
    assert name_metadata(Path("network-snapshot-0002147-0.100.pkl")) == Metadata(2147, sigma=0.1)


def test_what_is_inside_counts_before_the_name(tmp_path):
    """A renamed file still has the step that is stored in it."""
    content = {"state_dict": WEIGHTS, "global_step": 70, "epoch": 2}
    found = saved(tmp_path / "epoch=9-step=999-val_loss=0.5.ckpt", content)
    assert (found.step, found.epoch, found.metrics) == (70, 2, {"val_loss": 0.5})


def test_lightning_keeps_the_score_in_a_callback(tmp_path):
    """The score of ModelCheckpoint is a tensor, and its name is the monitor."""
    state = {"monitor": "val_loss", "current_score": torch.tensor(0.25), "best_model_path": "x"}
    content = {"state_dict": WEIGHTS, "epoch": 1, "callbacks": {"ModelCheckpoint{...}": state}}
    assert saved(tmp_path / "a.ckpt", content).metrics == {"val_loss": 0.25}


@pytest.mark.parametrize("value", [77.5, np.float64(77.5), np.float32(77.5)])
def test_timm_keeps_a_metric(tmp_path, value):
    """An entry called `metric` is a metric, also as a NumPy number."""
    found = saved(
        tmp_path / "model_best.pth.tar", {"state_dict": WEIGHTS, "epoch": 4, "metric": value}
    )
    assert (found.epoch, found.metrics) == (4, {"metric": 77.5})


def test_fairseq_keeps_updates_in_a_list(tmp_path):
    """The last entry of the optimizer's history holds the step, and the iterator the epoch."""
    content = {
        "model": WEIGHTS,
        "optimizer_history": [{"num_updates": 10}, {"num_updates": 250}],
        "extra_state": {"train_iterator": {"epoch": 6}},
        "args": {"epochs": 300, "step": 1},
    }
    found = saved(tmp_path / "checkpoint_best.pt", content)
    assert (found.step, found.epoch) == (250, 6)


def test_tables_of_metrics(tmp_path):
    """Numbers below an entry such as "metrics" are metrics; booleans and texts are not."""
    content = {"model": WEIGHTS, "metrics": {"acc": 0.5, "done": True, "by": "me"}, "lr": 0.1}
    assert saved(tmp_path / "a.pt", content).metrics == {"acc": 0.5}


def test_a_trainers_state(tmp_path):
    """Of a Trainer's log, the rows of the checkpoint's own step count."""
    folder = tmp_path / "checkpoint-20"
    folder.mkdir()
    save_file(WEIGHTS, folder / "model.safetensors")
    rows = [
        {"step": 10, "eval_loss": 9.0},
        {"step": 20, "loss": 1.0},
        {"step": 20, "eval_loss": 2.0},
    ]
    state = {"global_step": 20, "epoch": 2.0, "log_history": rows}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    found = read_metadata(scan(folder))
    assert (found.step, found.epoch, found.metrics) == (20, 2, {"loss": 1.0, "eval_loss": 2.0})


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"global_step": "x", "log_history": 3}'])
def test_a_broken_state_decides_nothing(tmp_path, text):
    """Where a Trainer's state cannot be read, the folder's name counts."""
    folder = tmp_path / "checkpoint-20"
    folder.mkdir()
    save_file(WEIGHTS, folder / "model.safetensors")
    (folder / "trainer_state.json").write_text(text)
    assert read_metadata(scan(folder)).step == 20


@pytest.mark.parametrize("value", [-1, 1.5, math.nan, math.inf, True, "7"])
def test_a_step_is_a_count(tmp_path, value):
    """A step is a whole number, zero or above."""
    assert saved(tmp_path / "a.pt", {"model": WEIGHTS, "step": value}).step is None


def test_an_output_is_ours(tmp_path):
    """An output of an earlier merge is recognised as one, and its inputs are not."""
    for name in "ab":
        torch.save({"model": WEIGHTS}, tmp_path / f"{name}.pt")
    merge_checkpoints([tmp_path / "a.pt", tmp_path / "b.pt"], tmp_path / "o.pt")
    assert read_metadata(scan(tmp_path / "o.pt")).ours
    assert not read_metadata(scan(tmp_path / "a.pt")).ours


def test_wide_and_deep_pickles_cost_little(tmp_path):
    """At most a thousand values beside the tensors are looked at, those near the top first."""
    wide = {"model": WEIGHTS, "rows": [[i] * 5 for i in range(50_000)], "step": 3}
    deep = inner = {}
    for _ in range(100):
        inner["down"] = inner = {"here": 1}
    torch.save({**wide, "deep": deep}, tmp_path / "a.pt")
    layout = scan(tmp_path / "a.pt")
    assert layout.scalars[0] == (("step",), 3)
    assert 500 < len(layout.scalars) <= 1000
    assert max(len(path) for path, _ in layout.scalars) <= 6


def test_absurd_texts_and_numbers_are_left_out(tmp_path):
    """Long texts, booleans and huge numbers are left out of the scalars."""
    content = {"model": WEIGHTS, "text": "x" * 1000, "flag": True, "huge": 1 << 100, "ok": "yes"}
    torch.save(content, tmp_path / "a.pt")
    assert scan(tmp_path / "a.pt").scalars == ((("ok",), "yes"),)


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_an_absurd_record_is_not_read(tmp_path, kind):
    """A provenance record that is far too long does not make a file an earlier output."""
    text = " " * ((1 << 24) + 1)
    if kind == "file":
        torch.save({"model": WEIGHTS}, tmp_path / "a.pt")
        with zipfile.ZipFile(tmp_path / "a.pt", "a") as archive:
            archive.writestr("a/merge_avg.json", text)
        assert not read_metadata(scan(tmp_path / "a.pt")).ours
    else:
        save_file(WEIGHTS, tmp_path / "model.safetensors")
        (tmp_path / "merge_avg.json").write_text(text)
        assert not read_metadata(scan(tmp_path)).ours


@pytest.mark.parametrize(
    ("name", "step", "epoch", "metric"),
    [
        ("lightning", 6, 1, "loss"),
        ("timm", None, 1, "metric"),
        ("transformers-trainer", 2, 1, None),
        ("ultralytics", None, 1, "best_fitness"),
        ("diffusers", None, None, None),
    ],
)
def test_real_checkpoints_of_frameworks(name, step, epoch, metric):
    """Step, epoch and metric are found in files that the frameworks themselves wrote."""
    (path,) = (Path(__file__).parents[1] / "data" / name / "0").iterdir()
    found = read_metadata(scan(path))
    assert (found.step, found.epoch) == (step, epoch)
    assert list(found.metrics) == ([metric] if metric else [])
