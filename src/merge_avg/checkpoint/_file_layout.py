"""The layout of an output file: slots for payload, and the bytes around them.

    literal | slot | literal | slot | slot | literal

Slots do not overlap, so that any thread may fill any of them at any time, in parts. What lies in no
slot and no literal is zeros.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from merge_avg.checkpoint._dtypes import DType
from merge_avg.checkpoint._layout import Storage

Literal = tuple[int, bytes]  # an offset in the file, and the bytes that belong there


@dataclass(frozen=True, slots=True)
class Slot:
    """Room for payload in an output file."""

    number: int  # among the slots of its file, from 0
    offset: int  # of its first byte, from the file's `start`
    nbytes: int


@dataclass(frozen=True, slots=True)
class NewTensor:
    """A tensor of a new file: a view of one of the file's storages, counted in elements."""

    name: str  # its key in the state dict
    dtype: DType
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    start: int
    storage: str  # a format without views gives each tensor its own
    storage_nbytes: int


@dataclass(frozen=True)
class FileLayout:
    """The layout of one output file, which all outputs of a merge share.

    They differ in their provenance records only, each known when everything has been read; until
    then a draft of the same length stands for it. Formats that have it inside override the methods.
    """

    size: int  # without a record
    literals: tuple[Literal, ...] = ()  # headers and the like, known before the weights
    slots: Mapping[str, Slot] = field(default_factory=dict)  # by the name of a storage or a tensor
    copies: tuple[tuple[Storage, Slot], ...] = ()  # bytes of the template, and where they go
    checked: bool = False  # whether `closing` needs the CRC-32 of every slot

    @cached_property
    def rooms(self) -> Mapping[str, Slot]:
        """Return the slots of weights and of copies, by name."""
        # Cached: every window that is written looks a slot up.
        return {**self.slots, **{storage.name: slot for storage, slot in self.copies}}

    @property
    def count(self) -> int:
        """Return one more than the largest number of a slot."""
        # Records whose bytes are known have numbers too, and no slot: there may be gaps.
        return 1 + max((slot.number for slot in self.rooms.values()), default=-1)

    def start(self, record: bytes) -> int:  # noqa: ARG002 - see the class
        """Return the offset from which the slots' offsets count."""
        return 0

    def nbytes(self, record: bytes) -> int:  # noqa: ARG002
        """Return the size of the file with a record."""
        return self.size

    def opening(self) -> Iterable[Literal]:
        """Yield the bytes that are known before the weights."""
        return self.literals

    def closing(self, record: bytes, checksums: Sequence[int]) -> Iterable[Literal]:  # noqa: ARG002
        """Yield the bytes that are known last, from the record and each slot's CRC-32 by number."""
        return ()


@dataclass(frozen=True)
class RecordFile(FileLayout):
    """A file of a directory that holds the provenance record and nothing else."""

    size: int = 0

    def nbytes(self, record: bytes) -> int:
        """Return the size of the record."""
        return len(record)

    def closing(self, record: bytes, checksums: Sequence[int]) -> Iterable[Literal]:  # noqa: ARG002
        """Yield the record."""
        return ((0, record),)
