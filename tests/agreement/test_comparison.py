"""How far checkpoints agree, measured while they are averaged."""

import itertools
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from merge_avg.agreement import Comparison, Sampler
from merge_avg.agreement._comparison import Sample, samples
from merge_avg.engine import run
from merge_avg.errors import MergeError, UsageError
from merge_avg.options import Options
from merge_avg.plan import prepare
from merge_avg.plan._budget import windows
from merge_avg.report.text import lines
from merge_avg.report.values import as_json, describe
from tests.helpers import merge_checkpoints

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
    assert found.size == SIZE
    assert SIZE / 64 < found.elements < SIZE / 16
    assert 0 < found.error < 0.01
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
    assert found.elements == found.size == 3000
    assert found.error == 0
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
    """Every dtype is compared as the numbers that it holds, where these differ."""
    matrices = [(noise(seed, 3000) + noise(9, 3000)).to(dtype) for seed in (1, 2)]
    found = found_by(made(tmp_path, matrices), tmp_path)
    other = matrices[0] != matrices[1]
    assert other.all() == (dtype == torch.float64)
    assert found.mean == pytest.approx(cosine(*(m[other] for m in matrices)), abs=1e-12)


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


@settings(max_examples=10)
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


def test_the_error_is_that_of_the_sample(tmp_path):
    """Over many networks, the figure is off by what is called its error: not less, nor far less."""
    shapes = [(150, 1000), (64, 1000), (500, 40), (30, 30)]
    content = {f"w{i}": torch.zeros(shape) for i, shape in enumerate(shapes)}
    for name in ("a", "b"):
        save_file(content, tmp_path / f"{name}.safetensors")
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    units = prepare(paths, tmp_path / "o.safetensors", Options()).plan.units
    ratios = []
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        comparison = Comparison((0, 1), units)
        every = {}
        for number, unit in enumerate(units):
            common, first, second = torch.randn(3, len(unit), generator=generator)
            every[unit.number] = torch.stack([common + first, common + second * 2]) * (1 + number)
        sampler = Sampler(comparison, lambda: None)
        for window in windows(units, 1 << 15):
            values = [every[p.unit.number][:, p.start : p.stop] for p in window]
            sampler.begin(window)
            for k, row in enumerate(torch.cat(values, dim=1)):
                sampler.see(k, memoryview(row.numpy()).cast("B"))
        sampler.close()
        found = comparison.result()
        whole = torch.cat(list(every.values()), dim=1)
        assert found.elements < found.size / 2
        ratios.append((found.mean - cosine(*whole)) / found.error)
    assert 0.5 < float(torch.tensor(ratios).square().mean().sqrt()) < 1.5


# By tensor


def direct(matrices):
    """By definition: the mean cosine weighted by norms, and distances from the mean."""
    flat = torch.stack([matrix.double().flatten() for matrix in matrices])
    gram, norms = flat @ flat.T, flat.norm(dim=1)
    weights = norms[:, None] * norms[None, :]
    off = ~torch.eye(len(flat), dtype=torch.bool)
    distances = (flat - flat.mean(dim=0)).norm(dim=1) / norms.square().mean().sqrt()
    return float(gram[off].sum() / weights[off].sum()), distances.tolist()


@pytest.mark.parametrize("count", [2, 5])
@pytest.mark.parametrize("sizes", [(1000, 2100), (20,) * 90])
def test_each_tensor_has_its_figures(tmp_path, count, sizes):
    """Of each matrix: the mean cosine, the norm, and how far each checkpoint is from the mean."""
    contents = [
        {
            f"w{i:02}": noise(9, n * 100) + k * noise(k * 99 + i, n * 100)
            for i, n in enumerate(sizes)
        }
        for k in range(count)
    ]
    contents = [{key: value[:, :2] for key, value in content.items()} for content in contents]
    paths = []
    for number, content in enumerate(contents):
        paths.append(tmp_path / f"{number}.safetensors")
        save_file(
            {**{k: v.contiguous() for k, v in content.items()}, "b": torch.ones(3)}, paths[-1]
        )
    found = found_by(paths, tmp_path)
    assert [tensor.name for tensor in found.tensors] == list(contents[0])
    for tensor in found.tensors:
        mean, distances = direct([content[tensor.name] for content in contents])
        assert tensor.elements == tensor.size == contents[0][tensor.name].numel()
        assert tensor.error == 0
        assert tensor.mean == pytest.approx(mean, abs=1e-12)
        assert tensor.distances == pytest.approx(distances, abs=1e-9)


