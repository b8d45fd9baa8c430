"""merge_avg.arithmetic: weights as exact numbers; where integers differ, and what they become."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merge_avg.arithmetic._weights import Weights, is_counter, settle, unequal, values_of
from merge_avg.checkpoint import BY_NAME
from merge_avg.errors import UsageError
from merge_avg.options import MOST_BITS


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
    """Weights that are negative, not finite, or all zero are refused."""
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


@pytest.mark.parametrize(
    ("values", "integers", "divisor"),
    [([1, -1], (1, -1), 1), ([0.5, 0.25], (2, 1), 4), ([2, 4], (2, 4), 1), ([3, 0], (3, 0), 1)],
)
def test_weights_that_are_not_normalized(values, integers, divisor):
    """Linear combinations keep their sum: the divisor is only what makes them whole numbers."""
    weights = Weights.of(values, normalize=False)
    assert (weights.integers, weights.divisor, weights.total) == (integers, divisor, divisor)
    assert isinstance(weights.divisor, int)
    assert weights.subset([0]) == Weights((integers[0],), divisor)
    assert weights.subset([1]) == (Weights((integers[1],), divisor) if integers[1] else None)


@pytest.mark.parametrize(
    ("value", "fits"),
    [("1e30", False), ("9.9e29", True), ("-1e30", False), ("1e-30", False), ("1.1e-30", True)],
)
def test_combinations_have_a_range(value, fits):
    """Weights that are not normalized lie between 1e-30 and 1e30; others may lie anywhere."""
    if not value.startswith("-"):
        assert Weights.of([value, value]).integers == (1, 1)
    if fits:
        Weights.of([value, 0], normalize=False)
        return
    with pytest.raises(UsageError, match="out of range"):
        Weights.of([value, 0], normalize=False)


@pytest.mark.parametrize("normalize", [True, False])
def test_weights_have_at_most_4200_digits(normalize):
    """As integers they can be written in decimal and read again; others are refused in time."""
    long = Weights.of(
        [10**4200, 1] if normalize else [Fraction(1, 10**4200) + 1], normalize=normalize
    )
    assert len(str(long.total)) in (4201, 4202)
    for values in (
        [Fraction(1, 10**97 + k) for k in range(10_000)],
        [10**5000, 1],
        [Fraction(1, 10**5000), 1],
    ):
        with pytest.raises(UsageError, match=r"4,200 digits|out of range"):
            Weights.of(values, normalize=normalize)


def test_uniform_weights():
    """Uniform weights are all one."""
    assert Weights.uniform(3) == Weights((1, 1, 1))
    assert Weights.uniform(3).normalized() == [1 / 3] * 3


@pytest.mark.parametrize("text", ["0." + "1" * 150, "1e-3", "2e200", "1" * 101])
def test_long_numbers_are_exact_too(text):
    """A number with many digits or an exponent is taken as it is written, if a float64 holds it."""
    assert Weights.of([text, 0, text]).integers == (1, 0, 1)
    assert Weights.of([Fraction(text), text]).integers == (1, 1)


@pytest.mark.parametrize(("count", "small"), [(1, True), (256, True), (257, False)])
def test_small_weights(count, small):
    """Weights are small where no product or sum of them leaves 53 bits."""
    assert Weights(((1 << 20) - 1,) * count).small == small
    assert not Weights((1 << 20,)).small
    assert Weights(((1 << 20) - 1,), (1 << 28) - 1).small
    assert not Weights((1,), 1 << 28).small


def test_excess_of_long_weights():
    """Bits beyond 900 are counted, of the longest weight or of the total."""
    assert Weights(((1 << 900) - 1,)).excess == 0
    assert Weights((-(1 << 900), 1 << 901), 1).excess == 2
    assert Weights((1,), 1 << 905).excess == 6


@pytest.mark.parametrize(("integers", "divisor"), [((1, 3), None), ((5, 1 << 950), 1 << 1200)])
def test_factors_are_the_weights_over_one_power_of_two(integers, divisor):
    """As floats, weights and their total keep their ratios, and fit 900 bits."""
    weights = Weights(integers, divisor)
    power = Fraction(weights.total) / Fraction(weights.factor(weights.total))
    assert power == 1 << weights.excess
    assert [Fraction(weights.factor(one)) * power for one in integers] == list(integers)


LIMIT = 1 << MOST_BITS


@pytest.mark.parametrize(
    ("value", "normalize", "fits"),
    [
        (LIMIT - 1, True, True),
        (LIMIT, True, False),
        (Fraction(1, LIMIT - 1), True, True),
        (Fraction(1, LIMIT), True, False),
        (Fraction(LIMIT - 1, LIMIT - 3), False, True),
        (Fraction(LIMIT + 1, LIMIT - 1), False, False),
        ("1.1e-300", True, True),
        ("1e-300", True, False),
        ("9.9e299", True, True),
        ("1e300", True, False),
    ],
)
def test_the_longest_weights(value, normalize, fits):
    """Integers below a power of two are taken, and that power is not; texts fit a float64."""
    if fits:
        weights = Weights.of([value, 1], normalize=normalize)
        assert Fraction(*weights.integers) == Fraction(value)
        return
    with pytest.raises(UsageError, match=r"over 4,200 digits|not a finite"):
        Weights.of([value, 1], normalize=normalize)


@given(
    rows=st.integers(0, 12).flatmap(
        lambda size: st.lists(st.binary(min_size=8 * size, max_size=8 * size), min_size=2)
    ),
    itemsize=st.sampled_from([1, 2, 4, 8]),
)
def test_places_are_those_that_differ_in_some_pair(rows, itemsize):
    """Each place comes once and in order, whichever of its bytes differ, in however many pairs."""
    first, *others = map(memoryview, rows)
    ranges = range(0, len(first), itemsize)
    wanted = [
        at // itemsize
        for at in ranges
        if any(first[at : at + itemsize] != other[at : at + itemsize] for other in others)
    ]
    assert list(unequal(((first, other) for other in others), itemsize)) == wanted


INTEGERS = {
    "int8": [-1, 2],
    "uint8": [255, 2],
    "uint16": [65535, 1],
    "uint32": [1 << 31, 1],
    "int64": [-(1 << 63), 5],
    "uint64": [1 << 63, 1],
    "bool": [True, False],
}


@pytest.mark.parametrize(("name", "values"), INTEGERS.items())
def test_bytes_are_read_and_written_as_their_dtype(name, values):
    """Bytes are read with the dtype's sign and size, and writing changes the bytes."""
    size = BY_NAME[name].itemsize
    signed = values[0] < 0
    raw = bytearray(b"".join(int(v).to_bytes(size, "little", signed=signed) for v in values))
    view = values_of(memoryview(raw), BY_NAME[name])
    assert list(view) == values
    view[1] = values[0]
    assert raw[size:] == raw[:size]


def test_what_becomes_of_values():
    """Values become the largest, the exact mean rounded with ties to even, or the template's."""
    weights = Weights.of([1, 2, 1])
    assert settle([3, 9, 4], "max", weights) == 9
    assert settle([3, 9, 4], "template", weights) == 3
    values = [3, 4, 3]
    assert settle(values, "mean", weights) == round(Fraction(14, 4)) == 4
    assert settle([1 << 62, 1 << 62, (1 << 62) + 4], "mean", weights) == (1 << 62) + 1
    for count in (2, 4):  # another number of values is an error, not another mean
        with pytest.raises(ValueError, match="zip"):
            settle([1] * count, "mean", weights)


def test_counters_are_told_by_name_and_shape():
    """Single elements and num_batches_tracked are counters; bools never are."""
    assert is_counter("step", 1, is_bool=False)
    assert is_counter("bn.num_batches_tracked", 2, is_bool=False)
    assert not is_counter("ids", 2, is_bool=False)
    assert not is_counter("ids", 0, is_bool=False)
    assert not is_counter("flag", 1, is_bool=True)
