"""Composites: tensors that have a mean only together, with numbers in place of any one of them.

    factors of a product    A, B, and alpha        a mean of B @ A
    codes and their scales  weight, weight_scale   a mean of weight * weight_scale

A plan lists them, and each is computed by one worker, which passes an `Access` to `compose`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Protocol

from merge_avg.checkpoint._dtypes import DType
from merge_avg.checkpoint._layout import TensorInfo
from merge_avg.checkpoint._roles import Name

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Composed:
    """A tensor that an output has of a composite, in the place of the template's of this name.

    Where the template has none of this name, it is the first of the composite, in the place of the
    first tensor.
    """

    name: Name
    dtype: DType
    shape: tuple[int, ...]


class Composite(Protocol):
    """Tensors that have a mean only together. A value: reading and writing are the access's."""

    @property
    def name(self) -> str:
        """Return what reports and errors call it: most often, the name of a module."""

    @property
    def consumed(self) -> Sequence[Name]:
        """Return the template's names of all its tensors."""

    @property
    def sources(self) -> Sequence[Sequence[TensorInfo]]:
        """Return the tensors of each checkpoint; none of one that has no weight in any output."""

    @property
    def results(self) -> Sequence[Composed]:
        """Return what an output has of it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of what it stands for, which is compared with the other checkpoints'."""

    @property
    def change(self) -> bool:
        """Return whether it stands for a change of weights, and not for weights."""

    @property
    def finite(self) -> bool:
        """Return whether NaN and infinity are refused where they are read or written."""

    @property
    def memory(self) -> int:
        """Return the bytes that computing it takes at most."""

    def compose(self, access: Access) -> None:
        """Read the sources, and write the results of each output."""


class Access(Protocol):
    """The reading and writing of a composite, by numbers of its sources and results."""

    @property
    def weights(self) -> Sequence[Sequence[Fraction]]:
        """Return the weights of the checkpoints in each output."""

    @property
    def compared(self) -> Sequence[int]:
        """Return the checkpoints whose products `compare` takes, in its order; or none."""

    def read(
        self, checkpoint: int, tensor: int, start: int, stop: int, *, again: bool = False
    ) -> Tensor:
        """Return elements of a tensor as a vector, in memory of its own; of codes, as bytes.

        What is not read `again` is hashed: from the first element on, in order, to the last.
        """

    def write(self, output: int, result: int, start: int, values: Tensor) -> None:
        """Write elements of a result, from element `start` on, in the result's dtype."""

    def compare(self, gram: Sequence[Sequence[float]]) -> None:
        """Take the inner products of what it stands for in all pairs of compared checkpoints."""

    def approximated(self, error: float, norm: float) -> None:
        """Take the squared norms of the result's error, and of what it stands for."""
