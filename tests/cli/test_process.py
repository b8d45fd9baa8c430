"""merge_avg.cli._process: exit codes, signals, and the standard streams."""

import math
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from merge_avg import cli
from tests.helpers import COMMAND, run_command
from tests.older import typed

FULL = Path("/dev/full")
DOWNLOAD = "hf download org/a-model.v1.5 --local-dir a-model.v1.5"


def test_refusals_and_wrong_usage(folds, tmp_path):
    """A refusal is exit code 1 with error and hint; wrong usage is 2; neither writes to stdout."""
    (tmp_path / "out.pt").write_bytes(b"old")
    refused = run_command(*folds, "-o", "out.pt", cwd=tmp_path)
    assert (refused.returncode, refused.stdout) == (1, "")
    first, second = refused.stderr.splitlines()
    assert first == "error: out.pt: the output exists already"
    assert second.startswith("hint: ")
    assert (tmp_path / "out.pt").read_bytes() == b"old"
    for wrong in (["-o", "x.pt"], [*folds], [*folds, "-o", "x.pt", "--max-memory", "big"]):
        done = run_command(*wrong, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
    assert run_command(*folds, "-o", "out.pt", "--overwrite", cwd=tmp_path).returncode == 0


def test_running_out_of_memory_is_a_message(command, folds, monkeypatch):
    """Memory that is not to be had is a refusal, and its hint names what to lower."""

    def greedy(*_, **__):
        raise MemoryError

    monkeypatch.setattr("merge_avg.cli._merge.prepare", greedy)
    code, out, err = command(*folds, "-o", "out.pt")
    assert (code, out) == (1, "")
    assert err.splitlines() == [
        "error: there is not enough memory",
        "hint: lower --max-memory or --threads",
    ]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interruption_leaves_nothing(tmp_path, number, code):
    """Ctrl-C and SIGTERM in the middle of a merge leave neither output nor temporary file."""
    path = tmp_path / "a.pt"
    torch.save({"w": torch.zeros(60_000_000)}, path)
    command = [*COMMAND, *["a.pt"] * 12, "-o", "out.pt", "--allow-trivial"]
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


def test_an_ignored_signal_stays_ignored(folds, tmp_path):
    """Under nohup, a merge goes on when its terminal hangs up."""
    code = (
        "import os, signal\nfrom merge_avg import cli, selection\n"
        "choose = selection.choose\n"
        "def hung_up(*args, **options):\n"
        "    os.kill(os.getpid(), signal.SIGHUP)\n"
        "    return choose(*args, **options)\n"
        "selection.choose = hung_up\ncli.main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *folds, "-o", "out.pt", "-q"],
        cwd=tmp_path,
        check=False,
        capture_output=True,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "out.pt\n", "")


def test_a_signal_that_comes_at_a_bad_moment_is_not_lost(folds, tmp_path):
    """Where Python swallows what a handler raises it comes again; nothing is printed of it."""
    code = (
        "import signal, sys, time, weakref\nfrom merge_avg import cli, plan\n"
        "class Thing: pass\n"
        "def bad(*args, **named):\n"
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


def test_handlers_are_as_before_when_the_command_returns(command, folds):
    """A program that runs `main` gets its signal handlers and its hook back."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM)
    before = [signal.getsignal(one) for one in numbers], sys.unraisablehook
    assert command(*folds, "-o", "out.pt", "--dry-run")[0] == 0
    assert ([signal.getsignal(one) for one in numbers], sys.unraisablehook) == before


@pytest.mark.skipif(not FULL.exists(), reason="no device that is always full")
def test_a_full_disk_behind_stdout_is_an_error(folds, tmp_path):
    """Where stdout cannot be written the merge is done, and the exit code says what is lost."""
    with FULL.open("w") as full:
        command = [*COMMAND, *folds, "-o", "out.pt"]
        done = subprocess.run(
            command, cwd=tmp_path, check=False, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 3
    assert "error: all is done, but stdout cannot be written" in done.stderr
    assert (tmp_path / "out.pt").exists()


def test_without_numpy_nothing_else_is_said(tmp_path):
    """Torch's warning that NumPy is missing, which nobody asked for, does not reach the user."""
    for fold in range(2):  # float64: for which torch is imported
        torch.save({"w": torch.full((9,), fold, dtype=torch.float64)}, tmp_path / f"{fold}.pt")
    code = (
        "import sys; sys.modules['numpy'] = None; from merge_avg.cli import entry\n"
        "try: entry()\n"
        "finally: assert 'torch' in sys.modules\n"
    )
    command = [sys.executable, "-c", code, "0.pt", "1.pt", "-o", "out.pt", "-q"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "out.pt\n", "")


@typed
@pytest.mark.parametrize("says", ["libtorch.so: cannot open\nIt seems that", ""])
def test_a_torch_that_cannot_be_loaded_is_an_error_in_a_line(tmp_path, says):
    """Most merges do without torch; one that needs it says so, and merge-avg itself still works."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text(f"raise ImportError({says!r})")
    save_file({"w": torch.ones(2, dtype=torch.complex64)}, tmp_path / "c.safetensors")
    save_file({"w": torch.tensor([1.0, math.nan])}, tmp_path / "n.safetensors")
    for arguments in (
        ["c.safetensors", "c.safetensors", "-o", "o.safetensors"],
        ["n.safetensors", "n.safetensors", "-o", "o.safetensors", "--device", "cuda"],
    ):
        others = os.environ.get("PYTHONPATH", "")
        env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{others}"}
        done = run_command(*arguments, "--quiet", "--allow-trivial", cwd=tmp_path, env=env)
        lines = done.stderr.splitlines()
        assert (done.returncode, len(lines)) == (1, 2), done.stderr
        assert lines[0].startswith("error: torch is needed and cannot be loaded (")
        assert not (tmp_path / "o.safetensors").exists()


@pytest.mark.parametrize(
    "arguments", [["", "-o", "o"], ["a", "-o", ""], ["a", "-o", "o", "--template="]]
)
def test_an_empty_path_is_a_usage_error(command, arguments):
    """A variable that is not set does not stand for the current directory."""
    code, _, err = command(*arguments)
    assert (code, err.splitlines()[0]) == (2, "error: a path is empty")


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("~/b.pt", f"the shell expands ~ outside of quotes only; write {Path.home() / 'b.pt'}"),
        ("https://host/b.pt", "only files of this machine are read; download it first"),
        ("s3://bucket/b.pt", "only files of this machine are read; download it first"),
        (
            "org/a-model.v1.5",
            f"if it is a model of the Hugging Face Hub: {DOWNLOAD}",
        ),
        ("fold_frist.pt", "did you mean fold_first.pt?"),
        ("run/fold_frist.pt", "did you mean fold_first.pt?"),
        ("nothing like it", None),
        ("C:/b.pt", None),
        ("run/b.pt", None),
        ("no such/b.pt", None),
    ],
)
def test_a_path_that_leads_nowhere(command, folds, tmp_path, path, hint):
    """An input that is not there is an error, whose hint says what it may be instead."""
    (tmp_path / "run").mkdir()
    for folder in (tmp_path, tmp_path / "run"):
        (folder / "fold_first.pt").write_bytes((tmp_path / folds[0]).read_bytes())
    code, out, err = command(folds[0], path, "-o", "out.pt")
    told = f"error: {Path(path)}: No such file or directory\n"
    assert (code, out, err) == (1, "", told + (f"hint: {hint}\n" if hint else ""))


def test_a_home_in_quotes_is_no_folder_to_make(command, folds):
    """For an output in ~ or at a URL the hint is not to make a folder of this name."""
    _, _, err = command(*folds, "-o", "~/no such folder/out.pt")
    assert err.endswith(f"only; write {Path.home()}/no such folder/out.pt\n")
    assert "hint: outputs are written on this machine" in command(*folds, "-o", "s3://b/o.pt")[2]


def test_weights_are_separated_by_commas(command, folds):
    """Weights with blanks between them are told to have commas."""
    for given in (["0.7 0.3"], ["0.7", "0.3"]):
        code, _, err = command(*folds[:2], "-o", "out.pt", "-w", *given)
        assert (code, err.splitlines()[1]) == (
            2,
            "hint: give one for each, with commas between, as in -w 0.7,0.3",
        )


def test_a_misspelt_metric_and_scheme(command, folds, tmp_path):
    """The nearest metric that checkpoints have, and the nearest scheme, are in the hint."""
    for number, name in enumerate(folds):
        torch.save(
            {"w": torch.full((4,), float(number)), "val_loss": 1.0 + number}, tmp_path / name
        )
    misspelt = ["[0-2].pt", "-o", "out.pt", "--best", "2", "--metric"]
    told = "error: no checkpoint has the metric 'val_lss'\nhint: did you mean val_loss?\n"
    assert command(*misspelt, "val_lss") == (1, "", told)
    assert "hint: known are 'val_loss'\n" in command(*misspelt, "bleu")[2]
    assert command(*misspelt, "loss", "--dry-run")[0] == 0
    assert command(*folds, "-o", "out.pt", "--weighting", "liner") == (
        2,
        "",
        "error: there is no weighting 'liner'\nhint: did you mean linear?\n",
    )


def test_a_zip_of_checkpoints(command, folds, tmp_path):
    """A zip that holds checkpoints is no checkpoint, and is to be unpacked."""
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for name in folds:
            archive.write(tmp_path / name, name)
    code, _, err = command("all.zip", folds[0], "-o", "out.pt")
    assert (code, err.splitlines()[1]) == (
        1,
        "hint: if it has checkpoints in it, unpack it first; torch.save writes other zips",
    )
