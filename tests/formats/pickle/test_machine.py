"""merge_avg.formats.pickle.machine: the stack, the memo, and keys that would take forever."""

import pickle

import pytest

from merge_avg.formats.pickle.load import load
from merge_avg.formats.pickle.machine import inert_dict
from merge_avg.formats.pickle.values import Allowance, PickleError
from tests.formats.pickle.helpers import read


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
        with pytest.raises(PickleError, match="too early"):
            read(opcode + b"\xff\xff\xff\x7fabc.")


@pytest.mark.parametrize("nesting", [b"\x85" * 1_000_000, b"2\x86" * 80, b"2\x86" * 80 + b"\x85"])
@pytest.mark.parametrize("use", [b"K\x01s.", b"0."])
def test_keys_of_absurd_depth_or_size_are_refused(nesting, use):
    """A key whose hash would overflow the stack, or never end, is damage."""
    start = b"\x80\x04}" if use != b"0." else b"\x80\x04("
    end = use if use != b"0." else b"\x91."
    with pytest.raises(PickleError, match="absurd size"):
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
    value = read(b"(ctorch\nFloatStorage\nq\0h\0cm\nKind\nq\1h\1l.")
    assert [(one.start, one.stop) for one in value] == [(1, 21), (23, 25), (25, 33), (25, 33)]


def test_a_dict_of_pairs_is_checked_as_any_other():
    """Pairs that a pickle passes to a dict's class are paid for, and may not be anything."""
    allowance = Allowance()
    assert inert_dict([("a", 1), ("b", 2)], allowance) == {"a": 1, "b": 2}
    assert inert_dict({"a": 1}, allowance) == {"a": 1}
    assert allowance.used > 0
    with pytest.raises(TypeError, match="other than pairs"):
        inert_dict(3, allowance)
    with pytest.raises(PickleError, match="more memory"):
        inert_dict([("a", 1)] * 10_000, Allowance())
