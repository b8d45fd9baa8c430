"""Options that do not fit, outputs that cannot be meant, and merges that average nothing."""

import pytest
import torch


@pytest.mark.parametrize(
    ("options", "says", "hint"),
    [
        (["--metric", "val_loss"], "--metric decides nothing", "add --best N"),
        (["--mode", "min"], "--mode decides nothing", "add --best N"),
        (["--metrics", "log.csv"], "--metrics decides nothing", "add --best N"),
        (["--eval-json", "acc"], "a soup needs the command soup", "write merge-avg soup"),
        (["--inputs", "."], "--inputs is of the command verify", "merge-avg verify OUTPUT"),
        (["--min-agreement", "2"], "the minimum agreement 2 is out of range", "between -1 and 1"),
        (["--max-memory", "0"], "'0' is not a size", "512MiB"),
        (["--threads", "0"], "the number of threads is out of range", "from 1 to"),
        (["--device", "tpu"], "there is no device 'tpu'", "use cpu, cuda"),
        (["--phema", "5"], "no EMA has the relative width 5", "below 0.28"),
        (["--weighting", "liner"], "there is no weighting 'liner'", "did you mean linear?"),
        (["--weighting", "ema:2"], "the decay '2' is not understood", "between 0 and 1"),
        (["--weighting", "metric"], "weights by a metric need one", "--metric val_loss"),
        (["--last", "0"], "--last is 0", "give one or more"),
        (["--leave-one-out", "--prefixes"], "exclude each other", "one after the other"),
        (["--no-agreement", "--base", "x.pt"], "the agreement is asked for", "leave out"),
        (["-w", "1,2,3"], "3 weights for 2 checkpoints", "give one for each"),
        (["-w", "1 2"], "1 weight for 2 checkpoints", "with commas between"),
        (["--missing", "skipp"], "'skipp' is not one of 'error', 'skip'", "did you mean skip?"),
        (["--fail-on", "drited"], "'drited' is not one of", "did you mean drifted?"),
        (["--fail-on", "agree"], "'agree' is not one of", "see merge-avg --help"),
        (["-out", "x.pt"], "no such option: -out", "did you mean --output?"),
    ],
)
def test_options_that_do_nothing_or_are_out_of_range(command, options, says, hint):
    """They are wrong usage before anything is read: that the files do not exist is not reached."""
    code, out, err = command("none.pt", "nothing.pt", "-o", "o.pt", *options)
    assert (code, out) == (2, "")
    assert says in err.splitlines()[0]
    assert hint in err.splitlines()[1]


@pytest.mark.parametrize(
    ("output", "says", "hint"),
    [
        ("m.safetensor", "no format has the ending '.safetensor'", "did you mean .safetensors?"),
        ("m.cpkt", "no format has the ending '.cpkt'", "did you mean .ckpt?"),
        ("m.xyz", "no format has the ending '.xyz'", "end its name in one of .pt"),
        ("m.onnx", "no format has the ending '.onnx'", ".safetensors"),
        ("-", "an output is not written to stdout", "name a file"),
        ("out/", "out/ is a directory, and the average is a file", "out/merged.pt"),
        ("avg-{name}.pt", "one average has no {name}", "--leave-one-out"),
    ],
)
def test_outputs_that_cannot_be_meant(command, folds, tmp_path, output, says, hint):
    """An ending of no format, stdout, a folder for a file, and a name for one are wrong usage."""
    there = sorted(tmp_path.iterdir())
    code, out, err = command(*folds, "-o", output)
    assert (code, out, sorted(tmp_path.iterdir())) == (2, "", there)
    assert says in err.splitlines()[0]
    assert hint in err.splitlines()[1]


@pytest.mark.parametrize("output", ["m", "m-v1.5", "m.PT", "m.pth.tar", "m.th"])
def test_endings_that_torch_files_have(command, folds, output):
    """No ending, a version and whatever else torch users write are taken for a file of torch."""
    assert command(*folds, "-o", output, "-q") == (0, f"{output}\n", "")
    assert torch.load(output)["model"]["w"].tolist() == [1.0] * 4


def test_the_ending_of_the_inputs_is_right(command, folds, tmp_path):
    """What the checkpoints are called is no mistake of their average."""
    for name in folds:
        (tmp_path / name).rename(tmp_path / f"{name}.model")
    assert command("*.model", "-o", "o.model", "-q")[0] == 0
    assert command("*.model", "-o", "o.modle", "-q", "-f")[0] == 2


