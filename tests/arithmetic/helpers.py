"""Numbers that are hard to round, and tensors as the loops see them, compared bit for bit."""

import math
from fractions import Fraction

import pytest
import torch

from merge_avg.arithmetic import LOOPS
from merge_avg.checkpoint import BY_NAME
from merge_avg.io import Matrix

WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
needs_loops = pytest.mark.skipif(LOOPS is None, reason="installed without a C compiler")


def same(a, b):
    """Return whether two tensors are equal bit for bit, the sign of zeros and NaNs included."""
    return torch.equal(a.view(WORDS[a.itemsize]), b.view(WORDS[b.itemsize]))


def as_matrix(values):
    """Return where a matrix, or a vector as one row, lies in memory."""
    values = values.view(1, -1) if values.dim() == 1 else values
    dtype = BY_NAME[str(values.dtype).removeprefix("torch.")]
    return Matrix(values.data_ptr(), dtype, *values.shape, values.stride(0), values)


def midpoint(chance, form):
    """Return a number half-way between two neighbours of a format, often at its edges."""
    top = 1 << (form.bits - 1)
    exponent = chance.choice([form.emin, form.emin + 1, 0, 0, chance.randint(-20, 20)])
    step = Fraction(2) ** (exponent - form.bits + 1)
    if chance.random() < 0.3:  # subnormal
        return Fraction(2) ** (form.emin - form.bits + 1) * (chance.randrange(top) + Fraction(1, 2))
    if chance.random() < 0.3 and exponent > form.emin:  # below a power of two
        return top * step - step / 4
    return (
        chance.choice([top, 2 * top - 1, chance.randrange(top, 2 * top)]) + Fraction(1, 2)
    ) * step


def narrowed(value, dtype):
    """Return about a fraction, as a value of a dtype."""
    size = float(value) if abs(value) < Fraction(2) ** 1000 else 0.0
    result = torch.tensor(size, dtype=torch.float64).to(dtype).double().item()
    return result if math.isfinite(result) else 1.0
