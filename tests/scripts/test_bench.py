"""scripts/bench.py runs every workload and the curves with small files."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "scripts" / "bench.py"
OURS = {"limit", "import torch", "hello", "merge-avg", "less measuring"}


@pytest.mark.large
@pytest.mark.parametrize("curve", [False, True])
def test_small_sizes(tmp_path, curve):
    """A quick run measures every contender that can take a workload, and draws a plot."""
    pytest.importorskip("matplotlib")
    numbers, plot = tmp_path / "bench.json", tmp_path / "bench.png"
    options = ["--quick", "--repeat", "1", "--folder", str(tmp_path)]
    options += ["--curve", "--ours"] if curve else []
    command = [sys.executable, str(BENCH), *options, "--json", str(numbers), "--plot", str(plot)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    rows = json.loads(numbers.read_text())["results"]
    assert "failed" not in done.stdout
    assert all(row["wall"] > 0 for row in rows)
    if curve:
        assert {row["count"] for row in rows} == {2, 4, 8, 16, 32, 64}
        assert {row["tensors"] for row in rows} == {40, 500, 2000, 8000}
        assert {row["contender"] for row in rows} == OURS
    else:
        found = {(row["workload"], row["contender"]) for row in rows}
        workloads = {workload for workload, _ in found}
        large = {"float32", "bfloat16", "nested", "sharded", "one"}
        assert workloads == large | {"tiny", "many", "adapters", "small", "sparse"}
        assert ("sparse", "merge-avg") in found
        workloads.remove("sparse")
        assert found >= {(workload, who) for workload in workloads for who in OURS}
        assert found >= {(workload, "AveragedModel") for workload in workloads}
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.large
def test_patience(tmp_path):
    """A contender that takes too long is stopped with a message, and the others go on."""
    options = ["bfloat16", "--quick", "--ours", "--repeat", "1", "--folder", str(tmp_path)]
    command = [sys.executable, str(BENCH), *options, "--patience", "0.01"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    lines = [line.strip() for line in done.stdout.splitlines()]
    assert "merge-avg failed: stopped after 0.01 s" in lines
    assert not any(line.startswith("merge-avg ") and "failed" not in line for line in lines)
    assert any(line.startswith("limit") for line in lines)
