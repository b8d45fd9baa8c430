"""merge_avg.cli._app: what the command takes, and what it asks of a task."""

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from tests.helpers import run_command
from tests.older import worded


def test_dry_run_and_help_import_no_torch(folds, tmp_path):
    """--dry-run and --help write nothing and import neither torch nor numpy."""
    code = (
        "import sys\nfrom merge_avg.cli import main\ntry:\n    main()\nexcept SystemExit: pass\n"
        "assert not {'torch', 'numpy'} & set(sys.modules), 'imported'\n"
    )
    for arguments in (
        [*folds, "-o", "out.pt", "--dry-run"],
        ["--help"],
        ["--version"],
        ["soup", "-h"],
    ):
        command = [sys.executable, "-c", code, *arguments]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert not (tmp_path / "out.pt").exists()


def test_help_imports_no_task(tmp_path):
    """--help has its answer before anything that reads, plans or averages is imported."""
    code = (
        "import sys\nfrom merge_avg.cli import main\ntry:\n    main()\nexcept SystemExit: pass\n"
        "print(*(name for name in sys.modules if name.startswith('merge_avg.')), file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, "--help"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path)
    packages = {name.split(".")[1] for name in done.stderr.split()}
    assert packages <= {"_signals", "_version", "cli", "errors", "options", "report"}


def test_the_version_needs_no_checkpoints(command, monkeypatch):
    """--version tells merge-avg's, torch's, and whether there are compiled loops; all by itself."""
    from merge_avg import __version__, arithmetic

    torchs = metadata.version("torch")
    for loops, said in ((None, "no compiled loops"), (object(), "compiled loops")):
        monkeypatch.setattr(arithmetic, "LOOPS", loops)
        line = f"merge-avg {__version__} (torch {torchs}, {said})\n"
        assert command("--version") == (0, line, "")
    monkeypatch.setattr(metadata, "distributions", lambda **_: [])
    assert "(torch is missing, compiled loops)" in command("--version")[1]


def test_the_shell_completes_options_of_a_command(tmp_path):
    """What the shell asks for is answered by the command that has begun."""
    words = {"COMP_WORDS": "merge-avg verify --in", "COMP_CWORD": "2"}
    environment = os.environ | {"_MERGE_AVG_COMPLETE": "complete_bash", **words}
    assert run_command(cwd=tmp_path, env=environment).stdout.split() == ["--inputs"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-memory", "big"], "error: 'big' is not a size"),
        (["--max-shard-size", "5 apples"], "error: '5 apples' is not a size"),
        (["--steps", "5:1"], "error: the range '5:1' is empty"),
        (["-w", "1,x,2"], "error: the weight 'x' is not a finite number"),
        (
            ["--missing", "ignore"],
            "error: invalid value for '--missing': 'ignore' is not one of",
        ),
        (["--agreement"], "error: no such option: --agreement\nhint: did you mean --no-agreement?"),
        (["--wieghts", "1,2"], "error: no such option: --wieghts\nhint: did you mean --weights?"),
        (["-x"], "error: no such option: -x\nhint: see merge-avg --help\n"),
        pytest.param(
            ["--last", "x"],
            "error: invalid value for '--last': it should be a valid integer\n",
            marks=worded,
        ),
        (["--last"], "error: option '--last' requires an argument\nhint: see merge-avg --help\n"),
        (["--dtype", "floot32"], "error: --dtype: 'floot32' is not a dtype"),
        (["--dtype", "floot32"], "\nhint: did you mean float32?\n"),
        (
            ["--dtype", "int8"],
            "hint: choose one of float64, float32, float16, bfloat16, template",
        ),
    ],
)
def test_wrong_values_are_wrong_usage(command, folds, arguments, message):
    """A value that cannot be parsed is exit code 2 with a message, and nothing is written."""
    code, out, err = command(*folds, "-o", "out.pt", *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert [line.partition(":")[0] for line in err.splitlines()] == ["error", "hint"]


def test_without_anything_the_way_on_is_told(command):
    """Without checkpoints an error says what is missing, and where the help is."""
    for words in ("merge-avg", "merge-avg verify"):
        name = "OUTPUT..." if "verify" in words else "CHECKPOINT..."
        told = f"error: missing argument '{name}'\nhint: see {words} --help\n"
        assert command(*words.split()[1:]) == (2, "", told)


@pytest.mark.parametrize("name", ["fp16", "half", "torch.float16", "Float16"])
def test_a_dtype_by_its_other_names(command, folds, name):
    """Names that torch and other tools have for a dtype are understood, and recorded in full."""
    assert command(*folds, "-o", "out.pt", "--dtype", name, "-q")[0] == 0
    assert torch.load("out.pt")["model"]["w"].dtype is torch.float16
    assert command(*folds, "-o", "again.pt", "--dtype", "float16", "-q")[0] == 0
    assert Path("out.pt").read_bytes() == Path("again.pt").read_bytes()


@pytest.mark.parametrize("option", ["-f", "--force", "--overwrite"])
def test_an_output_is_replaced_by_force(command, folds, option):
    """What other programs call --force is understood."""
    assert command(*folds, "-o", "out.pt", "-q")[0] == 0
    assert command(*folds, "-o", "out.pt", "-q")[0] == 1
    assert command(*folds, "-o", "out.pt", "-q", option)[0] == 0


def test_a_template_by_path(command, folds):
    """The path ./2 is not the number 2, though no such file exists."""
    code, _, err = command(*folds, "-o", "out.pt", "--template", "./2")
    assert code == 1
    assert err.startswith("error: 2: ")
    code, out, err = command(*folds, "-o", "out.pt", "--template", "2", "--dry-run")
    assert (code, out) == (0, "")


# The commands beside the merge.


def test_a_command_does_what_its_option_did(command, folds):
    """verify and inspect print what --verify and --inspect do, which say the new word as well."""
    assert command(*folds, "-o", "out.pt", "-q") == (0, "out.pt\n", "")
    for name, arguments in {"verify": ["out.pt"], "inspect": ["out.pt", "--json"]}.items():
        new, old = command(name, *arguments), command(f"--{name}", *arguments)
        note = f"note: --{name} is now the command merge-avg {name}; the option will be removed\n"
        assert (new[0], old) == (0, (0, new[1], note + new[2]))
        assert command(f"--{name}", "-q", *arguments)[2] == ""


def test_a_soup_is_a_command(command, folds):
    """Soup needs no --soup; with it, the old spelling gives the same and says the new word."""
    scored = ["--eval", "echo 1 #", "--mode", "max", "--json", "--overwrite"]
    code, out, err = command("soup", *folds, "-o", "s.pt", *scored)
    assert (code, json.loads(out)["members"]) == (0, folds)
    assert "note:" not in err
    assert torch.load("s.pt")["model"]["w"].tolist() == [1.0] * 4
    code, old, err = command(*folds, "-o", "s.pt", "--soup", "greedy", *scored)
    assert (code, json.loads(old)["members"]) == (0, folds)
    assert err.startswith(
        "note: --soup is now the command merge-avg soup; the option will be removed\n"
    )
    assert "a soup needs" in command("soup", *folds, "-o", "t.pt", "--mode", "max")[2]


@pytest.mark.parametrize(
    "arguments",
    [
        ["verify", "o.pt", "--key", "model"],
        ["verify", "o.pt", "--dry-run"],
        ["inspect", "o.pt", "--quiet"],
        ["inspect", "o.pt", "--threads", "1"],
        ["soup", "o.pt", "-o", "s.pt", "--dtype", "float16"],
        ["soup", "o.pt", "-o", "s.pt", "--min-agreement", "0.5"],
        ["soup", "o.pt", "-o", "s.pt", "--fail-on", "drifted"],
        ["soup", "o.pt", "-o", "s.pt", "--prefixes"],
        ["o.pt", "--install-completions"],
    ],
)
def test_a_command_has_only_the_options_that_it_takes(command, arguments):
    """An option that would do nothing is wrong usage."""
    code, out, err = command(*arguments)
    assert (code, out) == (2, "")
    assert "error: no such option" in err


@pytest.mark.parametrize("name", ["verify", "inspect", "soup"])
def test_a_checkpoint_called_like_a_command(command, folds, tmp_path, name):
    """The first word is the command whatever files there are; ./ before it makes it a path."""
    (tmp_path / folds[0]).rename(tmp_path / name)
    if name == "soup":  # which as a name says that it is an average
        assert command(f"./{name}", folds[1], "-o", "out.pt", "-w", "1,1", "-q")[0] == 0
        return
    code, out, err = command(name, folds[1], "-o", "out.pt")
    if name != "soup":
        assert f"hint: write ./{name} for a checkpoint of that name" in err
    assert (code, out, (tmp_path / "out.pt").exists()) == (2, "", False)
    assert command(f"./{name}", folds[1], "-o", "out.pt", "-q") == (0, "out.pt\n", "")
    assert command(folds[1], name, "-o", "again.pt", "-q") == (0, "again.pt\n", "")


def test_a_command_is_the_first_word(command, folds):
    """Behind an option it is a checkpoint of this name, and the hint says so; so it is after --."""
    _, _, err = command("--json", "verify", "out.pt")
    assert err == "error: there is no output\nhint: write the command first: merge-avg verify ...\n"
    Path(folds[0]).rename("verify")
    assert command("--", "verify", folds[1])[2].startswith("error: there is no output")
    assert command("-o", "out.pt", "-q", "--", "verify", folds[1]) == (0, "out.pt\n", "")


def test_a_command_takes_no_empty_path(command):
    """A variable that is not set does not stand for the current directory."""
    for name in ("verify", "inspect"):
        assert command(name, "")[::2] == (
            2,
            "error: a path is empty\nhint: is a variable of the shell not set?\n",
        )
