"""Cases that averaging tools have got wrong, each tried through the command.

The letter and number that open a test's docstring name the case: A1 to A21 are about the arithmetic
and the choice of tensors, B1 to B22 about files.
"""

import argparse
import errno
import json
import os
import pickle
import shutil
import subprocess
import sys
import types
import warnings
import zipfile

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.helpers import FORMATS, load, save
from tests.promises import crashing


class Case:
    """A directory with checkpoints, and the command."""

    def __init__(self, directory, command):
        self.directory = directory
        self.run = command

    def merge(self, states, *options, suffix="pt"):
        """Save state dicts, merge them, and return the mean; the merge has to succeed."""
        paths = [self.directory / f"in{i}.{suffix}" for i in range(len(states))]
        for state, path in zip(states, paths, strict=True):
            save(state, path)
        out = self.directory / f"out.{suffix}"
        code, _, err = self.run(*paths, "-o", out, "--overwrite", *options)
        assert code == 0, err
        return load(out)

    def refused(self, states, *options, suffix="pt", says=(), code=1):
        """Save state dicts, and assert that a merge of them is refused; see `refused_files`."""
        paths = [self.directory / f"in{i}.{suffix}" for i in range(len(states))]
        for state, path in zip(states, paths, strict=True):
            save(state, path)
        self.refused_files(paths, *options, says=says, code=code)

    def refused_files(self, paths, *options, says=(), code=1):
        """Assert that a merge ends in one error with such words and code, and writes nothing."""
        out = self.directory / "refused.pt"
        found, stdout, err = self.run(*paths, "-o", out, *options)
        assert found == code, err
        assert stdout == ""
        assert not out.exists()
        assert not list(self.directory.glob(".*"))
        assert err.count("error:") == 1
        assert "Traceback" not in err
        for word in says:
            assert word in err


@pytest.fixture
def case(tmp_path, command):
    return Case(tmp_path, command)


def full(*values):
    """Return a float32 tensor of the values."""
    return torch.tensor(values, dtype=torch.float32)


def test_a1_tied_tensors_are_averaged_once(case):
    """A1: two names of one storage both hold the mean and stay tied."""
    states = []
    for value in (1.0, 2.0, 3.0):
        shared = full(value, value)
        states.append({"a": shared, "b": shared})
    merged = case.merge(states)
    assert merged["a"].tolist() == merged["b"].tolist() == [2.0, 2.0]
    assert merged["a"].data_ptr() == merged["b"].data_ptr()


def test_a2_ties_across_state_dicts(case):
    """A2: a tensor shared by two state dicts of one container is averaged once."""
    states = []
    for value in (1.0, 2.0, 3.0):
        shared = full(value)
        states.append({"model": {"emb": shared}, "generator": {"weight": shared}})
    merged = case.merge(states)
    assert merged["model"]["emb"].item() == merged["generator"]["weight"].item() == 2.0


def test_a3_slices_of_one_buffer(case):
    """A3: a slice and its base agree after the merge."""
    states = []
    for value in (1.0, 3.0):
        base = torch.full((4,), value)
        states.append({"small": base[:2], "full": base})
    merged = case.merge(states)
    assert merged["full"].tolist() == [2.0] * 4
    assert merged["small"].tolist() == [2.0] * 2


@pytest.mark.parametrize("suffix", FORMATS)
def test_a4_strided_views(case, suffix):
    """A4: a view with steps is averaged by its elements."""
    views = [(torch.arange(8.0).reshape(2, 4) * (1 + i))[:, ::2] for i in range(2)]
    merged = case.merge([{"w": view} for view in views], suffix=suffix)
    assert merged["w"].tolist() == [[0.0, 3.0], [6.0, 9.0]]


@pytest.mark.parametrize("suffix", FORMATS)
def test_a5_odd_shapes(case, suffix):
    """A5: transposed, expanded, empty and 0-dim tensors are exact."""
    states = [
        {
            "t": torch.arange(6.0).reshape(2, 3).t() * scale,
            "e": torch.full((1,), scale).expand(4),
            "z": torch.zeros(0, 3),
            "s": torch.tensor(scale),
        }
        for scale in (1.0, 3.0)
    ]
    merged = case.merge(states, suffix=suffix)
    assert torch.equal(merged["t"], torch.arange(6.0).reshape(2, 3).t() * 2)
    assert merged["e"].tolist() == [2.0] * 4
    assert merged["z"].shape == (0, 3)
    assert merged["s"].item() == 2.0


