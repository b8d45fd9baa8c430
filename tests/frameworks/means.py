"""A mean that is computed without the code under test, and the tensors that files hold."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path


def mean(values: Sequence[Tensor], stored: torch.dtype | None = None) -> Tensor:
    """Return the mean in float64, rounded once, or the first of integers.

    Args:
        values: the tensor of each checkpoint.
        stored: the dtype in the file, where the framework loads another.
    """
    first = values[0]
    if not first.is_floating_point():
        return first
    exact = torch.stack([value.double() for value in values]).sum(dim=0) / len(values)
    return exact.to(stored or first.dtype).to(first.dtype)


def _trees(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield what torch loads from a file, or from each file below a directory."""
    if path.is_dir():
        for below in sorted(path.iterdir()):
            for name, tree in _trees(below):
                yield f"{below.name}/{name}", tree
    elif path.name == ".metadata":  # its tensors lie in the files beside it
        for index, place in pickle.loads(path.read_bytes()).storage_data.items():
            data = (path.parent / place.relative_path).read_bytes()[place.offset :]
            yield index.fqn, torch.load(io.BytesIO(data[: place.length]), weights_only=False)
    elif path.suffix == ".safetensors":
        yield "", load_file(path)
    elif path.suffix != ".distcp" and path.read_bytes()[:4] == b"PK\3\4":
        yield "", torch.load(path, weights_only=False)


def tensors(path: Path) -> dict[str, Tensor]:
    """Return all tensors of a checkpoint by path, those that are no weights included."""
    found = {}
    for file, tree in _trees(path):
        for keys, leaf in tree_flatten_with_path(tree)[0]:
            if isinstance(leaf, Tensor):
                found[file + keystr(keys)] = leaf.detach()
    return found
