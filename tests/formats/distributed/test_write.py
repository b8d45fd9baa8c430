"""merge_avg.formats.distributed.write: sets of chunks, written anew."""

import itertools
import math
import os
import pickle
import socket

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from merge_avg import verify_output
from merge_avg.formats import scan
from merge_avg.formats.distributed.write import runs
from tests.helpers import merge_checkpoints
from tests.older import TORCH

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled", "ignore::UserWarning"
)
OPTIONS = {
    "weights": {"weights_only": True},
    "halved": {"dtype": "bfloat16"},
    "both": {"weights_only": True, "dtype": "float16"},
    "cut": {"max_shard_size": 5000},
    "all": {"weights_only": True, "dtype": "float64", "max_shard_size": 5000},
}


def state(fold):
    """A model and what a training loop keeps beside it."""
    generator = torch.Generator().manual_seed(fold)
    weights = {
        "w": torch.randn(70, 50, generator=generator),
        "odd": torch.randn(7, 3, generator=generator).t(),
        "long": torch.randn(1, 2, 4000, generator=generator),
        "count": torch.tensor(3),
        "b": torch.randn((), generator=generator),
        "none": torch.zeros(0, 3),
        "extra._extra_state": {"amax": 1.5},
    }
    slots = {"exp_avg": torch.randn(70, 50, generator=generator), "step": torch.tensor(1.0)}
    optimizer = {"state": {"w": slots}, "param_groups": [{"lr": 0.1, "params": ["w"]}]}
    beside = {"lr_scheduler": {"last_epoch": fold}, "epoch": fold}
    return {"model": weights, "optimizer": optimizer, **beside}


@pytest.fixture
def folds(tmp_path):
    paths = [tmp_path / f"step-{fold}" for fold in range(3)]
    for fold, path in enumerate(paths):
        dcp.save(state(fold), checkpoint_id=path, no_dist=True)
    return paths


def whole(path):
    """What torch itself reads from a directory."""
    out = path.parent / f"{path.name}.loaded.pt"
    dcp_to_torch_save(path, out)
    return torch.load(out, weights_only=False)


@pytest.mark.parametrize("asked", OPTIONS.values(), ids=OPTIONS)
def test_torch_reads_what_is_written_anew(folds, tmp_path, asked):
    """The weights are the mean, the optimizer is there or not, and dcp.load finds every chunk."""
    merge_checkpoints(folds, tmp_path / "out", template=2, **asked)
    found, states = whole(tmp_path / "out"), [state(fold) for fold in range(3)]
    dtype = getattr(torch, asked.get("dtype", "float32"))
    for key in ("w", "odd", "long", "b"):
        mean = sum(one["model"][key].double() for one in states) / 3
        assert torch.equal(found["model"][key], mean.to(dtype)), key
    assert found["model"]["count"].item() == 3
    assert found["model"]["none"].dtype == dtype
    assert found["model"]["extra._extra_state"] == {"amax": 1.5}
    if asked.get("weights_only"):
        assert found.keys() == {"model"}
    else:
        assert found.keys() == states[0].keys()
        assert torch.equal(
            found["optimizer"]["state"]["w"]["exp_avg"],
            states[1]["optimizer"]["state"]["w"]["exp_avg"],
        )
        assert found["epoch"] == 1
    into = {"model": {"w": torch.zeros(70, 50, dtype=dtype), "odd": torch.zeros(3, 7, dtype=dtype)}}
    dcp.load(into, checkpoint_id=tmp_path / "out", no_dist=True)
    assert torch.equal(into["model"]["w"], found["model"]["w"])
    assert torch.equal(into["model"]["odd"], found["model"]["odd"])
    verify_output(tmp_path / "out")
    sizes = [path.stat().st_size for path in (tmp_path / "out").glob("*.distcp")]
    assert max(sizes) <= asked.get("max_shard_size", max(sizes))
    assert len(sizes) > 3 or "max_shard_size" not in asked


def test_what_is_read_again_is_the_same(folds, tmp_path):
    """A set written anew is an input like any other, to be written anew once more."""
    options = {"weights_only": True, "max_shard_size": 5000}
    merge_checkpoints(folds, tmp_path / "one", **options)
    merge_checkpoints([tmp_path / "one"] * 2, tmp_path / "two", allow_trivial=True, **options)
    names = sorted(path.name for path in (tmp_path / "one").glob("*.distcp"))
    assert names == sorted(path.name for path in (tmp_path / "two").glob("*.distcp"))
    for name in [*names, ".metadata"]:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_state_is_told_and_left_out(folds, tmp_path):
    """A note names the optimizer; what its loading would call is not called any more."""
    job = merge_checkpoints(folds, tmp_path / "out", weights_only=True).job
    assert "left out of distributed checkpoints: 'optimizer'" in job.notes
    assert (tmp_path / "out/__0_0.distcp").stat().st_size < 70_000


class Mine:
    """An object that a strict reader does not know."""


def test_a_loader_calls_no_more_of_what_is_left_out(tmp_path):
    """An object of training state is no reason to refuse the weights alone."""
    for fold in range(2):
        content = {"model": {"w": torch.ones(3) * fold}, "lr_scheduler": Mine()}
        dcp.save(content, checkpoint_id=tmp_path / f"{fold}", no_dist=True)
    options = {"weights_only": True, "strict_pickle": True}
    merge_checkpoints([tmp_path / "0", tmp_path / "1"], tmp_path / "out", **options)
    assert whole(tmp_path / "out")["model"]["w"].tolist() == [0.5] * 3


