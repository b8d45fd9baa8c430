"""merge_avg.formats.bounded: texts of others, within bounds of memory."""

import errno
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merge_avg.errors import MergeError
from merge_avg.formats import bounded
from merge_avg.formats.bounded import LARGEST, loads, read

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
        (b"[1]", "^it is not an object$"),
        (b"3", "^it is not an object$"),
        (b'{"a":1,"a":2}', "^a key appears twice$"),
        (b'{"a":{"b":1,"b":1}}', "^a key appears twice$"),
        (b"{", "Expecting"),
        (b"", "Expecting"),
        (b'{"\xff":1}', "utf-8"),
        (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "^it is nested too deep$"),
        (b'{"a":[' + b"{}," * 2_000_000 + b"0]}", "^its values would take more memory"),
        ('{"a":"' + "\u20ac" * 30_000_000 + '"}', "^its values would take more memory"),
        (b'{"a":"' + rb"\u20ac" * 5_000_000 + b'"}', "^its values would take more memory"),
        (b'{"a":' + b"9" * 5000 + b"}", "4300 digits"),
    ],
    ids="list number twice inside cut empty bytes deep many wide escaped digits".split(),
)
def test_what_is_not_an_object_is_a_value_error(raw, says):
    """Damage, keys that appear twice and texts that would take far more memory are refused."""
    with pytest.raises(ValueError, match=says):
        loads(raw if isinstance(raw, bytes) else raw.encode())


def test_a_large_text_of_few_values_is_read():
    """What counts is what a text would make, not how long it is."""
    assert len(loads(b'{"a":"' + b"x" * 20_000_000 + b'"}')["a"]) == 20_000_000


def test_more_is_allowed_for_a_long_text_of_ascii():
    """Headers of many tensors are long; what they may take grows with their length."""
    raw = b'{"a":[' + b"1," * 4_000_000 + b"1]}"
    with pytest.raises(ValueError, match="more memory"):
        loads(raw)
    assert len(loads(raw, 100)["a"]) == 4_000_001


@pytest.mark.parametrize(
    ("text", "costs"),
    [
        ('{"a":1}', 350 + 70 + 2 * 7),
        ('{"a":[1,2]}', 350 + 70 + 100 + 70 + 2 * 11),
        ('{"\u00e9":1}', 350 + 70 + 8 * 8),
        (r'{"\u20ac":1}', 350 + 70 + 8 * 12),
    ],
)
def test_what_a_text_may_take(monkeypatch, text, costs):
    """Each mark and each byte counts, and only plain ASCII is allowed more for its length."""
    raw = text.encode()
    monkeypatch.setattr(bounded, "_LARGEST", costs)
    assert loads(raw) == json.loads(text)
    monkeypatch.setattr(bounded, "_LARGEST", costs - 1)
    with pytest.raises(ValueError, match="more memory"):
        loads(raw)
    if raw.isascii() and b"u" not in raw:
        assert loads(raw, 62) == json.loads(text)
    else:
        with pytest.raises(ValueError, match="more memory"):
            loads(raw, 99)


def test_a_file_is_read_up_to_a_size(tmp_path):
    """A file of the largest size is read, and of one byte more refused, though it be sparse."""
    path = tmp_path / "x"
    path.write_bytes(b"abc")
    assert read(path, 3) == read(path) == b"abc"
    with pytest.raises(MergeError, match="longer than the 2 bytes"):
        read(path, 2)
    with path.open("ab") as file:
        file.truncate(LARGEST + 1)
    with pytest.raises(MergeError, match="longer than the 33,554,432 bytes") as caught:
        read(path)
    assert caught.value.where == str(path)


def test_a_device_without_end_is_refused():
    """What tells no size is read up to the largest, and no further."""
    with pytest.raises(MergeError, match="longer than"):
        read(Path("/dev/zero"))


def test_what_cannot_be_read_is_an_error_that_names_it(tmp_path):
    """A missing file and a directory are reported as the system does."""
    for path, says in ((tmp_path / "none", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(MergeError, match=rf": cannot be read \({says}") as caught:
            read(path)
        assert caught.value.where == str(path)


def test_a_failure_that_names_no_file_is_of_the_file(tmp_path, monkeypatch):
    """What the system says of a descriptor is reported of its path."""
    (tmp_path / "a").touch()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", failing)
        with pytest.raises(MergeError, match="Input/output") as caught:
            read(tmp_path / "a")
    assert caught.value.where == str(tmp_path / "a")


def failing(_):
    raise OSError(errno.EIO, "Input/output error")
