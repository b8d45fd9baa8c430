"""merge_avg.arithmetic: what sums by torch call certain is certain, and little is left open."""

import math
import random
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merge_avg.arithmetic import _sums
from merge_avg.arithmetic._sums import (
    FORMATS,
    WORDS,
    Buffers,
    PlainSum,
    Span,
    WideSum,
    magnitude,
    span_of,
)
from merge_avg.arithmetic._weights import Weights
from tests.arithmetic.helpers import midpoint, narrowed, same
from tests.arithmetic.oracle import mean_of, reference, rounded

DOUBLE = torch.float64
seeds = st.integers(0, 1 << 30)


def values(chance, count, dtype, spread):
    """Return zeros of both signs, powers of two, neighbours of them, subnormals and others."""
    form = FORMATS[dtype]
    tiny = math.ldexp(1, form.emin - form.bits + 1)

    def value():
        power = 2.0 ** chance.randint(-spread, spread)
        some = [power, power * (1 - 2.0**-form.bits), chance.gauss(0, 1) * power, 0.0]
        return chance.choice([*some, *some, tiny * chance.randint(1, 9)]) * chance.choice([1, -1])

    made = torch.tensor([value() for _ in range(count)], dtype=DOUBLE).to(dtype)
    return made.where(made.isfinite(), 1)


@given(dtype=st.sampled_from([*WORDS]), seed=seeds, spread=st.sampled_from([0, 5, 200]))
@settings(max_examples=200)
def test_spans_are_as_narrow_as_the_numbers(dtype, seed, spread):
    """A span starts at the last bit of the smallest number, and ends above the largest one."""
    chance = random.Random(seed)  # noqa: S311 - numbers for a test
    rows = values(chance, chance.randint(1, 6), dtype, spread)[None]
    bits = chance.choice([FORMATS[dtype].bits, 53, 4])
    bad = chance.random() < 0.3
    clean = rows.clone()
    if bad:
        rows[0, 0], clean[0, 0] = chance.choice([math.inf, -math.inf, math.nan]), 0
    before = rows.clone()
    span, finite = span_of(rows, bits, Buffers())
    assert same(rows, before)
    assert finite != bad
    numbers = clean[0].tolist()
    sizes = [abs(x) for x in numbers if x]
    assert span.zeros == (0 in numbers)
    assert span.negative_zeros == any(not x and math.copysign(1, x) < 0 for x in numbers)
    if sizes:
        # The last bit of a subnormal number is that of the smallest normal one.
        least, most = (
            max(math.frexp(x)[1] - 1, FORMATS[dtype].emin) for x in (min(sizes), max(sizes))
        )
        assert (span.low, span.high) == (least - bits + 1, most + 1)
    else:
        assert magnitude([(span, 1)]) == 0


def test_no_numbers_have_no_span():
    """Of no rows nothing is large, zero or not finite."""
    span, finite = span_of(torch.empty(1, 0), 24, Buffers())
    assert finite
    assert not span.negative_zeros
    assert magnitude([(span, 3)]) == 0


def test_a_magnitude_is_the_sum_of_the_largest_terms():
    """Rows of weight zero, and of zeros, add nothing to the bound of all sums."""
    zeros, _ = span_of(torch.zeros(1, 1), 24, Buffers())
    spans = [(Span(-9, -3, zeros=False), 4), (zeros, 7), (Span(0, 9, zeros=True), 0)]
    assert magnitude([*spans, (Span(-9, 70, zeros=False), 3)]) == 3 * 2**70 + Fraction(1, 2)


