"""merge_avg.formats.pickle.load: a pickle is read, never run."""

import collections
import contextlib
import pickle
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from merge_avg.formats.pickle.load import load
from merge_avg.formats.pickle.values import CutShortError, Global, Instance, PickleError
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
        "load(b'cantigravity\\nX\\n)R.', persistent=None, call=lambda f, a: None)\n"
        "assert not {'antigravity', 'torch', 'numpy'} & set(sys.modules)\n"
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
        read(b"\x80\x02\xffN.")
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
