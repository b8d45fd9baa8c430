"""The arithmetic: a weighted mean that is rounded once, and rounded right.

Every mean here is the exact weighted mean of its inputs rounded once to the nearest value of the
result's dtype, ties to even. So it does not depend on the order of the inputs, on how they were cut
into windows, on threads, or on the device.

How it stays fast: the sum runs in float64. From the exponents of the largest and of the smallest
nonzero input of a window it follows, nearly always, that no addition rounded anything. Where that
cannot be shown, a bound on the error tells which elements could round either way. Those few are
looked at a second time in double-double arithmetic (Dekker 1971, Knuth TAOCP 4.2.2) and, where even
that leaves a doubt, in integers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import Tensor

from merge_avg.arithmetic._mean import Peek
from merge_avg.arithmetic._weights import Weights
from merge_avg.io import Matrix, Stack
from merge_avg.tuning import BLOCK, CONVERTED

Revisit = Callable[[int], Tensor]


class Buffers:
    """Float64-wide scratch tensors by name, kept from one mean to the next.

    Fresh ones of this size would cost more in page faults than the arithmetic does.
    """

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}
        self._views: dict[tuple[str, torch.Size, torch.dtype, torch.device], Tensor] = {}

    def __call__(self, name: str, like: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        """A tensor of a shape, of which nothing is known but its name."""
        key = name, like.shape, dtype, like.device
        view = self._views.get(key)
        if view is None:
            numel = like.numel()
            held = self._held.get(name)
            if held is None or len(held) < numel or held.device != like.device:
                held = torch.empty(numel, dtype=torch.float64, device=like.device)
                self._held[name] = held
                self._views.clear()  # they would keep what is held no more
            if len(self._views) > _VIEWS:
                self._views.clear()
            view = self._views[key] = held.view(dtype)[:numel].view(like.shape)
        return view


@dataclass(frozen=True)
class _Float:
    """A binary floating-point format: significand bits, and the exponent of its least normal."""

    bits: int
    emin: int


_FLOATS = {
    torch.float64: _Float(53, -1022),
    torch.float32: _Float(24, -126),
    torch.float16: _Float(11, -14),
    torch.bfloat16: _Float(8, -126),
    torch.float8_e4m3fn: _Float(4, -6),
    torch.float8_e5m2: _Float(3, -14),
    torch.float8_e4m3fnuz: _Float(4, -7),
    torch.float8_e5m2fnuz: _Float(3, -15),
}
_COMPONENTS = {
    torch.complex128: torch.float64,
    torch.complex64: torch.float32,
    torch.complex32: torch.float16,
}
_BITS = {torch.float64: torch.int64, torch.float32: torch.int32}
_BITS |= {torch.float16: torch.int16, torch.bfloat16: torch.int16}
_VIEWS = 64  # how many shapes of scratch tensors are remembered
_EXACT_VALUES = 1 << 16  # how many values are held at a time for exact arithmetic
_EXPONENT = 0x7FF0000000000000  # the exponent field of a float64


class RunningMean:
    """The weighted mean of tensors that are shown one at a time.

    Args:
        weights: how many tensors there will be, or their `Weights`.
        dtype: of the result; by default that of the tensors.
        device: where the sum is kept; by default that of the first tensor.
        buffers: scratch tensors, which means that are used by turns may share.

    The tensors may be of any shape, all of the same, and of float64, float32, float16, bfloat16,
    float8 or complex dtype, which may differ. Complex numbers are averaged by component. The result
    is the exact mean, rounded once to nearest, ties to even, for every one of these dtypes.

    NaN and infinity follow IEEE 754; `finite` tells whether there were any. `result` leaves the
    object ready for the next mean of as many tensors, with its buffers at hand.
    """

    def __init__(
        self,
        weights: int | Weights,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        buffers: Buffers | None = None,
    ) -> None:
        self._weights = Weights.uniform(weights) if isinstance(weights, int) else weights
        self._wanted = dtype
        self._device = device
        self._buffers = buffers or Buffers()
        self._totals = Buffers()
        self._total: Tensor | None = None
        self._factors = torch.empty(0)
        self._blocks: list[_Block] = []
        self._begin()

    def _begin(self) -> None:
        """Makes ready for the next mean; what was made for the last one serves again."""
        self._count = 0
        self._shape = torch.Size()
        self._dtype = self._wanted

    @property
    def finite(self) -> bool:
        """Whether every value so far was finite."""
        return not self._count or all(block.bad is None for block in self._blocks)

    def update(self, values: Tensor) -> None:
        """Adds the next tensor; `values` may be reused by the caller afterwards.

        Raises:
            ValueError: a tensor of another shape, one too many, or no floating-point tensor.
        """
        self.extend(values.unsqueeze(0))

    def extend(self, values: Tensor) -> None:
        """Adds the next tensors, stacked along the first dimension: faster than one by one.

        Raises:
            ValueError: tensors of another shape, too many, or no floating-point tensors.
        """
        shape = values.shape[1:]
        flat = self._flat(values)
        if values.is_complex() and self._dtype in _FLOATS:
            raise ValueError(f"the mean of {values.dtype} is no {self._dtype}")
        if self._count + len(values) > len(self._weights):
            count = len(self._weights)
            raise ValueError(f"the mean was told of {count} tensors, and this is one more")
        if not self._count:
            self._shape = shape
            self._dtype = self._dtype or values.dtype
            self._make_blocks(flat)
        elif shape != self._shape:
            shapes = f"{tuple(shape)}, expected {tuple(self._shape)}"
            raise ValueError(f"tensor {self._count} has the shape {shapes}")
        bits = _FLOATS[_COMPONENTS.get(values.dtype, values.dtype)].bits
        # Few rows at a time are still in the processor's cache when they are converted and summed.
        most = max(CONVERTED // max(min(flat.shape[1], BLOCK), 1), 1)
        for start in range(0, len(flat), most):
            rows = slice(start, start + most)
            some = flat if len(flat) <= most else flat[rows]
            ours = slice(self._count, self._count + len(some))
            integers, factors = self._weights.integers[ours], self._factors[:, ours]
            for block, part in zip(self._blocks, _blocks(some), strict=True):
                block.add(part, integers, factors, bits)
            self._count = ours.stop

    def _make_blocks(self, flat: Tensor) -> None:
        """Blocks for as many elements as there are, unless they are there already."""
        totals = self._totals("total", flat[0])
        if self._total is totals:
            for block in self._blocks:
                block.begin()
            return
        self._total = totals
        factors = [_factor(weight, self._weights) for weight in self._weights.integers]
        self._factors = torch.tensor([factors], dtype=torch.float64, device=flat.device)
        self._blocks = [_Block(t, self._weights, self._buffers) for t in _blocks(totals)]

    def result(self, revisit: Revisit | None = None, out: Tensor | None = None) -> Tensor:
        """The mean, in `out` or in a new tensor of the tensors' shape.

        Args:
            revisit: returns tensor number i once more, for the few elements whose rounding the
                float64 sum leaves open. Without it these are rounded from that sum, which may give
                the neighbour of the right value; all others are right in any case.
            out: a contiguous tensor of the shape and dtype of the result.

        Raises:
            ValueError: fewer tensors were shown than announced.
        """
        if not self._count or self._count != len(self._weights) or self._dtype is None:
            raise ValueError(f"{self._count} of {len(self._weights)} tensors have been shown")
        target = _FLOATS[_COMPONENTS.get(self._dtype, self._dtype)]
        if out is None:
            out = torch.empty(self._shape, dtype=self._dtype, device=self._blocks[0].total.device)
        flat = torch.view_as_real(out) if out.is_complex() else out
        flat = flat if flat.dim() == 1 else flat.view(-1)
        doubts = []
        for number, (block, place) in enumerate(zip(self._blocks, _blocks(flat), strict=True)):
            doubtful = block.result(target, place)
            if doubtful is not None and revisit is not None:
                doubts.append(doubtful.nonzero().flatten() + number * BLOCK)
        if revisit is not None and doubts:
            for places in torch.cat(doubts).split(BLOCK):
                if len(places):
                    settled = self._settle(places, target, revisit).to(flat.dtype)
                    _words(flat)[places] = _words(settled)
        self._begin()
        return out

    def _flat(self, values: Tensor) -> Tensor:
        """Stacked tensors as rows of real numbers on the device."""
        if self._device is not None:
            values = values.to(self._device)
        if values.is_complex():
            values = torch.view_as_real(values.resolve_conj())
        if values.dtype not in _FLOATS:
            raise ValueError(f"a mean of {values.dtype} is not defined")
        if values.requires_grad or values.is_neg():
            # A neg bit, as the imaginary part of a conjugate has it, is no part of the bytes.
            values = values.detach().resolve_neg()
        if values.dim() == 2:
            return values
        return values.reshape(len(values), math.prod(values.shape[1:]))

    def _column(self, values: Tensor, places: Tensor) -> Tensor:
        """Some elements of a tensor as float64."""
        flat = self._flat(values.unsqueeze(0))[0]
        return _doubled(_words(flat)[places].view(flat.dtype))

    def _settle(self, places: Tensor, target: _Float, revisit: Revisit) -> Tensor:
        """The means of a few elements, looked at once more in every tensor."""
        total: _Wide | None = None
        spans: list[_Weighed] = []
        for i, weight in enumerate(self._weights.integers):
            column = self._column(revisit(i), places)
            spans.append((_span(column, 53, self._buffers) or _Span.nothing(), abs(weight)))
            if total is None:
                total = _Wide(column[None], (weight,), self._weights)
            else:
                total.add_one(column, weight)
        assert total is not None  # noqa: S101 - there is at least one weight
        mean, doubtful = total.rounded(target, spans)
        rest = doubtful.nonzero().flatten()
        for batch in torch.split(rest, max(_EXACT_VALUES // len(self._weights), 1)):
            where = places[batch]
            columns = [self._column(revisit(i), where) for i in range(len(self._weights))]
            rows = torch.stack(columns, dim=1).tolist()
            exact = [exact_mean(row, self._weights, target.bits, target.emin) for row in rows]
            mean[batch] = torch.tensor(exact, dtype=torch.float64, device=mean.device)
        return mean


class TorchMean:
    """`RunningMean` as a `Mean`, which is shown rows in host memory or on the device."""

    def __init__(
        self,
        weights: Weights,
        dtype: torch.dtype,
        device: torch.device,
        buffers: Buffers | None = None,
    ) -> None:
        self._mean = RunningMean(weights, dtype, device, buffers)
        self._on_host = device.type == "cpu"
        self._written = torch.empty(0)
        self.finite = True

    @property
    def fits(self) -> bool:
        """Whether all of the last result is finite; torch looks at it only when asked."""
        out = self._written
        real = torch.view_as_real(out) if out.is_complex() else out
        real = real.float() if real.itemsize < 2 else real  # torch has no `isfinite` of float8
        return bool(real.isfinite().all())

    def extend(self, rows: Stack, *, whole: bool = False) -> None:  # noqa: ARG002
        """Add the next vectors, a row each."""
        self._mean.extend(_tensor(rows))
        self.finite = self._mean.finite

    def result(self, out: Stack, peek: Peek) -> None:
        """Write the mean to `out`, which may lie elsewhere than the sum."""
        self._written = _tensor(out)[0]
        numel = len(self._written)

        def revisit(number: int) -> Tensor:
            return _tensor(peek(number, 0, numel))[0]

        if isinstance(out, Matrix) and self._on_host:
            self._mean.result(revisit, out=self._written)
        else:
            self._written.copy_(self._mean.result(revisit))


def _tensor(rows: Stack) -> Tensor:
    return rows.tensor() if isinstance(rows, Matrix) else rows


def exact_mean(values: Sequence[float], weights: Weights, bits: int, emin: int) -> float:
    """The weighted mean of finite floats, rounded once, in integer arithmetic.

    The result has `bits` significand bits, or fewer below 2**emin.
    """
    pairs = zip(values, weights.integers, strict=True)
    total = sum((Fraction(value) * weight for value, weight in pairs), Fraction(0)) / weights.total
    if not total:
        signs = zip(values, weights.integers, strict=True)
        negative = all((math.copysign(1, value) < 0) != (weight < 0) for value, weight in signs)
        return -0.0 if negative else 0.0
    size = abs(total)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    if size < Fraction(2) ** exponent:
        exponent -= 1
    step = max(exponent, emin) - bits + 1
    rounded = round(size / Fraction(2) ** step)  # ties to even
    # Only a linear combination can be beyond float64, where `ldexp` would raise.
    mean = math.inf if rounded.bit_length() + step > 1024 else math.ldexp(rounded, step)
    return mean if total > 0 else -mean


def _blocks(flat: Tensor) -> Sequence[Tensor]:
    """The elements of a vector, or of rows, that are summed at a time."""
    return [flat] if flat.shape[-1] <= BLOCK else flat.split(BLOCK, dim=-1)


class _Block:
    """The mean of some elements: their sum, and what is known of what was added.

    Args:
        total: room for the sum in float64.
        weights: of the tensors.
        buffers: scratch tensors.
    """

    def __init__(self, total: Tensor, weights: Weights, buffers: Buffers) -> None:
        self.total = total
        self._row = total.view(1, -1)
        self._weights = weights
        self._buffers = buffers
        self.begin()

    def begin(self) -> None:
        """Forgets what was added."""
        self.bad: Tensor | None = None  # where NaN or infinity was added
        self._spans: list[_Weighed] = []
        self._sum: _Plain | _Wide | None = None

    def add(self, rows: Tensor, weights: Sequence[int], factors: Tensor, bits: int) -> None:
        """Adds rows of numbers of `bits` significand bits, each with its weight."""
        if rows.dtype not in _BITS:
            rows = rows.to(torch.float32)
        span = _span(rows, bits, self._buffers)
        if span is None:
            good = rows.isfinite()
            bad = ~good.all(dim=0)
            self.bad = bad if self.bad is None else self.bad.logical_or_(bad)
            span = _span(rows.where(good, 0), bits, self._buffers) or _Span.nothing()
        wide = rows.dtype == torch.float64
        if wide and isinstance(self._sum, _Plain):
            self._sum = self._sum.widened(self._spans)
        if self._sum is None and wide:
            self._sum = _Wide(rows, weights, self._weights)
        else:
            self._sum = self._sum or _Plain(self._row, self._weights, self._buffers)
            least = min(weights)
            signs = least == 0 or (span.zeros and (span.negative_zeros or least < 0))
            self._sum.add(rows, weights, factors, signs=signs)
        self._spans.append((span, sum(map(abs, weights))))

    def result(self, target: _Float, out: Tensor) -> Tensor | None:
        """Writes the mean, and tells of which elements it might be the neighbour, if of any."""
        assert self._sum is not None  # noqa: S101 - something was added
        mean, doubtful = self._sum.rounded(target, self._spans)
        if self.bad is not None:
            ieee = self._sum.approximate()
            mean = torch.where(self.bad, ieee.where(~ieee.isnan(), math.nan), mean)
            if doubtful is not None:
                doubtful &= ~self.bad
        out.copy_(mean)
        if self.bad is not None and out.dtype == torch.bfloat16:
            # Torch writes one NaN where it converts many at a time, and another at the end.
            out.view(torch.int16).masked_fill_(out.isnan(), 0x7FC0)
        return doubtful


def _words(flat: Tensor) -> Tensor:
    """The same elements in a dtype that can be indexed: not every float8 can."""
    return flat if flat.dtype in _BITS else flat.view(torch.uint8)


def _doubled(values: Tensor) -> Tensor:
    """The same numbers as float64; float8 gets there by way of float32."""
    return (values if values.dtype in _BITS else values.to(torch.float32)).double()


@dataclass(frozen=True)
class _Span:
    """Of a tensor: all values are multiples of 2**low and below 2**high; whether some are zero."""

    low: int
    high: int
    zeros: bool
    negative_zeros: bool = False

    @classmethod
    def nothing(cls) -> _Span:
        return cls(1 << 16, -(1 << 16), zeros=True)


_Weighed = tuple[_Span, int]  # the span of some tensors, and the sum of their weights' sizes


def _span(flat: Tensor, bits: int, buffers: Buffers) -> _Span | None:
    """The exponents of a real tensor of `bits` significand bits; None where it is not finite."""
    if not flat.numel():
        return _Span.nothing()
    words = _BITS[flat.dtype]
    # The room for float64 values is free now.
    torch.abs(flat, out=buffers("wide", flat, flat.dtype))
    sizes = buffers("wide", flat, words)
    low, high = (int(bound) for bound in torch.aminmax(sizes))
    zeros = low == 0
    # Minus zero has the sign bit and no other: as an integer it is the least of all.
    negative = zeros and int(flat.view(words).min()) == torch.iinfo(words).min
    if zeros and high:  # zero is a multiple of anything: the least of the others counts
        low = int(sizes.sub_(1).bitwise_and_(torch.iinfo(sizes.dtype).max).min()) + 1
    format_ = _FLOATS[flat.dtype]
    fraction = format_.bits - 1
    special = ~(-1 << (flat.itemsize * 8 - 1)) >> fraction
    if high >> fraction == special:
        return None
    if high == 0:
        return replace(_Span.nothing(), negative_zeros=negative)
    bottom, top = (format_.emin + max(bound >> fraction, 1) - 1 for bound in (low, high))
    return _Span(bottom - bits + 1, top + 1, zeros, negative)


def _magnitude(spans: Sequence[_Weighed]) -> Fraction:
    """A bound above sum(w * |x|), for every element."""
    used = [(span, weight) for span, weight in spans if weight and span.high > -(1 << 16)]
    return sum((weight * Fraction(2) ** span.high for span, weight in used), Fraction(0))


def _factor(weight: int, weights: Weights) -> float:
    """A weight as a float; weights beyond float64's range are scaled, all by the same power."""
    return float(Fraction(weight, 1 << weights.excess)) if weights.excess else float(weight)


