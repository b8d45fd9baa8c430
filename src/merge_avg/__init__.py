"""Average the weights of PyTorch checkpoints: exactly, in bounded memory, without running them.

    merge_checkpoints(paths, output)            average files, as the command merge-avg does
    verify_output(path)                         derive an output again, and compare every byte
    AverageModelMerger(models).merge_models()   average models that are in memory
    RunningMean(count)                          average tensors, one at a time

What a user can cause to go wrong raises `MergeError`, with a hint where there is a next step.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from merge_avg._version import __version__
from merge_avg.errors import MergeError, MergeWarning, UsageError

if TYPE_CHECKING:
    from merge_avg.arithmetic import Weights
    from merge_avg.arithmetic.torch_mean import RunningMean
    from merge_avg.engine import Result, merge_checkpoints
    from merge_avg.merger import AverageModelMerger, recalibrate_batch_norm
    from merge_avg.verify import Verification, verify_output

__all__ = [
    "AverageModelMerger",
    "MergeError",
    "MergeWarning",
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

# Imported when they are first asked for: importing torch takes seconds, and most of the command
# needs none of it.
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
