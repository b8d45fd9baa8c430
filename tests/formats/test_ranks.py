"""merge_avg.formats.ranks: files of all ranks are one checkpoint, and that of one rank is none."""

import json
import os
import shutil
import socket
from pathlib import Path

import pytest
import torch
from torch import nn

from merge_avg import inspect_checkpoints, verify_output
from merge_avg.errors import MergeError
from merge_avg.formats import scan
from tests.helpers import merge_checkpoints, run_command
from tests.older import TORCH

pytestmark = [
    pytest.mark.large,  # real ranks take half a minute to start
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning"),
    pytest.mark.skipif(TORCH < (2, 6), reason="FSDP2 is a prototype there"),
]
# A mesh of ranks: one dimension that cuts, or one that replicates and one that cuts.
MESHES = {"two": (2,), "three": (3,), "hybrid": (2, 2)}


def network(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 2), nn.LayerNorm(3))
    model.register_buffer("scale", torch.full((3,), 1.0 * seed))
    return model


def write(rank, port, folder, shape):
    """What each rank does: FSDP2 and FSDP1 on a mesh, and a tensor that is cut into columns."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType, fully_shard
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    world = shape[0] * shape[-1] if len(shape) > 1 else shape[0]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicas", "parts")[-len(shape) :])
    around = [Replicate()] * (len(shape) - 1)
    for seed in (1, 2):
        model = network(seed)
        columns = torch.randn(4, 6)
        if not rank:
            torch.save({**model.state_dict(), "columns": columns}, f"{folder}/full{seed}.pt")
        fully_shard(model, mesh=mesh)
        states = {"fsdp2": model.state_dict()}
        if len(shape) == 1:
            where = {"device_mesh": mesh, "device_id": torch.device("cpu")}
            wrapped = FullyShardedDataParallel(network(seed), use_orig_params=True, **where)
            with FullyShardedDataParallel.state_dict_type(
                wrapped, StateDictType.SHARDED_STATE_DICT
            ):
                states["fsdp1"] = wrapped.state_dict()
        for kind, state in states.items():
            state["columns"] = distribute_tensor(columns, mesh, [*around, Shard(1)])
            place = f"{folder}/{kind}/global_step_{seed}"
            Path(place).mkdir(parents=True, exist_ok=True)
            torch.save(state, f"{place}/model_world_size_{world}_rank_{rank}.pt")
            extra = {"rng": {"cpu": torch.get_rng_state()}, "lr_scheduler": {"last": seed}}
            torch.save(extra, f"{place}/extra_state_world_size_{world}_rank_{rank}.pt")
            slots = {0: {"exp_avg": state["0.weight"], "step": torch.tensor(1.0)}}
            slots = {"state": slots, "param_groups": [{"lr": 0.1}]}
            torch.save(slots, f"{place}/optim_world_size_{world}_rank_{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def meshes(tmp_path_factory):
    """A folder of runs for each mesh."""
    folder = tmp_path_factory.mktemp("ranks")
    for name, shape in MESHES.items():
        (folder / name).mkdir()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        count = shape[0] * shape[-1] if len(shape) > 1 else shape[0]
        torch.multiprocessing.spawn(write, (port, str(folder / name), shape), nprocs=count)
    return folder


KINDS = ["two/fsdp1", "two/fsdp2", "three/fsdp1", "three/fsdp2", "hybrid/fsdp2"]


def means(folder):
    full = [torch.load(folder / f"full{seed}.pt") for seed in (1, 2)]
    return {key: ((full[0][key].double() + full[1][key]) / 2).float() for key in full[0]}


def together(folder, world, dims):
    """Gather what ranks hold by hand, from the parts that torch loads."""
    ranks = [
        torch.load(folder / f"model_world_size_{world}_rank_{rank}.pt", weights_only=False)
        for rank in range(world)
    ]
    found = {}
    for key, value in ranks[0].items():
        if not hasattr(value, "to_local"):
            assert all(torch.equal(one[key], value) for one in ranks)
            found[key] = value
            continue
        parts = {}
        for one in ranks:
            at = one[key].device_mesh.get_coordinate()[-1]
            local = one[key].to_local()
            assert torch.equal(parts.setdefault(at, local), local)
        assert len(parts) == dims
        found[key] = torch.cat([parts[at] for at in sorted(parts)], one[key].placements[-1].dim)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_all_ranks_are_averaged(meshes, tmp_path, kind):
    """The mean goes into each rank's file, also into replicas, and into one file."""
    run = meshes / kind
    paths, shape = [run / f"global_step_{seed}" for seed in (1, 2)], MESHES[kind.partition("/")[0]]
    want, world = means(run.parent), len([*paths[0].glob("model*")])
    merge_checkpoints(paths, tmp_path / "out")
    verify_output(tmp_path / "out", inputs=run)
    found = together(tmp_path / "out", world, shape[-1])
    assert {key: torch.equal(found[key], value) for key, value in want.items()} == dict.fromkeys(
        want, True
    )
    for name in ("extra_state", "optim"):
        for old in paths[1].glob(f"{name}*"):
            assert (tmp_path / "out" / old.name).read_bytes() == old.read_bytes()
    merge_checkpoints(paths, tmp_path / "one.pt")
    one = torch.load(tmp_path / "one.pt")
    assert one.keys() == want.keys()
    assert all(torch.equal(one[key], value) for key, value in want.items())
    verify_output(tmp_path / "one.pt", inputs=run)


