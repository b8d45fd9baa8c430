"""merge_avg.formats.inert: a pickle is read, never run."""

import collections
import contextlib
import pickle
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from merge_avg.formats.pickle.load import load
from merge_avg.formats.pickle.values import Global, Instance, PickleError

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
KEYS = st.text() | st.integers()
VALUES = st.recursive(
    SCALARS | st.binary(),
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(KEYS, inner)
        | st.tuples(inner, inner)
        | st.tuples(inner, inner, inner, inner)
    ),
    max_leaves=20,
)


def read(data):
    return load(data, persistent=lambda pid: ("persistent", pid), call=lambda _f, _a: None).value


@given(value=VALUES, protocol=st.integers(3, 5))
def test_plain_values_are_read_as_pickle_reads_them(value, protocol):
    """Containers and scalars of protocols 3 to 5 come out as pickle.loads gives them."""
    assert read(pickle.dumps(value, protocol)) == value


@given(
    value=st.recursive(
        SCALARS, lambda inner: st.lists(inner) | st.dictionaries(KEYS, inner), max_leaves=20
    ),
    protocol=st.integers(0, 2),
)
def test_old_protocols_are_read_too(value, protocol):
    """The text opcodes of protocols 0 to 2 mean the same."""
    assert read(pickle.dumps(value, protocol)) == value


def test_shared_and_recursive_objects_stay_so():
    """Memo entries give one object, also inside itself."""
    shared = [1]
    outer = [shared, shared]
    outer.append(outer)
    value = read(pickle.dumps(outer))
    assert value[0] is value[1]
    assert value[2] is value


def test_objects_become_instances():
    """Classes are only named; what they would be made from is remembered."""
    value = read(pickle.dumps(collections.Counter("ab"), 2))
    assert isinstance(value, Instance)
    assert value.function == Global("collections", "Counter")


NAMES = [
    ("os", "system"),
    ("posix", "system"),
    ("nt", "system"),
    ("builtins", "eval"),
    ("__builtin__", "exec"),
    ("builtins", "getattr"),
    ("builtins", "print.__globals__"),
    ("subprocess", "Popen"),
    ("os.path", "join"),
    ("importlib", "import_module"),
    ("runpy", "run_path"),
    ("torch.hub", "load"),
    ("ctypes", "CDLL"),
    ("torch", "os"),
    ("torch", "os.system"),
]


@pytest.mark.parametrize(("module", "name"), NAMES)
def test_dangerous_callables_are_refused_by_name(module, name):
    """Every way to name a callable that runs code ends in an error with that name."""
    line, text = f"{module}\n{name}\n".encode(), (module.encode(), name.encode())
    short = b"".join(b"\x8c" + bytes([len(t)]) + t for t in text)
    for data in (
        b"c" + line + b"(tR.",
        b"(S'true'\ni" + line + b".",
        b"(c" + line + b"o.",
        b"\x80\x04" + short + b"\x93)R.",
        b"\x80\x02c" + line + b")\x81.",
        b"c" + line + b".",
    ):
        with pytest.raises(PickleError, match=f"{module}.{name}"):
            read(data)


GETTER, KIND = b"cbuiltins\ngetattr\n", b"cmodule\nKind\n"


def test_members_of_enums_are_inert():
    """Python 3.11.0 to 3.11.3 pickle them by getattr, again and again from the memo."""
    value = read(b"(" + GETTER + b"p0\n(" + KIND + b"S'A'\ntRg0\n(" + KIND + b"S'b'\ntRt.")
    assert [(one.function.name, one.args[1]) for one in value] == [
        ("getattr", "A"),
        ("getattr", "b"),
    ]


@pytest.mark.parametrize(
    "data",
    [
        GETTER + b".",  # the function itself
        GETTER + b"(cmodule\nkind\nS'A'\ntR.",  # of what may be a module
        GETTER + b"(" + KIND + b"S'__init__'\ntR.",
        GETTER + b"(" + KIND + b"S'A'\nNtR.",  # with a default
        GETTER + b"(S'Kind'\nS'A'\ntR.",
        GETTER + b"(" + KIND + b"S'A'\ntR(tR.",  # what it returned is called
        GETTER + b"(" + KIND + b"S'A'\ntR)\x81.",
        b"cmodule\nmap\n(" + GETTER + b"]tR.",  # given to another function
        # The same, and two calls for what was put on the stack once.
        b"cmodule\nmap\n("
        + GETTER
        + b"p0\n]tR0g0\n2("
        + KIND
        + b"S'A'\ntR0("
        + KIND
        + b"S'A'\ntR.",
    ],
)
def test_any_other_use_of_getattr_is_refused(data):
    """Only the form that enums take is let through."""
    with pytest.raises(PickleError, match=r"builtins\.getattr"):
        read(data)


