"""Weights by rule, against what they stand for."""

import itertools
import math
import statistics
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from merge_avg.errors import UsageError
from merge_avg.selection._schemes import exponent, phema, resolve, width


def shares(weights):
    return [weight / sum(weights) for weight in weights]


def test_uniform_and_linear():
    """Uniform weights are equal; linear ones grow with the place."""
    assert resolve("uniform", 3) == (1, 1, 1)
    assert resolve("linear", 4) == (1, 2, 3, 4)


@given(st.integers(1, 12), st.sampled_from(["0.5", "0.9", "0.999", "1/3"]))
def test_ema_is_the_running_average(count, decay):
    """ema:D is what avg = D * avg + (1 - D) * x makes, beginning with the first."""
    values = [Fraction(i * i + 1) for i in range(count)]
    average = values[0]
    for value in values[1:]:
        average = Fraction(decay) * average + (1 - Fraction(decay)) * value
    weights = resolve(f"ema:{decay}", count)
    assert sum(weights) == 1
    assert sum(w * x for w, x in zip(weights, values, strict=True)) == average


@pytest.mark.parametrize(
    "decay", ["", "0", "1", "x", "nan", "0.5/0", "1e-9999999", "1e-21", "9" * 30, "0." + "9" * 19]
)
def test_other_decays_are_usage_errors(decay):
    """What is no number between 0 and 1, or one whose powers never end, is refused."""
    with pytest.raises(UsageError, match="not understood"):
        resolve(f"ema:{decay}", 2)


def test_powers_of_a_decay_have_a_length():
    """A decay of many digits is for few checkpoints: each power is as much longer."""
    assert len(resolve("ema:1e-3", 9)) == len(resolve("ema:0.999", 1000)) - 991
    resolve("ema:0.99999999999999999", 200)
    with pytest.raises(UsageError, match="too long"):
        resolve("ema:0.99999999999999999", 10_000)


@given(st.integers(1, 40))
def test_one_minus_sqrt_scales_updates(count):
    """Update j of a run counts with 1 - sqrt(j / N), as under a decaying learning rate."""
    weights = resolve("1-sqrt", count)
    assert sum(weights) == 1
    assert min(weights) > 0
    for j in range(count):
        assert float(sum(weights[j:])) == pytest.approx(1 - math.sqrt(j / count))


ascending = st.lists(st.integers(1, 500), min_size=1, max_size=8, unique=True).map(sorted)


@given(ascending, st.sampled_from([0.5, 0.99]))
def test_an_ema_of_uneven_steps_decays_by_their_distance(times, decay):
    """Twice the median distance has the decay twice, whatever the unit of the times is."""
    usual = statistics.median([b - a for a, b in itertools.pairwise(times)] or [1])
    values, average = [time**2 for time in times], float(times[0] ** 2)
    for before, time in itertools.pairwise(times):
        left = decay ** ((time - before) / usual)
        average = left * average + (1 - left) * time**2
    for unit in (1, 1000):
        weights = resolve(f"ema:{decay}", len(times), times=[time * unit for time in times])
        found = sum(w * x for w, x in zip(weights, values, strict=True)) / sum(weights)
        assert float(found) == pytest.approx(average)


@given(ascending, st.sampled_from(["0.05", "0.1", "0.25"]))
def test_a_power_function_ema_is_that_of_training(times, sigma):
    """Of weights that change at the checkpoints alone, it is the EMA that training would keep."""
    average, values = 0.0, {time: math.cos(time) for time in times}
    now = 0
    for step in range(1, times[-1] + 1):
        value = values[times[now]]
        beta = (1 - 1 / step) ** (exponent(float(sigma)) + 1)
        average = beta * average + (1 - beta) * value
        now += step == times[now]
    weights = resolve(f"power:{sigma}", len(times), times=times)
    assert sum(weights) == 1
    found = sum(w * Fraction(values[time]) for w, time in zip(weights, times, strict=True))
    assert float(found) == pytest.approx(average, rel=1e-6, abs=1e-9)


@given(st.integers(2, 12), st.integers(1, 9), st.integers(0, 99))
@pytest.mark.parametrize("scheme", ["ema:0.9", "1-sqrt"])
def test_even_steps_count_as_numbers_do(scheme, count, apart, first):
    """Where all distances are the same, the weights are those of 1, 2, 3, ... to the last bit."""
    times = [first + apart * number for number in range(count)]
    assert resolve(scheme, count, times=times) == resolve(scheme, count)


def test_an_ema_of_training_has_no_step_0():
    """Before the first step there is nothing to average."""
    with pytest.raises(UsageError, match="step 0 has no part in an EMA"):
        resolve("power:0.1", 2, times=[0, 10])


