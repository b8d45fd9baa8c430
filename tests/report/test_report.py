"""Names, numbers and tables as they are shown, on a terminal and in the log of a CI job."""

import subprocess
import sys

import pytest

from merge_avg.errors import counted
from merge_avg.report import aligned, printable, shown


@pytest.mark.parametrize("text", ["plain.pt", "é漢 a:b", "#1", "a::b", "[red]"])
def test_ordinary_names_stay(text):
    """Letters of any language, and signs that mean nothing, are shown as they are."""
    assert printable(text) == text


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("\x1b[31m", "\\x1b[31m"),
        ("a\nb\r", "a\\nb\\r"),
        ("\u202ea", "\\u202ea"),
        ("\udc80", "\\udc80"),
    ],
)
def test_controls_are_escaped(text, safe):
    """Escapes, line ends, changes of direction and undecodable bytes are written out."""
    assert printable(text) == safe


@pytest.mark.parametrize("text", ["::error::x", "  ::warning::x", "a##[group]b"])
def test_a_runner_gets_no_commands(text):
    """GitHub's runner finds neither of its two forms of commands."""
    safe = printable(text)
    assert not safe.lstrip().startswith("::")
    assert "##[" not in safe


def test_bytes_are_shown_in_decimal_units():
    """Units are those that disks are sold by; gigabytes are the largest."""
    assert [shown(n) for n in (12, 1500, 2_400_000_000)] == ["12 bytes", "1.5 kB", "2.4 GB"]
    assert shown(3e12) == "3,000.0 GB"


def test_counts_have_a_plural():
    """One thing is one thing, and of many the digits are grouped."""
    assert [counted(n, "tensor") for n in (0, 1, 1200)] == [
        "0 tensors",
        "1 tensor",
        "1,200 tensors",
    ]


def test_rows_are_aligned():
    """Cells stand below each other; an empty column takes no room, a very long cell no more."""
    rows = [("a", "", "bcd", "e"), ("fghi", "", "j", "")]
    assert list(aligned(rows)) == ["a    bcd e", "fghi j"]
    assert list(aligned(rows, gap="  ")) == ["a     bcd  e", "fghi  j"]
    assert list(aligned([("a" * 9, "b"), ("c", "d")], widest=3)) == ["aaaaaaaaa b", "c   d"]
    assert list(aligned([])) == []


def test_the_face_is_light():
    """Importing it, as the command does for --help, imports no report."""
    code = (
        "import sys, merge_avg.report\n"
        "assert not {name for name in sys.modules if name.startswith('merge_avg.')} - "
        "{'merge_avg._version', 'merge_avg.errors', 'merge_avg.report'}\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
