"""Logs of metrics, and which row belongs to which checkpoint."""

import json
from pathlib import Path

import pytest

from merge_avg.errors import MergeError
from merge_avg.selection._metadata import Metadata
from merge_avg.selection._metrics_log import read_log


def log_of(tmp_path, text, name="log.csv"):
    path = tmp_path / name
    path.write_text(text)
    return read_log(path)


def test_rows_with_empty_cells_are_joined(tmp_path):
    """CSVLogger writes the training and the validation metrics of a step in rows of their own."""
    log = log_of(
        tmp_path, "epoch,step,train_loss,val_loss\n0,10,1.5,\n0,10,,0.5\n1,100,1.0,\n1,100,,0.4\n"
    )
    assert log.of(Path("a.pt"), Metadata(step=10)) == {
        "epoch": 0,
        "step": 10,
        "train_loss": 1.5,
        "val_loss": 0.5,
    }
    assert log.of(Path("a.pt"), Metadata(step=100))["val_loss"] == 0.4
    assert log.of(Path("a.pt"), Metadata(step=1000, epoch=7)) == {}


def test_names_count_before_steps_and_steps_before_epochs(tmp_path):
    """A row with the name of a checkpoint comes before one with its step, then with its epoch."""
    rows = [
        {"path": "run/a.pt", "acc": 1},
        {"step": 5, "acc": 2},
        {"epoch": 3, "acc": 3},
    ]
    log = log_of(tmp_path, json.dumps(rows), "log.json")
    known = Metadata(step=5, epoch=3)
    assert log.of(Path("run/a.pt"), known)["acc"] == 1
    assert log.of(Path("b.pt"), known)["acc"] == 2
    assert log.of(Path("b.pt"), Metadata(epoch=3))["acc"] == 3


@pytest.mark.parametrize(
    "value",
    [
        {"fold1.pt": {"acc": 0.5}},
        [{"file": "fold1.pt", "acc": "0.5"}],
        [{"Checkpoint": "fold1", "acc": 0.5}],
    ],
)
def test_tables_by_name(tmp_path, value):
    """A table of checkpoints may be an object or a list, and name them with or without suffix."""
    log = log_of(tmp_path, json.dumps(value), "log.json")
    assert log.of(Path("runs/fold1.pt"), Metadata())["acc"] == 0.5


def test_one_number_a_name_is_the_metric(tmp_path):
    """{name: number} gives the metric "metric"."""
    log = log_of(tmp_path, '{"a.pt": 3}', "log.json")
    assert log.of(Path("a.pt"), Metadata()) == {"metric": 3.0}


def test_a_trainers_state_is_a_log(tmp_path):
    """The rows of log_history are found by their steps."""
    state = {"log_history": [{"step": 4, "eval_bleu": 20.5}], "global_step": 4}
    log = log_of(tmp_path, json.dumps(state), "trainer_state.json")
    assert log.of(Path("x"), Metadata(step=4))["eval_bleu"] == 20.5


@pytest.mark.parametrize("text", ["3", '"text"', "[1, 2", "{"])
def test_other_files_are_not_logs(tmp_path, text):
    """A file without rows is an error that names it."""
    with pytest.raises(MergeError, match="cannot be read as a log") as caught:
        log_of(tmp_path, text, "log.json")
    assert "log.json" in str(caught.value.where)


def test_a_missing_log_is_refused(tmp_path):
    """A log that does not exist is an error that names it."""
    with pytest.raises(MergeError, match="No such file"):
        read_log(tmp_path / "none.csv")