@pytest.mark.parametrize(
    ("spans", "exact"),
    [
        ([(0, 53, 1)], True),
        ([(0, 54, 1)], False),
        ([(-7, 46, 1)], True),
        ([(0, 52, 1), (0, 52, 1)], True),
        ([(0, 52, 1), (0, 52, 1), (0, 1, 1)], False),
        ([(0, 51, 4)], True),
        ([(0, 51, 5)], False),
        ([(30, 53, 1), (-1, 22, 0)], False),  # its zeros are not known to be that
        ([(0, 24, 1), (99, 123, 0)], True),
        ([(-900, -876, 1), (0, 24, 1)], False),
    ],
)
def test_a_sum_is_exact_if_the_exponents_show_it(spans, exact):
    """Of a sum that is claimed to be exact every part fits 53 bits, and no element is in doubt."""
    weights = Weights(tuple(weight for *_, weight in spans))
    total = PlainSum(torch.ones(1, 1, dtype=DOUBLE), weights, Buffers())
    weighed = [(Span(low, high, zeros=False), weight) for low, high, weight in spans]
    assert total._exact(weighed) == exact
    assert (total.rounded(FORMATS[torch.float32], weighed)[1] is None) == exact
    assert total.widened(weighed).loose != exact
    assert not PlainSum(total._row, Weights((1 << 20,)), Buffers())._exact(weighed[:1])


TARGETS = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]


@given(target=st.sampled_from(TARGETS), seed=seeds, less=st.integers(1, 60))
@settings(max_examples=200)
def test_whatever_lies_within_a_bound_rounds_alike(target, seed, less):
    """Values known to within a bound are certain only if both ends of it round to the result."""
    chance = random.Random(seed)  # noqa: S311
    form = FORMATS[target]
    found = values(chance, 20, DOUBLE, 12)
    largest = torch.finfo(target).max  # beyond which there is NaN, or the largest number again
    found[::2] = found[::2].clamp(-largest, largest).to(target).to(DOUBLE)
    found[::4] *= 1 + chance.choice([1, -1, 2]) * 2.0**-form.bits
    bound = chance.choice([0.5, 0.75, 1]) * 2.0**-less
    mean, doubtful = _sums._snap_bounded(found, form, bound)
    for value, result, open_ in zip(*(t.tolist() for t in (found, mean, doubtful)), strict=True):
        ends = {
            (end, math.copysign(1, end))
            for side in (-bound, bound)
            for end in [nearest(Fraction(value) + Fraction(side), form)]
        }
        if not open_:
            assert ends == {(result, math.copysign(1, result))}
        else:  # nor is what can be told in doubt, unless the bound is as wide as a unit
            unit = 2.0 ** (max(math.frexp(value)[1] - 1, form.emin) - form.bits + 1)
            assert len(ends) > 1 or unit <= 8 * bound or beside(value, bound, form)


def nearest(exact, form):
    return math.copysign(rounded(exact, form), exact)


def beside(value, bound, form):
    """Return whether the bound just reaches a midpoint, or zero."""
    near = Fraction(bound) * (1 + Fraction(1, 1 << 30))
    return len({nearest(Fraction(value) + side, form) for side in (-near, near)}) > 1


def test_formats_of_53_bits_leave_all_in_doubt_that_a_bound_covers():
    """A sum in float64 that may be rounded tells no float64 mean for certain."""
    found = torch.tensor([1.0, 0.0], dtype=DOUBLE)
    mean, doubtful = _sums._snap_bounded(found, FORMATS[DOUBLE], 0.0)
    assert torch.equal(mean, found)
    assert doubtful.all()


def sums(rows, weights, source, target):
    """Return the means that each kind of sum gives, what is in doubt, and if each sum is known.

    A double-double sum is what it says where it calls itself exact.
    """
    buffers, form = Buffers(), FORMATS[target]
    span, _ = span_of(rows, FORMATS[source].bits, buffers)
    spans = [(span, sum(map(abs, weights.integers)))]
    wide = WideSum(torch.full((rows.shape[1],), -0.0, dtype=DOUBLE), weights)
    wide.add(rows, weights.integers)
    parts = [part.tolist() for part in (rows.T, wide._high, wide._low, wide._inexact)]
    for column, high, low, inexact in zip(*parts, strict=True):
        if not inexact and not wide.loose:
            terms = zip(column, weights.integers, strict=True)
            assert Fraction(high) + Fraction(low) == sum(Fraction(x) * w for x, w in terms)
    found = [(*wide.rounded(form, spans), not wide.loose)]
    if source != DOUBLE and not weights.excess:
        factors = torch.tensor([list(map(float, weights.integers))], dtype=DOUBLE)
        plain = PlainSum(torch.empty(1, rows.shape[1], dtype=DOUBLE), weights, buffers)
        plain.add(rows, weights.integers, factors, signs=True)
        found.append((*plain.rounded(form, spans), plain._exact(spans)))
    return found


