r"""A pickle is read, never run: its opcodes, and what each makes the machine do.

    80 02              PROTO 2              the protocol; protocols 0 and 1 begin without
    7d 71 00           EMPTY_DICT BINPUT 0  push a dict, and store it in the memo
    58 01 00 00 00 77  BINUNICODE 1 'w'     push a text: its length is part of the argument
    4b 03              BININT1 3            push a number
    73                 SETITEM              take both off, and set an entry of the dict below them
    2e                 STOP                 the end: what is left is the value

An opcode is a byte, with an argument of a fixed size, of a length and as many bytes, or of a line.

Specification: CPython's Lib/pickletools.py, protocols 0 to 5.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from xxhash import xxh3_128_hexdigest

from merge_avg.errors import MergeError
from merge_avg.formats.pickle.machine import SLOT, Call, Handler, Machine, Persistent
from merge_avg.formats.pickle.values import (
    Allowance,
    CutShortError,
    InertDict,
    Omitted,
    PickleError,
    Value,
    shown,
)

_LONGEST_VALUE = 1 << 20  # of a text or of bytes: longer ones are passed over
_MOST_MARKS = 100_000
# What a handler raises on an argument or a stack that no pickler would have written.
_DAMAGE = (IndexError, KeyError, TypeError, ValueError, struct.error, OverflowError, RecursionError)
_ESCAPE = re.compile(rb"""\\(?:([0-7]{1,3})|x([0-9a-fA-F]{2})|([abfnrtv\\'"])|\n)""")
_LETTERS = bytes.maketrans(b"abfnrtv", b"\a\b\f\n\r\t\v")


@dataclass(frozen=True)
class Loaded:
    """The value of a pickle, where its FRAME opcodes start, and how many bytes it took."""

    value: Value
    frames: tuple[int, ...]
    nbytes: int
    callables: tuple[str, ...]  # that it names and that are not known to be inert


def load(
    data: bytes,
    start: int = 0,
    *,
    persistent: Persistent,
    call: Call,
    allowance: Allowance | None = None,
) -> Loaded:
    """Read the pickle that begins at `start` of `data`, and leave the bytes around it alone.

    The allowance pays for every object. What is wrong with the pickle is a PickleError.
    """
    machine = Machine(data, start, persistent, call, allowance or Allowance())
    try:
        value = machine.run(TABLE, COSTS)
        for at in machine.frames:  # only now: pickle._Unpickler runs one that is cut
            if at + 9 + int.from_bytes(data[at + 1 : at + 9], "little") > len(data):
                raise CutShortError("the pickle is damaged: a frame of it ends too early")
    except MergeError:  # a ValueError as well, but one that already says what is wrong
        raise
    except _DAMAGE as error:
        where = f"the pickle is damaged at byte {machine.at - start:,}"
        what = f"{where} ({type(error).__name__}: {shown(str(error))})"
        raise (CutShortError if machine.at >= len(data) else PickleError)(what) from None
    frames = tuple(frame - start for frame in machine.frames)
    return Loaded(value, frames, machine.at - start, tuple(machine.callables))


def _kept(m: Machine, value: Value) -> None:
    m.spend(value.__sizeof__() + 16)
    m.push(value)


def _sized(size: int, decode: Callable[[bytes], Value]) -> Handler:
    # A length of `size` bytes, and then as many bytes.
    def handler(m: Machine) -> None:
        count = m.number(size)
        if count > _LONGEST_VALUE:
            start = m.at
            m.skip(count)
            # 7 GB/s here: nothing beside the time that it took to read them.
            m.push(Omitted(count, xxh3_128_hexdigest(memoryview(m.data)[start : m.at])))
        else:
            _kept(m, decode(m.take(count)))

    return handler


def _lined(decode: Callable[[bytes], Value]) -> Handler:
    return lambda m: _kept(m, decode(m.line(_LONGEST_VALUE)))


_text = partial(str, encoding="utf-8", errors="surrogatepass")
_old_text = partial(str, encoding="utf-8", errors="surrogateescape")  # Python 2 had any encoding
_signed = partial(int.from_bytes, byteorder="little", signed=True)


# Not codecs.escape_decode, which is undocumented, nor ast.literal_eval, which warns of unknown
# escapes and takes other literals too.
def _quoted(raw: bytes) -> str:
    if len(raw) < 2 or raw[:1] != raw[-1:] or raw[:1] not in b"\"'":
        raise ValueError("a string without quotes")
    return _old_text(_ESCAPE.sub(_unescaped, raw[1:-1]))


def _unescaped(found: re.Match[bytes]) -> bytes:
    octal, hexadecimal, letter = found.groups(b"")
    if octal or hexadecimal:
        return bytes([(int(octal, 8) if octal else int(hexadecimal, 16)) & 0xFF])
    return letter.translate(_LETTERS)


def _proto(m: Machine) -> None:
    version = m.number(1)
    if version > 5:
        raise ValueError(f"pickle protocol {version}")


def _frame(m: Machine) -> None:
    m.frames.append(m.opcode_at)
    m.skip(8)


def _mark(m: Machine) -> None:
    if len(m.marks) == _MOST_MARKS:
        raise ValueError("marks of absurd depth")
    m.marks.append(len(m.stack))


def _pop(m: Machine) -> None:
    if m.marks and len(m.stack) == m.marks[-1]:
        m.marks.pop()
    else:
        m.pop()


def _dup(m: Machine) -> None:
    m.counts(m.top())
    m.push(m.top())


def _tuple_of(count: int) -> Handler:
    return lambda m: m.push(tuple([m.pop() for _ in range(count)][::-1]))


def _pairs(m: Machine) -> list[tuple[Value, Value]]:
    flat = m.since_mark()
    if len(flat) % 2:
        raise ValueError("a key without a value")
    return list(zip(flat[::2], flat[1::2], strict=True))


def _additems(m: Machine) -> None:
    items, target = m.members(), m.top()
    if isinstance(target, set):
        target.update(items)
    else:
        m.extend(items, target)


def _named(m: Machine) -> Value:
    return m.name(_text(m.line()), _text(m.line()))


def _obj(m: Machine) -> None:
    function, *args = m.items()
    m.make(tuple(args), function)


def _refused(what: str) -> Handler:
    def handler(_: Machine) -> None:
        raise PickleError(f"the pickle {what}")

    return handler


# Arguments are evaluated from left to right: what is on top of the stack comes first.
_HANDLERS: dict[str, Handler] = {
    "\x80": _proto,
    "\x95": _frame,
    # Constants, and numbers of 1, 2 and 4 bytes, of any size, and floats.
    "N": lambda m: m.push(None),
    "\x88": lambda m: m.stack.append(True),
    "\x89": lambda m: m.stack.append(False),
    "K": lambda m: m.push(m.number(1)),
    "M": lambda m: m.push(m.number(2)),
    "J": lambda m: m.push(_signed(m.take(4))),
    "\x8a": _sized(1, _signed),
    "\x8b": _sized(4, _signed),
    "G": lambda m: m.push(struct.unpack(">d", m.take(8))[0]),
    # Texts, bytes, and strings of Python 2, with lengths of 4, 1 or 8 bytes.
    "X": _sized(4, _text),
    "\x8c": _sized(1, _text),
    "\x8d": _sized(8, _text),
    "B": _sized(4, bytes),
    "C": _sized(1, bytes),
    "\x8e": _sized(8, bytes),
    "\x96": _sized(8, bytearray),
    "U": _sized(1, _old_text),
    "T": _sized(4, _old_text),
    # Protocol 0 writes each value on a line, and True and False as the numbers 01 and 00.
    "I": _lined(lambda raw: raw == b"01" if raw in (b"00", b"01") else int(raw)),
    "L": _lined(lambda raw: int(raw.rstrip(b"L"))),
    "F": _lined(float),
    "S": _lined(_quoted),
    "V": _lined(lambda raw: raw.decode("raw-unicode-escape")),
    # MARK, POP, POP_MARK and DUP.
    "(": _mark,
    "0": _pop,
    "1": Machine.since_mark,
    "2": _dup,
    # Containers: empty ones, of items above the mark or at the top, and more items.
    "]": lambda m: m.push([]),
    "}": lambda m: m.push(InertDict()),
    ")": lambda m: m.push(()),
    "\x8f": lambda m: m.push(set()),
    "l": lambda m: m.push(m.items()),
    "t": lambda m: m.push(tuple(m.items())),
    "d": lambda m: m.push(m.set(_pairs(m), InertDict())),
    "\x85": _tuple_of(1),
    "\x86": _tuple_of(2),
    "\x87": _tuple_of(3),
    "a": lambda m: m.extend([m.pop()], m.top()),
    "e": lambda m: m.extend(m.items(), m.top()),
    "s": lambda m: m.set([(m.pop(), m.pop())[::-1]], m.top()),
    "u": lambda m: m.set(_pairs(m), m.top()),
    "\x90": _additems,
    "\x91": lambda m: m.push(frozenset(m.members())),
    # The memo: PUT, BINPUT, LONG_BINPUT and MEMOIZE; GET, BINGET and LONG_BINGET.
    "p": lambda m: m.put(int(m.line())),
    "q": lambda m: m.put(m.number(1)),
    "r": lambda m: m.put(m.number(4)),
    "\x94": lambda m: m.put(len(m.memo) + len(m.far)),
    "g": lambda m: m.get(int(m.line())),
    "h": lambda m: m.get(m.number(1)),
    "j": lambda m: m.get(m.number(4)),
    # GLOBAL and STACK_GLOBAL.
    "c": lambda m: m.push(_named(m)),
    "\x93": lambda m: m.push(m.name(name=m.pop(), module=m.pop())),
    # REDUCE and NEWOBJ, NEWOBJ_EX, INST, OBJ and BUILD; persistent ids.
    **dict.fromkeys("R\x81", lambda m: m.make(m.pop(), m.pop())),
    "\x92": lambda m: m.instance(m.kept_out((m.pop(), m.pop())[::-1]), m.pop()),
    "i": lambda m: m.make(tuple(m.items()), _named(m)),
    "o": _obj,
    "b": lambda m: m.build(m.pop(), m.top()),
    "P": lambda m: m.push(m.persistent(_text(m.line()))),
    "Q": lambda m: m.push(m.persistent(m.kept_out(m.pop()))),
    **dict.fromkeys(
        "\x82\x83\x84", _refused("names a class by a number of the extension registry")
    ),
    **dict.fromkeys("\x97\x98", _refused("needs buffers that lie outside of it")),
}
# Lists, since a lookup by number is the quickest.
TABLE = [_HANDLERS.get(chr(code)) for code in range(256)]
# Bytes that an opcode's objects take on 64-bit CPython; a handler pays for the rest itself. A call
# (R) takes time, not memory.
_COSTS = {"]l": 100, "}d": 160, "\x8f\x91": 250, "t\x85\x86\x87": 80, "JMG": 32, "\x95": 40}
_COSTS |= {"pqr\x94a": SLOT, "R": 10}
COSTS = [sum(n for codes, n in _COSTS.items() if chr(code) in codes) for code in range(256)]
