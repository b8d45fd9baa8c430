"""Averages that go into a model are those that a merge writes."""

import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

from merge_avg import MergeError, UsageError, load_average, merge_checkpoints


def network():
    """A model with a tied weight, counters, a transposed parameter and an empty one."""
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6), nn.Linear(6, 3))
    model[2].weight = model[0].weight
    model[3].weight = nn.Parameter(torch.randn(6, 3).t())
    model.empty = nn.Parameter(torch.zeros(0, 4))
    return model


@pytest.fixture
def paths(tmp_path):
    """Three checkpoints of such models."""
    found = []
    for seed in range(3):
        torch.manual_seed(seed)
        model = network()
        model(torch.randn(8, 6))
        found.append(tmp_path / f"fold{seed}.pt")
        torch.save({"state_dict": model.state_dict(), "fold": seed}, found[-1])
    return found


@pytest.mark.parametrize("weights", [None, [1, 2, 5]])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_model_gets_what_a_file_gets(tmp_path, paths, weights, dtype):
    """Bit for bit, whatever lies how in memory: parameters, buffers, tied ones and views."""
    merge_checkpoints(paths, tmp_path / "out.pt", weights=weights, dtype=dtype)
    expected = torch.load(tmp_path / "out.pt")["state_dict"]
    model = network() if dtype is None else network().bfloat16()
    for name, value in expected.items():
        model.get_parameter(name) if "weight" in name else None
        assert value.shape == model.state_dict()[name].shape
    tied = model[2].weight
    found = load_average(model, paths, weights=weights, dtype=dtype)
    assert (found.missing_keys, found.unexpected_keys) == ((), ())
    assert model[2].weight is model[0].weight is tied
    assert model[3].weight.stride() == (1, 3)
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name].to(value.dtype)), name
    assert found.result.agreement is not None
    assert "3 checkpoints averaged into a model" in repr(found)


def test_a_model_of_another_dtype_gets_the_average_rounded(paths):
    """Its tensors keep their dtype, and get the average as torch converts it."""
    single, double, half = network(), network().double(), network().half()
    for model in (single, double, half):
        load_average(model, paths)
    for name, value in single.state_dict().items():
        assert torch.equal(double.state_dict()[name], value.to(double.state_dict()[name].dtype))
        assert torch.equal(half.state_dict()[name], value.to(half.state_dict()[name].dtype))


def test_runs_and_patterns_are_chosen_as_for_a_merge(tmp_path, paths):
    """Keywords that choose and weigh checkpoints are those of a merge."""
    for step, path in enumerate(paths, 1):
        path.rename(tmp_path / f"step={step * 100}.pt")
    model, other = network(), network()
    load_average(model, tmp_path, last=2, weighting="linear")
    names = [tmp_path / "step=200.pt", tmp_path / "step=300.pt"]
    load_average(other, names, weights=[1, 2])
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])


def test_safetensors_and_directories_go_into_models(tmp_path, paths):
    """Every format that a merge reads does."""
    from safetensors.torch import save_file

    states = [torch.load(path)["state_dict"] for path in paths]
    folders = []
    for number, tied in enumerate(states):
        state = {name: value.clone().contiguous() for name, value in tied.items()}
        save_file(state, tmp_path / f"{number}.safetensors")
        folders.append(tmp_path / str(number))
        folders[-1].mkdir()
        save_file(state, folders[-1] / "model.safetensors")
    for found in ([tmp_path / f"{number}.safetensors" for number in range(3)], folders):
        model, expected = network(), network()
        load_average(model, found)
        load_average(expected, paths)
        for name, value in model.state_dict().items():
            assert torch.equal(value, expected.state_dict()[name])