@pytest.mark.parametrize("suffix", FORMATS)
def test_a6_to_a9_integers_stay_integers(case, suffix):
    """A6 to A9: counters by the policy, buffers, masks, bytes and 2**53 + 1 bit for bit."""
    states = [
        {
            "w": full(1.0),
            "bn.num_batches_tracked": torch.tensor(count),
            "position_ids": torch.arange(3),
            "mask": torch.tensor([True, False]),
            "bytes": torch.tensor([200], dtype=torch.uint8),
            "large": torch.tensor([2**53 + 1]),
        }
        for count in (10, 11)
    ]
    merged = case.merge(states, suffix=suffix)
    for name in ("position_ids", "mask", "bytes", "large"):
        assert torch.equal(merged[name], states[0][name])
        assert merged[name].dtype == states[0][name].dtype
    for policy, count in (("error", 10), ("template", 10), ("max", 11), ("mean", 10)):
        merged = case.merge(states, "--int-policy", policy, suffix=suffix)
        assert merged["bn.num_batches_tracked"].dtype == torch.int64
        assert merged["bn.num_batches_tracked"].item() == count


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize(
    ("first", "second", "largest"),
    [
        (torch.tensor([True, False]), torch.tensor([False, False]), [True, False]),
        (torch.tensor([7, 2**53 + 1]), torch.tensor([7, 2**53 + 3]), [7, 2**53 + 3]),
    ],
)
def test_a7_differing_integers_are_refused(case, suffix, first, second, largest):
    """A7: masks and indices that differ are an error, unless a policy decides."""
    states = [{"w": full(1.0), "m": first}, {"w": full(1.0), "m": second}]
    case.refused(states, suffix=suffix, says=["'m'", f"in1.{suffix}", "--int-policy"])
    merged = case.merge(states, "--int-policy", "max", suffix=suffix)
    assert merged["m"].tolist() == largest
    assert merged["m"].dtype == first.dtype


@pytest.mark.parametrize("suffix", FORMATS)
def test_a10_a11_nothing_overflows(case, suffix):
    """A10, A11: large float16 and float32 values keep dtype and value."""
    half = torch.tensor([60000.0], dtype=torch.float16)
    merged = case.merge([{"h": half, "f": full(1e6)}, {"h": half, "f": full(2e6)}], suffix=suffix)
    assert merged["h"].item() == 60000.0
    assert merged["f"].item() == 1.5e6
    assert merged["f"].dtype == torch.float32


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize(("dtype", "count"), [(torch.bfloat16, 20), (torch.float32, 8)])
def test_a12_a13_every_element_is_correctly_rounded(case, suffix, dtype, count):
    """A12, A13: every element is correctly rounded, in whatever order the inputs come."""
    generator = torch.Generator().manual_seed(count)
    states = [{"w": torch.randn(4096, generator=generator).to(dtype)} for _ in range(count)]
    exact = (sum(state["w"].double() for state in states) / count).to(dtype)
    assert torch.equal(case.merge(states, suffix=suffix)["w"], exact)
    assert torch.equal(case.merge(states[::-1], suffix=suffix)["w"], exact)


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("lacking", [0, 1])
def test_a14_missing_keys(case, suffix, lacking):
    """A14: a key missing from one file is an error; flags skip it or average what is there."""
    states = [{"a": full(v), "b": full(v)} for v in (1.0, 3.0, 5.0)]
    del states[lacking]["b"]
    case.refused(states, suffix=suffix, says=["'b'", "--missing"])
    for missing, value in (("skip", 1.0), ("available", 3.0)):
        merged = case.merge(states, "--missing", missing, suffix=suffix)
        assert merged["a"].item() == 3.0
        if lacking == 1:
            assert merged["b"].item() == value


