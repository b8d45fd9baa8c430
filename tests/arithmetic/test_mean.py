"""merge_avg.arithmetic: one interface to a mean, and the compiled loops bit for bit."""

import math
import random
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merge_avg import merge_checkpoints
from merge_avg.agreement import _comparison as agreement
from merge_avg.arithmetic import LOOPS, TILE, MeanFactory, Weights, _mean
from merge_avg.arithmetic._kernel import KNOWN
from merge_avg.arithmetic._mean import CompiledMean
from merge_avg.arithmetic.torch_mean import RunningMean, TorchMean
from merge_avg.checkpoint import BY_NAME
from merge_avg.io import Buffer
from tests.arithmetic.helpers import as_matrix, needs_loops, same
from tests.arithmetic.oracle import reference

TWO = Weights.uniform(2)
NAMES = ["float32", "float16", "bfloat16"]
dtypes = pytest.mark.parametrize("name", NAMES)
loops = pytest.mark.parametrize("loops", [pytest.param(True, marks=needs_loops), False])


@pytest.fixture
def factory(loops, monkeypatch):
    """Return a factory with the compiled loops, or as if there were none."""
    if not loops:
        monkeypatch.setattr(_mean, "LOOPS", None)
    return MeanFactory()


@needs_loops
def test_the_loops_compute_what_they_can(monkeypatch):
    """Other dtypes, devices, and weights whose products do not fit float64 are left to torch."""
    monkeypatch.setattr(torch, "device", lambda name: torch.empty(0, device="meta").device)

    def made(weights, dtype, sources, device="cpu"):
        return type(MeanFactory(device)(weights, dtype, sources))

    assert made(TWO, "float32", ["float16", "bfloat16"]) is CompiledMean
    assert made(TWO, "float64", ["float32", "float32"]) is TorchMean
    assert made(TWO, "float32", ["float32", "float64"]) is TorchMean
    assert made(Weights.of([1, 1 << 21]), "float32", ["float32"] * 2) is TorchMean
    assert made(TWO, "float32", ["float32"] * 2, "cuda") is TorchMean
    monkeypatch.setattr(_mean, "LOOPS", None)
    assert made(TWO, "float32", ["float32", "float32"]) is TorchMean


def test_torch_is_loaded_for_the_means_that_need_it():
    """The compiled loops load nothing; a mean by torch calls the loader first."""
    loaded = []
    factory = MeanFactory("cpu", lambda: loaded.append(True))
    if LOOPS is not None:
        factory(TWO, "float32", ["float32"] * 2)
        assert not loaded
    factory(TWO, "float64", ["float64"] * 2)
    assert loaded


@loops
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("pack", [as_matrix, lambda tensor: tensor])
def test_a_mean_takes_rows_of_memory_and_tensors(factory, whole, pack):
    """Rows, results and second looks may be memory or tensors, and give the same bits."""
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(5, 3 * TILE, generator=generator)
    rows[:, 2 * TILE] = torch.tensor([2.0**30, -(2.0**30), 1.0, 2.0**-24, 2.0**-70]) * 5
    mean = factory(Weights.uniform(5), "float32", ["float32"] * 5)
    out = torch.empty(1, 3 * TILE)
    seen = []

    def peek(number, start, stop):
        seen.append(number)
        return pack(rows[number : number + 1, start:stop])

    mean.extend(pack(rows), whole=whole)
    mean.result(pack(out), peek)
    expected = RunningMean(5)
    expected.extend(rows)
    assert torch.equal(out[0], expected.result(lambda i: rows[i]))
    assert sorted(set(seen)) == list(range(5))
    assert mean.finite
    assert mean.fits


