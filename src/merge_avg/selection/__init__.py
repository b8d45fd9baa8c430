"""Which checkpoints, and how much of each?

`choose` answers both. It expands what the user named, reads what each checkpoint says about itself,
picks what is asked for, and weighs it.
"""

from __future__ import annotations

from merge_avg.selection._choose import Choice, choose
from merge_avg.selection._metadata import read_metadata

__all__ = ["Choice", "choose", "read_metadata"]
