"""Average the weights of PyTorch checkpoints: exactly, in bounded memory, without running them.

    merge_checkpoints(paths, output)            average files, as the command merge-avg does
    load_average(model, paths)                  fill a model with their average
    select_checkpoints(run, last=5)             choose checkpoints of a run, without a merge
    inspect_checkpoints(paths)                  list what is in files, and what would be averaged
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
    from merge_avg.api import (
        Loaded,
        Selection,
        inspect_checkpoints,
        load_average,
        merge_checkpoints,
        select_checkpoints,
    )
    from merge_avg.arithmetic import Weights
    from merge_avg.arithmetic.torch_mean import RunningMean
    from merge_avg.engine import Result
    from merge_avg.merger import AverageModelMerger, recalibrate_batch_norm
    from merge_avg.report.inspect import Contents
    from merge_avg.verify import Verification, verify_output

__all__ = [
    "AverageModelMerger",
    "Contents",
    "Loaded",
    "MergeError",
    "MergeWarning",
    "Result",
    "RunningMean",
    "Selection",
    "UsageError",
    "Verification",
    "Weights",
    "__version__",
    "inspect_checkpoints",
    "load_average",
    "merge_checkpoints",
    "recalibrate_batch_norm",
    "select_checkpoints",
    "verify_output",
]

# Imported when they are first asked for: importing torch takes seconds, and most of the command
# needs none of it.
_HOMES = {
    "AverageModelMerger": "merger",
    "Contents": "report.inspect",
    "Loaded": "api",
    "Result": "engine",
    "RunningMean": "arithmetic.torch_mean",
    "Selection": "api",
    "Verification": "verify",
    "Weights": "arithmetic",
    "inspect_checkpoints": "api",
    "load_average": "api",
    "merge_checkpoints": "api",
    "recalibrate_batch_norm": "merger",
    "select_checkpoints": "api",
    "verify_output": "verify",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        what = f"{name} needs torch, which is not installed\nhint: pip install torch"
        raise ImportError(what, name="torch") from None


def __dir__() -> list[str]:
    from importlib.util import find_spec  # `help` wants all that is listed to be there

    lost = () if find_spec("torch") else ("merger", "arithmetic.torch_mean")
    return sorted(name for name in __all__ if _HOMES.get(name) not in lost)
