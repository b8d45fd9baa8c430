"""Means of scaled tensors: their scales and codes are those that exact arithmetic gives."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merge_avg.errors import MergeError
from merge_avg.scaled import Scaled
from merge_avg.scaled import _numbers as of
from merge_avg.scaled._forms import E4M3
from tests.older import SAFETENSORS
from tests.scaled.helpers import Memory, mean_of, over, plain, scaled_of
from tests.scaled.test_numbers import exact_nearest

E4, E5, BYTE = torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8
E8 = getattr(torch, "float8_e8m0fnu", BYTE)
# Of each layout the keys, and shapes of codes and scales.
LAYOUTS = {
    "deepseek": (("l.weight", E4), ("l.weight_scale_inv", torch.float32), (130, 260), (2, 3)),
    "exponents": (("l.weight", E4), ("l.weight_scale_inv", E8), (128, 256), (1, 2)),
    "experts": (("e.up", E4), ("e.up_scale_inv", torch.float32), (3, 128, 130), (3, 1, 2)),
    "comfy": (("l.weight", E4), ("l.scale_weight", torch.float32), (7, 9), ()),
    "comfy-e5m2": (("l.weight", E5), ("l.scale_weight", torch.float32), (7, 9), ()),
    "tensor": (("l.weight", E4), ("l.weight_scale", torch.bfloat16), (6, 5, 2, 2), (1,)),
    "channel": (("l.weight", E4), ("l.weight_scale", torch.bfloat16), (6, 70), (6, 1)),
    "rows": (("l.weight", E4), ("l.weight_scale", torch.float32), (6, 70), (6,)),
    "columns": (("l.weight", E4), ("l.weight_scale", torch.float32), (6, 70), (1, 70)),
    "mxfp4": (("e.up_blocks", BYTE), ("e.up_scales", BYTE), (2, 5, 3, 16), (2, 5, 3)),
    "mxfp4-packed": (("l.weight_packed", BYTE), ("l.weight_scale", BYTE), (5, 48), (5, 3)),
    "mxfp8": (("l.weight", E4), ("l.weight_scale", BYTE), (5, 96), (5, 3)),
}


if not hasattr(torch, "float8_e8m0fnu") or SAFETENSORS < (0, 8):
    del LAYOUTS["exponents"]  # which older releases cannot hold, or not write


def bits(tensor):
    """The bytes of a tensor."""
    return tensor.view(-1).view(BYTE)


def random_state(layout, seed, centre=0.05):
    """A state dict of one layout, with codes and scales of any kind."""
    (codes, dtype), (scales, kind), shape, scale_shape = LAYOUTS[layout]
    generator = torch.Generator().manual_seed(seed)
    count = math.prod(shape)
    if dtype == BYTE:
        made = torch.randint(0, 256, shape, generator=generator, dtype=BYTE)
    else:
        made = (torch.randn(count, generator=generator) * 60).clamp(-448, 448).to(dtype)
        made = made.view(shape)
    if kind.itemsize == 1:
        factors = torch.randint(110, 124, scale_shape, generator=generator, dtype=BYTE).view(kind)
    else:
        factors = torch.rand(scale_shape, generator=generator).add(0.5).mul(centre).to(kind)
    return {codes: made, scales: factors}


def wanted(states, weights):
    """What the mean of states should be: scales by the rule, and the nearest codes."""
    scaled = scaled_of(states)
    keys = [name.key for name in scaled.consumed]
    rows = [plain(state[keys[0]], state[keys[1]], scaled.shape) for state in states]
    return scaled, mean_of(rows, weights), keys


def block_maxima(mean, scales):
    """The largest size below each scale, by looking at every element."""
    places = over(torch.arange(scales.numel()).view(scales.shape).double(), mean.shape).long()
    found = torch.zeros(max(scales.numel(), 1), dtype=torch.float64)
    for place, value in zip(places.reshape(-1).tolist(), mean.reshape(-1).tolist(), strict=True):
        found[place] = max(found[place], abs(value))
    return found.view(scales.shape)


def by_rule(sizes, states, key, scaled):
    """Scales by the rule of a scheme, by Python."""
    given_ = [of.scale_numbers(state[key], scaled.scale_kind) for state in states]
    found = []
    for place, size in enumerate(sizes.reshape(-1).tolist()):
        power = all(math.frexp(one.reshape(-1)[place])[0] == 0.5 for one in given_)
        if not size:
            value = 1.0
        elif scaled.rule != "fit":
            fraction, exponent = math.frexp(size)
            exponent += scaled.rule == "round" and fraction >= 0.875
            value = math.ldexp(1, exponent - 1 - scaled.form.emax)
        elif power:
            value = math.ldexp(1, math.ceil(math.log2(size / scaled.form.largest)))
        else:
            value = size / scaled.form.largest
        found.append(value)
    return torch.tensor(found, dtype=torch.float64).view(sizes.shape)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_mean_is_exact(layout):
    """Scales follow from the exact mean by the rule; codes are the nearest to it over its scale."""
    states = [random_state(layout, seed) for seed in range(3)]
    scaled, mean, (codes, scales) = wanted(states, [1, 2, 1])
    thirds = [[Fraction(1, 4), Fraction(1, 2), Fraction(1, 4)]]
    (result,) = Memory(scaled, states, thirds).run()
    sizes = block_maxima(mean, states[0][scales])
    rule = by_rule(sizes, states, scales, scaled)
    ours = of.scale_numbers(result[scales], scaled.scale_kind)
    if scaled.scale_kind == "real":
        assert torch.equal(result[scales], rule.to(result[scales].dtype))
    else:
        assert torch.equal(ours, rule)
    quotient = mean / over(ours, scaled.shape)
    numbers = [exact_nearest(v, scaled.form) for v in quotient.reshape(-1).tolist()]
    expected = of.codes_of(torch.tensor(numbers, dtype=torch.float64), scaled.form)
    assert torch.equal(result[codes].view(torch.uint8).view(-1), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equal_checkpoints_are_copied(layout):
    """The mean of the same codes and scales is the same bytes, whatever rule made them."""
    state = random_state(layout, 5)
    (result,) = Memory(scaled_of([state] * 3), [state] * 3).run()
    for key, tensor in state.items():
        assert torch.equal(bits(result[key]), bits(tensor))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_windows_change_nothing(layout, monkeypatch):
    """However small windows are, codes, scales, products and errors stay as they are."""
    states = [random_state(layout, seed) for seed in range(2)]
    for key, tensor in states[0].items():
        bits(states[1][key])[:40] = bits(tensor)[:40]
    whole = Memory(scaled_of(states), states, compared=(0, 1))
    (expected,) = whole.run()
    for most in (32, 64, 128, 1024):
        monkeypatch.setattr(Scaled, "window", most)
        parts = Memory(scaled_of(states), states, compared=(0, 1))
        (result,) = parts.run()
        for key, tensor in expected.items():
            assert torch.equal(bits(result[key]), bits(tensor)), (key, most)
        assert parts.most <= max(most, scaled_of(states).blocks.count)
        torch.testing.assert_close(torch.tensor(parts.gram), torch.tensor(whole.gram))
        torch.testing.assert_close(torch.tensor(parts.errors), torch.tensor(whole.errors))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16", "float64"])
def test_other_dtypes(layout, dtype):
    """In another dtype, the exact mean is rounded once, and scales are left out."""
    states = [random_state(layout, seed) for seed in range(3)]
    scaled, _, (codes, scales) = wanted(states, [1, 1, 1])
    rows = [plain(state[codes], state[scales], scaled.shape) for state in states]
    (result,) = Memory(scaled_of(states, dense=dtype), states).run()
    (made,) = result.values()
    expected = mean_of(rows, [1, 1, 1], getattr(torch, dtype))
    assert torch.equal(made, expected.transpose(1, 2) if layout == "mxfp4" else expected)


@pytest.mark.parametrize("weights", [[1, 10**17], [2**60 + 1, 3]])
def test_weights_of_many_digits(weights):
    """Weights that float64 cannot hold are exact all the same."""
    states = [random_state("comfy", seed) for seed in range(2)]
    scaled, mean, _ = wanted(states, weights)
    total = sum(weights)
    rows = [[Fraction(weight, total) for weight in weights]]
    (result,) = Memory(scaled, states, rows).run()
    assert result["l.scale_weight"] == (mean.abs().max() / 448).float()
    quotient = (mean / result["l.scale_weight"].double()).reshape(-1).tolist()
    numbers = [exact_nearest(v, E4M3) for v in quotient]
    expected = of.codes_of(torch.tensor(numbers, dtype=torch.float64), E4M3)
    assert torch.equal(bits(result["l.weight"]), expected)


def test_several_outputs():
    """Each output has its own mean, scales and codes; one checkpoint alone comes as it is."""
    states = [random_state("deepseek", seed) for seed in range(3)]
    rows = [[Fraction(1, 2), Fraction(1, 2), Fraction(0)], [Fraction(0), Fraction(1), Fraction(0)]]
    first, second = Memory(scaled_of(states), states, rows).run()
    (alone,) = Memory(scaled_of(states[:2]), states[:2]).run()
    for key, tensor in alone.items():
        assert torch.equal(bits(first[key]), bits(tensor))
        assert torch.equal(bits(second[key]), bits(states[1][key]))


def test_weights_that_do_not_sum_to_one():
    """Equal checkpoints are not copied where their sum is no mean."""
    state = random_state("comfy", 1)
    (result,) = Memory(scaled_of([state] * 2), [state] * 2, [[Fraction(1), Fraction(1)]]).run()
    values = plain(state["l.weight"], state["l.scale_weight"], (7, 9))
    assert result["l.scale_weight"] == (2 * values.abs().max() / 448).float()


@settings(max_examples=25)
@given(st.lists(st.floats(2.0**-120, 2.0**120, width=32), min_size=2, max_size=4))
def test_scales_far_apart(factors):
    """Where float64 cannot hold a sum of numbers, the mean is exact all the same."""
    states = [random_state("comfy", seed) for seed in range(len(factors))]
    for state, factor in zip(states, factors, strict=True):
        state["l.scale_weight"] = torch.tensor(factor)
    scaled, mean, _ = wanted(states, [1] * len(factors))
    (result,) = Memory(scaled, states).run()
    size = mean.abs().max()
    power = all(math.frexp(factor)[0] == 0.5 for factor in factors)
    if not power:
        assert result["l.scale_weight"] == (size / 448).float()
    quotient = (mean / result["l.scale_weight"].double()).reshape(-1).tolist()
    numbers = [exact_nearest(v, E4M3) for v in quotient]
    assert torch.equal(
        result["l.weight"].view(BYTE).view(-1),
        of.codes_of(torch.tensor(numbers, dtype=torch.float64), E4M3),
    )


def test_scales_of_activations():
    """Scales of activations become the largest, so that nothing is cut off that was not before."""
    states = [random_state("comfy", seed) for seed in range(3)]
    for state, value in zip(states, (0.5, 2.0, 1.0), strict=True):
        state["l.scale_input"] = torch.tensor(value)
    (result,) = Memory(scaled_of(states), states).run()
    assert result["l.scale_input"] == 2
    assert result["l.scale_input"].shape == ()


def test_products_are_those_of_numbers():
    """What is compared is what the codes stand for."""
    states = [random_state("channel", seed) for seed in range(3)]
    memory = Memory(scaled_of(states), states, compared=(0, 2))
    memory.run()
    rows = [plain(s["l.weight"], s["l.weight_scale"], (6, 70)).view(-1) for s in states]
    expected = [[float(rows[a] @ rows[b]) for b in (0, 2)] for a in (0, 2)]
    torch.testing.assert_close(torch.tensor(memory.gram), torch.tensor(expected))


def test_the_error_is_measured():
    """The norm of what codes lose is that of the difference between result and mean."""
    states = [random_state("deepseek", seed) for seed in range(2)]
    scaled, mean, (codes, scales) = wanted(states, [1, 1])
    memory = Memory(scaled, states)
    (result,) = memory.run()
    lost = plain(result[codes], result[scales], scaled.shape) - mean
    expected = float(lost.square().sum()), float(mean.square().sum())
    torch.testing.assert_close(torch.tensor(memory.errors), torch.tensor(expected))
    assert 0.01 < math.sqrt(memory.errors[0] / memory.errors[1]) < 0.05


@pytest.mark.parametrize("layout", ["deepseek", "comfy", "mxfp4", "channel"])
def test_nan_is_refused(layout):
    """NaN in codes or scales is refused by the name of the checkpoint that has it."""
    states = [random_state(layout, seed) for seed in range(3)]
    codes, scales = states[1]
    if states[1][codes].dtype == BYTE:
        states[1][scales].view(-1)[-1] = 255
    else:
        states[1][codes].view(BYTE).view(-1)[-1] = 0x7F
    with pytest.raises(MergeError, match=r"^1\.pt: tensor '[\w.]+' holds NaN or infinity"):
        Memory(scaled_of(states), states).run()
    with pytest.raises(MergeError, match=r"^1\.pt: tensor"):
        Memory(scaled_of(states, dense="float32"), states).run()
    (result,) = Memory(scaled_of(states, allow_nonfinite=True), states).run()
    values = plain(result[codes], result[scales], scaled_of(states).shape)
    if states[1][codes].dtype == BYTE:
        assert result[scales].view(-1)[-1] == 255
    else:
        assert values.isnan().sum() == 1


def test_nan_that_is_the_same_is_copied():
    """A block that is the same everywhere is copied, NaN and all."""
    state = random_state("comfy", 1)
    state["l.weight"].view(BYTE)[0, 0] = 0xFF
    (result,) = Memory(scaled_of([state] * 2), [state] * 2).run()
    assert torch.equal(bits(result["l.weight"]), bits(state["l.weight"]))


def test_a_mean_of_zeros():
    """A block whose mean is zero has codes of zero, and the scale 1."""
    state = random_state("comfy", 1)
    other = {**state, "l.weight": (-state["l.weight"].float()).to(E4)}
    (result,) = Memory(scaled_of([state, other]), [state, other]).run()
    assert result["l.scale_weight"] == 1
    assert not result["l.weight"].float().any()
