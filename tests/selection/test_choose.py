"""Selection, weightings and series, alone and through the command."""

import errno
import io
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from merge_avg import merge_checkpoints
from merge_avg.checkpoint import File
from merge_avg.errors import MergeError, UsageError
from merge_avg.options import Criteria, Options, Series, Weighting
from merge_avg.plan import prepare
from merge_avg.selection import _choose, choose
from merge_avg.selection._schemes import exponent
from tests.selection.helpers import bare, lightning, names, select, trainer, why


def of_epoch(epoch, value, extra=""):
    return lightning(Path(), epoch, epoch * 10, extra, value)


def value(path):
    return float(torch.load(path)["state_dict"]["w"][0])


def test_b5_several_averages_stay_independent(command):
    """B5: of epochs 1, 2 and 3, the last two, the last three and the best two are averaged."""
    for epoch in (1, 2, 3):
        of_epoch(epoch, epoch, f"-val_loss={epoch}.0")
    assert command(".", "-o", "avg-{name}.ckpt", "--last", 3, "--last", 2)[0] == 0
    assert (value("avg-last-3.ckpt"), value("avg-last-2.ckpt")) == (2.0, 2.5)
    assert command(".", "-o", "best.ckpt", "--best", 2, "--metric", "val_loss")[0] == 0
    assert command(".", "-o", "all.ckpt", "--best", 3, "--metric", "val_loss")[0] == 0
    assert (value("best.ckpt"), value("all.ckpt")) == (1.5, 2.0)


def test_b9_run_twice(command):
    """B9: the second run leaves the first one's output out, and says so."""
    for epoch in (1, 2):
        of_epoch(epoch, epoch)
    assert command(".", "-o", "a.ckpt")[0] == 0
    code, _, err = command(".", "-o", "b.ckpt")
    assert code == 0
    assert value("b.ckpt") == 1.5
    assert re.search(r"- a\.ckpt .* an earlier output of merge-avg", err)
    code, out, _ = command(".", "-o", "b.ckpt", "--overwrite", "--json")
    found = {entry["path"]: entry for entry in json.loads(out)["candidates"]}
    assert found["b.ckpt"]["why"] == "an earlier output of merge-avg"


@pytest.mark.parametrize(("metric", "mean"), [("bleu", 25.0), ("loss", 15.0)])
def test_b10_the_best_two(command, metric, mean):
    """B10: the best two by BLEU and by loss, and the direction is printed."""
    for number in (10, 20, 30):
        content = {"model": {"w": torch.full((2,), float(number))}}
        torch.save(content, f"checkpoint_best_{metric}_{number}.pt")
    code, _, err = command(".", "-o", "o.pt", "--best", 2)
    assert code == 0
    assert float(torch.load("o.pt")["model"]["w"][0]) == mean
    assert f"best is the {'highest' if metric == 'bleu' else 'lowest'} {metric}" in err


def test_b12_b13_b14_words(command):
    """B12, B13, B14: steps are exact, gaps are mentioned, too few are an error with a list."""
    for epoch in (1, 2, 50):
        of_epoch(epoch, epoch)
    code, out, _ = command(".", "-o", "x.ckpt", "--steps", 10, "--json", "--allow-trivial")
    assert [entry["step"] for entry in json.loads(out)["inputs"]] == [10]
    code, _, err = command(".", "-o", "y.ckpt", "--last", 3)
    assert "gap between epoch 2 and epoch 50" in err
    code, _, err = command(".", "-o", "z.ckpt", "--last", 5)
    assert code == 1
    assert "the last 5 are asked for, and there are 3 checkpoints: 'epoch=1-step=10.ckpt'" in err
    assert not Path("z.ckpt").exists()


def test_a_dry_run_shows_the_candidates(command):
    """Every candidate is a line that says whether it is chosen, and why."""
    for epoch in (1, 2, 3):
        of_epoch(epoch, epoch, f"-val_loss={epoch}.5")
    code, _, err = command(".", "-o", "o.ckpt", "--best", 2, "--dry-run")
    assert code == 0
    known = r"\+ epoch=1-step=10-val_loss=1\.5\.ckpt step 10 epoch 1 metric 1\.5 weight 0\.5 among"
    assert re.search(known, err)
    assert re.search(r"- epoch=3-.* not among the best 2", err)
    assert not Path("o.ckpt").exists()


