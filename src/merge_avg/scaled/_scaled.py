"""A scaled tensor: codes, their scales and what lies beside them, which have a mean together."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from merge_avg.checkpoint import Access, Composed, DType, Name, TensorInfo
from merge_avg.scaled._blocks import Blocks, Shape
from merge_avg.scaled._forms import Form, Rule, ScaleKind

CODES, SCALES = 0, 1  # numbers of the tensors; scales of activations follow
_VALUES = 1 << 19  # of all checkpoints, that are looked at together
_LEAST_WINDOW, _LARGEST_WINDOW = 1 << 12, 1 << 16
# Bytes of float64 beside the numbers of the checkpoints: the mean, the codes, and room for both.
_SCRATCH = 24


@dataclass(frozen=True, slots=True)
class Scaled:
    """A scaled tensor of all checkpoints, as a `Composite`."""

    name: str
    consumed: tuple[Name, ...]  # the codes, the scales, scales of activations, and marks
    sources: tuple[tuple[TensorInfo, ...], ...]
    results: tuple[Composed, ...]
    shape: Shape  # of the numbers
    form: Form
    blocks: Blocks
    scale_kind: ScaleKind
    rule: Rule
    paths: tuple[Path, ...]  # of the checkpoints, for errors
    dense: DType | None = None  # the dtype of a result without scales
    transposed: bool = False  # whether the last two dimensions of such a result change places
    outputs: int = 1
    allow_nonfinite: bool = False
    inputs: int = 0  # how many scales of activations there are
    change: bool = False  # it stands for weights
    finite: bool = False  # it looks at what is not, by itself

    @property
    def window(self) -> int:
        """Return how many elements are looked at together at most."""
        few = _VALUES // max(sum(map(bool, self.sources)), 1)
        return max(min(1 << few.bit_length() - 1, _LARGEST_WINDOW), _LEAST_WINDOW)

    @property
    def memory(self) -> int:
        """Return the bytes that computing it takes at most."""
        count = sum(map(bool, self.sources))
        strip = max(self.window // self.blocks.block[1], self.blocks.largest_strip, 1)
        found = 8 * (self.window * (2 * count + _SCRATCH) + strip * (2 * count + 4))
        if self.transposed and self.dense is not None:
            found += math.prod(self.shape[-2:]) * self.dense.itemsize * (self.outputs + 1)
        return found

    def compose(self, access: Access) -> None:
        """Read the sources, and write the results of each output."""
        from merge_avg.scaled._compute import Computation  # which imports torch

        Computation(self, access).run()
