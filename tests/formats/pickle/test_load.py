"""merge_avg.formats.pickle.load: a pickle is read, never run; opcodes are those of pickletools."""

import collections
import contextlib
import os
import pickle
import pickletools
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from merge_avg.formats.pickle import load as loading
from merge_avg.formats.pickle.load import TABLE, _lined, _sized, _tuple_of, load
from merge_avg.formats.pickle.machine import Machine
from merge_avg.formats.pickle.values import (
    Allowance,
    CutShortError,
    DangerousPickleError,
    Global,
    Instance,
    PickleError,
)
from tests.formats.pickle.helpers import read

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


def test_objects_become_instances():
    """Classes are only named; what they would be made from is remembered."""
    value = read(pickle.dumps(collections.Counter("ab"), 2))
    assert isinstance(value, Instance)
    assert value.function == Global("collections", "Counter")


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


def test_nothing_is_imported():
    """Reading a pickle of a class leaves its module unimported."""
    code = (
        "import sys\n"
        "from merge_avg.formats.pickle.load import load\n"
        "load(b'cthis\\nX\\n)R.', persistent=None, call=lambda f, a: None)\n"
        "assert not {'this', 'torch', 'numpy'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_lies_around_a_pickle_is_left_alone():
    """A pickle within other bytes is read from its start to its STOP, and tells its size."""
    inside = pickle.dumps([1, "x"], 4)
    loaded = load(b"before" + inside + b"after", 6, persistent=None, call=None)
    assert (loaded.value, loaded.nbytes) == ([1, "x"], len(inside))
    assert loaded.frames == (2,)


def test_a_pickle_that_ends_too_early_is_told_from_damage():
    """A reader that has only the beginning of a file knows when to read more."""
    data = pickle.dumps({"w": "x" * 100}, 2)
    with pytest.raises(CutShortError):
        read(data[:50])
    with pytest.raises(
        PickleError, match=r"damaged at byte 3 \(ValueError: opcode 0xff\)"
    ) as caught:
        load(b"more\x80\x02\xffN.", 4, persistent=None, call=None)
    assert not isinstance(caught.value, CutShortError)


def test_persistent_ids_are_resolved():
    """Ids as text and as any value go to the caller, whose result stands in their place."""
    assert read(b"(Pname\n(I1\nS'a'\ntQl.") == [("persistent", "name"), ("persistent", (1, "a"))]


def test_known_calls_are_made_by_the_caller():
    """What the hook returns for a call stands in its place; None leaves an Instance."""

    def call(function, args):
        return sum(args) if function == Global("m", "add") else None

    value = load(b"(cm\nadd\n(I1\nI2\ntRcm\nsub\n(I1\ntRl.", persistent=None, call=call).value
    assert value[0] == 3
    assert (value[1].function, value[1].args) == (Global("m", "sub"), (1,))


def test_every_opcode_has_a_handler():
    """The table knows the opcodes of pickletools, all of them and no other; STOP ends the loop."""
    known = {ord(opcode.code) for opcode in pickletools.opcodes} - {ord(".")}
    assert {code for code, handler in enumerate(TABLE) if handler is not None} == known


@pytest.mark.parametrize(
    "data",
    [
        b"K\xff.",
        b"M\xff\xff.",
        b"J\xff\xff\xff\xff.",
        b"\x8a\2\xff\x7f.",
        b"\x8b\2\0\0\0\xff\x80.",
        b"G?\xf8\0\0\0\0\0\0.",
        b"I01\n.",
        b"I00\n.",
        b"I-12\n.",
        b"L-12L\n.",
        b"F1.5\n.",
        b"V\\u00f6\n.",
        b"X\2\0\0\0\xc3\xb6.",
        b"\x8c\1a.",
        b"\x8d\1\0\0\0\0\0\0\0a.",
        b"C\1a.",
        b"B\1\0\0\0a.",
        b"\x8e\1\0\0\0\0\0\0\0a.",
        b"\x96\1\0\0\0\0\0\0\0a.",
        b"K\1\x85.",
        b"K\1K\2\x86.",
        b"K\1K\2K\3\x87.",
        b"(K\1K\2l.",
        b"(K\1K\2d.",
        b"]K\1a.",
        b"](K\1K\2e.",
        b"}K\1K\2s.",
        b"}(K\1K\2u.",
        b"\x8f(K\1\x90.",
        b"(K\1\x91.",
        b"K\1K\0020.",
        b"K\1(K\0021.",
        b"K\0012\x86.",
        b"(K\0010K\2t.",
        b"K\1\x94K\2\x94h\0\x87.",
        b"K\1p0\n0g0\n.",
        b"N.",
        b"\x88.",
        b"\x89.",
        b").",
        b"\x80\5\x95\2\0\0\0\0\0\0\0N.",
    ],
)
def test_values_are_those_of_pickle(data):
    """An opcode alone gives the same value, of the same type, as Python's own unpickler."""
    ours, theirs = read(data), pickle.loads(data)
    assert ours == theirs
    assert isinstance(ours, type(theirs))


@pytest.mark.parametrize(
    "data", [b"cm\nf\n(K\1tR.", b"cm\nf\nK\1\x85\x81.", b"(K\1im\nf\n.", b"(cm\nf\nK\1o."]
)
def test_each_way_to_call_is_a_call(data):
    """REDUCE, NEWOBJ, INST and OBJ make an instance of function and arguments."""
    value = read(data)
    assert (value.function, value.args) == (Global("m", "f"), (1,))


def test_keywords_are_arguments_too():
    """NEWOBJ_EX remembers positions and names."""
    assert read(b"cm\nf\n)}\x92.").args == ((), {})


def test_what_is_set_on_an_object_is_remembered():
    """State, items and entries of an object that was never made are kept apart."""
    value = read(b"cm\nf\n)RK\1a(K\2K\3eK\4K\5sK\6b.")
    assert (value.items, value.pairs, value.state) == ([1, 2, 3], [(4, 5)], 6)
    assert read(b"cm\nf\n)R(K\1K\2\x90.").items == [1, 2]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"\x80\6N.", "pickle protocol 6"),
        (b"I1x\n.", "invalid literal"),
        (b"\xfe.", "opcode 0xfe"),
        (b"S'\n.", "a string without quotes"),
        (b"}(K\1u.", "a key without a value"),
    ],
)
def test_damage_is_a_pickle_error(data, says):
    """Unknown protocols, opcodes and numbers are told as damage."""
    with pytest.raises(PickleError, match=rf"damaged at byte \d+ \(ValueError: {says}"):
        read(data)