def test_files_that_say_nothing_need_no_table(command):
    """Where the user named each file, and none tells anything, there is no table of candidates."""
    paths = [bare(Path(f"{name}.pt"), name == "a") for name in "ab"]
    code, out, err = command(*paths, "-o", "o.ckpt", "--json")
    assert code == 0
    assert "asked for" not in err
    assert json.loads(out)["candidates"] == []


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        (["--weighting", "linear"], [1 / 6, 2 / 6, 3 / 6]),
        (["--weighting", "ema:0.5"], [0.25, 0.25, 0.5]),
        (["-w", "1,0,1"], [0.5, 0, 0.5]),
        (["-w", "1,0.5,-0.5", "--no-normalize"], [1, 0.5, -0.5]),
        (["--weighting", "metric", "--metric", "val_acc"], [1 / 6, 2 / 6, 3 / 6]),
    ],
)
def test_weightings(command, options, weights):
    """Weights by rule go to the chosen checkpoints, and are printed and stored."""
    for epoch in (1, 2, 3):
        of_epoch(epoch, epoch, f"-val_acc={epoch}.0")
    code, out, err = command(".", "-o", "o.ckpt", "--json", *options)
    assert code == 0, err
    report = json.loads(out)
    # The newest is the template, and so comes first.
    assert [entry["epoch"] for entry in report["inputs"]] == [3, 1, 2]
    assert report["outputs"][0]["weights"] == pytest.approx([weights[2], *weights[:2]])
    mean = sum(weight * epoch for weight, epoch in zip(weights, (1, 2, 3), strict=True))
    assert value("o.ckpt") == pytest.approx(mean)
    for epoch, weight in enumerate(weights, 1):
        assert re.search(rf"epoch={epoch}-.* weight {weight:.4g}", err)


def test_leave_one_out_and_prefixes(command):
    """One reading averages all but each, or the first two, the first three and so on, by age."""
    for fold in (1, 2, 3):
        save_file({"w": torch.full((2,), float(fold))}, f"fold{fold}.safetensors")
        save_file({"w": torch.full((2,), float(fold))}, f"step={10**fold}.safetensors")
    code, out, _ = command("fold*.safetensors", "-o", "oof-{name}.safetensors", "--leave-one-out")
    assert code == 0
    assert out.split() == [f"oof-without-fold{fold}.safetensors" for fold in (1, 2, 3)]
    assert [float(load_file(path)["w"][0]) for path in out.split()] == [2.5, 2.0, 1.5]
    steps = [f"step={step}.safetensors" for step in (1000, 10, 100)]
    code, out, _ = command(*steps, "-o", "p-{name}.safetensors", "--prefixes")
    assert [float(load_file(path)["w"][0]) for path in out.split()] == [1.5, 2.0]
    code, _, err = command("fold*.safetensors", "-o", "q-{name}.safetensors", "--prefixes")
    assert code == 1
    assert "--prefixes goes by age, and its step or epoch is not known" in err


def test_sliding_windows(command):
    """One reading averages each window of a run; each weighs its own, and is named by its last."""
    for step in (100, 200, 300, 400, 900):
        torch.save({"w": torch.full((64,), float(step))}, f"step={step}.pt")
    code, out, _ = command(".", "-o", "a-{name}.pt", "--sliding", "3", "--json")
    assert code == 0
    report = json.loads(out)
    names = [f"a-step-{step}.pt" for step in (300, 400, 900)]
    assert [one["path"] for one in report["outputs"]] == names
    means = [float(torch.load(name)["w"][0]) for name in names]
    assert means == pytest.approx([200, 300, 1600 / 3])
    assert 5 <= report["bytes_read"] / (64 * 4) < 6  # and small records of the template
    ema = ["--weighting", "ema:0.5", "--sliding", "2:3"]
    code, out, err = command(".", "-o", "b-{name}.pt", *ema)
    assert out.split() == ["b-step-200.pt", "b-step-900.pt"]
    assert float(torch.load("b-step-200.pt")["w"][0]) == 150
    assert "note: ema:0.5 goes by steps, which are not evenly apart" in err
    for option, words in (("1", "window '1'"), ("9", "--sliding 9 of 5"), ("2:0", "window '2:0'")):
        code, _, err = command(".", "-o", "c-{name}.pt", "--sliding", option)
        assert (code, words in err) == (2, True), err
    Path("other").mkdir()
    for name in "ab":
        torch.save({"w": torch.full((2,), float(ord(name)))}, f"other/{name}.pt")
    code, _, err = command("other/a.pt", "other/b.pt", "-o", "c-{name}.pt", "--sliding", "2")
    assert "--sliding goes by age, and its step or epoch is not known" in err


