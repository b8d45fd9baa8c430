"""The plan of a merge as a document, by which processes know that they make the same one."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from xxhash import xxh3_128_hexdigest

from merge_avg._version import __version__
from merge_avg.checkpoint import Layout
from merge_avg.formats.bounded import loads
from merge_avg.options import Options
from merge_avg.parts._stretches import Work
from merge_avg.plan import Job

LARGEST = 1 << 27  # bytes: a thousand checkpoints of a thousand shards
_PER_BYTE = 100  # of memory, as `loads` counts it
# These change no byte of an output, and who does how much of it; or the inputs tell of them.
_FREE = {
    *("weights", "template", "base", "overwrite", "device", "threads", "max_memory"),
    *("resume", "part", "finish"),
}


def document(job: Job, work: Work) -> bytes:
    """Return the plan of a merge: its inputs as they are now, its outputs, options and work."""
    # Neither devices nor inodes: a file system may have others on another machine.
    inputs = [
        [os.path.abspath(layout.path), _files(layout)]  # noqa: PTH100 - links stay
        for layout in job.layouts
    ]
    rows = [(output.path, output.weights) for output in job.outputs]
    outputs = [
        [os.path.abspath(path), [f"{n}/{weights.total}" for n in weights.integers]]  # noqa: PTH100
        for path, weights in rows
    ]
    names = [one.name for one in fields(Options) if one.name not in _FREE]
    spans = repr([(one.start, one.stop, one.copies) for one in work.stretches]).encode()
    told = {
        "merge_avg": __version__,
        "options": {name: getattr(job.options, name) for name in names},
        "inputs": inputs,
        "base": job.base,
        "outputs": outputs,
        "rules": [
            [rule.pattern, [f"{n}/{rule.weights.total}" for n in rule.weights.integers]]
            for rule in job.rules
        ],
        "work": [len(work.stretches), work.nbytes, xxh3_128_hexdigest(spans)],
    }
    return json.dumps(told, allow_nan=False, default=list).encode()


def _files(layout: Layout) -> list[list[object]]:
    return [[os.path.abspath(f.path), f.nbytes, f.mtime_ns] for f in layout.files]  # noqa: PTH100


def digest(plan: bytes) -> str:
    """Return the digest of a plan, which stands for it in ledgers."""
    return xxh3_128_hexdigest(plan)


def difference(ours: bytes, theirs: bytes) -> tuple[str, object, object]:
    """Return what is first different in another plan: its name, and it in both."""
    try:
        one, other = (loads(raw, per_byte=_PER_BYTE) for raw in (ours, theirs))
        return next(_differences(one, other), ("the plan", "this one", "another"))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        return "the plan", "this one", "one that cannot be read"


def _differences(
    ours: dict[str, Any], theirs: dict[str, Any]
) -> Iterator[tuple[str, object, object]]:
    def pair(what: str, a: object, b: object) -> Iterator[tuple[str, object, object]]:
        if a != b:
            yield what, a, b

    yield from pair("the version of merge-avg", ours["merge_avg"], theirs["merge_avg"])
    for name, value in ours["options"].items():
        yield from pair(f"--{name.replace('_', '-')}", value, theirs["options"].get(name))
    for kind in ("inputs", "outputs"):
        yield from pair(f"the number of {kind}", len(ours[kind]), len(theirs[kind]))
        for (path, mine), (other, their) in zip(ours[kind], theirs[kind], strict=True):
            yield from pair(f"one of the {kind}", path, other)
            if kind == "outputs":
                yield from pair(f"the weights of {path}", ", ".join(mine), ", ".join(their))
                continue
            yield from pair(f"the number of files of {path}", len(mine), len(their))
            for (file, size, time), (name, nbytes, then) in zip(mine, their, strict=True):
                yield from pair(f"a file of {path}", file, name)
                yield from pair(f"the size of {file}", size, nbytes)
                yield from pair(f"the time of the last change of {file}", time, then)
    yield from pair("what --weights-for says", ours["rules"], theirs["rules"])
    yield from pair("the base", ours["base"], theirs["base"])
    yield from pair("the work", ours["work"], theirs["work"])