def test_large_tensors_are_sampled_and_small_ones_whole(tmp_path):
    """Beside a large tensor a small one is looked at whole, and both count by their size."""
    for number in (1, 2):
        content = {"large": noise(number), "small": 20 * noise(7, 5000) + number / 100}
        save_file(content, tmp_path / f"{number}.safetensors")
    found = found_by([tmp_path / "1.safetensors", tmp_path / "2.safetensors"], tmp_path)
    large, small = found.tensors
    assert large.elements < large.size / 10
    assert 0 < large.error < 0.01
    assert small.elements == small.size == 5000
    assert small.mean == pytest.approx(1, abs=1e-6)
    whole = [torch.cat([noise(k).flatten(), 20 * noise(7, 5000).flatten()]) for k in (1, 2)]
    assert found.mean == pytest.approx(cosine(*whole), abs=0.02)


# By the differences to a base


def tuned(folder, base, deltas, **more):
    save_file({"w": base, **more}, folder / "base.safetensors")
    return made(folder, [base + delta for delta in deltas])


@pytest.mark.parametrize("numel", [3000, SIZE])
def test_fine_tunes_are_compared_by_what_they_learned(tmp_path, numel):
    """With a base, the differences to it are compared as well, and it is not averaged."""
    common = noise(50, numel)
    deltas = [(noise(k, numel) + common) / 100 for k in (1, 2, 3)]
    paths = tuned(tmp_path, noise(0, numel), deltas)
    base = tmp_path / "base.safetensors"
    plain = merge_checkpoints(paths, tmp_path / "plain.safetensors")
    result = merge_checkpoints(paths, tmp_path / "o.safetensors", base=base)
    assert result.compared == (0, 1, 2)
    assert result.agreement.mean == pytest.approx(plain.agreement.mean, abs=1e-12)
    assert result.agreement.mean > 0.99
    for i in range(3):
        for j in range(3):
            wanted = cosine(deltas[i], deltas[j])
            assert result.centred.pairs[i][j] == pytest.approx(
                wanted, abs=0.02 if numel > 1e5 else 1e-6
            )
    mean, distances = direct(deltas)
    (tensor,) = result.centred.tensors
    assert tensor.mean == pytest.approx(mean, abs=0.02)
    assert tensor.distances == pytest.approx(distances, rel=0.05)
    assert (tmp_path / "o.safetensors").read_bytes() == (
        tmp_path / "plain.safetensors"
    ).read_bytes()


def test_what_equals_the_base_has_no_direction(tmp_path):
    """A fine-tune that is the base has no figure, the others have; of two that are, none has."""
    zero = torch.zeros(30, 100)
    deltas = [zero, noise(1, 3000), noise(1, 3000) * 2, zero]
    paths = tuned(tmp_path, noise(0, 3000), deltas)
    base = tmp_path / "base.safetensors"
    found = merge_checkpoints(paths, tmp_path / "o.safetensors", base=base).centred
    assert found.each == (None, pytest.approx(1), pytest.approx(1), None)
    assert found.pairs[0] == (1, None, None, None)
    assert found.mean == pytest.approx(1)
    report = report_of(paths[::3], tmp_path, base=base)
    assert report.agreement.mean == 1
    assert report.centred is None
    assert report.warnings == ()
    assert any("no two checkpoints differ from" in line for line in lines(report))


