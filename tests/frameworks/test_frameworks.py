"""Checkpoints of real frameworks, averaged by the command and loaded by the framework again."""

import re

import pytest
import torch

from tests.frameworks.libraries import LIBRARIES
from tests.frameworks.makers import MAKERS
from tests.frameworks.means import mean, tensors
from tests.frameworks.structures import STRUCTURES
from tests.frameworks.trainers import TRAINERS
from tests.helpers import quick, run_command, same_bits

REAL = MAKERS | TRAINERS | LIBRARIES


def check(maker, place, run):
    """Average three checkpoints, and compare what is loaded, and all that the files hold."""
    paths = []
    for seed in range(3):
        folder = place / str(seed)
        folder.mkdir()
        paths.append(maker.make(folder, seed))
    (place / "out").mkdir()
    out = place / "out" / (maker.output or "merged")
    code, said = run(*paths, "-o", out)
    if maker.refused:
        assert code == 1
        assert maker.refused in said
        return
    assert code == 0, said
    assert maker.said in said
    loaded = [maker.load(path) for path in paths]
    merged = maker.load(out)
    assert merged.keys() == loaded[0].keys()
    assert any(not torch.equal(loaded[0][key], loaded[1][key]) for key in merged)
    for key, value in merged.items():
        expected = mean([one[key] for one in loaded], maker.stored)
        assert value.dtype == expected.dtype
        assert torch.equal(value, expected), key
    held = [tensors(path) for path in paths]
    written = tensors(out)
    assert written.keys() == held[0].keys()
    for key, value in written.items():
        kept = re.search(maker.kept, key)
        expected = held[0][key] if kept else mean([one[key] for one in held])
        assert same_bits(value, expected), key


@pytest.mark.frameworks
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", list(REAL))
def test_the_framework_loads_the_mean(name, tmp_path):
    """What the framework loads is the mean of what it loads from the inputs; the rest is kept."""

    def run(*arguments):
        done = run_command(*arguments)
        return done.returncode, done.stderr

    check(REAL[name], tmp_path, run)


@pytest.mark.parametrize("name", quick(STRUCTURES, "espnet2", "megatron-lm", "nemo-unpacked"))
def test_what_a_framework_would_write_is_averaged(name, tmp_path, command):
    """The tensors that the framework would load are the means; all others are the template's."""

    def run(*arguments):
        code, _, said = command(*arguments)
        return code, said

    check(STRUCTURES[name], tmp_path, run)
