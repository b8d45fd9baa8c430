"""merge_avg.formats.pickle.tensors: storages and tensors, and what is wrong with some."""

import pickle
from dataclasses import replace
from pathlib import Path

import pytest

from merge_avg.checkpoint import BY_NAME, Archive, Layout, NewTensor
from merge_avg.errors import MergeError
from merge_avg.formats.pickle.load import load
from merge_avg.formats.pickle.tensors import TorchHooks, _int, _text, pickled, with_classes
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
    assert other.start == 0
    assert hooks.persistent((*FLOATS, None)) is first
    assert hooks.persistent((*FLOATS[:2], 0, "cpu", 6)) is first
    assert list(hooks.storages) == ["0"]
    names = [span.cls for span in hooks.classes]
    untyped = names.pop(2)
    assert (set(names), untyped) == ({"torch\nFloatStorage"}, "torch.storage\nUntypedStorage")
    assert len({id(name) for name in names}) == 1
    assert {span.storage for span in hooks.classes} == {"0"}
    with pytest.raises(PickleError, match="two sizes"):
        hooks.persistent((*FLOATS[:4], 7))


def test_a_view_of_a_storage_begins_behind_its_start(hooks):
    """Torch before 0.4 wrote views of storages: their first element, and their number."""
    stored = hooks.persistent((*FLOATS, ("view", 2, 3)))
    tensor = hooks.call(V2, (stored, 1, (3,), (1,), False, None))
    assert (stored.start, tensor.info.start, stored.dtype.name) == (2, 3, "float32")
    assert hooks.persistent((*FLOATS, ("view", 2, 3))).storage is stored.storage
    with pytest.raises(PickleError, match="impossible strides"):
        hooks.call(V2, (stored, -1, (3,), (1,), False, None))
    with pytest.raises(PickleError, match="view of another in an unknown way"):
        hooks.persistent((*FLOATS, ("view", -2, 3)))


@pytest.mark.parametrize(
    ("pid", "says"),
    [
        ("0", "not a storage"),
        (("model", 1, 2, 3, 4), "not a storage"),
        (("module", 1, 2), "not a storage"),
        (("model", 1, 2, 3), "not a storage"),
        (FLOATS[:4], "not a storage"),
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
    again = hooks.call(
        Global("torch._utils", "_rebuild_tensor"), (hooks.persistent(FLOATS), 1, [2, 2], [2, 1])
    )
    assert (again.info, again.info.path, again.info.storage.name) == (info, (), "0")
    dtype = Global("torch", "uint16")
    info = hooks.call(V3, (hooks.persistent(BYTES), 0, (12,), (1,), False, None, dtype)).info
    assert (info.dtype.name, info.trouble) == ("uint16", None)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({0: "0"}, "not a storage"),
        ({1: -1}, "impossible strides"),
        ({1: "1"}, "impossible strides"),
        ({1: True}, "impossible strides"),
        ({2: (2, -2)}, "impossible strides"),
        ({2: (2.0, 2)}, "impossible strides"),
        ({2: (2**62, 2**62)}, "more elements"),
        ({2: (2**40, 1)}, "elements, but a storage of 6$"),
        ({3: (1,)}, "2 dimensions with 1 strides"),
        ({2: None}, "no shape"),
    ],
)
def test_an_impossible_tensor_is_refused(hooks, change, says):
    """A shape, stride or start that no tensor has is an error that names the storage."""
    arguments = [hooks.persistent(FLOATS), 0, (2, 2), (2, 1), False, None]
    for number, value in change.items():
        arguments[number] = value
    with pytest.raises(PickleError, match=says) as caught:
        hooks.call(V2, tuple(arguments))
    assert 0 in change or "storage '0'" in str(caught.value)


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
    assert hooks.call(V2, (*arguments[:6], {bit: False})).info.trouble is None
    dtype = Global("torch", "float32")
    arguments = (hooks.persistent(BYTES), 0, (6,), (1,), False, None, dtype, {bit: True})
    assert f"its {bit} bit is set" in hooks.call(V3, arguments).info.trouble


