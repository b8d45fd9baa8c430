"""merge_avg.formats.distributed: directories of torch.distributed.checkpoint are read, not run."""

import itertools
import os
import pickle
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from merge_avg.errors import MergeError
from merge_avg.formats import scan
from merge_avg.formats.tiles import tile
from tests.helpers import merge_checkpoints
from tests.older import TORCH, has

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled", "ignore::UserWarning"
)


def state(fold):
    generator = torch.Generator().manual_seed(fold)
    weights = {
        "w": torch.randn(40, 6, generator=generator),
        "odd": torch.randn(7, 3, generator=generator).t(),
        "count": torch.tensor(fold),
        "b": torch.randn((), generator=generator),
        "none": torch.zeros(0, 3),
    }
    optimizer = {"state": {"w": {"exp_avg": torch.full((3,), 1.0 * fold)}}, "lr": 0.1}
    return {"model": weights, "optimizer": optimizer, "epoch": fold}


def loaded(path):
    """What torch itself reads from a directory."""
    out = path.parent / f"{path.name}.loaded.pt"
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(path, out)
    return torch.load(out, weights_only=False)


@pytest.fixture
def folds(tmp_path):
    paths = [tmp_path / f"step-{fold}" for fold in range(3)]
    for fold, path in enumerate(paths):
        dcp.save(state(fold), checkpoint_id=path, no_dist=True)
    return paths


def expected(key, states):
    return (sum(one["model"][key].double() for one in states) / len(states)).float()


def test_into_a_directory_again(folds, tmp_path):
    """The mean is a directory that torch reads, with optimizer and objects of the template."""
    merge_checkpoints(folds, tmp_path / "out", template=1)
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == [".metadata", "__0_0.distcp", "merge_avg.json"]
    merged = loaded(tmp_path / "out")
    for key in ("w", "odd", "b"):
        assert torch.equal(merged["model"][key], expected(key, [state(i) for i in range(3)]))
    assert merged["model"]["count"].item() == 0
    assert merged["epoch"] == 0
    assert merged["optimizer"]["state"]["w"]["exp_avg"].tolist() == [0, 0, 0]


def test_into_one_file(folds, tmp_path):
    """The weights alone become a state dict, as .pt and as .safetensors."""
    merge_checkpoints(folds, tmp_path / "out.pt")
    merge_checkpoints(folds, tmp_path / "out.safetensors")
    for merged in (torch.load(tmp_path / "out.pt"), load_file(tmp_path / "out.safetensors")):
        assert set(merged) == {"w", "odd", "count", "b", "none"}
        assert torch.equal(merged["odd"], expected("odd", [state(i) for i in range(3)]))


def test_with_a_file_beside_it(folds, tmp_path):
    """A directory and a plain state dict of the same names average together."""
    torch.save(state(7)["model"], tmp_path / "a.pt")
    merge_checkpoints([folds[0], tmp_path / "a.pt"], tmp_path / "out.pt")
    merged = torch.load(tmp_path / "out.pt")
    assert torch.equal(merged["w"], expected("w", [state(0), state(7)]))


