"""Ledgers are read as they were written, and nothing else is."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_128_hexdigest

from merge_avg.parts._ledger import Ledger, pack, unpack
from merge_avg.parts._stretches import Stretch

STRETCH = Stretch(7, (1, 2), (3, 4), (0, 0), 96)
COUNTS = 2, [1, 2]
numbers = st.integers(0, (1 << 63) - 1)
floats = st.floats(width=64)
tables = st.dictionaries(st.integers(0, 99), st.lists(floats, min_size=4, max_size=4))
names = st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=3).map(tuple)


def rows(width):
    return st.lists(st.tuples(*[numbers] * width), max_size=3).map(tuple)


ledgers = st.builds(
    Ledger,
    stretch=st.just(7),
    host=st.text(st.characters(exclude_categories=["Cs"])),
    rank=st.integers(0, 1000),
    seconds=st.integers(0, 1000).map(float),
    nbytes=numbers,
    hashes=st.tuples(*[st.integers(0, 1 << 140)] * 3),
    differing=names,
    nonfinite=names,
    varying=st.lists(st.integers(0, 1000), max_size=3).map(tuple),
    products=st.lists(st.tuples(tables, tables), max_size=2).map(tuple),
    inputs=st.tuples(rows(6), rows(6)),
    outputs=st.tuples(st.tuples(rows(4)), st.tuples(rows(4), rows(4))),
)


@given(ledgers)
def test_a_ledger_comes_back_as_it_was(ledger):
    """What is packed is unpacked to the bit, NaN and infinity included."""
    raw = pack(ledger, STRETCH, "ab", ["5", "6"])
    assert repr(unpack(raw, STRETCH, "ab", ["5", "6"], COUNTS)) == repr(ledger)


def packed():
    ledger = Ledger(7, "h", 0, 1.0, 9, (1, 2, 3), (), (), (), (), ((), ()), (((),), ((), ())))
    return pack(ledger, STRETCH, "ab", ["5", "6"])


def refused(raw, stretch=STRETCH, plan="ab", tokens=("5", "6"), counts=COUNTS):
    with pytest.raises(ValueError) as raised:
        unpack(raw, stretch, plan, list(tokens), counts)
    return str(raised.value)


def forged(**changed):
    """A ledger with other values, and an XXH3 that fits them."""
    text = json.dumps(json.loads(packed().split(b"\n")[0]) | changed).encode()
    return text + b"\n" + xxh3_128_hexdigest(text).encode() + b"\n"


def test_a_torn_ledger_is_refused():
    """Wherever a ledger is cut, or a byte of it changed, it is refused."""
    raw = packed()
    for stop in range(len(raw)):
        assert refused(raw[:stop]) == "it is torn, or was changed"
    for at in range(len(raw)):
        refused(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])


def test_other_ledgers_are_refused_by_name():
    """A ledger of another merge, version, stretch or output in the making says which it is."""
    assert refused(packed(), plan="cd") == "it is of another merge"
    assert refused(packed(), tokens=("5", "7")) == "it is of an output in the making that is gone"
    other = Stretch(8, (1, 2), (3, 4), (0, 0), 96)
    assert refused(packed(), stretch=other) == "it is of another stretch of the work"
    assert refused(forged(span=[1, 2, 3, 5, 0, 0, 96])) == "it is of another stretch of the work"
    assert refused(forged(merge_avg="0.0.1")) == "it is of merge-avg 0.0.1"


@pytest.mark.parametrize(
    "changed",
    [
        {"hashes": ["1"]},
        {"hashes": [1, 2, 3]},
        {"hashes": ["x", "y", "z"]},
        {"inputs": [[2, ""]]},
        {"inputs": [[0, "AAAA"]]},
        {"inputs": [[0, "AAAAAAAAAAA="]]},
        {"inputs": [[-1, ""]]},
        {"inputs": {}, "outputs": 3},
        {"outputs": [[0, 1, ""]]},
        {"outputs": [[0, True, ""]]},
        {"products": [["", ""]]},
        {"products": [[["AAAAAAAAAAA=", ""], ["", "AAAA"]]]},
        {"bytes": -1},
        {"bytes": 1 << 70},
        {"seconds": "1"},
        {"seconds": float("nan")},
        {"rank": None},
        {"host": 3},
        {"differing": [3]},
        {"varying": [-1]},
        {"varying": 1},
    ],
)
def test_forged_ledgers_are_refused(changed):
    """A ledger whose values cannot be is refused, though its XXH3 fits."""
    refused(forged(**changed))
