"""scripts/kfold_demo.py: the README's first demo, for real."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "kfold_demo.py"


def test_the_demo_averages_five_folds(tmp_path):
    """Five folds from one initialisation average to a network that still recognises digits."""
    pytest.importorskip("sklearn")
    command = [sys.executable, SCRIPT, tmp_path]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *(f"fold{i}.pt" for i in range(5)),
        "merged.pt",
    ]
    (line,) = [line for line in done.stdout.splitlines() if "after update_bn" in line]
    assert float(line.split("│")[2].strip(" %")) > 95
