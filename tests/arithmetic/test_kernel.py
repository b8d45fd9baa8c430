"""merge_avg.arithmetic: each compiled loop does what it says, to the bit."""

import hashlib
import math
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merge_avg.agreement import _torch_products as products
from merge_avg.arithmetic import _kernel as kernel
from merge_avg.arithmetic._kernel import KNOWN, LOOPS, TILE, int64s
from merge_avg.arithmetic._sums import FORMATS
from merge_avg.arithmetic._weights import Weights
from tests.arithmetic.helpers import as_matrix, needs_loops, same
from tests.arithmetic.oracle import mean_of

WORDS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
dtypes = pytest.mark.parametrize("dtype", WORDS)
# Sizes around the 1,024 numbers that are summed at a time, and around a register's.
SIZES = [0, 1, 7, 31, 33, 1023, 1024, 1025, 2048, 3000]


def words(dtype, shape, seed):
    """Return any bits at all: subnormals, infinities and NaNs among them."""
    generator = torch.Generator().manual_seed(seed)
    bound = 1 << (dtype.itemsize * 8 - 1)
    raw = torch.randint(-bound, bound, shape, generator=generator)
    return raw.to(WORDS[dtype]).view(dtype)


def same_numbers(a, b):
    """Return whether two tensors are equal bit for bit, except for the payload of NaNs."""
    return torch.equal(a.isnan(), b.isnan()) and same(a[~a.isnan()], b[~b.isnan()])


def summed(rows, factors, total, known, *, begun=False):
    factors = torch.tensor(factors, dtype=torch.float64)
    where = factors.data_ptr(), total.data_ptr(), known.data_ptr()
    return LOOPS.add(as_matrix(rows), *where, begun=begun)


