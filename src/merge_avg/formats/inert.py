"""A pickle is read, never run: an unpickler that imports nothing and calls nothing.

The opcodes are those of CPython's pickletools, protocols 0 to 5. A global becomes a `Global`, which
is only its name; what a pickle would construct becomes an `Instance`, which remembers class,
arguments and state. What the caller's hooks return stands in their place. Memory is
proportional to the pickle: every opcode makes at most what it holds in bytes.
"""

from __future__ import annotations

import codecs
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from merge_avg.errors import MergeError

Value = Any  # whatever a pickle can hold; consumers narrow it before use


class PickleError(MergeError):
    """A pickle that is damaged, or that asks for what no checkpoint needs."""


class DangerousPickleError(PickleError):
    """A pickle that names a callable that is known to run code."""


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


@dataclass(frozen=True)
class Loaded:
    """The object in a pickle, where its FRAME opcodes start, and how many bytes it took."""

    value: Value
    frames: tuple[int, ...]
    nbytes: int


def load(
    data: bytes,
    *,
    persistent: Callable[[Value], Value],
    call: Callable[[Global, tuple[Value, ...]], Value | None],
) -> Loaded:
    """Reads the first pickle in `data`.

    Args:
        data: the pickle; bytes after its end are left alone.
        persistent: resolves a persistent id.
        call: returns what a call of a known function stands for, or None for any other.

    Raises:
        PickleError: the pickle is damaged.
        DangerousPickleError: it names a callable that is known to be dangerous.
    """
    machine = _Machine(data, persistent, call)
    try:
        return machine.run()
    except MergeError:  # a ValueError too, but one that says already what is wrong
        raise
    except _DAMAGE as error:
        what = f"the pickle is damaged at byte {machine.at:,} ({type(error).__name__}: {error})"
        raise PickleError(what) from None


_DAMAGE = (IndexError, KeyError, TypeError, ValueError, struct.error, OverflowError, RecursionError)

_MARK = object()


class _Machine:
    def __init__(
        self,
        data: bytes,
        persistent: Callable[[Value], Value],
        call: Callable[[Global, tuple[Value, ...]], Value | None],
    ) -> None:
        self.data = data
        self.at = 0
        self.opcode_at = 0
        self.stack: list[Value] = []
        self.marks: list[int] = []
        self.memo: dict[int, Value] = {}
        self.frames: list[int] = []
        self.persistent = persistent
        self.call = call

    def run(self) -> Loaded:
        data, table, stack, memo = self.data, _TABLE, self.stack, self.memo
        while True:
            at = self.opcode_at = self.at
            opcode = data[at]
            self.at = at + 1
            # The commonest opcodes of a state dict, here for speed: BINPUT, BININT1, LONG_BINPUT.
            if opcode == 0x71 and stack:
                memo[data[at + 1]] = self.top()
                self.at = at + 2
                continue
            if opcode == 0x4B:
                stack.append(data[at + 1])
                self.at = at + 2
                continue
            if opcode == 0x72 and stack and at + 5 <= len(data):
                memo[int.from_bytes(data[at + 1 : at + 5], "little")] = self.top()
                self.at = at + 5
                continue
            if opcode == 0x2E:  # STOP
                return Loaded(self.pop(), tuple(self.frames), self.at)
            handler = table[opcode]
            if handler is None:
                raise ValueError(f"opcode 0x{opcode:02x}")
            handler(self)

    # Reading

    def take(self, count: int) -> bytes:
        end = self.at + count
        if count < 0 or end > len(self.data):
            raise ValueError("it ends too early")
        taken = self.data[self.at : end]
        self.at = end
        return taken

    def line(self) -> bytes:
        end = self.data.index(b"\n", self.at)
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
        refuse_if_dangerous(module, name)
        self.push(Global(module, name, self.opcode_at, self.at))

    def get(self, index: int) -> None:
        value = self.memo[index]
        if type(value) is Global:
            value = Global(value.module, value.name, self.opcode_at, self.at)
        self.push(value)

    def make(self, function: Value, args: Value) -> None:
        if isinstance(function, Global):
            if not isinstance(args, tuple):
                raise TypeError("arguments are no tuple")
            known = self.call(function, args)
            if known is not None:
                self.push(known)
                return
        self.push(Instance(function, args))


def _extend(target: Value, items: list[Value]) -> None:
    if isinstance(target, list):
        target.extend(items)
    elif isinstance(target, Instance):
        target.items.extend(items)
    else:
        raise TypeError(f"items for a {type(target).__name__}")


