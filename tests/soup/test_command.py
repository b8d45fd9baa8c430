"""Soups through the command: its report, its messages, and what it leaves."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.helpers import COMMAND, run_command
from tests.soup.helpers import made, weight
from tests.terminal import on_terminal


def options(code):
    return ["--soup", "greedy", "--mode", "min", "--eval", f'"{sys.executable}" -c "{code}" {{}}']


def test_a_soup(command):
    """The command evaluates, adds and keeps; its report has members, scores and trials."""
    paths = made(Path(), (3.0, 6.0, 9.0))
    code = (
        "import struct, sys, zipfile\n"  # torch takes a second to import
        "archive = zipfile.ZipFile(sys.argv[1])\n"
        "(name,) = (name for name in archive.namelist() if name.endswith('/data/0'))\n"
        "print(abs(struct.unpack('<f', archive.read(name)[:4])[0] - 5))"
    )
    done, out, err = command(*paths, "-o", "soup.pt", "--json", *options(code))
    assert done == 0, err
    report = json.loads(out)
    assert list(report)[2:] == ["output", "soup", "members", "score", "singles", "trials"]
    assert report["members"] == [str(paths[1]), str(paths[0])]
    assert (report["score"], weight("soup.pt")) == (0.5, 4.5)
    assert report["singles"][0] == {"path": "c0.pt", "score": 2.0}
    assert report["trials"][3] == {
        "members": ["c1.pt", "c0.pt"],
        "score": 0.5,
        "kept": True,
        "remembered": False,
    }
    assert "[4/5] evaluating + c0.pt (2 members)\n[4/5] + c0.pt (2 members): 0.5, kept" in err
    done, _, err = command(*paths, "-o", "soup.pt", "--overwrite", *options(code))
    assert done == 0
    assert err.count("(from the log)") == 5
    assert "evaluating" not in err


def test_a_terminal_shows_which_one_runs(tmp_path):
    """There a line tells what is evaluated, and for how long; it goes when the score is known."""
    made(tmp_path, (1.0, 2.0))
    soup = ["c0.pt", "c1.pt", "-o", "soup.pt", "--eval", "sh -c 'echo 1'", "--mode", "max"]
    environment = os.environ | {"TERM": "xterm"}
    shown = on_terminal([*COMMAND, "soup", *soup], cwd=tmp_path, env=environment)
    assert re.search(r"\[3/3\] evaluating \+ c1.pt \(2 members\) \S*0:00:0", shown)
    assert re.findall(r"\[(./3)\] [c+].*?: 1", shown) == ["1/3", "2/3", "3/3"]
    assert shown.rstrip().endswith("2 of 2 checkpoints, score 1")


@pytest.mark.parametrize(
    "more", [["--min-agreement", "0.5"], ["--fail-on", "drifted"], ["--no-agreement"]]
)
def test_a_soup_has_no_verdict(command, more):
    """A gate that would never close is wrong usage, by the former spelling of the command too."""
    paths = made(Path(), (1.0, 2.0))
    done, out, err = command(*paths, "-o", "soup.pt", *options("print(1)"), *more)
    assert (done, out) == (2, "")
    assert "error: a soup has no verdict" in err
    assert "hint: leave out --min-agreement, --fail-on and --no-agreement" in err


def test_a_failing_evaluation(command):
    """Its output is shown with the checkpoint's name; the log and nothing else is left."""
    paths = made(Path(), (1.0, 2.0))
    before = set(Path().iterdir())
    code = "import sys; sys.exit('out of memory')"
    done, out, err = command(*paths, "-o", "soup.pt", *options(code))
    assert (done, out) == (1, "")
    assert "error: c0.pt: the evaluation" in err
    assert "out of memory" in err
    assert {path.name for path in set(Path().iterdir()) - before} == {"soup.pt.soup.jsonl"}


def test_an_evaluation_may_write_beside_the_weights(command):
    """Results that an evaluation leaves in a run's folders do not stop the merge of them."""
    folders = [Path("run") / f"checkpoint-{number}" for number in (1, 2)]
    for number, folder in enumerate(folders):
        folder.mkdir(parents=True)
        save_file({"w": torch.full((3,), float(number))}, folder / "model.safetensors")
        (folder / "results.json").write_text("{}")
    code = "import sys; open(sys.argv[1] + '/results.json', 'w').write('[1, 2]'); print(1)"
    done, out, err = command("run", "-o", "soup", *options(code))
    assert done == 0, err
    assert out == "soup\n"
    assert Path("soup/results.json").read_text() == "[1, 2]"


def test_what_a_killed_soup_left_goes_with_the_next_merge(tmp_path):
    """Its trial, as large as a checkpoint, matches no pattern, and any merge there removes it."""
    paths = made(tmp_path)
    code = (
        "import os, signal, sys\n"
        "if sys.argv[1].endswith('trial.pt'): os.kill(os.getppid(), signal.SIGKILL)\n"
        "print(1)"
    )
    script = tmp_path / "evaluate.py"
    script.write_text(code)
    evaluate = f'"{sys.executable}" {script} {{}}'
    command = [*COMMAND, *paths, "-o", "soup.pt", "--soup", "greedy", "--mode", "max"]
    killed = subprocess.run([*command, "--eval", evaluate], cwd=tmp_path, check=False)
    assert killed.returncode == -signal.SIGKILL
    (left,) = tmp_path.glob(".*")
    assert left.name.endswith(".merge-avg-tmp")
    assert [path.name for path in left.iterdir()] == ["trial.pt"]
    planned = run_command("*.pt", "-o", "all.pt", "--dry-run", "--json", cwd=tmp_path)
    assert len(json.loads(planned.stdout)["inputs"]) == len(paths)
    assert run_command(*paths[:2], "-o", "other.pt", cwd=tmp_path).returncode == 0
    assert not list(tmp_path.glob(".*"))


def test_what_forbids_a_mean_shows_before_an_evaluation(command, tmp_path):
    """Checkpoints that have no mean are refused at once: an evaluation may take an hour."""
    for name, size in (("a.pt", 2), ("b.pt", 3)):
        torch.save({"w": torch.ones(size)}, tmp_path / name)
    evaluation = ["--soup", "greedy", "--eval", "touch evaluated", "--mode", "max"]
    code, _, err = command("a.pt", "b.pt", "-o", "o.pt", *evaluation)
    assert (code, "has the shape" in err) == (1, True), err
    assert not (tmp_path / "evaluated").exists()
