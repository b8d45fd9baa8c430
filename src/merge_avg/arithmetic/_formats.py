"""The floating-point formats of torch, and what numbers' exponents show of their sums."""

from __future__ import annotations

import math
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
COMPONENTS = {
    torch.complex128: torch.float64,
    torch.complex64: torch.float32,
    torch.complex32: torch.float16,
}
# Integers of the same size. Float8 has none: torch cannot compute with it, nor always index it, so
# that its numbers are converted to float32 first.
WORDS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}
_VIEWS = 64  # how many shapes of scratch tensors are remembered
_NEVER = 1 << 16  # an exponent beyond that of any number


def format_of(dtype: torch.dtype) -> Format:
    """Return the format of a dtype, or of the components of a complex one."""
    return FORMATS[COMPONENTS.get(dtype, dtype)]


def exact_mean(values: Sequence[float], weights: Weights, target: Format) -> float:
    """Return the weighted mean of finite numbers, computed exactly and rounded once."""
    pairs = list(zip(values, weights.integers, strict=True))
    total = sum((Fraction(value) * weight for value, weight in pairs), Fraction(0)) / weights.total
    if not total:
        # IEEE 754: what cancels is +0, but a sum of -0 alone is -0.
        negative = all((math.copysign(1, value) < 0) != (weight < 0) for value, weight in pairs)
        return -0.0 if negative else 0.0
    size = abs(total)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    if size < Fraction(2) ** exponent:
        exponent -= 1
    unit = max(exponent, target.emin) - target.bits + 1
    rounded = round(size / Fraction(2) ** unit)  # ties to even
    # Only a linear combination can be beyond float64, where `ldexp` would raise.
    mean = math.inf if rounded.bit_length() + unit > 1024 else math.ldexp(rounded, unit)
    return mean if total > 0 else -mean


class Buffers:
    """Scratch tensors by name, which are kept from one mean to the next.

    Fresh ones of this size would cost more in page faults than the arithmetic does.
    """

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


ONLY_ZEROS = Span(_NEVER, -_NEVER, zeros=True)
Weighed = tuple[Span, int]  # the span of some rows, and the sum of the sizes of their weights


def span_of(rows: Tensor, bits: int, buffers: Buffers) -> Span | None:
    """Return the span of numbers of `bits` significand bits; None if any is not finite."""
    if not rows.numel():
        return ONLY_ZEROS
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
        return None
    if high == 0:
        return replace(ONLY_ZEROS, negative_zeros=negative)
    bottom, top = (own.emin + max(size >> fraction, 1) - 1 for size in (low, high))
    return Span(bottom - bits + 1, top + 1, zeros, negative)


def nonzero(spans: Iterable[Weighed]) -> list[Weighed]:
    """Return the spans that add to a sum."""
    return [(span, weight) for span, weight in spans if weight and span.high > -_NEVER]


def magnitude(spans: Iterable[Weighed]) -> Fraction:
    """Return a bound above the sum of the sizes of all terms, for every element."""
    return sum((weight * Fraction(2) ** span.high for span, weight in nonzero(spans)), Fraction(0))