CHOICES = [
    [1, 1, 1],
    [3, 0, 1, 5],
    [1] * 9,
    [(1 << 20) - 1, 1],
    [(1 << 40) + 1, 3],
    [(1 << 70) + 1, 5, 1],
    [(1 << 70) - (1 << 9) - 1, (1 << 130) + 3],
    [(1 << 950) + 1, 1 << 940],
    [3, -1, 2],
    [5, -4, 1],
]


@given(
    source=st.sampled_from([DOUBLE, torch.float32, torch.bfloat16]),
    target=st.sampled_from([DOUBLE, torch.float32, torch.float16, torch.float8_e5m2]),
    integers=st.sampled_from(CHOICES),
    divisor=st.sampled_from([None, 1, 3, 1 << 28, (1 << 60) + 1]),
    seed=seeds,
    spread=st.sampled_from([0, 10, 40, 120]),
)
@settings(max_examples=300)
def test_means_that_are_not_in_doubt_are_right(source, target, integers, divisor, seed, spread):
    """What a sum does not call doubtful is the exact mean rounded once, in either arithmetic."""
    chance = random.Random(seed)  # noqa: S311
    weights = Weights(tuple(integers), divisor if divisor or sum(integers) > 0 else 1)
    rows = torch.stack([values(chance, 12, source, spread) for _ in integers])
    if chance.random() < 0.5:
        rows[-1, ::2] = -rows[0, ::2]
    if chance.random() < 0.5:  # beside a tie, by as little as a sum might lose
        for column in range(0, 12, 3):
            tie = midpoint(chance, FORMATS[target]) * weights.total / weights.integers[0]
            rows[:, column] *= float(tie) * 2.0 ** -chance.randint(10, 160)
            rows[0, column] = narrowed(tie, source)
    rows = rows.where(rows.isfinite(), 0)
    form = FORMATS[target]
    wanted = [mean_of(column, weights, form) for column in rows.double().T.tolist()]
    expected = torch.tensor(wanted, dtype=DOUBLE)
    for mean, doubtful, _ in sums(rows, weights, source, target):
        sure = torch.ones(12, dtype=torch.bool) if doubtful is None else ~doubtful
        assert same(mean[sure].to(target), expected[sure].to(target))


