"""Element types: their sizes, and what the file formats call them. Without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from merge_avg.options import FloatName

# "code" is for bytes that are not numbers by themselves, and are refused: a qint8 is worth what the
# scale of its tensor says, a byte of float4 holds two values, and float8_e8m0 is such a scale.
Kind = Literal["float", "complex", "int", "bool", "code"]


@dataclass(frozen=True, slots=True, eq=False)  # each is in the table once, and is hashed often
class DType:
    """An element type."""

    name: str  # torch's name for it
    itemsize: int
    kind: Kind
    safetensors: str | None = None  # its code in safetensors files
    storage: str | None = None  # the class in `torch` that torch.save writes for its storages

    @property
    def word(self) -> int:
        """Return the bytes of a number: of each component, for complex ones."""
        return self.itemsize // 2 if self.kind == "complex" else self.itemsize


# Where there is no class of storages, torch.save writes an UntypedStorage and the dtype beside it.
_TABLE = (
    DType("float64", 8, "float", "F64", "DoubleStorage"),
    DType("float32", 4, "float", "F32", "FloatStorage"),
    DType("float16", 2, "float", "F16", "HalfStorage"),
    DType("bfloat16", 2, "float", "BF16", "BFloat16Storage"),
    DType("float8_e4m3fn", 1, "float", "F8_E4M3"),
    DType("float8_e5m2", 1, "float", "F8_E5M2"),
    DType("float8_e4m3fnuz", 1, "float", "F8_E4M3FNUZ"),
    DType("float8_e5m2fnuz", 1, "float", "F8_E5M2FNUZ"),
    DType("float8_e8m0fnu", 1, "code", "F8_E8M0"),
    DType("float4_e2m1fn_x2", 1, "code", "F4"),
    DType("complex128", 16, "complex", None, "ComplexDoubleStorage"),
    DType("complex64", 8, "complex", "C64", "ComplexFloatStorage"),
    DType("complex32", 4, "complex"),
    DType("int64", 8, "int", "I64", "LongStorage"),
    DType("int32", 4, "int", "I32", "IntStorage"),
    DType("int16", 2, "int", "I16", "ShortStorage"),
    DType("int8", 1, "int", "I8", "CharStorage"),
    DType("uint8", 1, "int", "U8", "ByteStorage"),
    DType("uint16", 2, "int", "U16"),
    DType("uint32", 4, "int", "U32"),
    DType("uint64", 8, "int", "U64"),
    DType("bool", 1, "bool", "BOOL", "BoolStorage"),
    DType("quint8", 1, "code", None, "QUInt8Storage"),
    DType("qint8", 1, "code", None, "QInt8Storage"),
    DType("qint32", 4, "code", None, "QInt32Storage"),
    DType("quint4x2", 1, "code", None, "QUInt4x2Storage"),
    DType("quint2x4", 1, "code", None, "QUInt2x4Storage"),
)
BY_NAME = {dtype.name: dtype for dtype in _TABLE}
BY_SAFETENSORS = {dtype.safetensors: dtype for dtype in _TABLE if dtype.safetensors}
BY_STORAGE = {dtype.storage: dtype for dtype in _TABLE if dtype.storage}
CONVERTIBLE: tuple[str, ...] = get_args(FloatName)
TEMPLATE = "template"  # as a dtype: the one that a tensor has in the template