def test_shards_go_into_a_directory(command, folds):
    """The name of a file is none for the directory that shards are written to."""
    code, _, err = command(*folds, "-o", "o.safetensors", "--max-shard-size", "1MB")
    assert code == 2
    assert "--max-shard-size writes a directory of shards" in err
    assert command(*folds, "-o", "o/", "--max-shard-size", "1MB", "-q")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["0.pt"], "0.pt: it is the only checkpoint"),
        (["./0.pt", "0.pt"], "0.pt: it is named twice"),
        (["0.pt", "1.pt", "1.pt"], "1.pt: it is named twice"),
        (["0.pt", "copy.pt"], "copy.pt: it has the weights of 0.pt"),
        (["0.pt", "0.safetensors"], "0.safetensors: it has the weights of 0.pt"),
        (["fold1.pt", "fold2.pt", "fold3.pt"], "fold3.pt: it has the weights of fold2.pt"),
        (["fold*.pt"], "fold3.pt: it has the weights of fold2.pt"),
    ],
)
def test_nothing_to_average_is_no_success(command, tmp_path, arguments, says):
    """One checkpoint, or the same one twice, is an error that an option turns off."""
    from safetensors.torch import save_file

    for name, value in {"0": 0, "1": 1, "copy": 0, "fold1": 1, "fold2": 2, "fold3": 2}.items():
        torch.save({"w": torch.full((2,), float(value))}, tmp_path / f"{name}.pt")
    save_file({"w": torch.zeros(2)}, tmp_path / "0.safetensors")
    code, out, err = command(*arguments, "-o", "o.pt")
    assert (code, out, (tmp_path / "o.pt").exists()) == (1, "", False)
    assert err.splitlines()[0] == f"error: {says}"
    assert "--allow-trivial" in err.splitlines()[1]
    assert command(*arguments, "-o", "o.pt", "--allow-trivial", "-q")[0] == 0
    if len(arguments) == 3:
        both = sum((1, 2, 2) if "fold1.pt" in arguments else (0, 1, 1)) / 3
        assert torch.load("o.pt")["w"].tolist() == pytest.approx([both] * 2)


def test_weights_of_zero_are_meant(command, tmp_path):
    """Who gives one checkpoint all the weight gets its weights, in a copy of the template."""
    for name in "ab":
        torch.save({"w": torch.full((2,), float(ord(name)))}, tmp_path / f"{name}.pt")
    assert command("a.pt", "b.pt", "-w", "0,1", "-o", "o.pt", "-q")[0] == 0
    assert torch.load("o.pt")["w"].tolist() == [98.0, 98.0]


def test_a_copy_of_a_run_counts_once_and_leaves_one(command, tmp_path):
    """last.ckpt is no second checkpoint: with it alone there is nothing to average."""
    content = {"state_dict": {"w": torch.ones(2)}, "epoch": 1, "global_step": 10}
    for name in ("epoch=1-step=10", "last"):
        torch.save(content, tmp_path / f"{name}.ckpt")
    for arguments in (["*.ckpt"], ["."], ["epoch=1-step=10.ckpt", "last.ckpt"]):
        code, _, err = command(*arguments, "-o", "o.ckpt")
        assert code == 1
        copy = "last.ckpt is a copy of epoch=1-step=10.ckpt"
        assert f"epoch=1-step=10.ckpt: it is the only checkpoint: {copy}" in err


@pytest.mark.parametrize("options", [["--leave-one-out"], ["--last", "1", "--last", "2"]])
def test_a_copy_among_several_averages_is_no_success(command, options):
    """An average of a series that would be one checkpoint is refused as the only one is."""
    for epoch in (1, 2):
        torch.save({"w": torch.full((2,), float(epoch))}, f"epoch={epoch}.pt")
    paths = "epoch=1.pt", "epoch=2.pt", "-o", "a-{name}.pt"
    code, out, err = command(*paths, *options)
    assert (code, out) == (1, "")
    assert "epoch=2.pt: it alone has a weight in a-" in err
    assert command(*paths, *options, "--allow-trivial", "-q")[0] == 0


@pytest.mark.parametrize("word", ["verfy", "inspct"])
def test_a_misspelt_command_gets_the_nearest(command, folds, word):
    """A first word that is no file and nearly a command is told which; other words are not."""
    nearest = {"verfy": "verify", "inspct": "inspect"}[word]
    assert command(word, folds[0])[2].endswith(f"\nhint: did you mean {nearest}?\n")
    assert command(*folds)[2].endswith("\nhint: name one, as in -o merged.pt\n")
