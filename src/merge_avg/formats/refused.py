"""Files that are no checkpoints, by name, with the way out."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

from merge_avg.errors import MergeError

# First bytes, what the file is, and what to do about it.
_BY_MAGIC = (
    (
        b"version https://git-lfs",
        "a Git LFS pointer, not the checkpoint itself",
        "fetch the file's content with: git lfs pull",
    ),
    (b"GGUF", "a GGUF file", "average the checkpoints before you convert them to GGUF"),
    (b"\x89HDF", "an HDF5 file (.h5, Keras)", "save the weights as safetensors"),
    (b"PK\x05\x06", "an empty zip archive", "save the checkpoint again"),
    (b"\x93NUMPY", "a NumPy array", "save the arrays as safetensors"),
    (b"\x1f\x8b", "a gzip archive", "unpack it and pass the checkpoint inside"),
    (b"BZh", "a bzip2 archive", "unpack it and pass the checkpoint inside"),
    (b"\xfd7zXZ", "an xz archive", "unpack it and pass the checkpoint inside"),
)


_OLD_MEMBERS = (b"sys_info", b"pickle", b"tensors", b"storages")


def is_placeholder(head: bytes) -> bool:
    """Whether a file stands for a checkpoint that was never fetched."""
    return head.startswith(_BY_MAGIC[0][0]) or _is_web_page(head)


def _is_web_page(head: bytes) -> bool:
    return head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml"))


def refuse(path: Path, head: bytes, nbytes: int) -> NoReturn:
    """Raises MergeError that says what a file is that no format here claims."""
    if not nbytes:
        raise MergeError("the file is empty", where=path, hint="fetch or save the file again")
    for magic, what, hint in _BY_MAGIC:
        if head.startswith(magic):
            raise MergeError(what, where=path, hint=hint)
    if _is_web_page(head):
        hint = "the download failed or needs a login; fetch the file again"
        raise MergeError("a web page, not a checkpoint", where=path, hint=hint)
    if head[257:262] == b"ustar" and head[:100].rstrip(b"\0") in _OLD_MEMBERS:
        hint = "load it with torch.load and save it again"
        raise MergeError("a checkpoint of torch before 0.1.10 (a tar)", where=path, hint=hint)
    if head[257:262] == b"ustar":
        hint = "unpack it and pass the checkpoint inside"
        raise MergeError("a tar archive", where=path, hint=hint)
    if head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05":
        hint = "load it with what wrote it, and save its tensors with torch.save"
        raise MergeError("a pickle, but no checkpoint of torch.save", where=path, hint=hint)
    if path.suffix.lower() == ".onnx":
        hint = "average the checkpoints before you export them"
        raise MergeError("an ONNX model, not a checkpoint", where=path, hint=hint)
    raise MergeError(
        "neither a zip checkpoint of torch.save nor a safetensors file",
        where=path,
        hint="pass .pt, .pth, .bin, .ckpt or .safetensors files; is the download complete?",
    )