def test_tensors_of_codes_and_of_unusual_kinds_are_marked(hooks):
    """Quantised, sparse and other tensors say what they are, and have no place in a file."""
    codes = hooks.persistent(("storage", Global("torch", "QInt8Storage"), "1", "cpu", 6))
    assert hooks.call(V2, (codes, 0, (6,), (1,), False, None)).info.trouble == (
        "a tensor of qint8 codes"
    )
    sparse = hooks.call(Global("torch._utils", "_rebuild_sparse_tensor"), ()).info
    assert (sparse.trouble, sparse.dtype.kind, sparse.shape) == ("a sparse tensor", "code", ())
    assert (sparse.path, sparse.stride, sparse.start, sparse.storage.nbytes) == ((), (), 0, 0)
    assert (sparse.storage.name, sparse.storage.offset) == ("", 0)
    assert (sparse.dtype.name, sparse.dtype.itemsize) == ("unknown", 1)


@pytest.mark.parametrize("name", ["_rebuild_parameter", "_rebuild_parameter_with_state"])
def test_a_parameter_is_its_tensor(hooks, name):
    """It is learned, which a plain view of it is not; without a tensor it is an unknown call."""
    tensor = hooks.call(V2, (hooks.persistent(FLOATS), 0, (6,), (1,), False, None))
    rebuild = Global("torch._utils", name)
    parameter = hooks.call(rebuild, (tensor, True, None))
    assert parameter.info == replace(tensor.info, learned=True)
    assert not tensor.info.learned
    assert hooks.call(rebuild, (parameter, False, None)).info == parameter.info
    assert hooks.call(rebuild, ("tensor", True, None)) is None


@pytest.mark.parametrize("module", ["torch", "torch.cuda", "torch.storage"])
def test_storages_of_other_devices_are_the_same_bytes(hooks, module):
    """Their classes have the names of those of torch."""
    stored = hooks.persistent(("storage", Global(module, "HalfStorage"), "0", "cuda:0", 6))
    assert (stored.dtype.name, stored.storage.nbytes, stored.storage.offset) == ("float16", 12, 0)


def test_storages_and_calls_are_paid_for(hooks):
    """A storage that is new costs more than one that is known, and a dict less than a tensor."""
    costs = []
    for act in (
        lambda: hooks.persistent(FLOATS),
        lambda: hooks.persistent(FLOATS),
        lambda: hooks.call(Global("collections", "OrderedDict"), ()),
        lambda: hooks.call(Global("collections", "OrderedDict"), ([("a", 1)],)),
        lambda: hooks.call(Global("mine", "thing"), ()),
    ):
        before = hooks.allowance.used
        act()
        costs.append(hooks.allowance.used - before)
    assert costs == [400, 200, 120, 320, 200]


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
        assert says in hooks.call(rebuild, (wrapper, cls, (), {})).info.trouble
        assert says in hooks.call(rebuild, (Global("mine", "f"), cls, (), {})).info.trouble
    assert hooks.call(rebuild, ("mine", cls, (), {})) is None
    plain = hooks.call(rebuild, (V2, cls, (hooks.persistent(FLOATS), 0, (6,), (1,), False, None)))
    assert plain.info.trouble is None


def test_dicts_are_made_and_other_calls_are_not(hooks):
    """OrderedDict and defaultdict become dicts; an unknown function is left to the machine."""
    assert hooks.call(Global("collections", "OrderedDict"), ()) == InertDict()
    assert hooks.call(Global("collections", "OrderedDict"), ([("a", 1)],)) == {"a": 1}
    assert hooks.call(Global("collections", "defaultdict"), (3,)) == {}
    assert hooks.call(Global("mine", "thing"), ()) is None
    assert hooks.call(Global("torch._utils", "_rebuild_new"), ()) is None


def test_a_storage_has_any_size_of_63_bits(hooks):
    """None is too large that torch could write, and there may be none."""
    stored = hooks.persistent(("storage", Global("torch", "ByteStorage"), "0", "cpu", 2**63 - 1))
    assert stored.storage.nbytes == 2**63 - 1
    assert hooks.persistent(("storage", FLOATS[1], "1", "cpu", 0)).storage.nbytes == 0


