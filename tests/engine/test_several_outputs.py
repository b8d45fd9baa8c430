"""Several averages in one reading are what separate merges make, bit for bit."""

import json
import random
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from merge_avg.errors import MergeError, UsageError
from merge_avg.formats import scan
from merge_avg.io._reader import Tap
from tests.helpers import merge_checkpoints, save
from tests.plan.test_budget import MEASURE

COUNT = 4


def tensors(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(3000, generator=generator, dtype=torch.float64)
    return {
        "w": weights.to(dtype),
        "v": weights[:192].view(64, 3).t().to(dtype),
        "n": torch.tensor([seed, 7, seed * seed]),
        "num_batches_tracked": torch.tensor(seed),
    }


def made(folder, suffix, dtype=torch.float32, count=COUNT):
    paths = []
    for fold in range(count):
        path = folder / f"fold{fold}{suffix}"
        content = tensors(fold, dtype)
        if suffix == "":
            path.mkdir()
            save_file({k: v.contiguous() for k, v in content.items()}, path / "model.safetensors")
            (path / "config.json").write_text(json.dumps({"model_type": "bert"}))
        elif suffix == ".safetensors":
            save_file({k: v.contiguous() for k, v in content.items()}, path)
        else:
            torch.save({"state_dict": content, "epoch": fold}, path)
        paths.append(path)
    return paths


def content_of(path):
    files = [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file())
    return {one.name if path.is_dir() else "": one.read_bytes() for one in files}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ""])
@pytest.mark.parametrize("policy", ["template", "max", "mean"])
def test_leave_one_out_equals_separate_merges(tmp_path, suffix, policy):
    """Each output is, to the byte, what a merge of its own with the same template makes."""
    paths = made(tmp_path, suffix)
    rows = {
        tmp_path / f"without{left}{suffix}": [int(i != left) for i in range(COUNT)]
        for left in range(COUNT)
    }
    merge_checkpoints(paths, rows, template=paths[0], int_policy=policy)
    for left, path in enumerate(rows):
        alone = tmp_path / f"alone{left}{suffix}"
        others = [one for i, one in enumerate(paths) if i != left]
        # How far all agree is not how far some do, so it is recorded of a single average only.
        merge_checkpoints(others, alone, template=paths[0], int_policy=policy, agreement=False)
        assert content_of(alone) == content_of(path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.complex64])
def test_other_dtypes_too(tmp_path, dtype):
    """The sums of several averages do not get in each other's way, in wide arithmetic either."""
    paths = made(tmp_path, ".pt", dtype)
    rows = {tmp_path / f"first{n}.pt": [1] * n + [0] * (COUNT - n) for n in (2, 3, 4)}
    merge_checkpoints(paths, rows, template=1, int_policy="template")
    for size, path in enumerate(rows, 2):
        alone = tmp_path / f"alone{size}.pt"
        options = {"int_policy": "template", "agreement": False, "template": 1}
        merge_checkpoints(paths[:size], alone, **options)
        assert content_of(alone) == content_of(path)


def test_each_input_is_read_once(tmp_path, monkeypatch):
    """Eight averages of eight inputs read each byte of the weights once."""
    paths = []
    for fold in range(8):
        paths.append(tmp_path / f"{fold}.safetensors")
        save_file({"w": tensors(fold)["w"]}, paths[-1])
    taken = []
    read = Tap.read

    def counted(self, into, at, *, again=False):
        taken.append((self.path, len(into)))
        read(self, into, at, again=again)

    monkeypatch.setattr(Tap, "read", counted)
    rows = {tmp_path / f"o{k}.safetensors": [int(i != k) for i in range(8)] for k in range(8)}
    result = merge_checkpoints(paths, rows)
    weights = sum(info.numel * 4 for info in scan(paths[0]).tensors)
    for path in paths:
        assert sum(nbytes for one, nbytes in taken if one == path) == weights
    assert result.nbytes == 8 * weights


