"""merge_avg.formats.pickle.torch_objects: tensors and scalars, each with its path."""

import pickle
import zipfile
from collections import OrderedDict

import pytest
import torch
from torch import nn

from merge_avg.checkpoint import ATTRIBUTES
from merge_avg.errors import MergeError
from merge_avg.formats.pickle.load import load
from merge_avg.formats.pickle.tensors import Tensor, TorchHooks
from merge_avg.formats.pickle.torch_objects import key_of, objects_at, scalars_near, values_below
from merge_avg.formats.pickle.values import Allowance, PickleError
from tests.helpers import quick


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


class Rebuilt:
    """A value that a pickle rebuilds by a function of another package."""

    def __init__(self, function, *args, state=None):
        self.function, self.args, self.state = function, args, state

    def __reduce__(self):
        return (self.function, self.args, self.state)


def rebuild(*args):
    """Stand for the function of another package, which nothing here may call."""
    raise AssertionError("it was called")


class Holder:
    """An object with whatever is given as its attributes."""

    def __init__(self, **held):
        self.__dict__.update(held)


TENSOR = torch.arange(6.0).reshape(2, 3)


def typed(tensor, dtype=None):
    """Return the storage of a tensor as a pickle holds it, with its dtype."""
    storage = tensor.untyped_storage()
    return torch.storage.TypedStorage(
        wrap_storage=storage, dtype=dtype or tensor.dtype, _internal=True
    )


BYTES, FLOATS = TENSOR.clone().untyped_storage(), typed(TENSOR)


def infos(value, tmp_path, protocol=2):
    """Save a value with torch, and return its tensors by path."""
    found = objects_at(saved(value, tmp_path, protocol)).tensors
    assert len({info.path for info in found}) == len(found)
    return {info.path: info for info in found}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    "args",
    [
        (FLOATS, 0, (2, 3), (3, 1), False, OrderedDict(), 2),  # torch_npu
        (nn.Linear, FLOATS, 0, (2, 3), (3, 1), False, OrderedDict()),  # fastai
        (FLOATS, 0, TENSOR.size(), TENSOR.stride()),
        (FLOATS, 0, [2, 3], (3, 1), True, {"conj": False}, "hpu:0", None),
        (BYTES, 0, (2, 3), (3, 1), False, None, torch.float32),
        (FLOATS, 0, (2, 3), (3, 1), False, None, torch.float32),
    ],
)
def test_functions_with_the_arguments_of_torch_make_tensors(tmp_path, args, protocol):
    """The storage, the first element, the shape and the strides stand in a row."""
    one = infos({"w": Rebuilt(rebuild, *args), "plain": TENSOR}, tmp_path, protocol)["w",]
    assert (one.dtype.name, one.shape, one.stride, one.start) == ("float32", (2, 3), (3, 1), 0)
    assert (one.trouble, one.storage.nbytes) == (None, 24)


def test_a_parameter_on_a_device_is_learned(tmp_path):
    """Torch wraps what a device's function rebuilds."""
    inner = Rebuilt(rebuild, FLOATS, 0, (2, 3), (3, 1), None, OrderedDict(), 2)
    parameter = Rebuilt(torch._utils._rebuild_parameter, inner, 1, OrderedDict())
    found = infos({"w": parameter}, tmp_path)
    assert [(path, one.shape, one.learned) for path, one in found.items()] == [
        (("w",), (2, 3), True)
    ]


