"""Files in, one file out: every mixture of formats, dtypes and geometries."""

import math
import os
import subprocess
import warnings
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

from merge_avg import MergeError, MergeWarning, UsageError
from merge_avg.options import Options
from merge_avg.plan import prepare
from tests.helpers import merge_checkpoints, noise


def state(i):
    """A state dict with every geometry that a checkpoint can have."""
    generator = torch.Generator().manual_seed(i)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    embedding, base = random(4, 5), random(10)
    return {
        "large": random(300, 700),
        "embedding": embedding,
        "head": embedding,
        "channels_last": random(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "transposed": random(6, 7).t(),
        "slice": base[:4],
        "steps": random(2, 8)[:, ::2],
        "expanded": random(1).expand(4),
        "scalar": random(()),
        "empty": torch.zeros(0, 3),
        "half": random(7).half(),
        "bfloat16": random(7).bfloat16(),
        "double": random(9).double(),
        "complex": torch.view_as_complex(random(3, 2)),
        "float8": random(6).to(torch.float8_e4m3fn),
        "counter": torch.tensor(10 + i),
        "index": torch.arange(5),
        "mask": torch.tensor([True, False]),
    }


def mean(states, key):
    tensors = [one[key] for one in states]
    first = tensors[0]
    if not (first.is_floating_point() or first.is_complex()):
        return first
    wide = torch.complex128 if first.is_complex() else torch.float64
    return (sum(tensor.to(wide) for tensor in tensors) / len(tensors)).to(first.dtype)


@pytest.fixture
def folds(tmp_path):
    states = [state(i) for i in range(3)]
    for i, one in enumerate(states):
        optimizer = {"state": {0: {"exp_avg": torch.randn(300, 700)}}, "param_groups": []}
        torch.save({"state_dict": one, "epoch": i, "optimizer": optimizer}, tmp_path / f"{i}.ckpt")
        plain = {key: value.contiguous().clone() for key, value in one.items()}
        save_file(plain, tmp_path / f"{i}.safetensors")
    return states


def assert_is_mean(result, states):
    assert list(result) == list(states[0]) or set(result) == set(states[0])
    for key in states[0]:
        raw = [
            t.view(torch.uint8) if t.itemsize == 1 else t for t in (result[key], mean(states, key))
        ]
        assert torch.equal(*raw), key


def test_a_container_keeps_everything_but_its_weights(folds, tmp_path):
    """A .ckpt stays a .ckpt: same epoch, same optimizer, same ties; unzip finds no fault."""
    paths = [tmp_path / f"{i}.ckpt" for i in range(3)]
    out = tmp_path / "out.ckpt"
    result = merge_checkpoints(paths, out, template=1)
    assert result.differing == ("state_dict.counter",)
    template, merged = (torch.load(path, weights_only=True) for path in (paths[0], out))
    assert_is_mean(merged["state_dict"], folds)
    assert_is_mean(torch.load(out, mmap=True, weights_only=True)["state_dict"], folds)
    assert merged["epoch"] == 0
    kept = [one["optimizer"]["state"][0]["exp_avg"] for one in (template, merged)]
    assert torch.equal(*kept)
    tied = merged["state_dict"]
    assert tied["embedding"].data_ptr() == tied["head"].data_ptr()
    subprocess.run(["unzip", "-t", out], check=True, capture_output=True)
    ours, theirs = (zipfile.ZipFile(path) for path in (out, paths[0]))
    assert ours.namelist() == [*theirs.namelist(), "0/merge_avg.json"]
    assert ours.read("0/data.pkl") == theirs.read("0/data.pkl")


@pytest.mark.parametrize("output", ["out.pt", "out.safetensors"])
@pytest.mark.parametrize("kinds", ["ccc", "sss", "csc", "scs"])
def test_formats_mix(folds, tmp_path, kinds, output):
    """Checkpoints of both formats average together, into either format."""
    endings = {"c": "ckpt", "s": "safetensors"}
    paths = [tmp_path / f"{i}.{endings[kind]}" for i, kind in enumerate(kinds)]
    out = tmp_path / output
    merge_checkpoints(paths, out, state_dict=True, template=1)
    result = load_file(out) if output.endswith("safetensors") else torch.load(out)
    assert_is_mean(result, folds)


def test_order_budget_and_threads_change_no_bit(folds, tmp_path, monkeypatch):
    """The file is the same whatever the memory budget, the threads or the order of the rest."""
    paths = [tmp_path / f"{i}.ckpt" for i in range(3)]
    contents = set()
    for threads, memory, order in ((1, None, (0, 1, 2)), (3, 1 << 23, (0, 2, 1))):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, n=threads: set(range(n)))
        out = tmp_path / f"{threads}.pt"
        merge_checkpoints([paths[i] for i in order], out, max_memory=memory)
        contents.add(out.read_bytes())
    assert len(contents) == 1
    assert folds