def test_power_function_emas_of_raw_checkpoints(command):
    """Each checkpoint stands for the steps since the one before; without steps it is one step."""
    for step in (100, 300):
        torch.save({"w": torch.full((2,), float(step)), "step": step}, f"step={step}.pt")
    code, out, err = command(".", "-o", "o.pt", "--weighting", "power:0.1", "--json")
    assert code == 0, err
    share = (1 / 3) ** (exponent(0.1) + 1)
    assert json.loads(out)["outputs"][0]["weights"] == pytest.approx([1 - share, share])

    for epoch in range(2):
        torch.save({"w": torch.full((2,), float(epoch)), "epoch": epoch}, f"e{epoch}.ckpt")
    code, out, err = command("e0.ckpt", "e1.ckpt", "-o", "e.ckpt", "--weighting", "power:0.1", "-q")
    assert code == 0, err  # the first epoch is over when it is saved as 0
    assert torch.load("e.ckpt")["w"][0] == pytest.approx(1 - 0.5 ** (exponent(0.1) + 1))


def test_post_hoc_ema(command):
    """Stored EMAs make one of another width, in which a constant tensor stays as it is."""
    for step in (500, 1000):
        for sigma in ("0.050", "0.100"):
            path = f"snapshot-{step:07}-{sigma}.pt"
            torch.save({"w": torch.ones(2), "v": torch.full((2,), step * float(sigma))}, path)
    code, out, err = command(".", "-o", "o.pt", "--phema", "0.1", "--json")
    assert code == 0, err
    assert json.loads(out)["outputs"][0]["weights"] == pytest.approx([0, 0, 0, 1], abs=1e-4)
    assert torch.load("o.pt")["w"].tolist() == pytest.approx([1, 1])
    torch.save({"w": torch.ones(2)}, "other.pt")
    code, _, err = command("snapshot-0000500-0.050.pt", "other.pt", "-o", "p.pt", "--phema", "0.1")
    assert code == 2
    assert "the width of its EMA" in err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["-w", "1,2", "--weighting", "linear"], "exclude each other"),
        (["-w", "1,2,3"], "3 weights for 2 checkpoints"),
        (["--leave-one-out"], "as many outputs"),
        (["--eval", "x"], "needs the command soup, --eval and --mode"),
        (["--soup", "greedy"], "a soup needs --eval and --mode"),
        (["--soup", "greedy", "--eval", "x", "--mode", "min", "-w", "1,2"], "plain mean"),
        (["--steps", "x"], "not understood"),
        (["--weighting", "cosine"], "no weighting 'cosine'"),
        (["-w", "2,-1"], "negative"),
    ],
)
def test_options_that_do_not_fit(command, options, words):
    """Options that exclude each other, or lack one, are usage errors: exit code 2."""
    paths = [of_epoch(epoch, epoch) for epoch in (1, 2)]
    code, _, err = command(*paths, "-o", "o.ckpt", *options)
    assert code == 2
    assert words in err
    assert not Path("o.ckpt").exists()


def test_a_summary_for_github(command, monkeypatch):
    """GITHUB_STEP_SUMMARY gets a table; a page that cannot be written is a note, not a failure."""
    paths = [of_epoch(epoch, epoch) for epoch in (1, 2)]
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "page.md")
    assert command(*paths, "-o", "a.ckpt")[0] == 0
    assert "### merge-avg: 2 checkpoints averaged" in Path("page.md").read_text()
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "no/such/page.md")
    code, _, err = command(*paths, "-o", "b.ckpt")
    assert code == 0
    assert "note: no/such/page.md: no summary was written" in err


def test_schemes_apply_to_each_average(tmp_path, monkeypatch):
    """Each average of a series is weighted on its own: its oldest checkpoint has weight 1."""
    monkeypatch.chdir(tmp_path)
    paths = [of_epoch(epoch, epoch) for epoch in (1, 2, 3)]
    series = Series(leave_one_out=True)
    choice = choose(paths, Path("{name}.pt"), Criteria(), series, Weighting(scheme="linear"))
    assert list(choice.outputs.values()) == [(0, 1, 2), (1, 0, 2), (1, 2, 0)]
    with pytest.raises(UsageError, match="2 weights for 3"):
        choose(paths, Path("o.pt"), Criteria(), Series(), Weighting(weights=[1, 2]))


@pytest.fixture
def scans(monkeypatch):
    """Count the scans of each file."""
    found = Counter()
    of = File.of

    def counting(path):
        found[path.name] += 1
        return of(path)

    monkeypatch.setattr(File, "of", counting)
    return found


def chosen(criteria=None, weighting=None):
    return choose(["."], Path("o.ckpt"), criteria or Criteria(), Series(), weighting or Weighting())