CODES = torch.ones(6, dtype=torch.uint8)
FOREIGN = "a tensor rebuilt by the unknown tests.formats.pickle.test_torch_objects.rebuild"


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    "args",
    [
        (FLOATS,),
        (FLOATS, "fp8"),
        ((FLOATS, (2, 3)),),
        ({"data": [FLOATS]},),
        (FLOATS, FLOATS),
        (FLOATS, 0, (2, 3), (3, 1), 0.5),  # a scale
        (FLOATS, 0, (2, 3), (3, 1), [0.5]),
        (FLOATS, 0, (2, 3), (3, 1), FLOATS),
        (FLOATS, 0, (2, 3), (3, 1), Holder()),
        (FLOATS, 0, (2, 3), (3, 1), torch.float16),
        (FLOATS, 0, (2, 3), (3, 1), torch.float32, torch.float16),
        (FLOATS, 0, (2, 3), (3,)),
        (FLOATS, 0, (2, 4), (4, 1)),  # more than it has
        (FLOATS, 0, (2, -3), (3, 1)),
        (FLOATS, False, (2, 3), (3, 1)),
        (0, (2, 3), (3, 1), FLOATS),
        (BYTES, 0, (2, 3), (3, 1)),  # of which dtype?
        (typed(CODES), 0, (2, 3), (3, 1), 4),  # bits, perhaps
        (typed(CODES), 0, (2, 3), (3, 1), "nf4"),
    ],
)
def test_any_other_storage_is_named(tmp_path, args, protocol):
    """It has the path of the call that takes it, and the name of the function."""
    found = infos({"model": {"w": Rebuilt(rebuild, *args)}}, tmp_path, protocol)
    assert [(path, one.trouble) for path, one in found.items()] == [(("model", "w"), FOREIGN)]


def test_a_tensor_of_codes_stays_one(tmp_path):
    """Bytes of a quantised storage are no numbers, whatever function rebuilds them."""
    storage = typed(CODES, torch.qint8)
    found = infos([Rebuilt(rebuild, storage, 0, (2, 3), (3, 1))], tmp_path)
    assert found[0,].trouble == "a tensor of qint8 codes"
    found = infos(
        [Rebuilt(rebuild, typed(CODES), 0, (2, 3), (3, 1), None, OrderedDict())], tmp_path
    )
    assert (found[0,].trouble, found[0,].dtype.name) == (None, "uint8")
    flags = Rebuilt(rebuild, FLOATS, 0, (2, 3), (3, 1), {"neg": True})
    assert infos([flags], tmp_path)[0,].trouble == "a lazy view (its neg bit is set)"


