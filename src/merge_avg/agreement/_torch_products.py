"""Products of rows by torch: for dtypes that the compiled loops lack, or where there are none."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

# Elements of a run below which one matrix product for each run costs more than it computes.
_SHORT = 64


def take(stack: Tensor, runs: Sequence[int], targets: Sequence[int], room: Tensor) -> None:
    """Copy some elements of rows to rows of a room, as float64; complex ones as pairs.

    Args:
        stack: the rows.
        runs: for each run of columns where it begins, and how long it is.
        targets: for each row its row in the room; below zero for none.
        room: has as many columns as are copied.
    """
    rows = [row for row, target in enumerate(targets) if target >= 0]
    places = _places(tuple(runs)).to(stack.device)
    values = _real(stack if len(rows) == len(stack) else stack[rows]).index_select(1, places)
    values = torch.view_as_real(values).flatten(1) if values.is_complex() else values
    room[[targets[row] for row in rows]] = values.to(room.device, room.dtype)


def multiply(
    rows: Tensor,
    columns: tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[float]],
    grams: Tensor,
    sums: Tensor,
) -> None:
    """Add the products of rows with each other, over runs of columns.

    Args:
        rows: of shape (rows, columns), float64.
        columns: for each run its length, its matrix in `grams`, its line in `sums`, and a factor.
        grams: of shape (groups, rows, rows), to which products are added.
        sums: of shape (lines, 2 * rows): squares, and the products with the sum of all rows.
    """
    lengths, groups, lines, scales = columns
    where = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    scale = torch.tensor(scales, dtype=torch.float64)
    if rows.shape[1] >= _SHORT * len(lengths):
        found = torch.stack([part @ part.mT for part in rows.split(list(lengths), dim=1)])
        found *= scale[:, None, None]
        grams.index_add_(0, torch.tensor(groups), found)
        both = torch.cat([found.diagonal(dim1=1, dim2=2), found.sum(dim=2)], dim=1)
    else:
        # The factors go into the rows, so that all runs of a group make one product; the squares
        # and the products with the sum need no matrix, only sums by run.
        rows = rows * scale.sqrt()[where]
        groups, lengths = _merged(groups, lengths)
        found = torch.stack([part @ part.mT for part in rows.split(list(lengths), dim=1)])
        grams.index_add_(0, torch.tensor(groups), found)
        parts = [
            rows.new_zeros(len(rows), len(scale)).index_add_(1, where, rows * other)
            for other in (rows, rows.sum(dim=0))
        ]
        both = torch.cat(parts).mT
    sums.index_add_(0, torch.tensor(lines), both)


def _merged(groups: Sequence[int], lengths: Sequence[int]) -> tuple[list[int], list[int]]:
    """Join neighbours of the same group."""
    merged: list[int] = []
    sums: list[int] = []
    for group, length in zip(groups, lengths, strict=True):
        if merged and merged[-1] == group:
            sums[-1] += length
        else:
            merged.append(group)
            sums.append(length)
    return merged, sums


def _real(values: Tensor) -> Tensor:
    """Return values whose elements torch can select: it cannot those of float8."""
    return values if values.is_complex() or values.itemsize > 1 else values.float()


# The sources of a window are looked at in the same places, one after the other.
@functools.lru_cache(maxsize=64)
def _places(runs: tuple[int, ...]) -> Tensor:
    """Return the places of runs, one after the other."""
    begins, lengths = torch.tensor(runs).view(-1, 2).unbind(1)
    shifts = begins - (lengths.cumsum(0) - lengths)
    return shifts.repeat_interleave(lengths) + torch.arange(int(lengths.sum()))
