"""Every route to a mean gives the bits of exact rational arithmetic with one rounding.

The routes are the compiled loops, with each set of instructions that the package is compiled for,
torch on the CPU and on a GPU, and integers. The default suite tries some thousand elements, and
`-m large` two millions.
"""

import itertools
import math
import random
from fractions import Fraction
from unittest import mock

import pytest
import torch

from merge_avg import merge_checkpoints
from merge_avg.arithmetic import LOOPS, TILE, _mean, torch_mean
from merge_avg.arithmetic._kernel import LIBRARY, Kernel
from merge_avg.arithmetic._mean import CompiledMean
from merge_avg.arithmetic._sums import FORMATS
from merge_avg.arithmetic._weights import Weights
from merge_avg.arithmetic.torch_mean import RunningMean, exact_mean
from tests.arithmetic.helpers import as_matrix, same
from tests.arithmetic.oracle import converted, reference

COMPLEX = {
    torch.float64: torch.complex128,
    torch.float32: torch.complex64,
    torch.float16: torch.complex32,
}
LENGTHS = [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 65, 127, 129, 200]
LONG = [TILE - 1, TILE, TILE + 1]


def chosen_weights(chance, count):
    """Return weights of all kinds: short, long, far apart, of either sign, and zeros."""
    kind = chance.choice(["equal", "short", "decimals", "fractions", "long", "huge", "signed"])
    digits = chance.randint(4, 17)
    values = {
        "equal": lambda: 1,
        "short": lambda: chance.choice([0, 1, 2, 3, 7, 0.1, 0.25, (1 << 20) - 1]),
        "decimals": lambda: f"0.{chance.randrange(10**digits):0{digits}}",
        "fractions": lambda: Fraction(chance.randint(0, 9), chance.choice([1, 3, 7, 11, 1 << 40])),
        "long": lambda: Fraction(chance.randrange(10**98), 10**98 - chance.randrange(10**9)),
        "huge": lambda: chance.choice([1, 0, 3, 1 << 900, (1 << 905) + 1, "1e-299", "1e299"]),
        "signed": lambda: chance.choice([-1, 1]) * chance.choice([1, 2, 0.3, 0.1234567, 1e20, 0]),
    }[kind]
    weights = [values() for _ in range(count)]
    if not any(map(Fraction, map(str, weights))):
        weights[-1] = 1
    return Weights.of(weights, normalize=kind != "signed")


def numbers(chance, generator, dtype, numel):
    """Return a row of a dtype: near each other or not, ties, subnormals, zeros, or any bits."""
    form = FORMATS[dtype]
    kind = chance.choice(["usual", "usual", "grid", "wide", "limits", "tiny", "zeros", "bits"])
    if kind == "bits":  # NaNs of any payload, and infinities
        raw = torch.randint(0, 256, (numel * dtype.itemsize,), generator=generator)
        return raw.to(torch.uint8).view(dtype)
    row = torch.randn(numel, generator=generator, dtype=torch.float64)
    if kind == "grid":
        row = (row * 8).round() / 8
    if kind in ("wide", "limits"):
        most = chance.choice([12, 40, 90]) if kind == "wide" else -form.emin + 8
        row *= torch.exp2(torch.randint(-most, most, (numel,), generator=generator).double())
    if kind == "tiny":  # units of the smallest subnormal number
        row = (row * 50).round() * 2.0 ** (form.emin - form.bits + 1)
    if kind == "zeros":
        row *= torch.randint(0, 2, (numel,), generator=generator)
    limit = torch.finfo(dtype).max
    return row.clamp(-limit, limit).to(dtype)


def case(seed):
    """Return vectors of some dtypes, their weights, the dtype of the mean, and how to show them."""
    chance, generator = random.Random(seed), torch.Generator().manual_seed(seed)  # noqa: S311
    count, numel = chance.randint(1, 8), chance.choice(LONG if seed % 20 == 0 else LENGTHS)
    several = chance.choice([list(FORMATS), [torch.float32, torch.float16, torch.bfloat16]])
    one = chance.choice(several)
    dtypes = [one] * count if seed % 3 else [chance.choice(several) for _ in range(count)]
    rows = [numbers(chance, generator, dtype, numel) for dtype in dtypes]
    if count > 1 and chance.random() < 0.3:  # what cancels, all but a few bits
        rows[-1] = (-rows[0].double()).to(dtypes[-1])
    if chance.random() < 0.1:
        rows = [row.copysign(torch.tensor(-1.0)) * 0 if row.itemsize > 1 else row for row in rows]
    cuts = [chance.randint(1, 4) for _ in range(count)]
    return rows, chosen_weights(chance, count), chance.choice([one, *several]), cuts


def groups(rows, cuts):
    """Yield neighbours of one dtype as matrices with a stride; at most so many rows as the cuts."""
    at, cuts = 0, iter(cuts)
    while at < len(rows):
        some = itertools.takewhile(lambda row: row.dtype == rows[at].dtype, rows[at:])  # noqa: B023
        some = list(itertools.islice(some, next(cuts)))
        stack = torch.empty(len(some), len(some[0]) + 3, dtype=some[0].dtype)[:, 1:-2]
        for ours, theirs in zip(stack, some, strict=True):
            ours.copy_(theirs)
        yield stack
        at += len(some)


