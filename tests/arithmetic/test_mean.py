"""merge_avg.arithmetic: one interface to a mean, whoever computes it."""

import math

import pytest
import torch

from merge_avg.arithmetic import LOOPS, TILE, MeanFactory, Weights, _mean
from merge_avg.arithmetic._mean import CompiledMean
from merge_avg.arithmetic.torch_mean import RunningMean, TorchMean
from merge_avg.checkpoint import BY_NAME
from merge_avg.io import Buffer
from tests.arithmetic.helpers import as_matrix, needs_loops

TWO = Weights.uniform(2)
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


@pytest.mark.parametrize("dtype", ["float8_e5m2", "complex32", "complex64", "float64"])
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
