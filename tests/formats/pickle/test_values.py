"""merge_avg.formats.pickle.values: words of values, and their cost."""

import pytest

from merge_avg.formats.pickle.values import (
    Allowance,
    DangerousPickleError,
    Global,
    InertDict,
    Instance,
    Omitted,
    PickleError,
    names_a_member,
    shown,
)
from tests.formats.pickle.helpers import read

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
        (2**64 - 1, "18446744073709551615"),
        (2**64, "a int"),  # whose digits could be millions
        (b"ab", "b'ab'"),
        (("a", 1), "('a', '1')"),
        (("a", None, CLASS), "('a', 'None', 'm.C')"),
        ((1,) * 8, "(" + ", ".join(["'1'"] * 8) + ")"),
        ((1,) * 9, "a tuple"),
        ((("a",),), "a tuple"),  # which could be nested without end
        ((1, ("a",)), "a tuple"),
        ([1], "a list"),
        (Instance(CLASS, ()), "a m.C"),
        (Instance(3, ()), "a Instance"),
        (InertDict(), "a InertDict"),
        (Omitted(5), "a Omitted"),
        ("x" * 200, "x" * 200),
        ("x" * 201, "x" * 200 + "..."),
        (b"x" * 197, repr(b"x" * 197)),
        (b"x" * 300, repr(b"x" * 200)[:200] + "..."),
        (b"\0" * 10**6, repr(b"\0" * 50)[:200] + "..."),
    ],
)
def test_a_value_is_shown_in_a_few_words(value, text):
    """However large or deep a value is, its words are few."""
    assert shown(value) == text


def test_a_global_is_its_name():
    """The place of a name in the pickle makes no difference to what it names."""
    assert Global("m", "C") == CLASS != Global("m", "D")
    assert str(CLASS) == "m.C"
    assert repr(CLASS) == "Global(module='m', name='C')"
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
        (100_000_000, 3_200_000_000),
    ],
)
def test_the_limit_grows_with_what_was_read(read, limit):
    """Quickly up to 180 MB, and in proportion to the pickle beyond."""
    allowance = Allowance(read=read)
    allowance.spend(limit)
    with pytest.raises(PickleError, match="more memory"):
        allowance.spend(1)


def test_the_limit_grows_only_when_it_is_reached():
    """What is spent is counted, and the limit stays where it was until then."""
    allowance = Allowance(read=1000)
    allowance.spend(300_000)
    assert (allowance.used, allowance.limit) == (300_000, 300_000)
    allowance.spend(1)
    assert (allowance.used, allowance.limit) == (300_001, 500_000)


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


NAMES = [
    ("os", "system"),
    ("posix", "system"),
    ("nt", "system"),
    ("builtins", "eval"),
    ("__builtin__", "exec"),
    ("builtins", "getattr"),
    ("builtins", "print.__globals__"),
    ("subprocess", "Popen"),
    ("os.path", "join"),
    ("importlib", "import_module"),
    ("runpy", "run_path"),
    ("torch.hub", "load"),
    ("ctypes", "CDLL"),
    ("torch", "os"),
    ("torch", "os.system"),
]


@pytest.mark.parametrize(("module", "name"), NAMES)
def test_dangerous_callables_are_refused_by_name(module, name):
    """Every way to name a callable that runs code ends in an error with that name."""
    line, text = f"{module}\n{name}\n".encode(), (module.encode(), name.encode())
    short = b"".join(b"\x8c" + bytes([len(t)]) + t for t in text)
    for data in (
        b"c" + line + b"(tR.",
        b"(S'true'\ni" + line + b".",
        b"(c" + line + b"o.",
        b"\x80\x04" + short + b"\x93)R.",
        b"\x80\x02c" + line + b")\x81.",
        b"c" + line + b".",
    ):
        with pytest.raises(DangerousPickleError, match=f"{module}.{name}") as caught:
            read(data)
        assert "as safetensors from a source you trust" in caught.value.hint


GETTER, KIND = b"cbuiltins\ngetattr\n", b"cmodule\nKind\n"


def test_members_of_enums_are_inert():
    """Python 3.11.0 to 3.11.3 pickle them by getattr, again and again from the memo."""
    value = read(b"(" + GETTER + b"p0\n(" + KIND + b"S'A'\ntRg0\n(" + KIND + b"S'b'\ntRt.")
    assert [(one.function.name, one.args[1]) for one in value] == [
        ("getattr", "A"),
        ("getattr", "b"),
    ]


@pytest.mark.parametrize(
    "data",
    [
        GETTER + b".",  # the function itself
        GETTER + b"(cmodule\nkind\nS'A'\ntR.",  # of what may be a module
        GETTER + b"(" + KIND + b"S'__init__'\ntR.",
        GETTER + b"(" + KIND + b"S'A'\nNtR.",  # with a default
        GETTER + b"(S'Kind'\nS'A'\ntR.",
        GETTER + b"(" + KIND + b"S'A'\ntR(tR.",  # what it returned is called
        GETTER + b"(" + KIND + b"S'A'\ntR)\x81.",
        b"cmodule\nmap\n(" + GETTER + b"]tR.",  # given to another function
        # The same, and two calls for what was put on the stack once.
        b"cmodule\nmap\n("
        + GETTER
        + b"p0\n]tR0g0\n2("
        + KIND
        + b"S'A'\ntR0("
        + KIND
        + b"S'A'\ntR.",
    ],
)
def test_any_other_use_of_getattr_is_refused(data):
    """Only the form that enums take is let through."""
    with pytest.raises(PickleError, match=r"builtins\.getattr"):
        read(data)


def test_members_are_told_by_the_name_of_their_class():
    """A class begins with a capital letter; a member is an identifier without two underscores."""
    assert names_a_member((Global("m", "_Kind"), "A"))
    assert names_a_member((Global("m", "Outer.Kind"), "a"))
    assert names_a_member((Global("m", "Outer._Kind"), "_a"))
    for args in (
        (Global("m", "kind"), "A"),
        (Global("m", "Kind.inner"), "A"),
        (Global("M", "__kind"), "A"),
        (Global("m", "_"), "A"),
        (Global("m", "Kind"), "a.b"),
        (Global("m", "Kind"), "__a"),
        (Global("m", "Kind"), ""),
        (Global("m", "Kind"), b"a"),
        (Global("m", "Kind"), "a", None),
        [Global("m", "Kind"), "a"],
        ("Kind", "A"),
        3,
        (),
    ):
        assert not names_a_member(args)