@pytest.mark.parametrize("suffix", FORMATS)
def test_a15_order_of_keys(case, suffix):
    """A15: the same keys in another order are the same; the template's order stays."""
    merged = case.merge(
        [{"a": full(1.0), "b": full(2.0)}, {"b": full(4.0), "a": full(3.0)}], suffix=suffix
    )
    assert list(merged) == ["a", "b"]
    assert [merged["a"].item(), merged["b"].item()] == [2.0, 3.0]


@pytest.mark.parametrize("suffix", FORMATS)
def test_a16_shapes_do_not_broadcast(case, suffix):
    """A16: shapes (2,) and (1,) are an error that names the tensor."""
    case.refused([{"w": full(1, 2)}, {"w": full(1)}], suffix=suffix, says=["'w'", "[1]", "[2]"])


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a17_nonfinite_values(case, suffix, value):
    """A17: NaN or infinity is an error that names tensor and file; a flag allows it."""
    states = [{"w": full(1, 2)}, {"w": full(1, value)}]
    case.refused(states, suffix=suffix, says=["'w'", f"in1.{suffix}", "--allow-nonfinite"])
    merged = case.merge(states, "--allow-nonfinite", suffix=suffix)
    assert merged["w"][0].item() == 1.0
    assert not merged["w"][1].isfinite().item()


@pytest.mark.parametrize("suffix", FORMATS)
def test_a18_mixed_dtypes(case, suffix):
    """A18: bfloat16 with float32 needs --dtype; then both orders give the same bits."""
    narrow, wide = {"w": full(1.0).bfloat16()}, {"w": full(2.0000002)}
    case.refused([narrow, wide], suffix=suffix, says=["'w'", "--dtype"])
    case.refused([wide, narrow], suffix=suffix, says=["'w'", "--dtype"])
    results = [
        case.merge(states, "--dtype", "float32", suffix=suffix)["w"]
        for states in ([narrow, wide], [wide, narrow])
    ]
    assert torch.equal(*results)
    assert results[0].dtype == torch.float32


@pytest.mark.parametrize("suffix", FORMATS)
def test_a19_small_and_complex_dtypes(case, suffix):
    """A19: float8 and complex64 have a mean."""
    states = [
        {"f": full(v).to(torch.float8_e4m3fn), "c": torch.complex(full(v), full(-v))}
        for v in (1.0, 3.0)
    ]
    merged = case.merge(states, suffix=suffix)
    assert merged["f"].float().item() == 2.0
    assert merged["c"].item() == 2 - 2j


@pytest.mark.parametrize("weights", ["1,-1", "1,nan", "1", "1,2,3", "0,0", "1,x", "1,inf", ""])
def test_a20_impossible_weights(case, weights):
    """A20: weights that sum to zero, are not numbers, or are too many are wrong usage."""
    case.refused([{"w": full(1)}, {"w": full(2)}], "-w", weights, code=2)


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("scale", ["l.weight_scale", "l.weight_scale_inv", "l.weight.absmax"])
def test_a21_quantised_codes(case, suffix, scale):
    """A21: codes with a scale beside them are refused as quantised weights."""
    state = {"l.weight": torch.tensor([1, 2], dtype=torch.int8), scale: full(0.5)}
    case.refused([state, state], suffix=suffix, says=["'l.weight'", "quantised"])


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("scale", ["l.weight_scale", "l.weight_scale_inv", "l.scale_weight"])
def test_a21_scaled_codes(case, suffix, scale):
    """A21: float8 with a scale beside it has the mean of what it stands for."""
    codes = torch.tensor([1.0, 2.0]).to(torch.float8_e4m3fn)
    merged = case.merge([{"l.weight": codes, scale: full(s)} for s in (0.5, 2.5)], suffix=suffix)
    assert (merged["l.weight"].float() * merged[scale]).tolist() == pytest.approx([1.5, 3.0])


