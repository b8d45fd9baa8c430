"""merge_avg.formats.zero3: what the ranks of DeepSpeed's ZeRO-3 hold together."""

import math
from collections import OrderedDict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from merge_avg import verify_output
from merge_avg.errors import MergeError
from merge_avg.formats import scan
from tests.helpers import merge_checkpoints

SHAPES = {"0.weight": (7, 5), "0.bias": (7,), "deep.scalar": (), "2.weight": (3, 7), "2.bias": (3,)}


def write(folder, values, world, groups=1):
    """Write what DeepSpeed 0.19 writes, in the layout that its zero_to_fp32.py reads.

    Padding has any content; so here it is NaN.
    """
    folder.mkdir(parents=True)
    names = list(values)
    size = -(-len(names) // groups)
    cut = [names[at : at + size] for at in range(0, len(names), size)]
    shapes = [OrderedDict((name, values[name].shape) for name in some) for some in cut]
    for rank in range(world):
        flat = []
        for some in cut:
            parts = []
            for name in some:
                each = -(-values[name].numel() // world)
                padded = torch.full((each * world,), math.nan)
                padded[: values[name].numel()] = values[name].flatten()
                parts.append(padded[rank * each : (rank + 1) * each])
            flat.append(torch.cat(parts).requires_grad_())
        hollow = {name: torch.empty(0, dtype=torch.bfloat16) for name in names}
        states = {
            "module": {"scale": torch.ones(3), **hollow},
            "buffer_names": ["scale"],
            "param_shapes": shapes,
            "ds_version": "0.19.8",
            "global_steps": 7,
        }
        torch.save(states, folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        slots = {0: {"exp_avg": torch.full_like(flat[0], 3.0), "step": torch.tensor(1.0)}}
        inner = {"state": slots, "param_groups": [{"lr": 0.1}]}
        optimizer = {"zero_stage": 3, "partition_count": world, "fp32_flat_groups": flat}
        optimizer["optimizer_state_dict"] = inner
        name = f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": optimizer, "ds_version": "0.19.8"}, folder / name)


def gathered(folder, world):
    """Gather parameters as _zero3_merge_trainable_params of zero_to_fp32.py does."""
    models = torch.load(folder / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    flat = []
    for rank in range(world):
        path = folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        flat.append(torch.cat(torch.load(path)["optimizer_state_dict"]["fp32_flat_groups"]))
    found, offset = {}, 0
    for name, shape in {k: v for some in models["param_shapes"] for k, v in some.items()}.items():
        each = -(-shape.numel() // world)
        whole = torch.cat([one[offset : offset + each] for one in flat])
        found[name] = whole[: shape.numel()].view(shape)
        offset += each
    return found


def values(seed, shapes=None):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator) for name, shape in (shapes or SHAPES).items()
    }


def mean(*several):
    return {
        name: (sum(one[name].double() for one in several) / len(several)).float()
        for name in several[0]
    }


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_parameters_are_averaged_by_name(tmp_path, world, groups):
    """The mean lies in the flat groups as DeepSpeed reads them, and in one file by name."""
    for seed in (1, 2):
        write(tmp_path / f"global_step{seed}", values(seed), world, groups)
    paths = [tmp_path / f"global_step{seed}" for seed in (1, 2)]
    want = mean(values(1), values(2))
    merge_checkpoints(paths, tmp_path / "out")
    found = gathered(tmp_path / "out", world)
    assert all(torch.equal(found[name], value) for name, value in want.items())
    verify_output(tmp_path / "out")
    kept = torch.load(tmp_path / "out/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")
    slots = kept["optimizer_state_dict"]["optimizer_state_dict"]["state"][0]
    assert set(slots["exp_avg"].tolist()) == {3.0}
    result = merge_checkpoints(paths, tmp_path / "out.pt")
    one = torch.load(tmp_path / "out.pt")
    assert one.keys() == {*want, "scale"}
    assert all(torch.equal(one[name], value) for name, value in want.items())
    assert not [note for note in result.job.notes if "may hold weights" in note]
    verify_output(tmp_path / "out.pt")


def test_ranks_of_another_number(tmp_path):
    """Two ranks and three cut parameters elsewhere, and have the same names."""
    write(tmp_path / "two", values(1), 2)
    write(tmp_path / "three", values(2), 3)
    merge_checkpoints([tmp_path / "two", tmp_path / "three"], tmp_path / "out", template=2)
    found, want = gathered(tmp_path / "out", 3), mean(values(1), values(2))
    assert all(torch.equal(found[name], value) for name, value in want.items())


def test_weights_only_and_another_dtype(tmp_path):
    """What tells the names stays; another dtype needs one file, which an error says."""
    for seed in (1, 2):
        write(tmp_path / f"{seed}", values(seed), 2)
    paths = [tmp_path / "1", tmp_path / "2"]
    merge_checkpoints(paths, tmp_path / "out", weights_only=True)
    found, want = gathered(tmp_path / "out", 2), mean(values(1), values(2))
    assert all(torch.equal(found[name], value) for name, value in want.items())
    with pytest.raises(MergeError, match="another dtype in a copy"):
        merge_checkpoints(paths, tmp_path / "half", dtype="bfloat16")
    merge_checkpoints(paths, tmp_path / "half.pt", dtype="bfloat16")
    assert torch.load(tmp_path / "half.pt")["0.weight"].dtype == torch.bfloat16
    merge_checkpoints(paths, tmp_path / "shards", max_shard_size=1000)
    assert {path.suffix for path in (tmp_path / "shards").iterdir()} == {".safetensors", ".json"}


@pytest.mark.parametrize("kind", ["model", "optim"])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_rank_that_is_missing_is_named(tmp_path, kind, rank):
    """The file of any rank, of either kind, is needed."""
    write(tmp_path / "x", values(1), 3)
    (path,) = (tmp_path / "x").glob(f"*rank_{rank}_mp*{kind}*")
    path.unlink()
    with pytest.raises(MergeError, match=f"the {kind} states of rank {rank} are missing"):
        scan(tmp_path / "x")


def test_files_that_do_not_fit_are_refused(tmp_path):
    """Flat groups that are too short or too long, and parameters in none, are errors."""
    write(tmp_path / "x", values(1), 2)
    write(tmp_path / "y", values(1) | {"more": torch.ones(6)}, 2)
    for ours, theirs, what in (("x", "y", "too small"), ("y", "x", "too large")):
        folder = tmp_path / f"{ours}{theirs}"
        folder.mkdir()
        for source, kind in ((theirs, "model"), (ours, "optim")):
            for path in (tmp_path / source).glob(f"*{kind}*"):
                (folder / path.name).write_bytes(path.read_bytes())
        with pytest.raises(MergeError, match=what):
            scan(folder)
    for path in (tmp_path / "x").glob("*model*"):
        states = torch.load(path)
        states["module"]["frozen"] = torch.empty(0)
        torch.save(states, path)
    with pytest.raises(MergeError, match="'frozen' is in no flat group"):
        scan(tmp_path / "x")


NAMED = st.dictionaries(
    st.sampled_from("abcdef"), st.lists(st.integers(1, 5), max_size=3).map(tuple), min_size=1
)


@given(shapes=NAMED, world=st.integers(1, 5), groups=st.integers(1, 3))
def test_any_shapes_over_any_ranks(tmp_path_factory, shapes, world, groups):
    """Whatever the padding, and where groups end, each element is averaged once."""
    folder = tmp_path_factory.mktemp("zero")
    for seed in (1, 2):
        write(folder / f"{seed}", values(seed, shapes), world, groups)
    merge_checkpoints([folder / "1", folder / "2"], folder / "out")
    found, want = gathered(folder / "out", world), mean(values(1, shapes), values(2, shapes))
    assert all(torch.equal(found[name], value) for name, value in want.items())