class _Plain:
    """A sum in float64 of inputs of at most 24 significand bits."""

    def __init__(self, row: Tensor, weights: Weights, buffers: Buffers) -> None:
        self.weights = weights
        self.divisor = _factor(weights.total, weights)
        self.buffers = buffers
        self.row = row
        self.begun = False

    @property
    def total(self) -> Tensor:
        return self.row[0]

    def add(self, rows: Tensor, weights: Sequence[int], factors: Tensor, *, signs: bool) -> None:
        """Adds rows; `signs`: of some elements all terms may be -0, and so is their sum."""
        out = self.buffers("more", self.row) if self.begun else self.row
        # Converted here: adding another dtype would make a fresh tensor to convert into.
        wide = self.buffers("wide", rows)
        wide.copy_(rows)
        if signs:  # the product below would begin with +0
            for row, weight in zip(wide, weights, strict=True):
                row.mul_(_factor(weight, self.weights))
            out.copy_(wide[:1])
            for row in wide[1:]:
                out.add_(row)
        else:
            torch.mm(factors, wide, out=out)
        if self.begun:
            self.row.add_(out)
        self.begun = True

    def approximate(self) -> Tensor:
        total = self.total
        return torch.div(total, self.divisor, out=self.buffers("mean", total))

    def widened(self, spans: Sequence[_Weighed]) -> _Wide:
        """The same sum for float64 inputs to come; rounding errors so far make it loose."""
        wide = _Wide(self.total[None], (1,), self.weights)
        wide.loose = not self.exact(spans)
        return wide

    def rounded(self, target: _Float, spans: Sequence[_Weighed]) -> tuple[Tensor, Tensor | None]:
        """The mean, which converting to the target rounds right, and what is in doubt."""
        quotient = self.approximate()
        if not self.exact(spans):
            # In units of the mean: the rounding of products, additions, divisor and division.
            terms = len(self.weights) + 5
            bound = _magnitude(spans) / self.weights.total * terms / (1 << 52)
            return _snap_bounded(quotient, target, float(bound))
        if target.bits == 53:
            return quotient, None  # an exact sum, and one division that rounds right
        # The division rounds too, but never to a midpoint of the target that the mean is beside:
        # in units of 2**low the sum is an integer S of at most 2**53, the divisor D is below 2**28,
        # and S / D, if it is no midpoint, is further from one than half a unit of float64. So
        # rounding the quotient is rounding the mean.
        if target.bits == 24:
            return quotient, None  # the processor rounds it right when it is converted
        # No mean is below this, but for zero.
        least = min(span.low for span, _ in spans) - self.weights.total.bit_length()
        # Rounding to zero forgets the sign: look whether any element can.
        signs = any(span.zeros for span, _ in spans) or least < target.emin - target.bits
        # As _snap, with less to compute: without the units, and where nothing is subnormal.
        big = self.buffers("big", quotient)
        torch.bitwise_and(quotient.view(torch.int64), _EXPONENT, out=big.view(torch.int64))
        if least < target.emin:
            big.clamp_(min=2.0**target.emin)
        big.mul_(1.5 * 2.0 ** (53 - target.bits))
        mean = torch.add(quotient, big, out=self.buffers("snapped", quotient)).sub_(big)
        return (mean.copysign_(quotient) if signs else mean), None

    def exact(self, spans: Sequence[_Weighed]) -> bool:
        """Whether no partial sum needed more than 53 bits, from the exponents of the inputs."""
        if not self.weights.small:
            return False
        low = min(span.low for span, _ in spans)
        used = [(span, weight) for span, weight in spans if weight and span.high > -(1 << 16)]
        if any(span.high > low + 53 for span, _ in used):
            return False
        return sum(weight << max(span.high - low, 0) for span, weight in used) <= 1 << 53