def test_a21_lora_factors(case):
    """A21: averaging LoRA factors warns that the result is not the mean of their products."""
    paths = [case.directory / "a.pt", case.directory / "b.pt"]
    for fold, path in enumerate(paths):
        a, b = torch.full((2, 3), 1.0 * fold), torch.full((3, 2), 2.0 * fold)
        save({"l.lora_A.weight": a, "l.lora_B.weight": b}, path)
    code, _, err = case.run(*paths, "-o", case.directory / "out.pt")
    assert code == 0
    assert "mean(B) @ mean(A)" in err
    twice = [paths[0]] * 2
    code, _, err = case.run(*twice, "-o", case.directory / "same.pt", "--allow-trivial")
    assert "every LoRA factor A is the same" in err


def test_b1_renamed_files(case):
    """B1: a renamed file is read, though the name inside its archive is the old one."""
    save({"w": full(1.0)}, case.directory / "before.pt")
    (case.directory / "before.pt").rename(case.directory / "after.pt")
    save({"w": full(3.0)}, case.directory / "b.pt")
    out = case.directory / "out.pt"
    assert case.run(case.directory / "after.pt", case.directory / "b.pt", "-o", out)[0] == 0
    assert load(out)["w"].item() == 2.0


def save_as(kind, value, path):
    """Save a state dict with one tensor as any kind of checkpoint, and return its path."""
    if kind == "legacy":
        torch.save(value, path, _use_new_zipfile_serialization=False)
    elif kind == "dcp":
        from torch.distributed.checkpoint.state_dict_saver import save as save_dcp

        save_dcp({"model": value}, checkpoint_id=path, no_dist=True)
    elif kind == "directory":
        path.mkdir(parents=True)
        save_file(value, path / "model.safetensors", {"format": "pt"})
    else:
        path = path.with_suffix(f".{kind}")
        save(value, path)
    return path


def load_as(kind, path):
    """Load what `save_as` has written, or a merge of it."""
    if kind == "dcp":
        from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

        dcp_to_torch_save(path, path.with_suffix(".loaded"))
        return torch.load(path.with_suffix(".loaded"))["model"]
    if kind == "directory":
        return load_file(path / "model.safetensors")
    return load(path)


KINDS = [*FORMATS, "legacy", "directory", "dcp"]
no_group = pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore::UserWarning")


