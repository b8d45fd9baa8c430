"""Averages of scaled weights that go into a model."""

import pytest
import torch

from merge_avg import MergeError, load_average
from tests.scaled.helpers import Memory, scaled_of
from tests.scaled.test_command import written
from tests.scaled.test_compute import bits, random_state

BARE = {"l.weight": "weight", "l.weight_scale_inv": "weight_scale_inv"}


def files(tmp_path):
    """States of a bare layer, and files of them."""
    states = [random_state("deepseek", seed) for seed in range(2)]
    states = [{BARE[key]: tensor for key, tensor in state.items()} for state in states]
    return states, written(tmp_path, states)


def test_numbers_go_into_a_plain_model(tmp_path):
    """With a dtype, a model of that dtype or another gets the mean of the numbers."""
    states, paths = files(tmp_path)
    model = torch.nn.Linear(260, 130, bias=False)
    load_average(model, paths, dtype="float32")
    (expected,) = Memory(scaled_of(states, dense="float32"), states).run()
    assert torch.equal(model.weight, expected["weight"])


def test_codes_go_into_a_quantised_model(tmp_path):
    """A model that holds codes and scales gets those of the mean."""
    states, paths = files(tmp_path)
    model = torch.nn.Module()
    for key, tensor in states[0].items():
        model.register_buffer(key, torch.zeros_like(tensor))
    load_average(model, paths)
    (expected,) = Memory(scaled_of(states), states).run()
    for key, tensor in expected.items():
        assert torch.equal(bits(getattr(model, key)), bits(tensor))


@pytest.mark.parametrize("strict", [True, False])
def test_codes_without_scales_are_refused(tmp_path, strict):
    """Codes never go into a model that has no place for their scales."""
    _, paths = files(tmp_path)
    with pytest.raises(MergeError, match="'weight' means nothing without 'weight_scale_inv'"):
        load_average(torch.nn.Linear(260, 130, bias=False), paths, strict=strict)