class _Wide:
    """A double-double sum of float64 inputs, which knows where it is exact."""

    def __init__(self, rows: Tensor, factors: Sequence[int], weights: Weights) -> None:
        self.weights = weights
        self.divisor = _factor(weights.total, weights)
        self.loose = not weights.small
        self.high = rows[0].to(torch.float64, copy=True)
        self.low = torch.zeros_like(self.high)
        self.inexact = torch.zeros_like(self.high, dtype=torch.bool)
        if factors[0] != 1:
            self.high, self.low = _two_product(self.high, _factor(factors[0], self.weights))
        for row, weight in zip(rows[1:], factors[1:], strict=True):
            self.add_one(row, weight)

    def add(self, rows: Tensor, weights: Sequence[int], factors: Tensor, *, signs: bool) -> None:
        del factors, signs  # the weights are as good, and signs are kept
        for row, weight in zip(rows, weights, strict=True):
            self.add_one(row, weight)

    def add_one(self, flat: Tensor, weight: int) -> None:
        """Adds a row."""
        term, error = flat.double(), None
        if weight != 1:
            term, error = _two_product(term, _factor(weight, self.weights))
        self.high, carry = _two_sum(self.high, term)
        for part in (carry, error):
            if part is not None:
                self.low, lost = _two_sum(self.low, part)
                self.inexact |= lost != 0

    def approximate(self) -> Tensor:
        return self.high / self.divisor

    def rounded(self, target: _Float, spans: Sequence[_Weighed]) -> tuple[Tensor, Tensor]:
        high, low = _two_sum(self.high, self.low)
        high = high.where(high != 0, self.high + self.low.where(self.low != 0, self.high))
        quotient = high / self.divisor
        magnitude = _magnitude(spans) / self.weights.total
        # Products of numbers as small as this lose their last bits to underflow.
        tiny = max(map(abs, self.weights.integers)) > 1 and any(
            span.low < -900 for span, _ in spans
        )
        if self.loose or tiny:
            # One of the products, the divisor or an earlier plain sum was rounded.
            bound = magnitude * (len(self.weights) + 8) / (1 << 50)
            if target.bits < 53:
                return _snap_bounded(quotient, target, _capped(bound))
            return quotient, torch.ones_like(self.inexact)
        if target.bits < 53:
            mean, unit = _snap(quotient, target)
            aside = ((quotient - mean).abs() - unit / 2).abs()
            edge = aside <= quotient.abs() * 2.0**-50
            places = edge.nonzero().flatten()
            start, half = mean[places], unit[places] / 2
            middle = start + torch.where(quotient[places] >= start, half, -half)
            rest = (high[places] - middle * self.divisor) + low[places]
            _resolve_midpoints(mean, places, middle, half, rest)
        else:
            product, error = _two_product(quotient, self.divisor)
            rest = (((high - product) - error) + low) / self.divisor
            mean, beyond = _two_sum(quotient, rest)
            mean = mean.where(mean != 0, quotient)  # keeps the sign of zero
            edge = _near_edge(mean, beyond)
            if self.weights.total & (self.weights.total - 1) == 0:
                edge &= self.inexact  # an exact division: the one rounding above is right
        # Where the double-double sum rounded, its error may reach as far as this.
        slack = _capped(magnitude * len(self.weights) ** 2 / (1 << 98))
        reach = slack * 2.0 ** (44 if target.bits == 53 else 60)
        doubtful = edge & self.inexact if target.bits < 53 else edge
        doubtful |= self.inexact & (_unit(mean, target) <= reach)
        # Splitting overflows near the end of float64's range, and products underflow at its start.
        size = quotient.abs()
        doubtful |= ~mean.isfinite() | (size > 2.0**960)
        doubtful |= (size < 2.0**-860) & ((self.high != 0) | self.inexact)
        return mean, doubtful


