"""Which option, which exit code? The command: what it takes, does, shows and returns."""

from __future__ import annotations

from merge_avg.cli._process import entry, main

__all__ = ["entry", "main"]