def test_dtype_converts_weights_and_nothing_else(folds, tmp_path):
    """--dtype changes the float weights of a container, not its optimizer or its integers."""
    paths = [tmp_path / f"{i}.ckpt" for i in range(3)]
    for state_of in folds:
        del state_of["float8"]
    for path, one in zip(paths, folds, strict=True):
        ckpt = torch.load(path)
        ckpt["state_dict"] = one
        torch.save(ckpt, path)
    out = tmp_path / "out.pt"
    merge_checkpoints(paths, out, dtype="bfloat16")
    merged = torch.load(out, weights_only=True)
    assert merged["optimizer"]["state"][0]["exp_avg"].dtype == torch.float32
    for key, value in merged["state_dict"].items():
        kind = folds[0][key].dtype
        assert value.dtype == (torch.bfloat16 if kind.is_floating_point else kind)
    exact = sum(one["transposed"].double() for one in folds) / 3
    assert torch.equal(merged["state_dict"]["transposed"], exact.bfloat16())


def test_untied_values_that_differ_are_refused(tmp_path):
    """A tie in the template has to hold in the other checkpoints, at least by value."""
    weight = torch.randn(3)
    torch.save({"a": weight, "b": weight}, tmp_path / "tied.pt")
    torch.save({"a": torch.ones(3), "b": torch.zeros(3)}, tmp_path / "loose.pt")
    torch.save({"a": torch.ones(3), "b": torch.ones(3)}, tmp_path / "equal.pt")
    for pair in (("tied.pt", "loose.pt"), ("loose.pt", "tied.pt")):
        with pytest.raises(MergeError, match=r"loose.pt: tensors 'a' and 'b' differ.*tied.pt"):
            merge_checkpoints([tmp_path / name for name in pair], tmp_path / "out.pt")
    merge_checkpoints([tmp_path / "tied.pt", tmp_path / "equal.pt"], tmp_path / "out.pt")
    assert not list(tmp_path.glob(".*"))


def test_a_flipped_bit_is_found(folds, tmp_path):
    """Damage that torch.load does not see is an error that names the record."""
    paths = [tmp_path / f"{i}.ckpt" for i in range(3)]
    layout = prepare(paths, tmp_path / "out.pt", Options()).layouts[2]
    raw = bytearray(paths[2].read_bytes())
    raw[layout.offset(layout.tensors[0].storage) + 1000] ^= 4
    paths[2].write_bytes(raw)
    with pytest.raises(MergeError, match=r"2.ckpt: record 'data/0' is damaged"):
        merge_checkpoints(paths, tmp_path / "out.pt")
    assert not (tmp_path / "out.pt").exists()
    assert folds


def test_overflow_of_a_narrower_dtype_is_refused(tmp_path):
    """A mean that does not fit the dtype asked for is an error, not infinity."""
    torch.save({"w": torch.full((3,), 1e6)}, tmp_path / "a.pt")
    with pytest.raises(MergeError, match="'w' does not fit float16"):
        merge_checkpoints([tmp_path / "a.pt"] * 2, tmp_path / "out.pt", dtype="float16")


def test_progress_counts_every_byte(folds, tmp_path):
    """The progress callback counts up to what the plan announced."""
    paths = [tmp_path / f"{i}.ckpt" for i in range(3)]
    seen: list[tuple[int, int]] = []
    result = merge_checkpoints(paths, tmp_path / "out.pt", progress=lambda *one: seen.append(one))
    assert seen[-1] == (result.nbytes, result.nbytes)
    assert result.nbytes == result.job.nbytes
    assert seen == sorted(seen)
    assert {total for _, total in seen} == {result.nbytes}
    assert folds


