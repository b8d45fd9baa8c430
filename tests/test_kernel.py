"""merge_avg.kernel: the compiled loops compute what torch does, to the bit."""

import hashlib
import math
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from merge_avg import average, kernel
from merge_avg.average import _FLOATS, RunningMean
from merge_avg.weights import Weights

WORDS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
LOOPS = kernel.load()
needs_loops = pytest.mark.skipif(LOOPS is None, reason="installed without a C compiler")
dtypes = pytest.mark.parametrize("dtype", WORDS)
# Sizes around the 1,024 numbers that are summed at a time, and around a register's.
SIZES = [0, 1, 7, 31, 33, 1023, 1024, 1025, 2048, 3000]


def words(dtype, shape, seed):
    """Any bits at all: subnormals, infinities and NaNs among them."""
    generator = torch.Generator().manual_seed(seed)
    bound = 1 << (dtype.itemsize * 8 - 1)
    raw = torch.randint(-bound, bound, shape, generator=generator)
    return raw.to(WORDS[dtype]).view(dtype)


def same(a, b):
    """Bit for bit, but for what a NaN carries."""
    word = {8: torch.int64, 4: torch.int32, 2: torch.int16}[a.itemsize]
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(
        a.view(word)[~a.isnan()], b.view(word)[~b.isnan()]
    )


@needs_loops
def test_the_library_is_that_of_the_source():
    """What is tested here was compiled from kernel.c as it is."""
    source = Path(kernel.__file__).with_name("kernel.c")
    assert LOOPS.source.decode() == hashlib.sha256(source.read_bytes()).hexdigest()


@needs_loops
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("flush", [False, True])
def test_every_half_is_read_and_written(dtype, flush):
    """All 65,536 values of each half format come through, even where subnormals are flushed."""
    values = torch.arange(65536).to(torch.int16).view(dtype)
    if flush and dtype == torch.bfloat16:  # whose subnormals are those of float32
        values = values[values.abs() >= torch.finfo(dtype).tiny]
    total = torch.empty(len(values), dtype=torch.float64)
    wide = values.double()
    try:
        torch.set_flush_denormal(flush)
        one = torch.ones(1, 1, dtype=torch.float64)
        LOOPS.add(values.view(1, -1), one, total, begun=False)
        back = torch.empty_like(values)
        LOOPS.divide(total, 1.0, back)
    finally:
        torch.set_flush_denormal(False)
    assert same(total, wide)
    finite = values.isfinite()
    assert same(back[finite], values[finite])


@needs_loops
@dtypes
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("begun", [False, True])
def test_a_sum_and_what_was_seen(dtype, size, begun):
    """The sum is that of its terms; the least, the largest, zeros and -0 are found."""
    rows = words(dtype, (5, size + 3), size)
    rows.view(WORDS[dtype])[:, ::5] &= 0x3C00  # finite values, and zeros
    if begun:  # some -0
        rows.view(WORDS[dtype])[:, 3::7] = -(1 << (dtype.itemsize * 8 - 1))
    rows = rows[1:4, 2 : size + 2]  # a stride, and no alignment
    factors = torch.tensor([[3.0, -2.0, 7.0]], dtype=torch.float64)
    total = torch.arange(size, dtype=torch.float64)
    expected = total.clone() if begun else torch.full((size,), -0.0, dtype=torch.float64)
    for row, factor in zip(rows, factors[0], strict=True):
        expected += row.double() * factor
    found = LOOPS.add(rows, factors, total, begun=begun)
    finite = expected.isfinite()
    assert same(total[~finite], expected[~finite])
    if dtype == torch.float16:  # whose sums are exact
        assert same(total, expected)
    scale = (rows.double().abs().T @ factors[0].abs())[finite] + begun * size
    assert bool(((total - expected)[finite].abs() <= scale * 2.0**-50).all())
    assert bool(finite.any()) == bool(size)
    sizes = [int(word) & ((1 << (dtype.itemsize * 8 - 1)) - 1) for word in flat_words(rows)]
    low = min((one for one in sizes if one), default=0)
    signs = [int(word) < 0 for word in flat_words(rows)]
    minus = any(sign and not one for sign, one in zip(signs, sizes, strict=True))
    assert found == (low, max(sizes, default=0), 0 in sizes, minus)


