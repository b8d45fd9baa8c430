"""merge_avg.cli._merge: a merge, and its report on each stream."""

import json
import os
import subprocess
import sys
from collections import Counter

import pytest
import torch

from merge_avg.arithmetic._kernel import LOOPS
from merge_avg.checkpoint import File
from tests.helpers import COMMAND, run_command
from tests.terminal import on_terminal


def test_stdout_carries_only_the_path(folds, tmp_path):
    """The output's path goes to stdout; a line before and the summary go to stderr."""
    environment = os.environ | {"FORCE_COLOR": "1"}
    done = run_command(*folds, "-o", "out.pt", cwd=tmp_path, env=environment)
    assert (done.returncode, done.stdout) == (0, "out.pt\n")
    assert done.stderr.startswith("averaging 3 checkpoints")
    assert "averaged 3 checkpoints into out.pt" in done.stderr
    assert "kept from 2.pt: epoch" in done.stderr
    assert "note: 2.pt is the template, as the newest" in done.stderr
    assert "\x1b" not in done.stderr


def test_json_is_one_object(folds, tmp_path):
    """--json prints inputs, weights, counts and warnings as one object; -q silences stderr."""
    done = run_command(*folds, "-w", "1,1,2", "-o", "out.pt", "--json", "-q", cwd=tmp_path)
    report = json.loads(done.stdout)
    found = {entry["path"]: entry["weight"] for entry in report["inputs"]}
    assert found == {"0.pt": 0.25, "1.pt": 0.25, "2.pt": 0.5}
    assert report["output"] == "out.pt"
    assert report["tensors"] == {"averaged": 1, "integers": 0, "kept": 0}
    assert done.stderr == ""
    assert torch.load(tmp_path / "out.pt")["model"]["w"].tolist() == [1.25] * 4


def test_steering_characters_are_shown_not_sent(tmp_path):
    """Escape sequences and line breaks in names are escaped; rich markup is text."""
    torch.save({"[red]\x1b[31m\nw": torch.ones(2)}, tmp_path / "a.pt")
    torch.save({"other": torch.ones(2)}, tmp_path / "[bold]b.pt")
    done = run_command("a.pt", "[bold]b.pt", "-o", "out.pt", cwd=tmp_path)
    assert done.returncode == 1
    assert "\x1b" not in done.stderr
    assert len(done.stderr.splitlines()) == 2
    assert "[red]" in done.stderr
    assert "[bold]b.pt" in done.stderr


def test_a_terminal_gets_a_bar(folds, tmp_path):
    """On a terminal a bar is drawn, at last for the writing to disk, and then the summary."""
    environment = os.environ | {"TERM": "xterm"}
    shown = on_terminal([*COMMAND, *folds, "-o", "out.pt"], cwd=tmp_path, env=environment)
    assert "━" in shown
    assert shown.index("averaging 3 checkpoints") < shown.index("writing to disk")
    assert "averaged 3 checkpoints" in shown