@pytest.mark.large
@no_group
@pytest.mark.parametrize("kind", KINDS)
def test_b2_more_than_two_gib_in_one_tensor(case, kind):
    """B2: a tensor of 2 GiB + 1 MiB is exact to its last byte, in any format."""
    size = (1 << 31) + (1 << 20)
    paths = []
    for number, value in enumerate((1.0, 3.0)):
        state = {"w": torch.full((size // 2,), value, dtype=torch.bfloat16)}
        state["w"][-1] = 7 * value
        paths.append(save_as(kind, state, case.directory / f"in{number}"))
        del state
    out = case.directory / ("out.pt" if kind == "legacy" else f"out{paths[0].suffix}")
    code, _, err = case.run(*paths, "-o", out)
    assert code == 0, err
    for path in paths:  # room for what torch unpacks
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    merged = load_as(kind, out)["w"]
    assert merged.nbytes == size
    assert merged[-1] == 14.0
    assert bool((merged[:-1] == 2.0).all())


@pytest.mark.parametrize("how", ["same", "symlink", "hardlink", "relative"])
@pytest.mark.parametrize("suffix", FORMATS)
def test_b3_the_output_is_an_input(case, suffix, how, monkeypatch):
    """B3: an output that is an input under any name is refused, and the input untouched."""
    path, other = case.directory / f"a.{suffix}", case.directory / f"b.{suffix}"
    save({"w": full(1.0)}, path)
    save({"w": full(3.0)}, other)
    before = path.read_bytes()
    out = case.directory / f"c.{suffix}"
    if how == "same":
        out = path
    elif how == "symlink":
        out.symlink_to(path)
    elif how == "hardlink":
        os.link(path, out)
    else:
        monkeypatch.chdir(case.directory)
        out = f"./a.{suffix}"
    code, _, err = case.run(path, other, "-o", out, "--overwrite")
    assert code == 1
    assert "input" in err
    assert path.read_bytes() == before


@no_group
@pytest.mark.parametrize("kind", ["directory", "dcp"])
@pytest.mark.parametrize(
    "how", ["same", "symlink", "relative", "inside", "around", "part", "hardlink", "file"]
)
def test_b3_the_output_is_an_input_directory(case, kind, how, monkeypatch):
    """B3: an output may not be an input directory, lie in or around one, or link to its files."""
    paths = [save_as(kind, {"w": full(1.0)}, case.directory / name) for name in ("run/a", "b")]
    (part,) = [one for one in paths[0].iterdir() if one.suffix in (".safetensors", ".distcp")]
    out = case.directory / "out.safetensors"
    if how == "symlink":
        out = case.directory / "link"
        out.symlink_to(paths[0])
    elif how == "relative":
        monkeypatch.chdir(paths[0] / "..")
        out = "../run/./a"
    elif how == "hardlink":
        os.link(part, out)
    elif how == "file":
        out.symlink_to(part)
    else:
        out = {"same": paths[0], "inside": paths[0] / "x", "around": paths[0].parent}.get(how, part)
    before = crashing.tree(case.directory)
    code, _, err = case.run(*paths, "-o", out, "--overwrite")
    assert code == 1, err
    assert "input" in err
    assert crashing.tree(case.directory) == before


@no_group
@pytest.mark.parametrize("kind", [name for name, kind in crashing.KINDS.items() if not kind.verify])
def test_b16_no_space_half_way(case, kind, monkeypatch):
    """B16: where the disk is full in the middle of the write, the old output is untouched."""
    place = crashing.Place(case.directory, kind, 40, overwrite=True)
    monkeypatch.chdir(case.directory)

    def plain(arguments):
        assert case.run(*arguments)[0] == 0

    real, written = os.pwrite, []

    def count(fd, data, at):
        written.append(len(data))
        return real(fd, data, at)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", count)
        place.learn(plain)
    half = sum(written) // 2

    def full(fd, data, at):
        nonlocal half
        half -= len(data)
        if half < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, data, at)

    def unsupported(*_):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "pwrite", full)
    monkeypatch.setattr(os, "posix_fallocate", unsupported)  # or it would have shown before
    code, out, err = case.run(*place.arguments)
    assert (code, out) == (1, "")
    assert "No space left on device" in err
    assert not crashing.judge(place, code, err)
    assert not place.left()


def test_b4_views_become_safetensors(case):
    """B4: a view into a larger storage is written with its own bytes."""
    for i, value in enumerate((1.0, 3.0)):
        save({"v": (torch.arange(10.0) * value)[3:6]}, case.directory / f"{i}.pt")
    out = case.directory / "out.safetensors"
    assert case.run(case.directory / "0.pt", case.directory / "1.pt", "-o", out)[0] == 0
    assert load(out)["v"].tolist() == [6.0, 8.0, 10.0]


def test_b6_lightning_containers(case):
    """B6: a container as Lightning writes it keeps all but its weights."""
    states = [
        {
            "epoch": epoch,
            "global_step": epoch * 10,
            "pytorch-lightning_version": "2.5.0",
            "state_dict": {"layer.weight": full(float(epoch))},
            "loops": {"fit_loop": {"state_dict": {}}},
            "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.5 + epoch)}},
            "optimizer_states": [{"state": {0: {"exp_avg": full(9.0 * epoch)}}}],
            "lr_schedulers": [],
            "hyper_parameters": {"lr": 0.1},
        }
        for epoch in (1, 3)
    ]
    merged = case.merge(states)  # of which the newest is the template
    assert merged["state_dict"]["layer.weight"].item() == 2.0
    assert merged["optimizer_states"][0]["state"][0]["exp_avg"].item() == 27.0
    assert merged["callbacks"]["ModelCheckpoint"]["best_model_score"].item() == 3.5
    assert (merged["epoch"], merged["hyper_parameters"]) == (3, {"lr": 0.1})


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("_orig_mod.module.w", "module._orig_mod.w"),
        ("_orig_mod.module.w", "w"),
        ("w", "module.w"),
        ("model._orig_mod.layer.w", "model.layer.w"),
        ("layer.w", "model._orig_mod.layer.w"),
    ],
)
def test_b7_wrapper_prefixes(case, suffix, ours, theirs):
    """B7: names that differ by what wrappers add are one name, the template's."""
    merged = case.merge([{ours: full(1.0)}, {theirs: full(3.0)}], suffix=suffix)
    assert {key: value.item() for key, value in merged.items()} == {ours: 2.0}


