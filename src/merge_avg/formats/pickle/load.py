"""A pickle is read, never run: nothing that it names is imported or called.

80 02            PROTO 2            the protocol; protocols 0 and 1 begin without
opcode argument                     one opcode after the other, see `opcodes`
...
2e               STOP               the end; further bytes belong to somebody else
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from merge_avg.errors import MergeError
from merge_avg.formats.pickle.allowance import Allowance
from merge_avg.formats.pickle.machine import Call, Machine, Persistent
from merge_avg.formats.pickle.opcodes import COSTS, TABLE
from merge_avg.formats.pickle.values import CutShortError, PickleError, Value, shown

# What a handler raises on an argument or a stack that no pickler would have written.
_DAMAGE = (IndexError, KeyError, TypeError, ValueError, struct.error, OverflowError, RecursionError)


@dataclass(frozen=True)
class Loaded:
    """The value of a pickle, where its FRAME opcodes start, and how many bytes it took."""

    value: Value
    frames: tuple[int, ...]
    nbytes: int


def load(
    data: bytes,
    start: int = 0,
    *,
    persistent: Persistent,
    call: Call,
    allowance: Allowance | None = None,
) -> Loaded:
    """Read the pickle that begins at `start` of `data`.

    Args:
        data: bytes before and after the pickle are left alone.
        start: of the pickle.
        persistent: resolves a persistent id.
        call: returns what a call of a known function stands for, or None for any other.
        allowance: pays for every object.

    Raises:
        PickleError: the pickle is damaged.
        CutShortError: it continues past the end of the data.
        DangerousPickleError: it names a callable that is known to be dangerous.
    """
    machine = Machine(data, start, persistent, call, allowance or Allowance())
    try:
        value = machine.run(TABLE, COSTS)
    except MergeError:  # a ValueError as well, but one that already says what is wrong
        raise
    except _DAMAGE as error:
        where = f"the pickle is damaged at byte {machine.at - start:,}"
        what = f"{where} ({type(error).__name__}: {shown(str(error))})"
        raise (CutShortError if machine.at >= len(data) else PickleError)(what) from None
    frames = tuple(frame - start for frame in machine.frames)
    return Loaded(value, frames, machine.at - start)