def by_torch(rows, weights, target, cuts, device="cpu"):
    """Return the mean by torch; complex where that is possible."""
    imaginary = len({row.dtype for row in rows}) == 1 and not len(rows[0]) % 2 and len(rows) % 2
    mean = RunningMean(weights, target)
    if imaginary and rows[0].dtype in COMPLEX and target in COMPLEX:
        rows = [torch.view_as_complex(row.view(-1, 2)) for row in rows]
        mean = RunningMean(weights, COMPLEX[target])
    for stack in groups(rows, cuts):
        mean.extend(stack.to(device))
    result = mean.result(lambda i: rows[i].to(device)).cpu()
    return torch.view_as_real(result).flatten() if result.is_complex() else result


def by_loops(loops, rows, weights, target, cuts):
    """Return the mean by compiled loops, its object, and the mean in one pass if that can be."""
    mean, results = CompiledMean(loops, weights), []
    stack = torch.stack(rows) if len({*[row.dtype for row in rows], target}) == 1 else None
    for whole in (False, True)[: 1 + (stack is not None)]:
        held = [stack] if whole else list(groups(rows, cuts))
        for one in held:
            mean.extend(as_matrix(one), whole=whole)
        out = torch.empty(len(rows[0]) + 1, dtype=target)[1:]
        mean.result(as_matrix(out), lambda i, start, stop: as_matrix(rows[i][start:stop]))
        results.append(out)
    return results, mean


def agrees(found, expected):
    """Return whether two results are the same bits; torch has float8's NaN as it likes."""
    if expected.itemsize > 1:
        return same(found, expected)
    nan = expected.isnan()
    return torch.equal(found.isnan(), nan) and same(
        found.view(torch.uint8)[~nan], expected.view(torch.uint8)[~nan]
    )


def attack(seeds, kernels=None, device="cpu"):
    """Compare all routes with the oracle; return how many elements each was compared in."""
    kernels = kernels or {}
    counts = dict.fromkeys(["torch", "integers", *kernels], 0)
    for seed in seeds:
        rows, weights, target, cuts = case(seed)
        expected = reference(rows, weights, target)
        with mock.patch.object(torch_mean, "BLOCK", [7, 64, 1 << 16][seed % 3]):
            assert agrees(by_torch(rows, weights, target, cuts, device), expected), seed
        counts["torch"] += len(expected)
        if seed % 8 == 0:  # all, where the others settle the few that are open
            columns = zip(*[row.double().tolist() for row in rows], strict=True)
            exact = [
                exact_mean(column, weights, FORMATS[target])
                if all(map(math.isfinite, column))
                else math.nan
                for column in columns
            ]
            finite = torch.stack([row.double().isfinite() for row in rows]).all(dim=0)
            found = converted(exact, target)
            assert agrees(found.double()[finite], expected.double()[finite]), seed
            counts["integers"] += len(found)
        names = {str(dtype)[6:] for dtype in [target, *[row.dtype for row in rows]]}
        for name, loops in kernels.items() if weights.small and Kernel.dtypes >= names else ():
            results, mean = by_loops(loops, rows, weights, target, cuts)
            assert all(agrees(found, expected) for found in results), (seed, name)
            assert mean.finite == all(bool(row.isfinite().all()) for row in rows), (seed, name)
            assert mean.fits == bool(expected.isfinite().all()), (seed, name)
            counts[name] += len(expected) * len(results)
    return counts


@pytest.fixture(scope="module")
def kernels():
    """Return the loops for each set of instructions that runs here."""
    return {level: Kernel(LIBRARY, level) for level in LOOPS.levels} if LOOPS else {}


@pytest.mark.parametrize("count", [300, pytest.param(20_000, marks=pytest.mark.large)])
@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_every_route_gives_the_exact_mean(kernels, count):
    """The loops, for every processor, torch and integers give the exact mean, rounded once."""
    counts = attack(range(count), kernels)
    assert all(counts.values())


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_a_gpu_gives_the_exact_mean():
    """Torch on a GPU gives the exact mean, rounded once, of all dtypes and weights."""
    attack(range(500), device="cuda")


@pytest.mark.parametrize("loops", [LOOPS, None])
def test_subnormals_are_not_zero_where_torch_takes_them_for_it(tmp_path, monkeypatch, loops):
    """A merge after torch.set_flush_denormal(True) writes what it writes without."""
    monkeypatch.setattr(_mean, "LOOPS", loops)
    paths = [tmp_path / f"{fold}.pt" for fold in range(3)]
    for fold, path in enumerate(paths):
        values = torch.randn(100, generator=torch.Generator().manual_seed(fold)).double()
        kinds = {
            torch.float64: -1030,
            torch.float32: -135,
            torch.float16: -18,
            torch.bfloat16: -130,
        }
        torch.save({str(d): (values * 2.0**power).to(d) for d, power in kinds.items()}, path)
    for weights in ([1, 2, 7], ["0.1234567", "0.3", "0.5765433"]):
        outputs = []
        for flush in (False, True):
            torch.set_flush_denormal(flush)
            try:
                merge_checkpoints(paths, tmp_path / "o.pt", weights=weights, overwrite=True)
            finally:
                torch.set_flush_denormal(False)
            outputs.append((tmp_path / "o.pt").read_bytes())
        assert outputs[0] == outputs[1]
