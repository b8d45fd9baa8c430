"""A pickle is read, never run: an unpickler that imports nothing and calls nothing.

The opcodes are those of CPython's pickletools, protocols 0 to 5. A global becomes a `Global`, which
is only its name; what a pickle would construct becomes an `Instance`, which remembers class,
arguments and state. What the caller's hooks return stands in their place. Everything that is made
is spent from an `Allowance`, which bounds memory and time; long texts and bytes are passed over.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn

from merge_avg.errors import MergeError

Value = Any  # whatever a pickle can hold; consumers narrow it before use


class PickleError(MergeError):
    """A pickle that is damaged, or that asks for what no checkpoint needs."""


class CutShortError(PickleError):
    """A pickle that goes on where the data ends."""


class DangerousPickleError(PickleError):
    """A pickle that names a callable that is known to run code."""


@dataclass(slots=True)
class Allowance:
    """What the objects of a pickle may take: bytes, by an estimate that is rather too high.

    It grows with the bytes that were read of the pickle: quickly up to 180 MB, then as tensors need
    it. What costs only time is spent in bytes too, about one for each 10 ns.

    Attributes:
        density: what each byte of the pickle counts for; less where it was compressed.
        read: the bytes of the pickle that were read.
    """

    density: float = 1.0
    used: int = 0
    limit: int = 300_000
    read: int = 0

    def spend(self, nbytes: int) -> None:
        """Raises PickleError where that is too much."""
        self.used += nbytes
        if self.used > self.limit:
            read = int(self.density * self.read)
            self.limit = max(self.limit, min(300_000 + 200 * read, 180_000_000), 24 * read)
        if self.used > self.limit:
            raise PickleError("the objects of its pickle would take more memory than they should")


@dataclass(frozen=True, slots=True)
class Global:
    """A class or function by name, and which bytes of the pickle put it on the stack here."""

    module: str
    name: str
    start: int = field(default=0, compare=False, repr=False)
    stop: int = field(default=0, compare=False, repr=False)

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False, slots=True)
class Instance:
    """What the pickle would have made by calling `function`; nothing was called."""

    function: Value
    args: Value
    state: Value = None
    items: list[Value] = field(default_factory=list)
    pairs: list[tuple[Value, Value]] = field(default_factory=list)


class InertDict(dict[Value, Value]):
    """A dict that keeps apart what a pickle sets on it as attributes (an OrderedDict's)."""

    state: Value = None


@dataclass(frozen=True, slots=True, eq=False)
class Omitted:
    """A text, or bytes, too long to be of use here, and how long."""

    nbytes: int


def shown(value: Value) -> str:
    """A value in a few words, however large or deep it is."""
    match value:
        case str():
            text = value
        case Global():
            text = str(value)
        case bool() | float() | None:
            text = repr(value)
        case int() if value.bit_length() <= 64:
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


@dataclass(frozen=True)
class Loaded:
    """The object in a pickle, where its FRAME opcodes start, and how many bytes it took."""

    value: Value
    frames: tuple[int, ...]
    nbytes: int


def load(
    data: bytes,
    start: int = 0,
    *,
    persistent: Callable[[Value], Value],
    call: Callable[[Global, tuple[Value, ...]], Value | None],
    allowance: Allowance | None = None,
) -> Loaded:
    """Reads the pickle that begins at `start` of `data`.

    Args:
        data: bytes before and after the pickle are left alone.
        start: of the pickle.
        persistent: resolves a persistent id.
        call: returns what a call of a known function stands for, or None for any other.
        allowance: from which everything that is made is spent.

    Raises:
        PickleError: the pickle is damaged.
        CutShortError: it goes on behind the data.
        DangerousPickleError: it names a callable that is known to be dangerous.
    """
    machine = _Machine(data, start, persistent, call, allowance or Allowance())
    try:
        return machine.run()
    except MergeError:  # a ValueError too, but one that says already what is wrong
        raise
    except _DAMAGE as error:
        where = f"the pickle is damaged at byte {machine.at - start:,}"
        what = f"{where} ({type(error).__name__}: {shown(str(error))})"
        raise (CutShortError if machine.at >= len(data) else PickleError)(what) from None


_DAMAGE = (IndexError, KeyError, TypeError, ValueError, struct.error, OverflowError, RecursionError)
_LONGEST_SHOWN = 200
_LONGEST_NAME = 1000  # of a module and a class
_LONGEST_VALUE = 1 << 20  # of a text or of bytes: longer ones are left out
_LARGEST_KEY = 1000  # values in a tuple that is a key
_MOST_CRAFTED = 10_000  # keys whose hashes whoever wrote the pickle can choose
_SLOT = 10  # bytes that a place in a list takes, such as the stack or the memo
_STEP = 1000  # places that are spent at once when the stack grows
_DEEPEST_STACK = 4_000_000
_MOST_MARKS = 100_000
_ENTRY = 100  # an entry of a dict, while it grows
_MEMBER = 128  # the same of a set


class _Machine:
    def __init__(
        self,
        data: bytes,
        start: int,
        persistent: Callable[[Value], Value],
        call: Callable[[Global, tuple[Value, ...]], Value | None],
        allowance: Allowance,
    ) -> None:
        self.data = data
        self.start = start
        self.at = start
        self.opcode_at = start
        self.stack: list[Value] = []
        self.marks: list[int] = []
        self.memo: list[Value] = []  # by index, as far as there are no gaps
        self.far: dict[int, Value] = {}  # the rest of the memo
        self.frames: list[int] = []
        self.persistent = persistent
        self.call = call
        self.allowance = allowance
        self.crafted = 0
        self.getters = 0  # how often getattr was put on the stack, less the calls that are members

    def run(self) -> Loaded:
        data, table, stack, allowance, costs = (
            self.data,
            _TABLE,
            self.stack,
            self.allowance,
            _COSTS,
        )
        deepest = _STEP
        while True:
            at = self.opcode_at = self.at
            opcode = data[at]
            self.at = at + 1
            allowance.used += costs[opcode]
            if allowance.used > allowance.limit:
                allowance.read = at - self.start
                allowance.spend(0)
            if len(stack) > deepest:
                deepest = self.deeper(deepest)
            # The commonest opcodes of a state dict, here for speed: BINPUT, BININT1, LONG_BINPUT.
            if opcode == 0x71 and stack:
                self.put(data[at + 1])
                self.at = at + 2
                continue
            if opcode == 0x4B:
                stack.append(data[at + 1])
                self.at = at + 2
                continue
            if opcode == 0x72 and stack and at + 5 <= len(data):
                self.put(int.from_bytes(data[at + 1 : at + 5], "little"))
                self.at = at + 5
                continue
            if opcode == 0x2E:  # STOP
                value = self.pop()
                if self.getters:
                    refuse("builtins", "getattr")
                nbytes = self.at - self.start
                allowance.read = nbytes
                frames = tuple(frame - self.start for frame in self.frames)
                return Loaded(value, frames, nbytes)
            handler = table[opcode]
            if handler is None:
                raise ValueError(f"opcode 0x{opcode:02x}")
            handler(self)

    def spend(self, nbytes: int) -> None:
        self.allowance.read = max(self.allowance.read, self.at - self.start)
        self.allowance.spend(nbytes)

    def deeper(self, deepest: int) -> int:
        if deepest == _DEEPEST_STACK:
            raise ValueError("a stack of absurd depth")
        self.spend(_SLOT * _STEP)
        return deepest + _STEP

    # Reading

    def take(self, count: int) -> bytes:
        end = self.at + count
        if end > len(self.data):
            raise CutShortError("the pickle is damaged: it ends too early")
        taken = self.data[self.at : end]
        self.at = end
        return taken

    def skip(self, count: int) -> Omitted:
        if self.at + count > len(self.data):
            raise CutShortError("the pickle is damaged: it ends too early")
        self.at += count
        return Omitted(count)

    def line(self, longest: int = _LONGEST_NAME) -> bytes:
        end = self.data.find(b"\n", self.at, self.at + longest + 1)
        if end < 0:
            if self.at + longest < len(self.data):
                raise ValueError("a line of absurd length")
            raise CutShortError("the pickle is damaged: it ends too early")
        taken = self.data[self.at : end]
        self.at = end + 1
        return taken

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    # The stack

    def push(self, value: Value) -> None:
        self.stack.append(value)

    def pop(self) -> Value:
        if self.marks and len(self.stack) <= self.marks[-1]:
            raise ValueError("the stack is empty")
        return self.stack.pop()

    def top(self) -> Value:
        if self.marks and len(self.stack) <= self.marks[-1]:
            raise ValueError("the stack is empty")
        return self.stack[-1]

    def since_mark(self) -> list[Value]:
        start = self.marks.pop()
        taken = self.stack[start:]
        del self.stack[start:]
        return taken

    def name(self, module: Value, name: Value) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise TypeError("a global's name is no text")
        if len(module) + len(name) > _LONGEST_NAME:
            raise ValueError("a name of absurd length")
        if not self.counts(Global(module, name)):
            refuse_if_dangerous(module, name)
        self.push_global(module, name)

    def counts(self, value: Value) -> bool:
        """Counts `getattr`, which is put on the stack once for each call."""
        found = type(value) is Global and value in _GETTERS
        self.getters += found
        return found

    def push_global(self, module: str, name: str) -> None:
        self.spend(_GLOBAL)
        start = self.start
        self.push(Global(module, name, self.opcode_at - start, self.at - start))

    # The memo

    def get(self, index: int) -> None:
        value = self.memo[index] if 0 <= index < len(self.memo) else self.far[index]
        if type(value) is Global and value.name.endswith("Storage"):  # where a copy may edit it
            self.push_global(value.module, value.name)
        else:
            self.counts(value)
            self.push(value)

    def put(self, index: int) -> None:
        value, count = self.top(), len(self.memo)
        if index == count and index not in self.far:
            self.memo.append(value)
        elif 0 <= index < count:
            self.memo[index] = value
        else:
            self.spend(2 * _ENTRY)
            self.far[index] = value

    def memoize(self) -> None:
        self.put(len(self.memo) + len(self.far))

    # Containers

    def set(self, target: Value, pairs: list[tuple[Value, Value]]) -> None:
        self.spend(_ENTRY * len(pairs))
        for key, _ in pairs:
            if type(key) is not str:
                self.check_key(key)
        if isinstance(target, dict):
            target.update(pairs)
        elif isinstance(target, Instance):
            target.pairs.extend(pairs)
        else:
            raise TypeError(f"entries for a {type(target).__name__}")

    def check_key(self, key: Value) -> None:
        """Raises ValueError for a key whose hash would take forever, or all of the C stack.

        Nor may there be many whose hashes can be chosen to be the same: each would be compared
        with all others.
        """
        pending, seen, crafted = [key], 0, False
        while pending:
            value = pending.pop()
            if isinstance(value, tuple | frozenset):
                seen += len(value) + 1
                if seen > _LARGEST_KEY:
                    raise ValueError("a key of absurd size")
                pending += value
                crafted |= not value
            elif isinstance(value, int):
                crafted |= seen > 0 or value.bit_length() > 60
            elif not isinstance(value, str | bytes):
                crafted |= seen > 0
        self.spend(10 * seen)
        self.crafted += crafted
        if self.crafted > _MOST_CRAFTED:
            raise ValueError("too many keys that are neither texts nor numbers")

    def gathered(self) -> list[Value]:
        """The members of a set to be."""
        items = self.since_mark()
        self.spend(_MEMBER * len(items))
        for item in items:
            self.check_key(item)
        return items

    def make(self, function: Value, args: Value) -> None:
        if isinstance(function, Global):
            if not isinstance(args, tuple):
                raise TypeError("arguments are no tuple")
            self.allowance.read = self.at - self.start
            known = self.call(function, args)
            if known is not None:
                self.push(known)
                return
        self.instance(function, args)

    def instance(self, function: Value, args: Value) -> None:
        self.spend(_INSTANCE)
        if type(function) is Global and function in _GETTERS:
            if not _names_a_member(args):
                refuse("builtins", "getattr")
            self.getters -= 1
        elif type(function) is Instance and function.function in _GETTERS:
            refuse("builtins", "getattr")  # what it returned is called
        self.push(Instance(function, args))


def _extend(target: Value, items: list[Value]) -> None:
    if isinstance(target, list):
        target.extend(items)
    elif isinstance(target, Instance):
        target.items.extend(items)
    else:
        raise TypeError(f"items for a {type(target).__name__}")


def table(pairs: Value, allowance: Allowance) -> InertDict:
    """A dict of the pairs, or the entries of another, that a pickle passes to a dict's class."""
    if isinstance(pairs, dict):
        pairs = list(pairs.items())
    if not isinstance(pairs, list | tuple):
        raise TypeError("a dict of no pairs")
    machine = _Machine(b"", 0, _none, _none, allowance)
    machine.spend(_ENTRY * len(pairs))
    made = InertDict()
    machine.set(made, [(key, value) for key, value in pairs])
    return made


def _none(*_: Value) -> None:
    return None


def _in_pairs(flat: list[Value]) -> list[tuple[Value, Value]]:
    if len(flat) % 2:
        raise ValueError("a key without a value")
    return list(zip(flat[::2], flat[1::2], strict=True))


_Handler = Callable[[_Machine], None]
_TABLE: list[_Handler | None] = [None] * 256


def _on(*opcodes: str) -> Callable[[_Handler], _Handler]:
    def register(handler: _Handler) -> _Handler:
        for opcode in opcodes:
            _TABLE[ord(opcode)] = handler
        return handler

    return register


def _constant(opcode: str, make: Callable[[], Value]) -> None:
    _TABLE[ord(opcode)] = lambda m: m.push(make())


def _sized(opcode: str, size: int, decode: Callable[[bytes], Value]) -> None:
    """An opcode with a length of `size` bytes and then as many bytes."""

    def handler(m: _Machine) -> None:
        count = m.number(size)
        if count > _LONGEST_VALUE:
            m.push(m.skip(count))
            return
        value = decode(m.take(count))
        m.spend(value.__sizeof__() + 16)
        m.push(value)

    _TABLE[ord(opcode)] = handler


def _fixed(opcode: str, size: int, decode: Callable[[bytes], Value]) -> None:
    _TABLE[ord(opcode)] = lambda m: m.push(decode(m.take(size)))


def _lined(opcode: str, decode: Callable[[bytes], Value]) -> None:
    def handler(m: _Machine) -> None:
        value = decode(m.line(_LONGEST_VALUE))
        m.spend(value.__sizeof__() + 16)
        m.push(value)

    _TABLE[ord(opcode)] = handler


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogatepass")


def _old_text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")


def _signed(raw: bytes) -> int:
    return int.from_bytes(raw, "little", signed=True)


def _decimal(raw: bytes) -> int | bool:
    return raw == b"01" if raw in (b"00", b"01") else int(raw)


def _quoted(raw: bytes) -> str:
    if len(raw) < 2 or raw[:1] != raw[-1:] or raw[:1] not in b"\"'":
        raise ValueError("a string without quotes")
    return _old_text(_ESCAPE.sub(_unescaped, raw[1:-1]))


_ESCAPE = re.compile(rb"\\(?:([0-7]{1,3})|x([0-9a-fA-F]{2})|(.))", re.DOTALL)
_LETTERS = {
    b"\n": b"",
    **dict(zip(map(bytes, zip(b"abfnrtv")), map(bytes, zip(b"\a\b\f\n\r\t\v")), strict=True)),
}
_LETTERS |= {quoted: quoted for quoted in (b"\\", b"'", b'"')}


def _unescaped(found: re.Match[bytes]) -> bytes:
    octal, hexadecimal, letter = found.groups()
    if octal:
        return bytes([int(octal, 8) & 0xFF])
    if hexadecimal:
        return bytes([int(hexadecimal, 16)])
    return _LETTERS.get(letter, found[0])


_constant("N", lambda: None)
_constant("\x88", lambda: True)
_constant("\x89", lambda: False)
_constant("]", list)
_constant("}", InertDict)
_constant(")", tuple)
_constant("\x8f", set)
_fixed("K", 1, lambda raw: raw[0])
_fixed("M", 2, lambda raw: int.from_bytes(raw, "little"))
_fixed("J", 4, _signed)
_fixed("G", 8, lambda raw: struct.unpack(">d", raw)[0])
_sized("\x8a", 1, _signed)
_sized("\x8b", 4, _signed)
_sized("\x8c", 1, _text)
_sized("X", 4, _text)
_sized("\x8d", 8, _text)
_sized("U", 1, _old_text)
_sized("T", 4, _old_text)
_sized("C", 1, bytes)
_sized("B", 4, bytes)
_sized("\x8e", 8, bytes)
_sized("\x96", 8, bytearray)
_lined("I", _decimal)
_lined("L", lambda raw: int(raw.rstrip(b"L")))
_lined("F", float)
_lined("S", _quoted)
_lined("V", lambda raw: raw.decode("raw-unicode-escape"))


@_on("\x80")
def _proto(m: _Machine) -> None:
    version = m.number(1)
    if version > 5:
        raise ValueError(f"pickle protocol {version}")


@_on("\x95")
def _frame(m: _Machine) -> None:
    m.frames.append(m.opcode_at)
    if m.at + m.number(8) > len(m.data):
        raise CutShortError("the pickle is damaged: a frame of it ends too early")


@_on("(")
def _mark(m: _Machine) -> None:
    if len(m.marks) == _MOST_MARKS:
        raise ValueError("marks of absurd depth")
    m.marks.append(len(m.stack))


@_on("0")
def _pop(m: _Machine) -> None:
    if m.marks and len(m.stack) == m.marks[-1]:
        m.marks.pop()
    else:
        m.pop()


@_on("1")
def _pop_mark(m: _Machine) -> None:
    m.since_mark()


@_on("2")
def _dup(m: _Machine) -> None:
    m.counts(m.top())
    m.push(m.top())


@_on("t")
def _tuple(m: _Machine) -> None:
    items = tuple(m.since_mark())
    m.spend(_SLOT * len(items))
    m.push(items)


def _tuple_of(count: int) -> _Handler:
    def handler(m: _Machine) -> None:
        items = [m.pop() for _ in range(count)]
        m.push(tuple(reversed(items)))

    return handler


for _opcode, _count in {"\x85": 1, "\x86": 2, "\x87": 3}.items():
    _TABLE[ord(_opcode)] = _tuple_of(_count)


@_on("l")
def _list(m: _Machine) -> None:
    items = m.since_mark()
    m.spend(_SLOT * len(items))
    m.push(items)


@_on("d")
def _dict(m: _Machine) -> None:
    made = InertDict()
    m.set(made, _in_pairs(m.since_mark()))
    m.push(made)


@_on("\x91")
def _frozenset(m: _Machine) -> None:
    m.push(frozenset(m.gathered()))


@_on("a")
def _append(m: _Machine) -> None:
    item = m.pop()
    _extend(m.top(), [item])


@_on("e")
def _appends(m: _Machine) -> None:
    items = m.since_mark()
    m.spend(_SLOT * len(items))
    _extend(m.top(), items)


@_on("s")
def _setitem(m: _Machine) -> None:
    value, key = m.pop(), m.pop()
    m.set(m.top(), [(key, value)])


@_on("u")
def _setitems(m: _Machine) -> None:
    pairs = _in_pairs(m.since_mark())
    m.set(m.top(), pairs)


@_on("\x90")
def _additems(m: _Machine) -> None:
    items = m.gathered()
    target = m.top()
    if isinstance(target, set):
        target.update(items)
    else:
        _extend(target, items)


@_on("p")
def _put(m: _Machine) -> None:
    m.put(int(m.line()))


@_on("q")
def _binput(m: _Machine) -> None:
    m.put(m.number(1))


@_on("r")
def _long_binput(m: _Machine) -> None:
    m.put(m.number(4))


@_on("\x94")
def _memoize(m: _Machine) -> None:
    m.memoize()


@_on("g")
def _get(m: _Machine) -> None:
    m.get(int(m.line()))


@_on("h")
def _binget(m: _Machine) -> None:
    m.get(m.number(1))


@_on("j")
def _long_binget(m: _Machine) -> None:
    m.get(m.number(4))


@_on("c")
def _global(m: _Machine) -> None:
    module, name = _text(m.line()), _text(m.line())
    m.name(module, name)


@_on("\x93")
def _stack_global(m: _Machine) -> None:
    name, module = m.pop(), m.pop()
    m.name(module, name)


@_on("P")
def _persid(m: _Machine) -> None:
    m.push(m.persistent(_text(m.line())))


@_on("Q")
def _binpersid(m: _Machine) -> None:
    m.push(m.persistent(m.pop()))


@_on("R", "\x81")
def _reduce(m: _Machine) -> None:
    args, function = m.pop(), m.pop()
    m.make(function, args)


@_on("\x92")
def _newobj_ex(m: _Machine) -> None:
    kwargs, args, function = m.pop(), m.pop(), m.pop()
    m.instance(function, (args, kwargs))


@_on("i")
def _inst(m: _Machine) -> None:
    args = tuple(m.since_mark())
    m.spend(_SLOT * len(args))
    module, name = _text(m.line()), _text(m.line())
    m.name(module, name)
    m.make(m.pop(), args)


@_on("o")
def _obj(m: _Machine) -> None:
    function, *args = m.since_mark()
    m.spend(_SLOT * len(args))
    m.make(function, tuple(args))


@_on("b")
def _build(m: _Machine) -> None:
    state = m.pop()
    target = m.top()
    if isinstance(target, Instance | InertDict):
        target.state = state


@_on("\x82", "\x83", "\x84")
def _ext(_: _Machine) -> None:
    raise PickleError("the pickle names a class by a number of the extension registry")


@_on("\x97", "\x98")
def _buffer(_: _Machine) -> None:
    raise PickleError("the pickle needs buffers that lie outside of it")


# What opcodes make, in bytes on 64-bit CPython; what their handlers spend comes on top.
_GLOBAL = 130
_INSTANCE = 280
_COSTS = [0] * 256
for _codes, _nbytes in {
    "]l": 100,
    "}d": 160,
    "\x8f\x91": 250,
    "t\x85\x86\x87": 80,
    "JMG": 32,
    "\x95": 40,
    "pqr\x94": _SLOT,
    "a": _SLOT,
    "R": 10,  # time
}.items():
    for _code in _codes:
        _COSTS[ord(_code)] = _nbytes


# Modules whose every name runs code, starts processes, or reaches files or the network, and
# single names of other modules that do. The output carries the template's pickle on, so a file
# that names one of these is refused, although reading it here would run nothing.
# Source of the names: the lists that the scanners fickling and picklescan publish.
_DANGEROUS_MODULES = frozenset(
    """
    _aix_support _osx_support _posixsubprocess _pyrepl _thread _winapi aiohttp asyncio bdb cProfile
    code codeop commands concurrent ctypes _ctypes dill distutils doctest ensurepip ftplib http
    httplib idlelib imaplib imp importlib _frozen_importlib _frozen_importlib_external
    linecache logging.config mailcap marshal multiprocessing nntplib nt ntpath os pdb
    pickle _pickle cloudpickle joblib pip pkgutil poplib posix posixpath profile pty pydoc
    requests requests_oauthlib runpy shelve shutil site smtplib socket _socket socketserver
    ssl subprocess sys tarfile telnetlib tempfile threading timeit trace urllib urllib2 venv
    webbrowser winreg xmlrpc zipfile zipimport
    """.split()
)
_DANGEROUS_NAMES = {
    "builtins": frozenset(
        """
        __build_class__ __import__ apply breakpoint compile delattr dir eval exec execfile exit file
        getattr globals help input locals open quit raw_input reload setattr vars
        """.split()
    ),
    "functools": frozenset({"reduce", "partialmethod"}),
    "operator": frozenset({"attrgetter", "itemgetter", "methodcaller"}),
    "_operator": frozenset({"attrgetter", "itemgetter", "methodcaller"}),
    "types": frozenset({"CodeType", "FunctionType"}),
    "_io": frozenset({"FileIO", "open", "open_code"}),
    "io": frozenset({"FileIO", "open", "open_code"}),
    "codecs": frozenset({"open"}),
    "torch": frozenset({"load", "compile"}),
    "torch.serialization": frozenset({"load"}),
    "torch.hub": frozenset({"load", "load_state_dict_from_url", "download_url_to_file"}),
    "torch.jit": frozenset({"load"}),
    "torch.utils.cpp_extension": frozenset({"load", "load_inline"}),
    "numpy": frozenset({"load", "fromfile"}),
    "numpy.testing._private.utils": frozenset({"runstring"}),
}
_DANGEROUS_NAMES["__builtin__"] = _DANGEROUS_NAMES["builtins"]
# What reaches such a module by way of another that has imported it: torch.os, numpy.os.system.
_REACHED = frozenset("builtins ctypes importlib os posix runpy shutil subprocess sys".split())

# Python 3.11.0 to 3.11.3 pickle a member of an enum as getattr(class, name), and there torch's own
# metadata of distributed checkpoints has one. So exactly that is no danger; any other use is.
_GETTERS = Global("builtins", "getattr"), Global("__builtin__", "getattr")


def _names_a_member(args: Value) -> bool:
    """Whether arguments of getattr are a class, as its name tells, and the name of a member."""
    if not isinstance(args, tuple) or len(args) != 2:
        return False
    cls, name = args
    if not isinstance(cls, Global) or not isinstance(name, str) or not name.isidentifier():
        return False
    return cls.name.rpartition(".")[2].lstrip("_")[:1].isupper() and not name.startswith("__")


def refuse_if_dangerous(module: str, name: str) -> None:
    """Raises DangerousPickleError for a callable that is known to run code when a pickle is loaded.

    A dotted name reaches through attributes, so every part of it counts.
    """
    parts = module.split(".")
    prefixes = {".".join(parts[: i + 1]) for i in range(len(parts))}
    names = set(name.split("."))
    dangerous = prefixes & _DANGEROUS_MODULES or names & _DANGEROUS_NAMES.get(module, frozenset())
    if dangerous or names & (_REACHED | _INNARDS):
        refuse(module, name)


_INNARDS = frozenset({"__globals__", "__builtins__", "__subclasses__", "__reduce__"})


def refuse(module: str, name: str) -> NoReturn:
    """Raises DangerousPickleError for a callable."""
    raise DangerousPickleError(
        f"its pickle names {module}.{name}, which would run code when loaded",
        hint="do not load this file; get the weights as safetensors from a source you trust",
    )
