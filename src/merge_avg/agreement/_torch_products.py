"""Products of rows by torch: for dtypes that the compiled loops lack, or where there are none."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable

import torch
from torch import Tensor

from merge_avg.arithmetic import Columns

# Elements of a run below which one matrix product for each run costs more than it computes.
_SHORT = 64


def take(rows: Tensor, runs: Iterable[int]) -> Tensor:
    """Return elements of rows as float64, as `Kernel.take` copies them; complex ones as pairs."""
    # Torch cannot select elements of float8.
    rows = rows if rows.itemsize > 1 else rows.float()
    values = rows.index_select(1, _places(tuple(runs)))
    return (torch.view_as_real(values).flatten(1) if values.is_complex() else values).double()


def learned(rows: Tensor) -> Tensor:
    """Return rows with zeros in the columns that are the same in all, where nothing was learned."""
    first = rows[:1]
    same = ((rows == first) | (rows.isnan() & first.isnan())).all(dim=0)
    return rows.masked_fill(same, 0.0)


def multiply(rows: Tensor, columns: Columns, grams: Tensor, sums: Tensor) -> None:
    """Add the products of rows of float64 with each other, as `Kernel.products` does.

    `grams` has the shape (groups, rows, rows), and `sums` the shape (lines, 2 * rows).
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
        neighbours = itertools.groupby(zip(groups, lengths, strict=True), key=lambda run: run[0])
        merged = [(group, sum(length for _, length in runs)) for group, runs in neighbours]
        groups, lengths = zip(*merged, strict=True)
        found = torch.stack([part @ part.mT for part in rows.split(lengths, dim=1)])
        grams.index_add_(0, torch.tensor(groups), found)
        parts = [
            rows.new_zeros(len(rows), len(scale)).index_add_(1, where, rows * other)
            for other in (rows, rows.sum(dim=0))
        ]
        both = torch.cat(parts).mT
    sums.index_add_(0, torch.tensor(lines), both)


# The sources of a window are looked at in the same places, one after the other.
@functools.lru_cache(maxsize=64)
def _places(runs: tuple[int, ...]) -> Tensor:
    begins, lengths = torch.tensor(runs).view(-1, 2).unbind(1)
    shifts = begins - (lengths.cumsum(0) - lengths)
    return shifts.repeat_interleave(lengths) + torch.arange(int(lengths.sum()))