def test_each_checkpoint_is_scanned_once(tmp_path, monkeypatch, scans):
    """Planning takes the layouts of a selection: no header and no pickle is read twice."""
    monkeypatch.chdir(tmp_path)
    paths = [of_epoch(epoch, epoch) for epoch in (1, 2, 3)]
    choice = chosen(Criteria(last=2))
    assert list(choice.scanned[0]) == list(choice.paths) == paths[1:]
    job = prepare(choice.paths, choice.outputs, Options(), layouts=choice.scanned[0])
    assert [layout.path for layout in job.layouts] == paths[1:]
    assert scans == dict.fromkeys([path.name for path in paths], 1)


def test_post_hoc_ema_scans_once_too(tmp_path, monkeypatch, scans):
    """Steps and widths are read from layouts that planning takes as well."""
    monkeypatch.chdir(tmp_path)
    paths = [f"snapshot-{step:07}-0.100.pt" for step in (500, 1000)]
    for path in paths:
        torch.save({"w": torch.ones(2)}, path)
    choice = choose(
        paths, Path("{name}.pt"), Criteria(), Series(prefixes=True), Weighting(sigma=0.1)
    )
    prepare(choice.paths, choice.outputs, Options(), layouts=choice.scanned[0])
    assert scans == dict.fromkeys(paths, 1)