def test_that_all_is_read_is_told(folds, tmp_path):
    """The last call of `progress` is with 0, when only the disk is to come, and for no refusal."""
    from merge_avg.engine import run

    paths, out = [tmp_path / f"{i}.ckpt" for i in range(3)], tmp_path / "out.pt"
    seen: list[tuple[int, bool]] = []
    job = prepare(paths, out, Options())
    run(job, lambda more: seen.append((more, out.exists())))
    assert seen[-1] == (0, False)
    assert sum(more for more, _ in seen) == job.nbytes
    assert [more for more, _ in seen].count(0) == 1
    seen.clear()
    with pytest.raises(MergeError):
        run(
            prepare(paths, tmp_path / "o.pt", Options(min_agreement=2)),
            lambda more: seen.append((more, False)),
        )
    assert 0 not in [more for more, _ in seen]
    assert folds


def test_impossible_options_are_usage_errors(folds, tmp_path):
    """No checkpoints, a wrong number of weights, an unknown dtype: UsageError, nothing written."""
    path, out = tmp_path / "0.ckpt", tmp_path / "out.pt"
    for paths, options in (([], {}), ([path], {"weights": [1, 2]}), ([path], {"dtype": "int8"})):
        with pytest.raises(UsageError):
            merge_checkpoints(paths, out, **options)
    with pytest.raises(UsageError, match="format"):
        merge_checkpoints([tmp_path / "0.safetensors"], tmp_path / "out")
    with pytest.raises(MergeError, match="too small"):
        merge_checkpoints([path], tmp_path / "x.pt", max_memory=1000)
    assert not out.exists()
    assert folds


def test_what_lies_between_weights_is_kept(tmp_path):
    """An optimizer's tensor that shares a buffer with a weight, in turns, stays the template's."""
    for fold, apart in ((0, False), (2, False), (4, True)):
        buffer = torch.full((4, 2), float(fold))
        buffer[:, 1] = 100.0 * fold + 10
        weight = buffer[:, 0].clone() if apart else buffer[:, 0]
        counts = torch.arange(8, dtype=torch.int32).view(4, 2)
        counts[:, 1] += fold
        state = {"model": {"w": weight, "i": counts[:, 0]}, "optimizer": {"m": buffer[:, 1]}}
        torch.save(state | {"rng_state": counts[:, 1]}, tmp_path / f"{fold}.pt")
    paths = [tmp_path / f"{fold}.pt" for fold in (0, 2, 4)]
    merge_checkpoints(paths, tmp_path / "out.pt")
    merged = torch.load(tmp_path / "out.pt")
    assert merged["model"]["w"].tolist() == [2] * 4
    assert merged["optimizer"]["m"].tolist() == [10] * 4
    assert merged["rng_state"].tolist() == [1, 3, 5, 7]


def test_integers_that_overlap_a_counter_are_refused(tmp_path):
    """A tensor that differs is named even where a counter views one of its elements."""
    for fold in range(2):
        ints = torch.tensor([5 + fold, 1, 2 + fold, 3])
        torch.save({"n": ints[0], "ints": ints}, tmp_path / f"{fold}.pt")
    with pytest.raises(MergeError, match="'ints'"):
        merge_checkpoints([tmp_path / "0.pt", tmp_path / "1.pt"], tmp_path / "out.pt")


@pytest.mark.parametrize("policy", ["max", "mean", "template"])
def test_integers_that_differ_by_the_thousand(tmp_path, policy):
    """All of many integers that differ are settled, though few of them at a time."""
    values = torch.arange(250_000) * torch.tensor([[1], [2], [-3]])
    values[:, 100_000:140_000] = 7  # equal ones among them
    for fold, row in enumerate(values):
        save_file({"n": row.contiguous()}, tmp_path / f"{fold}.safetensors")
    paths = sorted(tmp_path.glob("*.safetensors"))
    merge_checkpoints(paths, tmp_path / "out.pt", int_policy=policy)
    means = torch.where(values[0] == 7, 7, 0)
    means[7] = 0  # (7 + 14 - 21) / 3
    expected = {"max": values.amax(0), "mean": means, "template": values[0]}
    assert torch.equal(torch.load(tmp_path / "out.pt")["n"], expected[policy])


