"""Files that lie, for the tests of readers.

`ATTACKS` maps a name to a function that writes a file or directory at a path. The docstring of
each function, or the text beside each entry of a table, says how it lies.
"""

from __future__ import annotations

import json
import os
import pickle
import struct
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ATTACKS: dict[str, Callable[[Path], object]] = {}
LARGE: set[str] = set()  # the ones that take megabytes or seconds


def attack(function: Callable[[Path], object]) -> Callable[[Path], object]:
    """Add a function to ATTACKS under its own name."""
    ATTACKS[function.__name__] = function
    return function


Bytes = bytes | Callable[[], bytes]  # large ones are made only when they are needed


def made(data: Bytes) -> bytes:
    """Return the bytes of an entry, made now if it is a function."""
    return data() if callable(data) else data


# Pickles by hand. Each of these functions returns opcodes that leave one value on the stack.


def text(value: str | bytes) -> bytes:
    """Push a text (BINUNICODE)."""
    raw = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value
    return b"X" + struct.pack("<I", len(raw)) + raw


def number(value: int) -> bytes:
    """Push an integer of any size (LONG4)."""
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8b" + struct.pack("<I", len(raw)) + raw


def numbers(values) -> bytes:
    """Push a tuple of integers."""
    return b"(" + b"".join(map(number, values)) + b"t"


def stored(
    cls: bytes = b"ctorch\nFloatStorage\n",
    key: bytes = text("0"),
    count: bytes = number(4),
    more: bytes = b"",
) -> bytes:
    """Push a storage of four floats, by its persistent id."""
    return b"(" + text("storage") + cls + key + text("cpu") + count + more + b"tQ"


def tensor(
    shape: bytes = numbers([4]),
    stride: bytes = numbers([1]),
    start: bytes = number(0),
    storage: bytes | None = None,
) -> bytes:
    """Push a tensor, as torch.save does."""
    storage = stored() if storage is None else storage
    extra = b"\x89ccollections\nOrderedDict\n)R"
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + start + shape + stride + extra + b"tR"
    )


def state(*items: bytes) -> bytes:
    """Return the pickle of a dict whose last entry is a tensor, so that readers walk through it."""
    return b"\x80\x02}(" + b"".join(items) + text("w") + tensor() + b"u."


def doubled(times: int, last: bytes = b"", first: bytes = b")") -> bytes:
    """Push a tuple of the same tuple twice, and so on: 2**times leaves in a few bytes."""
    return first + b"2\x86" * times + last


BOMB = doubled(100)
LONG_INT = number(1 << 80_000)
INSTANCE = b"cx\ny\n)R"
OPEN = {"list": b"]", "dict": b"}", "set": b"\x8f", "none": b"N", "mark": b"(", "int": b"J\1\2\3\4"}


