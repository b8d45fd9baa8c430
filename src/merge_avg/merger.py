"""Averages models that are in memory, and recalibrates the result's BatchNorm statistics.

The class is named after, and used like, the AverageModelMerger of the package zetascale.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.optim.swa_utils import update_bn

from merge_avg.agreement import Agreement, agreement, agreement_about, judge
from merge_avg.arithmetic import Mean, MeanFactory, Weight, Weights, is_counter
from merge_avg.arithmetic.torch_mean import TorchMean
from merge_avg.checkpoint import is_matrix
from merge_avg.errors import MergeError, MergeWarning
from merge_avg.options import numbers

# Elements that are averaged at a time: few enough to stay in a cache from the sum to the result.
_CHUNK = 1 << 17
_COMPARED = 1 << 14  # elements of each matrix: of so many a cosine is known to 0.01
M = TypeVar("M", bound=nn.Module)


class AverageModelMerger(Generic[M]):
    """Averages the weights of models of one architecture.

    Args:
        models: the models, which are not changed: a list of them, or an nn.ModuleList.
        weights: one number for each model, zero or above; by default all count the same.
        allow_nonfinite: average NaN and infinity too, as IEEE 754 says.

    Raises:
        TypeError: `models` is not a list, or something in it is not an nn.Module.
        ValueError: the list is empty, or there are not as many weights as models.
    """

    def __init__(
        self,
        models: Iterable[M],
        weights: Sequence[Weight] | None = None,
        *,
        allow_nonfinite: bool = False,
    ) -> None:
        # Other modules that are iterable, such as nn.Sequential, are one model.
        single = isinstance(models, nn.Module) and not isinstance(models, nn.ModuleList)
        if single or not isinstance(models, Iterable):
            raise TypeError(f"models must be a list of nn.Module, not {type(models).__name__}")
        models = list(models)
        for index, model in enumerate(models):
            if not isinstance(model, nn.Module):
                raise TypeError(f"models[{index}] is not an nn.Module: {type(model).__name__}")
        if not models:
            raise ValueError("there are no models to average")
        weights = None if weights is None else numbers(weights)
        if weights is not None and len(weights) != len(models):
            raise ValueError(f"{len(weights)} weights for {len(models)} models")
        self.models = models
        self._weights = Weights.uniform(len(models)) if weights is None else Weights.of(weights)
        self._allow_nonfinite = allow_nonfinite

    def merge_models(self) -> M:
        """Return a new model of the first one's type and structure, whose weights are the mean.

        Parameters and persistent buffers of float and complex dtype become the exact weighted mean,
        rounded once. Integer and bool buffers have to be equal, except that counters
        (num_batches_tracked), like all the rest, are the first model's. This takes the memory of
        one more model. Where the mean may be no working network, a `MergeWarning` says why.

        Raises:
            ValueError: the models differ in structure (the message names the first difference), or
                hold NaN or infinity.
        """
        states = [_state(model) for model in self.models]
        for index, state in enumerate(states[1:], start=1):
            _compare(states[0], state, index)
        counted = [index for index, weight in enumerate(self._weights.integers) if weight]
        found = _agreement([states[index] for index in counted])
        for text in judge(found).doubts([f"models[{i}]" for i in counted]) if found else ():
            warnings.warn(text, MergeWarning, stacklevel=2)
        merged = self._copy_model_structure(self.models[0])
        done: set[object] = set()  # tied tensors are averaged once
        with torch.no_grad():
            for name, target in _state(merged).items():
                if _place(target) not in done:
                    self._merge(name, [state[name] for state in states], target)
                    done.add(_place(target))
            _refresh_derived(merged)
        return merged

    @staticmethod
    def _copy_model_structure(model: M) -> M:
        """Copy a model so that it shares no tensor with the original, and keep ties."""
        # `deepcopy` alone refuses tensors that hooks have computed, and gives parameters that share
        # a storage one each. So it finds copies of all plain tensors in its memo.
        memo: dict[int, object] = {}
        storages: dict[int, torch.UntypedStorage] = {}
        for tensor in _tensors(model):
            # A subclass knows how to copy itself.
            plain = type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta
            if plain and tensor.layout == torch.strided:
                memo[id(tensor)] = _copied(tensor, storages)
        return copy.deepcopy(model, memo)

    def _merge(self, name: str, tensors: list[Tensor], target: Tensor) -> None:
        """Write the mean of tensors to `target`, or check that they are equal."""
        first = tensors[0]
        if not (first.is_floating_point() or first.is_complex()):
            for index, other in enumerate(tensors[1:], start=1):
                counts = is_counter(name, first.numel(), is_bool=first.dtype == torch.bool)
                if not counts and not torch.equal(other.to(first.device), first):
                    what = f"buffer {name!r} ({first.dtype}) of models[{index}] is not models[0]'s"
                    raise MergeError(what)
            return
        flats = [_flat(tensor, like=first) for tensor in tensors]
        # The mean is written in place, unless the tensor has gaps or its copy lies in another order
        # than the first model's: then by way of a vector.
        dense = _is_dense(target) and target.stride() == first.stride()
        out = _flat(target, like=first) if dense else torch.empty_like(flats[0])
        dtype = str(first.dtype).removeprefix("torch.")
        mean: Mean
        if all(map(_is_plain, (*flats, out))):
            mean = MeanFactory()(self._weights, dtype, [dtype])
        else:
            mean = TorchMean(self._weights, first.dtype, target.device)
        # One vector at a time: stacking them would take a copy, and hide which model has a NaN.
        for start in range(0, first.numel(), _CHUNK):
            parts = [flat[None, start : start + _CHUNK] for flat in flats]
            for index, part in enumerate(parts):
                mean.extend(part)
                if not mean.finite and not self._allow_nonfinite:
                    raise MergeError(f"{name!r} of models[{index}] holds NaN or infinity")

            def peek(index: int, begin: int, end: int, rows: Sequence[Tensor] = parts) -> Tensor:
                return rows[index][:, begin:end]

            mean.result(out[None, start : start + _CHUNK], peek)
        if not dense:
            target.copy_(out.view(target.shape))


def recalibrate_batch_norm(
    model: nn.Module,
    loader: Iterable[Tensor | tuple[Tensor, ...] | list[Tensor]],
    device: torch.device | str | None = None,
) -> None:
    """Compute the running statistics of a model's BatchNorm layers anew, in place.

    Averaged statistics are not those of the averaged model. This is torch's `update_bn` (Izmailov
    et al. 2018, arXiv:1803.05407, section 3.2): one pass over the data in training mode, without
    gradients, after which the model's own mode is restored.

    The loader gives batches of training inputs, or tuples or lists that begin with one; these are
    moved to `device` first, if it is given.
    """
    update_bn(loader, model, None if device is None else torch.device(device))


def _is_plain(vector: Tensor) -> bool:
    """Return whether a vector is numbers in host memory, one after the other."""
    # A subclass may have no memory, and the bytes do not show a neg bit.
    plain = type(vector) is Tensor and vector.device.type == "cpu"
    return plain and vector.is_contiguous() and not vector.is_neg()


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and persistent buffers by name; those that are tied have several names."""
    transient = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules(remove_duplicate=False)
        for name in module._non_persistent_buffers_set  # noqa: SLF001
    }
    state = dict(model.named_parameters(remove_duplicate=False))
    buffers = model.named_buffers(remove_duplicate=False)
    return state | {name: buffer for name, buffer in buffers if name not in transient}


