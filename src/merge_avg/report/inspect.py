"""What this program sees in a checkpoint, as plain values and as lines for a person."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from merge_avg.checkpoint import assign, dotted
from merge_avg.formats import scan
from merge_avg.report import sizes
from merge_avg.selection import read_metadata

Contents = dict[str, Any]
_WIDEST = 100  # characters that a column is padded to: one long name would widen every line


def contents(path: str | os.PathLike[str], key: str | None = None) -> Contents:
    """The tensors of a checkpoint in its order, with their roles and ties, and what is known of it.

    A role is "averaged" (float and complex weights), "compared" (integers and bools of a state
    dict), or "kept". Tensors that share memory have the same `tie`.

    Args:
        path: the checkpoint.
        key: the one state dict whose tensors are weights.

    Raises:
        MergeError: it cannot be read, is no checkpoint, or holds no weights.
    """
    layout = scan(path)
    weights = {info.path for info in assign(layout, key).weights.values()}
    sharing: dict[object, list[int]] = {}
    for number, info in enumerate(layout.tensors):
        if info.numel and not info.trouble:
            sharing.setdefault(info.storage, []).append(number)
    ties = {n: tie for tie, ns in enumerate(_shared(sharing), 1) for n in ns}
    known = read_metadata(layout)
    tensors = []
    for number, info in enumerate(layout.tensors):
        numbers = info.dtype.kind in ("float", "complex")
        role = ("averaged" if numbers else "compared") if info.path in weights else "kept"
        entry: dict[str, Any] = {
            "name": dotted(info.path),
            "dtype": info.dtype.name,
            "shape": list(info.shape),
            "role": role,
        }
        if number in ties:
            entry["tie"] = ties[number]
        if info.trouble:
            entry["trouble"] = info.trouble
        tensors.append(entry)
    return {
        "path": str(layout.path),
        "format": layout.format,
        "bytes": layout.nbytes,
        "step": known.step,
        "epoch": known.epoch,
        "metrics": dict(known.metrics),
        "merged": known.ours,
        "others": list(layout.others),
        "tensors": tensors,
    }


def _shared(sharing: dict[object, list[int]]) -> Iterator[list[int]]:
    return (numbers for numbers in sharing.values() if len(numbers) > 1)


def lines(found: Contents) -> Iterator[str]:
    """The contents for a person, a line each."""
    known = [f"{key} {found[key]}" for key in ("step", "epoch") if found[key] is not None]
    known += [f"{name} {value:g}" for name, value in found["metrics"].items()]
    about = ", ".join([found["format"], sizes.shown(found["bytes"]), *known])
    yield f"{found['path']}: {about}{', an output of merge-avg' if found['merged'] else ''}"
    rows = [
        (
            one["name"],
            one["dtype"],
            "x".join(map(str, one["shape"])) or "-",
            one["role"],
            f"shares memory ({one['tie']})" if "tie" in one else one.get("trouble", ""),
        )
        for one in found["tensors"]
    ]
    widths = [min(max(map(len, column)), _WIDEST) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield f"  {'  '.join(cells)}".rstrip()
    if found["others"]:
        yield f"  without tensors: {', '.join(found['others'])}"
