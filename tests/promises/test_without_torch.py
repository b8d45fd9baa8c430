"""Without torch and NumPy: most merges give the same bytes, and the rest say what to install."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from merge_avg.arithmetic import LOOPS
from tests.helpers import noise

pytestmark = pytest.mark.skipif(LOOPS is None, reason="averages by the compiled loops")
# Python finds neither package, as if they had not been installed.
HIDING = """
import contextlib, importlib.machinery, io, json, sys
finder = importlib.machinery.PathFinder
found = finder.find_spec
hidden = {"torch", "numpy"}
finder.find_spec = classmethod(
    lambda _, name, *more: None if name.partition(".")[0] in hidden else found(name, *more)
)
"""
RUNNING = """
from merge_avg.cli import main
class Text(io.TextIOWrapper):
    def __init__(self):
        super().__init__(io.BytesIO())
    def getvalue(self):
        self.flush()
        return self.buffer.getvalue().decode()
done = []
for arguments in json.load(sys.stdin):
    sys.argv, out, err = ["merge-avg", *arguments], Text(), Text()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
    done.append((code, out.getvalue(), err.getvalue()))
assert not {"torch", "numpy"} & set(sys.modules)
print(json.dumps(done))
"""


def without_torch(code, **options):
    """Run Python in a process that has neither torch nor NumPy, and return what it prints."""
    command = [sys.executable, "-W", "error", "-c", HIDING + code]
    done = subprocess.run(command, capture_output=True, text=True, **options)  # noqa: PLW1510
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    """Two checkpoints of each kind, in the current directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    for seed in (1, 2):
        for name in ("float32", "float16", "bfloat16", "float64", "complex64"):
            # The vector might be one of spectral norm, and the matrix its weight.
            state = {"w": noise(seed, 64, 64).to(getattr(torch, name)), "v": noise(seed + 2, 64)}
            state |= {"mask": torch.full((9, 9), -math.inf).triu(1), "n": torch.tensor(seed)}
            torch.save({"model": state, "step": seed}, f"{name}-{seed}.pt")
            save_file(state, f"{name}-{seed}.safetensors")
        legacy = {"_use_new_zipfile_serialization": False}
        torch.save({"w": noise(seed, 3, 3)}, f"legacy-{seed}.pt", **legacy)
        model = nn.Linear(8, 8)
        model(torch.ones(1, 8)).sum().backward()
        optimizer = torch.optim.AdamW(model.parameters())
        optimizer.step()
        states = {"state_dict": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(states, f"train-{seed}.ckpt")
        torch.save({"w": noise(seed, 8, 8)[:, ::2]}, f"gaps-{seed}.pt")
        torch.save({"w": torch.tensor([1.0, math.nan if seed == 2 else 0.0])}, f"nan-{seed}.pt")
        torch.save({"w": torch.full((9,), 3e38)}, f"large-{seed}.pt")
    return tmp_path


def two(stem, suffix="pt"):
    return [f"{stem}-{seed}.{suffix}" for seed in (1, 2)]


PLAIN = [
    *([*two(name), "-o", f"{name}.pt"] for name in ("float32", "float16", "bfloat16", "legacy")),
    [*two("bfloat16", "safetensors"), "-o", "b.safetensors"],
    [*two("float32", "safetensors"), "-o", "shards", "--max-shard-size", "8KiB"],
    ["float32-1.pt", "float16-2.pt", "-o", "mixed.pt", "--dtype", "bf16"],
    [*two("float32"), "-o", "weighted.pt", "-w", "0.3,0.7", "--base", "float32-1.pt"],
    [*two("float32"), "-o", "beyond.pt", "-w", "2,-1", "--no-normalize"],
    ["float32-*.pt", "-o", "{name}.pt", "--prefixes"],
    [*two("train", "ckpt"), "-o", "train.ckpt"],
    [*two("nan"), "-o", "nan.pt", "--allow-nonfinite"],
]
OTHER = [
    ["verify", "float32.pt", "b.safetensors", "shards", "train.ckpt"],
    ["inspect", "float64-1.pt", "complex64-1.safetensors"],
    ["soup", *two("float32"), "-o", "soup.pt", "--eval", "echo 1; : {}", "--mode", "max"],
    ["float32-1.pt", "float32-2.pt", "-o", "dry.pt", "--dry-run"],
    [*two("nan"), "-o", "no.pt"],
    [*two("large"), "-o", "no.pt", "-w", "2,1", "--no-normalize"],
    ["--help"],
]


def test_merges_without_torch_give_the_same_bytes(inputs, command, monkeypatch):
    """All three dtypes, every format and the other commands; messages are the same, too."""
    commands = [*PLAIN, *OTHER]
    (inputs / "bare").mkdir()
    for path in list(inputs.iterdir()):
        if path.is_file():
            os.link(path, inputs / "bare" / path.name)
    monkeypatch.setenv("COLUMNS", "80")
    found = json.loads(without_torch(RUNNING, input=json.dumps(commands), cwd="bare"))
    for arguments, (code, out, err) in zip(commands, found, strict=True):
        theirs = command(*arguments)
        assert (code, out) == theirs[:2], (arguments, err)
        assert err.partition("  read ")[0] == theirs[2].partition("  read ")[0], arguments
    for path in (inputs / "bare").rglob("*.*"):
        if path.suffix != ".jsonl":  # the log of a soup says where it lies
            theirs = inputs / path.relative_to(inputs / "bare")
            assert path.read_bytes() == theirs.read_bytes(), path


def test_merges_that_need_torch_say_how_to_get_it(inputs):
    """The error comes before anything is read, and says what needs torch."""
    commands = {
        "float64-2.pt: tensor 'model.w' is to be averaged as float64, which needs": two("float64"),
        "complex64-2.pt: tensor 'model.w' is to be averaged as complex64, which": two("complex64"),
        "float32-2.pt: tensor 'model.w' is to be averaged as float64, which needs": [
            *two("float32"),
            "--dtype",
            "double",
        ],
        "weights of so many digits need": [*two("float32"), "-w", "0.123456789123,1"],
        "tensors with gaps, or with other strides, need": two("gaps"),
        "the device 'cuda' needs": [*two("float32"), "--device", "cuda"],
    }
    given = json.dumps([[*arguments, "-o", "o.pt", "-q"] for arguments in commands.values()])
    found = json.loads(without_torch(RUNNING, input=given))
    for what, (code, out, err) in zip(commands, found, strict=True):
        assert (code, out) == (1, "")
        assert err.startswith(f"error: {what}")
        assert err.endswith(" torch, which is not installed\nhint: pip install torch\n")
    assert not (inputs / "o.pt").exists()


def test_the_library_without_torch(inputs):
    """What works on files is there; what works on models is an ImportError with the next step."""
    assert without_torch(
        "import merge_avg, pydoc\n"
        "assert len(pydoc.render_doc(merge_avg)) > 1000\n"
        "assert all(hasattr(merge_avg, name) for name in dir(merge_avg))\n"
        "for name in {*merge_avg.__all__} - {*dir(merge_avg)}:\n"
        "    try:\n"
        "        getattr(merge_avg, name)\n"
        "    except ImportError as error:\n"
        "        assert str(error).startswith(f'{name} needs torch'), error\n"
        "        assert str(error).endswith('hint: pip install torch')\n"
        "        print(name)\n"
        "merge_avg.merge_checkpoints('float32-*.pt', 'o.pt')\n"
        "print(merge_avg.verify_output('o.pt').hashed, len(merge_avg.inspect_checkpoints('o.pt')))"
    ).split()[-2:] == ["True", "1"]


def test_without_the_compiled_loops_torch_is_needed(inputs):
    """An installation that was made without a compiler says so."""
    hiding = "from pathlib import Path\nPath.with_name = lambda *_: '/nowhere'\n"
    given = json.dumps([[*two("float32"), "-o", "o.pt", "-q"], ["--version"]])
    (code, _, err), version = json.loads(without_torch(hiding + RUNNING, input=given))
    assert code == 1
    assert "without its compiled loops, so that a mean needs torch, which is not" in err
    assert "no compiled loops" in version[1]
