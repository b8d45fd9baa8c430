"""The library's one call for a merge of files. Its keywords are the fields of `Options`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Concatenate, ParamSpec

from merge_avg.engine._run import Result, run
from merge_avg.options import Location, Options, Outputs, meanings
from merge_avg.plan import prepare

P = ParamSpec("P")


@dataclass(frozen=True, kw_only=True)
class _Call(Options):
    """The keywords of `merge_checkpoints`: the options, and where to report progress."""

    progress: Callable[[int], None] | None = None


_Plain = Callable[[Sequence[Location], Outputs, _Call], Result]


def _with_options(
    options: Callable[P, _Call],
) -> Callable[[_Plain], Callable[Concatenate[Sequence[Location], Outputs, P], Result]]:
    """Give a function the keywords of `Options`, so that each option is declared in one place."""

    def decorate(
        function: _Plain,
    ) -> Callable[Concatenate[Sequence[Location], Outputs, P], Result]:
        first, second, _ = inspect.signature(function).parameters.values()
        named = inspect.signature(options).parameters.values()
        signature = inspect.Signature([first, second, *named])

        @functools.wraps(function)
        def called(*args: Any, **kwargs: Any) -> Result:
            given = signature.bind(*args, **kwargs).arguments
            paths, output = given.pop("paths"), given.pop("output")
            return function(paths, output, _Call(**given))

        # Type checkers see the ParamSpec; `help()` and editors see these.
        called.__signature__ = signature  # type: ignore[attr-defined]
        texts = "\n".join(f"        {name}: {one.help}" for name, one in meanings(Options))
        called.__doc__ = str(function.__doc__).replace("        options: by name.", texts)
        return called

    return decorate


@_with_options(_Call)
def merge_checkpoints(
    paths: Sequence[Location],
    output: Outputs,
    options: _Call,
) -> Result:
    """Average checkpoints into a new one, in bounded memory.

    The output is the first checkpoint, the template, with its weights replaced by their mean. Float
    and complex tensors get the exact weighted mean, rounded once to their dtype; so the result does
    not depend on the order of the checkpoints, nor on threads, memory or device.

    Args:
        paths: checkpoints of one architecture: files (.pt, .pth, .bin, .ckpt, .safetensors) or
            directories of them.
        output: the file or directory to write; the ending .safetensors asks for that format. Or
            several, with the weights of the checkpoints for each: all are made in one reading, and
            all are copies of one template.
        options: by name.
        progress: called with the number of bytes read since the last call, from any thread.

    Raises:
        MergeError: nothing was written; the message names the file and the tensor.
        UsageError: the options do not fit each other.
    """
    return run(prepare(paths, output, options), options.progress)
