"""merge_avg.plan._masters: the float32 copies of weights that an optimizer keeps."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp

from merge_avg import merge_checkpoints
from merge_avg.checkpoint import BY_NAME, Name, Storage, TensorInfo
from merge_avg.formats import scan
from merge_avg.options import Options
from merge_avg.plan import prepare, roles_of
from merge_avg.plan._masters import _first
from tests.helpers import noise, same_bits

DTYPES = [torch.bfloat16, torch.float16]


def values(seed, dtype):
    """Return two masters, their weights, and moments."""
    masters = [noise(seed, 4, 3), noise(seed + 1, 3)]
    return masters, [one.to(dtype) for one in masters], [one * 0.01 for one in masters]


def apex(seed, dtype):
    """Megatron-LM's Float16OptimizerWithFloat16Params, and Apex: a list for each group."""
    masters, (w, b), moments = values(seed, dtype)
    state = {k: {"exp_avg": m, "exp_avg_sq": m * m} for k, m in enumerate(moments)}
    optimizer = {"optimizer": {"state": state, "param_groups": []}}
    optimizer["fp32_from_fp16_params"] = [[one.clone() for one in masters]]
    return {"model": {"w": w, "b": b}, "optimizer": optimizer}


def fused(seed, dtype):
    """TransformerEngine's FusedAdam: a slot of each parameter."""
    masters, (w, b), moments = values(seed, dtype)
    state = {
        k: {"exp_avg": moment, "master_param": master.clone()}
        for k, (moment, master) in enumerate(zip(moments, masters, strict=True))
    }
    return {"model": {"w": w, "b": b}, "opt": {"state": state, "param_groups": []}}


def named(seed, dtype):
    """megatron-core: flat names that end in those of the weights."""
    (w32, b32), (w, b), (w_avg, b_avg) = values(seed, dtype)
    slots = {"fp32_param.w": w32, "fp32_param.b": b32, "exp_avg.w": w_avg, "exp_avg.b": b_avg}
    return {"w": w, "b": b} | {f"optimizer.state.{name}": one for name, one in slots.items()}


