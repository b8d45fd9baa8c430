"""Helpers for tests of several packages: files of tensors, bits, and the command as a process."""

import functools
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import merge_avg

# What a test is about need not show in checkpoints that differ.
merge_checkpoints = functools.partial(merge_avg.merge_checkpoints, allow_trivial=True)
FORMATS = ["pt", "safetensors"]
COMMAND = [sys.executable, "-m", "merge_avg"]


def save(state, path):
    """Write a state dict in the format that the file's ending asks for."""
    if path.suffix == ".safetensors":
        # The library refuses tensors that share storages or have gaps.
        save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, path)
    else:
        torch.save(state, path)


def load(path):
    """Read what `save` has written, or a merge of it."""
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path)


def bits(tensor):
    """Return a tensor's bytes in row-major order."""
    if not tensor.numel():
        return b""
    flat = tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()


def same_bits(a, b):
    """Return whether two tensors are the same to the bit, NaN and the sign of zero included."""
    return a.shape == b.shape and a.dtype == b.dtype and bits(a) == bits(b)


def noise(seed, *shape):
    """Return a tensor of normal noise that depends on the seed only."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def run_command(*arguments, **options):
    """Run the command in a process of its own and return what it printed, as text."""
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def quick(cases, *few):
    """Return cases as parameters, of which all but a few are marked as large."""
    rows = [one if isinstance(one, tuple) else (one,) for one in cases]
    marks = [() if one in few else pytest.mark.large for one in cases]
    return [pytest.param(*row, marks=mark) for row, mark in zip(rows, marks, strict=True)]
