"""scripts/agreement.py warns of networks whose mean is broken, and of no others."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "agreement.py"


@pytest.mark.large
def test_the_warning_fires_for_the_broken_ones():
    """The warning comes where the mean of real networks lost half the accuracy, and only there."""
    pytest.importorskip("sklearn")
    done = subprocess.run(
        [sys.executable, SCRIPT],
        check=True,
        capture_output=True,
        text=True,
        # Threads gain little on networks this small, and wait for each other on a busy machine.
        env=os.environ | {"NO_COLOR": "1", "OMP_NUM_THREADS": "1"},
    )
    rows = [line.split("│")[1:-1] for line in done.stdout.splitlines() if line.count("│") == 7]
    rows = [[cell.strip() for cell in row] for row in rows]
    assert len(rows) == 5
    for _, _, each, mean, _, warned in rows:
        broken = float(mean.strip("%")) < float(each.strip("%")) / 2
        assert warned == ("yes" if broken else "no")
    assert [row[-1] for row in rows] == ["no", "no", "no", "yes", "yes"]