def _capped(bound: Fraction) -> float:
    """A bound as a float with room for some doublings."""
    return float(bound) if bound < 1 << 900 else 2.0**900


def _two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """A + b, rounded, and its rounding error, exactly (Knuth)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def _two_product(a: Tensor, b: float) -> tuple[Tensor, Tensor]:
    """A * b, rounded, and its rounding error, exactly (Dekker), short of over- and underflow."""
    product = a * b
    big = a * 134217729.0
    a1 = big - (big - a)
    a2 = a - a1
    bigger = b * 134217729.0
    b1 = bigger - (bigger - b)
    b2 = b - b1
    return product, a2 * b2 - (((product - a1 * b1) - a2 * b1) - a1 * b2)


def _unit(values: Tensor, target: _Float) -> Tensor:
    """The distance between neighbours of the target format, around each value."""
    unit = torch.empty_like(values)
    torch.bitwise_and(values.view(torch.int64), _EXPONENT, out=unit.view(torch.int64))
    return unit.clamp_(min=2.0**target.emin).mul_(2.0 ** (1 - target.bits))


def _snap(values: Tensor, target: _Float) -> tuple[Tensor, Tensor]:
    """Each value rounded to the target format (of fewer than 53 bits), and its unit there.

    Adding and subtracting 1.5 * 2**52 units rounds to whole units, ties to even. What is rounded to
    zero keeps its sign.
    """
    unit = _unit(values, target)
    big = unit * (1.5 * 2.0**52)
    return ((values + big) - big).copysign_(values), unit


def _snap_bounded(values: Tensor, target: _Float, bound: float) -> tuple[Tensor, Tensor]:
    """Values known to within `bound`, rounded, and those that might have rounded otherwise."""
    if target.bits == 53:
        return values, torch.ones_like(values, dtype=torch.bool)
    mean, unit = _snap(values, target)
    aside = (values - mean).abs_().sub_(unit / 2).abs_()
    sign = values.abs() <= bound  # of a zero, which may be that of the exact mean or not
    return mean, (aside <= bound) | (unit <= 8 * bound) | sign | ~mean.isfinite()


def _resolve_midpoints(
    mean: Tensor, places: Tensor, middle: Tensor, half: Tensor, rest: Tensor
) -> None:
    """Rounds again, in place, where a quotient came out at the middle of two neighbours.

    Rounding twice goes wrong only there. The sign of `rest`, the exact remainder of dividing to
    `middle` (a midpoint times the divisor fits 53 bits), says to which side the quotient belongs.
    """
    if len(places):
        lower = torch.where(rest < 0, middle - half, mean[places])
        mean[places] = torch.where(rest > 0, middle + half, lower)


def _near_edge(mean: Tensor, beyond: Tensor) -> Tensor:
    """Where the remainder of a float64 is about half a unit, so that it might round either way."""
    unit = _unit(mean, _FLOATS[torch.float64])
    half = (beyond.abs() - unit / 2).abs() <= unit * 2.0**-40
    # Below a power of two the units are half as wide.
    power = mean.view(torch.int64).bitwise_and((1 << 52) - 1) == 0
    return half | (power & ((beyond.abs() - unit / 4).abs() <= unit * 2.0**-40))
