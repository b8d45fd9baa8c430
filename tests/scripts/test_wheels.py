"""The wheel scripts: an exact mean of their own, and the names of libraries."""

import runpy
import struct
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from merge_avg.io import LIBRARY_SUFFIX

SCRIPTS = Path(__file__).parents[2] / "scripts"
TRY = runpy.run_path(str(SCRIPTS / "try_wheel.py"))
TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@given(st.sampled_from(list(TORCH)), st.integers(0, (1 << 32) - 1))
def test_bits_stand_for_the_number_that_torch_has(name, word):
    """Of each finite number, subnormals included."""
    nbytes = TRY["DTYPES"][name][0]
    word >>= 32 - 8 * nbytes
    number = torch.frombuffer(bytearray(word.to_bytes(nbytes, "little")), dtype=TORCH[name])
    if number.isfinite():
        assert TRY["value"](word, *TRY["DTYPES"][name]) == Fraction(number.item())


@given(st.sampled_from(["F16", "BF16"]), st.integers(0, (1 << 32) - 1))
def test_a_number_is_rounded_as_torch_rounds_it(name, word):
    """A float32 number becomes the nearest one of 16 bits, ties to even."""
    number = torch.tensor(struct.unpack("<f", struct.pack("<I", word)))
    rounded = number.to(TORCH[name])
    if number.isfinite() and rounded.isfinite():
        found = TRY["rounded"](Fraction(number.item()), *TRY["DTYPES"][name][1:])
        assert found == Fraction(rounded.item())


def test_a_library_has_the_name_that_is_looked_for():
    """For the platform of each wheel, and for this one."""
    pytest.importorskip("hatchling")
    name = runpy.run_path(str(SCRIPTS / "build_kernel.py"))["library_name"]
    systems = {"manylinux": ".so", "musllinux": ".so", "macosx": ".dylib", "win": ".dll"}
    for system, suffix in systems.items():
        assert name(f"{system}_2_17_x86_64") == f"_loops{suffix}"
    here = {"win32": "win", "darwin": "macosx"}.get(sys.platform, "linux")
    assert name(here) == f"_loops{LIBRARY_SUFFIX}"