def test_one_minus_sqrt_goes_by_the_steps():
    """An update that took half of the run counts by where it began, as the decay says."""
    weights = resolve("1-sqrt", 4, times=[100, 200, 300, 600])
    assert float(sum(weights[3:])) == pytest.approx(1 - math.sqrt(300 / 600))
    assert float(sum(weights[1:])) == pytest.approx(1 - math.sqrt(100 / 600))


def test_long_distances_have_short_weights():
    """Powers of large distances are rounded, so that their digits do not grow without end."""
    weights = resolve("ema:0.999", 3, times=[0, 1, 10**9])
    assert all(weight.denominator.bit_length() < 3000 for weight in weights)


def test_by_metric():
    """Weights are in proportion to a metric, or to its inverse where lower is better."""
    assert resolve("metric", 2, [0.1, 0.3], "max") == (Fraction(1, 10), Fraction(3, 10))
    assert shares(resolve("metric", 2, [1.0, 3.0], "min")) == [Fraction(3, 4), Fraction(1, 4)]


@pytest.mark.parametrize("value", [None, 0.0, -1.0, math.nan, math.inf])
def test_metrics_that_make_no_weight(value):
    """A metric that is unknown, not positive or not finite is a usage error."""
    with pytest.raises(UsageError, match="cannot be a weight"):
        resolve("metric", 2, [0.5, value], "max")


def test_a_metric_needs_a_direction():
    """Weights by a metric need to know whether higher is better."""
    with pytest.raises(UsageError, match="direction"):
        resolve("metric", 1, [0.5], None)


@pytest.mark.parametrize(
    "scheme",
    ["", "ema", "ema:", "ema:1", "ema:0", "ema:x", "ema:1/0", "cosine", "power:x", "power:1"],
)
def test_unknown_schemes(scheme):
    """Any other scheme is a usage error with a hint."""
    with pytest.raises(UsageError) as caught:
        resolve(scheme, 3)
    assert caught.value.hint


# Post-hoc EMA


@given(st.floats(0.001, 0.28))
def test_exponent_and_width_are_inverse(sigma):
    """The profile with the exponent of a width has that width."""
    assert width(exponent(sigma)) == pytest.approx(sigma, rel=1e-9)


def test_widths_of_the_paper():
    """Karras et al. give the exponents 16.97 and 6.94 for the widths 0.05 and 0.10."""
    assert exponent(0.05) == pytest.approx(16.97, abs=0.01)
    assert exponent(0.10) == pytest.approx(6.94, abs=0.01)


def test_a_stored_average_is_itself():
    """Where the EMA that is asked for is stored, it has all the weight."""
    snapshots = [(500.0, 0.05), (500.0, 0.1), (1000.0, 0.05), (1000.0, 0.1)]
    for sigma, weights in ((0.1, [0, 0, 0, 1]), (0.05, [0, 0, 1, 0])):
        found = phema(snapshots, sigma)
        assert [float(weight) for weight in found] == pytest.approx(weights, abs=1e-6)


@pytest.mark.parametrize("sigma", [0.06, 0.075, 0.15])
def test_a_width_between_is_made_from_those_stored(sigma):
    """On a random walk, the synthesis is far closer to a tracked EMA than any stored one is."""
    steps, every = 4000, 500
    generator = torch.Generator().manual_seed(0)
    walk = torch.randn(steps, generator=generator, dtype=torch.float64).cumsum(0).tolist()
    tracked = {width_: exponent(width_) for width_ in (0.05, 0.1, sigma)}
    averages = dict.fromkeys(tracked, 0.0)
    stored = {}
    for step, value in enumerate(walk, 1):
        for width_, gamma in tracked.items():
            beta = (1 - 1 / step) ** (gamma + 1)
            averages[width_] = beta * averages[width_] + (1 - beta) * value
        if step % every == 0:
            for width_ in (0.05, 0.1):
                stored[float(step), width_] = averages[width_]
    weights = phema(list(stored), sigma)
    assert float(sum(weights)) == pytest.approx(1)
    made = sum(float(w) * value for w, value in zip(weights, stored.values(), strict=True))
    nearest = min(abs(value - averages[sigma]) for value in stored.values())
    assert abs(made - averages[sigma]) < nearest / 5


@pytest.mark.parametrize(
    ("snapshots", "sigma"),
    [
        ([(10.0, 0.1), (10.0, 0.1)], 0.1),
        ([(0.0, 0.1)], 0.1),
        ([(10.0, 0.1)], 0.0),
        ([(10.0, 0.1)], 0.4),
        ([(10.0, 0.1)], math.nan),
        ([(10.0, -0.1)], 0.1),
    ],
)
def test_widths_and_steps_that_cannot_be(snapshots, sigma):
    """A width out of range, step zero, or the same average twice is a usage error."""
    with pytest.raises(UsageError):
        phema(snapshots, sigma)
