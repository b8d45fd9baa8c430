"""The numbers that codes stand for, and what scales are made of.

                     bits of the      exponent of the     largest   codes in
                     significand      smallest normal               a byte
    float8_e4m3fn    4                -6                  448       1
    float8_e5m2      3                -14                 57344     1
    float4_e2m1      2                0                   6         2, the low half first

Specifications: OCP 8-bit Floating Point (OFP8) 1.0, and OCP Microscaling Formats (MX) 1.0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# As real numbers; or as the exponents of powers of two, in bytes (e8m0), which MX has.
ScaleKind = Literal["real", "exponent"]
# How scales follow from the largest size in their block.
#   fit     it becomes the largest number there is
#   floor   its exponent becomes that of the largest number, which it may exceed (MX, section 6.3)
#   round   the same, and one more where its significand is 1.75 or more (compressed-tensors' MX)
Rule = Literal["fit", "floor", "round"]


@dataclass(frozen=True, slots=True)
class Form:
    """A format of codes."""

    name: str
    bits: int  # of the significand, the leading one included
    emin: int  # the exponent of the smallest normal number
    emax: int  # that of the largest number
    largest: float
    in_byte: int = 1  # codes in a byte

    @property
    def least(self) -> float:
        """Return the smallest number above zero, of which all are multiples."""
        return 2.0 ** (self.emin - self.bits + 1)


E4M3 = Form("float8_e4m3fn", 4, -6, 8, 448.0)
E5M2 = Form("float8_e5m2", 3, -14, 15, 57344.0)
E2M1 = Form("float4_e2m1", 2, 0, 2, 6.0, in_byte=2)
FORMS = {form.name: form for form in (E4M3, E5M2, E2M1)}
MX_BLOCK = 32  # elements that share an exponent, in MX
