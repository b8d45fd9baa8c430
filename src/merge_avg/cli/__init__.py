"""Which option, which exit code? The command: what it takes, does, shows and returns.

`_app` has the command, with its parameters from `_parameters`, and `_process` what surrounds it.
A merge and a soup have a module each.
"""

from __future__ import annotations

from merge_avg.cli._process import entry, main

__all__ = ["entry", "main"]
