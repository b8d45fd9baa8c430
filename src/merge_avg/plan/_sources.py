"""Sources: where the elements that are averaged as one lie in each checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, overload

from merge_avg.checkpoint import DType, Storage


class Source(NamedTuple):  # there are as many as tensors times checkpoints
    """The place of a unit's elements in one checkpoint."""

    checkpoint: int  # its number
    dtype: DType
    storage: Storage | None  # None where they lie in the scratch file
    offset: int  # of the first element, in bytes, in the storage or the scratch file


class Everywhere(Sequence[Source]):
    """The sources of a tensor that is all of its storage, in the same place in each checkpoint."""

    # Checkpoints of a run are like that: nothing is held for each tensor of each.
    __slots__ = "checkpoints", "dtype", "storage"

    def __init__(self, checkpoints: int, dtype: DType, storage: Storage) -> None:
        self.checkpoints = checkpoints  # how many
        self.dtype = dtype
        self.storage = storage

    def __len__(self) -> int:
        return self.checkpoints

    @overload
    def __getitem__(self, k: int) -> Source: ...
    @overload
    def __getitem__(self, k: slice) -> Sequence[Source]: ...
    def __getitem__(self, k: int | slice) -> Source | Sequence[Source]:
        found = range(self.checkpoints)[k]
        if isinstance(found, int):
            return Source(found, self.dtype, self.storage, 0)
        return [self[one] for one in found]
