"""merge_avg.formats.pickle.values: what a value looks like in a message."""

import pytest

from merge_avg.formats.pickle.values import Global, InertDict, Instance, Omitted, shown

CLASS = Global("m", "C", 3, 9)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("w", "w"),
        (CLASS, "m.C"),
        (None, "None"),
        (True, "True"),
        (1.5, "1.5"),
        (2**63, "9223372036854775808"),
        (2**65, "a int"),  # whose digits could be millions
        (b"ab", "b'ab'"),
        (("a", 1), "('a', '1')"),
        ((("a",),), "a tuple"),  # which could be nested without end
        (Instance(CLASS, ()), "a m.C"),
        (Instance(3, ()), "a Instance"),
        (InertDict(), "a InertDict"),
        (Omitted(5), "a Omitted"),
        ("x" * 300, "x" * 200 + "..."),
        (b"x" * 300, repr(b"x" * 200)[:200] + "..."),
    ],
)
def test_a_value_is_shown_in_a_few_words(value, text):
    """However large or deep a value is, its words are few."""
    assert shown(value) == text


def test_a_global_is_its_name():
    """The place of a name in the pickle makes no difference to what it names."""
    assert Global("m", "C") == CLASS
    assert len({Global("m", "C"), CLASS}) == 1


def test_instances_are_compared_by_identity():
    """Two objects with equal arguments are two objects."""
    assert Instance(CLASS, (1,)) != Instance(CLASS, (1,))
