"""The machine that a pickle programs: a stack, marks on it, and a memo of values to use again.

    stack   bottom | 'w'  {}  (  'weight'  3  5 |  top      opcodes push values and take them off
    marks                     ^                             where a run of items begins
    memo    0: 'w'   1: {}   2: 'weight'                    values by number, put and got

Each opcode works on one of these (see `load`). Here they are inert: a call that the caller's hooks
do not know becomes an `Instance`, and nothing is imported, called or constructed.

Specification: CPython's Lib/pickletools.py, protocols 0 to 5.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from merge_avg.formats.pickle.callables import ENUMS, verdict
from merge_avg.formats.pickle.methods import (
    check_call,
    check_items,
    check_state,
    method_of,
    refuse_use,
)
from merge_avg.formats.pickle.values import (
    Allowance,
    CutShortError,
    DangerousPickleError,
    Global,
    InertDict,
    Instance,
    Value,
    is_getter,
    names_a_member,
    refuse,
    shown,
)

Handler = Callable[["Machine"], object]  # does what an opcode says
Persistent = Callable[[Value], Value]  # resolves a persistent id
# Returns the value that a call of a known function stands for, or None for any other function.
Call = Callable[[Global, tuple[Value, ...]], Value | None]

# Bytes on 64-bit CPython, by which memory is estimated.
SLOT = 10  # a place in a list, such as the stack or the memo, while the list grows
_ENTRY = 100  # an entry of a dict, while it grows
_MEMBER = 128  # the same of a set
_GLOBAL = 130
_INSTANCE = 280

_LONGEST_NAME = 1000  # characters of a module and a class together
_LARGEST_KEY = 1000  # values in a tuple that is a key
_MOST_CRAFTED = 10_000  # keys whose hashes whoever wrote the pickle can choose
_STEP = 1000  # places that are paid for at once when the stack grows
_DEEPEST_STACK = 4_000_000


class Machine:
    """The state of a pickle's program, and the steps that its opcodes are made of."""

    def __init__(
        self, data: bytes, start: int, persistent: Persistent, call: Call, allowance: Allowance
    ) -> None:
        self.data = data
        self.start = self.at = self.opcode_at = start
        self.stack: list[Value] = []
        self.push = self.stack.append  # without the time of a method around it
        self.marks: list[int] = []
        # Writers number memo entries 0, 1, 2, ...: a list holds them in a tenth of the memory that
        # a dict takes. Numbers that leave a gap, which only other writers use, go to the dict.
        self.memo: list[Value] = []
        self.far: dict[int, Value] = {}
        self.frames: list[int] = []
        self.persistent = persistent
        self.call = call
        self.allowance = allowance
        self.crafted = 0
        self.methods = False  # whether it has got a method of an object
        self.getters = 0  # times that getattr was pushed, less the calls that name a member
        self.callables: dict[str, None] = {}  # that are not known to be inert, in order

    def run(self, table: Sequence[Handler | None], costs: Sequence[int]) -> Value:
        """Run to the STOP opcode, and return the value that is left.

        The table has the handler of each opcode, and `costs` the bytes that each costs at least.
        """
        data, stack, allowance = self.data, self.stack, self.allowance
        deepest = _STEP
        while True:
            at = self.opcode_at = self.at
            opcode = data[at]
            self.at = at + 1
            # As Allowance.spend, but without a call for each of millions of opcodes.
            allowance.used += costs[opcode]
            if allowance.used > allowance.limit:
                allowance.read = at - self.start
                allowance.spend(0)
            if len(stack) > deepest:
                if deepest == _DEEPEST_STACK:
                    raise ValueError("a stack of absurd depth")
                self.spend(SLOT * _STEP)
                deepest += _STEP
            # Four opcodes make up more than half of a state dict: BINPUT and LONG_BINPUT, which put
            # the top of the stack into the memo, BINGET, and BININT1, a small number.
            if opcode == 0x71 and stack:
                self.put(data[at + 1])
                self.at = at + 2
            elif opcode == 0x4B:
                stack.append(data[at + 1])
                self.at = at + 2
            elif opcode == 0x68 and at + 2 <= len(data):
                self.at = at + 2
                self.get(data[at + 1])
            elif opcode == 0x72 and stack and at + 5 <= len(data):
                self.put(int.from_bytes(data[at + 1 : at + 5], "little"))
                self.at = at + 5
            elif opcode == 0x2E:  # STOP
                value = self.pop()
                if self.getters:  # one is left that no call has used up
                    refuse("builtins", "getattr")
                allowance.read = self.at - self.start
                return value
            else:
                handler = table[opcode]
                if handler is None:
                    raise ValueError(f"opcode 0x{opcode:02x}")
                handler(self)

    def spend(self, nbytes: int) -> None:
        """Pay for an object from the allowance, which has grown with what was read since."""
        self.allowance.read = max(self.allowance.read, self.at - self.start)
        self.allowance.spend(nbytes)

    def skip(self, count: int) -> None:
        """Pass over `count` bytes."""
        if self.at + count > len(self.data):
            raise CutShortError("the pickle is damaged: it ends too early")
        self.at += count

    def take(self, count: int) -> bytes:
        """Read `count` bytes."""
        start = self.at
        self.skip(count)
        return self.data[start : self.at]

    def line(self, longest: int = _LONGEST_NAME) -> bytes:
        """Read up to a newline, which is left out."""
        end = self.data.find(b"\n", self.at, self.at + longest + 1)
        if end < 0 and self.at + longest < len(self.data):
            raise ValueError("a line of absurd length")
        # Without a newline, more is asked for than there is.
        return self.take((end if end >= 0 else len(self.data)) + 1 - self.at)[:-1]

    def number(self, size: int) -> int:
        """Read a number of `size` bytes, little-endian and unsigned."""
        start = self.at
        self.skip(size)
        return int.from_bytes(self.data[start : self.at], "little")

    def pop(self) -> Value:
        """Take the top value off the stack."""
        if self.marks and len(self.stack) <= self.marks[-1]:
            raise ValueError("the stack is empty")
        return self.stack.pop()

    def top(self) -> Value:
        """Return the top value, which stays."""
        if self.marks and len(self.stack) <= self.marks[-1]:
            raise ValueError("the stack is empty")
        return self.stack[-1]

    def since_mark(self) -> list[Value]:
        """Take the values above the last mark off the stack, and the mark."""
        start = self.marks.pop()
        taken = self.stack[start:]
        del self.stack[start:]
        return taken

    def items(self) -> list[Value]:
        """Take the values above the last mark off the stack, and pay for a list of them."""
        items = self.since_mark()
        self.spend(SLOT * len(items))
        return items

    def name(self, module: Value, name: Value) -> Global:
        """Return a class or function by its name, unless it is known to run code."""
        if not isinstance(module, str) or not isinstance(name, str):
            raise TypeError("a global's name is not a text")
        if len(module) + len(name) > _LONGEST_NAME:
            raise ValueError("a name of absurd length")
        known = None if self.counts(Global(module, name)) else verdict(module, name)
        if known == "dangerous":
            refuse(module, name)
        if known == "unknown":
            self.notice(f"{module}.{name}")
        return self.named_here(module, name)

    def notice(self, callable_: str) -> None:
        """Note that a loader calls what is not known to be inert."""
        self.spend(_GLOBAL)
        self.callables[callable_] = None

    def counts(self, value: Value) -> bool:
        """Return whether a value is getattr, and count it if so."""
        # Each call must use up one of those that were pushed: else one went somewhere else.
        found = type(value) is Global and is_getter(value)
        self.getters += found
        return found

    def named_here(self, module: str, name: str) -> Global:
        """Return a class or function, with the bytes of the current opcode as its place."""
        self.spend(_GLOBAL)
        return Global(module, name, self.opcode_at - self.start, self.at - self.start)

    def get(self, index: int) -> None:
        """Push a value from the memo."""
        value = self.memo[index] if 0 <= index < len(self.memo) else self.far[index]
        # A copy with another dtype spells the class of a storage out at each place that uses it,
        # so a class that comes from the memo has its place here, not where it was first named.
        if type(value) is Global and value.name.endswith("Storage"):
            value = self.named_here(value.module, value.name)
        self.counts(value)
        self.push(value)

    def put(self, index: int) -> None:
        """Store the top of the stack in the memo."""
        value, count = self.top(), len(self.memo)
        if index == count and index not in self.far:
            self.memo.append(value)
        elif 0 <= index < count:
            self.memo[index] = value
        else:
            self.spend(2 * _ENTRY)
            self.far[index] = value

    def build(self, state: Value, target: Value) -> None:
        """Set the state of an object."""
        if isinstance(target, Global):  # the class itself would change, for all of the process
            raise DangerousPickleError(f"its pickle changes {target} itself")
        if self.methods:
            check_state(state, target, self.spend)
        if hasattr(target, "state"):  # as an Instance, an InertDict, and a tensor of the hooks
            target.state = state

    def kept_out(self, args: Value) -> Value:
        """Return arguments of a call, in which there may be no method."""
        if self.methods:
            check_call(args, self.spend)
        return args

    def set(self, pairs: list[tuple[Value, Value]], target: Value) -> Value:
        """Set entries of a dict, or of an object that may be one, and return it."""
        self.spend(_ENTRY * len(pairs))
        for key, _ in pairs:
            if type(key) is not str:
                self.check_key(key)
        if isinstance(target, dict):
            target.update(pairs)
        elif isinstance(target, Instance):
            if self.methods:
                check_items([part for pair in pairs for part in pair], target, self.spend)
            target.pairs.extend(pairs)
        else:
            raise TypeError(f"entries for a {type(target).__name__}")
        return target

    def extend(self, items: list[Value], target: Value) -> None:
        """Append items to a list, or to an object that may be one."""
        if isinstance(target, list):
            target.extend(items)
        elif isinstance(target, Instance):
            if self.methods:
                check_items(items, target, self.spend, looked_up=True)
            target.items.extend(items)
        else:
            raise TypeError(f"items for a {type(target).__name__}")

    def check_key(self, key: Value) -> None:
        """Raise ValueError for a key whose hash would take forever, or overflow the C stack.

        Python hashes a nested tuple by recursion, and doubling one 80 times takes 160 bytes.
        Nor may there be many keys whose hashes can be chosen to be the same, as those of large
        numbers and tuples can: a dict compares each of them with all the others.
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
            elif not isinstance(value, str | bytes):
                crafted |= seen > 0 or (isinstance(value, int) and value.bit_length() > 60)
        self.spend(10 * seen)
        self.crafted += crafted
        if self.crafted > _MOST_CRAFTED:
            raise ValueError("too many keys that are neither texts nor numbers")

    def members(self) -> list[Value]:
        """Take the members of a set off the stack."""
        items = self.since_mark()
        self.spend(_MEMBER * len(items))
        for item in items:
            self.check_key(item)
        return items

    def make(self, args: Value, function: Value) -> None:
        """Push what a call stands for: what the caller makes of it, else an Instance."""
        if isinstance(function, Global):
            if not isinstance(args, tuple):
                raise TypeError("arguments are not a tuple")
            self.allowance.read = self.at - self.start
            if not is_getter(function):
                self.kept_out(args)
            if function.name == "_rebuild_from_type_v2" and not isinstance(args[0], Global):
                self.notice(shown(args[0]))  # it is called
            known = self.call(function, args)
            if known is not None:
                if args and hasattr(known, "args"):
                    known.args = args
                self.push(known)
                return
        self.instance(args, function)

    def instance(self, args: Value, function: Value) -> None:
        """Push a call that is not made."""
        self.spend(_INSTANCE)
        if type(function) is Global and is_getter(function):
            found = method_of(args)
            if found:
                self.methods = True
            elif not names_a_member(args):
                refuse("builtins", "getattr")
            self.getters -= 1
            cls, name = found or args
            if str(cls) not in ENUMS and not (found and verdict(cls.module, cls.name) == "inert"):
                self.notice(f"{cls}.{name}")
        elif type(function) is Instance and is_getter(function.function):
            refuse("builtins", "getattr")  # the pickle calls what getattr returned
        elif type(function) is not Global:
            if self.methods:
                refuse_use("its pickle calls an object, and has a method of one")
            self.notice(shown(function))
        self.push(Instance(function, args))


def inert_dict(pairs: Value, allowance: Allowance) -> Value:
    """Return the dict that a pickle makes by passing pairs, or a dict, to a dict's class."""
    if isinstance(pairs, dict):
        pairs = list(pairs.items())
    if not isinstance(pairs, list | tuple):
        raise TypeError("a dict of something other than pairs")
    allowance.spend(_ENTRY * len(pairs))
    # A machine of its own checks and pays for them as the entries of any other dict.
    machine = Machine(b"", 0, lambda _: None, lambda *_: None, allowance)
    return machine.set([(key, value) for key, value in pairs], InertDict())