@pytest.mark.parametrize("criteria", [Criteria(), Criteria(last=4)])
def test_layouts_are_kept_while_there_is_room(tmp_path, monkeypatch, scans, criteria):
    """With more tensors than there is room for, the template at most is scanned again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_choose, "_MOST_TENSORS", 2)
    paths = [of_epoch(epoch, epoch) for epoch in (1, 2, 3, 4)]
    choice = choose(["."], Path("o.ckpt"), criteria, Series(), Weighting())
    assert list(choice.scanned[0]) == paths[2:]
    options = Options(template=paths[1])
    job = prepare(choice.paths, choice.outputs, options, *choice.scanned)
    assert job.layout.whole
    # Of a selection, those are forgotten that are mostly not chosen.
    again = paths[:2] if criteria.last else paths[1:2]
    assert scans == {path.name: 1 + (path in again) for path in paths}


def test_choosing_needs_no_torch(tmp_path, monkeypatch):
    """A dry run with a selection does not import torch."""
    monkeypatch.chdir(tmp_path)
    for epoch in (1, 2):
        of_epoch(epoch, epoch)
    code = "import sys; from merge_avg.cli import main\ntry: main()\nexcept SystemExit: pass\n"
    code += "assert 'torch' not in sys.modules"
    arguments = [sys.executable, "-c", code, ".", "-o", "o.ckpt", "--last", "2", "--dry-run"]
    subprocess.run(arguments, check=True, capture_output=True)


# Which checkpoints are chosen, which are not, and the words for it.


def test_named_files_keep_their_order(tmp_path):
    """Files that are named one by one are averaged in that order, whatever their age."""
    paths = [lightning(tmp_path, epoch, epoch) for epoch in (2, 3, 1)]
    choice = select(paths, Criteria())
    assert choice.paths == tuple(paths)
    assert choice.newest(choice.paths) == paths[1]


def test_a_run_is_sorted_by_step(tmp_path):
    """A directory of checkpoints stands for all of them, the oldest first, by number."""
    for epoch, step in ((2, 1000), (0, 10), (1, 100)):
        lightning(tmp_path, epoch, step)
    found = names(select([tmp_path], Criteria()))
    assert found == ["epoch=0-step=10.ckpt", "epoch=1-step=100.ckpt", "epoch=2-step=1000.ckpt"]


def test_other_files_of_a_run_are_left_out_with_the_reason(tmp_path):
    """Files of a run that are not checkpoints are in the table, with the reason."""
    lightning(tmp_path, 0, 10)
    (tmp_path / "broken.pt").write_bytes(b"PK\x03\x04 and no more")
    selection = select([tmp_path], Criteria())
    assert names(selection) == ["epoch=0-step=10.ckpt"]
    assert why(selection)["broken.pt"].startswith("no checkpoint:")
    with pytest.raises(MergeError, match="damaged"):
        select([tmp_path / "broken.pt"], Criteria(last=1))


def test_a_missing_file_is_an_error(tmp_path):
    """A path that does not exist is an error that names it."""
    with pytest.raises(MergeError, match="No such file"):
        select([tmp_path / "none.pt", Path("x.pt")], Criteria(last=1))


def test_b9_earlier_outputs_do_not_count(tmp_path):
    """B9: what an earlier merge wrote into the run is left out, and the table says why."""
    paths = [lightning(tmp_path, epoch, epoch) for epoch in range(3)]
    merge_checkpoints(paths, tmp_path / "epoch=9-step=9.ckpt")
    selection = select([tmp_path], Criteria(last=2))
    assert names(selection) == ["epoch=1-step=1.ckpt", "epoch=2-step=2.ckpt"]
    assert why(selection)["epoch=9-step=9.ckpt"] == "an earlier output of merge-avg"


def test_an_output_that_is_a_checkpoint_is_no_output(command):
    """A file in a run that no merge wrote is a checkpoint, and is not overwritten as the output."""
    lightning(Path(), 0, 1)
    out = bare(Path("out.pt"))
    assert set(names(select(["."], Criteria(), out))) == {"epoch=0-step=1.ckpt", "out.pt"}
    code, _, err = command("epoch=0-step=1.ckpt", "out.pt", "-o", "out.pt", "--overwrite")
    assert code == 1
    assert "the output is the input" in err


def test_nothing_left_is_an_error(tmp_path):
    """A run that holds only the output of this merge is an error that says what is there."""
    paths = [bare(tmp_path / f"{name}.pt", name == "a") for name in "ab"]
    merge_checkpoints(paths, tmp_path / "o.pt")
    for path in paths:
        path.unlink()
    with pytest.raises(MergeError, match=r"no checkpoint to average.*o\.pt"):
        select([tmp_path], Criteria(), tmp_path / "o.pt")
    assert names(select([tmp_path], Criteria())) == ["o.pt"]  # on which another mean may go on


@pytest.mark.parametrize(
    "series", [Series(leave_one_out=True, prefixes=True), Series(lasts=(2, 3), prefixes=True)]
)
def test_series_exclude_each_other(series):
    """A run makes one series of averages; that shows before anything is read."""
    with pytest.raises(UsageError, match="exclude each other"):
        choose(["none.pt"], Path("{name}.pt"), Criteria(), series, Weighting())


@pytest.mark.parametrize("what", ["folder", "file"])
def test_what_cannot_be_read_is_not_left_out(tmp_path, monkeypatch, what):
    """In a run, what is no checkpoint is left out, but what cannot be read may be one: an error."""
    for step in (10, 20):
        trainer(tmp_path, step)
    (tmp_path / "checkpoint-20" / "sub").mkdir()
    place = tmp_path / "checkpoint-20" / ("sub" if what == "folder" else "model.safetensors")

    def refusing(real):
        def call(path, *args, **kwargs):
            if os.fspath(path) == str(place):
                raise PermissionError(errno.EACCES, "Permission denied", str(place))
            return real(path, *args, **kwargs)

        return call

    monkeypatch.setattr(os, "scandir", refusing(os.scandir))
    monkeypatch.setattr(io, "open", refusing(io.open))
    with pytest.raises(MergeError, match="Permission denied") as caught:
        select([tmp_path], Criteria(last=1))
    assert caught.value.where == str(place)


# Runs of real trainings: several series, averages, and files that say nothing.


def run(folder, *names, start=0):
    """Write files whose weights are 0, 1, 2, ..., and which say nothing but their names."""
    for value, name in enumerate(names, start):
        bare(folder / name, value)


@pytest.mark.parametrize(
    ("name", "average"),
    [
        ("epoch-{}.pt", "epoch-3-avg-2.pt"),
        ("{}.pt", "avg_3.pt"),
        ("{}epoch.pth", "valid.acc.ave_3best.pth"),
        ("checkpoint{}.pt", "checkpoint_avg3.pt"),
        ("model_{}.pth", "model_swa.pth"),
        ("model-step={}.ckpt", "averaged.ckpt"),
    ],
)
def test_averages_of_other_tools_do_not_count(tmp_path, name, average):
    """What a recipe averaged of the run is left out, by its name, whatever is asked for."""
    run(tmp_path, *(name.format(n) for n in (1, 2, 3)), average)
    for criteria in (Criteria(), Criteria(last=2)):
        selection = select([tmp_path], criteria)
        assert average not in names(selection)
        assert why(selection)[average] == "an average of other checkpoints, by its name"
    # It is taken where there is nothing else, or where it is given a weight.
    (tmp_path / "avg").mkdir()
    run(tmp_path / "avg", average, f"2-{average}")
    assert len(select([tmp_path / "avg"], Criteria()).paths) == 2
    paths = [tmp_path / name.format(1), tmp_path / average]
    assert names(select(paths, Criteria())) == [name.format(1)]
    weighted = choose(paths, Path("o"), Criteria(), Series(), Weighting(weights=[1, 3]))
    assert list(weighted.paths) == paths


@pytest.mark.parametrize("other", ["epoch={}-avg_loss=0.5.pt", "epoch_{}_avg_val_acc_0.93.pt"])
def test_metrics_that_are_averages_count(tmp_path, other):
    """A metric called avg_loss does not make its file an average of others."""
    run(tmp_path, *(other.format(n) for n in (1, 2)), "last_3.pt")
    assert len(select([tmp_path], Criteria()).paths) == 3


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("G_{}000.pth", "D_{}000.pth"),
        ("model_{}.pt", "model_{}_ema.pt"),
        ("net_g_{}.pth", "net_g_ema_{}.pth"),
        ("epoch_{}.pt", "fp16_epoch_{}.pt"),
        ("epoch={}.ckpt", "epoch={}-v1.ckpt"),
    ],
)
def test_series_of_the_same_epochs_are_not_mixed(tmp_path, one, other):
    """Names that differ in more than a number, at the same epochs, are a choice of the user's."""
    for number, name in enumerate((one, other)):
        run(tmp_path, *(name.format(n) for n in (1, 2, 3)), start=number * 3)
    for criteria in (Criteria(), Criteria(last=1), Criteria(last=3)):
        with pytest.raises(MergeError, match="two series of names") as caught:
            select([tmp_path], criteria)
        assert "pattern" in str(caught.value.hint)
    listed = [tmp_path / one.format(n) for n in (1, 2, 3)]
    assert select(listed, Criteria()).paths == tuple(listed)
    assert names(select(listed, Criteria(last=1))) == [one.format(3)]