def _repeated(opcode: bytes) -> bytes:
    return b"\x80\x04" + opcode * (6_000_000 // len(opcode)) + b"."


# The bytes of data.pkl, and the lie in them.
PICKLES: dict[str, tuple[Bytes, str]] = {
    "reduce": (b"cos\nsystem\n(S'true'\ntR.", "calls os.system"),
    "inst": (b"(S'true'\nios\nsystem\n.", "calls os.system by the opcode INST"),
    "obj": (b"(cos\nsystem\nS'true'\no.", "calls os.system by the opcode OBJ"),
    "newobj": (b"\x80\x02cos\nsystem\n)\x81.", "makes an object of os.system"),
    "newobj_ex": (b"\x80\x04cos\nsystem\n)}\x92.", "makes an object of os.system by keywords"),
    "stack_global": (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "names os.system from the stack"),
    "memo_global": (b"cos\np0\n0g0\n.", "keeps half a name in the memo"),
    "ext1": (b"\x82\x01.", "names a class by a number"),
    "ext2": (b"\x83\x01\x00.", "names a class by a number"),
    "ext4": (b"\x84\x01\x00\x00\x00.", "names a class by a number"),
    "buffer": (b"\x97.", "needs a buffer from outside"),
    "readonly": (b"]\x98.", "makes a buffer read-only"),
    "build_int": (b"K\1}b.", "sets the state of a number"),
    "reduce_none": (b"N)R.", "calls None"),
    "reduce_bomb": (BOMB + b")R.", "calls an endless tuple"),
    "module_dots": (b"c" + b"a." * 400 + b"\nx\n.", "names a module of many parts"),
    "module_long": (lambda: b"c" + b"a." * 500_000 + b"\nx\n.", "names a module of a million letters"),
    "module_stack": (lambda: text("a." * 500_000) + text("x") + b"\x93.", "the same from the stack"),
    "escape": (b"S'\\q\\x\\7'\n.", "has a text with escapes that are none"),
    "no_stop": (b"N", "does not end"),
    "line": (lambda: b"I" + b"1" * 2_000_000 + b"\n.", "has an integer of two million digits"),
    "long_lies": (b"\x8b\xff\xff\xff\x7f.", "has a number that is longer than the file"),
    "text_lies": (b"\x8d" + b"\xff" * 8 + b".", "has a text of 2**64 bytes"),
    "bytes_lie": (b"\x8e" + b"\xff" * 7 + b"\x7f.", "has bytes of 2**63"),
    "frame_lies": (b"\x80\x04\x95" + b"\xff" * 8 + b"}.", "has a frame of 2**64 bytes"),
    "frame_short": (b"\x80\x04\x95" + b"\1" + bytes(7) + state()[2:], "has a frame that ends early"),
    "protocol": (b"\x80\xff}.", "is of a protocol that nobody knows"),
    "underflow": (b"(tt.", "takes from an empty stack"),
    "unhashable": (b"}]Ns.", "has a list as a key"),
    "odd_dict": (b"}(Nu.", "has a key without a value"),
    "surrogate": (state(text(b"\xed\xa0\x80"), b"K\1"), "has half a character in a key"),
    "tuples": (lambda: b")" + b"\x85" * 1_000_000 + b".", "is nested a million deep"),
    "lists": (lambda: b"]" * 400_000 + b"a" * 399_999 + b".", "has lists nested deep"),
    "in_itself": (b"]q\0h\0a.", "holds itself"),
    "state_in_itself": (b"}" + text("a") + INSTANCE + b"q\0h\0bs.", "is its own state"),
    "states": (lambda: b"cx\ny\nq\0" + b")R" + b"h\0)R" * 200_000 + b"b" * 200_000 + b".", "deep states"),
    "states_doubled": (
        b"cx\ny\nq\0)" + b"".join(b"q\1h\0h\1\x85Rh\1b" for _ in range(300)) + b".",
        "has objects that are state and argument of the next",
    ),
    "arguments": (lambda: b"N" + b"q\0Nh\0R" * 200_000 + b".", "has objects as arguments of objects"),
    "key_bomb": (b"}" + BOMB + b"Ns.", "has a key whose hash never ends"),
    "key_deep": (lambda: b"})" + b"\x85" * 500_000 + b"Ns.", "has a key whose hash overflows the stack"),
    "set_bomb": (b"\x80\x04\x8f(" + BOMB + b"\x90.", "has a member whose hash never ends"),
    "frozen_bomb": (b"\x80\x04(" + BOMB + b"\x91.", "has a frozen member whose hash never ends"),
    "dict_bomb": (
        b"ccollections\nOrderedDict\n](" + BOMB + b"K\1\x86e\x85R.",
        "passes a key whose hash never ends to OrderedDict",
    ),
    "dict_copies": (
        lambda: b"ccollections\nOrderedDict\nq\0}(" + b"".join(number(i) + b"N" for i in range(20_000))
        + b"uq\1" + b"h\0h\1\x85R" * 100_000 + b".",
        "copies a dict a hundred thousand times",
    ),
    "key_object": (state(b"cx\ny\n" + BOMB + b"R", tensor()), "has an endless object as a name"),
    "key_number": (state(LONG_INT, tensor()), "has a number of 80,000 bits as a name"),
    "key_nan": (state(b"F" + b"nan\n", tensor()), "has no number as a name"),
    "keys_collide": (
        lambda: b"}(" + b"".join(number(i * (2**61 - 1)) + b"N" for i in range(60_000)) + b"u.",
        "has numbers of one hash as keys",
    ),
    "tuples_collide": (
        lambda: b"}(" + b"".join(number(i * (2**61 - 1)) + b"\x85N" for i in range(60_000)) + b"u.",
        "has tuples of one hash as keys",
    ),
    "keys_long": (
        lambda: b"(" + b"K\1" * 990 + b"tq\0}" + b"h\0Ns" * 1_000_000 + b".",
        "has keys that take long to hash",
    ),
    "name_regex": (
        lambda: state(text("sched" * 200_000 + "\n"), b"}" + text("a") + tensor() + b"s"),
        "has a name that is slow to match",
    ),
    "name_long": (lambda: state(text("n" * 900_000), tensor()), "has a name of 900,000 letters"),
    "names_deep": (
        lambda: b"\x80\x02}" + b"".join(text("k" * 5000) + b"}" for _ in range(300)) + b"s" * 300 + b".",
        "has long names inside each other",
    ),
    "wide": (
        b"\x80\x02" + tensor() + b"q\0" + b"".join(
            b"](" + b"h" + bytes([level]) + b"h" + bytes([level]) + b"eq" + bytes([level + 1])
            for level in range(150)
        ) + b".",
        "has one tensor at 2**150 places",
    ),
    "wide_lists": (
        lambda: b"\x80\x02N" + b"".join(
            b"q" + bytes([level]) + b"](" + (b"h" + bytes([level])) * 5000 + b"e"
            for level in range(6)
        ) + b".",
        "has lists of the same lists of the same lists",
    ),
    "pid_int": (b"K\1Q.", "has a number for a storage"),
    "pid_none": (b"NQ.", "has nothing for a storage"),
    "pid_list": (b"]Q.", "has a list for a storage"),
    "pid_text": (b"Pstorage\n.", "has a text for a storage"),
    "pid_short": (b"(" + text("storage") + b"tQ.", "has half a storage"),
    "pid_class": (state(text("a"), stored(cls=b"K\1")), "has a number for the class of a storage"),
    "pid_stranger": (state(text("a"), stored(cls=b"cx\nFloatStorage\n")), "has another class"),
    "pid_bomb_class": (state(text("a"), stored(cls=BOMB)), "has an endless class of a storage"),
    "pid_bomb_key": (state(text("a"), stored(key=BOMB)), "has an endless name of a storage"),
    "pid_negative": (state(text("a"), stored(count=number(-1))), "has fewer than no elements"),
    "pid_true": (state(text("a"), stored(count=b"\x88")), "has True elements"),
    "pid_huge": (state(text("a"), stored(count=LONG_INT)), "has 2**80000 elements"),
    "pid_two_sizes": (state(text("a"), stored(count=number(3))), "gives a storage two sizes"),
    "pid_view": (
        state(text("a"), tensor(storage=stored(more=b"(" + text("v") + number(-8) + b"K\4t"))),
        "views a storage from before its beginning",
    ),
    "tensor_of_nothing": (state(text("a"), tensor(storage=b"N")), "has a tensor without storage"),
    "shape_negative": (state(text("a"), tensor(shape=numbers([-4]))), "has a negative extent"),
    "shape_huge": (state(text("a"), tensor(numbers([2**62] * 2), numbers([0, 0]))), "has 2**124"),
    "shape_zero": (
        state(text("a"), tensor(numbers([2**62, 2**62, 0]), numbers([1, 1, 1]))),
        "has no elements, in an overflowing shape",
    ),
    "shape_long": (state(text("a"), tensor(shape=LONG_INT + b"\x85")), "has a 10 kB extent"),
    "shape_true": (state(text("a"), tensor(shape=b"\x88\x85")), "has True elements"),
    "shape_text": (state(text("a"), tensor(shape=text("abc"))), "has a text for a shape"),
    "shape_bytes": (state(text("a"), tensor(b"C\1\4", b"C\1\1")), "has bytes for a shape"),
    "shape_none": (state(text("a"), tensor(shape=b"N")), "has no shape"),
    "rank": (
        lambda: state(text("a"), tensor(b"(" + b"K\1" * 200_000 + b"t", b"(" + b"K\1" * 200_000 + b"t")),
        "has 200,000 dimensions",
    ),
    "rank_differs": (state(text("a"), tensor(stride=numbers([1, 1]))), "has a stride too many"),
    "stride_negative": (state(text("a"), tensor(stride=numbers([-1]))), "steps back"),
    "stride_huge": (state(text("a"), tensor(stride=numbers([2**63]))), "steps too far"),
    "stride_outside": (state(text("a"), tensor(stride=numbers([2]))), "steps out of the storage"),
    "start_negative": (state(text("a"), tensor(start=number(-1))), "begins before the storage"),
    "start_huge": (state(text("a"), tensor(start=number(2**64))), "begins far behind it"),
    "start_outside": (state(text("a"), tensor(start=number(1))), "ends behind the storage"),
    "repeated": (
        state(text("a"), tensor(numbers([2**61]), numbers([0]))),
        "repeats one element 2**61 times",
    ),
    "subclass_bomb": (
        state(
            text("a"),
            b"ctorch._tensor\n_rebuild_from_type_v2\n(ctorch._utils\n_rebuild_wrapper_subclass\n"
            + BOMB + BOMB + b"Nt" + b"R",
        ),
        "has an endless class of a tensor",
    ),
    "subclasses": (
        b"ctorch._tensor\n_rebuild_from_type_v2\nq\0" + b")" + b"q\1h\0N(h\0Nh\1t\x87R0" * 3
        + b"h\0(" + b"h\0N(" * 5000 + b"t" * 5000 + b"NtR.",
        "rebuilds in itself",
    ),
    "dtype_bomb": (
        state(
            text("a"),
            b"ctorch._utils\n_rebuild_tensor_v3\n(" + stored() + number(0) + numbers([4])
            + numbers([1]) + b"\x89N" + BOMB + b"tR",
        ),
        "has an endless dtype",
    ),
    "module_chain": (
        lambda: b"".join(
            b"cx\nM\n)R}(" + text("_parameters") + b"}" + text("_buffers") + b"}"
            + text("_modules") + b"}" + text("m" * 100)
            for _ in range(5000)
        ) + b"N" + b"sub" * 5000 + b".",
        "has modules nested 5,000 deep",
    ),
    "module_doubled": (
        b"N" + b"".join(
            b"q\0cx\nM\n)R}(" + text("_parameters") + b"}" + text("_buffers") + b"}"
            + text("_modules") + b"}(K\1h\0K\2h\0uub"
            for _ in range(100)
        ) + b".",
        "has 2**100 modules",
    ),
    **{
        f"many_{kind}s": (partial(_repeated, opcode), f"makes millions of {kind}s")
        for kind, opcode in OPEN.items()
    },
    "many_memos": (lambda: b"N" + b"".join(b"r" + struct.pack("<I", 7 * i) for i in range(2_000_000)) + b".", "notes"),
    "many_globals": (lambda: b"cx\nStorage\nq\0" + b"h\0" * 4_000_000 + b".", "repeats a name"),
    "many_objects": (lambda: b"cx\ny\nq\0" + b"h\0)R" * 2_500_000 + b".", "makes millions of objects"),
    "many_frames": (lambda: b"\x80\x04" + (b"\x95" + bytes(8)) * 1_000_000 + b"N.", "is all frames"),
    "many_tensors": (lambda: b"\x80\x02" + b"]q\1" + tensor() + b"q\0(" + b"h\0" * 4_000_000 + b"l.", "a tensor at millions of places"),
}  # fmt: skip


# Zip archives by hand

END = struct.Struct("<4s4H2IH")
END64 = struct.Struct("<4sQ2H2I4Q")
LOCATOR = struct.Struct("<4sIQI")


def record(name: str | bytes, data: bytes = b"", **lies: Any) -> dict[str, Any]:
    """Return a record of an archive; `lies` replace what its headers say."""
    raw = name if isinstance(name, bytes) else name.encode()
    method = lies.get("method", 0)
    truth: dict[str, Any] = {
        "name": raw,
        "local_name": raw,
        "data": data,
        "method": method,
        "flags": 0x800,
    }
    truth |= {"crc": zlib.crc32(data), "size": len(data), "packed": len(data), "extra": b""}
    truth |= {"local_method": method, "local_flags": lies.get("flags", 0x800)}
    if lies.pop("deflate", False):
        squeezer = zlib.compressobj(9, zlib.DEFLATED, -15)
        truth |= {
            "method": 8,
            "local_method": 8,
            "data": squeezer.compress(data) + squeezer.flush(),
        }
        truth["packed"] = len(truth["data"])
    return truth | lies


def archive(*records: dict[str, Any], **lies: Any) -> bytes:
    """Return an archive of the records; `lies` replace what its end says."""
    body, directory = b"", b""
    for one in records:
        offset = one.get("offset", len(body))
        sizes = one["crc"], one.get("local_packed", one["packed"]), one["size"]
        head = (45, one["local_flags"], one["local_method"], 0, 0, *(n & 0xFFFFFFFF for n in sizes))
        lengths = len(one["local_name"]), 0
        if "offset" not in one:
            body += struct.pack("<4s5H3I2H", b"PK\3\4", *head, *lengths) + one["local_name"]
            body += one["data"]
        head = 45, 45, one["flags"], one["method"], 0, 0, one["crc"]
        short = one["packed"] & 0xFFFFFFFF, one["size"] & 0xFFFFFFFF
        directory += struct.pack(
            "<4s6H3I5H2I",
            b"PK\1\2", *head, *short, len(one["name"]), len(one["extra"]), 0,
            one.get("disk", 0), 0, 0, offset,
        ) + one["name"] + one["extra"]  # fmt: skip
    truth: dict[str, Any] = {"count": len(records), "here": len(records), "disk": 0, "comment": b""}
    truth |= {"start": len(body), "size": len(directory), "wide": b""}
    end = truth | lies
    fields = end["disk"], 0, end["here"], end["count"], end["size"], end["start"]
    last: bytes = END.pack(b"PK\5\6", *fields, len(end["comment"])) + end["comment"]
    whole: bytes = body + directory + end["wide"] + last
    return whole


def wide(count=1, size=1, start=1, length=44, where=1, here=None) -> bytes:
    """Return the zip64 end of an archive, and the locator behind it."""
    here = count if here is None else here
    end = END64.pack(b"PK\6\6", length, 45, 45, 0, 0, here, count, size, start)
    return end + LOCATOR.pack(b"PK\6\7", 0, where, 1)


DATA = record("a/data/0", struct.pack("<4f", 1, 2, 3, 4))
PICKLE = record("a/data.pkl", state())
MORE = record("a/version", b"3\n")


def wide_field(*sizes: int) -> bytes:
    """Return the extra field of a record that holds 64-bit sizes."""
    return struct.pack(f"<2H{len(sizes)}Q", 1, 8 * len(sizes), *sizes)


def zeros(nbytes: int) -> bytes:
    """Return a deflated stream of so many zeros, a multiple of 64 MiB."""
    # Each block ends with a full flush and so stands for itself: one is compressed and repeated.
    squeezer = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = squeezer.compress(bytes(1 << 26)) + squeezer.flush(zlib.Z_FULL_FLUSH)
    return block * (nbytes >> 26) + zlib.compressobj(9, zlib.DEFLATED, -15).flush()


_truth = archive(PICKLE, DATA, MORE)
_inner = archive(MORE)[: 30 + len(MORE["name"]) + len(MORE["data"])]


def _after(*records: dict[str, Any]) -> int:
    return sum(30 + len(one["name"]) + len(one["data"]) for one in records)


ARCHIVES: dict[str, tuple[Bytes, str]] = {
    "local_name": (
        archive(record("a/data.pkl", state(), local_name=b"b/data.pkl"), DATA),
        "calls a record by two names",
    ),
    "local_method": (
        archive(PICKLE, DATA | {"local_method": 8}),
        "says of a record that it is and is not deflated",
    ),
    "local_size": (archive(PICKLE, DATA | {"local_packed": 15}), "gives a record two sizes"),
    "local_missing": (archive(PICKLE, DATA | {"offset": 7}), "has a record without a header"),
    "offset_far": (archive(PICKLE, DATA | {"offset": 0xFFFFFFF0}), "has a record behind its end"),
    "overlap": (
        archive(PICKLE, DATA, record("a/outer", _inner), MORE | {"offset": _after(PICKLE, DATA) + 37}),
        "has a record within a record",
    ),
    "same_bytes": (
        archive(PICKLE, DATA, DATA | {"name": b"a/data/1", "offset": _after(PICKLE)}),
        "has two records of the same bytes",
    ),
    "twice": (archive(PICKLE, PICKLE, DATA), "has two pickles"),
    "packed_lies": (archive(PICKLE, DATA | {"packed": 20}), "has a record of two sizes"),
    "size_lies": (archive(PICKLE, DATA | {"size": 1 << 31}), "has a record of 2 GiB in 16 bytes"),
    "size64_lies": (
        archive(PICKLE, DATA | {"size": -1, "packed": -1, "extra": wide_field(2**63, 2**63)}),
        "has a record of 2**63 bytes",
    ),
    "size64_missing": (archive(PICKLE, DATA | {"size": -1, "extra": b"\1\0\4\0abcd"}), "has half a size"),
    "extra_lies": (archive(PICKLE, DATA | {"size": -1, "extra": b"\1\0\xff\xff"}), "has a field too long"),
    "encrypted": (archive(PICKLE, DATA | {"flags": 1, "local_flags": 1}), "is encrypted"),
    "masked": (archive(PICKLE, DATA | {"flags": 0x2000, "local_flags": 0x2000}), "has a masked header"),
    "encrypted_half": (archive(PICKLE, DATA | {"flags": 1}), "is encrypted by one header only"),
    "method": (archive(PICKLE, DATA | {"method": 93, "local_method": 93}), "is packed by Zstandard"),
    "disk": (archive(PICKLE, DATA | {"disk": 1}), "lies on another disk"),
    "crc": (archive(PICKLE | {"crc": 1}, DATA), "has a wrong checksum"),
    "nul_name": (archive(record("a/data.pkl\0x", state()), DATA), "ends a name with a zero byte"),
    "no_text_name": (archive(record(b"\xff/data.pkl", state()), DATA), "has a name that is not text"),
    "up_name": (archive(record("../../x", b""), PICKLE, DATA), "has a name that leads out"),
    "root_name": (archive(record("/data.pkl", state()), DATA), "has a name from the root"),
    "two_roots": (archive(PICKLE, record("b/data.pkl", state()), DATA), "holds two checkpoints"),
    "count_more": (archive(PICKLE, DATA, count=3, here=3), "has fewer records than it says"),
    "count_less": (archive(PICKLE, DATA, MORE, count=2, here=2), "has more records than it says"),
    "count_half": (archive(PICKLE, DATA, here=1), "counts its records twice"),
    "end_disk": (archive(PICKLE, DATA, disk=1), "is one of several disks"),
    "start_lies": (archive(PICKLE, DATA, start=0), "has its directory elsewhere"),
    "start_far": (archive(PICKLE, DATA, start=0xFFFFFFF0), "has its directory behind its end"),
    "directory_huge": (archive(PICKLE, DATA, size=0xFFFFFFF0), "has a directory of 4 GiB"),
    "prefixed": (b"PK\3\4" + bytes(60) + _truth, "begins with other bytes"),
    "followed": (_truth + b"x", "is followed by a byte"),
    "commented": (archive(PICKLE, DATA, comment=END.pack(b"PK\5\6", 0, 0, 0, 0, 0, 0, 0)), "has an end in a comment"),
    "wide_count": (
        archive(PICKLE, DATA, count=0xFFFF, here=0xFFFF, wide=wide(count=2**64 - 1)),
        "has 2**64 records",
    ),
    "wide_place": (archive(PICKLE, DATA, wide=wide(where=2**63)), "has its end at 2**63"),
    "wide_lies": (
        _truth[: -END.size] + wide(3, 1, 1, 44, len(_truth) - END.size) + _truth[-END.size :],
        "has two ends that contradict each other",
    ),
    "bomb": (
        lambda: archive(PICKLE, record("a/data/0", zeros(3 << 30), method=8, size=3 << 30, crc=1)),
        "unpacks to 3 GiB",
    ),
    "bomb_pickle": (
        lambda: archive(record("a/data.pkl", b"]" * 60_000_000 + b".", deflate=True), DATA),
        "unpacks to a pickle of 60 million lists",
    ),
    "bomb_order": (
        lambda: archive(PICKLE, DATA, record("a/byteorder", b"x" * 60_000_000, deflate=True)),
        "unpacks to the name of a byte order",
    ),
    "bomb_mark": (
        lambda: archive(PICKLE, DATA, record("a/merge_avg.json", b"{" * 60_000_000, deflate=True)),
        "unpacks to a long provenance record",
    ),
    "deflate_short": (
        archive(PICKLE, DATA | {"method": 8, "local_method": 8, "size": 400}),
        "is not deflated where it says so",
    ),
    "deflate_followed": (
        archive(
            PICKLE,
            record("a/data/0", DATA["data"], deflate=True)
            | {"data": b"\x4b\x04\x00" + bytes(15), "packed": 18},
        ),
        "has bytes behind the end of a deflated record",
    ),
    "no_records": (archive(), "is empty"),
    "order": (archive(PICKLE, DATA, record("a/byteorder", b"middle")), "is of another byte order"),
    "record_short": (archive(PICKLE, record("a/data/0", b"123")), "has a record that is too short"),
    "record_missing": (archive(PICKLE), "lacks a record"),
}  # fmt: skip


# safetensors


def safetensors(header: object, data: bytes = bytes(12), length: int | None = None) -> bytes:
    """Return a file with a header that claims to have a length."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def entry(
    start: object = 0, stop: object = 12, dtype: object = "F32", shape: object = (3,)
) -> dict[str, Any]:
    """Return the header's entry of one tensor."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


HEADERS: dict[str, tuple[Bytes, str]] = {
    "length": (safetensors({}, length=2**63), "has a header of 2**63 bytes"),
    "length_more": (safetensors({"a": entry()}, length=2**40), "has a header longer than itself"),
    "length_limit": (safetensors(b"{" + b" " * 100, length=99_999_999), "is cut short"),
    "hole": (safetensors({"a": entry(0, 4, shape=[1]), "b": entry(8, 12, shape=[1])}), "has a hole"),
    "overlap": (safetensors({"a": entry(0, 8, shape=[2]), "b": entry(4, 12, shape=[2])}), "overlaps"),
    "same": (safetensors({"a": entry(), "b": entry()}), "has two tensors of the same bytes"),
    "negative": (safetensors({"a": entry(shape=[-3])}), "has a negative shape"),
    "negative_pair": (safetensors({"a": entry(shape=[-3, -1])}), "has two negative extents"),
    "overflow": (safetensors({"a": entry(shape=[2**62, 4])}), "has a shape that overflows to zero"),
    "overflow_zero": (safetensors({"a": entry(0, 0, shape=[2**62, 2**62, 0])}, b""), "overflows"),
    "long_extent": (safetensors(b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,12]}}'), "has an extent of 5,000 digits"),
    "many_extents": (safetensors({"a": entry(shape=[3] + [1] * 100_000)}), "has 100,000 extents"),
    "huge_extents": (safetensors({"a": entry(shape=[10**4000] * 500)}), "has extents of 4,000 digits"),
    "float": (safetensors({"a": entry(shape=[3.0])}), "has an extent of 3.0"),
    "true": (safetensors({"a": entry(start=False)}), "begins at false"),
    "text": (safetensors({"a": entry(shape="abc")}), "has a text for a shape"),
    "dtype": (safetensors({"a": entry(dtype="F33")}), "is of an unknown dtype"),
    "dtype_list": (safetensors({"a": entry(dtype=["F32"])}), "is of a list of dtypes"),
    "dtype_wrong": (safetensors({"a": entry(dtype="F64")}), "is of a dtype of another size"),
    "reversed": (safetensors({"a": entry(12, 0)}), "ends before it begins"),
    "minus": (safetensors({"a": entry(-12, 0)}), "begins before the file"),
    "three_offsets": (safetensors({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12, 12]}}), "has three offsets"),
    "huge_offsets": (safetensors({"a": entry(2**64, 2**64 + 12)}), "begins at 2**64"),
    "past_end": (safetensors({"a": entry(0, 400, shape=[100])}), "ends behind the file"),
    "followed": (safetensors({"a": entry(0, 4, shape=[1])}), "is followed by bytes"),
    "product": (safetensors({"a": entry(shape=[2])}), "has more bytes than its shape"),
    "half_bytes": (safetensors({"a": entry(0, 12, "F4", [23])}), "has half a byte too few"),
    "duplicate": (safetensors(b'{"a":%b,"a":%b}' % ((json.dumps(entry()).encode(),) * 2)), "has a name twice"),
    "duplicate_inside": (safetensors(b'{"a":{"dtype":"F32","dtype":"I32","shape":[3],"data_offsets":[0,12]}}'), "has a dtype twice"),
    "deep": (safetensors(b'{"a":' * 100_000 + b"1" + b"}" * 100_000), "is nested deep"),
    "deep_list": (safetensors(b'{"a":' + b"[" * 1_000_000 + b"]" * 1_000_000 + b"}"), "is nested deep"),
    "no_json": (safetensors(b"{hello"), "has a header that is not JSON"),
    "no_text": (safetensors(b'{"\xff":1}'), "has a header that is not UTF-8"),
    "mark": (safetensors(b'{"\xef\xbb\xbf":1}'), "has a byte order mark in a name"),
    "half_character": (safetensors(b'{"\\ud800":%b}' % json.dumps(entry()).encode()), "has half a character in a name"),
    "list": (safetensors(b"{}")[:8] + b"[]" + bytes(12), "is a list"),
    "metadata_numbers": (safetensors({"__metadata__": {"a": 1}, "a": entry()}), "has metadata of numbers"),
    "metadata_list": (safetensors({"__metadata__": ["a"], "a": entry()}), "has a list of metadata"),
    "infinite": (safetensors(b'{"a":{"dtype":"F32","shape":[Infinity],"data_offsets":[0,12]}}'), "has an infinite extent"),
    "nan": (safetensors(b'{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,NaN]}}'), "ends nowhere"),
    "lists": (lambda: safetensors(b'{"a":[' + b"[]," * 4_000_000 + b"1]}"), "makes millions of lists"),
    "tables": (lambda: safetensors(b'{"a":[' + b'{"":{}},' * 1_500_000 + b"1]}"), "makes millions of tables"),
    "wide_text": (lambda: safetensors(b'{"__metadata__":{"a":"\xf0\x9f\x98\x80' + b"a" * 50_000_000 + b'"}}'), "has a wide text"),
    "name_regex": (safetensors({"sched" * 200_000 + "\n": entry()}), "has a name that is slow to match"),
}  # fmt: skip


