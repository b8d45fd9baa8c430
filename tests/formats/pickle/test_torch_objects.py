"""merge_avg.formats.pickle.torch_objects: tensors and scalars, each with its path."""

import pickle
import zipfile

import pytest
import torch
from torch import nn

from merge_avg.checkpoint import ATTRIBUTES
from merge_avg.formats.pickle.load import load
from merge_avg.formats.pickle.tensors import Tensor, TorchHooks
from merge_avg.formats.pickle.torch_objects import key_of, objects_at, scalars_near, values_below
from merge_avg.formats.pickle.values import Allowance, PickleError


def tree(data):
    """Return the inert values of a pickle of torch."""
    hooks = TorchHooks(Allowance())
    return load(data, persistent=hooks.persistent, call=hooks.call, allowance=hooks.allowance).value


def saved(value, tmp_path, protocol=2):
    """Save a value with torch, and return its pickle."""
    torch.save(value, tmp_path / "a.pt", pickle_protocol=protocol)
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        return archive.read("a/data.pkl")


def paths(value, tmp_path, protocol=2):
    """Save a value with torch, and return the paths of its tensors."""
    found = values_below(tree(saved(value, tmp_path, protocol)), Allowance())
    return [path for path, value in found if isinstance(value, Tensor)]


class Trainer:
    """An object with a tensor among its attributes."""

    def __init__(self):
        self.weights = {"w": torch.ones(2)}
        self.log = [torch.ones(1), 3]


class Net(nn.Module):
    """A module with parts, a buffer that is not saved, and a tensor that is only an attribute."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(1, 1)
        self.register_buffer("kept", torch.ones(1))
        self.register_buffer("lost", torch.ones(1), persistent=False)
        self.cache = [torch.ones(1)]
        self.none = nn.Identity()


def test_paths_lead_through_dicts_lists_and_objects(tmp_path):
    """Keys and numbers make up a path; what lies in an object's state lies in the object."""
    value = {"a": torch.ones(2), "b": [0, (torch.ones(1),)], 3: Trainer()}
    assert paths(value, tmp_path) == [
        ("a",),
        ("b", 1, 0),
        (3, "weights", "w"),
        (3, "log", 0),
    ]
    assert paths(torch.ones(2), tmp_path) == [()]


def test_a_module_has_the_names_of_its_state_dict(tmp_path):
    """Parameters and saved buffers come first, by their names; all else is apart."""
    found = paths({"net": Net()}, tmp_path, protocol=4)
    names = [path[1] for path in found if path[1] != ATTRIBUTES]
    assert sorted(names) == sorted(Net().state_dict())
    assert [path[2:] for path in found if path[1] == ATTRIBUTES] == [("lost",), ("cache", 0)]


def test_a_tree_with_loops_ends(tmp_path):
    """An object inside itself is not entered again, but one that is shared is seen twice."""
    loop = {"w": torch.ones(2)}
    loop["again"] = loop
    loop["list"] = [loop]
    assert paths(loop, tmp_path) == [("w",)]
    shared = {"w": torch.ones(1)}
    assert paths([shared, shared], tmp_path) == [(0, "w"), (1, "w")]


def test_a_tree_that_is_too_deep_is_refused():
    """Two hundred levels are enough for any checkpoint."""
    deep = []
    for _ in range(300):
        deep = [deep]
    with pytest.raises(PickleError, match="nested more than 200 deep"):
        list(values_below(deep, Allowance()))


def test_a_tree_that_unfolds_without_end_is_refused():
    """Forty lists of two are a trillion paths: each step is paid for."""
    wide = []
    for _ in range(40):
        wide = [wide, wide]
    with pytest.raises(PickleError, match="more memory"):
        list(values_below(wide, Allowance()))


def test_a_module_inside_itself_is_refused(tmp_path):
    """A module has no names if it is a part of itself."""
    net = Net()
    net.inner._modules["loop"] = net
    with pytest.raises(PickleError, match="parts of themselves"):
        paths(net, tmp_path)


