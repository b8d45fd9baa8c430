"""Which option, which exit code? The command: what it takes, does, shows and returns.

`_app` has the command, and `_process` what surrounds it. Each task has a module: `_merge`, `_soup`,
`_inspect` and `_verify`.
"""

from __future__ import annotations

from merge_avg.cli._process import entry, main

__all__ = ["entry", "main"]