def room(numel):
    """Return memory for a sum, and for what is known of it: most, unit and bad for each tile."""
    total = torch.empty(numel, dtype=torch.float64)
    tiles = max(-(-numel // TILE), 1)
    assert KNOWN == 24
    return total, torch.zeros(tiles, 3, dtype=torch.float64)


@needs_loops
def test_the_library_is_that_of_the_sources():
    """The library was compiled from these sources as they are now."""
    folder = Path(kernel.__file__).parent
    sources = [(folder / name).read_bytes() for name in ("kernel.c", "level.h", "loops.h")]
    assert LOOPS.source.decode() == hashlib.sha256(b"".join(sources)).hexdigest()


@needs_loops
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("flush", [False, True])
def test_every_half_is_read_and_written(dtype, flush):
    """All 65,536 values of each half format come through, even where subnormals are flushed."""
    values = torch.arange(65536).to(torch.int16).view(dtype)
    values = values[values.isfinite()]
    if flush and dtype == torch.bfloat16:  # whose subnormals are those of float32
        values = values[values.abs() >= torch.finfo(dtype).tiny]
    total, known = room(len(values))
    wide = values.double()
    try:
        torch.set_flush_denormal(flush)
        assert summed(values, [1.0], total, known)
        known[:, 0] = 0  # as one sum they would not be exact
        back = torch.empty_like(values)
        at = 0
        while at < len(values):
            where = total.data_ptr(), known.data_ptr(), 1, 1.0, as_matrix(back), at
            fits, at, open_ = LOOPS.mean(*where)
            assert fits
            assert not open_
    finally:
        torch.set_flush_denormal(False)
    assert same_numbers(total, wide)
    assert same_numbers(back, values)


@needs_loops
@dtypes
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("begun", [False, True])
def test_a_sum_and_what_is_known(dtype, size, begun):
    """The sum is that of its terms; the bound and the unit of each tile hold, and are tight."""
    rows = words(dtype, (5, size + 3), size)
    rows.view(WORDS[dtype])[:, ::5] &= 0x3C00  # finite values, and zeros
    if begun:  # some -0
        rows.view(WORDS[dtype])[:, 3::7] = -(1 << (dtype.itemsize * 8 - 1))
    rows = rows[1:4, 2 : size + 2]  # a stride, and no alignment
    factors = [3.0, -2.0, 7.0]
    total, known = room(size)
    total.copy_(torch.arange(size))
    known[:] = torch.tensor([1000.0, 2.0**-90, 0.0])
    expected = total.clone() if begun else torch.full((size,), -0.0, dtype=torch.float64)
    for row, factor in zip(rows, factors, strict=True):
        expected += row.double() * factor
    assert summed(rows, factors, total, known, begun=begun) == bool(rows.isfinite().all())
    finite = expected.isfinite()
    assert same_numbers(total[~finite], expected[~finite])
    if dtype == torch.float16:  # whose sums are exact
        assert same_numbers(total, expected)
    scale = 12 * rows.double().abs().amax(dim=0)[finite] + begun * size
    assert bool(((total - expected)[finite].abs() <= scale * 2.0**-50).all())
    form = FORMATS[dtype]
    for number, tile in enumerate(rows.split(TILE, dim=1) if size else ()):
        most, unit, bad = known[number].tolist()
        good = [abs(float(one)) for one in tile.flatten()[tile.flatten().isfinite()]]
        assert bool(bad) == (len(good) < tile.numel())
        largest, least = max(good, default=0.0), min((x for x in good if x), default=0.0)
        if not largest:
            assert (most, unit) == ((1000.0, 2.0**-90) if begun else (0.0, math.inf))
            continue
        above = 1000.0 * begun
        for row, factor in zip(tile, factors, strict=True):
            size = float(row[row.isfinite()].abs().max()) if row.isfinite().any() else 0.0
            power = 2.0 ** (max(math.frexp(size)[1] - 1, form.emin) + 1) if size else 0.0
            above += abs(factor) * power
        assert most == above
        below = 2.0 ** (max(math.frexp(least)[1] - 1, form.emin) - form.bits + 1)
        assert unit == (min(below, 2.0**-90) if begun else below)


@needs_loops
@dtypes
@pytest.mark.parametrize("spread", [0, 3, 8, 13, 14, 15, 16, 17, 30])
@pytest.mark.parametrize("factors", [[1.0] * 9, [1.0, -3.0, 0.0, 250.0, 77777.0, -1.0, 5.0]])
@pytest.mark.parametrize("begun", [False, True])
def test_a_sum_is_exact_however_far_apart_its_terms_are(dtype, spread, factors, begun):
    """Adding in float first gives what float64 gives, the signs of zeros included."""
    generator = torch.Generator().manual_seed(spread)
    shape = len(factors), 2 * TILE + 5
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    values *= torch.exp2(torch.randint(-spread, 1, shape, generator=generator) - 3.0)
    values[:, ::9] = torch.tensor([0.0, -0.0])[torch.randint(0, 2, shape, generator=generator)][
        :, ::9
    ].double()
    values[2, TILE:] *= 2.0**-9  # one that is far below the others
    rows = values.to(dtype)
    total, known = room(shape[1])
    total[:] = 0.75 if begun else math.nan
    expected = total.clone() if begun else torch.full_like(total, -0.0)
    for row, factor in zip(rows, factors, strict=True):
        expected += row.double() * factor
    assert summed(rows, factors, total, known, begun=begun)
    assert same(total, expected)


@needs_loops
@dtypes
def test_a_sum_of_subnormals_is_exact_where_floats_are_flushed(dtype):
    """Sums that may be subnormal are not added in float, which may take these for zero."""
    tiny = torch.finfo(torch.bfloat16).tiny if dtype == torch.bfloat16 else 2.0**-22
    values = torch.tensor([[1.5 * tiny, tiny, -tiny], [-tiny, tiny * 1.25, tiny]]).to(dtype)
    total, known = room(3)
    try:
        torch.set_flush_denormal(dtype != torch.float32)
        assert summed(values, [1.0, 1.0], total, known)
    finally:
        torch.set_flush_denormal(False)
    assert total.tolist() == [0.5 * tiny, 2.25 * tiny, 0.0]


@needs_loops
@pytest.mark.parametrize("factors", [[1.0] * 5, [1.0, 65537.0, 3.0, 1.0, 1.0]])
@pytest.mark.parametrize("power", [125, 126, 127])
def test_a_sum_beyond_float_is_exact(factors, power):
    """Terms near bfloat16's largest number are summed exactly, though no float holds their sum."""
    values = torch.tensor([[1.5], [1.25], [-1.75], [1.0], [1.75]]) * 2.0**power
    rows = values.to(torch.bfloat16)
    total, known = room(1)
    assert summed(rows, factors, total, known)
    terms = [float(value) * factor for value, factor in zip(values, factors, strict=True)]
    assert total.item() == math.fsum(terms)
    assert math.isfinite(total.item())


@needs_loops
@dtypes
def test_a_power_of_two_is_a_multiple_of_its_own_unit(dtype):
    """A power of two has the unit of the numbers above it, not of those below."""
    total, known = room(2)
    assert summed(torch.tensor([2.0**-5, 1.5]).to(dtype), [1.0], total, known)
    assert known[0].tolist() == [2.0, 2.0 ** (-5 - FORMATS[dtype].bits + 1), 0]


@needs_loops
@dtypes
def test_a_sum_below_2_to_the_53_units_is_exact(dtype):
    """Up to 2**53 units a tie is certain; above, ties and what might overflow are left open."""
    form = FORMATS[dtype]
    limit = float(torch.finfo(dtype).max)
    beyond = limit + 2.0 ** (math.frexp(limit)[1] - form.bits - 1)  # the tie with what overflows
    total = torch.tensor([1 + 2.0**-form.bits, 1.0, beyond], dtype=torch.float64)
    out = torch.empty(3, dtype=dtype)
    for most, expected in (2.0**53, []), (2.0**53 + 2, [0, 2]):
        known = torch.tensor([[most, 1.0, 0.0]], dtype=torch.float64) * 2.0**-80
        where = total.data_ptr(), known.data_ptr(), 2, 1.0, as_matrix(out), 0
        fits, at, open_ = LOOPS.mean(*where)
        assert (at, open_) == (3, expected)
        assert out.tolist() == [1, 1, math.inf]
        assert fits == bool(expected)  # what is open is not known to overflow


@needs_loops
@dtypes
@pytest.mark.parametrize("bits", [50, 53])
@given(data=st.data(), divisor=st.integers(1, 99) | st.integers(1, (1 << 28) - 1))
def test_a_quotient_is_rounded_once(dtype, bits, data, divisor):
    """Exact sums round right, ties and subnormals included."""
    form = FORMATS[dtype]
    power = data.draw(st.integers(form.emin - form.bits - 2, -form.emin // 2))
    ties = st.builds(
        lambda mean, half: (2 * mean + half) * divisor,
        st.integers(-(1 << form.bits), 1 << form.bits),
        st.booleans(),
    )
    near = st.builds(lambda tie, by: tie + by, ties, st.integers(-1, 1))
    any_ = st.integers(-(1 << bits), 1 << bits)
    wholes = st.lists(near | any_, min_size=1, max_size=40)
    sums = [math.ldexp(whole, power) for whole in data.draw(wholes) if abs(whole) <= 1 << bits]
    total = torch.tensor(sums, dtype=torch.float64)
    out = torch.empty(len(sums), dtype=dtype)
    known = torch.tensor([2.0**bits, 1.0, 0.0], dtype=torch.float64)
    fits, at, open_ = LOOPS.mean(total.data_ptr(), known.data_ptr(), 1, divisor, as_matrix(out), 0)
    exact = [rounded(Fraction(one) / divisor, form, one) for one in sums]
    expected = torch.tensor(exact, dtype=torch.float64).to(dtype)
    assert same(out, expected)
    assert (fits, at, open_) == (bool(expected.isfinite().all()), len(sums), [])


@needs_loops
@dtypes
@pytest.mark.parametrize("limit", [50, 53])
def test_ties_stay_ties(dtype, limit):
    """Quotients in the middle between two numbers round to even, for divisors of all sizes."""
    form = FORMATS[dtype]
    generator = torch.Generator().manual_seed(limit)
    lowest = 1 << form.bits
    middles = torch.randint(lowest, 2 * lowest, (TILE,), generator=generator).double()
    middles += middles % 2 == 0  # odd, and of one bit more than the format has
    middles *= 2.0 ** (-form.bits - 3)
    known = torch.tensor([2.0**limit, 1.0, 0.0], dtype=torch.float64) * 2.0 ** (-form.bits - 3)
    for divisor in (*range(3, 200, 2), 10_007, 99_991, 1_000_003, (1 << 24) - 3):
        total, out = middles * divisor, torch.empty(TILE, dtype=dtype)
        LOOPS.mean(total.data_ptr(), known.data_ptr(), 1, divisor, as_matrix(out), 0)
        assert same(out, middles.float().to(dtype) if dtype.itemsize < 4 else middles.to(dtype))


def rounded(value, form, signed):
    """Return a fraction rounded to a format by integers; zero takes the sign of a float."""
    size = abs(value)
    if not size:
        return signed
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= size < Fraction(2) ** exponent
    step = max(exponent, form.emin) - form.bits + 1
    return math.copysign(math.ldexp(round(size / Fraction(2) ** step), step), signed)


@needs_loops
@dtypes
@settings(max_examples=20)
@given(seed=st.integers(0, 1 << 30), off=st.integers(-40, -2))
def test_what_might_round_otherwise_is_open(dtype, seed, off):
    """Every sum that might round otherwise within the bound is reported."""
    form = FORMATS[dtype]
    generator = torch.Generator().manual_seed(seed)
    total = torch.randn(TILE + 100, generator=generator, dtype=torch.float64)
    middle = total[::3].to(dtype).double()
    total[::3] = middle + torch.exp2(torch.frexp(middle)[1].double() - form.bits - 1)  # ties
    bound = 2.0 ** (off - form.bits)
    known = torch.tensor([[bound * 2.0**52 / 10, 0.0, 0.0]] * 2, dtype=torch.float64)
    out = torch.empty(len(total), dtype=dtype)
    at, found = 0, []
    while at < len(total):
        where = total.data_ptr(), known.data_ptr(), 4, 1.0, as_matrix(out), at
        _, at, open_ = LOOPS.mean(*where)
        found += open_
    assert found == sorted(set(found))
    closed = torch.ones(len(total), dtype=torch.bool)
    closed[found] = False
    for shift in (-bound, 0, bound):
        exact = (Fraction(one) + Fraction(shift) for one in total[closed].tolist())
        assert out[closed].tolist() == [rounded(one, form, float(one)) for one in exact]


def any_number(dtype):
    wide = 16 if dtype == torch.float16 else 32
    numbers = st.floats(width=wide, allow_nan=False, allow_infinity=False)
    if dtype != torch.bfloat16:
        return numbers
    cut = torch.tensor(-(1 << 16), dtype=torch.int32)
    return numbers.map(
        lambda x: float((torch.tensor(x).view(torch.int32) & cut).view(torch.float32))
    )


@needs_loops
@dtypes
@pytest.mark.parametrize("source", WORDS)
@given(data=st.data())
def test_what_is_settled_is_the_exact_mean(dtype, source, data):
    """Means computed in integers are exact for any numbers and weights, out of range ones too."""
    count, columns = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 3))
    signed = data.draw(st.booleans())
    least = -(1 << 20) + 1 if signed else 0
    integers = st.lists(st.integers(least, (1 << 20) - 1), min_size=count, max_size=count)
    first, *others = data.draw(integers)
    integers = (first or 1, *others)
    divisor = data.draw(st.integers(1, (1 << 28) - 1)) if signed else None
    weights = Weights(integers, divisor)
    row = st.lists(any_number(source), min_size=columns, max_size=columns)
    rows = [data.draw(row) for _ in range(count)]
    if data.draw(st.booleans()) and count > 1:  # what cancels, nearly
        rows[1] = [-value for value in rows[0]]
    values = torch.tensor(rows, dtype=torch.float64)
    out = torch.zeros(2 * columns, dtype=dtype)
    places = range(1, 2 * columns, 2)
    fits = LOOPS.settle(as_matrix(values), int64s(integers), weights.total, places, as_matrix(out))
    form = FORMATS[dtype]
    exact = [mean_of(column, weights, form) for column in zip(*rows, strict=True)]
    expected = torch.tensor(exact, dtype=torch.float64).to(dtype)
    assert same(out[1::2], expected)
    assert not out[::2].any()
    assert fits == bool(expected.isfinite().all())


@needs_loops
@dtypes
def test_elements_are_taken_by_runs(dtype):
    """Runs of columns are copied as float64, to their place and nowhere else."""
    rows = torch.arange(60).view(3, 20).to(dtype)[:, :15]
    taken = torch.zeros(4, 10, dtype=torch.float64)
    runs = int64s([2, 3, 9, 1, 14, 1])
    for row, target in ((0, 2), (2, 0)):
        LOOPS.take(as_matrix(rows[row]), runs, taken.data_ptr() + 8 * (10 * target + 4))
        assert torch.equal(taken[target, 4:9], rows[row, [2, 3, 4, 9, 14]].double())
    assert int((taken != 0).sum()) == 10
    assert torch.equal(products.take(rows[[2, 0]], runs), taken[[0, 2], 4:9])


@needs_loops
@pytest.mark.parametrize("less", [False, True])
@pytest.mark.parametrize("lengths", [(1000,), (1, 7, 300, 64), (3,) * 50])
def test_products_are_those_of_torch(lengths, less):
    """Gram matrices and lines are added up as torch does, with a row subtracted or not."""
    generator = torch.Generator().manual_seed(len(lengths))
    rows = torch.randn(5, sum(lengths) + 9, generator=generator, dtype=torch.float64)
    groups = [number * 5 % 4 for number in range(len(lengths))]
    lines = list(range(len(lengths)))[::-1]
    scales = [1.0 + number for number in range(len(lengths))]
    columns = lengths, groups, lines, scales
    found = torch.ones(4, 4, 4).double(), torch.ones(len(lengths), 8).double()
    expected = torch.ones(4, 4, 4).double(), torch.ones(len(lengths), 8).double()
    wide = rows[:4, : sum(lengths)].clone()
    products.multiply(wide - rows[4, : sum(lengths)] if less else wide, columns, *expected)
    at = [one.data_ptr() for one in found]
    LOOPS.products(as_matrix(rows[:4]), 4 if less else -1, columns, *at)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-9)
    assert torch.equal(rows[:4, : sum(lengths)], wide) != less


@needs_loops
@pytest.mark.parametrize("numel", [1, 255, 256, 257, 900])
def test_columns_that_are_the_same_count_as_zeros(numel):
    """In every tile, NaN and both zeros among them; and the rows are as before for differences."""
    generator = torch.Generator().manual_seed(numel)
    rows = torch.randn(4, numel, generator=generator, dtype=torch.float64)
    same_ones = torch.rand(numel, generator=generator) < 0.5
    same_ones[numel // 2] = True
    rows[:3, same_ones] = rows[0, same_ones]
    rows[:3, numel // 2] = math.nan
    rows[:3, 0] = torch.tensor([0.0, -0.0, 0.0]).double() if numel > 1 else math.nan
    before, columns = rows.clone(), ((numel,), (0,), (0,), (1.0,))
    found, expected = (
        (torch.zeros(1, 3, 3).double(), torch.zeros(1, 6).double()) for _ in range(2)
    )
    products.multiply(products.learned(rows[:3]), columns, *expected)
    LOOPS.products(as_matrix(rows[:3]), -1, columns, *(one.data_ptr() for one in found))
    assert expected[0].isfinite().all()
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    different = (before[:3] != before[0]).any(dim=0) & ~before[:3].isnan().all(dim=0)
    learned = before[:3, different]
    torch.testing.assert_close(found[0][0], learned @ learned.T, rtol=1e-12, atol=1e-12)
    assert torch.equal(rows.nan_to_num(9.0), before.nan_to_num(9.0))
    assert torch.equal(rows.isnan(), before.isnan())


def test_without_a_library_there_are_no_loops(tmp_path):
    """A library that is missing, made for another machine, or a different one is ignored."""
    (tmp_path / "_kernel.so").write_bytes(b"\x7fELF of another machine")
    assert kernel.load(tmp_path / "_kernel.so") is None
    assert kernel.load(tmp_path / "none.so") is None
    assert kernel.load(Path("libc.so.6")) is None
