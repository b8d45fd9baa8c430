r"""The opcodes of pickles, protocols 0 to 5, and what each makes the machine do.

    byte    name               argument                 effect on the stack
    ------  -----------------  -----------------------  --------------------------------------------
    80 95   PROTO FRAME        1 byte; 8-byte length    none
    N 88 89 NONE NEWTRUE ..    -                        push a constant
    K M J   BININT..           1, 2 or 4 bytes          push a number (J is signed)
    8a 8b   LONG1 LONG4        1- or 4-byte length      push a number of any size
    G       BINFLOAT           8 bytes, big-endian      push a float
    X 8c 8d BINUNICODE..       4-, 1-, 8-byte length    push a text
    B C 8e  BINBYTES..         4-, 1-, 8-byte length    push bytes (96: a bytearray)
    U T     BINSTRING..        1- or 4-byte length      push a Python 2 string, as a text
    I L F   INT LONG FLOAT     a line of digits         push a number
    S V     STRING UNICODE     a line                   push a text
    ( 0 1 2 MARK POP DUP ..    -                        set a mark, take off, push again
    ] } ) 8f                   -                        push an empty list, dict, tuple or set
    l t d   LIST TUPLE DICT    -                        make one of the items above the mark
    85-87   TUPLE1..3          -                        make a tuple of the top 1, 2 or 3
    a e     APPEND APPENDS     -                        extend the list below
    s u     SETITEM SETITEMS   -                        set entries of the dict below
    90 91   ADDITEMS FROZENSET -                        extend the set below; make a frozenset
    p q r   PUT..              line, 1 or 4 bytes       store the top in the memo (94: next number)
    g h j   GET..              line, 1 or 4 bytes       push from the memo
    c 93    GLOBAL..           two lines; -             push a class or function by its name
    R 81 92 REDUCE NEWOBJ..    -                        replace a callable and arguments by a call
    i o     INST OBJ           two lines; -             the same, of the items above the mark
    b       BUILD              -                        give the object below its state
    P Q     PERSID BINPERSID   line; -                  push what a persistent id stands for
    82-84   EXT..              1, 2 or 4 bytes          refused: a number of a registry elsewhere
    97 98   NEXT_BUFFER ..     -                        refused: bytes outside of the pickle
    .       STOP               -                        the end: the top of the stack is the value

Specification: CPython's Lib/pickletools.py.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable

from merge_avg.formats.pickle.machine import SLOT, Machine
from merge_avg.formats.pickle.values import CutShortError, InertDict, Instance, PickleError, Value

_LONGEST_VALUE = 1 << 20  # of a text or of bytes: longer ones are passed over
_MOST_MARKS = 100_000

_Handler = Callable[[Machine], None]
TABLE: list[_Handler | None] = [None] * 256

# Bytes that an opcode's objects take on 64-bit CPython; a handler pays for the rest itself.
COSTS = [0] * 256
for _codes, _nbytes in {
    "]l": 100,
    "}d": 160,
    "\x8f\x91": 250,
    "t\x85\x86\x87": 80,
    "JMG": 32,
    "\x95": 40,
    "pqr\x94": SLOT,
    "a": SLOT,
    "R": 10,  # time, not memory
}.items():
    for _code in _codes:
        COSTS[ord(_code)] = _nbytes


def _on(*opcodes: str) -> Callable[[_Handler], _Handler]:
    def register(handler: _Handler) -> _Handler:
        for opcode in opcodes:
            TABLE[ord(opcode)] = handler
        return handler

    return register


# Constants, numbers and texts


def _constant(opcode: str, make: Callable[[], Value]) -> None:
    TABLE[ord(opcode)] = lambda m: m.push(make())


def _fixed(opcode: str, size: int, decode: Callable[[bytes], Value]) -> None:
    TABLE[ord(opcode)] = lambda m: m.push(decode(m.take(size)))


def _sized(opcode: str, size: int, decode: Callable[[bytes], Value]) -> None:
    """Register an opcode that has a length of `size` bytes and then as many bytes."""

    def handler(m: Machine) -> None:
        count = m.number(size)
        if count > _LONGEST_VALUE:
            m.push(m.skip(count))
            return
        value = decode(m.take(count))
        m.spend(value.__sizeof__() + 16)
        m.push(value)

    TABLE[ord(opcode)] = handler


def _lined(opcode: str, decode: Callable[[bytes], Value]) -> None:
    def handler(m: Machine) -> None:
        value = decode(m.line(_LONGEST_VALUE))
        m.spend(value.__sizeof__() + 16)
        m.push(value)

    TABLE[ord(opcode)] = handler


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogatepass")


def _old_text(raw: bytes) -> str:
    """Decode a string of Python 2, which may be bytes in any encoding."""
    return raw.decode("utf-8", "surrogateescape")


def _signed(raw: bytes) -> int:
    return int.from_bytes(raw, "little", signed=True)


def _decimal(raw: bytes) -> int | bool:
    # Protocol 0 has no opcodes for True and False: they are the numbers 01 and 00.
    return raw == b"01" if raw in (b"00", b"01") else int(raw)


_ESCAPE = re.compile(rb"\\(?:([0-7]{1,3})|x([0-9a-fA-F]{2})|(.))", re.DOTALL)
_LETTERS = {
    b"\n": b"",
    **dict(zip(map(bytes, zip(b"abfnrtv")), map(bytes, zip(b"\a\b\f\n\r\t\v")), strict=True)),
}
_LETTERS |= {quoted: quoted for quoted in (b"\\", b"'", b'"')}


# Not codecs.escape_decode, which is undocumented, nor ast.literal_eval, which warns of unknown
# escapes and takes other literals too.
def _quoted(raw: bytes) -> str:
    if len(raw) < 2 or raw[:1] != raw[-1:] or raw[:1] not in b"\"'":
        raise ValueError("a string without quotes")
    return _old_text(_ESCAPE.sub(_unescaped, raw[1:-1]))


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


# The frame of the pickle


@_on("\x80")
def _proto(m: Machine) -> None:
    version = m.number(1)
    if version > 5:
        raise ValueError(f"pickle protocol {version}")


@_on("\x95")
def _frame(m: Machine) -> None:
    m.frames.append(m.opcode_at)
    if m.at + m.number(8) > len(m.data):
        raise CutShortError("the pickle is damaged: a frame of it ends too early")


# The stack


@_on("(")
def _mark(m: Machine) -> None:
    if len(m.marks) == _MOST_MARKS:
        raise ValueError("marks of absurd depth")
    m.marks.append(len(m.stack))


@_on("0")
def _pop(m: Machine) -> None:
    if m.marks and len(m.stack) == m.marks[-1]:
        m.marks.pop()
    else:
        m.pop()


@_on("1")
def _pop_mark(m: Machine) -> None:
    m.since_mark()


@_on("2")
def _dup(m: Machine) -> None:
    m.counts(m.top())
    m.push(m.top())


# Containers


TABLE[ord("t")] = lambda m: m.push(tuple(m.items()))
TABLE[ord("l")] = lambda m: m.push(m.items())
TABLE[ord("\x91")] = lambda m: m.push(frozenset(m.members()))


def _tuple_of(count: int) -> _Handler:
    def handler(m: Machine) -> None:
        items = [m.pop() for _ in range(count)]
        m.push(tuple(reversed(items)))

    return handler


for _opcode, _count in {"\x85": 1, "\x86": 2, "\x87": 3}.items():
    TABLE[ord(_opcode)] = _tuple_of(_count)


@_on("d")
def _dict(m: Machine) -> None:
    made = InertDict()
    m.set(made, _in_pairs(m.since_mark()))
    m.push(made)


def _in_pairs(flat: list[Value]) -> list[tuple[Value, Value]]:
    if len(flat) % 2:
        raise ValueError("a key without a value")
    return list(zip(flat[::2], flat[1::2], strict=True))


@_on("a")
def _append(m: Machine) -> None:
    item = m.pop()
    m.extend(m.top(), [item])


@_on("e")
def _appends(m: Machine) -> None:
    items = m.items()
    m.extend(m.top(), items)


@_on("s")
def _setitem(m: Machine) -> None:
    value, key = m.pop(), m.pop()
    m.set(m.top(), [(key, value)])


@_on("u")
def _setitems(m: Machine) -> None:
    pairs = _in_pairs(m.since_mark())
    m.set(m.top(), pairs)


@_on("\x90")
def _additems(m: Machine) -> None:
    items = m.members()
    target = m.top()
    if isinstance(target, set):
        target.update(items)
    else:
        m.extend(target, items)


# The memo


TABLE[ord("p")] = lambda m: m.put(int(m.line()))
TABLE[ord("q")] = lambda m: m.put(m.number(1))
TABLE[ord("r")] = lambda m: m.put(m.number(4))
TABLE[ord("\x94")] = Machine.memoize
TABLE[ord("g")] = lambda m: m.get(int(m.line()))
TABLE[ord("h")] = lambda m: m.get(m.number(1))
TABLE[ord("j")] = lambda m: m.get(m.number(4))


# Names, calls and objects


@_on("c")
def _global(m: Machine) -> None:
    module, name = _text(m.line()), _text(m.line())
    m.name(module, name)


@_on("\x93")
def _stack_global(m: Machine) -> None:
    name, module = m.pop(), m.pop()
    m.name(module, name)


@_on("R", "\x81")
def _reduce(m: Machine) -> None:
    args, function = m.pop(), m.pop()
    m.make(function, args)


@_on("\x92")
def _newobj_ex(m: Machine) -> None:
    kwargs, args, function = m.pop(), m.pop(), m.pop()
    m.instance(function, (args, kwargs))


@_on("i")
def _inst(m: Machine) -> None:
    args = tuple(m.items())
    module, name = _text(m.line()), _text(m.line())
    m.name(module, name)
    m.make(m.pop(), args)


@_on("o")
def _obj(m: Machine) -> None:
    function, *args = m.items()
    m.make(function, tuple(args))


@_on("b")
def _build(m: Machine) -> None:
    state = m.pop()
    target = m.top()
    if isinstance(target, Instance | InertDict):
        target.state = state


TABLE[ord("P")] = lambda m: m.push(m.persistent(_text(m.line())))
TABLE[ord("Q")] = lambda m: m.push(m.persistent(m.pop()))


@_on("\x82", "\x83", "\x84")
def _ext(_: Machine) -> None:
    raise PickleError("the pickle names a class by a number of the extension registry")


@_on("\x97", "\x98")
def _buffer(_: Machine) -> None:
    raise PickleError("the pickle needs buffers that lie outside of it")