def test_ranks_of_another_number(meshes, tmp_path):
    """Two ranks and three, DTensors or a whole file: they are the same names and shapes."""
    folders = [meshes / "two/fsdp1/global_step_1", meshes / "three/fsdp2/global_step_2"]
    merge_checkpoints(folders, tmp_path / "out", template=2)
    found, want = together(tmp_path / "out", 3, 3), means(meshes / "two")
    assert all(torch.equal(found[key], value) for key, value in want.items())
    merge_checkpoints([folders[0], meshes / "two/full2.pt"], tmp_path / "mixed.pt")
    mixed = torch.load(tmp_path / "mixed.pt")
    assert all(torch.equal(mixed[key], value) for key, value in want.items())


def test_weights_only_of_all_ranks(meshes, tmp_path):
    """Optimizer and extra state are left out, and every rank's file stays."""
    run = meshes / "two/fsdp1"
    merge_checkpoints(sorted(run.iterdir()), tmp_path / "out", weights_only=True)
    names = {path.name for path in (tmp_path / "out").iterdir()} - {"merge_avg.json"}
    assert names == {f"model_world_size_2_rank_{rank}.pt" for rank in (0, 1)}
    merge_checkpoints(sorted(run.iterdir()), tmp_path / "shards", max_shard_size=1000)
    names = {path.suffix for path in (tmp_path / "shards").iterdir() if "model" in path.name}
    assert names == {".safetensors"}


def test_a_run_of_rank_files(meshes, tmp_path):
    """A run's folders are chosen by their steps; a dry run and JSON tell of it."""
    run = meshes / "two/fsdp1"
    done = run_command(run, "-o", tmp_path / "out.pt", "--last", 2, "--dry-run", "--json")
    assert {one["step"] for one in json.loads(done.stdout)["inputs"]} == {1, 2}
    assert not (tmp_path / "out.pt").exists()
    (found,) = inspect_checkpoints([run / "global_step_1"])
    assert {one.name for one in found.tensors if one.role == "averaged"} >= {
        "model.0.weight",
        "model.columns",
    }


def test_a_rank_that_is_missing_is_named(meshes, tmp_path):
    """Neither one rank alone nor a set with a gap is averaged; the error says which is missing."""
    shutil.copytree(meshes / "three/fsdp1/global_step_1", tmp_path / "x")
    with pytest.raises(MergeError, match="one rank's parts"):
        scan(tmp_path / "x/model_world_size_3_rank_1.pt")
    for rank in (2, 0):
        (tmp_path / f"x/model_world_size_3_rank_{rank}.pt").unlink()
        with pytest.raises(MergeError, match=rf"rank {rank} \(model_world_size_3_rank_{rank}"):
            scan(tmp_path / "x")
    (tmp_path / "x/model_world_size_3_rank_1.pt").rename(tmp_path / "x/model.pt")
    with pytest.raises(MergeError, match="one rank's parts"):
        scan(tmp_path / "x")


def test_another_dtype_needs_one_file(meshes, tmp_path):
    """A copy says what dtype its DTensors have; the way out is named, and works."""
    paths = sorted((meshes / "two/fsdp1").iterdir())
    with pytest.raises(MergeError, match="another dtype in a copy") as caught:
        merge_checkpoints(paths, tmp_path / "out", dtype="bfloat16")
    assert ".safetensors" in str(caught.value.hint)
    merge_checkpoints(paths, tmp_path / "out.pt", dtype="bfloat16")
    assert torch.load(tmp_path / "out.pt")["0.weight"].dtype == torch.bfloat16


def test_ranks_that_differ_where_they_should_not(meshes, tmp_path):
    """A plain tensor of which ranks have different values is no tensor of all of them."""
    shutil.copytree(meshes / "two/fsdp1/global_step_1", tmp_path / "x")
    path = tmp_path / "x/model_world_size_2_rank_1.pt"
    state = torch.load(path, weights_only=False)
    torch.save({**state, "scale": state["scale"] + 1}, path)
    with pytest.raises(MergeError, match="'scale' should be the same in several ranks"):
        scan(tmp_path / "x")
    torch.save({key: value for key, value in state.items() if key != "scale"}, path)
    with pytest.raises(MergeError, match="do not hold the same tensors: 'scale'"):
        scan(tmp_path / "x")
    shutil.copy(tmp_path / "x/model_world_size_2_rank_0.pt", path)
    with pytest.raises(MergeError, match=r"do not make up|should be the same"):
        scan(tmp_path / "x")
