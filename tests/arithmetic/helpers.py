"""Tensors as the compiled loops see them, and compared bit for bit."""

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
