"""Ledgers: what is known of a stretch once it is done; those of all add up to what a merge knows.

    {"merge_avg": "0.1.0", "plan": "00ff...", "stretch": 7, "span": [...], "tokens": ["00ff..."],
     "host": "node7", "rank": 2, "seconds": 1.5, "bytes": 4096, "hashes": ["00ff...", ...],
     "differing": [...], "nonfinite": [...], "varying": [...], "products": [...], "inputs": [...],
     "outputs": [...]}
    00ff...             the XXH3 of the line before

Numbers of which there are many are base64 of 64 bits each. A ledger is trusted as little as any
file: all that it says is checked against the plan. The XXH3 detects accidents, not tampering.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from xxhash import xxh3_128_hexdigest

from merge_avg._version import __version__
from merge_avg.agreement import Products
from merge_avg.formats.bounded import loads
from merge_avg.parts._stretches import Stretch

LARGEST = 1 << 28  # bytes of one: a thousand checkpoints of a hundred thousand tensors
_PER_BYTE = 20  # of memory: nearly all of a long ledger is base64
Rows = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Ledger:
    """The results of one stretch of a merge."""

    stretch: int  # its number
    host: str
    rank: int
    seconds: float
    nbytes: int  # read
    hashes: tuple[int, ...]  # sums of hashes, by checkpoint, and of what is kept
    differing: tuple[str, ...]
    nonfinite: tuple[str, ...]
    varying: tuple[int, ...]  # the places of tensors among those of the plan
    products: tuple[Products, ...]
    inputs: tuple[Rows, ...]  # of each checkpoint what `Reader.take` returned
    outputs: tuple[tuple[Rows, ...], ...]  # of each file of each output: `SharedFile.take`


def pack(ledger: Ledger, stretch: Stretch, plan: str, tokens: Sequence[str]) -> bytes:
    """Return a ledger as the content of a file."""
    told = {
        "merge_avg": __version__,
        "plan": plan,
        "stretch": ledger.stretch,
        "span": _span(stretch),
        "tokens": list(tokens),
        "host": ledger.host,
        "rank": ledger.rank,
        "seconds": round(ledger.seconds, 6),
        "bytes": ledger.nbytes,
        "hashes": [f"{one:x}" for one in ledger.hashes],
        "differing": ledger.differing,
        "nonfinite": ledger.nonfinite,
        "varying": ledger.varying,
        "products": [[_floats(one) for one in pair] for pair in ledger.products],
        "inputs": [[n, _pack(rows)] for n, rows in enumerate(ledger.inputs) if rows],
        "outputs": [
            [n, file, _pack(rows)]
            for n, files_ in enumerate(ledger.outputs)
            for file, rows in enumerate(files_)
            if rows
        ],
    }
    text = json.dumps(told, allow_nan=False).encode()
    return text + b"\n" + xxh3_128_hexdigest(text).encode() + b"\n"


def unpack(
    raw: bytes,
    stretch: Stretch,
    plan: str,
    tokens: Sequence[str],
    counts: tuple[int, Sequence[int]],
) -> Ledger:
    """Return the ledger of a stretch from the content of a file; ValueError says what is wrong.

    `counts` are the number of checkpoints, and of files of each output.
    """
    text, _, closing = raw.partition(b"\n")
    if closing != xxh3_128_hexdigest(text).encode() + b"\n":
        raise ValueError("it is torn, or was changed")
    try:
        value = loads(text, per_byte=_PER_BYTE)
        if value["merge_avg"] != __version__:
            raise ValueError(f"it is of merge-avg {_text(value['merge_avg'])}")
        if value["plan"] != plan:
            raise ValueError("it is of another merge")
        if value["stretch"] != stretch.number or value["span"] != _span(stretch):
            raise ValueError("it is of another stretch of the work")
        if value["tokens"] != list(tokens):
            raise ValueError("it is of an output in the making that is gone")
        return _ledger(value, stretch, counts)
    except (KeyError, TypeError, AttributeError, OverflowError, binascii.Error):
        raise ValueError("it does not hold what a ledger does") from None


def _ledger(value: dict[str, Any], stretch: Stretch, counts: tuple[int, Sequence[int]]) -> Ledger:
    checkpoints, numbers = counts
    inputs: list[Rows] = [()] * checkpoints
    for number, rows in value["inputs"]:
        inputs[_below(number, checkpoints)] = _unpack(rows, 6)
    outputs: list[list[Rows]] = [[()] * count for count in numbers]
    for number, file, rows in value["outputs"]:
        outputs[_below(number, len(numbers))][_below(file, numbers[number])] = _unpack(rows, 4)
    hashes = tuple(int(_text(one), 16) for one in value["hashes"])
    if len(hashes) != checkpoints + 1:
        raise ValueError("it has hashes of other checkpoints")
    pairs = value["products"]
    products = tuple((_rows(grams), _rows(sums)) for grams, sums in pairs)
    return Ledger(
        stretch.number,
        _text(value["host"]),
        _below(value["rank"], 1 << 31),
        _finite(value["seconds"]),
        _below(value["bytes"], 1 << 63),
        hashes,
        tuple(map(_text, value["differing"])),
        tuple(map(_text, value["nonfinite"])),
        tuple(_below(one, 1 << 31) for one in value["varying"]),
        products,
        tuple(inputs),
        tuple(map(tuple, outputs)),
    )


def _span(stretch: Stretch) -> list[int]:
    return [*stretch.start, *stretch.stop, *stretch.copies, stretch.nbytes]


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("not a text")
    return value


def _finite(value: Any) -> float:
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise TypeError("not a number")
    return float(value)


def _below(value: Any, limit: int) -> int:
    if type(value) is not int or not 0 <= value < limit:
        raise TypeError("not a number, or of something that there is not")
    return value


def _pack(rows: Sequence[Sequence[int]]) -> str:
    return base64.b64encode(array("q", (n for row in rows for n in row)).tobytes()).decode()


def _unpack(text: Any, width: int) -> Rows:
    cells = array("q", base64.b64decode(_text(text), validate=True))
    if len(cells) % width:
        raise TypeError("a row that is cut")
    return tuple(tuple(cells[at : at + width]) for at in range(0, len(cells), width))


def _floats(rows: dict[int, list[float]]) -> list[str]:
    """Return numbered rows of floats: their numbers, and all their cells."""
    numbers, cells = array("q", rows), array("d", (x for row in rows.values() for x in row))
    return [base64.b64encode(one.tobytes()).decode() for one in (numbers, cells)]


def _rows(pair: Any) -> dict[int, list[float]]:
    texts = (base64.b64decode(_text(one), validate=True) for one in pair)
    raw, values = texts
    numbers, cells = array("q", raw), array("d", values)
    width, rest = divmod(len(cells), max(len(numbers), 1))
    if rest or len(set(numbers)) != len(numbers):
        raise TypeError("rows of different lengths")
    return {n: cells[k * width : (k + 1) * width].tolist() for k, n in enumerate(numbers)}