@loops
@pytest.mark.parametrize("whole", [False, True])
def test_finite_and_fits_are_known_after_the_result(factory, whole):
    """`finite` is false for NaN until the next vectors, and `fits` for a mean that overflows."""
    mean = factory(Weights((1, 1), divisor=1), "float16", ["float16"] * 2)
    assert (mean.finite, mean.fits) == (True, True)  # of nothing yet
    out = torch.empty(1, 2, dtype=torch.float16)
    for first, finite, fits in ((1, True, True), (math.nan, False, False), (6e4, True, False)):
        rows = torch.tensor([[first, 1.0], [6e4, 1.0]], dtype=torch.float16)
        if first == 1:
            rows[1] = 2
        mean.extend(rows, whole=whole)
        mean.result(out, lambda number, start, stop: rows[number : number + 1, start:stop])  # noqa: B023
        assert (mean.finite, mean.fits) == (finite, fits)


@loops
def test_bad_numbers_are_known_as_they_are_shown(factory):
    """`finite` need not wait for the result where vectors come one by one."""
    mean = factory(TWO, "float32", ["float32"] * 2)
    mean.extend(torch.tensor([[1.0, math.inf]]))
    assert not mean.finite


@pytest.mark.parametrize(
    "dtype", ["float8_e5m2", "float8_e4m3fn", "complex32", "complex64", "float64"]
)
@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_every_dtype_tells_what_does_not_fit(dtype):
    """Sums beyond the largest number are infinite, float8 and complex numbers included."""
    kind = getattr(torch, dtype)
    limit = torch.finfo(kind).max
    mean = MeanFactory()(Weights((1, 1), divisor=1), dtype, [dtype] * 2)
    memory = Buffer(64)
    out = memory.rows(1, 1, BY_NAME[dtype])
    for value, fits in ((limit / 4, True), (limit, False)):
        rows = torch.tensor([[value], [value]], dtype=torch.float64).to(kind)
        mean.extend(rows)
        mean.result(out, lambda number, start, stop: rows[number : number + 1, start:stop])  # noqa: B023
        assert mean.finite
        assert mean.fits == fits


@loops
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_subnormal_numbers_are_no_zeros(factory, dtype):
    """They are averaged, even where the thread was told to take them for zero."""
    tiny = torch.finfo(getattr(torch, dtype)).smallest_normal / 4
    rows = torch.tensor([[tiny], [3 * tiny]], dtype=getattr(torch, dtype))
    out = torch.empty(1, 1, dtype=rows.dtype)
    torch.set_flush_denormal(True)
    try:
        mean = type(factory)()(TWO, dtype, [dtype] * 2)
        mean.extend(rows)
        mean.result(out, lambda number, start, stop: rows[number : number + 1, start:stop])
    finally:
        torch.set_flush_denormal(False)
    assert same(out, 2 * rows[:1])


@needs_loops
def test_scratch_holds_what_the_loops_write():
    """Each sum has a float64, and each tile that is begun has its `struct known`."""
    mean = CompiledMean(LOOPS, Weights.uniform(3))
    for numel in (1, TILE, 500 * TILE + 1):
        mean.extend(as_matrix(torch.ones(3, numel)))
        assert len(mean._total) >= 8 * numel
        assert len(mean._known) >= KNOWN * math.ceil(numel / TILE)
        assert len(mean._room) >= 8 * 3 * TILE
        mean.result(as_matrix(torch.empty(1, numel)), None)


def test_means_of_one_factory_take_turns():
    """Means that share scratch memory keep their results apart."""
    factory = MeanFactory()
    means = [factory(TWO, "float64", ["float64"] * 2) for _ in range(2)]
    values = torch.arange(8.0, dtype=torch.float64).view(2, 2, 2)
    for mean, rows in zip(means, values, strict=True):
        mean.extend(rows)
    out = torch.empty(2, 2, dtype=torch.float64)
    for number, mean in enumerate(means):
        mean.result(out[number : number + 1], lambda i, a, b: values[number, i : i + 1, a:b])  # noqa: B023
    assert torch.equal(out, values.mean(dim=1))


