"""Greedy soups: which members, what is written, and what an interruption leaves."""

import re
import sys
from math import inf, nan

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from merge_avg import verify_output
from merge_avg.errors import MergeError, UsageError
from merge_avg.soup import greedy, score
from tests.helpers import merge_checkpoints
from tests.soup.helpers import made, soup_of, weight


def left_over(folder):
    return [path for path in folder.iterdir() if "tmp" in path.name]


def test_what_helps_is_kept(tmp_path):
    """With the score |mean - 2|, lower is better: 1 and 4 are kept, -2 and 9 hurt."""
    paths = made(tmp_path)
    out = tmp_path / "soup.pt"
    soup = soup_of(paths, out, lambda path: abs(weight(path) - 2))
    # Sorted: 1 (1), 4 (2), -2 (4), 9 (7). 1 + 4: 0.5, kept. - 2: 1, left. + 9: 2.67, left.
    assert soup.members == (paths[1], paths[0])
    assert soup.score == 0.5
    assert [trial.kept for trial in soup.trials[4:]] == [True, False, False]
    merge_checkpoints(soup.members, tmp_path / "plain.pt")
    assert out.read_bytes() == (tmp_path / "plain.pt").read_bytes()
    assert set(verify_output(out).inputs) == set(soup.members)
    assert not left_over(tmp_path)


def test_a_single_checkpoint_may_be_the_soup(tmp_path):
    """Where every other one hurts, the result is the best checkpoint alone, with its score."""
    paths = made(tmp_path, (3.0, 1.0, 2.0))
    soup = soup_of(paths, tmp_path / "o.pt")
    assert (soup.members, soup.score) == ((paths[1],), 1.0)
    assert weight(tmp_path / "o.pt") == 1.0


def test_higher_may_be_better(tmp_path):
    """With mode max the soup begins with the highest score, and a tie is kept."""
    paths = made(tmp_path, (1.0, 3.0, 3.0))
    soup = soup_of(paths, tmp_path / "o.pt", mode="max")
    assert soup.members == (paths[1], paths[2])
    assert soup.score == 3


def test_of_equal_checkpoints_the_first_begins(tmp_path):
    """A single checkpoint has to be better than those before it, and a soup only as good."""
    paths = made(tmp_path, (1.0, 2.0, 3.0))
    soup = soup_of(paths, tmp_path / "o.pt", lambda _: -inf, mode="max")
    assert soup.members == tuple(paths)
    assert [trial.kept for trial in soup.trials] == [True, False, False, True, True]


def test_every_evaluation_is_shown(tmp_path):
    """`show` is called with each trial as it is made, numbered out of all that there will be."""
    shown = []
    soup = soup_of(made(tmp_path), tmp_path / "o.pt", show=shown.append)
    assert tuple(shown) == soup.trials
    assert [(trial.number, trial.total) for trial in shown] == [(i, 7) for i in range(1, 8)]


def test_every_evaluation_is_announced(tmp_path):
    """`begin` is called before each with its members and number, but for those of the log."""
    heard = []
    told = {
        "begin": lambda *about: heard.append(about),
        "show": lambda trial: heard.append((trial.members, trial.number, trial.total)),
    }
    paths = made(tmp_path)
    soup = soup_of(paths, tmp_path / "o.pt", **told)
    each = [(trial.members, trial.number, trial.total) for trial in soup.trials]
    assert heard == [one for one in each for _ in range(2)]
    heard.clear()
    soup_of(paths, tmp_path / "o.pt", overwrite=True, **told)
    assert heard == each


def test_each_trial_is_a_merge_of_its_members(tmp_path):
    """Trials are plain merges, as the result is, and the last one that was kept is the result."""
    paths = made(tmp_path, tuple(map(float, range(4))))
    merged, tried = [], []

    def merge(paths, output, *, overwrite=False):
        merged.append((list(paths), output.name, overwrite))
        merge_checkpoints(paths, output, overwrite=overwrite)

    def evaluate(path):
        tried.append(path.read_bytes())
        return 1.0

    greedy(paths, tmp_path / "o.pt", evaluate=evaluate, merge=merge, mode="max")
    assert merged == [
        (paths[:2], "trial.pt", False),
        (paths[:3], "trial.pt", False),
        (paths, "trial.pt", False),
        (paths, "o.pt", False),
    ]
    assert (tmp_path / "o.pt").read_bytes() == tried[-1]


@pytest.mark.parametrize("shared", [False, True])
def test_the_result_is_the_mean_of_its_members(tmp_path, shared):
    """With sizes far apart, and weights that an optimizer shares, it is the mean to the bit."""
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
    soup = soup_of(paths, tmp_path / "o.pt", lambda _: 0.0)
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
    """For any scores, the result scores at least as well as the best checkpoint."""
    folder = tmp_path_factory.mktemp("soup")
    paths = made(folder, tuple(map(float, values)))

    def evaluate(path):
        return float(hash((weight(path), seed)) % 1000)

    out = folder / "o.pt"
    soup = soup_of(paths, out, evaluate, mode)
    sign = 1 if mode == "max" else -1
    assert sign * evaluate(out) >= max(sign * value for value in soup.singles.values())
    assert evaluate(out) == soup.score


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

    with pytest.raises(MergeError, match="failed"):
        soup_of(paths, out, evaluate)
    assert not out.exists()
    assert not left_over(tmp_path)
    done = soup_of(paths, out, lambda path: evaluate(path, 0))
    assert len(told) == 8  # seven, and the one that failed
    assert done.members == (paths[1], paths[0])
    assert [trial.remembered for trial in done.trials].count(True) == fails_at - 1