def flat(value, path=()):
    """Return the tensors of a tree by their paths."""
    if isinstance(value, torch.Tensor):
        return {path: value}
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    return {at: one for key, child in pairs for at, one in flat(child, (*path, key)).items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("write", [apex, fused, named])
def test_masters_are_averaged_and_moments_are_kept(tmp_path, write, dtype):
    """Each master is the mean of the masters, in float32, however the optimizer keeps them."""
    trees = [write(seed, dtype) for seed in (1, 7)]
    for number, tree in enumerate(trees):
        torch.save(tree, tmp_path / f"{number}.pt")
    merge_checkpoints([tmp_path / "0.pt", tmp_path / "1.pt"], tmp_path / "out.pt")
    first, second = map(flat, trees)
    for path, found in flat(torch.load(tmp_path / "out.pt")).items():
        kept = "exp_avg" in str(path)
        mean = ((first[path].double() + second[path].double()) / 2).to(first[path].dtype)
        assert same_bits(found, first[path] if kept else mean), path


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_distributed_checkpoint_has_them_too(tmp_path):
    """Names of torch.distributed.checkpoint hold those of the weights."""
    for seed in (1, 7):
        dcp.save(named(seed, torch.bfloat16), checkpoint_id=tmp_path / str(seed), no_dist=True)
    job = prepare([tmp_path / "1", tmp_path / "7"], tmp_path / "out", Options())
    assert {"w", "b"} | {f"fp32_param.{n}" for n in "wb"} == {
        str(name).removeprefix("optimizer.state.") for name in job.plan.aligned.rows
    }
    assert any("the float32 copies" in note for note in job.notes)


@pytest.fixture
def pair(tmp_path):
    """Write two checkpoints of Megatron-LM's form."""
    paths = [tmp_path / f"{seed}.pt" for seed in (1, 7)]
    for seed, path in zip((1, 7), paths, strict=True):
        torch.save(apex(seed, torch.bfloat16), path)
    return paths


def test_a_dtype_is_not_asked_of_masters(tmp_path, pair):
    """--dtype converts the weights: an optimizer goes on with float32."""
    merge_checkpoints(pair, tmp_path / "out.pt", dtype="float16")
    found, inputs = torch.load(tmp_path / "out.pt"), list(map(torch.load, pair))
    assert found["model"]["w"].dtype == torch.float16
    master, *both = (one["optimizer"]["fp32_from_fp16_params"][0][0] for one in (found, *inputs))
    assert same_bits(master, (torch.stack(both).double().mean(dim=0)).float())


def test_a_new_file_has_no_masters(tmp_path, pair):
    """A bare state dict is the weights alone."""
    merge_checkpoints(pair, tmp_path / "out.pt", state_dict=True)
    assert set(torch.load(tmp_path / "out.pt")) == {"w", "b"}


def test_a_master_goes_with_its_weight(tmp_path, pair):
    """What is not to be averaged has masters that are not, whatever they are called."""
    merge_checkpoints(pair, tmp_path / "out.pt", exclude=["b"])
    found, ours = torch.load(tmp_path / "out.pt"), torch.load(pair[0])
    masters = [one["optimizer"]["fp32_from_fp16_params"][0] for one in (found, ours)]
    assert not torch.equal(masters[0][0], masters[1][0])
    assert torch.equal(masters[0][1], masters[1][1])


def test_they_are_kept_where_a_checkpoint_has_none(tmp_path, pair):
    """A bare state dict can still be averaged with a whole checkpoint."""
    torch.save(torch.load(pair[1])["model"], pair[1])
    assert not roles_of([scan(path) for path in pair])[1]
    merge_checkpoints(pair, tmp_path / "out.pt")
    found, ours = torch.load(tmp_path / "out.pt"), torch.load(pair[0])
    assert torch.equal(*(one["optimizer"]["fp32_from_fp16_params"][0][0] for one in (found, ours)))


def test_zeros_say_nothing(tmp_path):
    """A zero bias has a zero master, found by the others of its group; zero moments are none."""
    masters = [noise(1, 4, 3), torch.zeros(3)]
    w, b = (one.bfloat16() for one in masters)
    groups = {"fp32": [masters], "zeros": [[torch.zeros(4, 3), torch.zeros(3)]]}
    torch.save({"model": {"w": w, "b": b}, "optimizer": groups}, tmp_path / "a.pt")
    masters = roles_of([scan(tmp_path / "a.pt")])[1]
    assert masters == {
        Name(("optimizer", "fp32", 0), "0"): Name(("model",), "w"),
        Name(("optimizer", "fp32", 0), "1"): None,
    }


@pytest.mark.parametrize("module", ["", "layer.0."])
def test_flat_names_of_a_slot_belong_together(tmp_path, module):
    """A zero master is found by the others whose names end in those of weights too."""
    values = {f"{module}w": noise(1, 4, 3), f"{module}b": torch.zeros(3)}
    weights = {key: one.bfloat16() for key, one in values.items()}
    slots = {f"optimizer.state.fp32_param.{key}": one for key, one in values.items()}
    torch.save(weights | slots, tmp_path / "a.pt")
    assert {str(name) for name in roles_of([scan(tmp_path / "a.pt")])[1]} == {*slots}


def test_a_state_dict_that_is_chosen_has_no_masters(pair):
    """Whoever names one wants nothing else."""
    assert not roles_of([scan(path) for path in pair], "model")[1]


def test_masters_may_share_a_storage(tmp_path):
    """Each is read from where it begins, as optimizers keep them all in one piece of memory."""
    flat = noise(1, 15)
    masters = [flat[:12].view(4, 3), flat[12:]]
    w, b = (one.half() for one in masters)
    torch.save({"model": {"w": w, "b": b}, "optimizer": {"fp32": masters}}, tmp_path / "a.pt")
    found = roles_of([scan(tmp_path / "a.pt")])[1]
    assert [str(weight) for weight in found.values()] == ["model.w", "model.b"]


@pytest.mark.parametrize(("extent", "count"), [(1, 1), (2, 0)])
def test_a_row_of_one_element_has_no_steps(tmp_path, extent, count):
    """Its step is of no matter; that of two has to be one."""
    w = noise(1, extent, 3).T
    torch.save({"model": {"w": w.half()}, "optimizer": {"fp32": [w]}}, tmp_path / "a.pt")
    assert len(roles_of([scan(tmp_path / "a.pt")])[1]) == count


def test_the_first_elements_are_those_of_the_first_tile():
    """The tiles of a tensor may come in any order; a row that two storages hold is not read."""
    dtype, seen = BY_NAME["float32"], []
    corner = TensorInfo(("w",), dtype, (2, 2), (2, 1), 1, Storage("a", 0, 32))
    tiles = tuple(((0, at), replace(corner, start=3 - at)) for at in (2, 0))
    whole = Storage("w", 0, 32, tiles=tiles)
    reader = SimpleNamespace(read=lambda into, storage, at, again: seen.append((len(into), at)))
    assert _first(reader, TensorInfo(("w",), dtype, (2, 4), (4, 1), 0, whole), "float32") == ()
    assert _first(reader, TensorInfo(("w",), dtype, (4, 2), (2, 1), 0, whole), "float32") == (0, 0)
    assert seen == [(8, 12)]
    for storage in (
        Storage("w", 0, 16, parts=(Storage("a", 0, 12), Storage("b", 0, 4))),
        Storage("w", 0, 16, packed=9),
    ):
        info = TensorInfo(("w",), dtype, (4,), (1,), 0, storage)
        assert _first(None, info, "float32") == ()


@pytest.mark.parametrize(("name", "found"), [("fp32_param", True), ("slow", False)])
def test_copies_of_float32_weights_need_a_name(tmp_path, name, found):
    """Equal values of the same dtype may be chance, as those of a slow average at its start."""
    w = noise(1, 4, 3)
    state = {0: {"exp_avg": w.clone(), name: w.clone()}}
    torch.save({"m": {"w": w}, "opt": {"state": state, "param_groups": []}}, tmp_path / "a.pt")
    masters = roles_of([scan(tmp_path / "a.pt")])[1]
    assert list(map(str, masters)) == [f"opt.state.0.{name}"] * found


def test_moments_are_none_even_where_they_are_equal(tmp_path):
    """The slots of torch.optim have names of their own."""
    w = noise(1, 4, 3)
    state = {0: {"exp_avg": w.clone(), "momentum_buffer": w.clone()}}
    value = {"m": {"w": w.bfloat16()}, "opt": {"state": state, "param_groups": []}}
    torch.save(value, tmp_path / "a.pt")
    assert not roles_of([scan(tmp_path / "a.pt")])[1]


def test_what_is_hard_to_read_is_no_master(tmp_path):
    """A transposed copy, or one of another shape, is kept."""
    w = noise(1, 4, 4)
    groups = {"a": [w.T], "b": [noise(1, 4, 4), noise(1, 2)], "c": [w.double()]}
    groups["d"] = [noise(1, 4, 4), torch.zeros(2)]
    torch.save({"model": {"w": w.bfloat16()}, "optimizer": groups}, tmp_path / "a.pt")
    assert not roles_of([scan(tmp_path / "a.pt")])[1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_masters_round_as_torch_does(tmp_path, dtype):
    """Halves of a step go to the even neighbor, large values to infinity, in both dtypes."""
    special = [1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11, 65519.0, 1e-7, -0.0, -1e-40]
    w = torch.tensor([*special, 65520.0, 3e38, -3e38])
    if dtype == torch.float16:
        w = w[:8]  # infinite weights cannot be averaged
    value = {"model": {"w": w.to(dtype)}, "optimizer": {"master": [w]}}
    torch.save(value, tmp_path / "a.pt")
    assert len(roles_of([scan(tmp_path / "a.pt")])[1]) == 1