@pytest.mark.parametrize("target", [DOUBLE, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("integers", CHOICES, ids=len)
@pytest.mark.parametrize("source", [DOUBLE, torch.float32])
def test_random_numbers_are_in_no_doubt(target, integers, source):
    """None is looked at again, but for float64 means where only a bound on all sums is known."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(len(integers), 1000, generator=generator, dtype=DOUBLE).to(source)
    for mean, doubtful, known in sums(rows, Weights(tuple(integers)), source, target):
        assert mean.isfinite().all()
        if target == DOUBLE and not known:
            assert doubtful.all()
        else:
            assert doubtful is None or not doubtful.any()


@pytest.mark.parametrize("target", [DOUBLE, torch.float32, torch.bfloat16])
def test_ties_are_in_no_doubt(target):
    """Means half-way between two numbers are rounded to even, and not looked at again."""
    chance = random.Random(4)  # noqa: S311
    form = FORMATS[target]
    ties = [midpoint(chance, form) for _ in range(200)]
    ties = [tie for tie in ties if tie > Fraction(2) ** -800]
    step = [Fraction(2) ** (math.frexp(float(tie))[1] - form.bits - 1) for tie in ties]
    pairs = [[float(tie - half), float(tie + half)] for tie, half in zip(ties, step, strict=True)]
    rows = torch.tensor(pairs, dtype=DOUBLE).T.contiguous()
    for mean, doubtful, _ in sums(rows, Weights.uniform(2), DOUBLE, target):
        assert same(mean.to(target), reference(list(rows), Weights.uniform(2), target))
        assert not doubtful.any()


@pytest.mark.parametrize(
    ("kind", "target", "large", "count"),
    [
        ("plain", torch.float32, 10, 7),
        ("plain", torch.bfloat16, 20, 100),
        ("loose", torch.float32, 10, 7),
        ("wide", torch.float32, 60, 7),
        ("wide", DOUBLE, 30, 7),
        ("wide", DOUBLE, 12, 100),
    ],
)
def test_bounds_cover_all_that_rounding_can_do(kind, target, large, count):
    """Means are in doubt as near to a tie as the roundings of a sum reach, and not much further.

    In float64 these are two for each term, of at most half a unit of the sum of all sizes. A
    double-double sum loses three parts of each, half a unit of the sum of all parts so far.
    """
    form = FORMATS[target]
    one = 1 << (950 if kind == "loose" else 0)
    weights = Weights((one,) * count, one)
    part, needed = {
        "plain": (count * 2.0**-52, 1),
        "loose": (count * 2.0**-50, 1 / 4),
        "wide": (count**2 * 2.0**-98, 9 / 256),
    }[kind]
    unit = count * 2.0 ** (large + 1) * part
    # What cancels makes sizes large, and the last ones are lost.
    tops = [2.0**large, -(2.0**large), 1.0, 2.0**-form.bits]
    near = [sign * unit * 2.0**-k for k in range(-2, 20) for sign in (1, -1)]
    zeros = [0.0] * (count - 7)
    columns = [[*tops, aside, 2.0**-70, 2.0**-170, *zeros] for aside in near]
    source = torch.float32 if kind == "plain" else DOUBLE
    rows = torch.tensor(columns, dtype=DOUBLE).to(source).T.contiguous()
    _, doubtful, _ = sums(rows, weights, source, target)[kind == "plain"]
    for aside, open_ in zip(near, doubtful.tolist(), strict=True):
        assert open_ or abs(aside) > needed * unit
        assert not open_ or abs(aside) < 3 * unit


@pytest.mark.parametrize("bits", [60, 100, 106, 110, 150])
@pytest.mark.parametrize("less", [1, -1, 0])
def test_what_a_divisor_has_beyond_53_bits_decides_ties(bits, less):
    """Just beside a tie it says which neighbour is nearer, or the element is in doubt."""
    rows = torch.tensor([[2.0**bits], [3 * 2.0 ** (bits - 53)]], dtype=DOUBLE)
    weights = Weights((1, 1), (1 << bits) + less)
    for mean, doubtful, _ in sums(rows, weights, DOUBLE, DOUBLE):
        right = same(mean, reference(list(rows), weights, DOUBLE))
        assert right or doubtful.all()
        assert less or right


floats = st.floats(2.0**-400, 2.0**400) | st.integers(1 << 52, (1 << 53) - 1).map(float)


@given(floats, floats, st.sampled_from([1, -1]), st.integers(-60, 60))
def test_sums_and_products_are_exact_with_their_errors(one, other, sign, power):
    """A rounded result and its error are together what no rounding was done to."""
    one, other = one * sign, other * 2.0**power
    for function, exact in (
        (_sums._two_sum, Fraction(one) + Fraction(other)),
        (_sums._two_product, Fraction(one) * Fraction(other)),
    ):
        second = torch.tensor([other], dtype=DOUBLE) if function is _sums._two_sum else other
        high, low = function(torch.tensor([one], dtype=DOUBLE), second)
        assert Fraction(high.item()) + Fraction(low.item()) == exact
        assert high.item() == float(exact)


def test_scratch_tensors_are_used_again():
    """Scratch of one name is the same memory for all shapes and dtypes; that of others is not."""
    buffers = Buffers()
    long, short = torch.empty(40), torch.empty(3, 4)
    first = buffers("a", long)
    assert (first.shape, first.dtype) == (long.shape, DOUBLE)
    assert buffers("a", long) is first
    part = buffers("a", short, torch.int16)
    assert (part.shape, part.dtype) == (short.shape, torch.int16)
    assert part.data_ptr() == first.data_ptr()
    assert buffers("b", long).data_ptr() != first.data_ptr()
    # A longer one is new memory, and what was cut from the old one is forgotten.
    longer = buffers("a", torch.empty(41))
    assert len(longer) == 41
    assert buffers("a", long).data_ptr() == longer.data_ptr()
    for size in range(200):
        assert buffers("a", torch.empty(size)).shape == (size,)
    assert len(buffers._views) < 100
