"""Files that are not checkpoints, told by their bytes, each with the way out.

They are weights of other programs, archives, pickles that torch.save did not write, and what a
download leaves that failed. Zip archives are told by the names of their records. And files of one
rank, which are of use only beside those of the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from merge_avg.checkpoint import Layout
from merge_avg.errors import MergeError

_LFS = b"version https://git-lfs"
_PULL = "fetch the file's content with: git lfs pull"
_UNPACK = "unpack it and pass the checkpoint inside"
# By first bytes: what the file is, and what to do about it.
_BY_MAGIC = {
    _LFS: ("a Git LFS pointer, not the checkpoint itself", _PULL),
    b"GGUF": ("a GGUF file", "average the checkpoints before you convert them to GGUF"),
    b"\x89HDF": ("an HDF5 file (.h5, Keras)", "save the weights as safetensors"),
    b"PK\x05\x06": ("an empty zip archive", "save the checkpoint again"),
    b"\x93NUMPY": ("a NumPy array", "save the arrays as safetensors"),
    b"\x1f\x8b": ("a gzip archive", _UNPACK),
    b"BZh": ("a bzip2 archive", _UNPACK),
    b"\xfd7zXZ": ("an xz archive", _UNPACK),
}
_EXPORTED = (
    "a program saved by torch.export (.pt2), not a checkpoint",
    "save the state dict: torch.save(torch.export.load(PATH).state_dict, OUTPUT)",
)
# Zip archives, by the ending of a record's name.
_BY_RECORD = {
    "constants.pkl": (
        "a TorchScript program, not a checkpoint",
        "save the model's state dict: torch.save(torch.jit.load(PATH).state_dict(), OUTPUT)",
    ),
    "archive_format": _EXPORTED,
    "serialized_exported_program.json": _EXPORTED,  # by older releases of torch
    ".npy": ("a NumPy archive (.npz), not a checkpoint", "save the arrays as safetensors"),
    ".weights.h5": ("a Keras model", "save its weights as safetensors"),
    "policy.pth": (
        "an archive of Stable-Baselines3",
        "unzip it and pass the policy.pth files inside",
    ),
}
# Members that a tar of torch before 0.1.10 may begin with.
_OLD_MEMBERS = (b"sys_info", b"pickle", b"tensors", b"storages")


def is_placeholder(head: bytes) -> bool:
    """Return whether a file stands for a checkpoint that was never fetched."""
    return head.startswith(_LFS) or _is_web_page(head)


def _is_web_page(head: bytes) -> bool:
    return head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml"))


def refuse(path: Path, head: bytes, nbytes: int) -> NoReturn:
    """Raise MergeError that says what a file is that no format claims."""
    what, hint = _described(head, nbytes, path.suffix.lower())
    raise MergeError(what, where=path, hint=hint)


def _described(head: bytes, nbytes: int, suffix: str) -> tuple[str, str]:
    if not nbytes:
        return "the file is empty", "fetch or save the file again"
    for magic, described in _BY_MAGIC.items():
        if head.startswith(magic):
            return described
    if _is_web_page(head):
        hint = "the download failed or needs a login; fetch the file again"
        return "a web page, not a checkpoint", hint
    if head[257:262] == b"ustar":
        if head[:100].rstrip(b"\0") in _OLD_MEMBERS:
            hint = "load it with torch.load and save it again"
            return "a checkpoint of torch before 0.1.10 (a tar)", hint
        return "a tar archive", _UNPACK
    # Protocols 2 to 5; older ones begin with any printable character.
    if head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05":
        hint = "load it with what wrote it, and save its tensors with torch.save"
        return "a pickle, but not a checkpoint of torch.save", hint
    if suffix == ".onnx":
        return "an ONNX model, not a checkpoint", "average the checkpoints before you export them"
    return (
        "neither a zip checkpoint of torch.save nor a safetensors file",
        "pass .pt, .pth, .bin, .ckpt or .safetensors files; is the download complete?",
    )


def refuse_archive(path: Path, names: Sequence[str]) -> None:
    """Raise MergeError for a zip archive of another program, told by the names of its records."""
    endings = tuple(_BY_RECORD)
    told = [name for name in names if name.endswith(endings)]
    for ending, (what, hint) in _BY_RECORD.items():
        if any(name.endswith(ending) for name in told):
            raise MergeError(what, where=path, hint=hint)


def refuse_alone(layout: Layout) -> None:
    """Raise MergeError for a file that is of use only beside those of the other ranks."""
    refuse_hollow(layout)
    if any(info.shard for info in layout.tensors):
        raise one_rank(layout.path)


def refuse_hollow(layout: Layout) -> None:
    """Raise MergeError for a file of ZeRO-3 that has placeholders, and no weights."""
    keys = {*layout.others, *(str(info.path[0]) for info in layout.tensors)}
    if {"ds_config", "ds_version"} & keys:
        # DeepSpeed leaves a placeholder of shape (0,) for each parameter that ZeRO-3 partitioned.
        module = [info.shape for info in layout.tensors if info.path[0] == "module"]
        if module and {(0,)}.issuperset(module):
            hint = "gather them first: python zero_to_fp32.py CHECKPOINT_DIR OUTPUT_DIR"
            what = "a DeepSpeed ZeRO-3 file, whose weights are spread over the optimizer files"
            raise MergeError(what, where=layout.path, hint=hint)


def one_rank(path: Path) -> MergeError:
    """Return the error for a file with one rank's parts, and without those of the others."""
    hint = "save a full state dict (StateDictOptions(full_state_dict=True)), or use a directory"
    hint += " of torch.distributed.checkpoint"
    return MergeError("it holds one rank's parts of distributed tensors", where=path, hint=hint)