def test_scalars_are_numbers_and_short_texts_near_the_root():
    """The nearest come first; truth values, long texts and whatever lies deep are left out."""
    value = {
        "deep": {"epoch": 3},
        "loss": 0.5,
        "done": True,
        "name": "run",
        "long": "x" * 201,
        "huge": 2**70,
        "far": [[[[[[[7]]]]]]],
    }
    assert list(scalars_near(tree(pickle.dumps(value)))) == [
        (("loss",), 0.5),
        (("name",), "run"),
        (("deep", "epoch"), 3),
    ]


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("code", ["float64", "float32", "int64", "int32"])
def test_scalars_of_numpy_are_numbers(protocol, code):
    """Metrics are often scalars of NumPy, which old protocols hold as encoded texts."""
    import numpy as np

    value = {"loss": np.dtype(code).type(3)}
    assert list(scalars_near(tree(pickle.dumps(value, protocol)))) == [(("loss",), 3)]


def test_the_search_for_scalars_ends():
    """A thousand are enough, and a list of a million is not looked through."""
    assert len(list(scalars_near(list(range(5000))))) == 1000
    assert list(scalars_near([None] * 1_000_000 + [1])) == []


def test_keys_of_any_kind_are_shown():
    """Texts and numbers are themselves; other keys, and numbers beyond 64 bits, are words."""
    assert [key_of(key) for key in ("a", 3, True)] == ["a", 3, True]
    assert [key_of(key) for key in (None, 1.5, (1, 2), 2**70)] == [
        "None",
        "1.5",
        "('1', '2')",
        "a int",
    ]


@pytest.mark.parametrize("protocol", [2, 4])
def test_parameters_are_learned(tmp_path, protocol):
    """A state dict holds none unless it is asked to; those of a module whole are all learned."""
    net = nn.BatchNorm1d(2)
    value = {"net": net, "plain": net.state_dict(), "kept": net.state_dict(keep_vars=True)}
    found = objects_at(saved(value, tmp_path, protocol)).tensors
    assert {info.path for info in found if info.learned} == {
        ("net", "weight"),
        ("net", "bias"),
        ("kept", "weight"),
        ("kept", "bias"),
    }
    tied = {"bare": net.weight.data, "net": net}
    found = objects_at(saved(tied, tmp_path, protocol)).tensors
    assert [info.path for info in found if info.learned] == [("net", "weight"), ("net", "bias")]


def test_what_a_module_calls_a_parameter_is_learned(tmp_path):
    """Also where its pickle holds a plain tensor, which another entry shares."""
    net = nn.Linear(1, 1, bias=False)
    net._parameters["weight"] = shared = torch.ones(1)
    found = objects_at(saved([shared, net, shared], tmp_path)).tensors
    assert [(info.path, info.learned) for info in found] == [
        ((0,), False),
        ((1, "weight"), True),
        ((2,), False),
    ]


@pytest.mark.parametrize("protocol", [2, 4])
def test_optimizers_are_told_by_what_they_hold(tmp_path, protocol):
    """A dict with `state` beside `param_groups`, or an object with such a state, wherever it is."""
    net = nn.Linear(1, 1)
    one = torch.optim.Adam(net.parameters())
    net(torch.ones(1)).backward()
    one.step()
    value = {
        "a": [{"inner": one.state_dict()}],
        "whole": one,
        "no": {"state": {}, "groups": []},
        "lists": ["state", "param_groups"],
    }
    found = objects_at(saved(value, tmp_path, protocol)).optimizers
    assert found == (("a", 0, "inner"), ("whole",))
    assert objects_at(saved(one.state_dict(), tmp_path, protocol)).optimizers == ((),)
    assert objects_at(saved({"w": torch.ones(1)}, tmp_path, protocol)).optimizers == ()
