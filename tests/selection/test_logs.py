"""Logs of a run, and which row belongs to which checkpoint."""

import builtins
import contextlib
import json
from pathlib import Path

import pytest
import torch

from merge_avg import select_checkpoints
from merge_avg.errors import MergeError
from merge_avg.selection import _logs
from merge_avg.selection._logs import read_log
from merge_avg.selection._names import Metadata


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


@pytest.mark.parametrize("text", ["epoch,acc\n1,0.5\n2,1\n", '[{"a":1},{"b":2}]'])
def test_a_log_of_many_rows_is_refused(tmp_path, monkeypatch, text):
    """A log of more cells than are held in memory is an error."""
    monkeypatch.setattr(_logs, "_MOST_NUMBERS", 9)
    with pytest.raises(MergeError, match=r"too many rows"):
        log_of(tmp_path, text)


def test_lines_may_be_shorter_or_longer_than_the_header(tmp_path):
    """Cells that a line lacks have no value, and those beyond the header no name."""
    log = log_of(tmp_path, "epoch,acc,loss\n1,0.5\n2,1,2,3\n\n")
    assert log[("epoch", 1)] == {"epoch": 1, "acc": 0.5}
    assert log[("epoch", 2)] == {"epoch": 2, "acc": 1, "loss": 2}


def test_only_named_columns_are_steps(tmp_path):
    """A column called None is a metric like others, not the step of a log without steps."""
    log = log_of(tmp_path, "epoch,None\n1,5\n")
    assert log.of(Path("a.pt"), Metadata(step=5)) == {}
    assert log.of(Path("a.pt"), Metadata(epoch=1)) == {"epoch": 1, "None": 5}


# JSON Lines

LINES = '{"step": 10, "val_loss": 0.5}\n\n{"step": 20, "val_loss": NaN, "epoch": 2.0}\r\n'


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "metrics.json", "train.log"])
@pytest.mark.parametrize("more", ["", '{"step": 30, "val_l', '{"step": 30, "val_loss": 0.1}'])
def test_an_object_a_line(tmp_path, name, more):
    """JSON Lines are known by name or content; blank lines, and a last one cut short, are none."""
    log = log_of(tmp_path, LINES + more, name)
    assert log[("step", 10)] == {"step": 10, "val_loss": 0.5}
    assert log[("epoch", 2)]["step"] == 20
    assert (("step", 30) in log) == more.endswith("}")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_single_line_is_a_row(tmp_path, name):
    """One object with a step is a row, not a table of checkpoints by name."""
    assert log_of(tmp_path, '{"step": 1, "acc": 0.5}', name)[("step", 1)]["acc"] == 0.5


def test_the_iterations_of_detectron2_are_steps(tmp_path):
    """Its metrics.json counts what its checkpoints count."""
    log = log_of(tmp_path, '{"iteration": 4999, "bbox/AP": 40.1}\n{"iteration": 9999}\n', "m.json")
    assert log.of(Path("model_0004999.pth"), Metadata(step=4999))["bbox/AP"] == 40.1


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ('{"step": 1}\n{"step": 2\n{"step": 3}\n', "line 2: "),
        ('{"step": 1}\n[2]\n', "line 2: it is not an object"),
        ('{"step": 1}\n{"a": 1, "a": 2}\n', "line 2: a key appears twice"),
        ('{"step": 1}\n' + "[" * 100_000 + "\n", "line 2: "),
    ],
)
def test_a_broken_line_is_named(tmp_path, text, error):
    """A line in the middle that is no object is an error with its number."""
    with pytest.raises(MergeError, match=f"cannot be read as a log .{error}"):
        log_of(tmp_path, text, "a.jsonl")


def test_lines_of_many_numbers_are_refused(tmp_path, monkeypatch):
    """The bound on numbers holds for JSON Lines as well."""
    monkeypatch.setattr(_logs, "_MOST_NUMBERS", 9)
    with pytest.raises(MergeError, match="too many rows"):
        log_of(tmp_path, LINES, "a.jsonl")


# TensorBoard


@pytest.fixture
def events(tmp_path):
    """Write scalars of steps into an event file, and return it."""
    writer = pytest.importorskip(
        "tensorboard.summary.writer.event_file_writer", reason="needs the extra tensorboard"
    )
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

    def write(rows, folder="logs", **extra):
        before = set((tmp_path / folder).glob("*"))
        file = writer.EventFileWriter(str(tmp_path / folder), filename_suffix=f".{len(before)}")
        for step, tags in rows:
            for tag, value in tags.items():
                one = value if isinstance(value, dict) else {"simple_value": value}
                summary = Summary(value=[Summary.Value(tag=tag, **one)])
                file.add_event(Event(step=step, wall_time=1.0, summary=summary))
        file.close()
        (path,) = set((tmp_path / folder).glob("*")) - before
        return path

    return write


