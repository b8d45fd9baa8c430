"""merge_avg.formats.pickle.machine: the stack, the memo, and keys that would take forever."""

import pickle
import sys

import pytest

from merge_avg.formats.pickle import machine
from merge_avg.formats.pickle.callables import verdict
from merge_avg.formats.pickle.load import load
from merge_avg.formats.pickle.machine import Machine, inert_dict
from merge_avg.formats.pickle.values import Allowance, PickleError
from tests.formats.pickle.helpers import read


@pytest.fixture(autouse=True)
def fresh():
    """Ask for each verdict anew."""
    verdict.cache_clear()


def loaded(data, allowance=None):
    """Read a pickle that lies behind two other bytes, with no call known."""
    call, allowance = (lambda *_: None), allowance or Allowance()
    return load(b"??" + data, 2, persistent=lambda pid: pid, call=call, allowance=allowance)


def test_shared_and_recursive_objects_stay_so():
    """Memo entries give one object, also inside itself."""
    shared = [1]
    outer = [shared, shared]
    outer.append(outer)
    value = read(pickle.dumps(outer))
    assert value[0] is value[1]
    assert value[2] is value


def test_memo_entries_may_come_in_any_order():
    """Entries beside the row of indices are found, replaced and counted as pickle does."""
    data = b"](K\1r\5\0\0\0K\2q\0K\3q\1K\4q\0h\0h\1j\5\0\0\0e."
    assert read(data) == pickle.loads(data) == [1, 2, 3, 4, 4, 3, 1]


def test_absurd_memo_indices_and_lengths_cost_nothing():
    """An index or a length of four billion takes no memory."""
    assert read(b"Nr\xff\xff\xff\xff.") is None
    for opcode in (b"X", b"B", b"T"):
        with pytest.raises(PickleError, match=r"^the pickle is damaged: it ends too early"):
            read(opcode + b"\xff\xff\xff\x7fabc.")


@pytest.mark.parametrize("nesting", [b"\x85" * 100_000, b"2\x86" * 80, b"2\x86" * 80 + b"\x85"])
@pytest.mark.parametrize("use", [b"K\x01s.", b"0."])
def test_keys_of_absurd_depth_or_size_are_refused(nesting, use):
    """A key whose hash would overflow the stack, or never end, is damage."""
    start = b"\x80\x04}" if use != b"0." else b"\x80\x04("
    end = use if use != b"0." else b"\x91."
    with pytest.raises(PickleError, match="ValueError: a key of absurd size"):
        load(start + b")" + nesting + end, persistent=lambda _: None, call=lambda *_: None)


def test_many_keys_whose_hashes_can_be_chosen_are_refused():
    """Ten thousand tuples of numbers may all have one hash; as many texts may not."""
    texts = pickle.dumps({str(n): n for n in range(11_000)})
    assert len(read(texts)) == 11_000
    with pytest.raises(PickleError, match="too many keys"):
        read(pickle.dumps({(n,): n for n in range(11_000)}))


@pytest.mark.parametrize("data", [b".", b"(.", b"(0.", b"t.", b"K\1(a.", b"}K\1(s.", b"h\0."])
def test_an_empty_stack_or_memo_is_damage(data):
    """Opcodes take nothing from below a mark, and nothing that was never put."""
    with pytest.raises(PickleError, match="damaged"):
        read(data)


@pytest.mark.parametrize("data", [b"K\1K\2a.", b"K\1K\2K\3s.", b"](K\1d.", b"K\1(K\2e."])
def test_items_for_what_is_no_container_are_damage(data):
    """Numbers have no items, and a key has a value."""
    with pytest.raises(PickleError, match="damaged"):
        read(data)


def test_the_place_of_a_storage_class_is_where_it_is_used():
    """A class from the memo has the bytes of the opcode that got it, not those that named it."""
    value = loaded(b"(ctorch\nFloatStorage\nq\0h\0cm\nKind\nq\1h\1l.").value
    assert [(one.start, one.stop) for one in value] == [(1, 21), (23, 25), (25, 33), (25, 33)]
    assert [str(one) for one in value] == ["torch.FloatStorage"] * 2 + ["m.Kind"] * 2


