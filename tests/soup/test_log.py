"""The log of a soup: what the next run takes from it, and which logs it refuses."""

import json
import math
import os

import pytest
import torch
from safetensors.torch import save_file

from merge_avg.errors import MergeError
from tests.soup.helpers import made, soup_of, weight

LOG = "o.pt.soup.jsonl"


def test_what_it_holds(tmp_path):
    """It has a header that identifies the soup, and a line for each evaluation, in their order."""
    paths = made(tmp_path, (3.0, 1.0))
    soup_of(paths, tmp_path / "o.pt", command="eval")
    header, *entries = map(json.loads, (tmp_path / LOG).read_text().splitlines())
    files = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in paths]
    assert header == {"soup": "greedy", "command": "eval", "mode": "min", "inputs": files}
    assert entries == [
        {"members": [0], "score": 3.0},
        {"members": [1], "score": 1.0},
        {"members": [1, 0], "score": 2.0},
    ]


def test_a_torn_line_is_evaluated_again(tmp_path):
    """A log whose last line was cut by a kill serves up to there."""
    paths = made(tmp_path)
    soup_of(paths, tmp_path / "o.pt")
    log = tmp_path / LOG
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:3]) + lines[3][:9])
    told = []
    again = soup_of(
        paths,
        tmp_path / "o.pt",
        lambda path: (told.append(path), weight(path))[1],
        overwrite=True,
    )
    assert [trial.remembered for trial in again.trials][:3] == [True, True, False]
    assert len(told) == 5
    assert len(log.read_bytes().splitlines()) == 8
    assert all(json.loads(line) for line in log.read_bytes().splitlines())


def test_a_torn_header_is_written_again(tmp_path):
    """A kill within the first line leaves a log that the next run begins anew."""
    paths = made(tmp_path)
    soup_of(paths, tmp_path / "o.pt")
    log = tmp_path / LOG
    whole = log.read_bytes()
    log.write_bytes(whole[:20])
    soup_of(paths, tmp_path / "o.pt", overwrite=True)
    assert log.read_bytes() == whole


@pytest.mark.parametrize("what", ["mode", "command", "inputs", "log", "no lines"])
def test_the_log_of_another_soup_is_refused(tmp_path, what):
    """A log of other checkpoints, another command or mode is an error, and stays as it is."""
    paths = made(tmp_path)
    soup_of(paths, tmp_path / "o.pt")
    log = tmp_path / LOG
    if what == "log":
        log.write_text("nonsense\nmore\n")
    if what == "no lines":
        log.write_text("nonsense")
    if what == "inputs":
        os.utime(paths[0], (1, 1))
    before = log.read_bytes()
    with pytest.raises(MergeError, match="log of another soup"):
        soup_of(
            paths,
            tmp_path / "o.pt",
            mode="max" if what == "mode" else "min",
            command="other" if what == "command" else "",
            overwrite=True,
        )
    assert log.read_bytes() == before


def test_a_log_that_was_read_is_only_added_to(tmp_path):
    """Its lines are not written again: a kill while it is opened loses nothing."""
    paths = made(tmp_path)
    soup_of(paths, tmp_path / "o.pt")
    log = tmp_path / LOG
    before = log.read_bytes(), log.stat().st_mtime_ns
    soup_of(paths, tmp_path / "o.pt", overwrite=True)
    assert (log.read_bytes(), log.stat().st_mtime_ns) == before


@pytest.mark.parametrize(("exact", "left"), [(1.0, 3), (0.5, 2)])
def test_logs_of_earlier_versions_serve(tmp_path, exact, left):
    """The score of the exact mean, which they evaluated last, replaces the rounded trial's."""
    paths = made(tmp_path, (1.0, 1.0, 1.0))
    soup_of(paths, tmp_path / "o.pt", lambda _: 1.0, mode="max")
    entry = {"members": [0, 1, 2], "score": exact, "exact": True}
    with (tmp_path / LOG).open("a") as log:
        log.write(json.dumps(entry) + "\n")
    soup = soup_of(paths, tmp_path / "o.pt", pytest.fail, "max", overwrite=True)
    assert (soup.members, soup.score) == (tuple(paths[:left]), 1.0)
    assert soup.trials[-1].score == exact
    assert all(trial.remembered for trial in soup.trials)


def test_a_directory_that_an_evaluation_writes_to_stays_the_same_checkpoint(tmp_path):
    """Results that an evaluation leaves beside the weights do not make the log another's."""
    paths = []
    for number in range(3):
        folder = tmp_path / f"c{number}"
        folder.mkdir()
        save_file({"w": torch.full((3,), float(number))}, folder / "model.safetensors")
        paths.append(folder)

    def evaluate(path):
        if path in paths:
            (path / "results.txt").write_text("done")
        return 1.0

    soup_of(paths, tmp_path / "o", evaluate)
    again = soup_of(paths, tmp_path / "o2", evaluate, log=tmp_path / "o.soup.jsonl")
    assert all(trial.remembered for trial in again.trials)


def test_infinite_scores_are_texts(tmp_path):
    """The log is strict JSON, and an infinite score in it is remembered."""
    paths = made(tmp_path)
    first = soup_of(paths, tmp_path / "o.pt", lambda _: math.inf)
    log = (tmp_path / LOG).read_text()
    entries = [json.loads(line, parse_constant=pytest.fail) for line in log.splitlines()]
    assert {entry["score"] for entry in entries[1:]} == {"inf"}
    again = soup_of(paths, tmp_path / "o.pt", None, overwrite=True)
    assert again.score == first.score == math.inf
    (tmp_path / LOG).write_text(log.replace('"inf"', "Infinity"))  # as it once was written
    assert soup_of(paths, tmp_path / "o.pt", None, overwrite=True).score == math.inf


@pytest.mark.parametrize(
    "entry",
    [
        '{"members": [1e400], "score": 1}',
        '{"members": null, "score": 1}',
        '{"members": [[]], "score": 1}',
        '{"members": [0], "score": ' + "9" * 400 + "}",
        '{"members": [0], "score": ' + "9" * 5000 + "}",
        '{"members": [0], "score": "x"}',
        '{"members": [0], "score": null}',
        "[]",
    ],
)
def test_a_log_of_other_numbers_is_refused(tmp_path, entry):
    """Numbers that are none, or of any length, make it the log of another soup."""
    paths = made(tmp_path)
    soup_of(paths, tmp_path / "o.pt")
    with (tmp_path / LOG).open("a") as file:
        file.write(f"{entry}\n")
    with pytest.raises(MergeError, match="the log of another soup"):
        soup_of(paths, tmp_path / "o.pt", overwrite=True)


def test_a_mistyped_evaluation_leaves_no_log_in_the_way(tmp_path):
    """A log without any score is begun anew by another command; a cut score counts as one."""
    paths, log = made(tmp_path), tmp_path / LOG

    def fail(path):
        raise MergeError("cannot be run", where=path)

    with pytest.raises(MergeError, match="cannot be run"):
        soup_of(paths, tmp_path / "o.pt", fail, command="pyhton eval.py")
    begun = log.read_bytes()
    assert begun.count(b"\n") == 1
    log.write_bytes(begun + b'{"members"')
    with pytest.raises(MergeError, match="another soup"):
        soup_of(paths, tmp_path / "o.pt", command="eval")
    log.write_bytes(begun)
    soup_of(paths, tmp_path / "o.pt", command="eval")
    header, *scores = map(json.loads, log.read_text().splitlines())
    assert (header["command"], len(scores) > 1) == ("eval", True)
