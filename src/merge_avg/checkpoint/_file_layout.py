"""An output file before its weights: sizes, places, and the bytes around them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from merge_avg.checkpoint._layout import Storage

Literal = tuple[int, bytes]  # where bytes go, and the bytes


@dataclass(frozen=True)
class Place:
    """Room for payload in the output."""

    offset: int
    nbytes: int


@dataclass(frozen=True)
class Skeleton:
    """What an output file is made of.

    Attributes:
        nbytes: its size.
        literals: headers and the like, known before the weights.
        copies: records of the template, and where they go.
        places: room for weights, by the name of a storage (zip) or of a tensor (safetensors).
        checked: whether the CRC-32 of every place and copy is needed to close.
        close: makes the last literals from the CRC-32 of each place and copy.
    """

    nbytes: int
    literals: tuple[Literal, ...]
    places: Mapping[str, Place]
    copies: tuple[tuple[Storage, Place], ...] = ()
    checked: bool = False
    close: Callable[[Mapping[str, int]], tuple[Literal, ...]] = field(default=lambda _: ())