@pytest.mark.large
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_very_many_tensors_are_held_once_for_all_outputs(tmp_path, suffix):
    """Eight averages of eight checkpoints of 20,000 tensors take no more memory than predicted."""
    paths = [tmp_path / f"{fold}{suffix}" for fold in range(8)]
    for fold, path in enumerate(paths):
        save({f"layers.{i}.weight": torch.full((4, 64), fold + i / 7) for i in range(20_000)}, path)
    command = [sys.executable, "-c", MEASURE, *map(str, paths), str(tmp_path / f"o{{}}{suffix}")]
    done = subprocess.run([*command, "0"], capture_output=True, text=True, check=True)
    measured, predicted = json.loads(done.stdout)
    assert measured <= predicted
    assert len(list(tmp_path.glob("o*"))) == 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_nonfinite_numbers_disturb_no_other_average(tmp_path, dtype):
    """Looking for whose NaN it is leaves the other averages what they are; all names are told."""
    paths = []
    for fold in range(COUNT):
        content = tensors(fold, dtype)
        content["w"][fold * 700 : fold * 700 + 3] = torch.nan if fold % 2 else torch.inf
        content["v"][0, 0] = torch.nan if fold == 2 else 0.5
        paths.append(tmp_path / f"{fold}.pt")
        torch.save(content, paths[-1])
    options = {"allow_nonfinite": True, "int_policy": "template", "agreement": False}
    rows = {tmp_path / f"o{k}.pt": [int(i != k) for i in range(COUNT)] for k in range(COUNT)}
    rows[tmp_path / "far.pt"] = [1, 1 << 24, 1, 3]  # whose sums are left to torch
    result = merge_checkpoints(paths, rows, **options)
    assert result.nonfinite == ("v", "w")
    for number, (path, weights) in enumerate(rows.items()):
        alone = tmp_path / f"alone{number}.pt"
        merge_checkpoints(paths, alone, weights=weights, template=1, **options)
        assert torch.load(path)["w"].isfinite().sum() >= 3000 - 3 * COUNT
        for name in ("w", "v"):
            ours, theirs = torch.load(path)[name], torch.load(alone)[name]
            assert torch.equal(ours.isnan(), theirs.isnan())
            assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())


def test_the_same_checkpoint_may_differ_in_weight(tmp_path):
    """Outputs may weigh the same checkpoints differently."""
    paths = made(tmp_path, ".safetensors", count=2)
    rows = {tmp_path / "a.safetensors": [1, 3], tmp_path / "b.safetensors": ["0.5", 0.5]}
    merge_checkpoints(paths, rows, include=["w"])
    for path, weights in rows.items():
        alone = tmp_path / f"alone-{path.name}"
        merge_checkpoints(paths, alone, weights=weights, include=["w"], agreement=False)
        assert content_of(alone) == content_of(path)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.randoms(use_true_random=False), st.integers(1, 4), st.sampled_from([None, 1, 5, 12]))
def test_no_bit_depends_on_how_it_is_done(tmp_path_factory, rng: random.Random, threads, mebibytes):
    """Threads, budget and the order of the inputs change no bit of any average."""
    folder = tmp_path_factory.mktemp("order")
    count = rng.randint(1, 6)
    contents, paths = [], []
    for fold in range(count):
        generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
        wide = torch.randn(5000, generator=generator) * 2.0 ** rng.randint(-30, 30)
        halves = torch.randint(-9, 9, (4001,), generator=generator).to(torch.bfloat16) / 4
        contents.append({"w": wide, "h": halves, "d": wide.double() * 1.1})
        paths.append(folder / f"{fold}.safetensors")
        save_file(contents[-1], paths[-1])
    weights = [rng.randint(1, 9) for _ in paths]
    order = rng.sample(range(count), count)
    memory = None if mebibytes is None else mebibytes << 20
    try:
        merge_checkpoints(
            [paths[i] for i in order],
            folder / "a.pt",
            weights=[weights[i] for i in order],
            threads=threads,
            max_memory=memory,
        )
    except MergeError as error:
        if "budget is too small" not in str(error):
            raise
        return
    merge_checkpoints(paths, folder / "b.pt", weights=weights, threads=1)
    a, b = torch.load(folder / "a.pt"), torch.load(folder / "b.pt")
    for name in a:
        assert (
            a[name].numpy(force=True).tobytes() == b[name].numpy(force=True).tobytes()
            if (a[name].dtype != torch.bfloat16)
            else torch.equal(a[name].view(torch.int16), b[name].view(torch.int16))
        )


def test_an_output_in_the_way_stops_all(tmp_path):
    """Where one of the outputs exists, none is written."""
    paths = made(tmp_path, ".safetensors", count=2)
    (tmp_path / "b.safetensors").write_bytes(b"mine")
    rows = {tmp_path / "a.safetensors": [1, 0], tmp_path / "b.safetensors": [0, 1]}
    with pytest.raises(MergeError, match="exists"):
        merge_checkpoints(paths, rows, include=["w"])
    assert not (tmp_path / "a.safetensors").exists()
    assert (tmp_path / "b.safetensors").read_bytes() == b"mine"


