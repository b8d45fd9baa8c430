"""Numbers of codes, and codes of numbers: compared with torch's conversions and with Python's."""

import math
from bisect import bisect_left
from fractions import Fraction
from functools import lru_cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from merge_avg.scaled import _numbers as of
from merge_avg.scaled._forms import E2M1, E4M3, E5M2, FORMS
from tests.scaled.helpers import HALVES

DTYPES = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
FLOATS = st.floats(width=64, allow_nan=False, allow_infinity=False)


def all_numbers(form):
    """Every finite number of a form, and its code."""
    if form is E2M1:
        pairs = [(math.copysign(HALVES[c & 7], 8 - c - 0.5), c) for c in range(16)]
        return [(value, code) for value, code in pairs]
    values = torch.arange(256, dtype=torch.uint8).view(DTYPES[form.name]).double().tolist()
    return [(value, code) for code, value in enumerate(values) if math.isfinite(value)]


@pytest.mark.parametrize("form", FORMS.values(), ids=str)
def test_codes_come_back(form):
    """Every number of a form is its own nearest, and has the code that it came from."""
    values, codes = zip(*all_numbers(form), strict=True)
    wide = torch.tensor(values, dtype=torch.float64)
    assert torch.equal(of.nearest(wide, form), wide)
    made = of.codes_of(of.nearest(wide, form), form)
    if form is E2M1:
        assert made.tolist() == [codes[k] | codes[k + 1] << 4 for k in range(0, 16, 2)]
    else:
        assert made.tolist() == list(codes)
    assert torch.equal(
        of.numbers(made if form is E2M1 else made.view(DTYPES[form.name]), form), wide
    )
    assert max(values) == form.largest
    assert min(value for value in values if value > 0) == form.least


@lru_cache
def sizes_of(form):
    """The sizes of the numbers of a form, in order: that of an even code has an even place."""
    return sorted({abs(value) for value, _ in all_numbers(form)})


def exact_nearest(value, form):
    """The nearest number of a form, ties to the one of an even code; by fractions."""
    sizes, size = sizes_of(form), abs(value)
    place = bisect_left(sizes, size)
    near = range(max(place - 1, 0), min(place + 1, len(sizes)))
    best = min(near, key=lambda k: (abs(Fraction(sizes[k]) - Fraction(size)), k & 1))
    return math.copysign(sizes[best], value)


@pytest.mark.parametrize("form", FORMS.values(), ids=str)
def test_the_nearest(form):
    """Numbers go to the nearest of a form, ties to even, and beyond the largest to that."""

    @given(
        st.lists(
            st.one_of(
                FLOATS,
                st.floats(-form.largest, form.largest),
                st.floats(-4 * form.least, 4 * form.least),
                st.tuples(
                    st.sampled_from([v for v, _ in all_numbers(form)]),
                    st.sampled_from([v for v, _ in all_numbers(form)]),
                    st.sampled_from([-1, 0, 1]),
                ).map(lambda t: _beside((t[0] + t[1]) / 2, t[2])),
            ),
            min_size=1,
        )
    )
    def check(values):
        rounded = of.nearest(torch.tensor(values, dtype=torch.float64), form)
        expected = torch.tensor([exact_nearest(v, form) for v in values], dtype=torch.float64)
        assert torch.equal(rounded.view(torch.int64), expected.view(torch.int64))

    check()


def _beside(value, steps):
    return value if not steps else math.nextafter(value, math.inf * steps)


@pytest.mark.parametrize("form", [E4M3, E5M2], ids=str)
def test_torch_converts_alike(form):
    """Of float32 in range, torch's own conversion has the same codes."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(1 << 31), 1 << 31, (100_000,), generator=generator)
    values = bits.to(torch.int32).view(torch.float32)
    values = torch.cat([values, torch.randn(100_000, generator=generator) * 100])
    values = values[values.abs() <= form.largest]
    ours = of.codes_of(of.nearest(values.double(), form), form)
    assert torch.equal(ours, values.to(DTYPES[form.name]).view(torch.uint8))


@given(st.lists(st.integers(0, 255), min_size=1))
def test_exponents(exponents):
    """A byte of scales is a power of two, and 255 no number."""
    found = of.scale_numbers(torch.tensor(exponents, dtype=torch.uint8), "exponent").tolist()
    for exponent, value in zip(exponents, found, strict=True):
        assert math.isnan(value) if exponent == 255 else value == math.ldexp(1, exponent - 127)


SIZES = st.one_of(
    st.just(0.0), st.floats(2.0**-100, 2.0**100), st.sampled_from([448.0, 6.0, 4.0, 1.0, 0.75])
)


@given(st.lists(SIZES, min_size=1), st.sampled_from([torch.float32, torch.bfloat16]))
def test_real_scales(sizes, dtype):
    """A real scale maps the largest size to the largest number, and of zeros it is 1."""
    wide = torch.tensor(sizes, dtype=torch.float64)
    some = {"rule": "fit", "power": torch.zeros(len(sizes), dtype=torch.bool)}
    found = of.new_scales(wide, E4M3, "real", dtype, **some)
    assert found.dtype == dtype
    expected = (wide / 448).to(dtype).where(wide > 0, 1)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", ["real", "exponent"])
def test_powers_of_two(kind):
    """Such a scale is the smallest power of two with which all numbers are in range."""

    @given(st.lists(SIZES, min_size=1))
    def check(sizes):
        wide = torch.tensor(sizes, dtype=torch.float64)
        power = torch.ones(len(sizes), dtype=torch.bool)
        made = of.new_scales(wide, E4M3, kind, torch.float32, rule="fit", power=power)
        for size, scale in zip(sizes, of.scale_numbers(made, kind).tolist(), strict=True):
            assert math.frexp(scale)[0] == 0.5
            if size:
                assert Fraction(size) <= Fraction(scale) * 448 < 2 * Fraction(size)
            else:
                assert scale == 1

    check()


@given(st.lists(SIZES, min_size=1), st.sampled_from([E2M1, E4M3]), st.booleans())
def test_scales_of_mx(sizes, form, up):
    """The exponent of MX is that of the largest size, less that of the largest number."""
    wide = torch.tensor(sizes, dtype=torch.float64)
    power = torch.ones(len(sizes), dtype=torch.bool)
    rule = "round" if up else "floor"
    made = of.new_scales(wide, form, "exponent", torch.uint8, rule=rule, power=power).tolist()
    for size, exponent in zip(sizes, made, strict=True):
        fraction, wanted = math.frexp(size)
        wanted += up and fraction >= 0.875
        assert exponent == (wanted - 1 - form.emax + 127 if size else 127)


@given(
    st.lists(
        st.lists(st.floats(2.0**-20, 2.0**20, width=32), min_size=3, max_size=3),
        min_size=1,
        max_size=4,
    ),
    st.lists(st.integers(1, 5), min_size=3, max_size=3),
    st.data(),
)
def test_sums_that_are_exact_are_known(rows, weights, data):
    """Where sums are said to be exact, no order of additions rounds."""
    scales = [torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True)]
    if not of.summable(scales, weights, E4M3):
        return
    codes = data.draw(st.lists(st.sampled_from(all_numbers(E4M3)), min_size=3, max_size=3))
    for row in rows:
        terms = [c[0] * s * w for c, s, w in zip(codes, row, weights, strict=True)]
        total = sum(
            Fraction(c[0]) * Fraction(s) * w for c, s, w in zip(codes, row, weights, strict=True)
        )
        assert Fraction((terms[0] + terms[1]) + terms[2]) == total
