"""The compiled loops of kernel.c and loops.h, if the package was installed with them.

They compute what torch computes, to the bit, in a third of its time. No result depends on them; but
a merge which they can do alone need not wait for torch to be imported.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

from merge_avg.io import Matrix

_LIBRARY = Path(__file__).with_name("_loops.so")
_NAMES = ("float32", "float16", "bfloat16")
# The arguments of the functions: without these, ctypes would cut addresses to 32 bits.
_POINTER, _SIZE, _DOUBLE = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_double
_ROWS: tuple[Any, ...] = (_POINTER, _SIZE, _SIZE)
_SUM: tuple[Any, ...] = (*_ROWS, _SIZE, _POINTER, ctypes.c_int, _POINTER, _POINTER)
_MEAN: tuple[Any, ...] = (_POINTER, _SIZE, _POINTER, _SIZE, _DOUBLE, *4 * (_POINTER,))
_WHOLE: tuple[Any, ...] = (*_ROWS, _SIZE, _POINTER, _DOUBLE, *4 * (_POINTER,))
_SETTLE: tuple[Any, ...] = (*_ROWS, _SIZE, _POINTER, ctypes.c_uint32, _POINTER, _POINTER)
_TAKE: tuple[Any, ...] = (*_ROWS, _SIZE, _POINTER, _POINTER, _POINTER, _SIZE)
_CALLS = {"sum": _SUM, "mean": _MEAN, "whole": _WHOLE, "settle": _SETTLE, "take": _TAKE}
_PRODUCTS: tuple[Any, ...] = (*_ROWS, ctypes.c_int64, _SIZE, *6 * (_POINTER,))
TILE = 1024  # how many columns are summed at a time, as in kernel.c
KNOWN = 24  # bytes of `struct known`, what is known of each tile

Places = Sequence[int]
Written = tuple[bool, int, Places]  # all is finite; up to which column; elements to settle
Columns = tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[float]]
Int64s: TypeAlias = ctypes.Array[ctypes.c_int64]


class Kernel:
    """The loops of a library, which trust their arguments: addresses, sizes, and weights.

    Args:
        path: of the library.

    Attributes:
        source: the digest of its sources.

    Raises:
        OSError: the library is missing, or made for another machine.
        AttributeError: the library is of another version.
    """

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        library.merge_avg_source.restype = ctypes.c_char_p
        self.source: bytes = library.merge_avg_source()
        self._calls = {
            (what, name): _call(library, f"{what}_{name}", types)
            for what, types in _CALLS.items()
            for name in _NAMES
        }
        self._products = _call(library, "products", _PRODUCTS)

    def add(self, rows: Matrix, factors: int, total: int, known: int, *, begun: bool) -> bool:
        """Add rows, each times its factor, to a sum; return whether all numbers are finite.

        Args:
            rows: the numbers.
            factors: address of a float64 for each row, an integer below 2**20.
            total: address of a float64 for each column.
            known: address of `KNOWN` bytes for each `TILE` columns.
            begun: whether there is a sum already; if not, the rows begin one.
        """
        at = rows.address, rows.count, rows.stride, rows.numel
        return bool(self._calls["sum", rows.dtype.name](*at, factors, begun, total, known))

    def mean(
        self, total: int, known: int, count: int, divisor: float, out: Matrix, start: int
    ) -> Written:
        """Write a sum over a divisor, rounded once to nearest, ties to even.

        Args:
            total: as for `add`.
            known: as for `add`.
            count: how many rows were added.
            divisor: an integer below 2**28.
            out: a row.
            start: the column to begin with, a multiple of `TILE`.

        Returns:
            Whether all that was written is finite; up to which column that is, which is the end or
            that of the first tile with elements that might round otherwise; and these elements.
        """
        # All elements of one tile may be open, but of one only: the loop stops there.
        at, open_, places = ctypes.c_size_t(start), ctypes.c_size_t(), _places()
        call = self._calls["mean", out.dtype.name]
        where = out.address, ctypes.byref(at), places, ctypes.byref(open_)
        fits = call(total, out.numel, known, count, divisor, *where)
        return bool(fits), at.value, places[: open_.value]

    def whole(
        self, rows: Matrix, factors: int, divisor: float, out: Matrix, start: int
    ) -> tuple[bool, Written]:
        """Do what `add` and `mean` do for all rows together, in one pass.

        Args:
            rows: all of them, of the dtype of `out`.
            factors: as for `add`.
            divisor: as for `mean`.
            out: a row.
            start: as for `mean`.

        Returns:
            Whether all numbers are finite up to that column, and what `mean` returns.
        """
        at, open_, places = ctypes.c_size_t(start), ctypes.c_size_t(), _places()
        call = self._calls["whole", out.dtype.name]
        where = out.address, ctypes.byref(at), places, ctypes.byref(open_)
        found = call(rows.address, rows.count, rows.stride, rows.numel, factors, divisor, *where)
        return bool(found & 2), (bool(found & 1), at.value, places[: open_.value])

    def settle(
        self, values: Matrix, weights: Int64s, divisor: int, places: Places, out: Matrix
    ) -> bool:
        """Write means that are computed exactly, in integers; return whether all are finite.

        Args:
            values: numbers of the three formats as float64, a column for each element.
            weights: integers below 2**20, one a row.
            divisor: below 2**28.
            places: where the elements are in `out`.
            out: a row.
        """
        at = values.address, values.count, values.stride, values.numel
        call = self._calls["settle", out.dtype.name]
        return bool(call(*at, weights, divisor, int64s(places), out.address))

    def take(self, rows: Matrix, runs: Int64s, targets: Int64s, room: int, width: int) -> None:
        """Copy some elements of rows, as float64.

        Args:
            rows: the numbers.
            runs: for each run of columns where it begins and how long it is.
            targets: for each row to which row of `room` it goes; below zero to none.
            room: address of the first of these rows.
            width: how many numbers lie between the beginnings of these rows.
        """
        at = rows.address, rows.count, rows.stride
        self._calls["take", rows.dtype.name](*at, len(runs) // 2, runs, targets, room, width)

    def products(self, rows: Matrix, less: int, columns: Columns, grams: int, sums: int) -> None:
        """Add the products of rows with each other, over runs of columns.

        Args:
            rows: numbers of float64, which are changed if a row is subtracted.
            less: the row behind these that is subtracted from each first; -1 for none.
            columns: of each run its length, its matrix in `grams`, its line in `sums`, a factor.
            grams: address of matrices of float64, row by row.
            sums: address of lines of float64: squares, and products with the sum of all rows.
        """
        *whole, scales = columns
        runs = len(scales)
        each = (*map(int64s, whole), (ctypes.c_double * runs)(*scales))
        self._products(rows.address, rows.count, rows.stride, less, runs, *each, grams, sums)


def _call(library: ctypes.CDLL, name: str, types: tuple[Any, ...]) -> Any:
    function = library[f"merge_avg_{name}"]
    function.argtypes = types
    return function


def _places() -> Int64s:
    return (ctypes.c_int64 * TILE)()


def int64s(values: Sequence[int]) -> Int64s:
    """Return integers as the loops take them."""
    return (ctypes.c_int64 * len(values))(*values)


def takes(name: str) -> bool:
    """Return whether there are loops for a dtype."""
    return name in _NAMES


def load(path: Path = _LIBRARY) -> Kernel | None:
    """Return the loops, if the library is there and made for this machine."""
    try:
        return Kernel(path)
    # Installed without a compiler, copied from another machine, or left over from another version.
    except (OSError, AttributeError):
        return None


LOOPS = load()
