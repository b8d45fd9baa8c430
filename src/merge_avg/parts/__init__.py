"""Who does which part? Ranks, parts and resumption of a merge that takes more than one process.

A merge is a set of stretches. Whoever works through one forces its bytes to the disk and leaves a
ledger: hashes, checksums, products. Finishing adds the ledgers up and publishes. So nothing but a
few kilobytes has to travel between processes, and a run that was killed loses half a stretch.
"""

from __future__ import annotations

from merge_avg.parts._crew import Crew, Part, Planned, RankRate
from merge_avg.parts._ledger import Ledger
from merge_avg.parts._ranks import Ranks
from merge_avg.parts._seat import Seat, find_seat
from merge_avg.parts._stretches import Stretch, Work

__all__ = [
    "Crew",
    "Ledger",
    "Part",
    "Planned",
    "RankRate",
    "Ranks",
    "Seat",
    "Stretch",
    "Work",
    "find_seat",
]
