"""merge_avg.cli._github: what a GitHub Actions job is told, and what stays out of it."""

import signal
import subprocess
from pathlib import Path

import pytest
import torch

from tests.helpers import COMMAND, noise


@pytest.fixture
def page(tmp_path, monkeypatch):
    """Stand for a job of GitHub Actions; return the path of its page."""
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "job" / "page.md"))
    (tmp_path / "job").mkdir()
    return tmp_path / "job" / "page.md"


def commands(err):
    """Return the lines that GitHub's runner would take for commands to it."""
    return [line for line in err.splitlines() if line.lstrip().startswith("::") or "##[" in line]


def test_a_failure(command, folds, page):
    """An error is an annotation with its file and hint, and a part of the page."""
    torch.save({"model": {"w": torch.ones(2)}}, "odd.pt")
    code, out, err = command(*folds, "odd.pt", "-o", "o.pt", "--template", "1")
    assert (code, out) == (1, "")
    error, hint, annotation = err.splitlines()
    what, how = error.removeprefix("error: "), hint.removeprefix("hint: ")
    assert annotation == f"::error title=merge-avg,file=odd.pt::{what}%0Ahint: {how}"
    text = page.read_text()
    assert text.startswith("### merge-avg: failed with exit code 1\n\n- **error**: odd.pt: ")
    assert "\n- hint: --exclude 'w' keeps" in text
    assert text.endswith("\n- tensor: model.w\n")


def test_wrong_usage_and_an_interruption(command, folds, page, monkeypatch):
    """They are told as well, though nothing is known of the checkpoints; quiet hides no error."""
    assert command(*folds, "-o", "o.pt", "--wieghts", "1", "-q")[0] == 2
    assert "failed with exit code 2" in page.read_text()

    def stopped(*_, **__):
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("merge_avg.cli._merge.prepare", stopped)
    code, _, err = command(*folds, "-o", "o.pt")
    assert (code, commands(err)) == (143, [f"::error title=merge-avg::{err.splitlines()[0]}"])
    assert "failed with exit code 143" in page.read_text()


def test_nothing_is_told_elsewhere(command, folds, monkeypatch):
    """Where no variable of GitHub is set, or says no, there are neither commands nor a page."""
    for value in (None, "false", "1"):
        if value:
            monkeypatch.setenv("GITHUB_ACTIONS", value)
        _, _, err = command("lost.pt", *folds, "-o", "o.pt")
        assert err == "error: lost.pt: No such file or directory\n"


@pytest.mark.parametrize(
    "name", ["\n::error::x", "%0A::set-output name=a::b", "a,b:c::d", "##[error]x", "\r\n", "%25"]
)
def test_names_steer_nothing(command, page, tmp_path, name):
    """Whatever a tensor and a file are called, there is one command, and it says their names."""
    first, second = f"1{name}.pt", f"2{name}.pt"
    torch.save({f"\n::error::{name}": torch.ones(2)}, tmp_path / first)
    torch.save({f"\n::error::{name}": torch.ones(3)}, tmp_path / second)
    code, _, err = command(f"./{first}", f"./{second}", "-o", "o.pt", "--template", "1")
    assert code == 1
    (found,) = commands(err)
    about, _, message = found.removeprefix("::error ").partition("::")
    title, _, file = about.partition(",file=")
    assert title == "title=merge-avg"
    assert not {",", ":"} & set(file)
    assert message.count("%0A") == 1  # before the hint
    # What the runner makes of it.
    said = message.replace("%0A", "\n").replace("%0D", "\r").replace("%25", "%")
    error, hint = err.splitlines()[:2]
    assert said == f"{error.removeprefix('error: ')}\n{hint}"


