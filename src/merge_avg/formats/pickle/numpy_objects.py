"""NumPy's objects in a pickle: the number in a scalar, and a digest of an array.

    numpy.core.multiarray.scalar(dtype, bytes)
    numpy.core.multiarray._reconstruct(ndarray, (0,), b"b"), with the state
        (version, shape, dtype, Fortran order or not, bytes)          protocols 0 to 4
    numpy.core.numeric._frombuffer(bytes, dtype, shape, order)        protocol 5

A dtype is numpy.dtype("f8", False, True) with the state (version, "<", ...). Protocols 0 to 2 hold
bytes as a text, _codecs.encode(text, "latin1").

Specification: array_reduce_ex and array_reduce in numpy/_core/src/multiarray/methods.c.
"""

from __future__ import annotations

import struct

from xxhash import xxh3_128_hexdigest

from merge_avg.formats.pickle.values import Allowance, Global, Instance, Omitted, Value, shown

_NUMBERS = {"f8": "<d", "f4": "<f", "i8": "<q", "i4": "<i"}  # codes of the dtypes of scalars
_FLOATS = ("f", "c", "ml_dtypes.bfloat", "ml_dtypes.float")  # ml_dtypes names them by classes
_MOST_DIMENSIONS = 64
_HASHED = 16  # bytes that are hashed in the time that a byte of the allowance stands for


def number_of(value: Instance) -> int | float | None:
    """Return the number in a scalar of NumPy, and None for anything else."""
    match value:
        case Instance(Global(name="scalar"), (Instance(args=(str() as code, *_)), raw)):
            form, raw = _NUMBERS.get(code), _bytes(raw)
            if form and isinstance(raw, bytes) and len(raw) == struct.calcsize(form):
                number: int | float = struct.unpack(form, raw)[0]
                return number
    return None


def digest_of(value: Instance, allowance: Allowance) -> str | None:
    """Return a digest of an array of floats or complex numbers, and None for anything else."""
    match value:
        case Instance(Global(name="_reconstruct"), state=(_, tuple() as shape, dtype, order, raw)):
            pass
        case Instance(Global(name="_frombuffer"), (raw, dtype, tuple() as shape, order)):
            pass
        case _:
            return None
    match dtype, _bytes(raw):
        case Instance(args=(code, *_), state=(_, endian, *_)), bytes() as raw:
            known = shown(code)
        case _:
            return None
    if not known.startswith(_FLOATS) or len(shape) > _MOST_DIMENSIONS:
        return None
    allowance.spend(len(raw) // _HASHED)
    sides = ",".join(map(shown, shape))
    fortran = order in (True, "F")
    return xxh3_128_hexdigest(f"{known} {shown(endian)} {sides} {fortran} ".encode() + raw)


def _bytes(raw: Value) -> bytes | None:
    """Return bytes that a pickle holds in some form; of long ones their digest."""
    match raw:
        case Instance(Global("_codecs", "encode"), (inner, "latin1")):
            raw = inner.encode("latin1", "replace") if isinstance(inner, str) else inner
        case Instance(Global(name="bytes"), ()):
            return b""
    if isinstance(raw, Omitted):
        return f"{raw.nbytes} {raw.digest}".encode()
    return bytes(raw) if isinstance(raw, bytes | bytearray) else None
