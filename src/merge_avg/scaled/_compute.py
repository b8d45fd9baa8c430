"""The mean of scaled tensors, strip by strip: their numbers, new scales, and new codes.

    for each strip:   windows: codes x scales -> mean -> the largest size in each block
                      new scales
                      windows once more: mean / scale -> codes

A block of which all checkpoints have the same codes and scale is copied.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from merge_avg.arithmetic import Weights
from merge_avg.arithmetic.torch_mean import RunningMean
from merge_avg.checkpoint import Access
from merge_avg.errors import MergeError
from merge_avg.scaled import _numbers as of
from merge_avg.scaled._blocks import Strip, Window
from merge_avg.scaled._scaled import CODES, SCALES, Scaled


@dataclass(frozen=True)
class _Row:
    """The weights of one output: those of checkpoints that have one, as integers."""

    output: int
    members: Sequence[int]  # places among the checkpoints that are read
    weights: Weights
    copies: bool  # whether the mean of equal numbers is that number


@dataclass
class _Strip:
    """A strip under way: what is known of its blocks."""

    strip: Strip
    raw: Sequence[Tensor]  # the scales of each checkpoint, as they are
    scales: Sequence[Tensor]  # as numbers
    exact: Sequence[bool]  # by output, whether sums in float64 are exact
    largest: Sequence[Tensor]  # by output, of the finite numbers in the mean
    broken: Sequence[Tensor]  # by output, whether some of the mean are not finite
    varies: Sequence[Tensor]  # by output, whether a block differs between checkpoints


class Computation:
    """The computation of one scaled tensor."""

    def __init__(self, one: Scaled, access: Access) -> None:
        self._one, self._access = one, access
        self._read = [k for k, infos in enumerate(one.sources) if infos]
        self._rows = [self._row(k, row) for k, row in enumerate(access.weights)]
        self._dtype = getattr(torch, one.dense.name) if one.dense is not None else None
        self._most = one.window
        places = {number: place for place, number in enumerate(self._read)}
        self._compared = [places[k] for k in access.compared if k in places]
        if len(self._compared) < len(access.compared):
            self._compared = []
        self._gram = torch.zeros(len(self._compared), len(self._compared), dtype=torch.float64)
        self._error = self._norm = 0.0
        self._turned: list[Tensor] = []

    def run(self) -> None:
        """Read all, and write the results."""
        for strip in self._one.blocks.strips(self._most):
            if self._dtype is None:
                self._requantise(self._begun(strip))
            else:
                self._convert(self._begun(strip))
        self._spread_inputs()
        if self._compared:
            self._access.compare(self._gram.tolist())
        if self._dtype is None:
            self._access.approximated(self._error, self._norm)

    def _row(self, output: int, fractions: Sequence[Fraction]) -> _Row:
        members = [place for place, k in enumerate(self._read) if fractions[k]]
        chosen = [fractions[self._read[place]] for place in members]
        scale = math.lcm(*(value.denominator for value in chosen))
        integers = tuple(int(value * scale) for value in chosen)
        return _Row(output, members, Weights(integers, scale), sum(integers) == scale)

    def _begun(self, strip: Strip) -> _Strip:
        stop = strip.first + strip.blocks
        raw = [self._access.read(k, SCALES, strip.first, stop) for k in self._read]
        scales = [of.scale_numbers(one, self._one.scale_kind) for one in raw]
        exact = [self._is_exact(row, scales) for row in self._rows]
        varies = [
            torch.full((strip.blocks,), not row.copies).logical_or_(
                _differ([_bits(raw[k]) for k in row.members])
            )
            for row in self._rows
        ]
        sizes = [torch.zeros(strip.blocks, dtype=torch.float64) for _ in self._rows]
        broken = [torch.zeros(strip.blocks, dtype=torch.bool) for _ in self._rows]
        return _Strip(strip, raw, scales, exact, sizes, broken, varies)

    def _windows(self, work: _Strip) -> Iterator[Window]:
        return work.strip.windows(self._most)

    def _is_exact(self, row: _Row, scales: Sequence[Tensor]) -> bool:
        """Return whether float64 holds the sums of a strip, and their divisor, exactly."""
        some = [scales[k] for k in row.members]
        return row.weights.total < of.EXACT and of.summable(
            some, row.weights.integers, self._one.form
        )

    def _codes(self, window: Window, *, again: bool = False) -> list[Tensor]:
        per = self._one.form.in_byte
        start, stop = window.start // per, window.stop // per
        return [self._access.read(k, CODES, start, stop, again=again) for k in self._read]

    def _values(self, work: _Strip, window: Window, codes: Sequence[Tensor]) -> Tensor:
        """Return the numbers of a window in each checkpoint, as rows."""
        values = torch.empty(len(codes), window.rows * window.columns, dtype=torch.float64)
        for out, some, scales in zip(values, codes, work.scales, strict=True):
            numbers = of.numbers(some, self._one.form)
            of.multiply(numbers, scales, work.strip, window, out)
        return values

    def _compare(self, values: Tensor) -> None:
        if self._compared:
            rows = values if len(self._compared) == len(values) else values[self._compared]
            self._gram += rows @ rows.T

    def _mean(self, work: _Strip, row: _Row, values: Tensor) -> Tensor:
        """Return the mean, rounded once to float64."""
        weights = row.weights
        if not work.exact[row.output]:
            rows = values[list(row.members)]
            return _rounded_once(rows, weights, torch.float64)
        pairs = [*zip(row.members, weights.integers, strict=True)]
        total = values[pairs[0][0]] * pairs[0][1]
        for place, weight in pairs[1:]:
            total.add_(values[place], alpha=weight)
        return total.div_(weights.total)

    def _requantise(self, work: _Strip) -> None:
        """Write the codes and scales of a strip."""
        codes: list[Tensor] = []
        values, count = torch.empty(0), 0
        for window in self._windows(work):
            count += 1
            codes = self._codes(window)
            values = self._values(work, window, codes)
            self._compare(values)
            for row in self._rows:
                self._look(work, window, row, codes, self._mean(work, row, values))
        scales = [self._new_scales(work, row) for row in self._rows]
        for window in self._windows(work):
            if count > 1:
                codes = self._codes(window, again=True)
                values = self._values(work, window, codes)
            for row, (_, chosen) in zip(self._rows, scales, strict=True):
                mean = self._mean(work, row, values)
                self._write(work, window, row, codes[row.members[0]], mean, chosen)
        for row, (raw, _) in zip(self._rows, scales, strict=True):
            self._access.write(row.output, SCALES, work.strip.first, raw)

    def _look(
        self, work: _Strip, window: Window, row: _Row, codes: Sequence[Tensor], mean: Tensor
    ) -> None:
        """Add what a window says of the blocks that it has a part in."""
        finite = mean.isfinite()
        if bool(finite.all()):
            of.largest(mean.abs(), work.strip, window, work.largest[row.output])
        else:
            of.largest(mean.abs().where(finite, 0), work.strip, window, work.largest[row.output])
            of.mark(~finite, work.strip, window, work.broken[row.output])
        if bool(work.varies[row.output].all()):  # as scales tell already, most often
            return
        differ = _differ([codes[k].view(torch.uint8) for k in row.members])
        if self._one.form.in_byte > 1:
            differ = differ.repeat_interleave(self._one.form.in_byte)
        of.mark(differ, work.strip, window, work.varies[row.output])

    def _new_scales(self, work: _Strip, row: _Row) -> tuple[Tensor, Tensor]:
        """Return the scales of a strip in an output, as they are written, and as numbers."""
        one = self._one
        sizes, varies = work.largest[row.output], work.varies[row.output]
        broken = work.broken[row.output] & varies
        if not one.allow_nonfinite and bool(broken.any()):
            raise self._nonfinite(work, row, broken)
        power = torch.stack([of.powers(work.scales[k]) for k in row.members]).all(0)
        first = work.raw[row.members[0]]
        made = of.new_scales(
            sizes, one.form, one.scale_kind, first.dtype, rule=one.rule, power=power
        )
        if one.scale_kind == "real" and not bool(made.isfinite().all()):
            raise self._too_large(f"scales of {str(made.dtype).removeprefix('torch.')}")
        if one.form.in_byte > 1:  # there are no codes of NaN, but a scale
            made = made.masked_fill(broken, of.NO_NUMBER)
        raw = _bits(made).where(varies, _bits(first)).view(first.dtype)
        return raw, of.scale_numbers(raw, one.scale_kind)

    def _nonfinite(self, work: _Strip, row: _Row, blocks: Tensor) -> MergeError:
        """Return the error of blocks that have numbers which are not finite."""
        one, number = self._one, None
        for place in row.members:
            if not bool(work.scales[place][blocks].isfinite().all()):
                number = self._read[place]
        for window in self._windows(work) if number is None else ():
            values = self._values(work, window, self._codes(window, again=True))
            for place in row.members:
                if number is None and not bool(values[place].isfinite().all()):
                    number = self._read[place]
        if number is None:  # all are finite, and so is their mean
            return self._too_large(one.dense.name if one.dense is not None else "its scales")
        where = one.paths[number]
        what = f"tensor {one.name!r} holds NaN or infinity"
        hint = "leave the checkpoint out, or average them all the same with --allow-nonfinite"
        return MergeError(what, where=where, hint=hint, tensor=one.name)

    def _too_large(self, dtype: str) -> MergeError:
        name = self._one.name
        what = f"the mean of tensor {name!r} does not fit {dtype}"
        hint = "choose a wider --dtype, such as float32 or bfloat16"
        return MergeError(what, where=self._one.paths[0], hint=hint, tensor=name)

    def _write(
        self, work: _Strip, window: Window, row: _Row, first: Tensor, mean: Tensor, scales: Tensor
    ) -> None:
        """Write the codes of a window, and measure what they have lost."""
        one, shape = self._one, (window.rows, window.columns)
        wide = of.spread(scales, work.strip, window)
        varies = of.spread(work.varies[row.output], work.strip, window).reshape(-1)
        quotient = mean.view(shape).div(wide).view(-1)
        rounded = of.nearest(quotient, one.form)
        finite = mean.isfinite()
        if not bool(finite.all()):
            rounded = rounded.where(finite, torch.nan)
        error = rounded.view(shape).mul(wide).view(-1).sub_(mean).where(varies & finite, 0)
        self._error += float(error.square_().sum())
        self._norm += float(mean.where(finite, 0).square().sum())
        codes = of.codes_of(rounded, one.form)
        chosen = varies if one.form.in_byte == 1 else varies.view(-1, one.form.in_byte)[:, 0]
        codes = codes.where(chosen, first.view(torch.uint8))
        at = window.start // one.form.in_byte
        self._access.write(row.output, CODES, at, codes.view(first.dtype))

    def _convert(self, work: _Strip) -> None:
        """Write the mean of a strip in another dtype, without scales."""
        assert self._dtype is not None  # noqa: S101 - it is asked for
        for window in self._windows(work):
            values = self._values(work, window, self._codes(window))
            self._compare(values)
            for row in self._rows:
                mean = _rounded_once(values[list(row.members)], row.weights, self._dtype)
                if not (self._one.allow_nonfinite or bool(mean.isfinite().all())):
                    everything = torch.ones(work.strip.blocks, dtype=torch.bool)
                    raise self._nonfinite(work, row, everything)
                self._put(row.output, window.start, mean)

    def _put(self, output: int, start: int, values: Tensor) -> None:
        """Write numbers of a result without scales, or keep them until a matrix is whole."""
        if not self._one.transposed:
            self._access.write(output, CODES, start, values)
            return
        rows, columns = self._one.shape[-2:]
        if not self._turned:
            self._turned = [torch.empty(rows * columns, dtype=values.dtype) for _ in self._rows]
        matrix = self._turned[output]
        while len(values):
            at = start % len(matrix)
            some = values[: len(matrix) - at]
            matrix[at : at + len(some)] = some
            start, values = start + len(some), values[len(some) :]
            if start % len(matrix) == 0:
                turned = matrix.view(rows, columns).T.reshape(-1)
                self._access.write(output, CODES, start - len(matrix), turned)

    def _spread_inputs(self) -> None:
        """Write scales of activations: the largest, which cuts off what no checkpoint does."""
        for tensor in range(SCALES + 1, SCALES + 1 + self._one.inputs):
            read = [self._access.read(k, tensor, 0, 1) for k in self._read]
            for row in self._rows if self._dtype is None else ():
                some = torch.cat([read[place] for place in row.members])
                self._access.write(row.output, tensor, 0, some.max().view(1))


def _rounded_once(rows: Tensor, weights: Weights, dtype: torch.dtype) -> Tensor:
    mean = RunningMean(weights, dtype)
    mean.extend(rows)
    return mean.result(lambda number: rows[number])


def _bits(values: Tensor) -> Tensor:
    """Return numbers as integers, which can be compared and chosen whatever they mean."""
    sizes = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return values.view(sizes[values.itemsize])


def _differ(rows: Sequence[Tensor]) -> Tensor:
    """Return which elements are not the same in all rows."""
    first = rows[0]
    differ = torch.zeros(first.shape, dtype=torch.bool)
    for row in rows[1:]:
        differ |= row != first
    return differ