def test_a_weight_of_zero_counts_for_nothing(tmp_path):
    """What has no weight, such as an outer template, gives neither NaN nor integers."""
    torch.save({"w": torch.tensor([torch.nan, 1]), "n": torch.tensor([9, 9])}, tmp_path / "t.pt")
    for fold in range(2):
        state = {"w": torch.ones(2) * fold, "n": torch.tensor([1 + fold, 2 - fold])}
        torch.save(state, tmp_path / f"{fold}.pt")
    options = {"template": tmp_path / "t.pt", "int_policy": "max"}
    merge_checkpoints([tmp_path / "0.pt", tmp_path / "1.pt"], tmp_path / "out.pt", **options)
    merged = torch.load(tmp_path / "out.pt")
    assert merged["w"].tolist() == [0.5, 0.5]
    assert merged["n"].tolist() == [2, 2]


def test_what_is_excluded_is_not_converted_either(tmp_path):
    """--dtype leaves alone what --exclude keeps, even what could not be averaged."""
    for fold in range(2):
        torch.save({"w": torch.ones(2) * fold, "o": torch.ones(2)}, tmp_path / f"{fold}.pt")
    paths = [tmp_path / "0.pt", tmp_path / "1.pt"]
    for name in ("out.pt", "out.safetensors"):
        merge_checkpoints(paths, tmp_path / name, dtype="float16", exclude=["o"])
    merged = torch.load(tmp_path / "out.pt")
    assert (merged["w"].dtype, merged["o"].dtype) == (torch.float16, torch.float32)


def test_tied_tensors_of_other_shapes(tmp_path):
    """(3, 1) and (1, 3) views of one weight agree with equal tensors that are apart."""
    w = torch.arange(3.0)
    torch.save({"a": w.view(3, 1).clone(), "b": w.view(1, 3).clone()}, tmp_path / "0.pt")
    torch.save({"a": w.view(3, 1), "b": w.view(1, 3)}, tmp_path / "1.pt")
    merge_checkpoints([tmp_path / "0.pt", tmp_path / "1.pt"], tmp_path / "out.pt")
    assert torch.load(tmp_path / "out.pt")["b"].tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("name", ["__metadata__", "w\ud800"])
def test_names_that_safetensors_cannot_hold(tmp_path, name):
    """A tensor whose name would spoil the header is refused."""
    torch.save({"w": torch.ones(2), name: torch.ones(2)}, tmp_path / "a.pt")
    with pytest.raises(MergeError, match="safetensors cannot hold"):
        merge_checkpoints([tmp_path / "a.pt"], tmp_path / "out.safetensors")


def test_absurd_sizes_and_names_are_one_error(tmp_path):
    """A tensor of exabytes, a name of 300 bytes and a pipe are errors, not tracebacks."""
    torch.save({"w": torch.zeros(1).as_strided((2**31, 2**31), (0, 0))}, tmp_path / "a.pt")
    with pytest.raises(MergeError, match="elements, but a storage of 1"):
        merge_checkpoints([tmp_path / "a.pt"], tmp_path / "out.safetensors")
    torch.save({"w": torch.ones(2)}, tmp_path / "b.pt")
    for output, options in (("x" * 300, {}), ("y.pt", {"template": "x" * 300})):
        with pytest.raises(MergeError, match="too long"):
            merge_checkpoints([tmp_path / "b.pt"], tmp_path / output, **options)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(MergeError, match="not a regular file"):
        merge_checkpoints([tmp_path / "pipe"], tmp_path / "out.pt")


