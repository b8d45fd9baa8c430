"""Directories of torch.distributed.checkpoint: each rank wrote its chunks of the tensors.

    .metadata          pickle: shape, dtype and chunks of each tensor, and where each chunk lies
    __0_0.distcp       chunks of rank 0
      0       PK 3 4 ... archive/data.pkl, archive/data/0 ...  PK 5 6     a chunk: one bare tensor
      1234    PK 3 4 ... PK 5 6                                           another
      2468    ...                                                         bytes of an object
    __1_0.distcp       chunks of rank 1

Gaps may lie between chunks. In a copy every chunk stays where the template has it, so that
`.metadata` still says where: an archive has to take exactly the bytes of the original, and no dtype
may change. The pickle is read without being run:

    Metadata(
      state_dict_metadata={
        "w": TensorStorageMetadata(properties=TensorProperties(dtype=torch.float32, ...),
                                   size=[6, 4],
                                   chunks=[ChunkStorageMetadata(offsets=[0, 0], sizes=[3, 4]),
                                           ChunkStorageMetadata(offsets=[3, 0], sizes=[3, 4])]),
        "epoch": BytesStorageMetadata()},
      planner_data={"w": ("model", "w")},             the path of each name in the state dict
      storage_data={
        MetadataIndex(fqn="w", offset=[0, 0]):
          _StorageInfo(relative_path="__0_0.distcp", offset=0, length=1234)})

Specification: torch/distributed/checkpoint/metadata.py and filesystem.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path

from merge_avg.checkpoint import Archive, BytesAt, Checksums, File, Layout, Storage
from merge_avg.errors import MergeError
from merge_avg.formats import bounded
from merge_avg.formats.carried import callables_in
from merge_avg.formats.distributed.metadata import LARGEST, Chunk, SetMetadata
from merge_avg.formats.distributed.write import copy, rewrite
from merge_avg.formats.zip import Part
from merge_avg.formats.zip import scan as zip_scan

__all__ = ["copy", "rewrite", "scan_set"]

_NAME, _MARKER = "torch-dcp", ".metadata"


def scan_set(folder: Path, files: Mapping[str, tuple[int, File]]) -> dict[int, Layout]:
    """Return a layout for each file of chunks, and one for `.metadata` that has all the tensors.

    Numbers of files lead to layouts, and names in the folder to numbers and files.

    Raises:
        MergeError: something is damaged, missing, or packed in a way that only torch can read.
    """
    number, stamp = files[_MARKER]
    found: dict[int, Layout] = {}
    try:
        metadata = SetMetadata(bounded.read(stamp.path, LARGEST))
        for name, chunks in metadata.by_file().items():
            if name not in files:
                hint = "fetch the checkpoint again"
                raise MergeError(f"it lacks the file {name!r}", where=folder, hint=hint)
            found[files[name][0]] = _scanned(*files[name], chunks, metadata)
        # The tensors belong to the file that tells of them; files of chunks have none of their own.
        tensors, others = tuple(map(metadata.tensor, metadata.shapes)), tuple(metadata.others)
    except MergeError as error:
        raise error.at(stamp.path) from None
    callables = tuple((number, name) for name in metadata.callables)
    made = (stamp.path, _NAME, (stamp,), tensors, others)
    found[number] = Layout(
        *made, callables=callables, set_member=True, optimizers=metadata.optimizers
    )
    return found


def _scanned(number: int, stamp: File, chunks: Sequence[Chunk], metadata: SetMetadata) -> Layout:
    """Return the layout of a file of chunks, and add them to what the metadata knows."""
    records: list[Storage] = []
    members: list[Layout | None] = []
    callables: list[str] = []
    checksums: dict[BytesAt, int] = {}
    end = 0
    with stamp.path.open("rb") as file:
        # In the order of their bytes: chunks may not overlap, or a copy could not fill both.
        for fqn, corner, start, nbytes in sorted(chunks, key=itemgetter(2)):
            if start < end or start + nbytes > stamp.nbytes:
                what = f"the chunk of {fqn!r} is not where it should be"
                hint = "fetch or save it again"
                raise MergeError(what, where=stamp.path, hint=hint, tensor=fqn)
            end = start + nbytes
            name = f"{fqn} at {list(corner or ())}"
            records.append(Storage(name, start, nbytes, file=number))
            # The archive reader sees nothing but the chunk, so that no record reaches outside.
            part = Part(file, number, start, nbytes, f"{name}: ")
            if corner is None or fqn not in metadata.shapes:
                members.append(None)
                callables += callables_in(part, stamp)
                continue
            layout = zip_scan(file, stamp, number, part)
            checksums.update(layout.checksums)
            callables += (one for _, one in layout.callables)
            if len(layout.tensors) != 1 or layout.tensors[0].path:
                what = f"the chunk of {fqn!r} is not a tensor"
                raise MergeError(what, where=stamp.path, tensor=fqn)
            metadata.stored[fqn, corner] = layout.tensors[0]
            members.append(layout)
    archive = Archive(tuple(one.name for one in records), tuple(records), b"", "", (), ())
    named = tuple((number, one) for one in dict.fromkeys(callables))
    made = (stamp.path, _NAME, (stamp,), (), (), (), archive, tuple(members))
    return Layout(*made, callables=named, set_member=True, checksums=Checksums.of(checksums))
