"""merge_avg.formats.bounded_json: JSON of others, within bounds of memory."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merge_avg.formats.bounded_json import loads

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(value=st.dictionaries(st.text(), VALUES), plain=st.booleans())
def test_objects_are_read_as_json_reads_them(value, plain):
    """Whatever json writes, in ASCII or not, comes back."""
    text = json.dumps(value, ensure_ascii=plain)
    assert loads(text.encode("utf-8", "surrogatepass" if plain else "strict")) == value


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"[1]", "not an object"),
        (b"3", "not an object"),
        (b'{"a":1,"a":2}', "twice"),
        (b'{"a":{"b":1,"b":1}}', "twice"),
        (b"{", "Expecting"),
        (b"", "Expecting"),
        (b'{"\xff":1}', "utf-8"),
        (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "too deep"),
        (b'{"a":[' + b"{}," * 2_000_000 + b"0]}", "more memory"),
        ('{"a":"' + "\u20ac" * 30_000_000 + '"}', "more memory"),
    ],
    ids=["list", "number", "twice", "inside", "cut", "empty", "bytes", "deep", "many", "wide"],
)
def test_what_is_not_an_object_is_a_value_error(raw, says):
    """Damage, keys that appear twice and texts that would take far more memory are refused."""
    with pytest.raises(ValueError, match=says):
        loads(raw if isinstance(raw, bytes) else raw.encode())


def test_a_large_text_of_few_values_is_read():
    """What counts is what a text would make, not how long it is."""
    assert len(loads(b'{"a":"' + b"x" * 20_000_000 + b'"}')["a"]) == 20_000_000
