"""The mean by exact rational arithmetic, with one rounding: what every route has to give."""

import math
from fractions import Fraction

import torch

from merge_avg.arithmetic._sums import FORMATS


def rounded(value, form):
    """Return a fraction rounded to a format of any range, to nearest, ties to even."""
    size = abs(value)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= size < Fraction(2) ** exponent
    unit = max(exponent, form.emin) - form.bits + 1
    whole = round(size / Fraction(2) ** unit)  # ties to even
    result = math.inf if whole.bit_length() + unit > 1024 else math.ldexp(whole, unit)
    return result if value > 0 else -result


def mean_of(column, weights, form):
    """Return the weighted mean of float64 numbers, rounded to a format; IEEE 754 where not exact.

    What cancels is +0, and a sum of -0 alone is -0. Weights are exact, so that a weight overflows
    nothing: NaN are those of NaN, of infinities of both signs, and of infinity times zero.
    """
    pairs = list(zip(column, weights.integers, strict=True))
    if not all(map(math.isfinite, column)):
        signs = ((weight > 0) - (weight < 0) for weight in weights.integers)
        terms = (x * sign for x, sign in zip(column, signs, strict=True))
        return sum((term for term in terms if not math.isfinite(term)), 0.0)
    total = sum((Fraction(x) * weight for x, weight in pairs), Fraction(0)) / weights.total
    if total:
        return rounded(total, form)
    negative = all((math.copysign(1, x) < 0) != (weight < 0) for x, weight in pairs)
    return -0.0 if negative else 0.0


def converted(numbers, dtype):
    """Return numbers as a vector of a dtype; what does not fit is NaN where there is no infinity.

    Of such numbers, newer releases of torch make the largest of float8_e4m3fn.
    """
    wide = torch.tensor(numbers, dtype=torch.float64)
    if dtype == torch.float8_e4m3fn:
        wide[wide.abs() > torch.finfo(dtype).max] = math.nan
    return wide.to(dtype)


def reference(tensors, weights, dtype):
    """Return the mean of vectors of real numbers of any dtypes, in a dtype; NaN is the usual one.

    The sums are written out once more for each element: nothing of the package computes here.
    """
    form = FORMATS[dtype]
    columns = zip(*[tensor.double().tolist() for tensor in tensors], strict=True)
    exact = [mean_of(column, weights, form) for column in columns]
    result = converted(exact, dtype)
    if form.nan:
        words = {8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize]
        result.view(words)[result.isnan()] = torch.tensor(form.nan, dtype=torch.int64).to(words)
    return result