def test_a_dict_of_pairs_is_checked_as_any_other():
    """Pairs that a pickle passes to a dict's class are paid for, and may not be anything."""
    allowance = Allowance()
    assert inert_dict([("a", 1), ("b", 2)], allowance) == {"a": 1, "b": 2}
    assert allowance.used == 400
    assert inert_dict({"a": 1}, allowance) == {"a": 1}
    assert inert_dict((["a", 1],), allowance) == {"a": 1}
    with pytest.raises(ValueError, match="a key of absurd size"):
        inert_dict([((0,) * 1000, 1)], allowance)
    with pytest.raises(TypeError, match="other than pairs"):
        inert_dict(3, allowance)
    with pytest.raises(PickleError, match="more memory"):
        inert_dict([("a", 1)] * 10_000, Allowance())


@pytest.mark.parametrize(
    ("data", "cost"),
    [
        (b"K\1.", 0),
        (b"J\1\0\0\0.", 32),
        (b"C\1a.", sys.getsizeof(b"a") + 16),
        (b"I1\n.", sys.getsizeof(1) + 16),
        (b"(K\1K\2l.", 120),
        (b"](K\1K\2e.", 120),
        (b"(K\1K\2t.", 100),
        (b"(K\1K\2d.", 260),
        (b"}(K\1K\2K\3K\4u.", 360),
        (b"}K\1K\2\x86K\3s.", 370),
        (b"}K\1K\2\x86\x85\x85K\3s.", 570),
        (b"\x8f(K\1K\2\x90.", 506),
        (b"(K\1K\2\x91.", 506),
        (b"Nq\0.", 10),
        (b"Nq\1.", 210),
        (b"ccollections\nOrderedDict\n.", 130),
        (b"ctorch\nFloatStorage\nq\0h\0.", 270),
        (b"cm\nC\n.", 260),
        (b"cm\nC\n)\x81.", 540),
        (b"\x80\5\x95\1\0\0\0\0\0\0\0N.", 40),
        (b"N" * 1000 + b".", 0),
        (b"N" * 1001 + b".", 10_000),
        (b"N" * 2001 + b".", 20_000),
    ],
)
def test_each_object_is_paid_for(data, cost):
    """What a pickle makes is counted, and so are its bytes, from where it starts."""
    allowance = Allowance()
    loaded(data, allowance)
    assert (allowance.used, allowance.read) == (cost, len(data))


@pytest.mark.parametrize("behind", [b"", bytes(50_000)])
def test_a_pickle_gets_no_more_than_its_bytes_buy(behind):
    """Sets of 250 bytes each, and 10 on the stack, use up 300,000 and 200 for each opcode."""
    assert loaded(b"\x8f" * 4900 + b"." + behind).value == set()
    with pytest.raises(PickleError, match="more memory") as caught:
        load(bytes(50_000) + b"\x8f" * 5100 + b".", 50_000, persistent=None, call=None)
    assert "damaged" not in str(caught.value)


def test_a_stack_has_a_greatest_depth(monkeypatch):
    """Two thousand values are on it here, and one more is too much."""
    monkeypatch.setattr(machine, "_DEEPEST_STACK", 2000)
    assert loaded(b"N" * 2000 + b".").value is None
    with pytest.raises(PickleError, match="absurd depth"):
        loaded(b"N" * 2001 + b".")


@pytest.mark.parametrize(
    ("lengths", "says"),
    [
        ((500, 500), None),
        ((500, 501), "a name of absurd length"),
        ((1, 999), None),
        ((0, 1000), None),
        ((1, 1000), "a name of absurd length"),
        ((1, 1001), "a line of absurd length"),
        ((1001, 0), "a line of absurd length"),
    ],
)
def test_a_name_has_a_greatest_length(lengths, says):
    """Module and class have a thousand characters together."""
    module, name = (b"x" * length for length in lengths)
    data = b"c" + module + b"\n" + name + b"\n."
    if says is None:
        assert len(str(loaded(data).value)) == 1001  # with the dot between them
    else:
        with pytest.raises(PickleError, match=f"ValueError: {says}"):
            loaded(data)