def test_names_and_shapes_have_to_fit(paths):
    """Otherwise nothing is read, and the model stays as it is; names may differ if allowed to."""
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    more = nn.Sequential(*model, nn.Linear(2, 2))
    more.empty = model.empty
    with pytest.raises(MergeError, match=r"it lacks '4.weight' and 1 more, which the model has"):
        load_average(more, paths)
    with pytest.raises(MergeError, match=r"it has 'empty', which the model lacks") as caught:
        load_average(nn.Sequential(*model), paths)
    assert "strict=False" in caught.value.hint
    other = network()
    other[3] = nn.Linear(6, 4)
    with pytest.raises(MergeError, match=r"'3.weight' has the shape \(3, 6\), and \(4, 6\) in"):
        load_average(other, paths, strict=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    found = load_average(more, paths, strict=False)
    assert found.missing_keys == ("4.weight", "4.bias")
    assert "missing_keys: '4.weight', '4.bias'" in repr(found)
    assert load_average(nn.Sequential(*model), paths, strict=False).unexpected_keys == ("empty",)
    assert not torch.equal(model[0].weight, before["0.weight"])


def test_what_is_no_model_is_refused(paths):
    """A state dict, a model without memory and keywords of outputs are errors that say so."""
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, not dict"):
        load_average({}, paths)
    with torch.device("meta"):
        model = network()
    with pytest.raises(MergeError, match="has no plain data") as caught:
        load_average(model, paths)
    assert "to_empty" in caught.value.hint
    with pytest.raises(TypeError, match="there is no keyword 'prefixes'"):
        load_average(network(), paths, prefixes=True)
    with pytest.raises(UsageError, match="no weighting"):
        load_average(network(), paths, weighting="cosine")
    with pytest.raises(MergeError, match="it is the only checkpoint"):
        load_average(network(), paths[0])


def test_numbers_of_another_kind_and_shared_memory_are_refused(tmp_path):
    """What a tensor of the model cannot hold is not rounded away, nor is one of two lost."""
    for seed in range(2):
        values = {"a": torch.full((3, 3), seed + 0.5), "b": torch.full((3, 3), seed - 0.5)}
        torch.save(values, tmp_path / f"{seed}.pt")
    found = [tmp_path / "0.pt", tmp_path / "1.pt"]
    model = nn.Module()
    model.register_buffer("a", torch.zeros(3, 3, dtype=torch.int8))
    model.register_buffer("b", torch.zeros(3, 3))
    with pytest.raises(MergeError, match=r"'a' is torch\.float32, and torch\.int8 in the model"):
        load_average(model, found)
    model.register_buffer("a", torch.zeros(3).expand(3, 3))
    with pytest.raises(MergeError, match="'a' of the model repeats its elements"):
        load_average(model, found)
    model.register_buffer("a", model.b)
    with pytest.raises(MergeError, match="the model ties 'b' and 'a', whose averages differ"):
        load_average(model, found)
    single = [tmp_path / "s0.pt", tmp_path / "s1.pt"]
    for path, other in zip(single, found, strict=True):
        torch.save({"a": torch.load(other)["a"]}, path)
    assert load_average(model, single).missing_keys == ()
    assert model.b.unique().tolist() == [1.0]


def test_a_state_dict_of_copies_is_looked_through(tmp_path, paths):
    """The model's own tensors are filled, whatever hooks make of its state dict; others refused."""
    model, expected = network(), network()
    model.register_state_dict_post_hook(lambda _, state, *__: copies(state))
    load_average(model, paths)
    load_average(expected, paths)
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    model.register_state_dict_post_hook(lambda _, state, *__: state.update(extra=torch.ones(1)))
    with pytest.raises(MergeError, match="'extra' in the state dict of the model is neither"):
        load_average(model, paths)


def copies(state):
    """Replace the tensors of a state dict by copies."""
    for name in list(state):
        state[name] = state[name].clone()


def test_what_no_state_dict_holds_is_said_in_terms_of_the_model(tmp_path):
    """A dtype that no new file holds names no file that nobody asked for."""
    for seed in range(2):
        value = torch.full((2, 2), seed, dtype=torch.complex128)
        torch.save({"w": value}, tmp_path / f"{seed}.pt")
    model = nn.Module()
    model.register_buffer("w", torch.zeros(2, 2, dtype=torch.complex128))
    with pytest.raises(MergeError, match="cannot hold 'w'") as caught:
        load_average(model, [tmp_path / "0.pt", tmp_path / "1.pt"])
    assert caught.value.where is None
    assert "merge_checkpoints" in caught.value.hint


def test_gradients_and_graphs_are_left_alone(paths):
    """Parameters stay leaves that need gradients, and no graph is recorded."""
    model = network()
    load_average(model, paths)
    assert all(one.requires_grad and one.is_leaf for one in model.parameters())
    assert all(one.grad_fn is None for one in model.state_dict().values())


def test_memory_is_that_of_a_window(tmp_path):
    """Beside the model, less than one of its tensors is held."""
    pytest.importorskip("resource")  # which Windows lacks
    for number in range(3):
        torch.save({"w": torch.full((1 << 24,), float(number))}, tmp_path / f"{number}.pt")
    code = f"""
        import resource, torch
        from merge_avg import load_average
        model = torch.nn.Module()
        model.w = torch.nn.Parameter(torch.zeros(1 << 24))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        load_average(model, {[str(tmp_path / f"{n}.pt") for n in range(3)]!r}, max_memory="32MiB")
        assert torch.all(model.w == 1)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    run = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 48 << 10  # KiB; the tensor has 64 MiB


@pytest.mark.gpu
def test_a_model_on_a_gpu_gets_the_same(paths):
    """Its tensors stay where they are, and hold the bits that those of one on the CPU hold."""
    model, other = network(), network().cuda()
    load_average(model, paths)
    load_average(other, paths)
    for name, value in other.state_dict().items():
        assert value.is_cuda
        assert torch.equal(value.cpu(), model.state_dict()[name])