def test_two_of_one_epoch_are_mentioned(tmp_path):
    """Two chosen files with the same epoch and other weights are taken, with a note."""
    run(tmp_path, "model_1.pt", "model_2.pt", "model_3.pt")
    torch.save({"w": torch.full((2,), 9.0), "epoch": 3}, tmp_path / "ema.pt")
    note = "ema.pt and model_3.pt are both of epoch 3, with other weights"
    assert note in select([tmp_path], Criteria(last=2)).notes
    assert not select([tmp_path], Criteria(epochs=(1, 2, None))).notes


def test_folds_of_one_epoch_are_not_mentioned(tmp_path):
    """Checkpoints of other folds may well be of the same epoch."""
    for fold in (1, 2):
        (tmp_path / f"fold{fold}").mkdir()
        bare(tmp_path / f"fold{fold}" / "epoch_3.pt", fold)
    assert not select([tmp_path], Criteria()).notes


@pytest.mark.parametrize(
    "criteria", [Criteria(last=2), Criteria(epochs=(2, 3, None)), Criteria(min_interval=1)]
)
def test_a_file_that_says_no_epoch_is_left_out_of_a_selection(tmp_path, criteria):
    """What tells no epoch is left out with a reason; where all are taken, a note mentions it."""
    run(tmp_path, "model_1.pth", "model_2.pth", "model_3.pth", "best.pth")
    selection = select([tmp_path], criteria)
    assert names(selection)[-2:] == ["model_2.pth", "model_3.pth"]
    assert why(selection)["best.pth"] == "its epoch is not known"
    selection = select([tmp_path], Criteria())
    assert len(selection.paths) == 4
    assert "no step or epoch is known, unlike for the others: 'best.pth'" in selection.notes[0]


def test_the_clock_that_most_tell_decides(tmp_path):
    """Of epochs, and steps of a few others, the last ones are those of the clock that more have."""
    run(
        tmp_path,
        *(f"epoch-{n}.pt" for n in range(1, 6)),
        "checkpoint-4000.pt",
        "checkpoint-8000.pt",
    )
    selection = select([tmp_path], Criteria(last=2))
    assert names(selection) == ["epoch-4.pt", "epoch-5.pt"]
    assert why(selection)["checkpoint-8000.pt"] == "its epoch is not known"
    assert names(select([tmp_path], Criteria(steps=(5000, None, None)))) == ["checkpoint-8000.pt"]


def test_epochs_count_where_only_some_tell_steps(tmp_path):
    """The last ones are found by epoch if a step is inside some of the files only."""
    for epoch in (1, 2, 3):
        content = {"w": torch.full((2,), float(epoch))}
        torch.save(
            {"model": content, **({"step": 10} if epoch == 1 else {})}, tmp_path / f"m_{epoch}.pt"
        )
    assert names(select([tmp_path], Criteria(last=2))) == ["m_2.pt", "m_3.pt"]
    assert names(select([tmp_path], Criteria())) == ["m_1.pt", "m_2.pt", "m_3.pt"]


def test_what_is_inside_counts_before_the_names_of_a_run(tmp_path):
    """Names that count something else than the files do not decide."""
    for number in (1, 2, 3):
        torch.save(
            {"w": torch.full((2,), float(number)), "epoch": 9 - number}, tmp_path / f"{number}.pt"
        )
    assert names(select([tmp_path], Criteria(last=1))) == ["1.pt"]