def test_b8_state_dicts_do_not_mix(case):
    """B8: an EMA state dict in one file only is an error, until --key says which to take."""
    states = [
        {"state_dict": {"w": full(1.0)}, "state_dict_ema": {"w": full(7.0)}},
        {"state_dict": {"w": full(3.0)}},
    ]
    case.refused(states, says=["state_dict_ema", "--key"])
    merged = case.merge(states, "--key", "state_dict")
    assert merged["state_dict"]["w"].item() == 2.0
    assert merged["state_dict_ema"]["w"].item() == 7.0


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS"),
        (b"", "empty"),
        (b"<!DOCTYPE html><html></html>", "web page"),
        (b"hello", "neither"),
    ],
)
@pytest.mark.parametrize("suffix", FORMATS)
def test_b15_no_checkpoints(case, suffix, content, says):
    """B15: a file that is not a checkpoint is named as what it is, with a hint."""
    path = case.directory / f"a.{suffix}"
    path.write_bytes(content)
    case.refused_files([path], says=[says, str(path), "hint:"])


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("part", [0.3, 0.9, 0.999])
def test_b15_truncated_files(case, suffix, part):
    """B15: a file that was cut short anywhere is refused with a hint."""
    path = case.directory / f"a.{suffix}"
    save({"w": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])
    case.refused_files([path], says=[str(path), "hint:"])


def test_b15_directories_and_wrong_suffixes(case):
    """B15: an empty directory is refused; a file with a wrong ending is read by its bytes."""
    case.refused_files([case.directory], says=["directory"])
    save({"w": full(1.0)}, case.directory / "a.pt")
    wrong = case.directory / "a.safetensors"
    (case.directory / "a.pt").rename(wrong)
    save({"w": full(3.0)}, case.directory / "a.pt")
    assert case.run(wrong, case.directory / "a.pt", "-o", case.directory / "out.pt")[0] == 0


def shards(folder, state, cuts, suffix, *, index=True):
    """Write shards named as transformers does, each from one cut to the next; return the folder."""
    folder.mkdir()
    base = "model" if suffix == "safetensors" else "pytorch_model"
    suffix = "safetensors" if suffix == "safetensors" else "bin"
    keys, table = list(state), {}
    edges = [0, *cuts, len(keys)]
    for number in range(1, len(edges)):
        path = folder / f"{base}-{number:05}-of-{len(edges) - 1:05}.{suffix}"
        part = {key: state[key] for key in keys[edges[number - 1] : edges[number]]}
        save(part, path)
        table |= dict.fromkeys(part, path.name)
    if index:
        text = json.dumps({"metadata": {}, "weight_map": table})
        (folder / f"{base}.{suffix}.index.json").write_text(text)
    return folder


def distributed(folder, state):
    """Write a directory of torch.distributed.checkpoint, and return it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"model": state}, checkpoint_id=folder, no_dist=True)
    return folder


def legacy(path, state):
    """Write a file in torch's format before 1.6, and return it."""
    torch.save(state, path, _use_new_zipfile_serialization=False)
    return path


@pytest.mark.parametrize("part", [0.0, 0.02, 0.5, 0.97])
def test_b15_truncated_legacy_files(case, part):
    """B15: a file of the old format that was cut short anywhere is refused by its name."""
    path = legacy(case.directory / "a.pt", {"w": torch.ones(1000)})
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])
    case.refused_files([path], says=[str(path)])


