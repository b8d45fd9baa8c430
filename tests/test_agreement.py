"""How far checkpoints agree, measured while they are averaged."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from merge_avg import agreement
from merge_avg.errors import MergeError
from merge_avg.merge import merge_checkpoints, run
from merge_avg.prepare import Options, prepare
from merge_avg.report import describe, lines

SIZE = 700_000


def made(folder, matrices, **more):
    paths = []
    for number, matrix in enumerate(matrices):
        paths.append(folder / f"c{number}.safetensors")
        content = {"w": matrix, "scale": torch.ones(4096), **more}
        save_file(content, paths[-1])
    return paths


def cosine(a, b):
    a, b = a.double().flatten(), b.double().flatten()
    return float(a @ b / a.norm() / b.norm())


def noise(seed, numel=SIZE):
    return torch.randn(numel // 100, 100, generator=torch.Generator().manual_seed(seed))


def found_by(paths, folder, **options):
    return merge_checkpoints(paths, folder / "o.safetensors", overwrite=True, **options).agreement


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0, 3.0])
def test_the_sample_is_near_to_all(tmp_path, share):
    """The cosine of a sample is within 0.03 of that of all elements; vectors do not count."""
    base = noise(0)
    matrices = [base * share + noise(seed) for seed in (1, 2, 3)]
    found = found_by(made(tmp_path, matrices), tmp_path)
    assert SIZE / 80 < found.elements < SIZE / 50
    for i in range(3):
        for j in range(3):
            assert found.pairs[i][j] == pytest.approx(cosine(matrices[i], matrices[j]), abs=0.03)
    assert found.mean == pytest.approx(sum(found.each) / 3)
    mean = torch.stack(matrices).mean(dim=0)
    norms = sum(float(matrix.norm()) for matrix in matrices) / 3
    assert found.shrinkage == pytest.approx(float(mean.norm()) / norms, abs=0.02)


def test_small_models_are_looked_at_whole(tmp_path):
    """Of small models every element counts."""
    matrices = [noise(seed, 3000) for seed in (1, 2)]
    found = found_by(made(tmp_path, matrices), tmp_path)
    assert found.elements == 3000
    assert found.mean == pytest.approx(cosine(*matrices), abs=1e-12)


def test_identical_checkpoints_agree(tmp_path):
    """The same matrix twice is a cosine of one, in one direction and of one size."""
    found = found_by(made(tmp_path, [noise(1), noise(1)]), tmp_path)
    assert found.mean == pytest.approx(1, abs=1e-12)
    assert found.shrinkage == pytest.approx(1)


@pytest.mark.parametrize(
    "matrices",
    [
        [noise(1, 3000)],
        [torch.zeros(9, 9), torch.ones(9, 9)],
        [torch.ones(9), torch.ones(9)],
    ],
)
def test_nothing_to_compare(tmp_path, matrices):
    """One checkpoint, a matrix of zeros, or no matrix at all: no figure, and no nonsense."""
    assert found_by(made(tmp_path, matrices), tmp_path) is None


def test_nan_makes_no_figure(tmp_path):
    """Where NaN is averaged too, no agreement is claimed."""
    matrix = noise(1, 3000)
    matrix[0, 0] = math.nan
    paths = made(tmp_path, [noise(1, 3000), matrix])
    assert found_by(paths, tmp_path, allow_nonfinite=True) is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(tmp_path, dtype):
    """Every dtype is compared as the numbers that it holds."""
    matrices = [(noise(seed, 3000) + noise(9, 3000)).to(dtype) for seed in (1, 2)]
    found = found_by(made(tmp_path, matrices), tmp_path)
    assert found.mean == pytest.approx(cosine(*matrices), abs=1e-12)


def test_complex_numbers(tmp_path):
    """Complex numbers are compared by component."""
    matrices = [torch.complex(noise(s, 3000), noise(s + 5, 3000)) for s in (1, 2)]
    paths = []
    for number, matrix in enumerate(matrices):
        paths.append(tmp_path / f"{number}.pt")
        torch.save({"w": matrix}, paths[-1])
    found = merge_checkpoints(paths, tmp_path / "o.pt").agreement
    assert found.mean == pytest.approx(cosine(*map(torch.view_as_real, matrices)), abs=1e-12)


def test_checkpoints_without_a_weight_do_not_count(tmp_path):
    """A template that is not averaged is not compared."""
    paths = made(tmp_path, [noise(seed, 3000) for seed in (1, 2, 3)])
    result = merge_checkpoints(paths[1:], tmp_path / "o.safetensors", template=paths[0])
    assert result.compared == (1, 2)
    assert len(result.agreement.each) == 2


@settings(deadline=None, max_examples=10)
@given(st.integers(1, 4), st.sampled_from([2, 5, 64]), st.integers(2, 5))
def test_figures_do_not_depend_on_windows(tmp_path_factory, threads, mebibytes, count):
    """Threads and memory change which windows there are, and not what is looked at."""
    folder = tmp_path_factory.mktemp("a")
    paths = made(folder, [noise(seed, 150_000) for seed in range(count)], v=noise(7, 5000))
    try:
        one = found_by(paths, folder, threads=threads, max_memory=mebibytes << 20)
    except MergeError as error:
        if "budget" not in str(error):
            raise
        return
    other = found_by(paths, folder, threads=1)
    assert one.elements == other.elements
    assert one.mean == pytest.approx(other.mean, abs=1e-12)


@given(
    st.integers(1, 40_000), st.integers(0, 40_000), st.integers(1, 20_000), st.sampled_from([1, 64])
)
def test_pieces_are_looked_at_like_the_whole(size, start, length, share):
    """What is looked at in a part of a tensor is what of the whole lies there."""
    start = min(start, size - 1)
    stop = min(start + length, size)
    whole = agreement._sampled(0, size, size, share)
    part = agreement._sampled(start, stop, size, share) + start
    assert part.tolist() == whole[(whole >= start) & (whole < stop)].tolist()
    assert len(whole) >= size // 128


# Words


def report_of(paths, folder):
    job = prepare(paths, folder / "o.safetensors", Options(overwrite=True))
    return describe(job, run(job), "1")


def test_strangers_are_warned_of(tmp_path):
    """Networks that have nothing in common get a warning that says what to do."""
    report = report_of(made(tmp_path, [noise(seed, 3000) for seed in (1, 2)]), tmp_path)
    (warning,) = report["warnings"]
    assert "hardly agree (cosine" in warning
    assert "one initialisation" in warning
    assert any(line.startswith("  agreement ") for line in lines(report))


def test_relatives_are_not_warned_of(tmp_path):
    """Networks of one run agree, and nothing is said but the figure."""
    matrices = [noise(0, 3000) + noise(seed, 3000) / 10 for seed in (1, 2, 3)]
    report = report_of(made(tmp_path, matrices), tmp_path)
    assert report["warnings"] == []
    assert report["agreement"]["mean"] > 0.98
    assert report["agreement"]["odd"] is None


@pytest.mark.parametrize("others", [2, 6])
def test_the_odd_one_out_is_named(tmp_path, others):
    """One stranger among relatives is named, with a bar for each."""
    relatives = [noise(0, 3000) + noise(seed, 3000) / 10 for seed in range(1, 1 + others)]
    paths = made(tmp_path, [*relatives, noise(99, 3000)])
    report = report_of(paths, tmp_path)
    assert report["agreement"]["odd"] == str(paths[-1])
    (warning,) = report["warnings"]
    assert f"{paths[-1]} agrees with none of the others" in warning
    bars = [line for line in lines(report) if line.startswith("    ")]
    assert len(bars) == others + 1
    assert bars[0].count("#") > bars[-1].count("#")


def test_too_little_agreement_can_be_refused(tmp_path):
    """With a least agreement, strangers are an error and nothing is written."""
    paths = made(tmp_path, [noise(seed, 3000) for seed in (1, 2)])
    with pytest.raises(MergeError, match=r"agree by -?0\.\d+, and 0.5 is asked for"):
        merge_checkpoints(paths, tmp_path / "o.safetensors", min_agreement=0.5)
    assert not (tmp_path / "o.safetensors").exists()
    merge_checkpoints(paths, tmp_path / "o.safetensors", min_agreement=-1)