@pytest.mark.parametrize("data", [b"\x82\x01.", b"\x83\x01\x00.", b"\x97.", b"\x98."])
def test_registries_and_buffers_from_outside_are_refused(data):
    """Extension codes and out-of-band buffers have no place in a checkpoint."""
    with pytest.raises(PickleError):
        read(data)


@pytest.mark.parametrize("protocol", range(6))
def test_every_truncation_is_an_error(protocol):
    """A pickle cut at any byte raises PickleError and nothing else."""
    data = pickle.dumps([{"a": (1, 2.5, "x", 2**70)}, collections.Counter("ab")], protocol)
    for end in range(len(data)):
        with pytest.raises(PickleError):
            read(data[:end])


@settings(max_examples=400)
@given(data=st.binary(max_size=60), place=st.integers(0, 200), protocol=st.integers(0, 5))
def test_any_bytes_end_in_a_value_or_a_pickle_error(data, place, protocol):
    """Noise, alone or inside a real pickle, never raises anything else."""
    real = pickle.dumps({"a": [1, (2, 3)], "b": {"c": "d" * 30}}, protocol)
    for mixed in (data, real[:place] + data + real[place:]):
        with contextlib.suppress(PickleError):
            read(mixed)


def test_absurd_memo_indices_and_lengths_cost_nothing():
    """An index or a length of four billion takes no memory."""
    assert read(b"Nr\xff\xff\xff\xff.") is None
    for opcode in (b"X", b"B", b"T"):
        with pytest.raises(PickleError, match="too early"):
            read(opcode + b"\xff\xff\xff\x7fabc.")


def test_nothing_is_imported():
    """Reading a pickle of a class leaves its module unimported."""
    code = (
        "import sys\n"
        "from merge_avg.formats.pickle.load import load\n"
        "load(b'cantigravity\\nX\\n)R.', persistent=None, call=lambda f, a: None)\n"
        "assert not {'antigravity', 'torch', 'numpy'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("nesting", [b"\x85" * 1_000_000, b"2\x86" * 80, b"2\x86" * 80 + b"\x85"])
@pytest.mark.parametrize("use", [b"K\x01s.", b"0."])
def test_keys_of_absurd_depth_or_size_are_refused(nesting, use):
    """A key whose hash would overflow the stack, or never end, is damage."""
    start = b"\x80\x04}" if use != b"0." else b"\x80\x04("
    end = use if use != b"0." else b"\x91."
    with pytest.raises(PickleError, match="absurd size"):
        load(start + b")" + nesting + end, persistent=lambda _: None, call=lambda *_: None)


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (rb"'a\nb\x41\101\\\''", "a\nbAA\\'"),
        (rb'"\t\q\"\0"', '\t\\q"\0'),
        (b"'a\\\nb'", None),
    ],
)
def test_quoted_texts(raw, text):
    """The escapes of protocol 0 are Python's; unknown ones stay, without a warning."""
    if text is None:  # the line ends within the quotes
        with pytest.raises(PickleError, match="without quotes"):
            read(b"S" + raw + b"\n.")
    else:
        assert read(b"S" + raw + b"\n.") == text


def test_long_values_are_passed_over():
    """A text or bytes of megabytes is left out, and what follows is read."""
    long, nbytes = "x" * (2 << 20), 2 << 20
    value = read(pickle.dumps([long, long.encode(), bytearray(long.encode()), 7], 5))
    assert [getattr(one, "nbytes", one) for one in value] == [nbytes, nbytes, nbytes, 7]


def test_memo_entries_may_come_in_any_order():
    """Entries beside the row of indices are found, replaced and counted as pickle does."""
    data = b"](K\1r\5\0\0\0K\2q\0K\3q\1K\4q\0h\0h\1j\5\0\0\0e."
    assert read(data) == pickle.loads(data) == [1, 2, 3, 4, 4, 3, 1]