@pytest.mark.parametrize(
    "content",
    [b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", b"<html>", None],
    ids=["empty", "lfs", "html", "half"],
)
@pytest.mark.parametrize("kind", [*FORMATS, "dcp", "metadata"])
def test_b15_parts_of_directories(case, kind, content):
    """B15: a shard, or a file of chunks, that was not fetched or is cut short is named."""
    folder, state = case.directory / "a", {"a": torch.ones(500), "b": torch.ones(500)}
    if kind in FORMATS:
        shards(folder, state, [1], kind)
        path = next(folder.glob("*-00002-of-00002*"))
    else:
        distributed(folder, state)
        path = folder / (".metadata" if kind == "metadata" else "__0_0.distcp")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if content is None else content)
    case.refused_files([folder], says=[path.name if kind != "metadata" else str(folder)])


def test_b15_bytes_decide_the_format(case):
    """B15: safetensors named .pt, a zip named .safetensors and a legacy file .bin are all read."""
    paths = [case.directory / name for name in ("a.pt", "b.safetensors", "c.bin")]
    save_file({"w": full(1.0)}, paths[0])
    torch.save({"w": full(2.0)}, paths[1])
    legacy(paths[2], {"w": full(6.0)})
    out = case.directory / "out.pt"
    assert case.run(*paths, "-o", out)[0] == 0
    assert load(out)["w"].item() == 3.0


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("index", [True, False])
def test_b17_shards_that_differ(case, suffix, index):
    """B17: shards cut elsewhere, one file and a distributed checkpoint can be averaged together."""
    states = [{key: full(value * n) for n, key in enumerate("abcd")} for value in (1, 2, 3, 6)]
    paths = [
        shards(case.directory / "x", states[0], [1, 3], suffix, index=index),
        shards(case.directory / "y", states[1], [2], suffix, index=index),
        distributed(case.directory / "z", states[2]),
        case.directory / f"one.{suffix}",
    ]
    save(states[3], paths[3])
    for out in (case.directory / "out", case.directory / f"out.{suffix}"):
        code, _, err = case.run(*paths, "-o", out)
        assert code == 0, err
    merged = load(case.directory / f"out.{suffix}")
    assert [merged[key].item() for key in "abcd"] == [0.0, 3.0, 6.0, 9.0]
    again = case.directory / f"again.{suffix}"
    assert case.run(case.directory / "out", "-o", again, "--allow-trivial")[0] == 0
    assert all(torch.equal(load(again)[key], merged[key]) for key in "abcd")


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("index", [True, False])
def test_b17_a_key_in_two_shards(case, suffix, index):
    """B17: a tensor that two shards hold is an error that names it and both."""
    folder = shards(
        case.directory / "x", {"a": full(1.0), "b": full(2.0)}, [1], suffix, index=index
    )
    second = next(folder.glob("*-00002-of-00002*"))
    save({"a": full(9.0), "b": full(2.0)}, second)
    case.refused_files([folder], says=["'a'", "-00001-of-00002", "-00002-of-00002"])


def test_b18_transformers_finds_its_format(case):
    """B18: safetensors outputs say format pt, and keep the template's other metadata."""
    for i in range(2):
        save_file({"w": full(1.0)}, case.directory / f"{i}.safetensors", {"made": "here"})
    out = case.directory / "out.safetensors"
    inputs = [case.directory / f"{i}.safetensors" for i in range(2)]
    assert case.run(*inputs, "-o", out)[0] == 0
    with safe_open(out, "pt") as file:
        metadata = file.metadata()
    assert metadata.keys() == {"format", "made", "merge_avg"}
    assert (metadata["format"], metadata["made"]) == ("pt", "here")


