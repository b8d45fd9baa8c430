"""merge_avg.formats.pickle.allowance: objects are paid for, and small pickles buy few."""

import pytest

from merge_avg.formats.pickle.allowance import Allowance
from merge_avg.formats.pickle.values import PickleError


@pytest.mark.parametrize(
    ("read", "limit"),
    [
        (0, 300_000),
        (1000, 500_000),
        (1_000_000, 180_000_000),
        (100_000_000, 2_400_000_000),
    ],
)
def test_the_limit_grows_with_what_was_read(read, limit):
    """Quickly up to 180 MB, and in proportion to the pickle beyond."""
    allowance = Allowance(read=read)
    allowance.spend(limit)
    with pytest.raises(PickleError, match="more memory"):
        allowance.spend(1)


def test_packed_pickles_count_for_less():
    """A byte of a pickle that was packed to a tenth buys a tenth."""
    allowance = Allowance(0.1, read=1000)
    allowance.spend(320_000)
    with pytest.raises(PickleError, match="more memory"):
        allowance.spend(1)


def test_a_limit_never_shrinks():
    """What the caller allows stays allowed."""
    allowance = Allowance(limit=4_000_000)
    allowance.spend(4_000_000)
    with pytest.raises(PickleError):
        allowance.spend(1)
