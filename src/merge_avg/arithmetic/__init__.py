"""What is the mean? Exact weights, and sums that are rounded once.

A `MeanFactory` gives a `Mean`: `extend` it by vectors, and `result` writes their weighted mean. The
loops of kernel.c compute it (`_kernel`), or torch with the same bits (`torch_mean`, `_sums`).
Integers and bools have no mean: `_weights` says what they become.
"""

from __future__ import annotations

from merge_avg.arithmetic._kernel import LOOPS, TILE, Columns, int64s
from merge_avg.arithmetic._mean import Mean, MeanFactory
from merge_avg.arithmetic._weights import Weight, Weights, is_counter, settle, unequal, values_of

__all__ = [
    "LOOPS",
    "TILE",
    "Columns",
    "Mean",
    "MeanFactory",
    "Weight",
    "Weights",
    "int64s",
    "is_counter",
    "settle",
    "unequal",
    "values_of",
]
