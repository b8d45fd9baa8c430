"""Greedy soups: which members, at what cost, and what survives an interruption."""

import json
import os
import sys
from math import nan
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from merge_avg import verify_output
from merge_avg.engine._run import merge_checkpoints
from merge_avg.errors import MergeError, UsageError
from merge_avg.soup._evaluate import score
from merge_avg.soup._greedy import greedy

VALUES = (4.0, 1.0, -2.0, 9.0)


def made(folder, values=VALUES):
    paths = []
    for number, value in enumerate(values):
        paths.append(folder / f"c{number}.pt")
        torch.save({"model": {"w": torch.full((3,), value)}, "epoch": number}, paths[-1])
    return paths


def weight(path):
    return float(torch.load(path)["model"]["w"][0])


class Counted:
    """Merges for real, and remembers what was read."""

    def __init__(self):
        self.calls = []

    def __call__(self, paths, output, **options):
        self.calls.append(list(paths))
        return merge_checkpoints(paths, output, **options)


def stray(folder):
    return [path for path in folder.iterdir() if "tmp" in path.name]


def test_what_helps_is_kept(tmp_path):
    """With the score |mean - 2|, lower is better: 1 and 4 are kept, 9 hurts, -2 helps."""
    paths = made(tmp_path)
    out = tmp_path / "soup.pt"
    soup = greedy(
        paths, out, evaluate=lambda p: abs(weight(p) - 2), merge=merge_checkpoints, mode="min"
    )
    # Sorted: 1 (1), 4 (2), -2 (4), 9 (7). 1 + 4: 0.5, kept. - 2: 1, left. + 9: 2.67, left.
    assert soup.members == (paths[1], paths[0])
    assert soup.score == 0.5
    assert [trial.kept for trial in soup.trials[4:]] == [True, False, False]
    merge_checkpoints(soup.members, tmp_path / "plain.pt")
    assert out.read_bytes() == (tmp_path / "plain.pt").read_bytes()
    assert not stray(tmp_path)


def test_higher_may_be_better(tmp_path):
    """With mode max the soup begins with the highest score, and a tie is kept."""
    paths = made(tmp_path, (1.0, 3.0, 3.0))
    soup = greedy(paths, tmp_path / "o.pt", evaluate=weight, merge=merge_checkpoints, mode="max")
    assert soup.members == (paths[1], paths[2])
    assert soup.score == 3


def test_each_trial_reads_two_files(tmp_path):
    """However large the soup, a trial reads the sum so far and one checkpoint."""
    paths = made(tmp_path, tuple(map(float, range(8))))
    merge = Counted()
    greedy(paths, tmp_path / "o.pt", evaluate=lambda _: 1.0, merge=merge, mode="max")
    assert max(map(len, merge.calls[:-2])) == 2
    assert len(merge.calls) == 7 + 6 + 3  # trials, sums, and the end
    assert merge.calls[-1] == paths


@pytest.mark.parametrize("shared", [False, True])
def test_the_result_is_the_mean_of_its_members(tmp_path, shared):
    """Sizes far apart, or copies that cannot change dtype: it is the plain mean to the bit."""
    paths = []
    for number in range(6):
        generator = torch.Generator().manual_seed(number)
        weights = torch.randn(500, generator=generator) * 10.0 ** (number - 3)
        content = {"w": weights, "h": weights.bfloat16(), "n": torch.tensor([1, 2])}
        paths.append(tmp_path / f"{number}.pt")
        torch.save(
            {"state_dict": content, "optimizer": {"m": weights if shared else weights + 1}},
            paths[-1],
        )
    soup = greedy(
        paths, tmp_path / "o.pt", evaluate=lambda _: 0.0, merge=merge_checkpoints, mode="min"
    )
    assert len(soup.members) == 6
    merge_checkpoints(paths, tmp_path / "plain.pt")
    assert (tmp_path / "o.pt").read_bytes() == (tmp_path / "plain.pt").read_bytes()


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.integers(-20, 20), min_size=2, max_size=5),
    st.integers(0, 3),
    st.sampled_from(["min", "max"]),
)
def test_never_worse_than_the_best_checkpoint(tmp_path_factory, values, seed, mode):
    """Whatever the scores, the result's own score is no worse than that of the best single one."""
    folder = tmp_path_factory.mktemp("soup")
    paths = made(folder, tuple(map(float, values)))

    def evaluate(path):
        return float(hash((round(weight(path), 4), seed)) % 1000)

    out = folder / "o.pt"
    soup = greedy(paths, out, evaluate=evaluate, merge=merge_checkpoints, mode=mode)
    sign = 1 if mode == "max" else -1
    assert sign * evaluate(out) >= max(sign * value for value in soup.singles.values())
    assert evaluate(out) == soup.score


