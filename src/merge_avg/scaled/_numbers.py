"""Numbers from codes and scales, and codes from numbers, by torch: all of it is exact but rounding.

A code has 4 significant bits at most and a scale 24, so that float64 holds their product. Scales
follow from the largest magnitude in their block; where they are powers of two, they stay so.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from merge_avg.scaled._blocks import Strip, Window
from merge_avg.scaled._forms import E2M1, Form, Rule, ScaleKind

_DTYPES = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
_HALVES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of float4, by the three bits of their size
NO_NUMBER = 255  # among exponents in bytes
_BIAS = 127  # of these
_BUMPED = 1.75 / 2  # of a fraction from 0.5 on
_FRACTION = 52  # the bits of a float64 behind the leading one
_EXPONENT = 0x7FF << _FRACTION  # the exponent field of a float64
EXACT = 2.0**52  # sums of so many units are exact in float64, with a bit to spare


@lru_cache
def _table(form: Form) -> Tensor:
    """Return the number of each byte; the two of a byte of float4 as one complex number."""
    byte = torch.arange(256, dtype=torch.uint8)
    if form is E2M1:
        signed = torch.tensor(_HALVES + tuple(-one for one in _HALVES), dtype=torch.float64)
        return torch.complex(signed[(byte & 15).long()], signed[(byte >> 4).long()])
    return byte.view(_DTYPES[form.name]).to(torch.float64)


@lru_cache
def _codes() -> Tensor:
    """Return the code of each float4 of no sign, by twice its size."""
    found = torch.zeros(13, dtype=torch.uint8)
    for code, size in enumerate(_HALVES):
        found[int(2 * size)] = code
    return found


def _power(exponents: Tensor) -> Tensor:
    """Return powers of two, by their exponents."""
    # By their bits: functions of powers need not be exact.
    return (exponents.long().clamp(-1022, 1023) + 1023 << _FRACTION).view(torch.float64)


def numbers(codes: Tensor, form: Form) -> Tensor:
    """Return the numbers that a vector of codes, or of bytes with two, stands for, as float64."""
    # By a table: torch converts float8 ten times slower.
    found = _table(form).index_select(0, codes.view(torch.uint8).int())
    return torch.view_as_real(found).view(-1) if found.is_complex() else found


def scale_numbers(scales: Tensor, kind: ScaleKind) -> Tensor:
    """Return scales as float64."""
    if kind == "real":
        return scales.to(torch.float64)
    exponents = scales.view(torch.uint8).long()
    return _power(exponents - _BIAS).where(exponents != NO_NUMBER, torch.nan)


def multiply(values: Tensor, scales: Tensor, strip: Strip, window: Window, out: Tensor) -> None:
    """Write a window's elements, each times the scale of its block."""
    width = strip.block[1]
    if window.columns % width == 0:  # all of it are whole rows of blocks
        shape = window.rows, window.columns // width, width
        chosen = _rows(scales, strip, window).unsqueeze(2)
        torch.mul(values.view(shape), chosen, out=out.view(shape))
    else:
        wide = spread(scales, strip, window)
        torch.mul(values.view(wide.shape), wide, out=out.view(wide.shape))


def spread(per_block: Tensor, strip: Strip, window: Window) -> Tensor:
    """Return what is given for each block of a strip for each element of a window, as a view."""
    chosen, width = _rows(per_block, strip, window), strip.block[1]
    if chosen.shape[1] == 1:  # a part of one block
        return chosen.expand(window.rows, window.columns)
    wide = chosen.unsqueeze(2).expand(-1, -1, width).reshape(window.rows, -1)
    return wide[:, : window.columns]


