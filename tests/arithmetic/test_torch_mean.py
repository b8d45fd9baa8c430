"""merge_avg.arithmetic: the mean by torch, bit for bit against exact rational arithmetic."""

import itertools
import math
import random
import sys
from collections import Counter
from fractions import Fraction
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merge_avg.arithmetic import torch_mean
from merge_avg.arithmetic._sums import FORMATS
from merge_avg.arithmetic._weights import Weights
from merge_avg.arithmetic.torch_mean import RunningMean, TorchMean, exact_mean
from merge_avg.arithmetic.tuning import BLOCK, CONVERTED
from tests.arithmetic.helpers import as_matrix, midpoint, narrowed, same
from tests.arithmetic.oracle import mean_of, reference

DTYPES = list(FORMATS)


def averaged(tensors, weights=None, dtype=None):
    mean = RunningMean(weights or len(tensors), dtype)
    for tensor in tensors:
        mean.update(tensor)
    return mean.result(lambda i: tensors[i])


def nearest(value, dtype):
    """Return the value of a small dtype nearest to an exact one, by search over all of them."""
    codes = torch.arange(256, dtype=torch.uint8).view(dtype).double()
    finite = sorted({float(c) for c in codes if math.isfinite(c)})
    distances = [(abs(Fraction(c) - value), c) for c in finite]
    least = min(d for d, _ in distances)
    best = [c for d, c in distances if d == least]
    even = [c for c in best if int(torch.tensor(c).to(dtype).view(torch.uint8)) % 2 == 0]
    return (even or best)[0]


def made(dtype, numel, spread, seed):
    """Return values whose exponents are spread over 2 * `spread` powers of two."""
    generator = torch.Generator().manual_seed(seed)
    power = torch.randint(-spread, spread + 1, (numel,), generator=generator).double()
    values = torch.randn(numel, generator=generator, dtype=torch.float64) * torch.exp2(power)
    if seed % 3 == 0:
        values = values.mul(4).round().div(4)  # many ties, zeros and equal values
    narrow = values.to(dtype)
    finite = narrow.double().isfinite()
    return torch.where(finite, narrow.double(), 1.0).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_formats_are_those_of_torch(dtype):
    """The significand bits and least normals are what the values of torch show."""
    form = FORMATS[dtype]
    if dtype.itemsize > 2:
        found = torch.finfo(dtype)
        assert (found.eps, found.smallest_normal) == (2.0 ** (1 - form.bits), 2.0**form.emin)
        return
    patterns = torch.arange(1 << 8 * dtype.itemsize, dtype=torch.int32)
    codes = patterns.to(torch.uint8 if dtype.itemsize == 1 else torch.uint16).view(dtype)
    values = codes.double()
    values = values[values.isfinite() & (values > 0)].unique()
    binades = Counter((values.frexp().exponent - 1).tolist())
    assert binades[0] == 2 ** (form.bits - 1)
    assert min(e for e, count in binades.items() if count == binades[0]) == form.emin


