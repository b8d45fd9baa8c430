"""Where is the loop? Opening, reading, averaging, writing and publishing.

`_run` is the whole merge, `_worker` the loop over windows and checkpoints.
"""

from __future__ import annotations

from merge_avg.engine._readahead import read_ahead
from merge_avg.engine._run import Opened, Result, run, shares

__all__ = ["Opened", "Result", "read_ahead", "run", "shares"]