@pytest.mark.parametrize("data", [b"\x82\x01.", b"\x83\x01\x00.", b"\x97.", b"\x98."])
def test_registries_and_buffers_from_outside_are_refused(data):
    """Extension codes and out-of-band buffers have no place in a checkpoint."""
    with pytest.raises(PickleError, match=r"^the pickle (names a class|needs buffers)"):
        read(data)


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (rb"'a\nb\x41\101\\\''", "a\nbAA\\'"),
        (rb'"\t\q\"\0"', '\t\\q"\0'),
        (rb"'\x4a\xff\377\700\7\1018'", "J\udcff\udcff\udcc0\aA8"),
        (rb"'\a\b\f\n\r\t\v'", "\a\b\f\n\r\t\v"),
        (b"'a\\\nb'", None),
        (b"''", ""),
        (b"'", None),
        (b"'a\"", None),
        (b"aba", None),
        (b"XaX", None),
    ],
)
def test_quoted_texts(raw, text):
    """The escapes of protocol 0 are Python's; unknown ones stay, without a warning."""
    if text is None:  # as where the line ends within the quotes
        with pytest.raises(PickleError, match="ValueError: a string without quotes"):
            read(b"S" + raw + b"\n.")
    else:
        assert read(b"S" + raw + b"\n.") == text


def test_long_values_are_passed_over():
    """A text or bytes of megabytes is left out, and what follows is read."""
    long, nbytes = "x" * (2 << 20), 2 << 20
    value = read(pickle.dumps([long, long.encode(), bytearray(long.encode()), 7], 5))
    assert [getattr(one, "nbytes", one) for one in value] == [nbytes, nbytes, nbytes, 7]
    assert read(pickle.dumps([long[: 1 << 20], long[: (1 << 20) + 1]], 2))[0] == long[: 1 << 20]
    assert read(pickle.dumps(long[: (1 << 20) + 1], 2)).nbytes == (1 << 20) + 1
    with pytest.raises(CutShortError, match=r"^the pickle is damaged: it ends too early"):
        read(b"B" + (2 << 20).to_bytes(4, "little") + bytes((2 << 20) - 1))


def test_lines_have_a_greatest_length():
    """A number or text of protocol 0 has up to a mebibyte."""
    assert read(b"V" + b"x" * (1 << 20) + b"\n.") == "x" * (1 << 20)
    with pytest.raises(PickleError, match="absurd length"):
        read(b"V" + b"x" * (1 << 20) + b"x\n.")
    with pytest.raises(CutShortError, match=r"^the pickle is damaged: it ends too early"):
        read(b"V" + b"x" * (1 << 20))


