"""The compiled loops of kernel.c, where the package was installed with them.

They compute what is computed by torch, to the bit, in a third of its time: torch has no operation
that converts, multiplies and adds at once. Nothing depends on them, but that a merge which they can
do alone need not wait for torch to be imported.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

from merge_avg.io import Matrix

_LIBRARY = Path(__file__).with_name("_loops.so")
_NAMES = ("float32", "float16", "bfloat16")
_POINTER, _SIZE, _DOUBLE = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_double
_ROWS: tuple[Any, ...] = (_POINTER, _SIZE, _SIZE)
_SUM: tuple[Any, ...] = (*_ROWS, _SIZE, _POINTER, ctypes.c_int, _POINTER, _POINTER)
_MEAN: tuple[Any, ...] = (_POINTER, _SIZE, _POINTER, _SIZE, _DOUBLE, *4 * (_POINTER,))
_WHOLE: tuple[Any, ...] = (*_ROWS, _SIZE, _POINTER, _DOUBLE, *4 * (_POINTER,))
_SETTLE: tuple[Any, ...] = (*_ROWS, _SIZE, _POINTER, ctypes.c_uint32, _POINTER, _POINTER)
_TAKE: tuple[Any, ...] = (*_ROWS, _SIZE, _POINTER, _POINTER, _POINTER, _SIZE)
_CALLS = {"sum": _SUM, "mean": _MEAN, "whole": _WHOLE, "settle": _SETTLE, "take": _TAKE}
_PRODUCTS: tuple[Any, ...] = (*_ROWS, ctypes.c_int64, _SIZE, *6 * (_POINTER,))
TILE = 1024  # how many columns are summed at a time
KNOWN = 24  # bytes that are known of each of these

Places = Sequence[int]
Columns = tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[float]]
Int64s: TypeAlias = ctypes.Array[ctypes.c_int64]


class Kernel:
    """The loops of a library; all numbers lie where they are said to, and nothing is checked.

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
        self._calls = {
            (what, name): _call(library, f"{what}_{name}", types)
            for what, types in _CALLS.items()
            for name in _NAMES
        }
        self._products = _call(library, "products", _PRODUCTS)

    def add(self, rows: Matrix, factors: int, total: int, known: int, *, begun: bool) -> bool:
        """Adds rows, each times its factor, to a sum, or begins one; tells whether all are finite.

        Args:
            rows: what is added.
            factors: where there is a float64 for each row, an integer below 2**20.
            total: where there is a float64 for each column.
            known: where there are `KNOWN` bytes for each `TILE` columns.
            begun: whether there is a sum already.
        """
        at = rows.address, rows.count, rows.stride, rows.numel
        return bool(self._calls["sum", rows.dtype.name](*at, factors, begun, total, known))

    def mean(
        self, total: int, known: int, count: int, divisor: float, out: Matrix, start: int
    ) -> tuple[bool, int, Places]:
        """Writes a sum over a divisor, rounded once, to nearest, ties to even.

        Args:
            total: of `add`.
            known: of `add`.
            count: how many rows were added.
            divisor: an integer below 2**28.
            out: a row.
            start: the column to begin with, a multiple of `TILE`.

        Returns:
            Whether all of what was written is finite; how far it got: to the end, or to that of a
            tile where some might round otherwise; and which.
        """
        at, open_, places = ctypes.c_size_t(start), ctypes.c_size_t(), _places()
        call = self._calls["mean", out.dtype.name]
        where = out.address, ctypes.byref(at), places, ctypes.byref(open_)
        fits = call(total, out.numel, known, count, divisor, *where)
        return bool(fits), at.value, places[: open_.value]

    def whole(
        self, rows: Matrix, factors: int, divisor: float, out: Matrix, start: int
    ) -> tuple[bool, tuple[bool, int, Places]]:
        """Does what `add` and `mean` do for all rows together, in one pass.

        Args:
            rows: all of them, of the dtype of `out`.
            factors: as for `add`.
            divisor: as for `mean`.
            out: a row.
            start: as for `mean`.

        Returns:
            Whether all rows are finite, as far as it got, and what `mean` returns.
        """
        at, open_, places = ctypes.c_size_t(start), ctypes.c_size_t(), _places()
        call = self._calls["whole", out.dtype.name]
        where = out.address, ctypes.byref(at), places, ctypes.byref(open_)
        found = call(rows.address, rows.count, rows.stride, rows.numel, factors, divisor, *where)
        return bool(found & 2), (bool(found & 1), at.value, places[: open_.value])

    def settle(
        self, values: Matrix, weights: Int64s, divisor: int, places: Places, out: Matrix
    ) -> bool:
        """Writes means that are computed exactly, in integers; tells whether all are finite.

        Args:
            values: of float64, that are numbers of the formats of the loops; a column an element.
            weights: int64, below 2**20, for each row.
            divisor: below 2**28.
            places: of the elements.
            out: a row.
        """
        at = values.address, values.count, values.stride, values.numel
        call = self._calls["settle", out.dtype.name]
        return bool(call(*at, weights, divisor, int64s(places), out.address))

    def take(self, rows: Matrix, runs: Int64s, targets: Int64s, room: int, width: int) -> None:
        """Copies some elements of rows, as float64, to rows of a room.

        Args:
            rows: from where.
            runs: for each run of columns where it begins, and how long it is.
            targets: for each row that of the room; below zero for none.
            room: where the first of its rows is written to.
            width: how many numbers are between its rows.
        """
        at = rows.address, rows.count, rows.stride
        self._calls["take", rows.dtype.name](*at, len(runs) // 2, runs, targets, room, width)

    def products(self, rows: Matrix, less: int, columns: Columns, grams: int, sums: int) -> None:
        """Adds the products of rows with each other, over runs of columns.

        Args:
            rows: of float64; changed where something is subtracted.
            less: which row, behind these, is subtracted from each before; -1 for none.
            columns: of each run its length, its matrix in `grams`, its line in `sums`, a factor.
            grams: where matrices of float64 are, row by row.
            sums: where lines of float64 are: squares, and products with the sum of all rows.
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
    """Numbers as the loops take them."""
    return (ctypes.c_int64 * len(values))(*values)


def takes(name: str) -> bool:
    """Whether there are loops that read and write numbers of a dtype."""
    return name in _NAMES


def load(path: Path = _LIBRARY) -> Kernel | None:
    """The loops, if there are any for this machine."""
    try:
        return Kernel(path)
    except (OSError, AttributeError):
        return None


LOOPS = load()
