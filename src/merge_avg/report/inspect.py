"""The contents of a checkpoint, as merge-avg sees them: as values, and as lines of text."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from merge_avg.brief import Brief
from merge_avg.checkpoint import Name, Roles, TensorInfo, dotted
from merge_avg.errors import counted, named
from merge_avg.formats import scan
from merge_avg.plan import Masters, roles_of
from merge_avg.report import aligned, shown
from merge_avg.report.values import plain
from merge_avg.selection import read_metadata

as_json = plain


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of a checkpoint, and what a merge does with it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    # "averaged" for float and complex weights, "compared" for integers and bools beside them, and
    # "kept" for all the rest.
    role: str
    reason: str  # why it is kept, or why it counts as a weight
    tie: int | None = None  # the same number for tensors that share memory
    trouble: str | None = None  # why it cannot be averaged, as in "a sparse tensor"


@dataclass(frozen=True, repr=False)
class Contents(Brief):
    """A checkpoint, and what it or its name says of it."""

    path: str
    format: str
    nbytes: int
    step: int | None
    epoch: int | None
    metrics: Mapping[str, float]
    merged: bool  # whether an earlier merge wrote it
    others: tuple[str, ...]  # entries without tensors
    callables: tuple[str, ...]  # that loading it calls, and that are not known to be harmless
    tensors: tuple[Tensor, ...]  # in the order of its files

    def brief(self) -> Iterator[str]:
        """Yield what kind of checkpoint it is, and what a merge does with how many tensors."""
        yield next(lines(self))
        for role, count in Counter(one.role for one in self.tensors).items():
            names = named([one.name for one in self.tensors if one.role == role], 3)
            yield f"{role}: {counted(count, 'tensor')} ({names})"


def contents(path: str | os.PathLike[str], key: str | None = None) -> Contents:
    """Return what is in a checkpoint, whose weights are the tensors of the state dict `key`."""
    layout = scan(path)
    # By its path, which no two tensors share, while their storages may be the same.
    (found,), masters = roles_of([layout], key)
    weights = {info.path for info in found.weights.values()}
    # Empty tensors share nothing, and of one with a trouble the storage is unknown.
    storages = Counter(one.storage for one in layout.tensors if one.numel and not one.trouble)
    shared = (storage for storage, count in storages.items() if count > 1)
    ties = {storage: tie for tie, storage in enumerate(shared, 1)}
    roles = {"float": "averaged", "complex": "averaged"}
    known = read_metadata(layout)
    return Contents(
        path=str(layout.path),
        format=layout.format,
        nbytes=layout.nbytes,
        step=known.step,
        epoch=known.epoch,
        metrics=dict(known.metrics),
        merged=known.ours,
        others=tuple(layout.others),
        callables=tuple(dict.fromkeys(name for _, name in layout.callables)),
        tensors=tuple(
            Tensor(
                name=dotted(info.path),
                dtype=info.dtype.name,
                shape=tuple(info.shape),
                role=roles.get(info.dtype.kind, "compared") if info.path in weights else "kept",
                reason=_reason(found, masters, info, key),
                tie=ties.get(info.storage) if info.numel and not info.trouble else None,
                trouble=info.trouble or None,
            )
            for info in layout.tensors
        ),
    )


def _reason(found: Roles, masters: Masters, info: TensorInfo, key: str | None) -> str:
    if info.path in found.reasons:
        return found.reasons[info.path].text
    if Name(info.path[:-1], str(info.path[-1])) in masters:
        return "a weight in float32, of an optimizer"
    if key is not None:
        return "below --key"
    return f"in the state dict {dotted(info.path[:-1]) or 'at the root'}"


def lines(found: Contents) -> Iterator[str]:
    """Yield the contents, a line at a time. Names in it may hold controls: see `printable`."""
    known = [("step", found.step), ("epoch", found.epoch)]
    about = [found.format, shown(found.nbytes)]
    about += [f"{key} {value}" for key, value in known if value is not None]
    about += [f"{name} {value:g}" for name, value in found.metrics.items()]
    about += ["an output of merge-avg"] if found.merged else []
    yield f"{found.path}: {', '.join(about)}"
    rows = [
        (
            one.name,
            one.dtype,
            "x".join(map(str, one.shape)) or "-",
            f"{one.role}: {one.reason}",
            one.trouble or "" if one.tie is None else f"shares memory ({one.tie})",
        )
        for one in found.tensors
    ]
    for line in aligned(rows, gap="  "):
        yield f"  {line}"
    if found.others:
        yield f"  without tensors: {', '.join(found.others)}"
    if found.callables:
        yield f"  loading it calls: {', '.join(found.callables)}"
