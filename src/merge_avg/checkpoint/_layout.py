"""The layout of a checkpoint: what a scan yields, and all that later steps know of a file."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from merge_avg.checkpoint._storage import File, Storage, TensorInfo, TreePath

# In the metadata of a checkpoint, the provenance record of the merge that made it.
PROVENANCE = "merge_avg"
PROVENANCE_FILE = "merge_avg.json"  # the same, as a file of a directory or a record of an archive
# Bytes. No merge writes a longer record, and whoever reads one holds it in memory.
LARGEST_PROVENANCE = 1 << 24
Scalar = int | float | str


@dataclass(frozen=True)
class Layout:
    """A scanned checkpoint: one file, or a directory.

    Attributes:
        path: the file or directory.
        format: "torch-zip", "torch-legacy", "safetensors", "torch-dcp" or "directory".
        files: all of its files; one if it is a file.
        tensors: every tensor in it, weights or not, in the files' order.
        others: entries at the top level that hold no tensor, such as "epoch".
        metadata: string to string, as safetensors files carry it; and the `PROVENANCE` of an
            earlier merge.
        archive: all that a copy of a pickled checkpoint needs; None for other formats.
        members: for a directory, the part of it that each file holds, in the order of `files`;
            None for files that hold no weights.
        notes: for the user, one sentence each.
        scalars: numbers and short texts beside the tensors, such as the epoch, by their paths.
        set_member: whether it is a file of a set, whose tensors have names from the root of the set
            and can be written only together.
    """

    path: Path
    format: str
    files: tuple[File, ...]
    tensors: tuple[TensorInfo, ...]
    others: tuple[str, ...] = ()
    metadata: tuple[tuple[str, str], ...] = ()
    archive: Archive | None = None
    members: tuple[Layout | None, ...] = ()
    notes: tuple[str, ...] = ()
    scalars: tuple[tuple[TreePath, Scalar], ...] = ()
    set_member: bool = False

    @property
    def nbytes(self) -> int:
        """Return the size of all its files."""
        return sum(file.nbytes for file in self.files)

    @property
    def source(self) -> Layout:
        """Return the same without its archives, which only a copy of the checkpoint needs."""
        members = tuple(member and member.source for member in self.members)
        return replace(self, archive=None, members=members)

    def where(self, info: TensorInfo) -> Path:
        """Return the file that a tensor lies in, or begins in."""
        return self.files[info.storage.ranges[0].file].path


@dataclass(frozen=True, slots=True)
class ClassSpan:
    """The place where a pickle names the class of a storage.

    Attributes:
        start, stop: the bytes of the opcode that does.
        cls: module and name, with a newline between them.
        storage: the pickle's key of the storage.
    """

    # Torch tells the dtype of a tensor by the class of its storage, as in torch.FloatStorage: a
    # copy with another dtype replaces just these bytes of the pickle.
    start: int
    stop: int
    cls: str
    storage: str


@dataclass(frozen=True)
class Archive:
    """The records of a pickled checkpoint, in their order, and the pickle that ties them together.

    Attributes:
        records: the name of each record in the archive, and where it lies.
        pickle: the bytes of data.pkl.
        pickle_name: its record's name.
        classes: each time the pickle names a storage's class.
        frames: where the pickle's FRAME opcodes start.
        prefix: of the names of storages, before the pickle's key.
        around: for a legacy file, the bytes before the pickle and those after it.
    """

    records: tuple[tuple[str, Storage], ...]
    pickle: bytes
    pickle_name: str
    classes: tuple[ClassSpan, ...]
    frames: tuple[int, ...]
    prefix: str = ""
    around: tuple[bytes, bytes] = (b"", b"")
