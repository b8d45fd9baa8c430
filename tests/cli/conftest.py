"""Checkpoints for tests of the command."""

import pytest
import torch


@pytest.fixture
def folds(tmp_path):
    """Write three checkpoints, and return their names."""
    for i in range(3):
        torch.save({"model": {"w": torch.full((4,), float(i))}, "epoch": i}, tmp_path / f"{i}.pt")
    return ["0.pt", "1.pt", "2.pt"]
