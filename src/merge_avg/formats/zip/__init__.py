"""Zip checkpoints: what torch.save has written since torch 1.6 (.pt, .pth, .bin, .ckpt)."""

from __future__ import annotations

from merge_avg.formats.zip.read import Within, scan
from merge_avg.formats.zip.write import ZipLayout, copy, create

__all__ = ["Within", "ZipLayout", "copy", "create", "scan"]
