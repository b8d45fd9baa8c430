"""How is a soup made? Checkpoints are added one at a time, as long as an evaluation approves."""

from __future__ import annotations

from merge_avg.soup._evaluate import score
from merge_avg.soup._greedy import Soup, Trial, greedy

__all__ = ["Soup", "Trial", "greedy", "score"]