def test_scalars_by_step(events):
    """Each step is a row with all its tags, whose epoch counts; the directory is read as well."""
    path = events([(10, {"val/loss": 0.5, "epoch": 1}), (20, {"val/loss": 0.25, "epoch": 2})])
    for place in (path, path.parent):
        log = read_log(place)
        assert log.of(Path("a.pt"), Metadata(step=10)) == {"val/loss": 0.5, "epoch": 1, "step": 10}
        assert log.of(Path("a.pt"), Metadata(epoch=2))["val/loss"] == 0.25


def test_a_resumed_run_counts_as_it_went_on(events):
    """Of files in one directory the later ones replace steps of the earlier ones."""
    events([(10, {"loss": 1.0}), (20, {"loss": 9.0})])
    path = events([(20, {"loss": 2.0})])
    log = read_log(path.parent)
    assert (log[("step", 10)]["loss"], log[("step", 20)]["loss"]) == (1, 2)


def test_scalars_of_tensorflow_2_are_tensors(events):
    """Tensors without dimensions are numbers; others, such as histograms, are passed over."""
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto

    raw = {"tensor": TensorProto(dtype=1, tensor_content=bytes((0, 0, 0, 63)))}
    listed = {"tensor": TensorProto(dtype=1, float_val=[2.0])}
    huge = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1 << 40)])
    wide = {"tensor": TensorProto(dtype=1, float_val=[2.0], tensor_shape=huge)}
    path = events([(1, {"raw": raw, "listed": listed, "wide": wide})])
    assert read_log(path)[("step", 1)] == {"raw": 0.5, "listed": 2.0, "step": 1}


def test_events_of_a_running_job_are_read_up_to_the_last_whole_one(events):
    """A record that is cut short at the end of the file is passed over."""
    path = events([(10, {"loss": 1.0}), (20, {"loss": 2.0})])
    path.write_bytes(path.read_bytes()[:-7])
    log = read_log(path)
    assert ("step", 10) in log
    assert ("step", 20) not in log


@pytest.mark.parametrize("at", [8, 40, -6])
def test_damaged_events_are_refused(events, at):
    """A checksum that is wrong is an error, not the end of the file."""
    path = events([(10, {"loss": 1.0}), (20, {"loss": 2.0})])
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)
    with pytest.raises(MergeError, match="the event file is damaged"):
        read_log(path)


@pytest.mark.parametrize("length", [1 << 40, 1 << 62, (1 << 64) - 1])
def test_a_record_of_any_length_takes_no_memory(events, length):
    """A record that says to be longer than all memory is cut short, or damage."""
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    path = events([(10, {"loss": 1.0})])
    head = length.to_bytes(8, "little")
    with path.open("ab") as file:
        file.write(head + masked_crc32c(head).to_bytes(4, "little") + b"rest")
    # It depends on the system whether so much can be asked for.
    with contextlib.suppress(MergeError):
        assert ("step", 10) in read_log(path)


def test_events_that_are_none_are_refused(events):
    """What has a right checksum and is no event is an error."""
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    path = events([])
    head, body = (3).to_bytes(8, "little"), b"\xff\xff\xff"
    with path.open("ab") as file:
        for part in (head, body):
            file.write(part + masked_crc32c(part).to_bytes(4, "little"))
    with pytest.raises(MergeError, match="the event file is damaged"):
        read_log(path)


def test_event_files_are_bounded(events, monkeypatch):
    """Neither the size nor the count of numbers is without bounds."""
    path = events([(step, {"loss": 1.0}) for step in range(9)])
    monkeypatch.setattr(_logs, "_MOST_NUMBERS", 8)
    with pytest.raises(MergeError, match="too many numbers"):
        read_log(path)
    monkeypatch.setattr(_logs, "_MOST_EVENTS", 8)
    with pytest.raises(MergeError, match="longer than 8 bytes"):
        read_log(path)


def test_event_files_need_the_extra(tmp_path, monkeypatch):
    """Without the package tensorboard the error says what to install."""
    find = builtins.__import__

    def without(name, *more):
        if name.startswith(("tensorboard", "google")):
            raise ModuleNotFoundError(name)
        return find(name, *more)

    (tmp_path / "events.out.tfevents.1.host").write_bytes(b"")
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MergeError, match=r"pip install 'merge-avg\[tensorboard\]'"):
        read_log(tmp_path)


def test_a_directory_without_events_is_no_log(tmp_path):
    """A directory that holds something else is an error."""
    with pytest.raises(MergeError, match="it holds no event files of TensorBoard"):
        read_log(tmp_path)


def test_a_selection_by_tensorboards_metric(events, tmp_path):
    """The best of a run by what its TensorBoard log says; tags are metrics as elsewhere."""
    for step in (10, 20, 30):
        torch.save({"w": torch.full((2,), float(step))}, tmp_path / f"step={step}.pt")
    path = events([(10, {"eval/loss": 3}), (20, {"eval/loss": 1}), (30, {"eval/loss": 2})])
    found = select_checkpoints(
        tmp_path / "*.pt", best=2, metric="eval_loss", metrics_file=path.parent
    )
    assert [one.name for one in found.paths] == ["step=20.pt", "step=30.pt"]