def test_outputs_are_of_one_format(tmp_path):
    """A file of one format beside one of another is a usage error."""
    paths = made(tmp_path, ".safetensors", count=2)
    with pytest.raises(UsageError, match="end differently"):
        merge_checkpoints(paths, {tmp_path / "a.safetensors": [1, 1], tmp_path / "b.pt": [1, 1]})


def test_weights_are_given_once(tmp_path):
    """Weights beside those of the outputs are a usage error."""
    paths = made(tmp_path, ".safetensors", count=2)
    with pytest.raises(UsageError, match="twice"):
        merge_checkpoints(paths, {tmp_path / "a.safetensors": [1, 1]}, weights=[1, 2])


# Linear combinations


def test_a_task_vector(tmp_path):
    """Weights that are not normalized make base + 0.5 * (tuned - other), rounded once."""
    contents = [torch.tensor([1.0, 2.0**-30, -0.0]), torch.tensor([3.0, 5.0, -0.0]), torch.ones(3)]
    paths = []
    for number, content in enumerate(contents):
        paths.append(tmp_path / f"{number}.safetensors")
        save_file({"w": content}, paths[-1])
    out = tmp_path / "out.pt"
    merge_checkpoints(paths, out, weights=[1, 0.5, -0.5], normalize=False)
    exact = contents[0].double() + contents[1].double() / 2 - contents[2].double() / 2
    assert torch.equal(torch.load(out)["w"], exact.float())


def test_negative_weights_are_for_linear_combinations(tmp_path):
    """A mean with a negative weight is a usage error that names the option."""
    paths = made(tmp_path, ".safetensors", count=2)
    with pytest.raises(UsageError, match="negative") as caught:
        merge_checkpoints(paths, tmp_path / "o.safetensors", weights=[2, -1])
    assert "--no-normalize" in str(caught.value.hint)


def test_a_combination_that_overflows_is_refused(tmp_path):
    """A sum beyond the dtype's range is an error that names the tensor, not infinity."""
    paths = []
    for number in range(2):
        paths.append(tmp_path / f"{number}.safetensors")
        save_file({"w": torch.full((3,), 3e38)}, paths[-1])
    with pytest.raises(MergeError, match="'w' does not fit float32"):
        merge_checkpoints(paths, tmp_path / "o.pt", weights=[1, 1], normalize=False)


def test_the_dtype_of_the_template(tmp_path):
    """Checkpoints of another dtype are averaged into the template's."""
    save_file(
        {"w": torch.tensor([1.0, 2.0]), "h": torch.ones(2).bfloat16()}, tmp_path / "a.safetensors"
    )
    wide = {"w": torch.tensor([2.0, 4.0]).double(), "h": torch.full((2,), 3.0)}
    save_file(wide, tmp_path / "b.safetensors")
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    merge_checkpoints(paths, tmp_path / "o.pt", dtype="template")
    out = torch.load(tmp_path / "o.pt")
    assert out["w"].dtype == torch.float32
    assert out["w"].tolist() == [1.5, 3.0]
    assert out["h"].dtype == torch.bfloat16
    assert out["h"].tolist() == [2.0, 2.0]


# What an output says about itself


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ""])
def test_an_output_is_known_as_one(tmp_path, suffix):
    """An output carries the names, sizes and weights of its own inputs, and of no others."""
    paths = made(tmp_path, suffix, count=2)
    one, two = tmp_path / f"one{suffix}", tmp_path / f"two{suffix}"
    merge_checkpoints(paths, one, weights=[1, 3], int_policy="template")
    (text,) = [value for key, value in scan(one).metadata if key == "merge_avg"]
    found = json.loads(text)
    assert [entry["name"] for entry in found["inputs"]] == [path.name for path in paths]
    assert [entry["weight"] for entry in found["inputs"]] == ["1/4", "3/4"]
    assert not any(key == "merge_avg" for key, _ in scan(paths[0]).metadata)
    # Weights say that an average is meant; else it would be left out.
    merge_checkpoints([one, paths[0]], two, weights=[1, 1], int_policy="template")
    (text,) = [value for key, value in scan(two).metadata if key == "merge_avg"]
    assert [entry["name"] for entry in json.loads(text)["inputs"]] == [paths[0].name, one.name]


def test_the_same_merge_writes_the_same_bytes(tmp_path):
    """Nothing of time or place is in an output."""
    paths = made(tmp_path, ".pt", count=2)
    (tmp_path / "elsewhere").mkdir()
    for folder in (tmp_path, tmp_path / "elsewhere"):
        merge_checkpoints(paths, folder / "o.pt", int_policy="template")
    assert content_of(tmp_path / "o.pt") == content_of(tmp_path / "elsewhere" / "o.pt")
