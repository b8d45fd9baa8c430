"""The mean by torch: every floating-point and complex dtype, any weights, on the CPU or a GPU.

Every mean is the exact weighted mean of its inputs, rounded once to the nearest value of the
result's dtype, ties to even. So it does not depend on the order of the inputs, on how they were cut
into windows, on threads, or on the device.

It is fast because sums run in float64. The exponents of the largest and of the smallest nonzero
input of a window show, nearly always, that no addition has rounded. Where they do not, a bound on
the error tells which elements could round either way. Those few are looked at a second time in
double-double arithmetic and, where even that leaves a doubt, in integers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from merge_avg.arithmetic._mean import SETTLED, Peek
from merge_avg.arithmetic._sums import (
    FORMATS,
    WORDS,
    Buffers,
    Format,
    PlainSum,
    Weighed,
    WideSum,
    span_of,
)
from merge_avg.arithmetic._weights import Weight, Weights
from merge_avg.arithmetic.tuning import BLOCK, CONVERTED
from merge_avg.io import Matrix, Stack

Revisit = Callable[[int], Tensor]


def exact_mean(values: Sequence[float], weights: Weights, target: Format) -> float:
    """Return the weighted mean of finite numbers, computed exactly and rounded once."""
    total = 0
    pairs = [*zip(values, weights.integers, strict=True)]
    for value, weight in pairs:
        # Over 2**1074, all are integers: fractions would take ten times longer.
        numerator, denominator = value.as_integer_ratio()
        total += numerator * weight << 1075 - denominator.bit_length()
    if not total:
        # IEEE 754: what cancels is +0, but a sum of -0 alone is -0.
        negative = all((math.copysign(1, value) < 0) != (weight < 0) for value, weight in pairs)
        return -0.0 if negative else 0.0
    size, divisor = abs(total), weights.total
    exponent = size.bit_length() - divisor.bit_length()
    exponent -= size << max(-exponent, 0) < divisor << max(exponent, 0)
    unit = max(exponent, target.emin + 1074) - target.bits + 1  # zero or more, for every format
    divisor <<= unit
    whole, rest = divmod(size, divisor)
    whole += 2 * rest + (whole & 1) > divisor  # ties to even
    # Only a linear combination can be beyond float64, where `ldexp` would raise.
    mean = math.inf if whole.bit_length() + unit > 1024 + 1074 else math.ldexp(whole, unit - 1074)
    return mean if total > 0 else -mean


class RunningMean:
    """The weighted mean of tensors that are shown one at a time.

    Args:
        weights: how many tensors there will be, or a weight for each, or their `Weights`.
        dtype: of the result; by default that of the first tensor.
        device: where the sum is kept; by default that of the first tensor.
        buffers: scratch tensors, which means that are used in turn may share.

    The tensors all have one shape, whatever it is. Their dtypes may differ: float64, float32,
    float16, bfloat16, float8 and complex. Complex numbers are averaged by component. The result is
    the exact mean, rounded once to nearest, ties to even, for each of these dtypes.

    NaN and infinity follow IEEE 754; `finite` tells whether there were any. After `result` the
    object is ready for the next mean of as many tensors, and keeps its memory for that.
    """

    def __init__(
        self,
        weights: int | Sequence[Weight] | Weights,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        buffers: Buffers | None = None,
    ) -> None:
        if not isinstance(weights, Weights):
            weights = Weights.uniform(weights) if isinstance(weights, int) else Weights.of(weights)
        self._weights = weights
        self._wanted = self._dtype = dtype
        self._device = device
        self._buffers = buffers or Buffers()
        self._totals = Buffers()
        self._factors = torch.empty(0)
        self._blocks: list[_Block] = []
        self._count = 0
        self._shape = torch.Size()

    @property
    def finite(self) -> bool:
        """True if every value shown so far was finite."""
        return not self._count or all(block.special is None for block in self._blocks)

    def update(self, values: Tensor) -> None:
        """Add the next tensor, whose memory the caller may use again.

        Raises:
            ValueError: the tensor has another shape, is one too many, or is not floating-point.
        """
        self.extend(values.unsqueeze(0))

    def extend(self, values: Tensor) -> None:
        """Add the next tensors, stacked along the first dimension: faster than one by one."""
        shape = values.shape[1:]
        flat = self._flat(values)
        dtype = self._dtype if self._count else self._wanted or values.dtype
        if values.is_complex() == (dtype in FORMATS):
            raise ValueError(f"a mean of {values.dtype} cannot be {dtype}")
        if self._count + len(values) > len(self._weights):
            raise ValueError(f"this is one tensor more than the {len(self._weights)} announced")
        if not self._count:
            self._shape, self._dtype = shape, dtype
            self._begin(flat)
        elif shape != self._shape:
            shapes = f"{tuple(shape)}, expected {tuple(self._shape)}"
            raise ValueError(f"tensor {self._count} has the shape {shapes}")
        bits = FORMATS[values.dtype.to_real()].bits
        # A few rows are still in the processor's cache when they are summed after the conversion.
        most = max(CONVERTED // max(min(flat.shape[1], BLOCK), 1), 1)
        for start in range(0, len(flat), most):
            some = flat[start : start + most]
            ours = slice(self._count, self._count + len(some))
            integers, factors = self._weights.integers[ours], self._factors[:, ours]
            for block, part in zip(self._blocks, _blocks(some), strict=True):
                block.add(part, integers, factors, bits)
            self._count = ours.stop

    def _begin(self, flat: Tensor) -> None:
        if not self._blocks or self._factors.device != flat.device:
            factors = [self._weights.factor(weight) for weight in self._weights.integers]
            self._factors = torch.tensor([factors], dtype=torch.float64, device=flat.device)
        totals = self._totals("total", flat[0])
        # A sum that is not exact leaves every element of float64 open.
        wide = self._dtype in (torch.float64, torch.complex128) and not self._weights.small
        self._blocks = [
            _Block(part, self._weights, self._buffers, wide=wide) for part in _blocks(totals)
        ]

    def result(self, revisit: Revisit | None = None, out: Tensor | None = None) -> Tensor:
        """Return the mean, in `out` or in a new tensor.

        `revisit` returns tensor number i once more, for the few elements whose rounding the float64
        sum leaves open. Without it these are rounded from that sum, and may be neighbours of the
        right values; all others are right in any case. `out` is contiguous, and of the shape and
        dtype of the result.

        Raises:
            ValueError: fewer tensors were shown than announced.
        """
        if not self._count or self._count != len(self._weights) or self._dtype is None:
            raise ValueError(f"{self._count} of {len(self._weights)} tensors have been shown")
        target = FORMATS[self._dtype.to_real()]
        if out is None:
            out = torch.empty(self._shape, dtype=self._dtype, device=self._factors.device)
        flat = (torch.view_as_real(out) if out.is_complex() else out).view(-1)
        doubts = []
        for number, (block, place) in enumerate(zip(self._blocks, _blocks(flat), strict=True)):
            doubtful = block.result(target, place)
            if doubtful is not None and revisit is not None:
                doubts.append(doubtful.nonzero().flatten() + number * BLOCK)
        if revisit is not None and doubts:
            for places in filter(len, torch.cat(doubts).split(BLOCK)):
                settled = _fitting(self._settle(places, target, revisit), flat.dtype).to(flat.dtype)
                _indexable(flat)[places] = _indexable(settled)
        self._count = 0  # for the next mean; what was allocated for this one is used again
        return out

    def _flat(self, values: Tensor) -> Tensor:
        """Return stacked tensors as rows of real numbers on the device."""
        if self._device is not None:
            values = values.to(self._device)
        if values.is_complex():
            values = torch.view_as_real(values.resolve_conj())
        if values.dtype not in FORMATS:
            raise ValueError(f"a mean of {values.dtype} is not defined")
        if values.requires_grad or values.is_neg():
            # The bytes do not show a neg bit, which the imaginary part of a conjugate has.
            values = values.detach().resolve_neg()
        if values.dim() == 2:
            return values
        return values.reshape(len(values), math.prod(values.shape[1:]))

    def _column(self, values: Tensor, places: Tensor) -> Tensor:
        flat = self._flat(values.unsqueeze(0))[0]
        return _indexable(flat)[places].view(flat.dtype).double()

    def _settle(self, places: Tensor, target: Format, revisit: Revisit) -> Tensor:
        """Return the means of a few elements, which are looked at once more in every tensor."""
        mean = torch.empty_like(places, dtype=torch.float64)
        block = _Block(mean, self._weights, self._buffers)
        # One tensor at a time: the few elements of all of them may be too many to hold.
        for i, weight in enumerate(self._weights.integers):
            block.add(self._column(revisit(i), places)[None], (weight,), self._factors, 53)
        doubtful = block.result(target, mean)
        assert doubtful is not None  # noqa: S101 - a sum of float64 says of each
        rest = doubtful.nonzero().flatten()
        # As Python's own, numbers take four times as much, and all may be left.
        for batch in torch.split(rest, max(SETTLED // 4 // len(self._weights), 1)):
            where = places[batch]
            columns = [self._column(revisit(i), where) for i in range(len(self._weights))]
            rows = torch.stack(columns, dim=1).tolist()
            exact = [exact_mean(row, self._weights, target) for row in rows]
            mean[batch] = torch.tensor(exact, dtype=torch.float64, device=mean.device)
        return mean


class TorchMean:
    """`RunningMean` as a `Mean`, for rows in host memory or on the device."""

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
        """True if all of the last result is finite; found out when asked, as it takes a pass."""
        real = torch.view_as_real(self._written) if self._written.is_complex() else self._written
        real = real.float() if real.itemsize < 2 else real  # torch has no `isfinite` of float8
        return bool(real.isfinite().all())

    def extend(self, rows: Stack, *, whole: bool = False) -> None:  # noqa: ARG002
        """Add the next vectors, a row each."""
        self._mean.extend(_tensor(rows))
        self.finite = self._mean.finite

    def result(self, out: Stack, peek: Peek) -> None:
        """Write the mean, wherever `out` lies: that of a GPU is copied to host memory."""
        self._written = _tensor(out)[0]
        numel = len(self._written)

        def revisit(number: int) -> Tensor:
            return _tensor(peek(number, 0, numel))[0]

        if isinstance(out, Matrix) and self._on_host:
            self._mean.result(revisit, out=self._written)
        else:
            self._written.copy_(self._mean.result(revisit))


def _blocks(flat: Tensor) -> Sequence[Tensor]:
    """Cut a vector, or rows, into the elements that are summed at a time."""
    return [flat] if flat.shape[-1] <= BLOCK else flat.split(BLOCK, dim=-1)


class _Block:
    """The mean of some elements: their sum, and what is known of what was added."""

    def __init__(
        self, total: Tensor, weights: Weights, buffers: Buffers, *, wide: bool = False
    ) -> None:
        self._row = total.view(1, -1)  # memory for the sum, in float64
        self._wide = wide  # float64 will not do, whatever is added
        self._weights = weights
        self._buffers = buffers
        self.special: Tensor | None = None  # the sum of NaN and infinity, which were added
        self._spans: list[Weighed] = []
        self._sum: PlainSum | WideSum | None = None

    def add(self, rows: Tensor, weights: Sequence[int], factors: Tensor, bits: int) -> None:
        """Add rows of numbers of `bits` significand bits, each with its weight."""
        if rows.dtype not in WORDS:
            rows = rows.to(torch.float32)
        span, finite = span_of(rows, bits, self._buffers)
        if not finite:
            # Apart from the sum, which may overflow before infinity of the other sign is added.
            if self.special is None:
                self.special = torch.zeros_like(self._row[0])
            for row, weight in zip(rows, weights, strict=True):
                self.special += row.where(~row.isfinite(), 0) * ((weight > 0) - (weight < 0))
        # Products of a weight and a float64 do not fit a float64, as those of narrower numbers do.
        wide = self._wide or rows.dtype == torch.float64
        if wide and isinstance(self._sum, PlainSum):
            self._sum = self._sum.widened(self._spans)
        elif wide and self._sum is None:
            self._sum = WideSum(torch.full_like(rows[0], -0.0), self._weights)
        if isinstance(self._sum, WideSum):
            self._sum.add(rows, weights)
        else:
            self._sum = self._sum or PlainSum(self._row, self._weights, self._buffers)
            least = min(weights)
            signs = least == 0 or span.negative_zeros or (span.zeros and least < 0)
            self._sum.add(rows, weights, factors, signs=signs)
        self._spans.append((span, sum(map(abs, weights))))

    def result(self, target: Format, out: Tensor) -> Tensor | None:
        """Write the mean; return which elements might be neighbours of the right ones, or None."""
        assert self._sum is not None  # noqa: S101 - something was added
        mean, doubtful = self._sum.rounded(target, self._spans)
        if self.special is None:
            out.copy_(_fitting(mean, out.dtype))
            return doubtful
        bad = ~self.special.isfinite()
        mean = torch.where(bad, self.special.where(~self.special.isnan(), math.nan), mean)
        out.copy_(_fitting(mean, out.dtype))
        if out.dtype in WORDS:
            # Which NaN a conversion writes depends on the dtype, on the device, and for bfloat16
            # even on how many numbers torch converts at a time.
            out.view(WORDS[out.dtype]).masked_fill_(out.isnan(), target.nan)
        return None if doubtful is None else doubtful & ~bad


def _fitting(mean: Tensor, dtype: torch.dtype) -> Tensor:
    """Return numbers with NaN for what a dtype has neither numbers nor infinities for."""
    # Releases of torch differ: for such numbers older ones write NaN, newer ones the largest.
    if dtype != torch.float8_e4m3fn:
        return mean
    return mean.where(mean.abs() <= torch.finfo(dtype).max, math.nan)


def _indexable(flat: Tensor) -> Tensor:
    """Return a view in a dtype that torch can index: it cannot every float8."""
    return flat if flat.dtype in WORDS else flat.view(torch.uint8)


def _tensor(rows: Stack) -> Tensor:
    return rows.tensor() if isinstance(rows, Matrix) else rows
