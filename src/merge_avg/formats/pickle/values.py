"""The values that a pickle describes, held inert, and what they cost.

in the pickle                       here
----------------------------------  ------------------------------------------------------
None, a bool, a number              itself
a text or bytes up to 1 MiB         itself
a longer one                        Omitted: its length, and a digest
a list, tuple, set or frozenset     itself
a dict                              InertDict
a class or function                 Global: its module and name
a call, an object                   Instance: the callable, its arguments, and its later state

A pickle of a few kilobytes can ask for gigabytes of objects, or for hours of work. So each object
is paid for before it is made, from an `Allowance` that grows with the bytes read so far.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NoReturn

from merge_avg.errors import MergeError

Value = Any  # a pickle can hold anything; consumers narrow it before use

_LONGEST_SHOWN = 200
# Bytes of objects for bytes of the pickle: 200 for each, from 300 kB up to 180 MB, and 32 for each
# from there on. Measured: a state dict of 20,000 tensors takes about 16 for each, and a module of
# 50,000 layers, saved whole, 28.
_FIRST, _STEEP, _SMALL, _FLAT = 300_000, 200, 180_000_000, 32


class PickleError(MergeError):
    """A pickle that is damaged, or that asks for what no checkpoint needs."""


class CutShortError(PickleError):
    """A pickle that continues past the end of the data."""


class DangerousPickleError(PickleError):
    """A pickle that names a callable known to run code."""


@dataclass(frozen=True, slots=True)
class Global:
    """A class or function by name, and the bytes of the pickle that put it on the stack here."""

    module: str
    name: str
    start: int = field(default=0, compare=False, repr=False)
    stop: int = field(default=0, compare=False, repr=False)

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


# Compared by identity: two objects with the same arguments are still two objects, and comparing
# nested arguments could take as long as whoever wrote the pickle likes.
@dataclass(eq=False, slots=True)
class Instance:
    """A call of `function` that was not made, with all that the pickle does to its result."""

    function: Value
    args: Value
    state: Value = None
    items: list[Value] = field(default_factory=list)
    pairs: list[tuple[Value, Value]] = field(default_factory=list)


class Sized(tuple[int, ...]):
    """A shape that a pickle makes as a torch.Size: a tuple, but written again as what it was."""

    __slots__ = ()


class InertDict(dict[Value, Value]):
    """A dict, with the attributes that a pickle sets on it (an OrderedDict's) kept apart."""

    state: Value = None
    args: Value = None  # what it was made of


@dataclass(frozen=True, slots=True, eq=False)
class Omitted:
    """The length and a digest of a text or bytes too long to be of use here."""

    nbytes: int
    digest: str = ""


def shown(value: Value) -> str:
    """Describe a value in a few words, however large or deep it is."""
    match value:
        case int() if value.bit_length() > 64:  # its digits could be millions
            text = "a int"
        case str() | int() | float() | None | Global():
            text = str(value)
        case bytes():
            text = repr(value[:_LONGEST_SHOWN])
        case tuple() if len(value) <= 8 and not any(isinstance(one, tuple) for one in value):
            text = f"({', '.join(repr(shown(one)) for one in value)})"
        case Instance(function=Global() as function):
            text = f"a {function}"
        case _:
            text = f"a {type(value).__name__}"
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


@dataclass(slots=True)
class Allowance:
    """The bytes that the objects of a pickle take, by an estimate on the high side.

    Work that takes only time is paid in bytes too, at about one for each 10 ns.
    """

    density: float = 1.0  # for how much a byte of the pickle counts: less where it was compressed
    used: int = 0
    limit: int = _FIRST  # of `used`, for what was read of the pickle
    read: int = 0  # bytes of the pickle

    def spend(self, nbytes: int) -> None:
        """Pay for an object, or raise PickleError if it is too large."""
        self.used += nbytes
        if self.used > self.limit:
            read = int(self.density * self.read)
            self.limit = max(self.limit, min(_FIRST + _STEEP * read, _SMALL), _FLAT * read)
        if self.used > self.limit:
            raise PickleError("the objects of its pickle would take more memory than they should")


# Python 3.11.0 to 3.11.3 pickle a member of an enum as getattr(class, name), and torch's metadata
# of distributed checkpoints holds one. That exact form is allowed, and methods: see `methods`.
_GETTERS = Global("builtins", "getattr"), Global("__builtin__", "getattr")


def is_getter(value: Value) -> bool:
    """Return whether a value is getattr."""
    # By the name first: it is asked of every value that comes from the memo.
    return isinstance(value, Global) and value.name == "getattr" and value in _GETTERS


def names_a_class(one: Global) -> bool:
    """Return whether a name is that of a class, since it begins with a capital letter."""
    return one.name.rpartition(".")[2].lstrip("_")[:1].isupper()


def names_a_member(args: Value) -> bool:
    """Return whether arguments of getattr are a class, going by its name, and a member's name."""
    match args:
        case tuple((Global() as cls, str() as name)) if name.isidentifier():
            return names_a_class(cls) and not name.startswith("__")
    return False


def refuse(module: str, name: str) -> NoReturn:
    """Raise DangerousPickleError for a callable."""
    what = f"its pickle names {module}.{name}, which would run code when loaded"
    hint = "do not load this file; get the weights as safetensors from a source you trust"
    hint += ", or if you made it yourself, save only its state dicts"
    if name == "_load_from_bytes":  # it unpickles in its turn, in each tensor of pickle.dump
        hint = (
            "if you made it with pickle.dump, load it with pickle.load and save it with torch.save"
        )
    raise DangerousPickleError(what, hint=hint)
