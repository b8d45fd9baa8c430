"""What becomes of integer and bool tensors, which have no mean of their own."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from merge_avg.policies import IntPolicy
from merge_avg.weights import Weights


def is_counter(name: str, dimensions: int, *, is_bool: bool) -> bool:
    """Whether a tensor counts steps or batches, so that different values are to be expected."""
    return not is_bool and (not dimensions or name.endswith("num_batches_tracked"))


def settle(values: Sequence[int], policy: IntPolicy, weights: Weights) -> int:
    """One value for an element that differs between checkpoints; the first is the template's.

    "mean" rounds the exact weighted mean to the nearest integer, ties to even; bools count as 0
    and 1.
    """
    if policy == "max":
        return max(values)
    if policy == "mean":
        pairs = zip(values, weights.integers, strict=True)
        return round(Fraction(sum(value * weight for value, weight in pairs), weights.total))
    return values[0]
