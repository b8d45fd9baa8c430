"""scripts/agreement.py: the verdict tells networks whose mean is broken from the others."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "agreement.py"
CHOSEN = [
    "same initialisation: CNN with BatchNorm",
    "different initialisations: CNN with BatchNorm",
    "permuted: channels of a CNN",
    "one run: epochs of a CNN",
    "fine-tunes: low rates, transformer",
]


@pytest.mark.large
def test_strangers_are_the_broken_ones(tmp_path):
    """The word is strangers where the mean of real networks lost what they learned, only there."""
    pytest.importorskip("sklearn")
    done = subprocess.run(
        [sys.executable, SCRIPT, "--keep", tmp_path, *CHOSEN],
        check=True,
        capture_output=True,
        text=True,
        # Threads gain little on networks this small, and wait for each other on a busy machine.
        env=os.environ | {"NO_COLOR": "1", "OMP_NUM_THREADS": "1"},
    )
    rows = [line.split("│")[1:-1] for line in done.stdout.splitlines() if line.count("│") == 11]
    found = {f"{row[0].strip()}: {row[1].strip()}": [cell.strip() for cell in row] for row in rows}
    assert set(found) == set(CHOSEN)
    assert [found[title][-2:] for title in CHOSEN] == [
        ["works", "agree"],
        ["broken", "strangers"],
        ["broken", "strangers"],
        ["works", "agree"],
        ["works", "agree"],
    ]
    last = "situations: broken and silent: 0; working and called strangers: 0"
    assert f"known, 4 {last}" in done.stdout
    assert f"set aside, 1 {last}" in done.stdout
    results = json.loads((tmp_path / "permuted-channels-of-a-cnn" / "results.json").read_text())
    assert results["truth"] == "broken"
    assert len(list((tmp_path / "permuted-channels-of-a-cnn").glob("*.pt"))) == 5