def flat_words(rows):
    return rows.contiguous().view(WORDS[rows.dtype]).flatten().tolist()


@needs_loops
@dtypes
@given(
    data=st.data(),
    divisor=st.integers(1, (1 << 28) - 1),
)
def test_a_quotient_is_rounded_once(dtype, data, divisor):
    """Sums that are exact integers of some unit, ties and subnormals included, round right."""
    form = _FLOATS[dtype]
    power = data.draw(st.integers(form.emin - form.bits - 2, -form.emin // 2))
    ties = st.builds(
        lambda mean, half: (2 * mean + half) * divisor,
        st.integers(-(1 << form.bits), 1 << form.bits),
        st.booleans(),
    )
    near = st.builds(lambda tie, by: tie + by, ties, st.integers(-1, 1))
    wholes = st.lists(near | st.integers(-(1 << 52), 1 << 52), min_size=1, max_size=40)
    sums = [math.ldexp(whole, power) for whole in data.draw(wholes) if abs(whole) <= 1 << 53]
    total = torch.tensor(sums, dtype=torch.float64)
    out = torch.empty(len(sums), dtype=dtype)
    LOOPS.divide(total, float(divisor), out)
    exact = [rounded(Fraction(one) / divisor, form, one) for one in sums]
    expected = torch.tensor(exact, dtype=torch.float64).to(dtype)
    assert same(out, expected)


def rounded(value, form, signed):
    """A fraction rounded to a format by integers; what becomes zero keeps the sign of a float."""
    size = abs(value)
    if not size:
        return signed
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= size < Fraction(2) ** exponent
    step = max(exponent, form.emin) - form.bits + 1
    return math.copysign(math.ldexp(round(size / Fraction(2) ** step), step), signed)


@needs_loops
@dtypes
@pytest.mark.parametrize("target", [None, *WORDS])
@pytest.mark.parametrize("seed", range(6))
def test_a_mean_has_the_same_bits_without(dtype, target, seed, monkeypatch):
    """A running mean over any bits, in groups and blocks, is the same by torch alone."""
    weights = Weights.of([1, 0, 5, 2, 2]) if seed % 2 else Weights.uniform(5)
    tensors = words(dtype, (5, 70_000), seed)
    if seed < 4:  # exponents that lie close together, so that sums are exact
        keep = 0x3FFFFFFF & ~0x38000000 if dtype.itemsize == 4 else 0x3FFF & ~0x3000
        tensors.view(WORDS[dtype]).bitwise_and_(keep | -(1 << (dtype.itemsize * 8 - 1)))
    results = []
    for loops in (LOOPS, None):
        monkeypatch.setattr(average, "_KERNEL", loops)
        mean = RunningMean(weights, target)
        mean.extend(tensors[:2])
        mean.extend(tensors[2:])
        results.append(mean.result(lambda i: tensors[i]))
    assert same(*results)


@needs_loops
def test_what_the_loops_do_not_take():
    """Other dtypes, other devices and rows that are not dense are left to torch."""
    assert LOOPS.sums(torch.zeros(2, 3))
    assert not LOOPS.sums(torch.zeros(2, 3, dtype=torch.float64))
    assert not LOOPS.sums(torch.zeros(2, 3, device="meta"))
    assert not LOOPS.sums(torch.zeros(3, 2).T)
    assert not LOOPS.divides(torch.zeros(2, dtype=torch.float64))
    assert not LOOPS.divides(torch.zeros(2, device="meta"))
    assert not LOOPS.divides(torch.zeros(4)[::2])
    assert not LOOPS.divides(torch.nn.Parameter(torch.zeros(4)))


@needs_loops
def test_a_result_may_have_gaps():
    """Every second element of a vector can take a mean."""
    out = torch.zeros(6)
    mean = RunningMean(2)
    mean.extend(torch.tensor([[1.0, 2, 3], [3, 4, 6]]))
    mean.result(out=out[::2])
    assert out.tolist() == [2, 0, 3, 0, 4.5, 0]


def test_without_a_library_there_are_no_loops(tmp_path):
    """A library that is missing, for another machine, or another one, is left out."""
    (tmp_path / "_kernel.so").write_bytes(b"\x7fELF of another machine")
    assert kernel.load(tmp_path / "_kernel.so") is None
    assert kernel.load(tmp_path / "none.so") is None
    assert kernel.load(Path("libc.so.6")) is None
