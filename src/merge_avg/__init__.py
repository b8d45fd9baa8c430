"""Average the weights of PyTorch checkpoints: exactly, in bounded memory, without running them.

AverageModelMerger(models).merge_models()       models in memory
merge_checkpoints(paths, output)                files, as the command merge-avg does it
verify_output(path)                             whether a file is the mean that it says it is
RunningMean(count)                              tensors, one at a time
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from merge_avg.errors import MergeError, UsageError

if TYPE_CHECKING:
    from merge_avg.average import RunningMean
    from merge_avg.batch_norm import recalibrate_batch_norm
    from merge_avg.merge import Result, merge_checkpoints
    from merge_avg.merger import AverageModelMerger
    from merge_avg.verify import Verification, verify_output
    from merge_avg.weights import Weights

__version__ = "0.1.0"
__all__ = [
    "AverageModelMerger",
    "MergeError",
    "Result",
    "RunningMean",
    "UsageError",
    "Verification",
    "Weights",
    "merge_checkpoints",
    "recalibrate_batch_norm",
    "verify_output",
]

# Imported when they are first asked for: torch takes seconds, and the command's help needs none.
_HOMES = {
    "AverageModelMerger": "merger",
    "Result": "merge",
    "RunningMean": "average",
    "Verification": "verify",
    "Weights": "weights",
    "merge_checkpoints": "merge",
    "recalibrate_batch_norm": "batch_norm",
    "verify_output": "verify",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