@pytest.mark.parametrize("kept", ["excluded", "optimizer"])
def test_a_kept_tensor_in_a_converted_storage_is_refused(tmp_path, kept):
    """One storage has one dtype: a copy cannot convert a part of it, but a state dict can."""
    for fold in range(2):
        base = torch.arange(10.0) + fold
        rest = {"o": base[5:]} if kept == "excluded" else {"optimizer": {"o": base[5:]}}
        torch.save({"w": base[:5], **rest}, tmp_path / f"{fold}.pt")
    paths = [tmp_path / "0.pt", tmp_path / "1.pt"]
    options = {"dtype": "bfloat16", "exclude": ["o"]}
    with pytest.raises(MergeError, match=r"o' is kept, but shares memory") as caught:
        merge_checkpoints(paths, tmp_path / "out.pt", **options)
    assert "--weights-only" in str(caught.value.hint)
    merge_checkpoints(paths, tmp_path / "out.pt", state_dict=True, **options)
    merged = torch.load(tmp_path / "out.pt")
    assert merged["w"].dtype == torch.bfloat16
    assert merged["w"].tolist() == [0.5, 1.5, 2.5, 3.5, 4.5]
    if kept == "excluded":
        assert torch.equal(merged["o"], torch.arange(5.0) + 5)


def test_a_slice_of_a_larger_buffer_is_converted(tmp_path):
    """Elements of a storage that no tensor views are converted along with it."""
    torch.save({"w": torch.arange(10.0)[2:5]}, tmp_path / "a.pt")
    merge_checkpoints([tmp_path / "a.pt"] * 2, tmp_path / "out.pt", dtype="bfloat16")
    assert torch.load(tmp_path / "out.pt")["w"].tolist() == [2, 3, 4]


def test_a_mean_that_does_not_fit_a_narrow_template_is_refused(tmp_path):
    """A template of float16 and another of float32 with larger numbers: no silent infinity."""
    torch.save({"w": torch.ones(4).half()}, tmp_path / "0.pt")
    torch.save({"w": torch.full((4,), 1e6)}, tmp_path / "1.pt")
    paths = [tmp_path / "0.pt", tmp_path / "1.pt"]
    with pytest.raises(MergeError, match="the mean of tensor 'w' does not fit float16"):
        merge_checkpoints(paths, tmp_path / "o.pt", dtype="template")
    assert not (tmp_path / "o.pt").exists()


@pytest.mark.parametrize("alike", [True, False])
def test_low_rank_factors_are_compared_within_each_window(tmp_path, alike):
    """Of factors A that are the same everywhere nothing is said, however many windows they take."""
    paths = [tmp_path / f"{fold}.safetensors" for fold in range(2)]
    for fold, path in enumerate(paths):
        generator = torch.Generator().manual_seed(0 if alike else fold)
        a = torch.randn(8, 50_000, generator=generator)
        save_file({"m.lora_A.weight": a, "m.lora_B.weight": torch.full((9, 8), fold + 1.0)}, path)
    result = merge_checkpoints(paths, tmp_path / "o.safetensors", threads=1)
    assert bool(result.warnings) != alike


def test_the_tensor_that_is_named_holds_the_element(tmp_path):
    """Of two tensors that share memory, NaN far behind the first window is the second one's."""
    for fold in range(2):
        flat = torch.ones(500_000)
        flat[450_000] = math.nan if fold else 1
        torch.save({"a": flat[:300_000], "b": flat[200_000:]}, tmp_path / f"{fold}.pt")
    paths = [tmp_path / "0.pt", tmp_path / "1.pt"]
    with pytest.raises(MergeError, match="tensor 'b' holds NaN"):
        merge_checkpoints(paths, tmp_path / "o.pt", threads=1)


@pytest.mark.parametrize("count", [1, 3])
def test_the_threads_of_torch_are_one_meanwhile(tmp_path, count):
    """Whoever uses torch beside a merge finds as many threads afterwards as before."""
    paths = [tmp_path / f"{fold}.pt" for fold in range(2)]
    for path in paths:
        torch.save({"w": torch.ones(9, dtype=torch.float64)}, path)
    seen = []
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        seen_of = lambda *_: seen.append(torch.get_num_threads())  # noqa: E731
        merge_checkpoints(paths, tmp_path / "o.pt", threads=1, progress=seen_of)
        assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(before)
    assert set(seen) == {1}


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("not enough memory for the progress bar"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        MemoryError("mine"),
        BrokenPipeError(32, "Broken pipe"),
        torch.OutOfMemoryError("CUDA out of memory"),
        KeyError("memory"),
    ],
)
def test_what_the_callers_own_function_raises_comes_as_it_is(tmp_path, error):
    """An error of `progress` is not explained as one of ours, whatever it says."""
    torch.save({"w": torch.ones(4), "steps": torch.tensor(1)}, tmp_path / "a.pt")

    def progress(*_):
        raise error

    with pytest.raises(type(error)) as caught:
        merge_checkpoints([tmp_path / "a.pt"] * 2, tmp_path / "out.pt", progress=progress)
    assert caught.value is error
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