def test_a_base_of_another_kind(tmp_path):
    """A base in another dtype, order of memory and format, that lacks a tensor, is compared."""
    base, extra = noise(0, 3000), noise(1, 3000)
    deltas = [noise(k, 3000) / 10 for k in (2, 3)]
    paths = []
    for number, delta in enumerate(deltas):
        paths.append(tmp_path / f"{number}.pt")
        content = {"w": base + delta, "head": extra + delta, "v": base[:, :50] + delta[:, :50]}
        torch.save({"state_dict": content}, paths[-1])
    transposed = base.double().T.contiguous().T
    torch.save({"w": transposed, "v": extra, "bias": torch.ones(3)}, tmp_path / "base.pt")
    result = merge_checkpoints(paths, tmp_path / "o.pt", base=tmp_path / "base.pt")
    assert len(result.agreement.tensors) == 3
    (tensor,) = result.centred.tensors
    assert tensor.name.endswith("w")
    assert tensor.mean == pytest.approx(cosine(*deltas), abs=1e-6)
    (note,) = result.job.notes
    assert "2 of 3 matrices are not in it, or of another shape" in note


def test_a_base_that_is_none_is_refused(tmp_path):
    """A base without any of the matrices is an error that says what a base is."""
    paths = made(tmp_path, [noise(k, 3000) for k in (1, 2)])
    save_file({"other": noise(3, 3000)}, tmp_path / "base.safetensors")
    with pytest.raises(MergeError, match="it has no matrix that the checkpoints have"):
        merge_checkpoints(paths, tmp_path / "o.safetensors", base=tmp_path / "base.safetensors")


@pytest.mark.parametrize("averaged", [True, False])
def test_a_base_may_be_an_input_or_the_template(tmp_path, averaged):
    """What is read anyway is read once: a base that is averaged, or that is the template."""
    delta = [noise(k, 3000) for k in (1, 2)]
    paths = tuned(tmp_path, noise(0, 3000), delta, scale=torch.ones(4096))
    base = tmp_path / "base.safetensors"
    inputs = [paths[0], base, paths[1]] if averaged else paths
    template = None if averaged else base
    out = tmp_path / "o.safetensors"
    result = merge_checkpoints(inputs, out, base=base, template=template)
    assert len(result.job.layouts) == 3
    assert result.nbytes == 3 * (3000 + 4096) * 4
    assert result.centred.mean == pytest.approx(cosine(*delta), abs=1e-6)
    assert result.centred.each[1] is None if averaged else len(result.centred.each) == 2


def test_a_base_is_not_written_over(tmp_path):
    """The base is an input: the output may not be it."""
    paths = tuned(tmp_path, noise(0, 3000), [noise(1, 3000)])
    base = tmp_path / "base.safetensors"
    with pytest.raises(MergeError, match="the output is the input"):
        merge_checkpoints(paths, base, base=base, overwrite=True)


def test_a_base_with_nan_stops_nothing(tmp_path):
    """NaN in a base is not averaged, so it is no error; there is no figure."""
    base = noise(0, 3000)
    paths = made(tmp_path, [base + noise(k, 3000) for k in (1, 2)])
    base[0, 0] = math.nan
    save_file({"w": base}, tmp_path / "base.safetensors")
    out = tmp_path / "o.safetensors"
    result = merge_checkpoints(paths, out, base=tmp_path / "base.safetensors")
    assert result.centred is None
    assert result.agreement is not None
    assert result.nonfinite == ()


def test_a_base_has_no_say(tmp_path):
    """Neither its NaN nor its LoRA factors count among those of the checkpoints."""
    bad = noise(1, 3000)
    bad[0, 0] = math.nan
    contents = {
        "base": {"w": noise(0, 3000), "v": bad, "lora_A": noise(5, 300)},
        "a": {"w": bad, "v": noise(2, 3000), "lora_A": noise(4, 300)},
        "b": {"w": noise(3, 3000), "v": noise(2, 3000), "lora_A": noise(4, 300)},
    }
    paths = {name: tmp_path / f"{name}.safetensors" for name in contents}
    for name, content in contents.items():
        save_file(content, paths[name])
    out = tmp_path / "o.safetensors"
    inputs, base = [paths["a"], paths["b"]], paths["base"]
    result = merge_checkpoints(inputs, out, base=base, allow_nonfinite=True)
    assert result.nonfinite == ("w",)
    assert result.warnings == ()


