"""Files of a distributed checkpoint, written: every chunk stays where the template has it.

    template   | chunk | gap | chunk         | object |
    copy       | zip   | gap | zip           | object |
                 new archives of the same sizes, so that `.metadata` still says where they lie

For that an archive has to take exactly the bytes of the original, and no dtype may change.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from merge_avg.checkpoint import DType, FileLayout, Layout, Literal, Slot, Storage
from merge_avg.errors import MergeError
from merge_avg.formats.zip import ZipLayout
from merge_avg.formats.zip import copy as zip_copy


@dataclass(frozen=True)
class _ChunksLayout(FileLayout):
    """The layout of a file of chunks.

    Attributes:
        chunks: the archives that are written anew: offset, number of the first slot, and layout.
    """

    chunks: tuple[tuple[int, int, ZipLayout], ...] = ()

    def opening(self) -> Iterator[Literal]:
        """Yield what the archives open with."""
        for base, _, chunk in self.chunks:
            yield from ((base + at, data) for at, data in chunk.opening())

    def closing(self, record: bytes, checksums: Sequence[int]) -> Iterator[Literal]:  # noqa: ARG002
        """Yield what the archives close with."""
        for base, first, chunk in self.chunks:
            sums = checksums[first : first + len(chunk.entries)]
            yield from ((base + at, data) for at, data in chunk.closing(b"", sums))


def copy(
    layout: Layout,
    converted: Mapping[str, DType],
    averaged: set[str],
    *,
    recorded: bool = True,  # noqa: ARG001 - a file beside the set holds the provenance
) -> FileLayout:
    """Return the layout of a copy of one file of chunks; every chunk stays where it is.

    Raises:
        MergeError: a dtype is to change, or a chunk would not take the room that it has.
    """
    archive = layout.archive
    if archive is None:
        raise ValueError("only a file of chunks can be copied as one")
    slots: dict[str, Slot] = {}
    copies: list[tuple[Storage, Slot]] = []
    inner: list[tuple[Storage, Slot]] = []
    chunks: list[tuple[int, int, ZipLayout]] = []
    end = number = 0
    for (_, record), member in zip(archive.records, layout.members, strict=True):
        if record.offset > end:
            gap = Storage(f"bytes from {end}", end, record.offset - end, file=record.file)
            copies.append((gap, Slot(number, end, gap.nbytes)))
            number += 1
        end = record.offset + record.nbytes
        names = {info.storage.name for info in member.tensors} if member else set()
        if member is None or not names & averaged:
            copies.append((record, Slot(number, record.offset, record.nbytes)))
            number += 1
            continue
        chunk = zip_copy(member, {}, averaged, recorded=False)
        if names & converted.keys() or chunk.nbytes(b"") != record.nbytes:
            hint = "write one file instead: end the output's name in .safetensors or .pt"
            what = "the chunks of this directory cannot be written anew"
            raise MergeError(what, where=layout.path, hint=hint)

        def moved(slot: Slot, first: int = number, base: int = record.offset) -> Slot:
            return Slot(first + slot.number, base + slot.offset, slot.nbytes)

        slots |= {name: moved(slot) for name, slot in chunk.slots.items()}
        inner += [(storage, moved(slot)) for storage, slot in chunk.copies]
        chunks.append((record.offset, number, chunk))
        number += len(chunk.entries)
    # In this order copies are hashed: what earlier versions recorded stays comparable.
    whole = (*copies, *inner)
    return _ChunksLayout(end, (), slots, whole, checked=True, chunks=tuple(chunks))
