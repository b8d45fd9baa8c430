"""Which option, which exit code? The command: it parses options, shows progress, reports errors."""

from __future__ import annotations

from merge_avg.cli._app import entry, main

__all__ = ["entry", "main"]