def test_it_can_be_left_out(tmp_path):
    """Without the agreement there is no figure, and asking for one as well is wrong usage."""
    paths = made(tmp_path, [noise(k, 3000) for k in (1, 2)])
    assert found_by(paths, tmp_path, agreement=False) is None
    for more in ({"base": paths[0]}, {"min_agreement": 0.5}):
        with pytest.raises(UsageError, match="asked for, and not to be measured"):
            found_by(paths, tmp_path, agreement=False, **more)


ROW = st.lists(st.sampled_from([0.0, 1.0, -1.0, 3e-30, 1e30, 0.5]), min_size=6, max_size=6)


@settings(max_examples=40)
@given(st.lists(ROW, min_size=1, max_size=4), ROW)
def test_figures_are_numbers_whatever_there_is(tmp_path_factory, rows, base):
    """Of zeros, constants, copies, one checkpoint, huge and tiny values: in bounds, and no NaN."""
    folder = tmp_path_factory.mktemp("a")
    paths = made(folder, [torch.tensor(row).view(2, 3) for row in rows])
    save_file({"w": torch.tensor(base).view(2, 3)}, folder / "base.safetensors")
    report = report_of(paths, folder, base=folder / "base.safetensors")
    values = as_json(report)
    found = values["agreement"]
    json.dumps(values, allow_nan=False)
    for one in (found, found and found["centred"]):
        if one:
            values = [
                one["mean"],
                *(each["mean"] for each in one["each"]),
            ]
            values += [value for row in one["pairs"] for value in row]
            values += [tensor["mean"] for tensor in one["tensors"]]
            assert all(value is None or -1 <= value <= 1 for value in values)
            assert all(d >= 0 for tensor in one["tensors"] for d in tensor["distances"])
    same = len(rows) > 1 and all(row == rows[0] for row in rows)
    if same and any(rows[0]):
        assert found["mean"] == 1
        assert report.warnings == ()
    assert found is None or sum(map(any, rows)) > 1


# Words


def report_of(paths, folder, **options):
    job = prepare(paths, folder / "o.safetensors", Options(overwrite=True, **options))
    return describe(job, run(job))


def test_strangers_are_warned_of(tmp_path):
    """Networks that have nothing in common get a warning that says what to do."""
    paths = made(tmp_path, [noise(1, 3000), noise(2, 3000)])
    for number, path in enumerate(paths):
        layers = {f"w{layer}": noise(10 * number + layer, 3600) for layer in range(3)}
        save_file({key: value.view(60, 60) for key, value in layers.items()}, path)
    report = report_of(paths, tmp_path)
    (warning,) = report.warnings
    assert warning.startswith("strangers: matrices in a row have nothing in common")
    assert "'w0', 'w1', 'w2'" in warning
    assert "one initialisation" in warning
    assert any(line.startswith("  agreement ") for line in lines(report))


def test_relatives_are_not_warned_of(tmp_path):
    """Networks of one run agree, and nothing is said but the figure."""
    matrices = [noise(0, 3000) + noise(seed, 3000) / 10 for seed in (1, 2, 3)]
    report = report_of(made(tmp_path, matrices), tmp_path)
    assert report.warnings == ()
    assert report.agreement.mean > 0.98
    assert report.verdict.word == "agree"
    assert as_json(report)["agreement"]["odd"] is None


