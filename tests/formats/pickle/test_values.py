"""merge_avg.formats.pickle.values: what a value looks like in a message, and what it costs."""

import pytest

from merge_avg.formats.pickle.values import (
    Allowance,
    Global,
    InertDict,
    Instance,
    Omitted,
    PickleError,
    shown,
)

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


@pytest.mark.parametrize(
    ("read", "limit"),
    [
        (0, 300_000),
        (1000, 500_000),
        (1_000_000, 180_000_000),
        (100_000_000, 2_400_000_000),
    ],
)
def test_the_limit_grows_with_what_was_read(read, limit):
    """Quickly up to 180 MB, and in proportion to the pickle beyond."""
    allowance = Allowance(read=read)
    allowance.spend(limit)
    with pytest.raises(PickleError, match="more memory"):
        allowance.spend(1)


def test_packed_pickles_count_for_less():
    """A byte of a pickle that was packed to a tenth buys a tenth."""
    allowance = Allowance(0.1, read=1000)
    allowance.spend(320_000)
    with pytest.raises(PickleError, match="more memory"):
        allowance.spend(1)


def test_a_limit_never_shrinks():
    """What the caller allows stays allowed."""
    allowance = Allowance(limit=4_000_000)
    allowance.spend(4_000_000)
    with pytest.raises(PickleError):
        allowance.spend(1)
