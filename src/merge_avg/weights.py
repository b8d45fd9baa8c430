"""Weights of the checkpoints, as exact numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

from merge_avg.errors import UsageError

Weight = int | float | Fraction | str


@dataclass(frozen=True)
class Weights:
    """Weights as integers without a common factor; the mean is sum(w * x) / sum(w).

    A float or a string stands for the decimal that it prints as, so 0.1, 0.2 and 0.7 are exactly
    1 : 2 : 7.
    """

    integers: tuple[int, ...]

    @classmethod
    def of(cls, values: Sequence[Weight]) -> Weights:
        """Exact weights of `values`.

        Raises:
            UsageError: a weight is no finite number or is negative, or all of them are zero.
        """
        exact = [_fraction(value) for value in values]
        if not any(exact):
            raise UsageError("the weights are all zero", hint="give at least one weight above zero")
        scale = math.lcm(*(value.denominator for value in exact))
        integers = [int(value * scale) for value in exact]
        common = math.gcd(*integers)
        return cls(tuple(value // common for value in integers))

    @classmethod
    def uniform(cls, count: int) -> Weights:
        """`count` equal weights."""
        return cls((1,) * count)

    def __len__(self) -> int:
        return len(self.integers)

    @cached_property
    def total(self) -> int:
        """The sum of the integers, above zero."""
        return sum(self.integers)

    @cached_property
    def small(self) -> bool:
        """Whether products with 24-bit significands and 25-bit midpoints fit 53 bits."""
        return max(self.integers) < 1 << 20 and self.total < 1 << 28

    def normalized(self) -> list[float]:
        """The weights as floats that sum to one, for reports."""
        return [float(Fraction(value, self.total)) for value in self.integers]

    def subset(self, indices: Sequence[int]) -> Weights | None:
        """The weights of some of the checkpoints; None where they are all zero."""
        chosen = [self.integers[index] for index in indices]
        return Weights.of(chosen) if any(chosen) else None


def _fraction(value: Weight) -> Fraction:
    try:
        if isinstance(value, str) and ("e" in value.lower() or len(value) > 100):
            # An exponent such as 1e999999999 would take all memory: it has to fit a float64.
            size = abs(float(value))
            if not 1e-300 < size < 1e300:
                raise ValueError(value)
        exact = Fraction(value) if isinstance(value, int | Fraction) else Fraction(str(value))
    except (ValueError, ZeroDivisionError):
        hint = "weights are numbers such as 1, 0.25 or 1/3"
        raise UsageError(f"the weight {value!r} is not a finite number", hint=hint) from None
    if exact < 0:
        raise UsageError(f"the weight {value} is negative", hint="weights are zero or above")
    return exact