@pytest.mark.parametrize(
    ("number", "opcode"),
    [
        (0, b"J"),
        (2**31 - 1, b"J"),
        (2**31, b"\x8a\5"),
        (2**39 - 1, b"\x8a\5"),
        (2**39, b"\x8a\6"),
        (2**63 - 1, b"\x8a\x08"),
    ],
)
def test_numbers_are_written_as_pickle_reads_them(number, opcode):
    """Beyond 31 bits they take as many bytes as they and their sign need."""
    raw = _int(number)
    assert raw.startswith(opcode)
    assert pickle.loads(raw + b".") == number


def test_texts_are_written_as_pickle_reads_them():
    """Names in any alphabet, and lone surrogates, have their length in bytes before them."""
    for text in ("", "w\xf6", "\ud800", "x" * 300):
        assert pickle.loads(_text(text) + b".") == text


def test_a_new_state_dict_is_written_as_described():
    """A tensor of a dtype with a class of storage, and one of a dtype without."""
    tensors = [
        NewTensor("w", BY_NAME["float32"], (2, 3), (3, 1), 1, "s", 28),
        NewTensor("u", BY_NAME["uint16"], (3,), (1,), 0, "t", 6),
    ]
    raw = pickled(tensors, {"s": "0", "t": "1"})
    small = lambda *numbers: b"".join(b"J" + bytes([n, 0, 0, 0]) for n in numbers)  # noqa: E731
    text = lambda value: b"X" + bytes([len(value), 0, 0, 0]) + value  # noqa: E731
    empty, storage = b"ccollections\nOrderedDict\n)R", b"(" + text(b"storage")
    first = storage + b"ctorch\nFloatStorage\n" + text(b"0") + text(b"cpu") + small(7) + b"tQ"
    second = storage + b"ctorch.storage\nUntypedStorage\n" + text(b"1") + text(b"cpu")
    assert raw == (
        b"\x80\2" + empty + b"("
        + text(b"w") + b"ctorch._utils\n_rebuild_tensor_v2\n(" + first
        + small(1) + b"(" + small(2, 3) + b"t(" + small(3, 1) + b"t\x89" + empty + b"tR"
        + text(b"u") + b"ctorch._utils\n_rebuild_tensor_v3\n(" + second + small(6) + b"tQ"
        + small(0) + b"(" + small(3) + b"t(" + small(1) + b"t\x89" + empty
        + b"ctorch\nuint16\ntR"
        + b"u."
    )  # fmt: skip


def changed(data, dtypes, prefix="a/data/"):
    """Return a pickle of storages with new dtypes for some."""
    hooks = TorchHooks(Allowance())
    read = load(data, persistent=hooks.persistent, call=hooks.call)
    archive = Archive((), (), data, "a/data.pkl", tuple(hooks.classes), read.frames, prefix)
    dtypes = {name: BY_NAME[dtype] for name, dtype in dtypes.items()}
    return with_classes(Layout(Path("a.pt"), "torch-zip", (), ()), archive, dtypes)


def test_a_copy_names_other_classes():
    """Storages that change have the class of their dtype, wherever one memo entry served two."""
    data = (
        b"\x80\4\x95\2\0\0\0\0\0\0\0(("
        b"X\7\0\0\0storagectorch.cuda\nFloatStorage\nq\0X\1\0\0\0aNK\6tQ"
        b"(X\7\0\0\0storageh\0X\1\0\0\0bNK\6tQ"
        b"(X\7\0\0\0storageh\0X\1\0\0\0cNK\6tQt."
    )
    assert changed(data, {"a/data/b": "bfloat16", "c": "float64"}) == (
        b"\x80\4(("
        b"X\7\0\0\0storagectorch.cuda\nFloatStorage\nq\0X\1\0\0\0aNK\6tQ"
        b"(X\7\0\0\0storagectorch\nBFloat16Storage\nX\1\0\0\0bNK\6tQ"
        b"(X\7\0\0\0storagectorch.cuda\nFloatStorage\nX\1\0\0\0cNK\6tQt."
    )
    with pytest.raises(MergeError, match="'a/data/c' cannot be changed") as caught:
        changed(data, {"a/data/c": "float8_e5m2"})
    assert str(caught.value).startswith("a.pt: ")
    with pytest.raises(MergeError, match="'a' cannot be changed"):
        changed(data.replace(b"FloatStorage", b"UntypedStorage"), {"a": "float16"}, "")