@pytest.mark.parametrize("more", [(), ("neg",), ("conj",)])
@pytest.mark.parametrize("dtype", ["QInt8", "Float"])
def test_no_tensor_reaches_outside_its_storage(dtype, more):
    """Nor does one of codes, or one whose bits are pending; a storage may have an empty key."""

    def rebuilt(key, *shape):
        cls = b"ctorch\n%bStorage\n" % dtype.encode()
        pid = b"(Vstorage\n" + cls + b"V%b\nVcpu\nK\6tQ" % key
        sizes = b"K\0(K%cK%ctK\1K\1\x86" % shape
        flags = b"}" + b"".join(b"V%b\n\x88s" % flag.encode() for flag in more)
        arguments = b"(" + pid + sizes + b"\x89}" + flags + b"t"
        return b"}Vw\nctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"Rs."

    for key in (b"0", b""):
        (found,) = objects_at(rebuilt(key, 5, 2)).tensors
        assert (found.stop, found.storage.nbytes // found.dtype.itemsize) == (6, 6)
        with pytest.raises(MergeError, match="tensor 'w' reaches outside its storage"):
            objects_at(rebuilt(key, 6, 2))


def test_bare_storages_are_named(tmp_path):
    """In a dict or list, in the state of an object, in keyword arguments and in modules."""
    net = nn.Linear(1, 1)
    net._buffers["data"] = net.held = FLOATS
    value = {
        "storage": FLOATS,
        "list": [3, [BYTES]],
        "object": Holder(held=FLOATS, w={"inner": FLOATS}),
        "net": net,
        "both": Rebuilt(rebuild, FLOATS, TENSOR),
    }
    found = infos(value, tmp_path, 4)
    troubles = {path: one.trouble for path, one in found.items() if one.trouble}
    bare = "a bare storage"
    assert troubles == {
        ("storage",): bare,
        ("list", 1, 0): bare,
        ("object", "held"): bare,
        ("object", "w", "inner"): bare,
        ("net", "data"): bare,
        ("net", ATTRIBUTES, "held"): bare,
        ("both",): FOREIGN,
    }
    assert all(one.numel == 0 for one in found.values() if one.trouble)  # and no single number


def test_a_storage_is_named_once_and_an_object_with_loops_ends(tmp_path):
    """Two storages in one call are one tensor that is not understood."""
    loop = [FLOATS, BYTES]
    loop.append(loop)
    found = infos({"w": Rebuilt(rebuild, loop, FLOATS)}, tmp_path)
    assert list(found) == [("w",)]


def test_tensors_in_a_set_have_no_order(tmp_path):
    """Which of them would be averaged with which is unknown."""
    found = infos({"w": {TENSOR}}, tmp_path, 4)
    assert [(path, one.trouble) for path, one in found.items()] == [
        (("w", 0), "a tensor in a set, which has no order")
    ]


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_call_of_one_tensor_has_its_name(tmp_path, protocol):
    """As the rebuild function of a subclass of Parameter, and any wrapper of one tensor."""
    plain = Rebuilt(rebuild, torch.Tensor, TENSOR, 1, OrderedDict(), (2, 3), state={"a": 1})
    value = {
        "w": plain,
        "twice": Rebuilt(rebuild, plain),
        "learned": Rebuilt(nn.Parameter, plain, 1),
        "two": Rebuilt(rebuild, TENSOR, TENSOR),
        "list": Rebuilt(rebuild, [TENSOR]),
        "state": Rebuilt(rebuild, TENSOR, state={"t": TENSOR}),
    }
    found = infos(value, tmp_path, protocol)
    assert list(found) == [
        ("w",),
        ("twice",),
        ("learned",),
        ("two", 0),
        ("two", 1),
        ("list", 0, 0),
        ("state", "t"),
        ("state", 0),
    ]
    assert [path for path, one in found.items() if one.learned] == [("learned",)]
    assert all(one.shape == (2, 3) and one.trouble is None for one in found.values())


def test_attributes_of_a_tensor_are_kept(tmp_path):
    """They lie below it, as those of a module do; storages may be among them."""
    weight = nn.Parameter(torch.ones(2))
    weight.scale, weight.shards = torch.ones(1), 2
    found = infos({"w": weight}, tmp_path)
    assert list(found) == [("w",), ("w", ATTRIBUTES, "scale")]
    assert found["w",].learned
    assert found["w",].shape == (2,)


def test_a_state_that_changes_a_tensor_is_told(tmp_path):
    """Tensor.__setstate__ takes a storage, as old files have it."""
    function, args = torch.ones(2).__reduce_ex__(2)
    changed = Rebuilt(function, *args, state=(FLOATS, 0, (6,), (1,)))
    one = infos({"w": changed}, tmp_path)["w",]
    assert one.trouble == "a tensor that a state of its own changes"


def test_parts_of_a_module_that_a_function_rebuilds_are_found(tmp_path):
    """They are no modules to a reader, and their tensors are weights all the same."""
    net = nn.Linear(1, 1)
    net._modules["part"] = Rebuilt(rebuild, {"w": torch.ones(1)})
    net._modules["none"] = None
    assert list(infos(net, tmp_path)) == [("weight",), ("bias",), ("part", 0, "w")]


def test_a_module_of_thousands_of_parts_is_read(tmp_path, monkeypatch):
    """The search for scalars goes no further than it may, and refuses nothing."""
    monkeypatch.setattr("merge_avg.formats.pickle.torch_objects._MOST_VISITS", 2000)
    net = nn.Sequential(*(nn.Linear(1, 1) for _ in range(30)))
    found = objects_at(saved({"net": net, "epoch": 3}, tmp_path))
    assert len(found.tensors) == 60
    assert found.scalars == ((("epoch",), 3),)


@pytest.mark.parametrize("layers", quick([500, 5_000, 50_000], 500))
def test_a_module_of_many_layers_is_read(tmp_path, layers):
    """A module that is saved whole takes more memory than a state dict, and not too much."""
    net = nn.Sequential(*(nn.Linear(1, 1) for _ in range(layers)))
    found = objects_at(saved({"net": net, "epoch": 3}, tmp_path))
    assert len(found.tensors) == 2 * layers
    assert found.scalars[0] == (("epoch",), 3)