def write_sharded(rank, port, folder):
    """What each of two ranks does: FSDP2, and a tensor that is cut along its second dimension."""
    from torch.distributed.device_mesh import init_device_mesh

    if TORCH >= (2, 6):
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor import Shard, distribute_tensor
    else:  # where they are prototypes
        from torch.distributed._composable.fsdp import fully_shard
        from torch.distributed._tensor import Shard, distribute_tensor

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for fold in range(2):
        torch.manual_seed(fold)
        model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
        columns = torch.randn(4, 6)
        torch.save({**model.state_dict(), "columns": columns}, f"{folder}/full{fold}.pt")
        fully_shard(model, mesh=mesh)
        weights = model.state_dict() | {"columns": distribute_tensor(columns, mesh, [Shard(1)])}
        dcp.save({"model": weights}, checkpoint_id=f"{folder}/sharded{fold}")
    torch.save(model.state_dict(), f"{folder}/rank{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(write_sharded, (port, str(folder)), nprocs=2)
    return folder


def test_several_ranks(sharded, tmp_path):
    """FSDP2's rows and a tensor cut into columns, over two ranks, give the mean of the whole."""
    folds = [sharded / "sharded0", sharded / "sharded1"]
    full = [torch.load(sharded / f"full{fold}.pt") for fold in range(2)]
    merge_checkpoints(folds, tmp_path / "out")
    merge_checkpoints(folds, tmp_path / "out.pt")
    merge_checkpoints([sharded / "full0.pt", folds[1]], tmp_path / "mixed.pt")
    results = [loaded(tmp_path / "out")["model"]]
    results += [torch.load(tmp_path / name) for name in ("out.pt", "mixed.pt")]
    assert len(list((tmp_path / "out").glob("*.distcp"))) == 2
    for merged in results:
        assert merged.keys() == full[0].keys()
        for key, value in merged.items():
            assert torch.equal(value, ((full[0][key].double() + full[1][key]) / 2).float()), key


@pytest.mark.parametrize(
    ("offsets", "size"),
    [
        (((0, 0), (0, 0)), (4, 6)),  # twice the same
        (((0, 0), (0, 2)), (4, 6)),  # they overlap, and leave a hole
        (((0, 0), (0, 3)), (3, 8)),  # they reach outside
        (((0, 0), (0, 3)), (4, 7)),  # too few
    ],
)
def test_chunks_have_to_make_up_the_tensor(sharded, tmp_path, offsets, size):
    """Chunks that overlap, leave holes or reach outside are refused, not read."""
    shutil.copytree(sharded / "sharded0", tmp_path / "x")
    path = tmp_path / "x" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    entry = metadata.state_dict_metadata["model.columns"]
    changed(entry, size=torch.Size(size))
    keys = [key for key in metadata.storage_data if key.fqn == "model.columns"]
    keys.sort(key=lambda key: key.offset)
    for chunk, key, offset in zip(entry.chunks, keys, offsets, strict=True):
        changed(chunk, offsets=torch.Size(offset))
        place = metadata.storage_data.pop(key)
        metadata.storage_data[type(key)(key.fqn, torch.Size(offset))] = place
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(MergeError, match="do not make up the tensor"):
        scan(tmp_path / "x")


def test_a_rank_file_is_no_checkpoint(sharded):
    """A state dict of distributed tensors that one rank saved is refused, with the way out."""
    with pytest.raises(MergeError, match="one rank's parts") as caught:
        scan(sharded / "rank0.pt")
    assert "full_state_dict=True" in str(caught.value.hint)


def test_missing_files_and_lies_are_named(folds, tmp_path):
    """A file that is not there, or cut short, is an error and nothing is written."""
    data = (folds[1] / "__0_0.distcp").read_bytes()
    (folds[1] / "__0_0.distcp").write_bytes(data[:-700])
    with pytest.raises(MergeError, match="is not where it should be"):
        merge_checkpoints(folds, tmp_path / "out")
    (folds[1] / "__0_0.distcp").unlink()
    with pytest.raises(MergeError, match=r"lacks the file '__0_0\.distcp'"):
        merge_checkpoints(folds, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_flipped_bit_is_found(folds, tmp_path):
    """Chunks carry checksums; damage in one is an error."""
    path = folds[2] / "__0_0.distcp"
    data = bytearray(path.read_bytes())
    at = data.find(state(2)["model"]["w"].numpy().tobytes())
    data[at + 5] ^= 1
    path.write_bytes(data)
    with pytest.raises(MergeError, match="does not match"):
        merge_checkpoints(folds, tmp_path / "out")


def test_the_metadata_is_not_run(folds, tmp_path):
    """A pickle in .metadata that would run a command is refused, and does not run."""
    evidence = tmp_path / "evidence"

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {evidence}",)

    (folds[0] / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(MergeError, match="would run code"):
        scan(folds[0])
    assert not evidence.exists()


def tensor(metadata):
    return metadata.state_dict_metadata["model.w"]


def changed(thing, **values):
    thing.__dict__.update(values)


def move(metadata, **where):
    for place in metadata.storage_data.values():
        vars(place).update(where)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: tensor(m).chunks.clear(),
        lambda m: tensor(m).chunks.append(tensor(m).chunks[0]),
        lambda m: changed(tensor(m), size=torch.Size((50, 6))),
        lambda m: changed(tensor(m), size=torch.Size((3, 6))),
        lambda m: changed(m, storage_data=None),
        lambda m: changed(m, storage_data={}),
        lambda m: changed(m, state_dict_metadata={"w": 3}),
        lambda m: changed(tensor(m), chunks=5),
        lambda m: changed(tensor(m), chunks=[5]),
        lambda m: move(m, offset=-1),
        lambda m: move(m, length=10**15),
        lambda m: move(m, offset=0),
    ],
)
def test_metadata_that_contradicts_itself_is_refused(folds, change):
    """Chunks that are missing, twice there, outside or of another size are an error of one line."""
    path = folds[0] / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(MergeError, match="step-0"):
        scan(folds[0])


def test_reading_needs_no_torch(folds, tmp_path):
    """A scan imports neither torch nor anything that the metadata names."""
    shutil.copytree(folds[0], tmp_path / "x")
    code = (
        "import sys; from merge_avg.formats import scan; "
        f"print(len(scan({str(tmp_path / 'x')!r}).tensors)); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["6", "False"]


def test_names_that_the_writer_flattened(tmp_path):
    """An optimizer's tensors are kept even where their names are one text with dots."""
    for fold in range(2):
        value = torch.full((3,), 1.0 * fold)
        flat = {"w": value, "optimizer.state.exp_avg.w": value}
        dcp.save(flat, checkpoint_id=tmp_path / f"{fold}", no_dist=True)
    merge_checkpoints([tmp_path / "0", tmp_path / "1"], tmp_path / "out")
    merged = loaded(tmp_path / "out")
    assert merged["w"].tolist() == [0.5] * 3
    assert merged["optimizer.state.exp_avg.w"].tolist() == [0] * 3


def cut(path, *chunks, dim=0):
    """Write a tensor w in chunks along a dimension, as several ranks do."""
    named = {f"part{number}": chunk for number, chunk in enumerate(chunks)}
    dcp.save(named, checkpoint_id=path, no_dist=True)
    metadata = pickle.loads((path / ".metadata").read_bytes())
    known, places, at = metadata.state_dict_metadata, {}, 0
    whole = known["part0"]
    pieces = [piece for name in named for piece in known[name].chunks]
    for piece, (name, chunk) in zip(pieces, named.items(), strict=True):
        key = next(key for key in metadata.storage_data if key.fqn == name)
        corner = torch.Size([at if one == dim else 0 for one in range(chunk.dim())])
        changed(piece, offsets=corner)
        places[type(key)("w", corner)] = metadata.storage_data[key]
        at += chunk.shape[dim]
    size = [at if one == dim else extent for one, extent in enumerate(chunks[0].shape)]
    changed(whole, size=torch.Size(size), chunks=pieces)
    changed(metadata, storage_data=places, state_dict_metadata={"w": whole}, planner_data={})
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


def test_a_checkpoint_with_tiles_may_be_given_twice(tmp_path):
    """Copies of tiles in the scratch file are read for each source that a window has of them."""
    whole = torch.arange(280.0).view(40, 7)
    other = whole.flip(0)
    for name, one in (("a", whole), ("b", other)):
        cut(tmp_path / name, one[:, :3].contiguous(), one[:, 3:].contiguous(), dim=1)
    for names, mean in (("aa", whole), ("aab", (2 * whole + other) / 3)):
        out = tmp_path / f"{names}.pt"
        merge_checkpoints([tmp_path / name for name in names], out, allow_trivial=True)
        assert torch.equal(torch.load(out)["w"], mean)


@has("float8_e8m0fnu")
@pytest.mark.parametrize("count", [1, 2])
def test_chunks_that_are_not_plain_numbers_are_refused(tmp_path, count):
    """Values whose sign is pending, and codes, are no numbers however many chunks there are."""
    plain = torch.tensor([1 + 2j, 3j])
    cut(tmp_path / "plain", *[plain] * count)
    merge_checkpoints([tmp_path / "plain"] * 2, tmp_path / "o.pt")
    assert torch.equal(torch.load(tmp_path / "o.pt")["w"], torch.cat([plain] * count))
    for name, last in (("lazy", plain.conj()), ("codes", torch.ones(2).to(torch.float8_e8m0fnu))):
        first = plain if name == "lazy" else last
        cut(tmp_path / name, *[first, last][-count:])
        with pytest.raises(MergeError, match=r"'w' is a .+ cannot be averaged"):
            merge_checkpoints([tmp_path / name] * 2, tmp_path / "o.pt")


@pytest.mark.parametrize(
    ("boxes", "fits"),
    [
        ([((0, 0), (2, 3)), ((2, 0), (1, 3))], True),
        ([((0, 0), (2, 3)), ((1, 0), (1, 3))], False),  # overlap, and a hole
        ([((0, 0), (2, 2)), ((0, 2), (2, 1)), ((2, 0), (1, 3))], True),
        ([((0, 0), (2, 2)), ((1, 1), (2, 2)), ((0, 2), (1, 1))], False),
        ([((0, 0), (3, 3))], True),
        ([((0, 0), (3, 3)), ((0, 0), (1, 1))], False),
        ([((0, 0), (3, 4))], False),  # reaches outside
        ([], False),
    ],
)
def test_boxes_that__tile(boxes, fits):
    """Boxes that overlap, leave a hole or reach outside are told from those that tile."""
    assert tile(boxes, (3, 3)) == fits


def test_any_way_of_cutting_is_a_tiling():
    """A thousand boxes of a grid tile it, and do not if one lacks or is there twice."""
    edges = [range(10)] * 3
    boxes = [((a, 2 * b, 3 * c), (1, 2, 3)) for a, b, c in itertools.product(*edges)]
    assert tile(boxes, (10, 20, 30))
    assert not tile(boxes[1:], (10, 20, 30))
    assert not tile([*boxes, boxes[0]], (10, 20, 30))
    assert not tile([*boxes[1:], boxes[1]], (10, 20, 30))


EXTENTS = st.tuples(st.integers(0, 3), st.integers(0, 3))


@given(
    boxes=st.lists(st.tuples(EXTENTS, st.tuples(st.integers(1, 3), st.integers(1, 3))), max_size=5),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3)),
)
def test_a_tiling_counts_each_element_once(boxes, shape):
    """The corners say what painting every box into a grid says."""
    grid = np.zeros((7, 7), int)
    for (row, column), (height, width) in boxes:
        grid[row : row + height, column : column + width] += 1
    inside = np.zeros((7, 7), int)
    inside[: shape[0], : shape[1]] = 1
    assert tile(boxes, shape) == bool((grid == inside).all())


def test_a_tensor_without_elements_has_no_boxes():
    """Nothing covers nothing; a box there is one too many, as is one of other dimensions."""
    assert tile([], (0, 3))
    assert not tile([((0, 0), (1, 1))], (0, 3))
    assert not tile([((0,), (3,))], (3, 1))


def test_a_tensor_that_is_cut_along_too_many_dimensions_is_refused():
    """A box of seven dimensions has 128 corners: nobody cuts like that."""
    halves = itertools.product((0, 1), repeat=7)
    assert not tile([(corner, (1,) * 7) for corner in halves], (2,) * 7)