def test_a_score_that_is_nan_is_refused(tmp_path):
    """NaN is neither better nor worse: an error that names the checkpoint, and is not logged."""
    paths = made(tmp_path)
    with pytest.raises(MergeError, match="NaN") as caught:
        soup_of(paths, tmp_path / "o.pt", lambda _: nan)
    assert caught.value.where == str(paths[0])
    assert len((tmp_path / "o.pt.soup.jsonl").read_bytes().splitlines()) == 1


def test_the_output_may_not_be_one_of_the_checkpoints(tmp_path):
    """It is refused even with --overwrite, and before anything is evaluated."""
    paths = made(tmp_path)
    with pytest.raises(MergeError, match="is the input"):
        soup_of(paths, paths[1], pytest.fail, overwrite=True)


def test_an_output_in_the_way_is_seen_first(tmp_path):
    """Where the output exists, nothing is evaluated."""
    (tmp_path / "o.pt").write_bytes(b"mine")
    with pytest.raises(MergeError, match="exists already"):
        soup_of(made(tmp_path), tmp_path / "o.pt", pytest.fail)
    assert (tmp_path / "o.pt").read_bytes() == b"mine"


def test_one_checkpoint_makes_no_soup(tmp_path):
    """Fewer than two checkpoints are a usage error, and missing ones an error."""
    paths = made(tmp_path)
    with pytest.raises(UsageError, match="at least two checkpoints"):
        soup_of(paths[:1], tmp_path / "o.pt")
    with pytest.raises(MergeError, match="No such file"):
        soup_of([*paths, tmp_path / "none.pt"], tmp_path / "o.pt")


def test_inputs_are_not_written_to(tmp_path):
    """Neither the soup nor its log may lie in a checkpoint or be one: seen before evaluating."""
    paths = made(tmp_path)
    folder = tmp_path / "c"
    folder.mkdir()
    paths.append(paths.pop().rename(folder / "model.pt").parent)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.pt")}
    for output, log in (("c/soup.pt", None), ("o.pt", "c/log"), ("o.pt", "c0.pt")):
        with pytest.raises(MergeError, match="input"):
            soup_of(paths, tmp_path / output, pytest.fail, log=log and tmp_path / log)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_trial_is_a_temporary(tmp_path):
    """A trial has the output's suffix, and lies in a directory that is hidden, locked and gone."""
    paths = made(tmp_path)
    trials = []

    def evaluate(path):
        if path not in paths:
            folder = path.parent
            trials.append(path)
            assert folder.parent == tmp_path
            assert re.fullmatch(r"\.o\.pt\.\w{8}-\w{8}\.merge-avg-tmp", folder.name)
            merge_checkpoints(paths[:2], tmp_path / "other.pt", overwrite=True)  # which sweeps
            assert path.exists()
            (folder / "notes.txt").write_text("of an evaluation")
        return 1.0

    soup_of(paths, tmp_path / "o.pt", evaluate)
    assert {path.name for path in trials} == {"trial.pt"}
    assert not left_over(tmp_path)


def test_a_trial_that_was_written_to_does_not_stop_the_next(tmp_path):
    """What an evaluation leaves in the directory of a trial goes with it."""
    paths = []
    for number in range(3):
        paths.append(tmp_path / f"c{number}")
        paths[-1].mkdir()
        save_file({"w": torch.full((3,), float(number))}, paths[-1] / "model.safetensors")

    def evaluate(path):
        if path not in paths:
            (path / "results.json").write_text("{}")
        return 1.0

    soup = soup_of(paths, tmp_path / "o", evaluate, "max")
    assert len(soup.members) == 3
    assert [path.name for path in (tmp_path / "o").iterdir() if path.suffix == ".json"] == [
        "merge_avg.json"
    ]


@pytest.mark.large
def test_a_real_command(tmp_path):
    """A command of the user's own evaluates real files, and the soup is better than each."""
    paths = made(tmp_path, (0.0, 10.0, 5.5))
    read = "torch.load(sys.argv[1])['model']['w'][0]"
    code = f"import sys, torch; print('error', abs(float({read}) - 5))"
    command = f'"{sys.executable}" -c "{code}" {{}}'
    soup = soup_of(paths, tmp_path / "o.pt", lambda path: score(command, path), command=command)
    # 5.5 alone: 0.5. With 0: 2.25, left. With 10: 2.75, left.
    assert (soup.members, soup.score) == ((paths[2],), 0.5)
    assert weight(tmp_path / "o.pt") == 5.5
