"""The README says what is true: its examples run, and its options are those of --help."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.older import worded

README = (Path(__file__).parent.parent / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.filterwarnings("error::merge_avg.errors.MergeWarning")
@pytest.mark.parametrize("code", EXAMPLES)
def test_examples_run(code, tmp_path, monkeypatch):
    """Every Python example runs on its own in an empty directory."""
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})  # noqa: S102 - the README is ours


@worded
def test_options_are_those_of_help():
    """The option list is, to the letter, what --help prints on 80 columns."""
    listed = re.findall(r"```text\n(Usage.*?)```", README, re.DOTALL)[0]
    environment = os.environ | {"COLUMNS": "80", "TERM": "dumb", "NO_COLOR": "1"}
    command = [sys.executable, "-m", "merge_avg", "--help"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    printed = [line.rstrip() for line in done.stdout.rstrip().splitlines()]
    assert listed.rstrip().splitlines() == printed


def test_ci_runs_the_test_command_of_the_readme():
    """What CI runs as tests is the README's own command."""
    script = (Path(__file__).parent.parent / ".ci" / "run").read_text()
    (command,) = re.findall(r"^.*python -m pytest$", README, re.MULTILINE)
    assert command in script


@pytest.mark.parametrize("number", [0, 1])
def test_ci_examples_run(number, tmp_path):
    """The shell steps of the CI examples average real folds and print a field of the report."""
    block = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)[number]
    lines = [line.strip().removeprefix("- ") for line in block.splitlines()]
    steps = [line for line in lines if line.startswith(("merge-avg", "python -c"))]
    assert len(steps) == 2
    for fold in range(3):
        torch.save({"w": torch.full((2, 2), float(fold))}, tmp_path / f"fold{fold}.pt")
    script = "\n".join(steps).replace("merge-avg ", f'"{sys.executable}" -m merge_avg ')
    script = script.replace("python -c", f'"{sys.executable}" -c')
    environment = os.environ | {"GITHUB_STEP_SUMMARY": str(tmp_path / "page.md")}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.stdout == "4 parameters\n"
    assert torch.equal(torch.load(tmp_path / "merged.pt")["w"], torch.ones(2, 2))
    assert "3 checkpoints averaged" in (tmp_path / "page.md").read_text()


def masked(text):
    """Return lines without their numbers and rates, and without blanks beyond one."""
    text = re.sub(r"\(\S+ \wB/s\)", "", text)
    return [
        re.sub(r"\s+", " ", re.sub(r"\d[\d.,]*", "N", line)).strip() for line in text.splitlines()
    ]


def test_commands_print_what_is_shown(tmp_path):
    """The commands at the top, typed in a shell, print the lines that stand below them."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"0": (64, 20), "2": (64, 64), "4": (5, 64)}

    def network(base=None):
        state = {}
        for name, shape in shapes.items():
            for kind, size in (("weight", shape), ("bias", shape[:1])):
                key = f"{name}.{kind}"
                start = 0 if base is None else base[key]
                state[key] = start + torch.randn(size, generator=generator) * (0.1 if base else 1)
        return state

    base = network()
    for fold in range(3):
        torch.save(network(base), tmp_path / f"fold{fold}.pt")
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    moments = {
        k: {"step": torch.tensor(1.0), "m": torch.ones(900), "v": torch.ones(900)} for k in range(6)
    }
    for epoch in range(1, 6):
        content = {"epoch": epoch, "global_step": 20 * epoch + 20, "state_dict": network(base)}
        content["optimizer_states"] = [{"state": moments, "param_groups": []}]
        torch.save(content, folder / f"epoch={epoch}-step={20 * epoch + 20}.ckpt")
    (folder / "last.ckpt").write_bytes((folder / "epoch=5-step=120.ckpt").read_bytes())
    blocks = re.findall(r"```console\n\$ (.*?)\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 3
    for command, shown in blocks:
        script = command.replace("merge-avg ", f'"{sys.executable}" -m merge_avg ')
        done = subprocess.run(
            ["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        assert masked(done.stderr + done.stdout) == masked(shown)
