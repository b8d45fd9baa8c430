"""merge_avg.roles: which tensors of a container are weights."""

import numpy as np
import pytest
import torch

from merge_avg import merge_checkpoints
from merge_avg.checkpoint import BY_NAME, Layout, Storage, TensorInfo
from merge_avg.checkpoint._roles import assign
from merge_avg.errors import MergeError
from merge_avg.formats import scan


def weights(value, tmp_path, key=None):
    torch.save(value, tmp_path / "a.pt")
    return sorted(str(name) for name in assign(scan(tmp_path / "a.pt"), key).weights)


W = {"w": torch.ones(2)}
STATE = {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(2)}}


@pytest.mark.parametrize(
    ("value", "names"),
    [
        (W, ["w"]),
        ({"state_dict": W, "epoch": 3}, ["state_dict.w"]),
        ({"state_dict": W, "state_dict_ema": W}, ["state_dict.w", "state_dict_ema.w"]),
        ({"state_dict": W, "current_model_state": W}, ["current_model_state.w", "state_dict.w"]),
        ({"netG": W, "netD": W, "optG": {"state": STATE}}, ["netD.w", "netG.w"]),
        ([W, W], ["0.w", "1.w"]),
        ({"a": {"b": {"model": W}}}, ["a.b.model.w"]),
        ({"model": W, "optimizer": {"state": STATE, "param_groups": []}}, ["model.w"]),
        ({"model": W, "x": {"state": STATE, "param_groups": []}}, ["model.w"]),
        ({"model": W, "optimizer_states": [{"state": STATE}]}, ["model.w"]),
        ({"model": W, "lr_scheduler": {"base": torch.ones(1)}}, ["model.w"]),
        ({"model": W, "callbacks": {"EarlyStopping": {"best": torch.ones(())}}}, ["model.w"]),
        ({"model": W, "loops": {"fit": {"state": torch.ones(1)}}}, ["model.w"]),
        ({"model": W, "rng_state": torch.get_rng_state()}, ["model.w"]),
        ({"model": W, "rng_states": {"cpu": torch.get_rng_state()}}, ["model.w"]),
        (
            {"time_embed": W, "logit_head": W, "best_model": W},
            ["best_model.w", "logit_head.w", "time_embed.w"],
        ),
        ({"opt": {"state": STATE, "param_groups": []}, "model": W}, ["model.w"]),
        ({"model": W, "loss": torch.tensor(0.5), "best_loss": torch.ones(1)}, ["model.w"]),
        ({"model": W, "hyper_parameters": {"class_weight": torch.ones(3)}}, ["model.w"]),
        ({"module": W, "optimizer": None, "ds_version": "0.19"}, ["module.w"]),
        (
            {"optimizer_state_dict": {"single_partition_of_fp32_groups": [torch.ones(3)]}},
            ["optimizer_state_dict.single_partition_of_fp32_groups.0"],
        ),
    ],
)
def test_what_counts_as_weights(tmp_path, value, names):
    """Every state dict counts, and nothing that an optimizer, a schedule or a loop keeps."""
    assert weights(value, tmp_path) == names


def test_a_key_takes_one_state_dict(tmp_path):
    """--key names a state dict at any depth; an unknown name is an error that lists them."""
    value = {"state_dict": W, "ema": {"model": {"v": torch.ones(1)}}}
    assert weights(value, tmp_path, "ema.model") == ["ema.model.v"]
    assert weights(value, tmp_path, "ema") == ["ema.model.v"]
    with pytest.raises(MergeError, match="no state dict 'model'") as caught:
        weights(value, tmp_path, "model")
    assert "'ema.model', 'state_dict'" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"optimizer": {"state": STATE}}, "no weights, only 'optimizer'"),
        ({"state": STATE, "param_groups": []}, "an optimizer's state and no weights"),
        ({"epoch": 3}, "no tensors"),
        ({"w": np.ones(2), "b": np.ones(1)}, r"weights are NumPy arrays \('w' and 1 more\)"),
        ({"w": np.ones(2), "optimizer": {"state": STATE}}, r"NumPy arrays \('w'\), not tensors"),
        ({"loss": np.ones(2)}, "no tensors"),
        ({1: torch.ones(1), "1": torch.ones(1)}, "two tensors are called '1'"),
    ],
)
def test_no_weights_is_an_error(tmp_path, value, says):
    """A file without weights is refused by what it holds instead."""
    with pytest.raises(MergeError, match=says):
        weights(value, tmp_path)


def test_each_state_dict_is_averaged_with_its_namesake(tmp_path):
    """Two state dicts of one file are averaged apart, in a file of the same form."""
    for fold in range(2):
        raw, ema = {"w": torch.full((2,), 1.0 * fold)}, {"w": torch.full((2,), 10.0 * fold)}
        torch.save({"state_dict": raw, "state_dict_ema": ema}, tmp_path / f"{fold}.pt")
    merge_checkpoints([tmp_path / "0.pt", tmp_path / "1.pt"], tmp_path / "out.pt")
    merged = torch.load(tmp_path / "out.pt")
    assert merged["state_dict"]["w"].tolist() == [0.5, 0.5]
    assert merged["state_dict_ema"]["w"].tolist() == [5, 5]


def test_bytes_kept_are_those_of_each_file(tmp_path):
    """Storages count once, by the file that they lie in; those of several parts by all of them."""
    dtype = BY_NAME["float32"]
    storages = [Storage("a", 64, 8, file=number) for number in (0, 1)]
    storages += [Storage("whole", 0, 24, parts=(Storage("b", 0, 16, file=2), storages[0]))]
    paths = [("optimizer", k) for k in range(4)]
    tensors = [
        TensorInfo(path, dtype, (2,), (1,), 0, storage)
        for path, storage in zip(paths, [*storages, storages[1]], strict=True)
    ]
    weight = TensorInfo(("w",), dtype, (2,), (1,), 0, Storage("w", 0, 8, file=3))
    (kept,) = assign(Layout(tmp_path, "directory", (), (weight, *tensors))).kept
    assert (kept.tensors, kept.nbytes) == (4, 8 + 8 + 16)