@pytest.mark.parametrize(("others", "word"), [(2, "strangers"), (3, "drifted"), (6, "agree")])
def test_the_odd_one_out_is_named(tmp_path, others, word):
    """One stranger among relatives is named, with a bar for each; in a mean of many it is noise."""
    relatives = [noise(0, 3000) + noise(seed, 3000) / 10 for seed in range(1, 1 + others)]
    paths = made(tmp_path, [*relatives, noise(99, 3000)])
    report = report_of(paths, tmp_path)
    assert as_json(report)["agreement"]["odd"] == str(paths[-1])
    assert report.verdict.word == word
    assert len(report.warnings) == (word != "agree")
    assert all(f" | '{paths[-1]}')" in warning for warning in report.warnings)
    assert report.agreement.each[-1] < 0.2
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


def test_numbers_whose_squares_are_too_large_make_no_figure(tmp_path):
    """Norms near float64's largest: the merge goes well, without an agreement of that tensor."""
    for fold in range(3):
        w = torch.full((4, 16), 1e153 * (1 + fold / 9), dtype=torch.float64)
        torch.save({"w": w}, tmp_path / f"{fold}.pt")
    paths = [tmp_path / f"{fold}.pt" for fold in range(3)]
    result = merge_checkpoints(paths, tmp_path / "o.pt")
    assert result.agreement is None or result.agreement.tensors[0].mean in (None, pytest.approx(1))
    assert torch.load(tmp_path / "o.pt")["w"].isfinite().all()


def looked_at(sample, start, stop):
    segments = sample.segments(start, stop)
    found = [torch.arange(begin, begin + count) for begin, count in segments]
    return torch.cat([torch.arange(0), *found]) + start


@given(
    st.integers(1, 1_500_000),
    st.integers(0, 1_500_000),
    st.integers(1, 400_000),
    st.sampled_from([64, 200, 8191, 8192]),
    st.integers(1, 5),
)
def test_pieces_are_looked_at_like_the_whole(size, start, length, taken, every):
    """What is looked at in a part of a tensor is what of the whole lies there, and counted so."""
    sample = Sample(size, taken, every if taken < 8192 else 1)
    start = min(start, size - 1)
    stop = min(start + length, size)
    whole = looked_at(sample, 0, size)
    part = looked_at(sample, start, stop)
    assert torch.equal(part, whole[(whole >= start) & (whole < stop)])
    assert sample.before(stop) - sample.before(start) == len(part)
    assert sample.elements == len(whole) >= max(1, size // 128 // every // 2)


@given(st.lists(st.integers(1, 1 << 22), min_size=1, max_size=30), st.integers(1, 200))
def test_every_tensor_has_a_sample(sizes, checkpoints):
    """Each tensor has a sample of at least one element, and never of more than it has."""
    found = samples(sizes, checkpoints)
    pairs = [(size, one) for size, one in zip(sizes, found, strict=True) if one is not None]
    assert pairs
    assert all(one.size == size and 1 <= one.elements <= size for size, one in pairs)


def test_of_thousands_of_tiny_tensors_some_are_looked_at():
    """They come from all over the model, and whole; of a few tiny ones none is left out."""
    found = samples([27] * 4000, 4)
    taken = [number for number, one in enumerate(found) if one is not None]
    assert all(found[number].elements == 27 for number in taken)
    assert 500 < len(taken) < 1000
    assert max(b - a for a, b in itertools.pairwise([-1, *taken, 4000])) < 20
    assert None not in samples([27] * 400, 4)
    assert None not in samples([700] * 4000, 100)


def test_small_tensors_are_taken_first():
    """Beside a large tensor the smallest are looked at whole, up to a fixed number of elements."""
    found = samples([1 << 24, 1000, 20_000, 60_000], 2)
    assert [one.elements == one.size for one in found] == [False, True, True, False]


def test_of_more_checkpoints_less_is_looked_at():
    """A hundred checkpoints of a large model are compared in fewer spans than two are."""
    few, many = (samples([1 << 27], count)[0].elements for count in (2, 100))
    assert many < few / 4