@pytest.mark.parametrize(("bad", "left"), [([3], 2), ([3, 2], 1)])
def test_a_mean_that_is_worse_than_its_trial_loses_members(tmp_path, bad, left):
    """Where a sum's rounding hid that the mean is bad, the result is the mean of fewer."""
    paths = []
    for number in range(3):  # the sum in float64 forgets the 1
        paths.append(tmp_path / f"c{number}.pt")
        values = torch.tensor([(3 * 2.0**52, 1.0, 0.5 + 2.0**-53)[number]], dtype=torch.float64)
        torch.save({"w": values}, paths[-1])
    counts = []

    def merge(paths, output, **options):
        if ".mean." in output.name:
            counts.append(len(paths))
        return merge_checkpoints(paths, output, **options)

    def evaluate(path):
        return -1.0 if ".mean." in path.name and counts[-1] in bad else 1.0

    out = tmp_path / "o.pt"
    soup = greedy(paths, out, evaluate=evaluate, merge=merge, mode="max")
    assert (soup.members, soup.score) == (tuple(paths[:left]), 1.0)
    merge_checkpoints(paths[:left], tmp_path / "plain.pt")
    assert out.read_bytes() == (tmp_path / "plain.pt").read_bytes()
    assert verify_output(out).inputs == soup.members


# Interruptions


@pytest.mark.parametrize("fails_at", range(1, 8))
def test_a_run_goes_on_where_it_stopped(tmp_path, fails_at):
    """After a failure at any evaluation, the next run repeats none and ends with the same soup."""
    paths = made(tmp_path)
    out = tmp_path / "o.pt"
    told = []

    def evaluate(path, limit=fails_at):
        told.append(path)
        if len(told) == limit:
            raise MergeError("the evaluation failed")
        return abs(weight(path) - 2)

    def soup(evaluation):
        return greedy(paths, out, evaluate=evaluation, merge=merge_checkpoints, mode="min")

    with pytest.raises(MergeError, match="failed"):
        soup(evaluate)
    assert not out.exists()
    assert not stray(tmp_path)
    done = soup(lambda path: evaluate(path, 0))
    assert len(told) == 8  # seven, and the one that failed
    assert done.members == (paths[1], paths[0])
    assert [trial.remembered for trial in done.trials].count(True) == fails_at - 1


def test_a_torn_line_is_evaluated_again(tmp_path):
    """A log whose last line was cut by a kill serves up to there."""
    paths = made(tmp_path)
    out = tmp_path / "o.pt"
    greedy(paths, out, evaluate=weight, merge=merge_checkpoints, mode="min")
    log = tmp_path / "o.pt.soup.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:3]) + lines[3][:9])
    told = []
    again = greedy(
        paths,
        out,
        evaluate=lambda path: (told.append(path), weight(path))[1],
        merge=merge_checkpoints,
        mode="min",
        overwrite=True,
    )
    assert [trial.remembered for trial in again.trials][:3] == [True, True, False]
    assert len(told) == 5
    assert len(log.read_bytes().splitlines()) == 8
    assert all(json.loads(line) for line in log.read_bytes().splitlines())


@pytest.mark.parametrize("what", ["mode", "command", "inputs", "log"])
def test_the_log_of_another_soup_is_refused(tmp_path, what):
    """A log of other checkpoints, another command or mode is an error, and stays as it is."""
    paths = made(tmp_path)
    options = {"evaluate": weight, "merge": merge_checkpoints, "overwrite": True}
    greedy(paths, tmp_path / "o.pt", mode="min", **options)
    log = tmp_path / "o.pt.soup.jsonl"
    if what == "log":
        log.write_text("nonsense\nmore\n")
    if what == "inputs":
        os.utime(paths[0], (1, 1))
    before = log.read_bytes()
    with pytest.raises(MergeError, match="log of another soup"):
        greedy(
            paths,
            tmp_path / "o.pt",
            mode="max" if what == "mode" else "min",
            command="other" if what == "command" else "",
            **options,
        )
    assert log.read_bytes() == before


