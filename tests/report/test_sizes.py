"""merge_avg.sizes: numbers of bytes as people write them."""

import pytest

from merge_avg.errors import UsageError
from merge_avg.report import sizes


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("512", 512), ("1K", 1024), ("64MiB", 64 << 20), ("2 gb", 2 * 10**9), ("1.5G", 3 << 29)],
)
def test_sizes_are_parsed(text, nbytes):
    """Units are decimal with B and binary with iB or alone."""
    assert sizes.parse(text) == nbytes


@pytest.mark.parametrize("text", ["", "x", "-1", "1 XB", "1e3", "MiB"])
def test_other_texts_are_usage_errors(text):
    """What is no size is wrong usage, with an example."""
    with pytest.raises(UsageError, match="is not a size"):
        sizes.parse(text)


def test_sizes_are_shown_in_decimal_units():
    """Bytes are shown as disks count them."""
    assert [sizes.shown(n) for n in (12, 1500, 2_400_000_000)] == ["12 bytes", "1.5 kB", "2.4 GB"]
