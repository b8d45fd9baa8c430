"""What an argument stands for: one checkpoint, the many of a run, or what a pattern matches."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator
from pathlib import Path

from merge_avg.errors import MergeError
from merge_avg.formats.directory import SUFFIXES, is_one, of_a_run
from merge_avg.io import TEMPORARY
from merge_avg.selection._metadata import STATE

# Files beside the checkpoints of a run that end as checkpoints do: states of a training, as torch,
# Accelerate and transformers' Trainer save them.
_BESIDE = re.compile(r"(?i)optimizer|scheduler|scaler|rng_state|random_states|training_args")
# Folders of a run that hold checkpoints: lightning_logs/version_0/checkpoints/ of Lightning,
# checkpoints/ and ckpt/ of many, and one for each fold of a cross-validation.
_FOLDERS = re.compile(r"(?i)checkpoints?|ckpts?|(fold|version)[-_]?\d+|lightning_logs")


def expand(place: Path, *, runs: bool) -> tuple[list[Path], bool]:
    """Return the checkpoints that an argument stands for, and whether it may stand for many.

    With `runs`, a directory may be a run. Several directories that are named one by one, with
    nothing else asked for, are checkpoints: files of different names in them belong together.

    Raises:
        MergeError: no file matches the pattern.
        OSError: a directory cannot be listed.
    """
    # A file may be called a[1].pt: only what does not exist is a pattern.
    if not os.path.lexists(place) and glob.has_magic(str(place)):
        names = sorted(glob.glob(str(place), recursive=True), key=natural)  # noqa: PTH207 - any root
        if not names:
            raise MergeError("no file matches the pattern", where=place)
        return [Path(name) for name in names], True
    if runs and place.is_dir():
        # A Trainer's folder may hold its final model beside checkpoint-N/. As a run it stands for
        # these folders; the files of the final model are not checkpoints of their own.
        whole = is_one(place)
        found = [path for path in _of_run(place) if path.is_dir() or not whole]
        if found and not (whole and of_a_run(place.name)):
            return sorted(found, key=lambda path: natural(str(path))), True
    return [place], False


def _of_run(folder: Path) -> Iterator[Path]:
    """Yield the checkpoints in a run's directory: files, folders, and those in known subfolders."""
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith(".") or TEMPORARY in entry.name or _BESIDE.match(entry.name):
            continue
        if entry.is_dir() and (of_a_run(entry.name) or (entry / STATE).is_file()):
            yield entry
        elif entry.is_dir() and _FOLDERS.fullmatch(entry.name):
            yield from _of_run(entry)
        elif entry.is_file() and entry.suffix.lower() in SUFFIXES:
            yield entry


def natural(text: str) -> list[tuple[int, int | str]]:
    """Return a key that sorts the numbers in names as numbers: fold10 comes after fold9."""
    parts = re.split(r"(\d+)", text)
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in parts]
