"""Average the weights of PyTorch checkpoints: exactly, in bounded memory, without running them.

AverageModelMerger(models).merge_models()       models in memory
merge_checkpoints(paths, output)                files, as the command merge-avg does it
verify_output(path)                             whether a file is the mean that it says it is
RunningMean(count)                              tensors, one at a time
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from merge_avg._version import __version__
from merge_avg.errors import MergeError, UsageError

if TYPE_CHECKING:
    from merge_avg.arithmetic import Weights
    from merge_avg.arithmetic.torch_mean import RunningMean
    from merge_avg.engine import Result, merge_checkpoints
    from merge_avg.merger import AverageModelMerger, recalibrate_batch_norm
    from merge_avg.verify import Verification, verify_output

__all__ = [
    "AverageModelMerger",
    "MergeError",
    "Result",
    "RunningMean",
    "UsageError",
    "Verification",
    "Weights",
    "__version__",
    "merge_checkpoints",
    "recalibrate_batch_norm",
    "verify_output",
]

# Imported when they are first asked for: torch takes seconds, and the command's help needs none.
_HOMES = {
    "AverageModelMerger": "merger",
    "Result": "engine",
    "RunningMean": "arithmetic.torch_mean",
    "Verification": "verify",
    "Weights": "arithmetic",
    "merge_checkpoints": "engine",
    "recalibrate_batch_norm": "merger",
    "verify_output": "verify",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
