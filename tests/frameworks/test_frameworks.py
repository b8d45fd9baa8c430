"""Checkpoints of real frameworks, averaged by the command and loaded by the framework again."""

import pytest
import torch

from tests.frameworks.makers import MAKERS
from tests.frameworks.means import mean
from tests.helpers import run_command

pytestmark = [pytest.mark.frameworks, pytest.mark.filterwarnings("default")]


@pytest.mark.parametrize("name", list(MAKERS))
def test_the_framework_loads_the_mean(name, tmp_path):
    """What the framework loads from the output is the mean of what it loads from the inputs."""
    maker = MAKERS[name]
    paths = []
    for seed in range(3):
        folder = tmp_path / str(seed)
        folder.mkdir()
        paths.append(maker.make(folder, seed))
    (tmp_path / "out").mkdir()
    out = tmp_path / "out" / (maker.output or "merged")
    done = run_command(*paths, "-o", out)
    assert done.returncode == 0, done.stderr
    loaded = [maker.load(path) for path in paths]
    merged = maker.load(out)
    assert merged.keys() == loaded[0].keys()
    assert any(not torch.equal(loaded[0][key], loaded[1][key]) for key in merged)
    for key, value in merged.items():
        expected = mean([one[key] for one in loaded], maker.stored)
        assert value.dtype == expected.dtype
        assert torch.equal(value, expected), key