@pytest.mark.parametrize(
    ("error", "ours"),
    [
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 8 bytes"), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 bytes"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("can't start new thread"), True),
        (MemoryError(), True),
        (RuntimeError("the memory format is not supported"), False),
    ],
)
def test_memory_that_torch_lacks_is_a_message(tmp_path, monkeypatch, error, ours):
    """An allocation that fails is one error with a hint; what else torch says is a defect."""
    torch.save({"w": torch.ones(4)}, tmp_path / "a.pt")

    def fill(*_, **__):
        raise error

    monkeypatch.setattr("merge_avg.engine._run.Worker.fill", fill)
    with pytest.raises(MergeError if ours else RuntimeError) as caught:
        merge_checkpoints([tmp_path / "a.pt"] * 2, tmp_path / "out.pt")
    assert isinstance(caught.value, MergeError) == ours
    assert not ours or "--max-memory" in caught.value.hint


@pytest.mark.parametrize("exists", [False, True])
def test_of_several_outputs_none_is_written_where_one_would_be_lost(tmp_path, exists):
    """A file that comes while they are made stays, and so does what the others would replace."""
    torch.save({"w": torch.ones(4)}, tmp_path / "a.pt")
    names = ["x.pt", "y.pt"]
    for name in names if exists else ():
        (tmp_path / name).write_bytes(b"old")
    outputs = {tmp_path / name: [1, 1] for name in names}
    come = tmp_path / "y.pt"
    paths = [tmp_path / "a.pt"] * 2
    with pytest.raises(MergeError, match="came or changed") as caught:
        merge_checkpoints(
            paths, outputs, overwrite=True, progress=lambda *_: come.write_bytes(b"theirs")
        )
    assert caught.value.where == str(come)
    assert come.read_bytes() == b"theirs"
    assert (tmp_path / "x.pt").exists() == exists
    assert len(list(tmp_path.iterdir())) == 2 + exists


def unrelated(folder, count=2):
    """Save checkpoints that have nothing in common, and return their paths."""
    paths = [folder / f"{fold}.pt" for fold in range(count)]
    for fold, path in enumerate(paths):
        torch.save({f"{k}.weight": noise(9 * fold + k, 40, 40) for k in range(4)}, path)
    return paths


def test_unrelated_checkpoints_are_warned_of(tmp_path):
    """The doubt about the mean is in the result, and raised as a warning at the caller's line."""
    with pytest.warns(MergeWarning, match="nothing in common") as caught:
        result = merge_checkpoints(unrelated(tmp_path), tmp_path / "out.pt")
    assert result.verdict.word == "strangers"
    assert [str(one.message) for one in caught] == list(result.warnings)
    assert result.warnings[0].startswith("strangers: ")
    assert caught[0].filename == __file__


def test_checkpoints_that_agree_are_not_warned_of(tmp_path, recwarn):
    """Of relatives there is no warning, and without figures no verdict."""
    paths = unrelated(tmp_path, 1) * 2
    result = merge_checkpoints(paths, tmp_path / "out.pt")
    assert (result.verdict.word, result.warnings) == ("agree", ())
    assert merge_checkpoints(paths, tmp_path / "b.pt", agreement=False).verdict is None
    assert not recwarn.list


def test_the_command_raises_no_warning(tmp_path, command):
    """The command has the doubt in its report, and raises no warning of Python's."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        code, _, err = command(*unrelated(tmp_path), "-o", "out.pt")
    assert code == 0
    assert "nothing in common" in err
    assert "MergeWarning" not in err
