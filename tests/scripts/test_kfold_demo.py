"""scripts/kfold_demo.py, the README's first demo, trains and averages real networks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "kfold_demo.py"


@pytest.mark.large
def test_the_demo_averages_five_folds(tmp_path):
    """Averages of all five folds, of all but one and a soup still recognise digits."""
    pytest.importorskip("sklearn")
    command = [sys.executable, SCRIPT, tmp_path]
    # Threads gain little on networks this small, and wait for each other on a busy machine.
    alone = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=alone)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *(f"avg-without-fold{i}.pt" for i in range(5)),
        *(f"fold{i}.pt" for i in range(5)),
        "merged.pt",
        "soup.pt",
        "soup.pt.soup.jsonl",
    ]
    for model in ("after update_bn", "greedy soup", "without fold 4"):
        (line,) = [line for line in done.stdout.splitlines() if model in line]
        assert float(line.split("│")[2].strip(" %")) > 95