@settings(max_examples=150)
@given(
    dtype=st.sampled_from(DTYPES),
    count=st.integers(1, 9),
    spread=st.sampled_from([0, 3, 12, 30, 120]),
    seed=st.integers(0, 2**20),
    cancel=st.booleans(),
    weights=st.none() | st.lists(st.sampled_from([0, 1, 2, 7, 0.1, 0.3, "1/3"]), min_size=9),
    block=st.sampled_from([7, BLOCK]),
    converted=st.sampled_from([1, 99, CONVERTED]),
    rows=st.integers(1, 9),
)
def test_mean_is_correctly_rounded(
    dtype, count, spread, seed, cancel, weights, block, converted, rows
):
    """The mean is the exact one rounded once, for every dtype, range, weight and cancellation.

    Nor does it matter in which blocks the elements are summed, and how many rows come at a time.
    """
    tensors = [made(dtype, 40, spread, seed + i) for i in range(count)]
    if cancel and count > 1:
        tensors[-1] = (-tensors[0].double()).to(dtype)
    chosen = Weights.uniform(count)
    if weights is not None and any(weights[:count]):
        chosen = Weights.of(weights[:count])
    with mock.patch.multiple(torch_mean, BLOCK=block, CONVERTED=converted):
        mean = RunningMean(chosen)
        for start in range(0, count, rows):
            mean.extend(torch.stack(tensors[start : start + rows]))
        result = mean.result(lambda i: tensors[i])
    assert same(result, reference(tensors, chosen, dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("source", [torch.float64, torch.float32, torch.float16])
def test_conversion_rounds_once(source, dtype):
    """Averaging into another dtype rounds the exact mean, not an intermediate one."""
    for seed, spread in itertools.product(range(4), (2, 14)):
        tensors = [made(source, 500, spread, 7 * seed + i) for i in range(3)]
        expected = reference(tensors, Weights.uniform(3), dtype)
        assert same(averaged(tensors, dtype=dtype), expected)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_exact_mean_is_the_nearest_value(dtype):
    """The reference itself agrees with a search over all values of a small dtype."""
    form = FORMATS[dtype]
    values = [made(dtype, 30, 5, seed).double().tolist() for seed in range(3)]
    for row in zip(*values, strict=True):
        exact = sum(map(Fraction, row)) / 3
        assert mean_of(row, Weights.uniform(3), form) == nearest(exact, dtype)
        assert exact_mean(row, Weights.uniform(3), form) == nearest(exact, dtype)


@given(
    values=st.lists(
        st.floats(allow_nan=False, allow_infinity=False)
        | st.sampled_from([0.0, -0.0, 1.0, -1.0, sys.float_info.max, -sys.float_info.max]),
        min_size=1,
        max_size=4,
    ),
    integers=st.lists(st.integers(-9, 9) | st.integers(), min_size=4, max_size=4),
    divisor=st.integers(1, 9) | st.integers(1),
    form=st.sampled_from([*FORMATS.values()]),
)
def test_exact_means_are_those_of_fractions(values, integers, divisor, form):
    """Any finite numbers and weights, of either sign, in any format, overflow included."""
    weights = Weights(tuple(integers[: len(values)]), divisor)
    assert repr(exact_mean(values, weights, form)) == repr(mean_of(values, weights, form))
    with pytest.raises(ValueError, match="zip"):
        exact_mean([*values, 1.0], weights, form)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_order_does_not_matter(dtype):
    """Every order of the tensors gives the same bits, cancellation included."""
    tensors = [made(dtype, 300, 60, seed) for seed in range(4)]
    tensors.append((-tensors[0].double()).to(dtype))
    results = {
        bytes(averaged(p).view(torch.uint8).numpy()) for p in itertools.permutations(tensors)
    }
    assert len(results) == 1


@pytest.mark.parametrize("count", [2, 3, 8, 20])
def test_large_windows_are_exact(count):
    """A window of 100,000 random float32 weights has no wrongly rounded element."""
    generator = torch.Generator().manual_seed(count)
    tensors = [torch.randn(100_000, generator=generator) for _ in range(count)]
    some = torch.arange(0, 100_000, 97)
    expected = reference(
        [tensor[some] for tensor in tensors], Weights.uniform(count), torch.float32
    )
    assert torch.equal(averaged(tensors)[some], expected)


@pytest.mark.parametrize(
    ("complex_dtype", "dtype"),
    [
        (torch.complex128, torch.float64),
        (torch.complex64, torch.float32),
        (torch.complex32, torch.float16),
    ],
)
@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_complex_is_averaged_by_component(complex_dtype, dtype):
    """A complex mean is the mean of the real and of the imaginary parts."""
    parts = [made(dtype, 20, 3, seed).view(10, 2) for seed in range(3)]
    result = averaged([torch.view_as_complex(part) for part in parts])
    assert result.dtype == complex_dtype
    expected = reference([p.flatten() for p in parts], Weights.uniform(3), dtype)
    assert torch.equal(torch.view_as_real(result).flatten(), expected)


def test_largest_values_do_not_overflow():
    """The mean of the largest values of a dtype is that value, float64 included."""
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        largest = torch.full((3,), torch.finfo(dtype).max, dtype=dtype)
        assert torch.equal(averaged([largest] * 5), largest)


def test_zeros_keep_their_sign():
    """Minus zero everywhere stays minus zero; beside zero or cancelled it is zero."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        minus, one = torch.tensor([-0.0, 1.0], dtype=dtype).split(1)
        assert averaged([minus, minus, minus]).signbit().item()
        assert not averaged([minus, -minus, minus]).signbit().item()
        assert not averaged([one, -one]).signbit().item()


@pytest.mark.parametrize("count", [3, 4, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128, torch.float32])
def test_zeros_are_in_no_doubt(dtype, count):
    """The mean of zeros, such as the imaginary parts of real numbers, takes no exact arithmetic."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(count, 1000, generator=generator, dtype=torch.float64).to(dtype)
    values[:, ::2] = 0
    with mock.patch.object(torch_mean, "exact_mean", side_effect=exact_mean) as exact:
        mean = RunningMean(count)
        mean.extend(values)
        result = mean.result(lambda index: values[index])
    assert exact.call_count < 50  # of which a few of the others may need some
    assert not result[::2].any()


def test_nonfinite_values_follow_ieee():
    """Infinity and NaN follow IEEE 754, touch only their own elements, and clear `finite`."""
    inf = math.inf
    first = torch.tensor([1.0, inf, inf, math.nan, 3.0])
    second = torch.tensor([2.0, 1.0, -inf, 1.0, 5.0])
    mean = RunningMean(2)
    mean.update(first)
    assert not mean.finite
    mean.update(second)
    result = mean.result(lambda i: (first, second)[i])
    assert result[[0, 1, 4]].tolist() == [1.5, inf, 4.0]
    assert result[2:4].isnan().all()
    assert mean.finite  # ready for the next


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_infinity_follows_the_sign_of_its_weight_whatever_overflows(order):
    """A finite sum that overflows on the way makes no NaN of infinity, in any order."""
    limit = torch.finfo(torch.float64).max
    columns = [[limit, limit, -math.inf], [1, 1, math.inf], [limit, limit, limit]]
    rows = torch.tensor(columns, dtype=torch.float64).T[list(order)].contiguous()
    signs = [(1, 2, -1)[number] for number in order]
    for integers, expected in (
        ([1] * 3, [-math.inf, math.inf, limit]),
        (signs, [math.inf, -math.inf, limit]),
    ):
        mean = RunningMean(Weights(tuple(integers), sum(integers)))
        mean.extend(rows)
        assert not mean.finite
        assert mean.result(lambda i: rows[i]).tolist() == expected


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_weight_of_zero_has_a_term_too(dtype, sign):
    """Zero times infinity is NaN, and zero times a negative number is -0, one by one as at once."""
    weights = Weights((0, 2 * sign, 0), 3)
    rows = torch.tensor([[math.inf, -sign], [1, -0.0 * sign], [1, -1.0]], dtype=dtype)
    rows[0, 1] = rows[2, 1] = -1.0
    for first in (rows.split(3), rows.split(1)):
        mean = RunningMean(weights)
        for some in first:
            mean.extend(some)
        found = mean.result(lambda i: rows[i])
        assert found[0].isnan()
        assert (found[1].item(), found[1].signbit().item()) == (0, True)


@pytest.mark.parametrize("weights", [Weights.uniform(3), Weights((1 << 30, 1, 1 << 40))])
@pytest.mark.parametrize("source", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("target", [torch.float64, torch.float32, torch.bfloat16])
def test_few_numbers_are_looked_at_again(source, target, weights):
    """Random numbers need no second look, but for means in float64 that end just beside a tie."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(3, 500, generator=generator, dtype=torch.float64).to(source)
    mean = RunningMean(weights, target)
    mean.extend(rows)
    found = mean.result(lambda number: pytest.fail("a second look"))
    assert same(found, reference(list(rows), weights, target))


@pytest.mark.parametrize("place", [2, 5, 9])
def test_the_elements_in_doubt_are_the_ones_that_are_looked_at(place):
    """A mean that float64 leaves open is settled at its own place, in whichever block that is."""
    columns = torch.zeros(5, 10)
    columns[:, place] = torch.tensor([2.0**30, -(2.0**30), 5.0, 5 * 2.0**-24, 2.0**-70])
    with mock.patch.object(torch_mean, "BLOCK", 4):
        mean = RunningMean(5)
        mean.extend(columns)
        found = mean.result(lambda number: columns[number])
    assert found.nonzero().item() == place
    assert found[place].item() == 1 + 2.0**-23


def test_reuse_gives_independent_results():
    """One object averages one window after the other, of different sizes, into new tensors."""
    mean = RunningMean(2)
    results = []
    for size in (5, 900, 3):
        for value in (1.0, 2.0):
            mean.update(torch.full((size,), value))
        results.append(mean.result())
    assert [r.tolist() == [1.5] * len(r) for r in results] == [True, True, True]


@pytest.mark.parametrize(
    ("row", "weights", "told"),
    [
        ([1.0, 2.0], (1, 1), False),
        ([1.0, 0.0], (1, 1), False),
        ([1.0, -0.0], (1, 1), True),
        ([1.0, 0.0], (2, -1), True),
        ([1.0, 2.0], (2, -1), False),
        ([1.0, 2.0], (2, 0), True),
    ],
)
def test_only_sums_that_may_be_minus_zero_take_care_of_it(row, weights, told):
    """No pass is spent on the signs of zeros where no term can be -0."""
    mean = RunningMean(Weights(weights, 1))
    with mock.patch.object(torch_mean, "PlainSum") as plain:
        mean.extend(torch.tensor([row, row]))
    assert plain.return_value.add.call_args.kwargs == {"signs": told}


def test_the_next_mean_uses_the_memory_of_the_first():
    """Sums, factors and all that is converted stay where they were made."""
    mean = RunningMean(3)
    rows = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    mean.extend(rows)
    first = mean.result(lambda number: rows[number])
    with mock.patch.object(torch, "empty", side_effect=torch.empty) as made:
        with mock.patch.object(torch, "tensor", side_effect=AssertionError):
            mean.extend(rows)
        assert same(mean.result(lambda number: rows[number], out=torch.ones_like(first)), first)
    assert not made.called


@pytest.mark.parametrize("told", [None, "meta"])
def test_a_mean_is_kept_on_a_device(told):
    """Sums, factors and result are where it is told, or where the tensors are that are shown."""
    mean = RunningMean(2, device=told and torch.device(told))
    with mock.patch.object(torch_mean, "_Block") as block:
        block.return_value.result.return_value = None
        for device in ("meta", "cpu", "meta"):
            mean.extend(torch.ones(2, 3, device=device))
            total, (rows, _, factors, _) = block.call_args[0][0], block().add.call_args[0]
            found = {one.device.type for one in (total, rows, factors, mean.result())}
            assert found == {told or device}


@pytest.mark.parametrize(("device", "direct"), [("cpu", True), ("meta", False)])
@pytest.mark.parametrize("packed", [True, False])
def test_a_mean_on_the_host_is_written_where_it_is_to_lie(device, direct, packed):
    """No tensor lies between; that of a device is copied to the memory of the host."""
    ours = TorchMean(Weights.uniform(1), torch.float32, torch.device(device))
    memory = torch.zeros(1, 3)

    def result(_self, _revisit, out=None):
        return torch.ones(3) if out is None else out.fill_(2)

    with mock.patch.object(RunningMean, "result", result):
        ours.result(as_matrix(memory) if packed else memory, None)
    assert memory.tolist() == [[2.0 if direct and packed else 1.0] * 3]


def test_inputs_are_not_changed():
    """Tensors that are shown keep their values, and their shape is the result's."""
    tensors = [torch.randn(3, 4), torch.randn(3, 4)]
    before = [tensor.clone() for tensor in tensors]
    assert averaged(tensors).shape == (3, 4)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


def test_mixed_dtypes_share_one_exact_sum():
    """float64 after float32 and before it give the same exact mean."""
    narrow, wide = made(torch.float32, 200, 20, 1), made(torch.float64, 200, 20, 2)
    expected = reference([narrow, wide], Weights.uniform(2), torch.float32)
    assert torch.equal(averaged([narrow, wide], dtype=torch.float32), expected)
    assert torch.equal(averaged([wide, narrow], dtype=torch.float32), expected)


def test_without_revisit_only_the_neighbour_is_possible():
    """Without a second look a result is at most one unit from the right one."""
    tensors = [made(torch.float32, 5000, 30, seed) for seed in range(5)]
    mean = RunningMean(5)
    for tensor in tensors:
        mean.update(tensor)
    right = averaged(tensors)
    result = mean.result()
    neighbours = [torch.nextafter(right, torch.tensor(limit)) for limit in (-math.inf, math.inf)]
    assert all(r in (x, a, b) for r, x, a, b in zip(result, right, *neighbours, strict=True))


def test_a_list_of_weights_is_enough():
    """A mean of two with the weights 1 and 3 needs no `Weights`; a number alone is a count."""
    mean = RunningMean([1, 3])
    for value in (0.0, 4.0):
        mean.update(torch.full((2,), value))
    assert mean.result().tolist() == [3.0, 3.0]
    with pytest.raises(TypeError, match="weights must be a list of numbers, not float"):
        RunningMean(2.5)


def test_wrong_use_is_a_value_error():
    """Too many or too few tensors, other shapes, and dtypes without a mean are refused."""
    mean = RunningMean(1)
    with pytest.raises(ValueError, match="0 of 1"):
        mean.result()
    mean.update(torch.ones(2))
    with pytest.raises(ValueError, match="one tensor more"):
        mean.update(torch.ones(2))
    mean = RunningMean(2)
    mean.update(torch.ones(2))
    with pytest.raises(ValueError, match="shape"):
        mean.update(torch.ones(3))
    with pytest.raises(ValueError, match="int64"):
        RunningMean(1).update(torch.ones(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="int64"):
        RunningMean(1, torch.int64).update(torch.ones(2))
    real, imaginary = torch.ones(1), torch.ones(1) * 1j
    with pytest.raises(ValueError, match=r"float32 cannot be torch\.complex64"):
        RunningMean(1, torch.complex64).update(real)
    for first, second in ((real, imaginary), (imaginary, real)):
        mean = RunningMean(2)
        mean.update(first)
        with pytest.raises(ValueError, match="cannot be"):
            mean.update(second)


@settings(max_examples=60)
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    cuts=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    scale=st.sampled_from([1.0, 0.0, -0.0, 2.0**-130, 2.0**-20]),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_stacks_are_their_tensors(dtype, cuts, scale, seed, data):
    """Tensors shown in stacks of any size give the bits that they give one by one, -0 too."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(sum(cuts), 50, generator=generator).abs() * scale
    rows[:, :3] = -0.0
    rows = rows.to(dtype)
    limit = st.integers(1, 1 << 19)
    weights = Weights.of(data.draw(st.lists(limit, min_size=len(rows), max_size=len(rows))))
    mean = RunningMean(weights)
    for part in rows.split(cuts):
        mean.extend(part)
    stacked = mean.result(lambda i: rows[i])
    assert same(stacked, averaged(list(rows), weights))
    assert same(stacked, reference(list(rows), weights, dtype))


def test_a_bit_that_float64_cannot_hold_decides():
    """A sum of 55 bits is not taken for exact: its last bit decides a tie of float32."""
    column = [4.0, 2.0**-22 - 2.0**-29, 2.0**-29 + 2.0**-52, 0.0]  # 4 * (1 + 2**-24) + 2**-52
    for order in itertools.permutations(column):
        tensors = [torch.tensor([value], dtype=torch.float32) for value in order]
        assert averaged(tensors).item() == 1 + 2.0**-23
        stacked = RunningMean(4)
        stacked.extend(torch.stack(tensors))
        assert stacked.result(lambda i, t=tensors: t[i]).item() == 1 + 2.0**-23


@pytest.mark.parametrize("seed", range(12))
def test_linear_combinations_are_exact(seed):
    """Weights of either sign, not normalized, give the exact sum rounded once, zeros' signs too."""
    rng = random.Random(seed)  # noqa: S311 - cases, no secrets
    generator = torch.Generator().manual_seed(seed)
    dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
    for kind in ("normal", "grid", "wide", "same"):
        count, dtype = rng.randint(1, 6), rng.choice(dtypes)
        target = rng.choice([dtype, torch.float32])
        rows = torch.randn(count, 100, generator=generator, dtype=torch.float64)
        if kind == "grid":
            rows = (rows * 8).round() / 8
        if kind == "wide":
            powers = torch.randint(-20, 20, rows.shape, generator=generator)
            rows *= torch.exp2(powers.double())
        if kind == "same":
            rows = rows[:1].expand(count, 100).clone()
        rows = rows.clamp(-500, 500).to(dtype)
        values = [rng.choice([rng.randint(-9, 9), rng.randint(1, 99) / 10]) for _ in range(count)]
        weights = Weights.of(values if any(values) else [1] * count, normalize=False)
        mean = RunningMean(weights, target)
        mean.extend(rows)
        found = mean.result(lambda i, rows=rows: rows[i])
        assert same(found, reference(list(rows), weights, target))


def test_a_sum_that_is_nearly_exact_is_not_taken_for_exact():
    """Where the exponents just fit 53 bits but the sum does not, the last bit still counts."""
    # The exact mean lies 2**-26 above a midpoint, whose even neighbour is below it.
    values = [2.0**29] * 5 + [2.0**29 + 128, -1.0, 1 + 2.0**-23]
    tensors = [torch.tensor([value]) for value in values]
    assert averaged(tensors).item() == 3 * 2.0**27 + 32
    assert averaged(tensors[::-1]).item() == 3 * 2.0**27 + 32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_nan_leaves_its_neighbours_exact(dtype):
    """Elements beside NaN and infinity are rounded right, cancellation included."""
    for seed in range(20):
        tensors = [made(dtype, 60, 60, seed + i) for i in range(5)]
        tensors[-1] = (-tensors[0].double()).to(dtype)
        expected = reference(tensors, Weights.uniform(5), dtype)
        tensors[1][0], tensors[2][1], tensors[3][1] = math.nan, math.inf, -math.inf
        mean = RunningMean(5)
        mean.extend(torch.stack(tensors))
        result = mean.result(lambda i, tensors=tensors: tensors[i])
        assert result[:2].isnan().all()
        assert same(result[2:], expected[2:])


BESIDE = [[1] * 3, [1] * 6, [1] * 8, [3, 1, 2, 2, 1], ["0.1", "1/3", "7e-9", 5]]
# Integers of 24 bits, and of more than 53.
LONG = (3 << 80) + (5 << 27) + 1
BESIDE += [["0.1234567", "0.8765433"], ["0.12345678901234567", *["0.3"] * 6], ["1/3", *[7e-25] * 8]]
BESIDE += [[LONG, -1, 1, 1]]


def near_a_midpoint(chance, count, weights, source, target):
    """Return values whose mean is as near to a midpoint of the target as the source allows."""
    wanted = midpoint(chance, FORMATS[target]) * weights.total
    values = []
    rest = wanted
    near = count - chance.choice([1, 2, 2, 3])  # each of the last comes nearer
    for weight in weights.integers[:near]:
        scale = Fraction(2) ** chance.randint(-30, 3)
        value = narrowed(wanted * scale * Fraction(chance.uniform(-1, 1)), source)
        values.append(value)
        rest -= weight * Fraction(value)
    for weight in weights.integers[near:]:
        values.append(narrowed(rest / weight, source))
        rest -= weight * Fraction(values[-1])
    if chance.random() < 0.5:  # to the other side, or a little further
        values[-1] = narrowed(Fraction(values[-1]) * chance.choice([-1, 2, Fraction(1, 2)]), source)
    return values


@pytest.mark.parametrize("target", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("source", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", BESIDE, ids=len)
def test_means_beside_a_midpoint(source, target, weights):
    """Means at a tie or a hair beside it round right: subnormals, powers of two, any weights."""
    chosen = Weights.of(weights, normalize=weights[0] != LONG)
    chance = random.Random(len(weights))  # noqa: S311
    columns = [near_a_midpoint(chance, len(weights), chosen, source, target) for _ in range(600)]
    tensors = list(torch.tensor(columns, dtype=torch.float64).T.contiguous().to(source))
    mean = RunningMean(chosen, target)
    for tensor in tensors:
        mean.update(tensor)
    result = mean.result(lambda i: tensors[i])
    assert same(result, reference(tensors, chosen, target))


@pytest.mark.parametrize("last", [torch.float32, torch.float64])
def test_many_small_terms_that_float64_loses(last):
    """A thousand terms, each below half a unit of the float64 sum, carry the mean over a tie."""
    small = [torch.tensor([2.0**-45])] * 1022
    tensors = [torch.tensor([1024.0]), *small, torch.tensor([2.0**-14 - 2.0**-38], dtype=last)]
    lost = sum((tensor.double() for tensor in tensors), torch.zeros(1, dtype=torch.float64))
    assert lost.item() / 1024 < 1 + 2.0**-24  # what a plain sum makes of it rounds down
    assert averaged(tensors, dtype=torch.float32).item() == 1 + 2.0**-23


@pytest.mark.parametrize("count", [3, 4, 5, 7])
def test_the_last_bit_that_float64_holds(count):
    """The bit beside a tie counts, whether a float64 sum just holds it or loses it."""
    columns = []
    for below, odd, sign in itertools.product(range(44, 60), (0, 1), (1, -1)):
        tie = count * (1 + odd * Fraction(1, 1 << 23) + Fraction(1, 1 << 24))
        first = narrowed(tie, torch.float32)
        second = float(tie - Fraction(first))
        decides = sign * 2.0 ** (math.frexp(first)[1] - below)
        columns.append([first, second, *[decides] * (count - 2)])
    tensors = list(torch.tensor(columns, dtype=torch.float64).T.contiguous().float())
    for column in range(len(columns)):  # one at a time: what is exact depends on all in a block
        ours = [tensor[column : column + 1] for tensor in tensors]
        expected = reference(ours, Weights.uniform(count), torch.float32)
        assert same(averaged(ours), expected), columns[column]


@pytest.mark.parametrize("target", [torch.float16, torch.bfloat16, torch.float8_e5m2])
def test_what_is_rounded_to_zero_keeps_its_sign(target):
    """Means too small for the result become -0 where they are negative."""
    tensors = [torch.tensor([-(2.0**-149), 2.0**-149])] * 3
    found = averaged(tensors, dtype=target)
    assert found.double().copysign(torch.ones(2)).tolist() == [0, 0]
    assert found.double().signbit().tolist() == [True, False]


@pytest.mark.parametrize("source", [torch.float64, torch.float32])
@pytest.mark.parametrize("target", [*FORMATS][1:6], ids=str)
def test_a_mean_beside_half_of_the_smallest_number_keeps_its_sign(source, target):
    """Where only the exact sum shows that a mean rounds to zero, it is -0 if it is negative."""
    info = torch.finfo(target)
    tiny = info.smallest_normal * info.eps
    for less in (2.0**-60, 2.0**-16, 0.0):
        first = torch.tensor([-tiny, tiny], dtype=torch.float64)
        rows = torch.stack([first, first * -less]).to(source)
        mean = RunningMean(2, target)
        mean.extend(rows)
        found = mean.result(lambda i, rows=rows: rows[i])
        assert same(found, reference(list(rows), Weights.uniform(2), target))


@pytest.mark.parametrize("texts", [["1", "1e299"], ["1e-200", "1e99"], ["1e-150", "1e150"]])
@pytest.mark.parametrize("target", [torch.float64, torch.float32])
def test_weights_beyond_the_range_of_float64_are_scaled_alike(texts, target):
    """Beside a weight of 300 digits, the weight 1 counts for as little as it is."""
    rows = torch.tensor([[1e300, 1e290], [1.0, 1.0]], dtype=torch.float64)
    weights = Weights.of(texts)
    mean = RunningMean(weights, target)
    mean.extend(rows)
    assert same(mean.result(lambda i: rows[i]), reference(list(rows), weights, target))
    mean.extend(rows)
    torch.testing.assert_close(mean.result(), reference(list(rows), weights, target))


@pytest.mark.parametrize("divisor", [3, 6, 99, 10**7 + 1, 10**12 + 3, (1 << 53) - 1, (1 << 60) + 1])
@pytest.mark.parametrize("target", [torch.float64, torch.float32, torch.bfloat16])
def test_a_hair_that_the_remainder_loses(divisor, target):
    """Sums that are known exactly round right at a tie, and as near to it as two float64 come."""
    chance = random.Random(divisor)  # noqa: S311
    weights, columns = Weights((1, 1), divisor), []
    for hair in [0, *[sign * Fraction(1, 1 << bits) for bits in range(40, 56) for sign in (1, -1)]]:
        for _ in range(40):
            high = float(tie := midpoint(chance, FORMATS[target]) * divisor)
            low = tie - Fraction(high)
            columns.append([high, float(low * (1 + hair))])
    rows = torch.tensor(columns, dtype=torch.float64).T.contiguous()
    mean = RunningMean(weights, target)
    mean.extend(rows)
    found = mean.result(lambda i: rows[i])
    assert same(found, reference(list(rows), weights, target))


@pytest.mark.parametrize("target", [torch.float16, torch.bfloat16, torch.float64])
def test_the_sign_of_what_double_double_loses(target):
    """Where all but what a double-double sum loses cancels, that decides the sign of the mean."""
    small = 2.0**-55 * (1 + 2.0**-52)
    unit = 2.0**-107
    for last in (-0.45, -0.15):
        column = [1.0, small, 0.75 * unit, -0.45 * unit, last * unit, -1.0, -small]
        column = [value * 2.0**-60 for value in column]
        rows = torch.tensor(column, dtype=torch.float64).view(-1, 1)
        mean = RunningMean(len(rows), target)
        mean.extend(rows)
        expected = reference(list(rows), Weights.uniform(len(rows)), target)
        assert same(mean.result(lambda i, rows=rows: rows[i]), expected)
