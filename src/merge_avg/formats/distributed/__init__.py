"""Directories of torch.distributed.checkpoint: each rank wrote its chunks of the tensors.

.metadata          pickle: shape, dtype and chunks of each tensor, and where each chunk lies
__0_0.distcp       chunks of rank 0, one after the other; each is an archive of torch.save
__1_0.distcp       chunks of rank 1
...
"""

from __future__ import annotations

from merge_avg.formats.distributed.read import scan_set
from merge_avg.formats.distributed.write import copy

__all__ = ["copy", "scan_set"]