def test_nothing_to_leave_out_changes_nothing(tmp_path):
    """A set of weights alone is copied as it is, `.metadata` included."""
    for fold in range(2):
        content = {"model": {"w": torch.ones(3) * fold}}
        dcp.save(content, checkpoint_id=tmp_path / f"{fold}", no_dist=True)
    paths = [tmp_path / "0", tmp_path / "1"]
    merge_checkpoints(paths, tmp_path / "out", weights_only=True)
    assert (tmp_path / "out/.metadata").read_bytes() == (tmp_path / "0/.metadata").read_bytes()


def test_what_others_add_to_the_metadata_stays(folds, tmp_path):
    """Tables by name lose the names that are gone; plans of ranks, which no longer hold, go."""
    path = folds[0] / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    gone = "optimizer.state.w.exp_avg"
    metadata.mcore_data = {"model.w": {"shape": (70, 50)}, gone: {"shape": (70, 50)}}
    metadata.all_local_plans = [1]
    path.write_bytes(pickle.dumps(metadata))
    merge_checkpoints(folds, tmp_path / "out", weights_only=True, template=1)
    found = pickle.loads((tmp_path / "out/.metadata").read_bytes())
    assert found.mcore_data == {"model.w": {"shape": (70, 50)}}
    assert not hasattr(found, "all_local_plans")
    assert type(found.state_dict_metadata["model.w"].size) is torch.Size
    assert gone not in found.state_dict_metadata
    assert gone not in found.planner_data


def write_sharded(rank, world, port, folder):
    """What each rank does: FSDP2, and a tensor that is cut along its second dimension."""
    from torch.distributed.checkpoint.state_dict import get_state_dict
    from torch.distributed.device_mesh import init_device_mesh

    if TORCH >= (2, 6):
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor import Shard, distribute_tensor
    else:  # where they are prototypes
        from torch.distributed._composable.fsdp import fully_shard
        from torch.distributed._tensor import Shard, distribute_tensor

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    torch.manual_seed(world)
    model = nn.Sequential(nn.Linear(50, 70), nn.Linear(70, 3))
    columns = torch.randn(40, 60)
    if not rank:
        torch.save({**model.state_dict(), "columns": columns}, f"{folder}/full{world}.pt")
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 50)).sum().backward()
    weights, slots = get_state_dict(model, optimizer)
    weights = {name: value.detach().clone() for name, value in weights.items()}
    weights["columns"] = distribute_tensor(columns, mesh, [Shard(1)])
    dcp.save({"model": weights, "optimizer": slots}, checkpoint_id=f"{folder}/sharded{world}")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """Checkpoints of two ranks and of three."""
    folder = tmp_path_factory.mktemp("sharded")
    for world in (2, 3):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        torch.multiprocessing.spawn(write_sharded, (world, port, str(folder)), nprocs=world)
    return folder


@pytest.mark.large  # real ranks take a quarter of a minute to start
@pytest.mark.parametrize("template", [1, 2])
@pytest.mark.parametrize("asked", [{}, *OPTIONS.values()], ids=["plain", *OPTIONS])
def test_ranks_of_another_number(sharded, tmp_path, asked, template):
    """Sets of two ranks and of three give the mean of the whole, in chunks of the template's."""
    paths = [sharded / "sharded2", sharded / "sharded3"]
    merge_checkpoints(paths, tmp_path / "out", template=template, **asked)
    found = whole(tmp_path / "out")
    full = [torch.load(sharded / f"full{world}.pt") for world in (2, 3)]
    dtype = getattr(torch, asked.get("dtype", "float32"))
    for key, value in found["model"].items():
        assert torch.equal(value, ((full[0][key].double() + full[1][key]) / 2).to(dtype)), key
    assert len(found["model"]) == len(full[0])
    assert ("optimizer" in found) != asked.get("weights_only", False)
    into = {"model": {key: torch.zeros_like(value) for key, value in found["model"].items()}}
    dcp.load(into, checkpoint_id=tmp_path / "out", no_dist=True)
    assert all(torch.equal(into["model"][key], value) for key, value in found["model"].items())
    verify_output(tmp_path / "out", inputs=sharded)
    if "max_shard_size" not in asked:
        assert len([*(tmp_path / "out").glob("*.distcp")]) == template + 1


SHAPES = st.lists(st.integers(0, 6), max_size=4).map(tuple)


@given(shape=SHAPES, most=st.integers(1, 40))
def test_runs_lie_one_after_the_other(shape, most):
    """Boxes of a tensor have few enough elements, and in order make up all of it."""
    flat = torch.arange(math.prod(shape)).view(shape)
    parts = []
    for corner, extents in runs(shape, most):
        box = flat[tuple(slice(a, a + n) for a, n in zip(corner, extents, strict=True))]
        assert box.shape == extents
        assert box.numel() <= most
        parts.append(box.flatten())
    assert torch.equal(torch.cat(parts), flat.flatten())


def test_metadata_of_many_chunks_grows_little(tmp_path):
    """A pickle that is written again is hardly longer than the one that was read."""
    many = {f"layer{k}": torch.ones(4, 4) for k in range(300)}
    content = {"model": many, "optimizer": {"state": many, "param_groups": [1]}}
    for fold in range(2):
        dcp.save(content, checkpoint_id=tmp_path / f"{fold}", no_dist=True)
    paths = [tmp_path / "0", tmp_path / "1"]
    merge_checkpoints(paths, tmp_path / "out", dtype="float16", allow_trivial=True)
    old, new = (
        path.stat().st_size for path in (tmp_path / "0/.metadata", tmp_path / "out/.metadata")
    )
    assert new < 1.1 * old
    assert len(scan(tmp_path / "out").tensors) == 600
    assert {*itertools.chain(whole(tmp_path / "out")["model"])} == many.keys()
