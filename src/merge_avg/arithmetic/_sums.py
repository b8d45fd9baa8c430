"""Sums of rows by torch: in float64, and in double-double where float64 may not be exact.

Exponents show both which of their means might be rounded otherwise than the exact mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import Tensor

from merge_avg.arithmetic._weights import Weights


@dataclass(frozen=True)
class Format:
    """A binary floating-point format."""

    bits: int  # of the significand, the leading one included
    emin: int  # the exponent of the smallest normal number
    nan: int = 0  # the bits of the NaN that is written, where torch can compute with them


FORMATS = {
    torch.float64: Format(53, -1022, 0x7FF8 << 48),
    torch.float32: Format(24, -126, 0x7FC0 << 16),
    torch.float16: Format(11, -14, 0x7E00),
    torch.bfloat16: Format(8, -126, 0x7FC0),
    torch.float8_e4m3fn: Format(4, -6),
    torch.float8_e5m2: Format(3, -14),
    torch.float8_e4m3fnuz: Format(4, -7),
    torch.float8_e5m2fnuz: Format(3, -15),
}
# Integers of the same size. Float8 has none: torch cannot compute with it, nor always index it, so
# that its numbers are converted to float32 first.
_SIZES = {8: torch.int64, 4: torch.int32, 2: torch.int16}
WORDS = {dtype: _SIZES[dtype.itemsize] for dtype in FORMATS if dtype.itemsize > 1}
_VIEWS = 64  # how many shapes of scratch tensors are remembered
_NEVER = 1 << 16  # an exponent beyond that of any number
_EXPONENT = 0x7FF0000000000000  # the exponent field of a float64
_MOST = Fraction(1 << 900)  # which as a float leaves room for some doublings
Pair = tuple[Tensor, Tensor]


class Buffers:
    """Scratch tensors by name, which are kept: page faults would cost more than the arithmetic."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}
        self._views: dict[tuple[str, torch.Size, torch.dtype, torch.device], Tensor] = {}

    def __call__(self, name: str, like: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return a tensor of the shape of `like`; it holds what was last written under its name."""
        key = name, like.shape, dtype, like.device
        view = self._views.get(key)
        if view is None:
            numel = like.numel()
            held = self._held.get(name)
            if held is None or len(held) < numel or held.device != like.device:
                held = torch.empty(numel, dtype=torch.float64, device=like.device)
                self._held[name] = held
                self._views.clear()  # views would keep the memory that was just given up
            if len(self._views) > _VIEWS:
                self._views.clear()
            view = self._views[key] = held.view(dtype)[:numel].view(like.shape)
        return view


@dataclass(frozen=True)
class Span:
    """The exponents of some numbers."""

    low: int  # all numbers are multiples of 2**low
    high: int  # the size of all is below 2**high
    zeros: bool  # some are zero
    negative_zeros: bool = False  # some are -0


_ONLY_ZEROS = Span(_NEVER, -_NEVER, zeros=True)
Weighed = tuple[Span, int]  # the span of some rows, and the sum of the sizes of their weights


def span_of(rows: Tensor, bits: int, buffers: Buffers) -> tuple[Span, bool]:
    """Return the span of numbers of `bits` significand bits, and whether all are finite."""
    if not rows.numel():
        return _ONLY_ZEROS, True
    words = WORDS[rows.dtype]
    # Without their sign, the bits of numbers compare as integers as the numbers do, and integers
    # are not slowed down by subnormals. The room for float64 values is free at this time.
    torch.abs(rows, out=buffers("wide", rows, rows.dtype))
    sizes = buffers("wide", rows, words)
    low, high = (int(bound) for bound in torch.aminmax(sizes))
    zeros = low == 0
    # -0 has the sign bit and no other: as an integer it is the least of all.
    negative = zeros and int(rows.view(words).min()) == torch.iinfo(words).min
    if zeros and high:  # zero is a multiple of anything: the least of the others counts
        low = int(sizes.sub_(1).bitwise_and_(torch.iinfo(words).max).min()) + 1
    own = FORMATS[rows.dtype]
    fraction = own.bits - 1
    special = ~(-1 << (rows.itemsize * 8 - 1)) >> fraction  # the exponent field of infinity and NaN
    if high >> fraction == special:
        # NaN and infinity would make the bounds of all other elements worthless.
        return span_of(rows.where(rows.isfinite(), 0), bits, buffers)[0], False
    if high == 0:
        return replace(_ONLY_ZEROS, negative_zeros=negative), True
    bottom, top = (own.emin + max(size >> fraction, 1) - 1 for size in (low, high))
    return Span(bottom - bits + 1, top + 1, zeros, negative), True


def nonzero(spans: Iterable[Weighed]) -> list[Weighed]:
    """Return the spans that add to a sum."""
    return [(span, weight) for span, weight in spans if weight and span.high > -_NEVER]


def magnitude(spans: Iterable[Weighed]) -> Fraction:
    """Return a bound above the sum of the sizes of all terms, for every element."""
    return sum((weight * Fraction(2) ** span.high for span, weight in nonzero(spans)), Fraction(0))


class PlainSum:
    """A sum in float64, in the memory of `row`, of numbers of at most 24 significand bits."""

    def __init__(self, row: Tensor, weights: Weights, buffers: Buffers) -> None:
        self._weights = weights
        self._buffers = buffers
        self._row = row
        self._begun = False

    def add(self, rows: Tensor, weights: Sequence[int], factors: Tensor, *, signs: bool) -> None:
        """Add rows, each times its weight; `factors` are the weights as a row of float64.

        With `signs`, all terms of some elements may be -0, so that their sum has to be -0 too.
        """
        out = self._buffers("more", self._row) if self._begun else self._row
        # Converted here: adding another dtype would make a fresh tensor to convert into.
        wide = self._buffers("wide", rows)
        wide.copy_(rows)
        # The matrix product below would begin with +0. On a GPU it would take memory that torch
        # never gives back, and be no faster.
        if signs or wide.is_cuda:
            for row, weight in zip(wide, weights, strict=True):
                row.mul_(self._weights.factor(weight))
            out.copy_(wide[:1])
            for row in wide[1:]:
                out.add_(row)
        else:
            torch.mm(factors, wide, out=out)
        if self._begun:
            self._row.add_(out)
        self._begun = True

    def widened(self, spans: Sequence[Weighed]) -> WideSum:
        """Return the same sum for float64 numbers to come."""
        wide = WideSum(self._row[0], self._weights)
        wide.loose = not self._exact(spans)
        return wide

    def rounded(self, target: Format, spans: Sequence[Weighed]) -> tuple[Tensor, Tensor | None]:
        """Return the mean, which converting to the target rounds right, and which elements may not.

        Those might be neighbours of the right ones; None if none can be. The spans are of all rows.
        """
        total, divisor = self._row[0], self._weights.factor(self._weights.total)
        quotient = torch.div(total, divisor, out=self._buffers("mean", total))
        if not self._exact(spans):
            # The rounding of products, additions, divisor and division, as parts of the mean.
            bound = magnitude(spans) / self._weights.total * (len(self._weights) + 5) / (1 << 52)
            return _snap_bounded(quotient, target, float(bound))
        # The sum is exact. To float64 the one division rounds right. To others the quotient is
        # rounded again, but the division never gives a midpoint of the target that the mean is
        # beside: in units of 2**low the sum is an integer S of at most 2**53, the divisor D is
        # below 2**28, and S / D, if it is not a midpoint, is further from one than half a unit of
        # float64. So rounding the quotient is rounding the mean. The processor does so for float32.
        if target.bits >= 24:
            return quotient, None
        # The size of a mean is not below 2**least, unless it is zero.
        least = min(span.low for span, _ in spans) - self._weights.total.bit_length()
        # Rounding to zero forgets the sign: look whether any element can.
        signs = any(span.zeros for span, _ in spans) or least < target.emin - target.bits
        # As `_snap`, with less to compute: without the units, and where nothing is subnormal.
        big = self._buffers("big", quotient)
        torch.bitwise_and(quotient.view(torch.int64), _EXPONENT, out=big.view(torch.int64))
        if least < target.emin:
            big.clamp_(min=2.0**target.emin)
        big.mul_(1.5 * 2.0 ** (53 - target.bits))
        mean = torch.add(quotient, big, out=self._buffers("snapped", quotient)).sub_(big)
        return (mean.copysign_(quotient) if signs else mean), None

    def _exact(self, spans: Sequence[Weighed]) -> bool:
        """Return whether no partial sum needs more than 53 bits, from the numbers' exponents."""
        if not self._weights.small:
            return False
        low = min(span.low for span, _ in spans)
        return sum(weight << span.high - low for span, weight in nonzero(spans)) <= 1 << 53


class WideSum:
    """A double-double sum (Dekker, 1971), which knows where it is exact.

    A weight, or the divisor, of more than 53 bits is the sum of two float64 as well.
    """

    def __init__(self, start: Tensor, weights: Weights) -> None:
        """Continue a sum in float64, or one of no terms: that is -0."""
        self._weights = weights
        self._divisor, self._beyond = self._pair(weights.total)
        # The sum that this one continues was rounded, or weights were: then of no element it is
        # known how near to the exact sum it is, only how near all are.
        self.loose = weights.excess > 0
        self._high = start.double()
        self._low = torch.zeros_like(self._high)
        self._inexact = torch.zeros_like(self._high, dtype=torch.bool)

    def _pair(self, integer: int) -> tuple[float, float]:
        high = self._weights.factor(integer)
        return high, 0.0 if self._weights.excess else float(integer - int(high))

    def add(self, rows: Tensor, weights: Sequence[int]) -> None:
        """Add rows, each times its weight; the sign of zeros is kept."""
        for row, weight in zip(rows, weights, strict=True):
            term, parts = row.double(), list[Tensor]()
            factor, rest = self._pair(weight)
            if factor != 1:
                # No product underflows, and its error neither: weights are integers.
                if rest:
                    parts.append(term * rest)
                    self._inexact |= term != 0
                term, error = _two_product(term, factor)
                parts.append(error)
            self._high, carry = _two_sum(self._high, term)
            for part in (carry, *parts):
                self._low, lost = _two_sum(self._low, part)
                self._inexact |= lost != 0

    def rounded(self, target: Format, spans: Sequence[Weighed]) -> Pair:
        """Return the mean, and which elements might be neighbours of the right one."""
        high, low = _two_sum(self._high, self._low)
        high = high.where(high != 0, self._high + self._low.where(self._low != 0, self._high))
        quotient = high / self._divisor
        most = magnitude(spans) / self._weights.total
        if self.loose:
            bound = most * (len(self._weights) + 8) / (1 << 50)
            return _snap_bounded(quotient, target, float(min(bound, _MOST)))
        # How far the sum may be off where it is not exact, as a part of the mean: each term adds
        # three parts to `low`, none above 2**-53 of the sum of all sizes.
        slack = float(min(most * len(self._weights) ** 2 / (1 << 98), _MOST))
        off = self._inexact.double().mul_(slack)
        # Doubtful so far: where the quotient is so near to the middle of two numbers that a sum
        # which is not exact decides.
        rounded = self._to_narrow if target.bits < 53 else self._to_float64
        mean, doubtful = rounded(target, high, low, quotient, off)
        # Splitting overflows near the end of float64's range, and products underflow at its start.
        size = quotient.abs()
        doubtful |= ~mean.isfinite() | (size > 2.0**960)
        doubtful |= (size < 2.0**-860) & ((high != 0) | self._inexact)
        return mean, doubtful | (self._inexact & (size <= 2 * off))  # may be a zero of either sign

    def _to_narrow(
        self, target: Format, high: Tensor, low: Tensor, quotient: Tensor, off: Tensor
    ) -> Pair:
        """Round a quotient of `high` and `low` to a format of at most 24 bits.

        Rounding twice, to float64 and then to the target, goes wrong only where the quotient comes
        out at a midpoint. Its product with the divisor is known exactly, and fits so few bits that
        the sign of the remainder is exact, and says on which side of the midpoint the mean lies.
        """
        mean, unit = _snap(quotient, target)
        aside = ((quotient - mean).abs() - unit / 2).abs()
        edge = aside <= quotient.abs() * 2.0**-50 + off
        places = edge.nonzero().flatten()
        if len(places):
            start, half = mean[places], unit[places] / 2
            middle = start + torch.where(quotient[places] >= start, half, -half)
            product, error = _two_product(middle, self._divisor)
            rest = ((high[places] - product) - error) + low[places]
            even, _ = _snap(middle, target)
            settled = middle + rest.sign() * half
            settled = settled.where(rest != 0, even)
            # A sum of a middle and its half is +0, also where the mean is below zero.
            mean[places] = settled.copysign_(quotient[places])
        return mean, edge if self._beyond else edge & self._inexact

    def _to_float64(
        self, target: Format, high: Tensor, low: Tensor, quotient: Tensor, off: Tensor
    ) -> Pair:
        """Correct a quotient of `high` and `low` by the remainder of the division."""
        product, error = _two_product(quotient, self._divisor)
        rest = (((high - product) - error) + (low - quotient * self._beyond)) / self._divisor
        mean, beyond = _two_sum(quotient, rest)
        mean = mean.where(mean != 0, quotient)  # keeps the sign of zero
        # The remainder is about half a unit, or below a power of two, where the units are half as
        # wide, a quarter.
        unit = _unit(mean, target)
        power = mean.view(torch.int64).bitwise_and((1 << 52) - 1) == 0
        near = off.add_(unit * 2.0**-40)
        half, quarter = ((beyond.abs() - unit / part).abs() <= near for part in (2, 4))
        edge = half | (power & quarter)
        # Around zero the parts of a unit underflow, though the mean of zeros is in no doubt.
        edge &= (high != 0) | self._inexact
        places = (edge & ~self._inexact).nonzero().flatten()
        if len(places) and not self._beyond:
            # Nor are ties in doubt, which are frequent: their remainder is half of the divisor, and
            # fits 53 bits. The rounding above was to even, unless it was of a rounded remainder.
            product, error = _two_product(mean[places], self._divisor)
            rest, lost = _two_sum(high[places] - product, -error)
            rest, more = _two_sum(rest, low[places])
            ties = (2 * rest.abs() == unit[places] * self._divisor) & (lost == 0) & (more == 0)
            edge[places] = ~ties | (mean[places].view(torch.int64) & 1 != 0)
        return mean, edge


def _two_sum(a: Tensor, b: Tensor) -> Pair:
    """Return a + b, rounded, and its rounding error, exactly (Knuth, TAOCP 4.2.2)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def _two_product(a: Tensor, b: float) -> Pair:
    """Return a * b, rounded, and its rounding error (Dekker), exact short of over- and underflow.

    Each factor is split into halves of at most 26 bits, whose products float64 holds: multiplying
    by 2**27 + 1 moves the lower half out of the significand.
    """
    product = a * b
    big = a * 134217729.0
    a1 = big - (big - a)
    a2 = a - a1
    bigger = b * 134217729.0
    b1 = bigger - (bigger - b)
    b2 = b - b1
    return product, a2 * b2 - (((product - a1 * b1) - a2 * b1) - a1 * b2)


def _unit(values: Tensor, target: Format) -> Tensor:
    """Return the distance between neighbours of the target format, around each value."""
    unit = torch.empty_like(values)
    torch.bitwise_and(values.view(torch.int64), _EXPONENT, out=unit.view(torch.int64))
    return unit.clamp_(min=2.0**target.emin).mul_(2.0 ** (1 - target.bits))


def _snap(values: Tensor, target: Format) -> Pair:
    """Return each value rounded to a format of fewer than 53 bits, and its unit there.

    Adding and subtracting 1.5 * 2**52 units rounds to whole units, ties to even: between 2**52 and
    2**53 units float64 has no bits below one. What is rounded to zero keeps its sign.
    """
    unit = _unit(values, target)
    big = unit * (1.5 * 2.0**52)
    return ((values + big) - big).copysign_(values), unit


def _snap_bounded(values: Tensor, target: Format, bound: float) -> Pair:
    """Round values known to within `bound`; return also which might have rounded otherwise."""
    if target.bits == 53:
        return values, torch.ones_like(values, dtype=torch.bool)
    mean, unit = _snap(values, target)
    aside = (values - mean).abs_().sub_(unit / 2).abs_()
    sign = values.abs() <= bound  # of a zero, which may be that of the exact mean or not
    return mean, (aside <= bound) | (unit <= 8 * bound) | sign | ~mean.isfinite()
