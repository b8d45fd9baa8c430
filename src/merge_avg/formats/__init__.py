"""How is a checkpoint stored? Readers and writers for each file format, and for directories."""

from __future__ import annotations

from merge_avg.formats._registry import DCP, rebuilt
from merge_avg.formats._scan import scan

__all__ = ["DCP", "rebuilt", "scan"]