def test_a_warning(command, page):
    """What makes the mean doubtful is an annotation, but not where only errors are asked for."""
    for k in range(2):
        torch.save({name: noise(k * 9 + i, 40, 40) for i, name in enumerate("abcd")}, f"{k}.pt")
    code, out, err = command("0.pt", "1.pt", "-o", "o.pt")
    assert (code, out) == (0, "o.pt\n")
    (found,) = commands(err)
    assert found.startswith("::warning title=merge-avg::strangers: ")
    assert commands(command("0.pt", "1.pt", "-o", "o.pt", "-f", "-q")[2]) == []
    assert page.read_text().count("**warning**") == 2


def test_json_on_the_same_stream_is_left_whole(folds, page, tmp_path):
    """Annotations are left out where they would be in the middle of the JSON."""
    for arguments, expected in ((["--json"], 0), ([], 1)):
        words = [*COMMAND, *folds, "lost.pt", "-o", "o.pt", *arguments]
        kind = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        done = subprocess.run(words, cwd=tmp_path, check=False, **kind)
        assert (done.returncode, len(commands(done.stdout))) == (1, expected)


def test_a_verification_and_a_soup(command, folds, page):
    """They have their part of the page: what was compared, and all that was evaluated."""
    assert command(*folds, "-o", "o`.pt", "-q")[0] == 0
    page.unlink()
    assert command("verify", "o`.pt", "-q") == (0, "o`.pt\n", "")
    text = page.read_text()
    assert text.startswith("### merge-avg: 1 output verified\n\n- verified: o&#96;.pt: all ")
    assert text.endswith(" bytes are what its 3 inputs give; their hashes are as recorded\n")
    page.unlink()
    options = ["-o", "s.pt", "--eval", "sh -c 'echo 1'", "--mode", "max"]
    assert command("soup", *folds, *options)[0] == 0
    lines = page.read_text().splitlines()
    assert lines[0] == "### merge-avg: a soup of 3 of 3 checkpoints, score 1"
    assert lines[2:5] == [
        "|  | checkpoint | score |  |",
        "| --- | --- | --- | --- |",
        "| 1/5 | 0.pt | 1 | best so far |",
    ]
    assert lines[7] == "| 4/5 | + 1.pt (2 members) | 1 | kept |"
    assert lines[-2:] == ["- written: s.pt", "- evaluated: sh -c 'echo 1', max is best"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["lost.pt", "0.pt", "-o", "{page}"],
        ["lost.pt", "0.pt", "-o{page}"],
        ["lost.pt", "0.pt", "-o", "o.pt", "--report={page}"],
        ["lost.pt", "{page}", "-o", "o.pt"],
        ["lost.pt", "{folder}", "-o", "o.pt"],
        ["lost.pt", "0.pt", "-o", "o.pt", "--metrics", "{page}", "--wrong"],
    ],
)
@pytest.mark.parametrize("exists", [True, False])
def test_a_page_that_the_command_names(command, folds, page, arguments, exists):
    """Nothing is added to it, nor is it made: it may be a log, or is to be the output."""
    if exists:
        page.write_text("epoch,loss\n")
    names = {"page": page, "folder": page.parent}
    code, _, err = command(*(one.format(**names) for one in arguments))
    assert code in (1, 2)
    assert f"note: {page}: no summary was written" in err
    assert (page.read_text() == "epoch,loss\n") if exists else not page.exists()


def test_a_page_that_is_a_checkpoint(command, folds, page, monkeypatch, tmp_path):
    """Nothing is added to an input of an output that is verified: it holds no text."""
    assert command(*folds, "-o", "o.pt", "-q")[0] == 0
    before = Path("1.pt").read_bytes()
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "1.pt")
    code, _, err = command("verify", "o.pt")
    assert (code, Path("1.pt").read_bytes()) == (0, before)
    assert "note: 1.pt: no summary was written, for it holds no text" in err


def test_a_dry_run_writes_no_page(command, folds, page):
    """It writes nothing, whether it fails or not."""
    assert command(*folds, "-o", "o.pt", "--dry-run")[0] == 0
    assert command("lost.pt", *folds, "-o", "o.pt", "--dry-run")[0] == 1
    assert not page.exists()
