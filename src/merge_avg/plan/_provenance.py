"""The provenance record of an output: from which inputs it was made, and with which options.

    {"merge_avg": "0.1.0",
     "inputs": [{"name": "fold1.pt", "bytes": 4096, "weight": "1/2", "hash": "00ff..."}, ...],
     "template": {"name": "fold1.pt", "bytes": 4096, "hash": "00ff..."},
     "agreement": "+0.912345", "normalize": true, ... the recorded options}

It is the same for the same inputs and options, without a time or a place, so that merging again
gives the same bytes. `verify` does just that.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path, PurePosixPath
from typing import Any

from merge_avg._version import __version__
from merge_avg.arithmetic import Weights
from merge_avg.checkpoint import LARGEST_PROVENANCE, PROVENANCE, Layout
from merge_avg.errors import MergeError
from merge_avg.formats import bounded, scan
from merge_avg.io import leads_elsewhere
from merge_avg.options import RECORDED, Options, choices

_MOST_INPUTS = 10_000
_LATER = {
    "weights_only": False,
    "weights_for": (),
    "lora": "factors",
}  # recorded only where they are set: records of before have none
_LONGEST = 10_000  # characters of a text: two numbers, of as many digits as `int` takes


@dataclass(frozen=True)
class Hashes:
    """Hashes of what was read, as sums of the XXH3 of its chunks modulo 2^128."""

    read: tuple[int, ...]  # of each checkpoint's weights, in the order of the job's layouts
    kept: int  # of all that the outputs have from the template beside the averaged weights


def write_record(
    layouts: Sequence[Layout],
    weights: Weights,
    options: Options,
    version: str = __version__,
    hashes: Hashes | None = None,
    agreement: float | None = None,
    rules: Sequence[tuple[str, Weights]] = (),
    *,
    compared: bool = True,
) -> bytes:
    """Return the provenance record of an output; without hashes a draft of the same length.

    The template is the first of the layouts. The agreement is the mean cosine, if it was measured.
    It is recorded where it was `compared`: with several outputs it is not that of each. Inputs are
    named from the deepest directory that holds all of them: moving it changes nothing.
    """
    # A weight of zero is named only where it had a say: in which tensors every checkpoint has.
    all_named = options.missing != "error"
    rows = [weights, *(row for _, row in rules)]
    used = {k for k in range(len(layouts)) if any(row.integers[k] for row in rows)}
    numbers = [k for k in range(len(layouts)) if all_named or k in used]
    places = {k: Path(os.path.abspath(layouts[k].path)) for k in {0, *numbers}}  # noqa: PTH100 - links stay
    root = os.path.commonpath([place.parent for place in places.values()])
    names = {k: place.relative_to(root).as_posix() for k, place in places.items()}

    # Hashes and agreement are known when everything has been read. In a safetensors file the record
    # stands before the weights, which are written meanwhile: so it has to have its length from the
    # start, and zeros stand for what is not known yet.
    def digest(value: int) -> str | None:
        return f"{value:032x}" if options.hashes else None

    # By name: in whichever order checkpoints are given, their mean is the same.
    order = sorted(numbers, key=names.__getitem__)
    inputs = [
        {
            "name": names[k],
            "bytes": layouts[k].nbytes,
            # Integers, as 0.1 is not a float: whoever reads "1/3" computes with the same numbers.
            "weight": f"{weights.integers[k]}/{weights.total}",
            # How much is read of what has no weight depends on what else is made of it.
            "hash": digest(hashes.read[k] if hashes else 0) if k in used else None,
        }
        for k in order
    ]
    kept = digest(hashes.kept if hashes else 0)
    # "n/a" is as long as a number.
    cosine = "n/a      " if agreement is None and hashes else f"{agreement or 0:+.6f}"
    record = {
        "merge_avg": version,
        "inputs": inputs,
        "template": {"name": names[0], "bytes": layouts[0].nbytes, "hash": kept},
        "agreement": cosine if options.agreement and compared else None,
        **{k: getattr(options, k) for k in RECORDED if not _unset(k, options)},
    }
    if rules:  # with weights in this order
        record["weights_for"] = [
            f"{pattern}={','.join(f'{row.integers[k]}/{row.total}' for k in order)}"
            for pattern, row in rules
        ]
    return json.dumps(record).encode()


def _unset(name: str, options: Options) -> bool:
    value = getattr(options, name)
    return name in _LATER and (not value or value == _LATER[name])


def is_made(path: Path, layouts: Sequence[Layout], record: bytes) -> bool:
    """Return whether an output is there that has this record, but for what is known last.

    It has to be newer than all inputs: their contents are not compared.
    """
    try:
        found = scan(path)
        told = bounded.loads(dict(found.metadata).get(PROVENANCE, "").encode())
        ours = bounded.loads(record)
        for one in (told, ours):
            for entry in (one, one["template"], *one["inputs"]):
                entry.pop("hash" if entry is not one else "agreement", None)
    except (MergeError, KeyError, TypeError, ValueError, AttributeError):
        return False
    newest = max(file.mtime_ns for layout in layouts for file in layout.files)
    return told == ours and min(file.mtime_ns for file in found.files) >= newest


@dataclass(frozen=True)
class RecordedInput:
    """An input as a record names it."""

    name: str  # a path from the directory that holds all inputs
    nbytes: int
    hash: int | None  # of its weights; for the template, of all else that the output has of it
    weight: Fraction


@dataclass(frozen=True)
class Record:
    """A provenance record that was read, and the version of merge-avg that wrote it."""

    inputs: tuple[RecordedInput, ...]
    template: RecordedInput
    options: Options
    version: str
    agreement: float | None  # the mean cosine, if it was measured

    @property
    def all(self) -> tuple[RecordedInput, ...]:
        """Return the inputs and the template."""
        return (*self.inputs, self.template)


def read_record(layout: Layout) -> Record:
    """Return the provenance record of an output, which may have none, or a damaged one."""
    text = dict(layout.metadata).get(PROVENANCE)
    if text is None:
        what = "it does not say what it was made of"
        hint = "only outputs of merge-avg can be verified, and none in the format before torch 1.6"
        raise MergeError(what, where=layout.path, hint=hint)
    try:
        return _record(bounded.loads(text.encode()))
    except (KeyError, TypeError, ValueError, ArithmeticError):
        what = "its provenance record is damaged, or of another version of merge-avg"
        raise MergeError(what, where=layout.path) from None


def _record(value: Any) -> Record:
    # The text is not trusted: it decides which files are opened. KeyError and the like, from
    # whatever else it holds, are reported as one error by the caller.
    weights = [_text(one["weight"]).partition("/") for one in value["inputs"]]
    # Weights of several denominators could be of any length as integers; records have one.
    if len({total for _, _, total in weights}) != 1 or len(weights) > _MOST_INPUTS:
        raise ValueError("it has no inputs or too many, or their weights have several totals")
    fractions = (Fraction(int(integer), int(total)) for integer, _, total in weights)
    inputs = tuple(map(_input, value["inputs"], fractions))
    template = _input(value["template"], Fraction(0))
    options = Options(
        **{name: _checked(name, {**_LATER, **value}[name]) for name in RECORDED},
        agreement=value["agreement"] is not None,
        hashes=template.hash is not None,
    )
    agreement = value["agreement"]
    measured = agreement is not None and _text(agreement)[:1] in ("+", "-")
    cosine = float(agreement) if measured else None
    return Record(inputs, template, options, _text(value["merge_avg"]), cosine)


def _input(value: Any, weight: Fraction) -> RecordedInput:
    path = PurePosixPath(_text(value["name"]))
    if leads_elsewhere(str(path)):
        raise ValueError("a path that leads elsewhere")
    digest = None if value["hash"] is None else int(_text(value["hash"]), 16)
    return RecordedInput(str(path), int(value["bytes"]), digest, weight)


def _checked(name: str, value: Any) -> Any:
    """Return the recorded value of an option, if it is of the type of the option's default."""
    default, allowed = getattr(Options(), name), choices(Options, name)
    if allowed and value not in allowed:
        raise ValueError("an unknown option")
    if isinstance(default, bool):
        return bool(value)
    if isinstance(default, tuple):  # a rule has a number for each input
        longest = LARGEST_PROVENANCE if name == "weights_for" else _LONGEST
        return tuple(_text(one, longest) for one in value)
    if value is None:
        return None
    return int(value) if name == "max_shard_size" else _text(value)


def _text(value: Any, longest: int = _LONGEST) -> str:
    if not isinstance(value, str) or len(value) > longest:
        raise TypeError("not a text, or a long one")
    return value