def test_a_reader_that_left_is_no_failure(folds, tmp_path):
    """A closed stdout does not turn a complete merge into an error."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [*COMMAND, *folds, "-o", "out.pt"]
    done = subprocess.run(command, cwd=tmp_path, stdout=writer, check=False, capture_output=False)
    os.close(writer)
    assert done.returncode == 0
    assert (tmp_path / "out.pt").exists()


def test_each_checkpoint_is_scanned_once(command, monkeypatch, tmp_path):
    """Choosing from a run and merging what is chosen scan each file of the run a single time."""
    for epoch in range(4):
        content = {"epoch": epoch, "state_dict": {"w": torch.full((4,), float(epoch))}}
        torch.save(content, tmp_path / f"epoch={epoch}.ckpt")
    scanned = Counter()
    of = File.of

    def counted(path):
        scanned[path.name] += 1
        return of(path)

    monkeypatch.setattr(File, "of", counted)
    code, out, err = command(".", "-o", "out.ckpt", "--last", "2")
    assert (code, out) == (0, "out.ckpt\n"), err
    assert torch.load("out.ckpt")["state_dict"]["w"].tolist() == [2.5] * 4
    assert scanned == {f"epoch={epoch}.ckpt": 1 for epoch in range(4)}


@pytest.mark.skipif(LOOPS is None, reason="installed without a C compiler")
def test_a_merge_and_verifying_it_import_no_torch(tmp_path):
    """Means of float32 and bfloat16, differing counters and agreement included."""
    for fold in range(3):
        generator = torch.Generator().manual_seed(fold)
        w = torch.randn(300, 400, generator=generator)
        w[0, ::50] *= 1e-30  # whose sums are not exact
        content = {"w": w, "h": w[:9].bfloat16(), "n": torch.tensor(fold)}
        torch.save({"epoch": fold, "state_dict": content}, tmp_path / f"{fold}.ckpt")
    code = (
        "import sys; from merge_avg.cli import entry\n"
        "try: entry()\n"
        "finally: assert not {'torch', 'numpy'} & set(sys.modules), 'imported'\n"
    )
    for arguments in (["0.ckpt", "1.ckpt", "2.ckpt", "-o", "o.ckpt"], ["--verify", "o.ckpt"]):
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (0, "o.ckpt\n"), done.stderr


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_a_page_that_fails_hides_nothing_else(command, folds, monkeypatch, tmp_path, arguments):
    """The average and its path are there, and so is the summary; the exit code is 3."""
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "page.md")

    def came_meanwhile(report):
        (tmp_path / "r.html").write_text("theirs")
        return "page"

    monkeypatch.setattr("merge_avg.report.html.page", came_meanwhile)
    code, out, err = command(*folds, "-o", "out.pt", "--report", "r.html", *arguments)
    assert code == 3
    assert (json.loads(out)["output"] if arguments else out.strip()) == "out.pt"
    assert "averaged 3 checkpoints" in err
    error = "error: r.html: another output appeared there in the meantime"
    assert f"{error}; the average itself was written" in err
    assert torch.load("out.pt")["model"]["w"].tolist() == [1.0] * 4
    assert (tmp_path / "page.md").read_text().count("out.pt")
    assert (tmp_path / "r.html").read_text() == "theirs"


@pytest.mark.parametrize("summary", ["1.pt", "run/page.md", "out.pt", "log.csv"])
def test_a_summary_goes_to_no_input(command, folds, monkeypatch, tmp_path, summary):
    """Where GITHUB_STEP_SUMMARY names an input, or the output, nothing is done."""
    (tmp_path / "run").mkdir()
    (tmp_path / "0.pt").rename(tmp_path / "run" / "model.pt")
    (tmp_path / "log.csv").write_text("epoch,loss\n0,1\n1,2\n2,3\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", summary)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    inputs = ["run", *folds[1:], "--metrics", "log.csv", "--best", "2", "--metric", "loss"]
    inputs = inputs if summary == "log.csv" else inputs[:3]
    code, out, err = command(*inputs, "-o", "out.pt")
    assert (code, out) == (2 if summary == "out.pt" else 1, ""), err
    assert "the input" in err or "GITHUB_STEP_SUMMARY names the output" in err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "options",
    [
        ["-o", "log.html"],
        ["-o", "out.pt", "--report", "log.html"],
        ["-o", "log.html", "--soup", "greedy", "--eval", "false", "--mode", "min"],
    ],
)
def test_a_log_that_metrics_are_read_from_is_an_input(command, folds, tmp_path, options):
    """With --overwrite too, neither an output nor a page takes its place."""
    pytest.importorskip("matplotlib")
    text = '[{"epoch": 0, "loss": 1}, {"epoch": 1, "loss": 2}]'
    (tmp_path / "log.html").write_text(text)
    chosen = [*folds, "--metrics", "log.html", "--best", "2", "--metric", "loss", "--overwrite"]
    code, out, err = command(*chosen, *options)
    assert (code, out) == (1, "")
    assert "the output is the input log.html" in err
    assert (tmp_path / "log.html").read_text() == text
