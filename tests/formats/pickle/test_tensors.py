"""merge_avg.formats.pickle.tensors: storages and tensors, and what is wrong with some."""

import pytest

from merge_avg.formats.pickle.tensors import TorchHooks
from merge_avg.formats.pickle.values import Allowance, Global, InertDict, PickleError

FLOATS = ("storage", Global("torch", "FloatStorage", 5, 9), "0", "cpu", 6)
BYTES = ("storage", Global("torch.storage", "UntypedStorage"), "0", "cpu", 24)
V2, V3 = Global("torch._utils", "_rebuild_tensor_v2"), Global("torch._utils", "_rebuild_tensor_v3")


@pytest.fixture
def hooks():
    return TorchHooks(Allowance())


def test_a_storage_has_a_dtype_a_key_and_a_size(hooks):
    """Its class names the dtype, and the number of elements gives the bytes."""
    stored = hooks.persistent(FLOATS)
    assert (stored.dtype.name, stored.storage.name, stored.storage.nbytes) == ("float32", "0", 24)
    assert [(span.start, span.stop, span.cls) for span in hooks.classes] == [
        (5, 9, "torch\nFloatStorage")
    ]


def test_a_storage_that_is_named_again_is_the_same(hooks):
    """It is one storage, also by another class; another size is a contradiction."""
    first = hooks.persistent(FLOATS)
    assert hooks.persistent(FLOATS) is first
    other = hooks.persistent(BYTES)
    assert other.dtype is None
    assert other.storage is first.storage
    with pytest.raises(PickleError, match="two sizes"):
        hooks.persistent((*FLOATS[:4], 7))


def test_a_view_of_a_storage_begins_behind_its_start(hooks):
    """Torch before 0.4 wrote views of storages: their first element, and their number."""
    stored = hooks.persistent((*FLOATS, ("view", 2, 3)))
    tensor = hooks.call(V2, (stored, 1, (3,), (1,), False, None))
    assert (stored.start, tensor.info.start) == (2, 3)
    with pytest.raises(PickleError, match="view of another in an unknown way"):
        hooks.persistent((*FLOATS, ("view", -2, 3)))


@pytest.mark.parametrize(
    ("pid", "says"),
    [
        ("0", "not a storage"),
        (("model", 1, 2, 3, 4), "not a storage"),
        (("storage", "FloatStorage", "0", "cpu", 6), "unknown way"),
        (("storage", FLOATS[1], "0", "cpu", -1), "unknown way"),
        (("storage", FLOATS[1], "0", "cpu", True), "unknown way"),
        (("storage", FLOATS[1], "0", "cpu", 2**63), "unknown way"),
        (("storage", FLOATS[1], None, "cpu", 6), "unknown way"),
        (("storage", Global("torch", "StringStorage"), "0", "cpu", 6), "unknown class"),
        (("storage", Global("mine", "FloatStorage"), "0", "cpu", 6), "unknown class"),
    ],
)
def test_other_ids_are_refused(hooks, pid, says):
    """What is not a storage as torch writes them is an error that says so."""
    with pytest.raises(PickleError, match=says):
        hooks.persistent(pid)


def test_the_source_of_a_module_is_passed_over(hooks):
    """A legacy file names a module's class together with its source."""
    assert hooks.persistent(("module", FLOATS[1], "net.py", "class Net: ...")) == FLOATS[1]


def test_a_tensor_is_a_view_of_its_storage(hooks):
    """Version 2 has the dtype of the storage, version 3 one of its own."""
    info = hooks.call(V2, (hooks.persistent(FLOATS), 1, (2, 2), (2, 1), False, None)).info
    assert (info.dtype.name, info.shape, info.stride, info.start) == ("float32", (2, 2), (2, 1), 1)
    dtype = Global("torch", "uint16")
    info = hooks.call(V3, (hooks.persistent(BYTES), 0, (12,), (1,), False, None, dtype)).info
    assert (info.dtype.name, info.trouble) == ("uint16", None)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({0: "0"}, "not a storage"),
        ({1: -1}, "impossible strides"),
        ({2: (2, -2)}, "impossible strides"),
        ({2: (2.0, 2)}, "impossible strides"),
        ({2: (2**62, 2**62)}, "more elements"),
        ({2: (2**40, 1)}, "elements, but a storage of 6"),
        ({3: (1,)}, "2 dimensions with 1 strides"),
        ({2: None}, "no shape"),
    ],
)
def test_an_impossible_tensor_is_refused(hooks, change, says):
    """A shape, stride or start that no tensor has is an error that names the storage."""
    arguments = [hooks.persistent(FLOATS), 0, (2, 2), (2, 1), False, None]
    for number, value in change.items():
        arguments[number] = value
    with pytest.raises(PickleError, match=says):
        hooks.call(V2, tuple(arguments))


def test_a_tensor_of_an_unknown_dtype_is_refused(hooks):
    """An untyped storage says no dtype, and version 3 may say one that nobody knows."""
    stored = hooks.persistent(BYTES)
    with pytest.raises(PickleError, match="'0' holds the unknown dtype None"):
        hooks.call(V2, (stored, 0, (6,), (1,), False, None))
    with pytest.raises(PickleError, match=r"unknown dtype torch\.float7"):
        hooks.call(V3, (stored, 0, (6,), (1,), False, None, Global("torch", "float7")))


@pytest.mark.parametrize("bit", ["conj", "neg"])
def test_lazy_views_are_marked(hooks, bit):
    """The bytes of a tensor whose conjugation or negation is pending are not its values."""
    arguments = (hooks.persistent(FLOATS), 0, (6,), (1,), False, None, {bit: True})
    assert f"its {bit} bit is set" in hooks.call(V2, arguments).info.trouble


def test_wrappers_are_told_by_their_module(hooks):
    """A subclass without a storage of its own says whose it is."""
    wrapper = Global("torch._utils", "_rebuild_wrapper_subclass")
    rebuild = Global("torch._tensor", "_rebuild_from_type_v2")
    for cls, says in {
        Global("torch.distributed.tensor", "DTensor"): "one rank's part",
        Global("torchao.dtypes", "Int4"): "quantised by torchao",
        Global("mine", "Tensor"): "a mine.Tensor",
    }.items():
        assert says in hooks.call(rebuild, (wrapper, cls, (cls,), {})).info.trouble
    plain = hooks.call(rebuild, (V2, cls, (hooks.persistent(FLOATS), 0, (6,), (1,), False, None)))
    assert plain.info.trouble is None


def test_dicts_are_made_and_other_calls_are_not(hooks):
    """OrderedDict and defaultdict become dicts; an unknown function is left to the machine."""
    assert hooks.call(Global("collections", "OrderedDict"), ()) == InertDict()
    assert hooks.call(Global("collections", "OrderedDict"), ([("a", 1)],)) == {"a": 1}
    assert hooks.call(Global("collections", "defaultdict"), (3,)) == {}
    assert hooks.call(Global("mine", "thing"), ()) is None
    assert hooks.call(Global("torch._utils", "_rebuild_new"), ()) is None
    with pytest.raises(PickleError, match=r"without torch\.save"):
        hooks.call(Global("torch.storage", "_load_from_bytes"), (b"",))
