"""What is the mean of low-rank adapters? That of the products of their factors.

An adapter (LoRA, Hu et al. 2022) changes a weight by scaling * B @ A. The mean of such changes is
not the product of the means of B and A. It is found exactly, as one adapter whose rank is the sum
of the ranks; or nearly, as the best adapter of a given rank (Eckart and Young 1936).
"""

from __future__ import annotations

from merge_avg.adapters._described import Adapters
from merge_avg.adapters._find import find

__all__ = ["Adapters", "find"]
