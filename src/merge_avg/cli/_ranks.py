"""The command as one of several ranks: one tells the user, and all end together."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from merge_avg.errors import RankError, UsageError

if TYPE_CHECKING:
    from merge_avg.parts import Ranks, Seat


LIMITS: dict[str, float] = {}  # as `Meeting` has them: tests do not wait as long


def seated() -> Seat | None:
    """Return this process's place among ranks, if it is one of several."""
    # Most runs have none of these variables, and import nothing to learn that.
    if not {"RANK", "SLURM_STEP_NUM_TASKS"} & os.environ.keys():
        return None
    from merge_avg.parts import find_seat

    return find_seat(os.environ)


@contextlib.contextmanager
def joined() -> Iterator[Ranks | None]:
    """Meet the other ranks, if there are any, and yield the crew of all."""
    seat = seated()
    if seat is None:
        yield None
        return
    from merge_avg.parts import Ranks

    # Torch would tell of a store that is gone in forty lines.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    with Ranks(seat, abandon=_abandon, **LIMITS) as crew:
        yield crew


def leaves_it(command: str) -> bool:
    """Return whether another rank does what one process does; UsageError for a soup."""
    seat = seated()
    if seat is not None and command == "soup" and not seat.rank:
        hint = "run it in one process; its merges are small"
        raise UsageError("a soup is not made by several ranks", hint=hint)
    return seat is not None and seat.rank > 0


def _abandon(error: RankError) -> None:
    """End the process, one of whose threads hangs: no exception reaches it."""
    from merge_avg.cli._process import say

    if not error.told:
        say(f"error: {error.message}")
    os._exit(1)
