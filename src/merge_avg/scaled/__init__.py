"""What are codes worth, and which codes has a mean? Tensors that are stored with scales.

`recognise` finds them among the tensors of a checkpoint; a `Scaled` is one of them in all of a
merge's checkpoints, as a composite: its numbers are averaged, and become codes with new scales by
the rule of their scheme. Nothing here imports torch before numbers are computed.
"""

from __future__ import annotations

from merge_avg.scaled._config import KEY, NO_CONFIG, Config, config_of
from merge_avg.scaled._recognise import Group, Recognised, recognise
from merge_avg.scaled._scaled import Scaled, consumed

__all__ = [
    "KEY",
    "NO_CONFIG",
    "Config",
    "Group",
    "Recognised",
    "Scaled",
    "config_of",
    "consumed",
    "recognise",
]
