"""Scaled tensors in memory, an access to them, and what their mean should be, by Python."""

import math
from fractions import Fraction
from pathlib import Path

import torch

from merge_avg.arithmetic import Weights
from merge_avg.arithmetic._sums import FORMATS
from merge_avg.arithmetic.torch_mean import exact_mean
from merge_avg.checkpoint import BY_NAME, Composed, Name, Storage, TensorInfo, row_major
from merge_avg.scaled import Scaled
from merge_avg.scaled._config import NO_CONFIG
from merge_avg.scaled._find import _unpacked
from merge_avg.scaled._recognise import recognise

HALVES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def info_of(key, tensor):
    """A tensor as a scan shows it."""
    dtype = BY_NAME[str(tensor.dtype).removeprefix("torch.")]
    shape = tuple(tensor.shape)
    nbytes = tensor.numel() * dtype.itemsize
    return TensorInfo((key,), dtype, shape, row_major(shape), 0, Storage(key, 0, nbytes))


def infos_of(state):
    """The tensors of a state dict by name."""
    return {Name((), key): info_of(key, tensor) for key, tensor in state.items()}


def scaled_of(states, config=NO_CONFIG, dense=None, **more):
    """The first scaled tensor of state dicts, as a composite."""
    group = recognise(infos_of(states[0]), config).groups[0]
    sources = tuple(tuple(infos_of(state)[name] for name in group.names) for state in states)
    if dense is None:
        results = tuple(
            Composed(name, info.dtype, info.shape)
            for name, info in zip(group.names, sources[0], strict=True)
        )
    else:
        dense = BY_NAME[dense]
        name, turned = _unpacked(group)
        shape = (*group.shape[:-2], *group.shape[:-3:-1]) if turned else group.shape
        results = (Composed(name, dense, shape),)
        more["transposed"] = turned
    about = str(group.codes), group.names, sources, results, group.shape, group.form
    paths = tuple(Path(f"{k}.pt") for k in range(len(states)))
    rest = group.blocks, group.scale_kind, group.rule, paths, dense
    return Scaled(*about, *rest, inputs=len(group.inputs), **more)


class Memory:
    """An `Access` to state dicts in memory, which holds callers to the order of reading."""

    def __init__(self, scaled, states, weights=None, compared=()):
        count = len(states)
        self.weights = weights or [[Fraction(1, count)] * count]
        self.compared = compared
        self._scaled, self._states, self._done = scaled, states, {}
        self.results = [
            [torch.zeros(r.shape, dtype=getattr(torch, r.dtype.name)) for r in scaled.results]
            for _ in self.weights
        ]
        self._seen = [
            [torch.zeros(r.shape, dtype=int) for r in scaled.results] for _ in self.weights
        ]
        self.gram, self.errors, self.most = None, None, 0

    def read(self, checkpoint, tensor, start, stop, *, again=False):
        """Elements of a tensor, copied."""
        name = self._scaled.consumed[tensor]
        if not again:
            assert self._done.get((checkpoint, tensor), 0) == start
            self._done[checkpoint, tensor] = stop
        self.most = max(self.most, stop - start)
        flat = self._states[checkpoint][name.key].reshape(-1)
        assert stop <= len(flat)
        return flat[start:stop].clone()

    def write(self, output, result, start, values):
        """Keep what is written."""
        into = self.results[output][result]
        assert values.dtype == into.dtype
        assert start + len(values) <= into.numel()
        size = into.itemsize
        into.view(-1).view(torch.uint8)[start * size : (start + len(values)) * size] = values.view(
            torch.uint8
        )
        self._seen[output][result].view(-1)[start : start + len(values)] += 1

    def compare(self, gram):
        """Keep the products."""
        self.gram = gram

    def approximated(self, error, norm):
        """Keep the norms."""
        self.errors = error, norm

    def run(self):
        """Compute, and return the results by key; each element was read once and written once."""
        self._scaled.compose(self)
        for some in self._seen:
            assert all((one == 1).all() for one in some)
        for k, infos in enumerate(self._scaled.sources):
            assert [self._done[k, tensor] for tensor in range(len(infos))] == [
                info.numel for info in infos
            ]
        names = [result.name.key for result in self._scaled.results]
        return [dict(zip(names, some, strict=True)) for some in self.results]


def plain(codes, scales, shape):
    """Numbers as Python computes them: a code, times the scale of its block."""
    if codes.dtype == torch.uint8:
        halves = [half for byte in codes.reshape(-1).tolist() for half in (byte & 15, byte >> 4)]
        numbers = [math.copysign(HALVES[half & 7], -1 if half & 8 else 1) for half in halves]
        numbers = torch.tensor(numbers, dtype=torch.float64).view(shape)
    else:
        numbers = codes.to(torch.float64)
    if scales.dtype == torch.uint8 or "e8m0" in str(scales.dtype):
        factors = [2.0 ** (one - 127) for one in scales.view(torch.uint8).reshape(-1).tolist()]
        scales = torch.tensor(factors, dtype=torch.float64).view(scales.shape)
    return numbers * over(scales.double(), shape)


def over(scales, shape):
    """Scales of blocks, one for each element."""
    if scales.numel() == 1:
        return scales.reshape(()).expand(shape)
    if scales.dim() == 1:
        at = next(k for k, extent in enumerate(shape) if extent == len(scales))
        return scales.view([-1 if k == at else 1 for k in range(len(shape))]).expand(shape)
    for axis, (extent, count) in enumerate(zip(shape, scales.shape, strict=True)):
        size = 128 if -(-extent // 128) == count else extent // count
        scales = scales.repeat_interleave(size, axis).narrow(axis, 0, extent)
    return scales


def mean_of(rows, weights, dtype=torch.float64):
    """The exact mean of tensors, rounded once, computed in integers."""
    whole = Weights.of(weights)
    flat = torch.stack([row.reshape(-1) for row in rows], 1).tolist()
    values = [exact_mean(row, whole, FORMATS[dtype]) for row in flat]
    return torch.tensor(values, dtype=torch.float64).view(rows[0].shape).to(dtype)