def _set(target: Value, pairs: list[tuple[Value, Value]]) -> None:
    for key, _ in pairs:
        if type(key) is not str:
            _refuse_deep(key)
    if isinstance(target, dict):
        target.update(pairs)
    elif isinstance(target, Instance):
        target.pairs.extend(pairs)
    else:
        raise TypeError(f"entries for a {type(target).__name__}")


_LARGEST_KEY = 1000


def _refuse_deep(key: Value) -> None:
    """Raises ValueError for a key whose hash would take forever, or all of the C stack."""
    pending, seen = [key], 0
    while pending:
        value = pending.pop()
        if isinstance(value, tuple | frozenset):
            seen += len(value) + 1
            if seen > _LARGEST_KEY:
                raise ValueError("a key of absurd size")
            pending += value


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
    _TABLE[ord(opcode)] = lambda m: m.push(decode(m.take(m.number(size))))


def _fixed(opcode: str, size: int, decode: Callable[[bytes], Value]) -> None:
    _TABLE[ord(opcode)] = lambda m: m.push(decode(m.take(size)))


def _lined(opcode: str, decode: Callable[[bytes], Value]) -> None:
    _TABLE[ord(opcode)] = lambda m: m.push(decode(m.line()))


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
    return _old_text(codecs.escape_decode(raw[1:-1])[0])


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
    m.number(8)


@_on("(")
def _mark(m: _Machine) -> None:
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
    m.push(m.top())


@_on("t")
def _tuple(m: _Machine) -> None:
    m.push(tuple(m.since_mark()))


def _tuple_of(count: int) -> _Handler:
    def handler(m: _Machine) -> None:
        items = [m.pop() for _ in range(count)]
        m.push(tuple(reversed(items)))

    return handler


for _opcode, _count in {"\x85": 1, "\x86": 2, "\x87": 3}.items():
    _TABLE[ord(_opcode)] = _tuple_of(_count)


@_on("l")
def _list(m: _Machine) -> None:
    m.push(m.since_mark())


@_on("d")
def _dict(m: _Machine) -> None:
    made = InertDict()
    _set(made, _in_pairs(m.since_mark()))
    m.push(made)


@_on("\x91")
def _frozenset(m: _Machine) -> None:
    items = m.since_mark()
    for item in items:
        _refuse_deep(item)
    m.push(frozenset(items))


@_on("a")
def _append(m: _Machine) -> None:
    item = m.pop()
    _extend(m.top(), [item])


@_on("e")
def _appends(m: _Machine) -> None:
    items = m.since_mark()
    _extend(m.top(), items)


@_on("s")
def _setitem(m: _Machine) -> None:
    value, key = m.pop(), m.pop()
    _set(m.top(), [(key, value)])


@_on("u")
def _setitems(m: _Machine) -> None:
    pairs = _in_pairs(m.since_mark())
    _set(m.top(), pairs)


@_on("\x90")
def _additems(m: _Machine) -> None:
    items = m.since_mark()
    target = m.top()
    if isinstance(target, set):
        for item in items:
            _refuse_deep(item)
        target.update(items)
    else:
        _extend(target, items)


@_on("p")
def _put(m: _Machine) -> None:
    m.memo[int(m.line())] = m.top()


@_on("q")
def _binput(m: _Machine) -> None:
    m.memo[m.number(1)] = m.top()


@_on("r")
def _long_binput(m: _Machine) -> None:
    m.memo[m.number(4)] = m.top()


@_on("\x94")
def _memoize(m: _Machine) -> None:
    m.memo[len(m.memo)] = m.top()


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
    m.push(Instance(function, (args, kwargs)))


@_on("i")
def _inst(m: _Machine) -> None:
    args = tuple(m.since_mark())
    module, name = _text(m.line()), _text(m.line())
    m.name(module, name)
    m.make(m.pop(), args)


@_on("o")
def _obj(m: _Machine) -> None:
    function, *args = m.since_mark()
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


def refuse_if_dangerous(module: str, name: str) -> None:
    """Raises DangerousPickleError for a callable that is known to run code when a pickle is loaded.

    A dotted name reaches through attributes, so every part of it counts.
    """
    parts = module.split(".")
    prefixes = {".".join(parts[: i + 1]) for i in range(len(parts))}
    names = set(name.split("."))
    dangerous = prefixes & _DANGEROUS_MODULES or names & _DANGEROUS_NAMES.get(module, frozenset())
    if dangerous or names & {"__globals__", "__builtins__", "__subclasses__", "__reduce__"}:
        raise DangerousPickleError(
            f"its pickle names {module}.{name}, which would run code when loaded",
            hint="do not load this file; get the weights as safetensors from a source you trust",
        )
