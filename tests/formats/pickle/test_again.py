"""merge_avg.formats.pickle.again: values are pickled as they were read, and nothing is run."""

import pickle
from dataclasses import dataclass, field
from enum import Enum

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from merge_avg.formats.pickle.again import pickled_again
from merge_avg.formats.pickle.load import load
from merge_avg.formats.pickle.values import InertDict, Omitted, PickleError, Sized


def again(value):
    """Read a pickle of a value inertly, write it again, and let Python load that."""
    read = load(pickle.dumps(value), persistent=lambda _: None, call=lambda *_: None)
    return pickle.loads(pickled_again(read.value))


class Colour(Enum):
    """An enum, which a pickle calls."""

    RED = 1


@dataclass
class Box:
    """An object with a state, whose class wants arguments."""

    name: str
    content: object = field(default_factory=list)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary(),
    lambda one: st.lists(one) | st.dictionaries(st.text(), one) | st.tuples(one, one),
)


@given(VALUES)
def test_plain_values_are_what_they_were(value):
    """Numbers, texts and containers of them come back."""
    assert again(value) == value


def test_objects_are_what_they_were():
    """Classes are named, and made as they were: with a state, or called with arguments."""
    shared = ["the same"]
    value = {"a": Box("x", shared), "b": Box("y", shared), "c": (Colour.RED, torch.Size([2, 3]))}
    found = again(value)
    assert found == value
    assert found["a"].content is found["b"].content
    assert type(found["c"][1]) is torch.Size


def test_shapes_are_written_as_torch_has_them():
    """What a reader took for a plain tuple is a torch.Size again, also an empty one."""
    found = pickle.loads(pickled_again(InertDict(a=Sized((2, 300)), b=Sized(()))))
    assert found == {"a": (2, 300), "b": ()}
    assert {type(one) for one in found.values()} == {torch.Size}


def test_what_is_shared_is_written_once():
    """A value that doubles at every level is as short as its pickle, and not as its content."""
    value = ["x"]
    for _ in range(60):
        value = [value, value]
    assert len(pickled_again(value)) < 2000


def test_what_was_not_kept_is_refused():
    """Texts that were passed over, and values without an end, cannot be written."""
    endless = []
    endless.append(endless)
    for value in (Omitted(5), endless, 1 << 5000):
        with pytest.raises(PickleError):
            pickled_again(value)
