"""Composites under way: how one reads its tensors, with hashes and checksums, and writes."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING

from xxhash import xxh3_128

from merge_avg.checkpoint import Composite, DType, dotted
from merge_avg.engine._workspace import Workspace
from merge_avg.errors import MergeError
from merge_avg.io import Buffer

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_SEED = 1 << 63  # seeds of units and of copied records lie below and above


class Access:
    """The access of composite `number` of a merge; see `checkpoint.Access`."""

    def __init__(self, space: Workspace, number: int, hashes: list[int]) -> None:
        self._space, self._number = space, number
        self._composite: Composite = space.job.plan.composites[number]
        self._hashes = hashes  # the worker's sums, by checkpoint
        self._digests: dict[tuple[int, int], tuple[int, xxh3_128]] = {}
        self._errors: list[tuple[float, float]] = []

    @cached_property
    def weights(self) -> Sequence[Sequence[Fraction]]:
        """Return the weights of the checkpoints in each output."""
        rows = (output.weights for output in self._space.job.outputs)
        return [[Fraction(value, row.total) for value in row.integers] for row in rows]

    @property
    def compared(self) -> Sequence[int]:
        """Return the checkpoints whose products `compare` takes."""
        return self._space.comparison.checkpoints

    def read(
        self, checkpoint: int, tensor: int, start: int, stop: int, *, again: bool = False
    ) -> Tensor:
        """Return elements of a tensor as a vector."""
        info = self._composite.sources[checkpoint][tensor]
        size = info.dtype.itemsize
        buffer = Buffer((stop - start) * size)
        data = buffer.bytes((stop - start) * size)
        at = (info.start + start) * size
        self._space.readers[checkpoint].read(data, info.storage, at, again=again)
        found = buffer.tensor(stop - start, _torch_dtype(info.dtype))
        if not again:
            self._hash(checkpoint, tensor, start, data)
            self._space.findings.count(len(data))
            refused = self._composite.finite and info.dtype.kind == "float"
            if refused and not bool(found.double().isfinite().all()):
                layout = self._space.job.layouts[checkpoint]
                name = dotted(info.path)
                what = f"tensor {name!r} holds NaN or infinity, which no product has a use for"
                raise MergeError(what, where=layout.where(info), tensor=name)
        return found

    def write(self, output: int, result: int, start: int, values: Tensor) -> None:
        """Write elements of a result."""
        one, numel = self._composite.results[result], values.numel()
        buffer = Buffer(numel * one.dtype.itemsize)
        made = buffer.tensor(numel, _torch_dtype(one.dtype))
        made.copy_(values.reshape(-1))
        refused = self._composite.finite and one.dtype.kind == "float"
        if refused and not bool(made.double().isfinite().all()):
            what = f"the mean of {str(one.name)!r} is too large for {one.dtype.name}"
            hint = "choose a wider dtype, for example --dtype float32"
            raise MergeError(what, where=self._space.job.layouts[0].path, hint=hint)
        data = buffer.bytes(numel * one.dtype.itemsize)
        target = self._space.job.layout.placed[one.name]
        at = target.at + start * one.dtype.itemsize
        self._space.sinks[output].write(target.file, target.slot, at, data)

    def compare(self, gram: Sequence[Sequence[float]]) -> None:
        """Take the inner products in all pairs of compared checkpoints."""
        self._space.comparison.add(self._number, gram)

    def approximated(self, error: float, norm: float) -> None:
        """Take the squared norms of the result's error, and of what it stands for."""
        self._space.findings.approximated(self._composite.name, error, norm)

    def _hash(self, checkpoint: int, tensor: int, start: int, data: memoryview) -> None:
        if not self._space.job.options.hashes:
            return
        key = checkpoint, tensor
        if key not in self._digests:
            seed = _SEED | self._number << 8 | tensor
            self._digests[key] = 0, xxh3_128(seed=seed)
        done, digest = self._digests[key]
        info = self._composite.sources[checkpoint][tensor]
        assert start == done, "read in order"  # noqa: S101 - the composite's own fault
        digest.update(data)
        done += len(data) // info.dtype.itemsize
        self._digests[key] = done, digest
        if done == info.numel:
            self._hashes[checkpoint] += digest.intdigest()


def _torch_dtype(dtype: DType) -> torch.dtype:
    """Return torch's dtype; codes are bytes, as not every torch knows them."""
    import torch

    found = torch.uint8 if dtype.kind == "code" else getattr(torch, dtype.name)
    assert isinstance(found, torch.dtype)  # noqa: S101 - all others have one
    return found