def test_marks_have_a_greatest_depth(monkeypatch):
    """Three marks are open here, and a fourth is too much."""
    monkeypatch.setattr(loading, "_MOST_MARKS", 3)
    assert read(b"(((ttt(t.") == ()
    with pytest.raises(PickleError, match="ValueError: marks of absurd depth"):
        read(b"((((tttt.")


def test_a_frame_ends_within_the_data():
    """One that claims more bytes than there are was cut short."""
    data = pickle.dumps([1, 2, 3], 4)
    longer = data.replace(b"\x95\x0b", b"\x95\x0c")
    for raw in (data, longer + b"x"):
        assert load(b"x" + raw, 1, persistent=None, call=None).frames == (2,)
    for raw in (longer, data[:5] + b"\1" + data[6:]):
        with pytest.raises(CutShortError, match=r"^the pickle is damaged: a frame of it"):
            load(b"x" + raw, 1, persistent=None, call=None)


def test_what_a_frame_that_is_cut_calls_is_seen():
    """Python's own unpickler runs it up to the end of the data, unlike the one in C."""
    data = pickle.dumps([os.system, "x" * 300], 4)
    with pytest.raises(DangerousPickleError):
        load(data[:-200], persistent=None, call=None)


def test_nothing_is_taken_from_below_a_mark():
    """POP takes a mark where it is on top, and tuples take no more values than lie above one."""
    assert read(b"K\1(0.") == read(b"K\1(K\00200.") == 1
    for data in (b"K\1(\x85.", b"K\1(K\2\x86.", b"K\1(2.", b"K\1(q\0."):
        with pytest.raises(PickleError, match="ValueError: the stack is empty"):
            read(data)


def test_texts_and_strings_of_any_bytes_are_read():
    """Lone surrogates are texts, and a string of Python 2 may have had any encoding."""
    assert read(b"X\3\0\0\0\xed\xa0\x80.") == "\ud800"
    assert read(b"U\1\xff.") == read(b"T\1\0\0\0\xff.") == "\udcff"
    assert read(b"c\xc3\xb6\n\xed\xa0\x80\n.") == Global("\xf6", "\ud800")
    with pytest.raises(PickleError, match="damaged"):
        read(b"X\1\0\0\0\xff.")


@pytest.mark.parametrize("target", [b"ccollections\nOrderedDict\n", b"cm\nC\n"])
def test_a_class_is_not_changed(target):
    """State that is set on a class would change it for the whole process."""
    with pytest.raises(DangerousPickleError, match=r"changes [\w.]+ itself"):
        read(target + b"K\1b.")


def test_state_of_a_dict_is_kept_beside_its_entries():
    """What has no attributes, such as a list, has no state."""
    value = read(b"}K\1K\2sK\3b.")
    assert (value, value.state) == ({1: 2}, 3)
    assert read(b"]K\1b.") == []


def test_the_callers_allowance_pays():
    """One that allows little refuses what the usual one allows."""
    data = b"]" * 20 + b"."
    assert load(data, persistent=None, call=None).value == []
    with pytest.raises(PickleError, match="more memory") as caught:
        load(data, persistent=None, call=None, allowance=Allowance(used=303_000))
    assert "damaged" not in str(caught.value)


def handled(handler, data, *stack):
    """Return what a handler leaves on a stack, how far it reads, and what it pays."""
    machine = Machine(data, 0, None, None, Allowance(limit=1 << 40))
    machine.stack[:] = stack
    handler(machine)
    return machine.stack, machine.at, machine.allowance.used


def test_handlers_are_made_for_sizes_and_kinds():
    """A length and as many bytes, a line, or so many values of the stack become one value."""
    cost = b"abc".__sizeof__() + 16
    assert handled(_sized(1, bytes), b"\3abcd") == ([b"abc"], 4, cost)
    assert handled(_sized(2, int), b"\2\x0012abc") == ([12], 4, (12).__sizeof__() + 16)
    most = (1 << 20).to_bytes(4, "little") + bytes(1 << 20)
    assert handled(_sized(4, len), most)[0] == [1 << 20]
    stack, at, paid = handled(_sized(4, len), b"\1" + most[1:] + b"more")
    assert (stack[0].nbytes, at, paid) == ((1 << 20) + 1, (1 << 20) + 5, 0)
    assert handled(_lined(bytes), b"abc\nd\n") == ([b"abc"], 4, cost)
    assert handled(_lined(len), bytes(1 << 20) + b"\n")[0] == [1 << 20]
    assert handled(_tuple_of(3), b"", 0, 1, 2, 3)[0] == [0, (1, 2, 3)]