def test_the_last_evaluation_is_remembered_too(tmp_path):
    """A mean that is evaluated once more, as the sum was rounded, is not so in the next run."""
    paths = []
    for number in range(3):  # the sum in float64 forgets the 1, without which the mean is less
        paths.append(tmp_path / f"c{number}.pt")
        values = torch.tensor([(3 * 2.0**52, 1.0, 0.5 + 2.0**-53)[number]], dtype=torch.float64)
        torch.save({"w": values}, paths[-1])
    told = []

    def run(**options):
        return greedy(
            paths,
            tmp_path / "o.pt",
            evaluate=lambda path: (told.append(path), 1.0)[1],
            merge=merge_checkpoints,
            mode="max",
            **options,
        )

    first = run()
    assert len(told) == 6  # five, and the mean
    before = (tmp_path / "o.pt").read_bytes()
    assert run(overwrite=True).score == first.score
    assert len(told) == 6
    assert (tmp_path / "o.pt").read_bytes() == before


def test_a_log_that_was_read_is_only_added_to(tmp_path):
    """What stands in the log is not written again: a kill while it is opened loses nothing."""
    paths = made(tmp_path)
    options = {"evaluate": weight, "merge": merge_checkpoints, "mode": "min", "overwrite": True}
    greedy(paths, tmp_path / "o.pt", **options)
    log = tmp_path / "o.pt.soup.jsonl"
    before = log.read_bytes(), log.stat().st_mtime_ns
    greedy(paths, tmp_path / "o.pt", **options)
    assert (log.read_bytes(), log.stat().st_mtime_ns) == before


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

    options = {"evaluate": evaluate, "merge": merge_checkpoints, "mode": "max"}
    greedy(paths, tmp_path / "o", **options)
    assert all(
        trial.remembered
        for trial in greedy(paths, tmp_path / "o2", log=tmp_path / "o.soup.jsonl", **options).trials
    )


# What is refused


def test_a_score_that_is_nan_is_refused(tmp_path):
    """NaN is neither better nor worse: an error that names the checkpoint, and is not logged."""
    paths = made(tmp_path)
    with pytest.raises(MergeError, match="NaN") as caught:
        greedy(
            paths, tmp_path / "o.pt", evaluate=lambda _: nan, merge=merge_checkpoints, mode="min"
        )
    assert caught.value.where == str(paths[0])
    assert len((tmp_path / "o.pt.soup.jsonl").read_bytes().splitlines()) == 1


def test_the_output_is_none_of_the_checkpoints(tmp_path):
    """Even with --overwrite, and before anything is evaluated."""
    paths = made(tmp_path)
    with pytest.raises(MergeError, match="one of the checkpoints"):
        greedy(
            paths,
            paths[1],
            evaluate=pytest.fail,
            merge=merge_checkpoints,
            mode="min",
            overwrite=True,
        )


def test_an_output_in_the_way_is_seen_first(tmp_path):
    """Where the output exists, nothing is evaluated."""
    paths = made(tmp_path)
    (tmp_path / "o.pt").write_bytes(b"mine")
    with pytest.raises(MergeError, match="exists already"):
        greedy(paths, tmp_path / "o.pt", evaluate=pytest.fail, merge=merge_checkpoints, mode="min")
    assert (tmp_path / "o.pt").read_bytes() == b"mine"


def test_one_checkpoint_makes_no_soup(tmp_path):
    """Fewer than two checkpoints are a usage error, and missing ones an error."""
    paths = made(tmp_path)
    options = {"evaluate": weight, "merge": merge_checkpoints, "mode": "min"}
    with pytest.raises(UsageError, match="two checkpoints"):
        greedy(paths[:1], tmp_path / "o.pt", **options)
    with pytest.raises(MergeError, match="No such file"):
        greedy([*paths, tmp_path / "none.pt"], tmp_path / "o.pt", **options)


def test_a_real_command(tmp_path):
    """A command of the user's own evaluates real files, and the soup is better than each."""
    paths = made(tmp_path, (0.0, 10.0, 5.5))
    read = "torch.load(sys.argv[1])['model']['w'][0]"
    code = f"import sys, torch; print('error', abs(float({read}) - 5))"
    command = f'"{sys.executable}" -c "{code}" {{}}'
    soup = greedy(
        paths,
        tmp_path / "o.pt",
        evaluate=lambda path: score(command, path),
        merge=merge_checkpoints,
        mode="min",
        command=command,
    )
    assert soup.members == (paths[2], paths[0]) or soup.score <= 0.5
    assert Path(soup.output).exists()