class Hostile:
    """An object whose pickle calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    ("function", "name"),
    [(os.system, "system"), (eval, "eval"), (exec, "exec"), (subprocess.check_call, "check_call")],
)
def test_b19_hostile_pickles(case, function, name, protocol):
    """B19: a pickle that would run code is refused by name, and runs nothing."""
    mark = case.directory / "mark"
    code = f"touch {mark}" if name in ("system", "check_call") else f"open({str(mark)!r}, 'w')"
    path = case.directory / "a.pt"
    torch.save({"w": full(1.0), "x": Hostile(function, code)}, path, pickle_protocol=protocol)
    case.refused_files([path], says=[name, str(path)])
    assert not mark.exists()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", ["shard", "optimizer", "metadata"])
def test_b19_hostile_parts_of_directories(case, kind, zipped):
    """B19: a hostile pickle is refused anywhere in a directory, whether it holds weights or not."""
    mark = case.directory / "mark"
    hostile = {"x": Hostile(os.system, f"touch {mark}")}
    if kind == "metadata":
        folder = distributed(case.directory / "a", {"w": full(1.0)})
        (folder / ".metadata").write_bytes(pickle.dumps(hostile, 4 if zipped else 2))
    else:
        folder = shards(case.directory / "a", {"w": full(1.0), "v": full(1.0)}, [1], "pt")
        name = "optimizer.pt" if kind == "optimizer" else "pytorch_model-00002-of-00002.bin"
        value = {"v": full(1.0), **hostile}
        torch.save(value, folder / name, _use_new_zipfile_serialization=zipped)
    case.refused_files([folder], says=["system"])
    assert not mark.exists()


class Marked(torch.Tensor):
    """A subclass of Tensor, which torch.save rebuilds by _rebuild_from_type_v2."""


@pytest.fixture
def config(monkeypatch):
    """Return a class whose module exists only while files are written and loaded again."""
    module = types.ModuleType("omegaconf")
    cls = type("DictConfig", (), {"__module__": "omegaconf"})
    module.DictConfig = cls
    monkeypatch.setitem(sys.modules, "omegaconf", module)
    return cls


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
@pytest.mark.parametrize("zipped", [True, False])
def test_b19_objects_are_averaged_without_running_them(case, config, monkeypatch, zipped):
    """B19: Parameters, subclasses, settings, NumPy scalars and modules are averaged, not run."""
    paths, models = [], []
    for value in (1.0, 3.0):
        model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
        settings = config()
        settings.lr = value
        state = {
            "model": {
                "parameter": torch.nn.Parameter(full(value)),
                "subclass": full(value).as_subclass(Marked),
                **({"v3": full(value).to(torch.float8_e5m2)} if zipped else {}),
            },
            "module": model,
            "args": argparse.Namespace(lr=value),
            "cfg": settings,
            "best": np.float64(value),
            "rng_state": np.random.RandomState(0).get_state(),
        }
        models.append(model)
        paths.append(case.directory / f"{value}.pt")
        torch.save(state, paths[-1], _use_new_zipfile_serialization=zipped)
    out = case.directory / "out.pt"
    with monkeypatch.context() as without:
        without.delitem(sys.modules, "omegaconf")
        code, _, err = case.run(*paths, "-o", out)
        assert code == 0, err
        assert "omegaconf" not in sys.modules
    merged = torch.load(out, weights_only=False)
    assert all(tensor.item() == 2.0 for tensor in merged["model"].values())
    assert type(merged["model"]["parameter"]) is torch.nn.Parameter
    assert type(merged["model"]["subclass"]) is Marked
    mean = (models[0][0].weight.double() + models[1][0].weight.double()) / 2
    assert torch.equal(merged["module"][0].weight, mean.float())
    assert (merged["args"].lr, merged["cfg"].lr, merged["best"]) == (1.0, 1.0, 1.0)
    assert type(merged["best"]) is np.float64


def test_b19_hostile_opcodes(case):
    """B19: pickles that call functions by old opcodes, in a zip made by hand, are refused."""
    for raw in (b"(S'true'\nios\nsystem\n.", b"cos\nsystem\n(S'true'\ntR.", b"\x82\x01."):
        path = case.directory / "a.pt"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a/data.pkl", raw)
        case.refused_files([path], says=[str(path)])


@pytest.mark.parametrize(
    "name", ["info.pt", "new.pt", "t.pt", "with blank.pt", "[a].pt", "-dash.pt", "[red]x.pt"]
)
def test_b22_odd_file_names(case, name, monkeypatch):
    """B22: file names are taken literally, whatever they begin with or hold."""
    monkeypatch.chdir(case.directory)
    save({"w": full(1.0)}, case.directory / name)
    save({"w": full(3.0)}, case.directory / "other.pt")
    code, out, err = case.run("-o", "out.pt", "--", name, "other.pt")
    assert code == 0, err
    assert out == "out.pt\n"
    assert load(case.directory / "out.pt")["w"].item() == 2.0