def _content(data: Bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(made(data))


def _in_zip(data: Bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(archive(record("a/data.pkl", made(data)), DATA))


def _in_legacy(data: Bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(legacy(made(data)))


def _in_dcp(data: Bytes) -> Callable[[Path], object]:
    return lambda path: dcp(path, made(data))


# Legacy files

HEAD = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({}, 2)


def legacy(
    data: bytes, keys: bytes = b"](" + text("0") + b"e.", counts: bytes | None = None
) -> bytes:
    """Return a file before torch 1.6: notes, a pickle, the keys of storages, and their bytes."""
    counts = struct.pack("<q4f", 4, 1, 2, 3, 4) if counts is None else counts
    return HEAD + data + keys + counts


OLD: dict[str, tuple[Bytes, str]] = {
    "keys_none": (legacy(state(), b"N."), "has no list of storages"),
    "keys_bomb": (legacy(state(), b"](" + BOMB + b"e."), "has an endless name of a storage"),
    "keys_numbers": (legacy(state(), b"](K\0e."), "has numbers for names of storages"),
    "keys_twice": (legacy(state(), b"](" + text("0") * 2 + b"e."), "has a storage twice"),
    "keys_more": (legacy(state(), b"](" + text("0") + text("1") + b"e."), "has a storage too many"),
    "keys_fewer": (legacy(state(), b"]."), "lacks a storage"),
    "count": (legacy(state(), counts=struct.pack("<q4f", 2**62, 1, 2, 3, 4)), "has 2**62 elements"),
    "count_negative": (legacy(state(), counts=struct.pack("<q4f", -4, 1, 2, 3, 4)), "has -4 elements"),
    "short": (legacy(state())[:-3], "is cut short"),
    "magic_only": (HEAD[:14], "ends behind its magic number"),
    "info_call": (HEAD[: -len(pickle.dumps({}, 2))] + b"cos\nsystem\n(S'true'\ntR." + state(), "calls in its notes"),
    "info_many": (lambda: HEAD[: -len(pickle.dumps({}, 2))] + b"]" * 11_000_000 + b".", "has millions of notes"),
}  # fmt: skip


@attack
def legacy_sparse(path: Path) -> None:
    """It has a pickle of bytes that fill a sparse file of 3 GiB."""
    with path.open("wb") as file:
        file.write(HEAD + b"\x80\x04\x8e" + (3 << 30).to_bytes(8, "little"))
        file.truncate((3 << 30) + 1000)


@attack
def legacy_sparse_lie(path: Path) -> None:
    """It has a damaged pickle, followed by a hole of 3 GiB."""
    with path.open("wb") as file:
        file.write(HEAD + b"\x80\x02}(")
        file.truncate(3 << 30)


@attack
def legacy_endless(path: Path) -> None:
    """It has a pickle of zeros that only ends with the file of 100 MB."""
    with path.open("wb") as file:
        file.write(HEAD + b"\x80\x02(" + b"K\0" * 50_000_000)


def _sparse(path: Path, *, name: str) -> None:
    """Write an archive of 3 GiB, one record of which is a hole."""
    first = archive(PICKLE, DATA) if name != "a/data.pkl" else archive(DATA)
    records = [PICKLE, DATA] if name != "a/data.pkl" else [DATA]
    body = first[: first.index(b"PK\1\2")]
    size = 3 << 30
    head = struct.pack("<4s5H3I2H", b"PK\3\4", 45, 0x800, 0, 0, 0, 0, size, size, len(name), 0)
    tail = archive(*records, record(name, b"", size=size, packed=size, offset=len(body), crc=0))
    tail = tail[len(body) :]
    start = len(body) + len(head) + len(name) + size
    tail = tail[: -END.size] + END.pack(
        b"PK\5\6", 0, 0, len(records) + 1, len(records) + 1, len(tail) - END.size, start, 0
    )
    with path.open("wb") as file:
        file.write(body + head + name.encode())
        file.seek(start)
        file.write(tail)


@attack
def zip_sparse_pickle(path: Path) -> None:
    """It has a pickle of 3 GiB."""
    _sparse(path, name="a/data.pkl")


@attack
def zip_sparse_order(path: Path) -> None:
    """It has a name of a byte order of 3 GiB."""
    _sparse(path, name="a/byteorder")


@attack
def zip_sparse_directory(path: Path) -> None:
    """It has a directory of 3 GiB."""
    with path.open("wb") as file:
        file.write(b"PK\3\4")
        file.seek(3 << 30)
        file.write(END.pack(b"PK\5\6", 0, 0, 9, 9, (3 << 30) - 4, 4, 0))


@attack
def zip_many_records(path: Path) -> None:
    """It has a directory whose million entries are the same record."""
    names = (b"%07d" % i for i in range(1_000_000))
    whole = archive(PICKLE)
    body = whole[: whole.index(b"PK\1\2")]
    fixed = struct.pack("<4s6H3I4HI2I", b"PK\1\2", 0, 0, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0)[
        :46
    ]
    directory = b"".join(fixed + name for name in names)
    with path.open("wb") as file:
        file.write(body + directory)
        file.write(END.pack(b"PK\5\6", 0, 0, 16960, 16960, len(directory), len(body), 0))


# Directories of torch.distributed.checkpoint


def obj(module: str, name: str, **attributes: bytes) -> bytes:
    """Push an object of a class with such attributes."""
    items = b"".join(text(key) + value for key, value in attributes.items())
    return f"c{module}\n{name}\n".encode() + b")\x81}(" + items + b"ub"


def size(*extents: int) -> bytes:
    """Push a torch.Size."""
    return b"ctorch\nSize\n(" + numbers(extents) + b"tR"


META = "torch.distributed.checkpoint.metadata"
CHUNK = archive(record("a/data.pkl", b"\x80\x02" + tensor() + b"."), DATA)


def tensor_metadata(shape=None, chunks=None, dtype=b"ctorch\nfloat32\n") -> bytes:
    """Push the metadata of a tensor in chunks."""
    shape = size(4) if shape is None else shape
    one = obj(META, "ChunkStorageMetadata", offsets=size(0), sizes=size(4))
    chunks = b"](" + one + b"e" if chunks is None else chunks
    properties = b"c" + META.encode() + b"\nTensorProperties\n)\x81(" + dtype + b"\x89tb"
    return obj(META, "TensorStorageMetadata", properties=properties, size=shape, chunks=chunks)


def place(
    fqn=text("w"), offset=None, file=text("__0_0.distcp"), start=number(0), nbytes=None
) -> bytes:
    """Push the index of a chunk, and the place where it lies."""
    index = obj(META, "MetadataIndex", fqn=fqn, offset=size(0) if offset is None else offset)
    where = obj(
        "torch.distributed.checkpoint.filesystem", "_StorageInfo", relative_path=file, offset=start,
        length=number(len(CHUNK)) if nbytes is None else nbytes,
    )  # fmt: skip
    return index + where


def metadata(entries=None, places=None, planner=b"}") -> bytes:
    """Return the pickle of a `.metadata` file."""
    entries = text("w") + tensor_metadata() if entries is None else entries
    whole = obj(
        META, "Metadata", state_dict_metadata=b"}(" + entries + b"u", planner_data=planner,
        storage_data=b"}(" + (place() if places is None else places) + b"u",
    )  # fmt: skip
    return b"\x80\x02" + whole + b"."


def dcp(path: Path, data: bytes, chunks: bytes = CHUNK) -> None:
    """Write a distributed checkpoint with such metadata."""
    path.mkdir()
    (path / ".metadata").write_bytes(data)
    (path / "__0_0.distcp").write_bytes(chunks)


def _many_chunks(path: Path) -> None:
    one = obj(META, "ChunkStorageMetadata", offsets=size(0), sizes=size(4))
    dcp(path, metadata(text("w") + tensor_metadata(chunks=one + b"q\0(" + b"h\0" * 12_000 + b"l")))


def _many_files(path: Path) -> None:
    count = 2000
    chunks = b"".join(
        obj(META, "ChunkStorageMetadata", offsets=size(4 * i), sizes=size(4)) for i in range(count)
    )
    entries = text("w") + tensor_metadata(size(4 * count), b"](" + chunks + b"e")
    places = b"".join(place(offset=size(4 * i), start=number(i * len(CHUNK))) for i in range(count))
    dcp(path, metadata(entries, places), CHUNK * count)


SETS = {
    "right": (metadata(), "does not lie: it is the file that the others change"),
    "path_up": (metadata(places=place(file=text("../../x"))), "has its chunks two folders up"),
    "path_root": (metadata(places=place(file=text("/etc/passwd"))), "has its chunks in /etc/passwd"),
    "path_none": (metadata(places=place(file=b"N")), "has its chunks nowhere"),
    "path_bomb": (metadata(places=place(file=BOMB)), "has its chunks in an endless place"),
    "start": (metadata(places=place(start=number(2**63))), "has a chunk behind the file"),
    "start_negative": (metadata(places=place(start=number(-4))), "has a chunk before the file"),
    "start_huge": (metadata(places=place(start=LONG_INT)), "has a chunk at 2**80000"),
    "length": (metadata(places=place(nbytes=number(2**62))), "has a chunk longer than the file"),
    "length_short": (metadata(places=place(nbytes=number(30))), "has a chunk that is cut short"),
    "length_zero": (metadata(places=place(nbytes=number(0))), "has an empty chunk"),
    "twice": (metadata(places=place() + place(fqn=text("v"))), "has two chunks of the same bytes"),
    "fqn": (metadata(places=place(fqn=b"K\1")), "has a number for a name"),
    "fqn_bomb": (metadata(entries=BOMB + tensor_metadata()), "has an endless name"),
    "shape": (metadata(text("w") + tensor_metadata(numbers([-4]))), "has a negative shape"),
    "shape_more": (metadata(text("w") + tensor_metadata(size(8))), "has more elements than chunks"),
    "shape_huge": (metadata(text("w") + tensor_metadata(size(2**62, 2**62))), "has 2**124 elements"),
    "shape_rank": (metadata(text("w") + tensor_metadata(size(*[1] * 60, 4))), "has 61 dimensions"),
    "shape_bomb": (metadata(text("w") + tensor_metadata(BOMB)), "has an endless shape"),
    "dtype": (metadata(text("w") + tensor_metadata(dtype=b"ctorch\nint7\n")), "is of another dtype"),
    "dtype_bomb": (metadata(text("w") + tensor_metadata(dtype=BOMB)), "is of an endless dtype"),
    "dtype_wrong": (metadata(text("w") + tensor_metadata(dtype=b"ctorch\nint32\n")), "is of two dtypes"),
    "no_chunks": (metadata(text("w") + tensor_metadata(chunks=b"]")), "has no chunks"),
    "chunks_none": (metadata(text("w") + tensor_metadata(chunks=b"N")), "has None for chunks"),
    "planner": (metadata(planner=b"}" + text("w") + b"(" + text("a") * 100_000 + b"ts"), "has a long path"),
    "planner_number": (metadata(planner=b"}" + text("w") + text("a") + LONG_INT + b"\x86s"), "has a huge path"),
    "no_metadata": (b"\x80\x02}.", "is a dict"),
    "persistent": (b"\x80\x02" + stored() + b".", "refers to storages"),
}  # fmt: skip


# Directories


def _model(path: Path, name: str = "model.safetensors") -> None:
    path.mkdir()
    (path / name).write_bytes(safetensors({"w": entry()}))


def _index(path: Path, table: object) -> None:
    name = "model-00001-of-00001.safetensors"
    _model(path, name)
    raw = (
        made(table)
        if isinstance(table, bytes) or callable(table)
        else json.dumps({"weight_map": table}).encode()
    )
    (path / "model.safetensors.index.json").write_bytes(raw)


INDEXES: dict[str, tuple[object, str]] = {
    "up": ({"w": "../../x"}, "names a file two folders up"),
    "root": ({"w": "/etc/passwd"}, "names /etc/passwd"),
    "number": ({"w": 3}, "names a number instead of a file"),
    "other": ({"v": "model-00001-of-00001.safetensors"}, "names what is not there"),
    "lists": (lambda: b'{"weight_map":[' + b"[]," * 4_000_000 + b"1]}", "makes millions of lists"),
    "deep": (b'{"weight_map":' + b"[" * 200_000, "is nested deep"),
    "no_text": (b'{"weight_map":{"\xff":"x"}}', "is not UTF-8"),
}


@attack
def directory_fifo(path: Path) -> None:
    """It has a pipe that nobody writes to."""
    _model(path)
    os.mkfifo(path / "extra.json")


@attack
def directory_loop(path: Path) -> None:
    """It has a link that leads to itself."""
    _model(path)
    (path / "loop.json").symlink_to("loop.json")


@attack
def directory_inside_itself(path: Path) -> None:
    """It has a folder that is a link to itself."""
    _model(path)
    (path / "again").symlink_to(".")


@attack
def directory_twice(path: Path) -> None:
    """It has the same tensor in two shards."""
    path.mkdir()
    for number_ in (1, 2):
        name = f"model-{number_:05}-of-00002.safetensors"
        (path / name).write_bytes(safetensors({"w": entry()}))


@attack
def directory_shards(path: Path) -> None:
    """It has one shard of 99,999."""
    _model(path, "model-00001-of-99999.safetensors")


def _add(name: str, how: str, make: Callable[[Path], object], data: object = b"") -> None:
    make.__doc__ = f"It {how}."
    ATTACKS[name] = make
    if callable(data):
        LARGE.add(name)


def _register() -> None:
    for name, (data, how) in PICKLES.items():
        for kind, put in (("zip", _in_zip), ("legacy", _in_legacy), ("dcp", _in_dcp)):
            _add(f"{kind}_pickle_{name}", how, put(data), data)
    for kind, table in (("zip", ARCHIVES), ("safetensors", HEADERS), ("legacy", OLD)):
        for name, (data, how) in table.items():
            _add(f"{kind}_{name}", how, _content(data), data)
    for name, (data, how) in SETS.items():
        _add(f"dcp_{name}", how, _in_dcp(data), data)
    for name, (index, how) in INDEXES.items():
        _add(f"index_{name}", how, partial(_index, table=index), index)
    _add("dcp_many_chunks", "has a tensor of 12,000 chunks that repeat one place", _many_chunks)
    _add("dcp_many_files", "has a tensor of 2,000 chunks", _many_files)
    LARGE.update(name for name in ATTACKS if "sparse" in name or "endless" in name)
    LARGE.update(("zip_many_records", "dcp_many_files"))


_register()
