"""merge_avg.cli: what a shell, a CI job and a person see."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from merge_avg.arithmetic._kernel import LOOPS
from merge_avg.cli import _app as cli
from tests.terminal import on_terminal

COMMAND = [sys.executable, "-m", "merge_avg"]


def run(*arguments, cwd, **options):
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, **options)


@pytest.fixture
def folds(tmp_path):
    for i in range(3):
        torch.save({"model": {"w": torch.full((4,), float(i))}, "epoch": i}, tmp_path / f"{i}.pt")
    return ["0.pt", "1.pt", "2.pt"]


def test_stdout_carries_only_the_path(folds, tmp_path):
    """The output's path goes to stdout; a line before and the summary go to stderr."""
    done = run(*folds, "-o", "out.pt", cwd=tmp_path, env=os.environ | {"FORCE_COLOR": "1"})
    assert (done.returncode, done.stdout) == (0, "out.pt\n")
    assert done.stderr.startswith("averaging 3 checkpoints")
    assert "averaged 3 checkpoints into out.pt" in done.stderr
    assert "kept from 0.pt: epoch" in done.stderr
    assert "\x1b" not in done.stderr


def test_json_is_one_object(folds, tmp_path):
    """--json prints inputs, weights, counts and warnings as one object; -q silences stderr."""
    done = run(*folds, "-w", "1,1,2", "-o", "out.pt", "--json", "-q", cwd=tmp_path)
    report = json.loads(done.stdout)
    assert [entry["weight"] for entry in report["inputs"]] == [0.25, 0.25, 0.5]
    assert report["output"] == "out.pt"
    assert report["tensors"] == {"averaged": 1, "integers": 0, "kept": 0}
    assert done.stderr == ""
    assert torch.load(tmp_path / "out.pt")["model"]["w"].tolist() == [1.25] * 4


def test_refusals_and_wrong_usage(folds, tmp_path):
    """A refusal is exit code 1 with error and hint; wrong usage is 2; neither writes to stdout."""
    (tmp_path / "out.pt").write_bytes(b"old")
    refused = run(*folds, "-o", "out.pt", cwd=tmp_path)
    assert (refused.returncode, refused.stdout) == (1, "")
    first, second = refused.stderr.splitlines()
    assert first == "error: out.pt: the output exists already"
    assert second.startswith("hint: ")
    assert (tmp_path / "out.pt").read_bytes() == b"old"
    for wrong in (["-o", "x.pt"], [*folds], [*folds, "-o", "x.pt", "--max-memory", "big"]):
        assert run(*wrong, cwd=tmp_path).returncode == 2
    assert run(*folds, "-o", "out.pt", "--overwrite", cwd=tmp_path).returncode == 0


def test_dry_run_and_help_import_no_torch(folds, tmp_path):
    """--dry-run and --help write nothing and import neither torch nor numpy."""
    code = (
        "import sys\nfrom merge_avg.cli import main\ntry:\n    main()\nexcept SystemExit: pass\n"
        "assert not {'torch', 'numpy'} & set(sys.modules), 'imported'\n"
    )
    for arguments in ([*folds, "-o", "out.pt", "--dry-run"], ["--help"], ["--version"]):
        command = [sys.executable, "-c", code, *arguments]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert not (tmp_path / "out.pt").exists()


def test_steering_characters_are_shown_not_sent(tmp_path):
    """Escape sequences and line breaks in names are escaped; rich markup is text."""
    torch.save({"[red]\x1b[31m\nw": torch.ones(2)}, tmp_path / "a.pt")
    torch.save({"other": torch.ones(2)}, tmp_path / "[bold]b.pt")
    done = run("a.pt", "[bold]b.pt", "-o", "out.pt", cwd=tmp_path)
    assert done.returncode == 1
    assert "\x1b" not in done.stderr
    assert len(done.stderr.splitlines()) == 2
    assert "[red]" in done.stderr
    assert "[bold]b.pt" in done.stderr


def test_a_terminal_gets_a_bar(folds, tmp_path):
    """On a terminal a progress bar is drawn, and then the summary."""
    environment = os.environ | {"TERM": "xterm"}
    shown = on_terminal([*COMMAND, *folds, "-o", "out.pt"], cwd=tmp_path, env=environment)
    assert "━" in shown
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


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interruption_leaves_nothing(tmp_path, number, code):
    """Ctrl-C and SIGTERM in the middle of a merge leave neither output nor temporary file."""
    path = tmp_path / "a.pt"
    torch.save({"w": torch.zeros(60_000_000)}, path)
    command = [*COMMAND, *["a.pt"] * 12, "-o", "out.pt"]
    running = subprocess.Popen(
        command,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A job in the background of a script ignores Ctrl-C, and its children do.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )
    while not list(tmp_path.glob(".*")) and running.poll() is None:
        time.sleep(0.01)
    time.sleep(0.1)
    running.send_signal(number)
    running.communicate(timeout=60)
    assert running.returncode == code
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.pt"]


def test_a_signal_that_comes_at_a_bad_moment_is_not_lost(folds, tmp_path):
    """Where Python swallows what a handler raises it comes again; nothing is printed of it."""
    code = (
        "import signal, sys, time, weakref\nfrom merge_avg import cli, plan\n"
        "class Thing: pass\n"
        "def bad(*args):\n"
        "    thing = Thing()\n"
        "    ref = weakref.ref(thing, lambda _: signal.raise_signal(15))\n"
        "    del thing\n"  # the callback's exception is written off
        "    print('went on', flush=True)\n"
        "    end = time.monotonic() + 30\n"
        "    while time.monotonic() < end: pass\n"
        "plan.prepare = bad\ncli.main()\n"
    )
    command = [sys.executable, "-c", code, *folds, "-o", "out.pt"]
    done = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (143, "went on\n")
    assert done.stderr == "stopped; each output is as it was, or complete\n"


def test_ctrl_c_before_there_is_a_handler(monkeypatch):
    """The command has begun, but has not yet asked for the signal: its exit code all the same."""

    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(signal, "getsignal", interrupted)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 130


def test_without_numpy_nothing_else_is_said(tmp_path):
    """Torch's warning that NumPy is missing, which nobody asked for, does not reach the user."""
    for fold in range(2):  # float64: for which torch is imported
        torch.save({"w": torch.full((9,), fold, dtype=torch.float64)}, tmp_path / f"{fold}.pt")
    code = (
        "import sys; sys.modules['numpy'] = None; from merge_avg.cli._app import entry\n"
        "try: entry()\n"
        "finally: assert 'torch' in sys.modules\n"
    )
    command = [sys.executable, "-c", code, "0.pt", "1.pt", "-o", "out.pt", "-q"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "out.pt\n", "")


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
        "import sys; from merge_avg.cli._app import entry\n"
        "try: entry()\n"
        "finally: assert not {'torch', 'numpy'} & set(sys.modules), 'imported'\n"
    )
    for arguments in (["0.ckpt", "1.ckpt", "2.ckpt", "-o", "o.ckpt"], ["--verify", "o.ckpt"]):
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (0, "o.ckpt\n"), done.stderr