def test_states_of_a_training_are_no_checkpoints(tmp_path):
    """Files that hold no weights are left out of a run, and are an error where they are named."""
    run(tmp_path, "model_1.pt", "model_2.pt")
    for number in (1, 2):
        state = {0: {"exp_avg": torch.ones(2), "step": torch.tensor(1.0)}}
        torch.save(
            {"state": state, "param_groups": [{"params": [0]}]}, tmp_path / f"opt_{number}.pt"
        )
    selection = select([tmp_path], Criteria(last=2))
    assert names(selection) == ["model_1.pt", "model_2.pt"]
    assert "no weights" in why(selection)["opt_1.pt"] or "optimizer" in why(selection)["opt_1.pt"]


def test_the_best_of_ignite(tmp_path):
    """The one metric is found without its name, and a negated loss is best where it is high."""
    for epoch, loss in enumerate((0.9, 0.5, 0.2, 0.1, 0.3), 1):
        bare(tmp_path / f"best_model_{epoch}_neg_loss={-loss:.4f}.pt", epoch)
    for metric in (None, "neg_loss"):
        selection = select([tmp_path], Criteria(best=2, metric=metric))
        assert [path.name[11:12] for path in selection.paths] == ["3", "4"]
        assert "best is the highest neg_loss" in selection.notes
    with pytest.raises(MergeError, match="no checkpoint has the metric 'loss'"):
        select([tmp_path], Criteria(best=2, metric="loss"))


@pytest.mark.parametrize("name", ["{}epoch.pth", "net_g_{}000.pth", "model_{}.pth", "{:04}.pth"])
def test_a_dry_run_shows_steps_and_reasons(command, name):
    """The table has the epoch or step that a name tells in its run, and why a file is left out."""
    run(Path(), *(name.format(n) for n in range(1, 13)), "final.pth")
    code, _, err = command(".", "-o", "out.pth", "--last", 3, "--dry-run")
    assert code == 0
    clock, number = ("step", 12000) if "net" in name else ("epoch", 12)
    assert re.search(rf"\+ \S+ +{clock} {number} .*among the last 3", err)
    assert re.search(rf"- final\.pth .*its {clock} is not known", err)
    assert command(".", "-o", "out.pth", "--last", 3)[0] == 0
    assert float(torch.load("out.pth")["w"][0]) == 10.0


# One meaning for the same words, whether the shell expands a pattern or merge-avg does.


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ([], {500: 1 / 3, 1000: 1 / 3, 1500: 1 / 3}),
        (["--weighting", "linear"], {500: 1 / 6, 1000: 2 / 6, 1500: 3 / 6}),
        (["--weighting", "ema:0.5"], {500: 0.25, 1000: 0.25, 1500: 0.5}),
        (["-w", "1,2,5"], {1000: 1 / 8, 1500: 2 / 8, 500: 5 / 8}),
        (["--last", "2", "--weighting", "linear"], {1000: 1 / 3, 1500: 2 / 3}),
    ],
)
def test_a_pattern_means_what_the_shell_makes_of_it(command, tmp_path, options, weights):
    """Quoted and unquoted patterns choose and weigh alike, and the newest is the template."""
    for step in (500, 1000, 1500):
        trainer(tmp_path, step)
    listed = sorted(path.name for path in tmp_path.iterdir())
    assert listed == ["checkpoint-1000", "checkpoint-1500", "checkpoint-500"]
    mean = sum(step * weight for step, weight in weights.items())
    found = []
    for number, arguments in enumerate((["checkpoint-*"], listed)):
        code, out, err = command(*arguments, "-o", f"out{number}", "--json", *options)
        assert code == 0, err
        report = json.loads(out)
        known = {one["step"]: one["weight"] for one in report["inputs"]}
        assert known == pytest.approx(weights)
        assert report["template"] == "checkpoint-1500"
        assert "checkpoint-1500 is the template, as the newest" in report["notes"]
        for step, weight in weights.items():
            assert re.search(rf"checkpoint-{step} +step {step} .*weight {weight:.4g}\b", err)
        by_hand = "not by age: 'checkpoint-1000', 'checkpoint-1500', 'checkpoint-500'"
        assert (by_hand in err) == ("-w" in options)
        merged = load_file(tmp_path / f"out{number}" / "model.safetensors")
        assert merged["w"].tolist() == pytest.approx([mean] * 2)
        state = json.loads((tmp_path / f"out{number}" / "trainer_state.json").read_text())
        assert state["global_step"] == 1500
        found.append(report["inputs"])
    assert found[0] == found[1]


