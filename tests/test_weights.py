"""merge_avg.weights: weights as exact numbers."""

from fractions import Fraction

import pytest

from merge_avg.errors import UsageError
from merge_avg.weights import Weights


@pytest.mark.parametrize(
    ("values", "integers"),
    [
        ([0.1, 0.2, 0.7], (1, 2, 7)),
        (["0.5", "0.25", "0.25"], (2, 1, 1)),
        ([Fraction(1, 3), 1], (1, 3)),
        ([4, 2], (2, 1)),
        ([0, 5], (0, 1)),
    ],
)
def test_weights_are_exact_decimals(values, integers):
    """A float or text stands for the decimal that it prints as, without a common factor."""
    assert Weights.of(values).integers == integers


@pytest.mark.parametrize(
    "values", [[float("nan")], [float("inf")], ["x"], [-1, 2], [0, 0], ["1/0"]]
)
def test_impossible_weights_are_usage_errors(values):
    """What is not finite, negative, or zero throughout is wrong usage."""
    with pytest.raises(UsageError):
        Weights.of(values)


def test_normalized_weights_sum_to_one():
    """Reports show weights as parts of one; a part of the checkpoints has its own weights."""
    weights = Weights.of([1, 3, 0])
    assert weights.normalized() == [0.25, 0.75, 0.0]
    assert weights.subset([1]) == Weights((1,))
    assert weights.subset([2]) is None


@pytest.mark.parametrize("text", ["1e999999999", "1e-999999999", "9" * 1000])
def test_weights_beyond_all_measure_are_refused_at_once(text):
    """An exponent that would take all memory is a usage error."""
    with pytest.raises(UsageError, match="not a finite number"):
        Weights.of([text, "1"])
