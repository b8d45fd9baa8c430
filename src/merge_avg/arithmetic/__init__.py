"""What is the mean? Exact weights, sums that are rounded once, and integers that have no mean."""

from __future__ import annotations

from merge_avg.arithmetic._integers import is_counter, settle, unequal, values_of
from merge_avg.arithmetic._kernel import LOOPS, TILE, int64s, takes
from merge_avg.arithmetic._mean import Mean, MeanFactory, Peek
from merge_avg.arithmetic._weights import Weight, Weights

__all__ = [
    "LOOPS",
    "TILE",
    "Mean",
    "MeanFactory",
    "Peek",
    "Weight",
    "Weights",
    "int64s",
    "is_counter",
    "settle",
    "takes",
    "unequal",
    "values_of",
]
