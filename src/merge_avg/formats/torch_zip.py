"""Zip checkpoints: what torch.save has written since torch 1.6 (.pt, .pth, .bin, .ckpt).

The archive holds ROOT/data.pkl, and for each storage a record ROOT/data/KEY of raw bytes. ROOT is
the name that the file had when it was saved. Formats: PKWARE's APPNOTE.TXT and torch's
torch/csrc/jit/serialization/docs/serialization.md.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from merge_avg.errors import MergeError
from merge_avg.formats.torch_objects import read_objects
from merge_avg.layout import Archive, Layout, Storage

MAGIC = b"PK\x03\x04"
# What zipfile raises on damaged archives; NotImplementedError for a version it has not heard of.
_DAMAGE = (
    zipfile.BadZipFile,
    NotImplementedError,
    ValueError,
    OverflowError,
    struct.error,
    EOFError,
)
_LOCAL_HEADER = struct.Struct("<4s22xHH")


def scan(path: Path, file: BinaryIO, nbytes: int) -> Layout:
    """The layout of a zip checkpoint.

    Raises:
        MergeError: it is damaged, compressed, no checkpoint of torch.save, or dangerous.
    """
    try:
        archive = zipfile.ZipFile(file)
    except _DAMAGE as error:
        hint = "it was cut short while it was copied or saved; fetch or save it again"
        raise MergeError(f"the zip archive is damaged ({error})", where=path, hint=hint) from None
    infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
    names = [info.filename for info in infos]
    if len(set(names)) != len(names):
        raise MergeError("two records of the zip archive have the same name", where=path)
    root = _root(names, path)
    records = {info.filename: _record(file, info, nbytes, path) for info in infos}
    pickle_record = records[f"{root}data.pkl"]
    pickle = _bytes(file, pickle_record)
    # torch.serialization.set_crc32_options(False) leaves all checksums zero.
    unchecked = all(record.crc == 0 for record in records.values())
    if unchecked:
        records = {name: replace(record, crc=None) for name, record in records.items()}
    if not unchecked and zlib.crc32(pickle) != pickle_record.crc:
        raise _damaged(path, pickle_record)
    order = _bytes(file, records[f"{root}byteorder"]) if f"{root}byteorder" in records else b""
    if order not in (b"", b"little"):
        shown = order.decode("ascii", "replace")
        hint = "load it with torch.load on any machine and save it again"
        raise MergeError(f"its numbers are in {shown}-endian byte order", where=path, hint=hint)

    def find(key: str, size: int) -> Storage:
        record = records.get(f"{root}data/{key}")
        if record is None:
            raise MergeError(f"the archive has no record for storage {key!r}")
        if record.nbytes != size:
            found = f"{record.nbytes:,} bytes long, expected {size:,}"
            raise MergeError(f"record {record.name!r} is {found}")
        return record

    try:
        objects = read_objects(pickle, find)
    except MergeError as error:
        raise type(error)(error.what, where=path, hint=error.hint) from None
    if objects.kind == "a tensor":
        hint = "pass checkpoints that hold a state dict: a dict of names and tensors"
        raise MergeError("it holds a single tensor without a name", where=path, hint=hint)
    parts = Archive(
        tuple(records.values()),
        pickle,
        pickle_record.name,
        objects.classes,
        objects.loaded.frames,
        unchecked,
    )
    return Layout(path, "torch-zip", nbytes, objects.tensors, objects.others, archive=parts)


def _root(names: list[str], path: Path) -> str:
    """The prefix of the archive's records, up to and with its slash."""
    folders = {name.partition("/")[0] + "/" for name in names if "/" in name}
    roots = [root for root in folders if f"{root}data.pkl" in names]
    if "data.pkl" in names:
        roots.append("")
    for ending, (what, hint) in _STRANGERS.items():
        if any(name.endswith(ending) for name in names):
            raise MergeError(what, where=path, hint=hint)
    if len(roots) != 1:
        hint = "pass files that torch.save wrote"
        raise MergeError("a zip archive, but no checkpoint of torch.save", where=path, hint=hint)
    return roots[0]


# Archives of other programs, by the ending of a record's name.
_STRANGERS = {
    "constants.pkl": (
        "a TorchScript program, not a checkpoint",
        "save the model's state dict: torch.save(torch.jit.load(PATH).state_dict(), OUTPUT)",
    ),
    "archive_format": (
        "a program saved by torch.export (.pt2), not a checkpoint",
        "save the state dict: torch.save(torch.export.load(PATH).state_dict, OUTPUT)",
    ),
    ".npy": ("a NumPy archive (.npz), not a checkpoint", "save the arrays as safetensors"),
    ".weights.h5": ("a Keras model", "save its weights as safetensors"),
    "policy.pth": (
        "an archive of Stable-Baselines3",
        "unzip it and pass the policy.pth files inside",
    ),
}


def _record(file: BinaryIO, info: zipfile.ZipInfo, nbytes: int, path: Path) -> Storage:
    name = info.filename
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 0x1:
        kind = "encrypted" if info.flag_bits & 0x1 else "compressed"
        hint = "load it with torch.load and save it again; torch.save stores records as they are"
        raise MergeError(f"record {name!r} of the archive is {kind}", where=path, hint=hint)
    file.seek(info.header_offset)
    header = file.read(_LOCAL_HEADER.size)
    magic, name_length, extra_length = (
        _LOCAL_HEADER.unpack(header) if len(header) == _LOCAL_HEADER.size else (b"", 0, 0)
    )
    offset = info.header_offset + _LOCAL_HEADER.size + name_length + extra_length
    if magic != MAGIC or info.compress_size != info.file_size or offset + info.file_size > nbytes:
        raise MergeError(f"record {name!r} of the archive is not where it should be", where=path)
    return Storage(name, offset, info.file_size, info.CRC)


def _bytes(file: BinaryIO, record: Storage) -> bytes:
    file.seek(record.offset)
    return file.read(record.nbytes)


def _damaged(path: Path, record: Storage) -> MergeError:
    what = f"record {record.name!r} is damaged: its CRC-32 does not match"
    return MergeError(what, where=path, hint="fetch or save the file again")
