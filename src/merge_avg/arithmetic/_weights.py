"""Weights as exact numbers, and integers: these have no mean, but have to become something."""

from __future__ import annotations

import math
import re
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

from merge_avg.checkpoint import DType
from merge_avg.errors import UsageError
from merge_avg.options import MOST_BITS, IntPolicy, numbers

Weight = int | float | Fraction | str
_LEAST = Fraction(1, 10**30)  # of weights that are not normalized, which have to fit float64
_FORMATS = {"int64": "q", "int32": "i", "int16": "h", "int8": "b", "uint8": "B"}
_FORMATS |= {"uint64": "Q", "uint32": "I", "uint16": "H", "bool": "?"}


@dataclass(frozen=True)
class Weights:
    """Weights as integers, one for each checkpoint; the mean is sum(w * x) / total.

    A float or a string stands for the decimal that it prints as, so 0.1, 0.2 and 0.7 are exactly
    1 : 2 : 7. With a divisor, the sum is divided by that and not by the sum of the weights. The
    result is then any linear combination, and weights may be negative.
    """

    integers: tuple[int, ...]
    divisor: int | None = None

    @classmethod
    def of(cls, values: Sequence[Weight], *, normalize: bool = True) -> Weights:
        """Return some values as exact weights; if they are not normalized, they may be negative.

        Raises:
            UsageError: a weight is negative or not a finite number, or all of them are zero.
        """
        exact = list(map(_fraction, numbers(values)))
        for value in exact:
            if normalize and value < 0:
                hint = "weights are zero or above; --no-normalize allows all, as of --phema"
                raise UsageError(f"the weight {value} is negative", hint=hint)
            if not normalize and value and not _LEAST < abs(value) < 1 / _LEAST:
                hint = "weights that are not normalized lie between 1e-30 and 1e30"
                raise UsageError("a weight is out of range", hint=hint)
        if not any(exact):
            raise UsageError("the weights are all zero", hint="give at least one weight above zero")
        # Without a common factor the integers are small, and sums more often known to be exact.
        scale = 1
        for value in exact:
            scale = math.lcm(scale, value.denominator) if scale < 1 << MOST_BITS else scale
        integers = [value.numerator * (scale // value.denominator) for value in exact]
        if max(scale, *map(abs, integers)) >= 1 << MOST_BITS:
            raise UsageError("as integers, the weights have over 4,200 digits", hint="round them")
        common = math.gcd(*integers) if normalize else math.gcd(*integers, scale)
        divisor = None if normalize else scale // common
        return cls(tuple(value // common for value in integers), divisor)

    @classmethod
    def uniform(cls, count: int) -> Weights:
        """Return `count` equal weights."""
        return cls((1,) * count)

    def __len__(self) -> int:
        return len(self.integers)

    @cached_property
    def total(self) -> int:
        """The number above zero that the weighted sum is divided by."""
        return self.divisor or sum(self.integers)

    @cached_property
    def small(self) -> bool:
        """True if products with 24-bit significands, and with midpoints of 25 bits, fit 53 bits."""
        return max(map(abs, self.integers)) < 1 << 20 and self.total < 1 << 28

    @cached_property
    def excess(self) -> int:
        """The number of bits by which the weights exceed the range of float64."""
        # 2**900 leaves room for products with numbers of up to 2**123, and for their sum.
        longest = max(self.total, *map(abs, self.integers))
        return max(longest.bit_length() - 900, 0)

    def factor(self, integer: int) -> float:
        """Return a weight, or the total, as a float; all are scaled by the same power of two."""
        return integer / (1 << self.excess)  # rounded once

    def normalized(self) -> list[float]:
        """Return the weights as floats for reports; they sum to one, unless there is a divisor."""
        return [float(Fraction(value, self.total)) for value in self.integers]

    def subset(self, indices: Sequence[int]) -> Weights | None:
        """Return the weights of some of the checkpoints; None if they are all zero."""
        chosen = tuple(self.integers[index] for index in indices)
        if not any(chosen):
            return None
        return Weights(chosen, self.divisor) if self.divisor else Weights.of(chosen)


def _fraction(value: Weight) -> Fraction:
    try:
        if isinstance(value, str) and ("e" in value.lower() or len(value) > 100):
            # 1e999999999 as a fraction would take all memory: such a number has to fit a float64.
            size = abs(float(value))
            if not 1e-300 < size < 1e300:
                raise ValueError(value)
        return Fraction(value) if isinstance(value, int | Fraction) else Fraction(str(value))
    except (ValueError, ZeroDivisionError):
        hint = "weights are numbers such as 1, 0.25 or 1/3"
        raise UsageError(f"the weight {value!r} is not a finite number", hint=hint) from None


def is_counter(name: str, numel: int, *, is_bool: bool) -> bool:
    """Return whether a tensor counts steps or batches, so that it may differ without a reason."""
    # Also [n] or [[n]], such as the place in a queue: registered as zeros(1).
    return not is_bool and (numel == 1 or name.endswith("num_batches_tracked"))


def values_of(data: memoryview, dtype: DType) -> memoryview[int]:
    """Return bytes as integers of a dtype, or as bools."""
    return data.cast(_FORMATS[dtype.name])  # type: ignore[call-overload, no-any-return]


def unequal(pairs: Iterable[tuple[memoryview, memoryview]], itemsize: int) -> array[int]:
    """Return the places of elements whose bytes differ in some pair, in order."""
    # XOR of whole windows, each as one integer: 1.6 ms a megabyte, where a loop takes 55.
    differs = nbytes = 0
    for ours, theirs in pairs:
        nbytes = len(ours)
        differs |= int.from_bytes(ours, "little") ^ int.from_bytes(theirs, "little")
    places = array("q")
    for found in re.finditer(rb"[^\0]", differs.to_bytes(nbytes, "little")):
        place = found.start() // itemsize
        if not places or places[-1] != place:
            places.append(place)
    return places


def settle(values: Sequence[int], policy: IntPolicy, weights: Weights) -> int:
    """Return one value for an element that differs between checkpoints; the template's is first.

    The policy "mean" rounds the exact weighted mean, ties to even; bools count as 0 and 1.
    """
    if policy == "max":
        return max(values)
    if policy == "mean":
        pairs = zip(values, weights.integers, strict=True)
        return round(Fraction(sum(value * weight for value, weight in pairs), weights.total))
    return values[0]