@pytest.mark.parametrize("option", [["--weighting", "linear"], ["--prefixes"]])
def test_what_goes_by_age_needs_ages(command, option):
    """Checkpoints that tell no age, or the same, are refused with both ways out."""
    for name in "abc":
        bare(Path(f"{name}.pt"), ord(name))
    code, _, err = command("a.pt", "b.pt", "-o", "o-{name}.pt", *option)
    assert code == 1
    assert "a.pt: " in err
    assert "goes by age, and its step or epoch is not known" in err
    assert "give weights with -w" in err
    for name in "abc":
        torch.save({"w": torch.full((2,), ord(name)), "epoch": 3}, f"{name}.pt")
    code, _, err = command("a.pt", "b.pt", "-o", "o-{name}.pt", *option)
    assert code == 1
    assert "b.pt: " in err
    assert "and a.pt is of the same epoch 3" in err


def test_an_earlier_output_is_left_out_however_it_is_named(command):
    """Of *.pt, which the shell expands, the earlier average does not count, and a note says so."""
    for name in ("a", "b", "other name"):
        bare(Path(f"{name}.pt"), ord(name[0]))
    assert command("a.pt", "b.pt", "-o", "merged.pt", "-q")[0] == 0
    everything = sorted(path.name for path in Path().iterdir())
    for arguments in (everything, ["*.pt"], ["."]):
        code, _, err = command(*arguments, "-o", "merged.pt", "--overwrite")
        assert code == 0, err
        assert torch.load("merged.pt")["w"].tolist() == [(97 + 98 + 111) / 3] * 2
        assert "note: left out 'merged.pt': an earlier output of merge-avg" in err
    # With a weight it is meant, and told.
    _, _, err = command("merged.pt", "a.pt", "-w", "3,1", "-o", "next.pt")
    assert "note: averaged too, as weights are given: 'merged.pt', an earlier output" in err
    assert torch.load("next.pt")["w"].tolist() == [(97 + 98 + 111 + 97) / 4] * 2


def test_folds_of_one_epoch_keep_the_first_as_the_template(command):
    """Of checkpoints of one age the first that is named is the template; no note doubts."""
    for fold in (1, 2, 10):
        content = {"state_dict": {"w": torch.full((2,), float(fold))}, "epoch": 9}
        torch.save(content, f"fold{fold}.ckpt")
    code, out, _ = command("fold2.ckpt", "fold1.ckpt", "fold10.ckpt", "-o", "o.ckpt", "--json")
    report = json.loads(out)
    assert (code, report["template"]) == (0, "fold2.ckpt")
    assert not any("both of epoch" in note for note in report["notes"])


def test_a_number_without_a_word_makes_no_template(command):
    """1.pt and 2.pt may be folds: the first is the template, unless they tell their epochs."""
    for number in (1, 2):
        bare(Path(f"{number}.pt"), number)
    _, out, _ = command("1.pt", "2.pt", "-o", "o.pt", "--json")
    assert json.loads(out)["template"] == "1.pt"
    _, out, _ = command("1.pt", "2.pt", "-o", "o.pt", "-f", "--json", "--template", "2")
    assert json.loads(out)["template"] == "2.pt"


def test_which_of_a_run_and_its_final_model_is_averaged(command, tmp_path):
    """A Trainer's folder alone is a run; several are final models; a note says which it was."""
    for fold in (1, 2):
        folder = tmp_path / f"fold{fold}"
        folder.mkdir()
        for step in (10, 20):
            trainer(folder, step)
        (folder / "config.json").write_text("{}")
        save_file({"w": torch.full((2,), float(fold))}, folder / "model.safetensors")
    code, _, err = command("fold1", "-o", "run")
    assert code == 0, err
    assert load_file("run/model.safetensors")["w"].tolist() == [15.0] * 2
    assert "fold1 holds a final model too, which is not averaged: its checkpoints are" in err
    for number, arguments in enumerate((["fold1", "fold2"], ["fold*"])):
        code, _, err = command(*arguments, "-o", f"folds{number}", "--no-hashes")
        assert code == 0, err
        assert load_file(f"folds{number}/model.safetensors")["w"].tolist() == [1.5] * 2
        what = "the final model is averaged, not its checkpoints 'checkpoint-10' and 1 more"
        assert f"note: fold1: {what}" in err


def test_runs_by_a_pattern(command, tmp_path):
    """A quoted fold* stands for runs where one of each is asked for, as the shell's fold* does."""
    for fold in (1, 2):
        folder = tmp_path / f"fold{fold}"
        folder.mkdir()
        for epoch in (1, 2):
            lightning(folder, epoch, epoch, f"-val_loss={fold / epoch}", 10 * fold + epoch)
    options = ["--one-best-per-fold", "--metric", "val_loss"]
    for number, arguments in enumerate((["fold*"], ["fold1", "fold2"])):
        assert command(*arguments, "-o", f"o{number}.ckpt", *options)[0] == 0
        assert value(f"o{number}.ckpt") == (12 + 22) / 2