def _compare(ours: dict[str, Tensor], theirs: dict[str, Tensor], index: int) -> None:
    """Raise for the first difference in structure."""
    for name in (*ours, *theirs):
        if name not in ours or name not in theirs:
            whose = "models[0]" if name in ours else f"models[{index}]"
            raise MergeError(f"only {whose} has {name!r}")
    for name, tensor in ours.items():
        other = theirs[name]
        shapes, dtypes = (tuple(tensor.shape), tuple(other.shape)), (tensor.dtype, other.dtype)
        for what, (one, two) in (("shape", shapes), ("dtype", dtypes)):
            if one != two:
                where = f"{one} in models[0], {two} in models[{index}]"
                raise MergeError(f"{name!r} has the {what} {where}")
        if tensor.is_meta or other.is_meta or tensor.layout != torch.strided:
            raise MergeError(f"{name!r} has no plain data (it is on {tensor.device})")
    # Tensors that are tied in one model only can still be averaged if they hold the same numbers.
    for a, b in sorted(_ties(ours) ^ _ties(theirs)):
        for state, here, there in ((ours, 0, index), (theirs, index, 0)):
            if not torch.equal(state[a], state[b]):
                what = f"{a!r} and {b!r} are tied in models[{there}], but differ in models[{here}]"
                raise MergeError(what)


