"""Averages that go into a model: its tensors are filled where an output file would be written."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from merge_avg.checkpoint import Name
from merge_avg.errors import MergeError, named
from merge_avg.plan import FILE, Job

_HINT = "load into the module that was saved, such as model.module, or give strict=False"


@dataclass(frozen=True)
class Matched:
    """The tensors of a model that an average goes into, and the names that only one of them has."""

    tensors: Mapping[str, tuple[Tensor, torch.dtype]]  # by name, with the dtype of the average
    twins: Mapping[str, str]  # tied to another name of the model, and not in the checkpoints
    missing: tuple[str, ...]  # which the checkpoints lack
    unexpected: tuple[str, ...]  # which the model lacks


def match(model: nn.Module, job: Job, *, strict: bool) -> Matched:
    """Find the tensors of a model that go by the names of a job's average.

    Raises:
        MergeError: a shape or a kind of numbers differs; or a name, where it is strict.
    """
    ours, places = _own(model), defaultdict(set)
    for key, one in ours.items():
        places[_place(one)].add(key)
    written, aligned, where = job.layout.files[FILE].rooms, job.plan.aligned, job.layouts[0].path
    names = (*aligned.rows, *job.plan.composed)
    theirs = {name.key: name for name in names if name.key in written}
    for composite in job.plan.composites:
        keys = [one.name.key for one in composite.results]
        lacking = [key for key in keys if key not in ours]
        if 0 < len(lacking) < len(keys):  # codes are no numbers without their scales
            what = f"{composite.name!r} means nothing without {named(lacking)}, which"
            hint = "--dtype float32 gives numbers; or load into a model that is quantised alike"
            what += " the model lacks"
            raise MergeError(what, where=where, hint=hint, tensor=composite.name)
    # Of names that are tied, a file may have one.
    missing = tuple(key for key in ours if places[_place(ours[key])].isdisjoint(theirs))
    unexpected = tuple(key for key in theirs if key not in ours)
    if strict and unexpected:
        what = f"it has {named(unexpected)}, which the model lacks"
        raise MergeError(what, where=where, hint=_HINT, tensor=unexpected[0])
    if strict and missing:
        what = f"it lacks {named(missing)}, which the model has"
        raise MergeError(what, where=where, hint=_HINT, tensor=missing[0])
    homes = {name: unit.number for unit in job.plan.units for name, _ in unit.members}
    tensors: dict[str, tuple[Tensor, torch.dtype]] = {}
    twins: dict[str, str] = {}
    firsts: dict[object, str] = {}
    for key in (key for key in theirs if key in ours):
        tensors[key] = ours[key], _fitting(ours[key], theirs[key], job)
        first = firsts.setdefault(_place(ours[key]), key)
        if homes.get(theirs[first]) != homes.get(theirs[key]):
            twins[key] = first
    return Matched(tensors, twins, missing, unexpected)


def _own(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and persistent buffers of a model by the names of its state dict."""
    # Not those of the state dict itself, which hooks may have copied.
    held: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    held |= dict(model.named_buffers(remove_duplicate=False))
    found = {}
    for key, value in model.state_dict().items():
        if key in held:
            found[key] = held[key].detach()
        elif isinstance(value, Tensor):
            what = f"{key!r} in the state dict of the model is neither a parameter nor a buffer"
            raise MergeError(what, hint="write a file with merge_checkpoints, and load that")
    return found


def _place(tensor: Tensor) -> object:
    # Empty ones, and those without memory, are each their own.
    plain = tensor.numel() and tensor.layout == torch.strided and not tensor.is_meta
    return (tensor.device, tensor.data_ptr(), tensor.stride()) if plain else id(tensor)


def _fitting(tensor: Tensor, name: Name, job: Job) -> torch.dtype:
    """Return the dtype of the average of a tensor of a model, which can hold its numbers."""
    composed, shape, where = job.plan.composed.get(name), tuple(tensor.shape), job.layouts[0].path
    key = name.key
    theirs = job.plan.aligned.template(name).shape if composed is None else composed.shape
    if theirs != shape:
        what = f"tensor {key!r} has the shape {theirs}, and {shape} in the model"
        hint = "make the model as it was when it was saved"
        raise MergeError(what, where=where, hint=hint, tensor=key)
    if tensor.is_meta or tensor.layout != torch.strided:
        what = f"{key!r} of the model has no plain data (it is on {tensor.device})"
        raise MergeError(what, hint="give it memory first: model.to_empty(device=...)")
    if any(extent > 1 and not step for extent, step in zip(shape, tensor.stride(), strict=True)):
        what = f"{key!r} of the model repeats its elements, as expand does"
        raise MergeError(what, hint="give each its own memory, with .contiguous()")
    dtype: torch.dtype = getattr(torch, job.plan.result(name).name)
    kinds = {(one.is_complex, one.is_floating_point) for one in (dtype, tensor.dtype)}
    if len(kinds) > 1 or (dtype != tensor.dtype and kinds == {(False, False)}):
        what = f"tensor {key!r} is {dtype}, and {tensor.dtype} in the model"
        raise MergeError(what, where=where, hint="give them numbers of one kind", tensor=key)
    return dtype


class ModelSink:
    """Where an average goes: tensors of a model, on any device; a `Sink`.

    A tensor of another dtype gets the average rounded once more, by torch.
    """

    def __init__(self, matched: Matched, folder: Path) -> None:
        self.folder = folder
        self._tensors = matched.tensors
        self._twins = matched.twins
        # A tensor whose elements do not lie in order is filled by way of one that has them so.
        self._flat: dict[str, Tensor] = {}
        for name, (tensor, dtype) in matched.tensors.items():
            straight = tensor.is_contiguous() and name not in self._twins
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
        """Bring those elements into their order that lie in another.

        Raises:
            MergeError: tensors that the model ties have averages that differ.
        """
        for name, (tensor, _) in self._tensors.items():
            if not tensor.is_contiguous() and name not in self._twins:
                tensor.copy_(self._flat[name].view(tensor.shape))
        for name, first in self._twins.items():
            tensor, found = self._tensors[name][0], self._flat[name]
            if not torch.equal(found.to(tensor).view(tensor.shape), tensor):
                what = f"the model ties {name!r} and {first!r}, whose averages differ"
                raise MergeError(what, hint="untie them in the model", tensor=name)

    def publish(self) -> None:
        """Do nothing: the model has its weights."""
