"""Averages that go into a model: its tensors are filled where an output file would be written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from merge_avg.errors import MergeError, named
from merge_avg.plan import FILE, Job

_HINT = "load into the module that was saved, such as model.module, or give strict=False"


@dataclass(frozen=True)
class Matched:
    """The tensors of a model that an average goes into, and the names that only one of them has."""

    tensors: Mapping[str, tuple[Tensor, torch.dtype]]  # by name, with the dtype of the average
    missing: tuple[str, ...]  # which the checkpoints lack
    unexpected: tuple[str, ...]  # which the model lacks


def match(model: nn.Module, job: Job, *, strict: bool) -> Matched:
    """Find the tensors of a model that go by the names of a job's average.

    Raises:
        MergeError: a shape differs; or a name, where it is strict.
    """
    ours = {key: one for key, one in model.state_dict().items() if isinstance(one, Tensor)}
    written, aligned, where = job.layout.files[FILE].rooms, job.plan.aligned, job.layouts[0].path
    theirs = {name.key: name for name in aligned.rows if name.key in written}
    missing = tuple(key for key in ours if key not in theirs)
    unexpected = tuple(key for key in theirs if key not in ours)
    if strict and unexpected:
        what = f"it has {named(unexpected)}, which the model lacks"
        raise MergeError(what, where=where, hint=_HINT, tensor=unexpected[0])
    if strict and missing:
        what = f"it lacks {named(missing)}, which the model has"
        raise MergeError(what, where=where, hint=_HINT, tensor=missing[0])
    tensors = {}
    for key in (key for key in theirs if key in ours):
        info, shape = aligned.template(theirs[key]), tuple(ours[key].shape)
        if info.shape != shape:
            what = f"tensor {key!r} has the shape {info.shape}, and {shape} in the model"
            hint = "make the model as it was when it was saved"
            raise MergeError(what, where=where, hint=hint, tensor=key)
        if ours[key].is_meta or ours[key].layout != torch.strided:
            what = f"{key!r} of the model has no plain data (it is on {ours[key].device})"
            raise MergeError(what, hint="give it memory first: model.to_empty(device=...)")
        tensors[key] = ours[key], getattr(torch, job.plan.result(theirs[key]).name)
    return Matched(tensors, missing, unexpected)


class ModelSink:
    """Where an average goes: tensors of a model, on any device; a `Sink`.

    A tensor of another dtype gets the average rounded once more, by torch.
    """

    def __init__(self, tensors: Mapping[str, tuple[Tensor, torch.dtype]], folder: Path) -> None:
        self.folder = folder
        self._tensors = tensors
        # A tensor whose elements do not lie in order is filled by way of one that has them so.
        self._flat: dict[str, Tensor] = {}
        for name, (tensor, dtype) in tensors.items():
            straight = tensor.is_contiguous()
            room = tensor if straight else torch.empty(tensor.shape, dtype=dtype)
            self._flat[name] = room.view(-1)

    def write(self, number: int, name: str, at: int, data: memoryview) -> None:  # noqa: ARG002
        """Fill elements of a tensor, from any thread; `at` and the data are whole elements."""
        if name not in self._tensors:
            return
        _, dtype = self._tensors[name]
        start = at // dtype.itemsize
        some = torch.frombuffer(data, dtype=dtype)
        self._flat[name][start : start + len(some)].copy_(some)

    def complete(self, record: bytes) -> None:  # noqa: ARG002
        """Bring those elements into their order that lie in another."""
        for name, (tensor, _) in self._tensors.items():
            if not tensor.is_contiguous():
                tensor.copy_(self._flat[name].view(tensor.shape))

    def publish(self) -> None:
        """Do nothing: the model has its weights."""