def _agreement(states: Sequence[Mapping[str, Tensor]]) -> Agreement | None:
    """Return how far models agree about their matrices, from a sample of the elements."""
    grams, tensors = [], []
    for name, first in states[0].items():
        # An odd step meets every column, where rows are a power of two long.
        step = first.numel() // _COMPARED | 1
        flats = [_flat(state[name], like=first)[::step] for state in states]
        plain = first.is_floating_point() and all(type(flat) is Tensor for flat in flats)
        if plain and is_matrix(first.shape):
            rows = torch.stack([flat.to("cpu", torch.float64) for flat in flats])
            rows = rows[:, (rows != rows[0]).any(dim=0)]  # elsewhere nothing was learned
            gram = rows @ rows.T * step
            grams.append(gram.flatten().tolist())
            about = name, tuple(first.shape), first.numel(), first.numel()
            sums = gram.diagonal().tolist(), gram.sum(dim=1).tolist()
            tensors.append(agreement_about(*about, *sums))
    size = sum(tensor.size for tensor in tensors)
    return agreement(grams, tensors, size, size)


def _ties(state: dict[str, Tensor]) -> set[tuple[str, str]]:
    """Return the names of tied tensors, each with the first name of the same tensor."""
    firsts: dict[object, str] = {}
    ties = set()
    for name, tensor in state.items():
        if tensor.numel() and tensor.layout == torch.strided:
            first = firsts.setdefault(_place(tensor), name)
            if first != name:
                ties.add((first, name))
    return ties


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    """Yield every tensor of a model; hooks of torch.nn.utils keep some as plain attributes."""
    for module in model.modules():
        for held in (module._parameters, module._buffers, vars(module)):  # noqa: SLF001
            yield from (value for value in held.values() if isinstance(value, Tensor))


def _copied(tensor: Tensor, storages: dict[int, torch.UntypedStorage]) -> Tensor:
    """Copy a tensor; those that share a storage have copies that share one too."""
    storage = tensor.untyped_storage()
    if storage.data_ptr() not in storages:
        storages[storage.data_ptr()] = storage.clone()
    new = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    raw = storages[storage.data_ptr()]
    new.set_(raw, tensor.storage_offset(), tensor.shape, tensor.stride())
    if isinstance(tensor, nn.Parameter):
        new = nn.Parameter(new, requires_grad=tensor.requires_grad)
    elif hasattr(nn, "Buffer") and isinstance(tensor, nn.Buffer):  # torch has it since 2.5
        new = nn.Buffer(new, persistent=tensor.persistent)
    return new


def _refresh_derived(model: nn.Module) -> None:
    """Compute anew what the hooks of torch.nn.utils.weight_norm and spectral_norm derive."""
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():  # noqa: SLF001
            if isinstance(hook, WeightNorm):
                setattr(module, hook.name, hook.compute_weight(module))
            elif isinstance(hook, SpectralNorm):
                # A power iteration would change the averaged vectors that the norm is taken from.
                setattr(module, hook.name, hook.compute_weight(module, do_power_iteration=False))


def _is_dense(tensor: Tensor) -> bool:
    """Return whether a tensor's elements fill a run of its storage, in whatever order."""
    expected = 1
    for step, extent in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if extent != 1 and step != expected:
            return False
        expected *= extent
    return True


def _flat(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a tensor as a vector; without a copy if it lies in memory as `like` does."""
    tensor = tensor.detach()
    if _is_dense(tensor) and _is_dense(like) and tensor.stride() == like.stride():
        return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())
    return tensor.reshape(-1)


def _place(tensor: Tensor) -> object:  # the same for tied tensors
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
