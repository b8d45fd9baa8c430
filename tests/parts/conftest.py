"""Small checkpoints are cut into several stretches."""

import pytest

from merge_avg.parts import _stretches
from tests.parts import helpers
from tests.promises.launching import LEAST


@pytest.fixture(autouse=True)
def short_stretches(monkeypatch):
    """Let stretches be shorter than for users, so that small checkpoints have several."""
    monkeypatch.setattr(_stretches, "_LEAST", LEAST)


@pytest.fixture
def larger(monkeypatch):
    """Let checkpoints be large enough for several stretches in any process."""
    monkeypatch.setattr(helpers, "SIZE", 1 << 19)