@pytest.mark.parametrize(
    ("key", "crafted"),
    [
        ("a", 0),
        (b"a", 0),
        (None, 0),
        (1.5, 0),
        (2**60 - 1, 0),
        (2**60, 1),
        (-(2**60), 1),
        ((), 1),
        (((),), 1),
        (("a", b"b"), 0),
        (("a", 1), 1),
        ((1, "a"), 1),
        (frozenset({1}), 1),
        (frozenset({"a"}), 0),
    ],
)
def test_keys_whose_hashes_can_be_chosen_are_counted(key, crafted):
    """Those of texts and of small numbers cannot: only large numbers and tuples count."""
    one = Machine(b"", 0, None, None, Allowance())
    one.check_key(key)
    assert one.crafted == crafted


def test_the_limits_of_keys_are_exact():
    """Ten thousand keys may be crafted, and one may hold 999 values beside itself."""
    one = Machine(b"", 0, None, None, Allowance(limit=1 << 40))
    one.check_key(("a",) * 999)
    for key in (("a",) * 1000, (("a",) * 500, ("a",) * 500)):
        with pytest.raises(ValueError, match="absurd size"):
            one.check_key(key)
    for _ in range(10_000):
        one.check_key((1,))
    with pytest.raises(ValueError, match="too many keys"):
        one.check_key((1,))


def test_a_negative_memo_index_is_not_counted_from_the_end():
    """It stands for an entry of its own, as any number beside the row."""
    assert read(b"(K\1p0\nK\2p-1\n0g0\ng-1\nt.") == (1, 1, 2)
    with pytest.raises(PickleError, match="KeyError"):
        read(b"K\1p0\ng-1\n.")


@pytest.mark.parametrize(
    ("data", "names"),
    [
        (b"ccollections\nOrderedDict\n)R.", ()),
        (b"(cm\nC\n)Rcm\nC\n)Rcm\nD\nt.", ("m.C", "m.D")),
        (b"N)R.", ("None",)),
        (b"cm\nC\n)R)R.", ("m.C", "a m.C")),
        (b"ctorch._tensor\n_rebuild_from_type_v2\ncm\nC\n\x85R.", ("m.C",)),
        (b"ctorch._tensor\n_rebuild_from_type_v2\nN\x85R.", ("None",)),
        (b"ccollections\nCounter\nN\x85R.", ()),
        (b"cbuiltins\ngetattr\n(cm\nKind\nS'A'\ntR.", ("m.Kind", "m.Kind.A")),
    ],
)
def test_what_a_loader_would_call_is_noted(data, names):
    """Each callable that is not known to be inert is told once, in the order of the pickle."""
    assert loaded(data).callables == names


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"cm\nC\nNR.", "arguments are not a tuple"),
        (b"cm\nC\n]\x81.", "arguments are not a tuple"),
        (b"N\x8c\1a\x93.", "a global's name is not a text"),
        (b"\x8c\1aN\x93.", "a global's name is not a text"),
    ],
)
def test_arguments_are_a_tuple_and_names_are_texts(data, says):
    """Anything else in their place is damage."""
    with pytest.raises(PickleError, match=f"TypeError: {says}"):
        loaded(data)


def test_a_call_has_what_was_read_so_far_to_spend():
    """Hooks pay from an allowance that knows how far the pickle was read."""
    allowance, seen = Allowance(), []
    data = b"??" + b"K\0000" * 50 + b"cm\nC\n)R."
    load(data, 2, persistent=None, call=lambda *_: seen.append(allowance.read), allowance=allowance)
    assert seen == [len(data) - 3]
