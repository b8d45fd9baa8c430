"""Exact means to compare with, and tensors as the compiled loops see them."""

import pytest
import torch

from merge_avg.arithmetic import LOOPS
from merge_avg.arithmetic._sums import FORMATS
from merge_avg.arithmetic.torch_mean import exact_mean
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


def reference(tensors, weights, dtype):
    """Return the weighted mean of vectors, computed exactly and rounded once to a dtype."""
    rows = zip(*[tensor.double().tolist() for tensor in tensors], strict=True)
    exact = [exact_mean(row, weights, FORMATS[dtype]) for row in rows]
    return torch.tensor(exact, dtype=torch.float64).to(dtype)
