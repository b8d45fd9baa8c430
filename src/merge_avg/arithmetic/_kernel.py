"""The compiled loops of kernel.c, if the package was installed with them.

They compute what torch computes, to the bit, in a third of its time. No result depends on them; but
a merge which they can do alone need not wait for torch to be imported.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

from merge_avg.io import LIBRARY_SUFFIX, Matrix

_NAMES = ("float32", "float16", "bfloat16")
# The arguments of the functions: without these, ctypes would cut addresses to 32 bits.
_POINTER, _SIZE, _DOUBLE = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_double
_ROWS: tuple[Any, ...] = (_POINTER, _SIZE, _SIZE)
_CALLS: dict[str, tuple[Any, ...]] = {
    "sum": (*_ROWS, _SIZE, _POINTER, ctypes.c_int, _POINTER, _POINTER),
    "mean": (_POINTER, _SIZE, _POINTER, _SIZE, _DOUBLE, *4 * (_POINTER,)),
    "whole": (*_ROWS, _SIZE, _POINTER, _DOUBLE, *4 * (_POINTER,)),
    "settle": (*_ROWS, _SIZE, _POINTER, ctypes.c_uint32, _POINTER, _POINTER),
    "take": (_POINTER, _SIZE, _POINTER, _POINTER),
}
LIBRARY = Path(__file__).with_name(f"_loops{LIBRARY_SUFFIX}")
TILE = 1024  # how many columns are summed at a time, as in kernel.c
KNOWN = 24  # bytes of `struct known`, what is known of each tile
Written = tuple[bool, int, Sequence[int]]  # all is finite; where writing stopped; what is open
# Of each run of columns its length, its matrix at the address `grams`, its line at the address
# `sums`, and a factor. Lines hold squares, and then products with the sum of all rows.
Columns = tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[float]]
Int64s: TypeAlias = ctypes.Array[ctypes.c_int64]


class Kernel:
    """The loops of a library, which trust their arguments: addresses, sizes, and weights."""

    dtypes = frozenset(_NAMES)

    def __init__(self, path: Path, level: str | None = None) -> None:
        """Load the loops for a level of processors: one of `levels`, by default the best."""
        library = ctypes.CDLL(str(path))
        library.merge_avg_source.restype = library.merge_avg_levels.restype = ctypes.c_char_p
        self.source: bytes = library.merge_avg_source()  # the digest of its sources
        self.levels: list[str] = library.merge_avg_levels().decode().split()  # those that run here
        level = level or self.levels[0]
        self.default_rounding = library.merge_avg_default_rounding  # for this thread
        self._calls: dict[tuple[str, str], Any] = {}
        for what, types in _CALLS.items():
            for name in _NAMES:
                call = self._calls[what, name] = library[f"merge_avg_{what}_{name}_{level}"]
                call.argtypes = types
        self._products = library[f"merge_avg_products_{level}"]
        self._products.argtypes = (*_ROWS, ctypes.c_int64, _SIZE, *6 * (_POINTER,))

    def add(self, rows: Matrix, factors: int, total: int, known: int, *, begun: bool) -> bool:
        """Add rows, each times its factor, to a sum; return whether all numbers are finite.

        The addresses are those of a float64 for each row, an integer below 2**20; of a float64 for
        each column; and of `KNOWN` bytes for each tile. If no sum is `begun`, the rows begin one.
        """
        at = rows.address, rows.count, rows.stride, rows.numel
        return bool(self._calls["sum", rows.dtype.name](*at, factors, begun, total, known))

    def mean(
        self, total: int, known: int, count: int, divisor: float, out: Matrix, start: int
    ) -> Written:
        """Write the sum of `count` rows over a divisor, rounded once to nearest, ties to even.

        The divisor is an integer below 2**28. Writing begins with column `start`, a multiple of
        `TILE`, and stops after the first tile with elements that might round otherwise.
        """
        return self._write("mean", out, start, total, out.numel, known, count, divisor)[1]

    def whole(
        self, rows: Matrix, factors: int, divisor: float, out: Matrix, start: int
    ) -> tuple[bool, Written]:
        """Do what `add` and `mean` do for all rows, of the dtype of `out`, in one pass.

        Return whether all rows are finite up to where writing stopped, and what `mean` returns.
        """
        at = rows.address, rows.count, rows.stride, rows.numel
        return self._write("whole", out, start, *at, factors, divisor)

    def _write(self, what: str, out: Matrix, start: int, *sums: float) -> tuple[bool, Written]:
        # All elements of one tile may be open, but of one only: the loop stops there.
        at, open_, places = ctypes.c_size_t(start), ctypes.c_size_t(), (ctypes.c_int64 * TILE)()
        call = self._calls[what, out.dtype.name]
        found = call(*sums, out.address, ctypes.byref(at), places, ctypes.byref(open_))
        return bool(found & 2), (bool(found & 1), at.value, places[: open_.value])

    def settle(
        self, values: Matrix, weights: Int64s, divisor: int, places: Sequence[int], out: Matrix
    ) -> bool:
        """Write means that are computed exactly, in integers; return whether all are finite.

        Each column of `values`, float64 of numbers of the three formats, gives the element of `out`
        at one of `places`. Weights are below 2**20, one a row, and the divisor below 2**28.
        """
        at = values.address, values.count, values.stride, values.numel
        call = self._calls["settle", out.dtype.name]
        return bool(call(*at, weights, divisor, int64s(places), out.address))

    def take(self, row: Matrix, runs: Int64s, room: int) -> None:
        """Copy runs of a row, pairs of a column and a length, to an address, as float64."""
        self._calls["take", row.dtype.name](row.address, len(runs) // 2, runs, room)

    def products(self, rows: Matrix, less: int, columns: Columns, grams: int, sums: int) -> None:
        """Add the products of rows of float64 with each other, over runs of columns.

        If `less` is not -1, row number `less`, which lies behind these, is subtracted from each of
        them first, in place.
        """
        *whole, scales = columns
        each = (*map(int64s, whole), (ctypes.c_double * len(scales))(*scales))
        at = rows.address, rows.count, rows.stride
        self._products(*at, less, len(scales), *each, grams, sums)


def int64s(values: Sequence[int]) -> Int64s:
    """Return integers as the loops take them."""
    return (ctypes.c_int64 * len(values))(*values)


def load(path: Path) -> Kernel | None:
    """Return the loops, if the library is there and made for this machine."""
    try:
        return Kernel(path)
    # Installed without a compiler, copied from another machine, or left over from another version.
    except (OSError, AttributeError):
        return None


LOOPS = load(LIBRARY)
