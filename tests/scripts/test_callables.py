"""scripts/callables.py finds what runs code among the callables that pickles may name."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "callables.py"


def test_it_sees_what_runs_code():
    """A callable that evaluates a text is found and listed; those beside it are only counted."""
    command = [sys.executable, SCRIPT, "all", "--jobs", "1"]
    command += ["--package", "cProfile", "--package", "colorsys", "--package", "gettext"]
    command += ["--package", "collections"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    *found, summary = map(json.loads, done.stdout.splitlines())
    assert {one["name"]: one["verdict"] for one in found} == {"namedtuple": "unknown"}
    assert summary["inert and run"] == 0
    assert summary["dangerous"] >= 3
    assert summary["called"] == summary["inert"] + summary["unknown"] > 20


@pytest.mark.large
def test_what_is_inert_runs_nothing():
    """Each inert callable is called with code, paths, commands and pickles, and runs none."""
    command = [sys.executable, SCRIPT, "inert", "--together"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    summary = json.loads(done.stdout)
    assert summary["called"] == summary["inert"] > 700
    assert summary["run code"] == 0