def averaged(tensors, weights, name, groups=()):
    """Return the mean of vectors shown in groups, its object, and what was looked at again."""
    mean = CompiledMean(LOOPS, weights)
    at = 0
    for group in (*groups, len(tensors)):
        if not groups and name == str(tensors[0].dtype).removeprefix("torch."):
            mean.extend(as_matrix(torch.stack(tensors)), whole=True)
            break
        if at < len(tensors):
            mean.extend(as_matrix(torch.stack(tensors[at : at + group])))
        at = min(at + group, len(tensors))
    out = torch.empty(len(tensors[0]), dtype=getattr(torch, name))
    seen = []

    def peek(number, start, stop):
        seen.extend((start, stop))
        return as_matrix(tensors[number][start:stop].view(1, -1))

    mean.result(as_matrix(out.view(1, -1)), peek)
    return out, mean, seen


WEIGHTS = [[1, 1, 1], [3, 0, 4], [1, 2, (1 << 20) - 1]]


@needs_loops
@dtypes
@pytest.mark.parametrize("target", NAMES)
@pytest.mark.parametrize("weights", WEIGHTS)
@settings(max_examples=20)
@given(seed=st.integers(0, 1 << 30), spread=st.integers(0, 40), held=st.booleans())
def test_the_mean_is_exact_and_rounded_once(name, target, weights, seed, spread, held):
    """Ties, zeros, subnormals and numbers far apart are averaged right to the last bit."""
    choose = random.Random(seed)  # noqa: S311 - numbers for a test
    limit = torch.finfo(getattr(torch, name)).max

    def value():
        size = choose.choice([0.0, -0.0, 1.0, choose.gauss(0, 1), choose.randrange(9) / 4])
        return max(min(size * 2.0 ** choose.randint(-spread, spread), limit), -limit)

    tensors = [
        torch.tensor([value() for _ in range(60)], dtype=torch.float64).to(getattr(torch, name))
        for _ in weights
    ]
    found, _, _ = averaged(tensors, Weights.of(weights), target, groups=() if held else (2,))
    assert same(found, reference(tensors, Weights.of(weights), getattr(torch, target)))