def _rows(per_block: Tensor, strip: Strip, window: Window) -> Tensor:
    """Return what is given for blocks, for each row of a window and each of its blocks there."""
    height, width = strip.block
    below = torch.arange(window.row, window.row + window.rows) // height
    last = -(-(window.column + window.columns) // width)
    return per_block.view(-1, strip.across)[below, window.column // width : last]


def largest(sizes: Tensor, strip: Strip, window: Window, into: Tensor) -> None:
    """Raise the largest size of each block of a strip to what a window has.

    `sizes` are those of the window's elements.
    """
    height, width = strip.block
    rows = sizes.view(window.rows, window.columns)
    first = window.column // width
    count = -(-(window.column + window.columns) // width) - first
    if count == 1:
        widest = rows.amax(1, keepdim=True)
    else:
        missing = count * width - window.columns
        padded = torch.nn.functional.pad(rows, (0, missing)) if missing else rows
        widest = padded.view(window.rows, count, width).amax(2)
    table = into.view(-1, strip.across)
    top = window.row // height
    for below in range(top, (window.row + window.rows - 1) // height + 1):
        here = slice(max(below * height - window.row, 0), (below + 1) * height - window.row)
        line = table[below, first : first + count]
        torch.maximum(line, widest[here].amax(0), out=line)


def mark(chosen: Tensor, strip: Strip, window: Window, into: Tensor) -> None:
    """Mark the blocks of a strip of which an element of a window is chosen."""
    marks = into.double()
    largest(chosen.double(), strip, window, marks)
    into.copy_(marks > 0)


def summable(scales: Sequence[Tensor], weights: Sequence[int], form: Form) -> bool:
    """Return whether float64 holds sums of numbers with these scales exactly.

    There is a vector of scales, one for each block, and a weight for each checkpoint.
    """
    # All terms of a block are multiples of one unit: the smallest number, times the last bit of
    # the smallest scale.
    units = [_power(torch.frexp(one)[1] - 24).where(one != 0, torch.inf) for one in scales]
    unit = torch.stack(units).amin(0) * form.least
    sizes = [one.abs() * abs(weight) for one, weight in zip(scales, weights, strict=True)]
    bound = torch.stack(sizes).sum(0) * form.largest
    whole = max(map(abs, weights), default=0) < EXACT
    return whole and bool((bound <= unit * EXACT).all())


def powers(scales: Tensor) -> Tensor:
    """Return which scales are powers of two."""
    return torch.frexp(scales.abs())[0] == 0.5


def new_scales(
    sizes: Tensor, form: Form, kind: ScaleKind, dtype: torch.dtype, *, rule: Rule, power: Tensor
) -> Tensor:
    """Return the scales of blocks from the largest sizes in them, in their dtype.

    A block of zeros has the scale 1. `power` says which scales that `fit` are to be powers of two:
    the smallest ones with which all numbers are in the range of the form.
    """
    if rule != "fit":
        fraction, exponent = torch.frexp(sizes)
        above = (fraction >= _BUMPED).int() if rule == "round" else 0
        found = _power(exponent - 1 - form.emax + above)
    else:
        found = sizes / form.largest
        fraction, exponent = torch.frexp(found)
        found = torch.where(power, _power(exponent - (fraction == 0.5).int()), found)
    found = found.where(sizes != 0, 1)
    if kind == "exponent":
        exponents = torch.frexp(found)[1] - 1 + _BIAS
        return exponents.clamp(0, NO_NUMBER - 1).to(torch.uint8)
    # A scale of zero would make zeros of numbers that are not.
    return found.clamp(min=torch.finfo(dtype).tiny).to(dtype)


def nearest(values: Tensor, form: Form) -> Tensor:
    """Return the numbers of a form that are nearest to some, ties to even; none is out of range."""
    inside = values.contiguous().clamp(-form.largest, form.largest)
    # Beside a number that is so much larger, float64 has no bits below the last one of the form.
    magic = (inside.view(torch.int64) & _EXPONENT).view(torch.float64)
    magic.clamp_(min=2.0**form.emin).mul_(1.5 * 2.0 ** (_FRACTION - form.bits + 1))
    return (inside + magic).sub_(magic).copysign_(inside)


def codes_of(rounded: Tensor, form: Form) -> Tensor:
    """Return the codes of numbers of a form, as bytes."""
    if form is not E2M1:
        # Exact: they need no rounding.
        return rounded.float().to(_DTYPES[form.name]).view(torch.uint8)
    size = (rounded.abs() * 2).nan_to_num().long()
    codes = _codes()[size] | (rounded.signbit().to(torch.uint8) << 3)
    pairs = codes.view(-1, 2)
    return pairs[:, 0] | (pairs[:, 1] << 4)
