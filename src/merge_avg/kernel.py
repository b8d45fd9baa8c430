"""The compiled loops of kernel.c, where the package was installed with them.

They compute what `average` computes by torch, to the bit, in a third of its time: torch has no
operation that converts, multiplies and adds at once. Nothing depends on them.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

_LIBRARY = Path(__file__).with_name("_kernel.so")
_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_size_t
_SUM = (_POINTER, _SIZE, _SIZE, _SIZE, _POINTER, ctypes.c_int, _POINTER, _POINTER)
_MEAN = (_POINTER, _SIZE, ctypes.c_double, _POINTER)


class Kernel:
    """The loops of a library.

    Args:
        path: of the library.

    Attributes:
        source: the digest of what it was compiled from.

    Raises:
        OSError: it is not there, or not for this machine.
        AttributeError: it is that of another version.
    """

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        library.merge_avg_source.restype = ctypes.c_char_p
        self.source: bytes = library.merge_avg_source()
        self._sums = {}
        self._means = {}
        for dtype, name in _NAMES.items():
            self._sums[dtype] = library[f"merge_avg_sum_{name}"]
            self._sums[dtype].argtypes, self._sums[dtype].restype = _SUM, None
            self._means[dtype] = library[f"merge_avg_mean_{name}"]
            self._means[dtype].argtypes, self._means[dtype].restype = _MEAN, None

    def sums(self, rows: Tensor) -> bool:
        """Whether `add` takes these rows."""
        return rows.dtype in self._sums and _dense(rows)

    def add(
        self, rows: Tensor, factors: Tensor, total: Tensor, *, begun: bool
    ) -> tuple[int, int, bool, bool]:
        """Adds rows, each times its factor, to a sum, or begins one.

        Args:
            rows: of shape (rows, elements), which `sums` accepts.
            factors: of shape (1, rows), contiguous float64.
            total: of `elements` contiguous float64.
            begun: whether `total` holds a sum already.

        Returns:
            Of the numbers' bits without the sign, as integers, the smallest, but for zero where
            there are others, and the largest; whether there is a zero; and whether there is a -0.
        """
        seen = (ctypes.c_uint64 * 4)()
        self._sums[rows.dtype](
            rows.data_ptr(),
            len(rows),
            rows.stride(0),
            rows.shape[1],
            factors.data_ptr(),
            begun,
            total.data_ptr(),
            seen,
        )
        high, low, zeros, negative = seen
        return low, high, bool(zeros), bool(negative)

    def divides(self, out: Tensor) -> bool:
        """Whether `divide` writes to this."""
        return out.dtype in self._means and _dense(out)

    def divide(self, total: Tensor, divisor: float, out: Tensor) -> None:
        """Writes an exact sum over a divisor, rounded once, to nearest, ties to even.

        Args:
            total: contiguous, finite float64.
            divisor: an integer below 2**28.
            out: of as many elements, which `divides` accepts.
        """
        self._means[out.dtype](total.data_ptr(), len(total), divisor, out.data_ptr())


def _dense(values: Tensor) -> bool:
    """Whether the last dimension lies in memory, without gaps; subclasses may have no memory."""
    plain = type(values) is Tensor and values.device.type == "cpu"
    return plain and (values.stride(-1) == 1 or values.shape[-1] < 2)


def load(path: Path = _LIBRARY) -> Kernel | None:
    """The loops, if there are any for this machine."""
    try:
        return Kernel(path)
    except (OSError, AttributeError):
        return None