@needs_loops
@dtypes
def test_numbers_far_from_each_other_are_settled_one_by_one(name):
    """Only elements whose rounding the float64 sum leaves open are looked at again."""
    dtype = getattr(torch, name)
    generator = torch.Generator().manual_seed(5)
    far = {"float32": 2.0**14, "float16": 60000.0, "bfloat16": 2.0**34}[name]
    tensors = [torch.randn(3 * TILE // 2, generator=generator).to(dtype) for _ in range(5)]
    for number, tensor in enumerate(tensors):
        tensor[TILE + 7] = far * (-1) ** number  # in the second block only
        tensor[::5000] *= 2.0**-8
    weights = Weights.uniform(5)
    found, _, seen = averaged(tensors, weights, name)
    assert same(found, reference(tensors, weights, getattr(torch, name)))
    if name != "float16":  # whose sums are always exact
        assert min(seen) >= TILE
        assert seen


@needs_loops
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("hair", [2.0**-70, -(2.0**-70), 0.0])
def test_a_mean_beside_a_tie_is_rounded_right(sign, hair):
    """A mean rounds right that misses the middle of two float32 by less than float64 shows."""
    parts = [2.0**30, -(2.0**30), sign * 5.0, sign * 5 * 2.0**-24, hair]
    tensors = [torch.tensor([part], dtype=torch.float32) for part in parts]
    weights = Weights.uniform(5)
    found, _, seen = averaged(tensors, weights, "float32")
    beside = Fraction(hair) / 5
    up = beside * sign > 0  # a tie goes to the even number, which is 1
    assert found.item() == sign * (1 + 2.0**-23 if up else 1)
    assert same(found, reference(tensors, weights, torch.float32))
    assert seen


@needs_loops
@pytest.mark.parametrize("count", [3, 100])
def test_all_may_be_in_doubt(count):
    """One huge number among tiny ones leaves all the others of a tile open."""
    generator = torch.Generator().manual_seed(count)
    tensors = [torch.randn(2 * TILE, generator=generator) * 1e-20 for _ in range(count)]
    tensors[0][5] = 1e20
    found, mean, seen = averaged(tensors, Weights.uniform(count), "float32")
    assert same(found, reference(tensors, Weights.uniform(count), torch.float32))
    assert TILE in seen
    assert count > 3 or max(seen) == TILE
    # And what comes next is not disturbed by it.
    rest = [torch.tensor([[float(number)]]) for number in range(count)]
    for row in rest:
        mean.extend(as_matrix(row))
    out = torch.empty(1, 1)
    mean.result(as_matrix(out), None)
    assert out.item() == (count - 1) / 2


@needs_loops
@dtypes
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("held", [True, False])
def test_nan_and_infinity_are_those_of_ieee(name, exact, held):
    """NaN and infinity touch only their own elements, and `finite` and `fits` are false."""
    dtype = getattr(torch, name)
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randn(4000, generator=generator).to(dtype) for _ in range(3)]
    if not exact and name != "float16":  # whose sums are always exact
        tensors[0][50] = 1e-30
    clean, mean, _ = averaged(tensors, Weights.uniform(3), name)
    assert mean.finite
    assert mean.fits
    for place, values in enumerate([(math.inf,), (-math.inf,), (math.inf, -math.inf), (math.nan,)]):
        for tensor, value in zip(tensors, values, strict=False):
            tensor[place * 7] = value
    mean = CompiledMean(LOOPS, Weights.uniform(3))
    mean.extend(as_matrix(torch.stack(tensors)), whole=held)
    assert held or not mean.finite
    out = torch.empty(4000, dtype=dtype)

    def peek(number, start, stop):
        return as_matrix(tensors[number][start:stop].view(1, -1))

    mean.result(as_matrix(out.view(1, -1)), peek)
    assert not mean.finite
    assert not mean.fits
    assert out[:28:7].tolist()[:2] == [math.inf, -math.inf]
    rest = torch.ones(4000, dtype=torch.bool)
    rest[:28:7] = False
    assert same(out[rest], clean[rest])
    torched = RunningMean(3)
    torched.extend(torch.stack(tensors))
    assert same(out, torched.result(lambda i: tensors[i]))
    mean.extend(as_matrix(clean.view(1, -1)))
    assert mean.finite  # the next one begins anew


@needs_loops
@pytest.mark.parametrize("target", ["float16", "bfloat16", "float32"])
def test_what_does_not_fit_is_told(target):
    """A mean beyond the result's largest number becomes infinity, and `fits` says so."""
    limit = torch.finfo(getattr(torch, target)).max
    weights = Weights.of([1, 1], normalize=False)
    tensors = [torch.tensor([limit, 1.0]).float(), torch.tensor([limit, 1.0]).float()]
    found, mean, _ = averaged(tensors, weights, target)
    assert found.tolist() == [math.inf, 2]
    assert not mean.fits
    assert mean.finite
    found, mean, _ = averaged(tensors, Weights.uniform(2), target)
    assert found.tolist() == [limit, 1]
    assert mean.fits


@needs_loops
@given(counts=st.lists(st.integers(1, 4), min_size=1, max_size=4), size=st.sampled_from([1, 130]))
def test_groups_are_of_no_matter(counts, size):
    """The mean is the same however many vectors come at a time."""
    generator = torch.Generator().manual_seed(size)
    tensors = [torch.randn(size, generator=generator) for _ in range(sum(counts))]
    weights = Weights.of(range(1, len(tensors) + 1))
    whole, _, _ = averaged(tensors, weights, "float32")
    parts, _, _ = averaged(tensors, weights, "float32", groups=counts)
    assert same(whole, parts)
    assert same(whole, reference(tensors, weights, torch.float32))


@needs_loops
def test_finite_numbers_after_others_do_not_hide_them():
    """`finite` covers all vectors so far, and none of the mean before."""
    mean = CompiledMean(LOOPS, Weights.uniform(2))
    mean.extend(as_matrix(torch.tensor([[math.nan]])))
    mean.extend(as_matrix(torch.tensor([[1.0]])))
    assert not mean.finite
    mean.result(as_matrix(torch.ones(1, 1)), None)
    mean.extend(as_matrix(torch.tensor([[1.0]])))
    assert mean.finite


@needs_loops
@dtypes
@pytest.mark.parametrize("target", NAMES)
def test_held_vectors_are_as_those_that_were_added(name, target):
    """One pass over all vectors gives the bits of two, and looks at the same elements again."""
    generator = torch.Generator().manual_seed(3)
    tensors = [
        torch.randn(5 * TILE + 9, generator=generator).to(getattr(torch, name)) for _ in range(3)
    ]
    for tile in (0, 2, 3):
        tensors[tile % 3][tile * TILE + 5] = 2.0**15
        tensors[1][tile * TILE + 6 : (tile + 1) * TILE : 90] *= 2.0**-12
    weights = Weights.of([3, 1, 2])
    held, first, seen = averaged(tensors, weights, target)
    added, second, again = averaged(tensors, weights, target, groups=(1,))
    assert same(held, added)
    assert seen == again
    assert (first.finite, first.fits) == (second.finite, second.fits) == (True, True)
    if (name, target) == ("float32", "float32"):
        assert {place // TILE for place in seen[::2]} == {0, 2, 3}


@needs_loops
def test_fewer_vectors_than_weights_is_an_error():
    """A mean of fewer vectors than were announced is refused."""
    mean = CompiledMean(LOOPS, Weights.uniform(3))
    mean.extend(as_matrix(torch.ones(2, 4)))
    with pytest.raises(ValueError, match="2 of 3"):
        mean.result(as_matrix(torch.ones(1, 4)), None)


@needs_loops
@pytest.mark.parametrize("options", [{}, {"weights": [1, 0, 5, 2]}, {"dtype": "float16"}])
def test_a_merge_has_the_same_bytes_without(tmp_path, monkeypatch, options):
    """Torch alone writes the same file as the compiled loops, whatever numbers it has."""
    paths = [tmp_path / f"{fold}.pt" for fold in range(4)]
    for fold, path in enumerate(paths):
        generator = torch.Generator().manual_seed(fold)
        real = torch.randn(300, 700, generator=generator)
        wide = real * torch.exp2(torch.randint(-40, 14, real.shape, generator=generator).float())
        odd = real.masked_fill(real > 3, math.inf).masked_fill(real < -3, math.nan)
        torch.save(
            {
                "real": real,
                "wide": wide.view(700, 300).t(),
                "half": real.half(),
                "brain": wide.bfloat16(),
                "odd": odd.bfloat16(),
                "double": real.double(),
                "mixed": real.double() if fold == 2 else real.clone(),
                "small": [real[i : i + 3].clone() for i in range(0, 90, 3)],
            },
            path,
        )
    options = {"allow_nonfinite": True, "max_memory": 12 << 20, "base": paths[1]} | options
    if "dtype" not in options:
        options["dtype"] = "template"
    first = merge_checkpoints(paths, tmp_path / "loops.pt", **options)
    monkeypatch.setattr(_mean, "LOOPS", None)
    monkeypatch.setattr(agreement, "LOOPS", None)
    second = merge_checkpoints(paths, tmp_path / "torch.pt", **options)
    assert (tmp_path / "loops.pt").read_bytes() == (tmp_path / "torch.pt").read_bytes()
    for found in ("agreement", "centred"):
        ours, theirs = getattr(first, found), getattr(second, found)
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert ours.mean == pytest.approx(theirs.mean, abs=1e-9)
            pairs = zip(ours.tensors, theirs.tensors, strict=True)
            assert all(a.norm == pytest.approx(b.norm, rel=1e-9, nan_ok=True) for a, b in pairs)


@needs_loops
@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (2, 1, 0)])
def test_the_sign_of_a_zero_is_that_of_the_exact_mean(order):
    """A zero has the right sign even if float64 loses the only term that does not cancel."""
    values = [1.875 * 2.0**-20, -1.25 * 2.0**-130, -1.875 * 2.0**-20]
    tensors = [torch.tensor([values[number]]) for number in order]
    found, _, _ = averaged(tensors, Weights.uniform(3), "float16")
    assert found.view(torch.int16).item() == -(1 << 15)
    torched = RunningMean(3, torch.float16)
    for tensor in tensors:
        torched.update(tensor)
    assert same(torched.result(lambda i: tensors[i]), found)
