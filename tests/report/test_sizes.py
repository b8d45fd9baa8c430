"""Numbers as they are shown."""

from merge_avg.report import sizes


def test_bytes_are_shown_in_decimal_units():
    """Units are those that disks are sold by; gigabytes are the largest."""
    assert [sizes.shown(n) for n in (12, 1500, 2_400_000_000)] == ["12 bytes", "1.5 kB", "2.4 GB"]
    assert sizes.shown(3e12) == "3,000.0 GB"


def test_counts_have_a_plural():
    """One thing is one thing, and of many the digits are grouped."""
    assert [sizes.counted(n, "tensor") for n in (0, 1, 1200)] == [
        "0 tensors",
        "1 tensor",
        "1,200 tensors",
    ]
