"""Arguments, as the user named them: checkpoints, runs of many, and patterns of both."""

from __future__ import annotations

import contextlib
import glob
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from merge_avg.errors import MergeError, failure, named
from merge_avg.formats.directory import SUFFIXES, is_one, latest, of_a_run
from merge_avg.io import TEMPORARY
from merge_avg.selection._criteria import natural
from merge_avg.selection._metadata import STATE

# States of a training beside the checkpoints of a run, by torch, Accelerate and transformers.
_BESIDE = re.compile(r"(?i)optimizer|scheduler|scaler|rng_state|random_states|training_args")
# Folders of a run that hold checkpoints: Lightning's, those of many, and one for each fold.
_FOLDERS = re.compile(r"(?i)checkpoints?|ckpts?|(fold|version)[-_]?\d+|lightning_logs")
_FOLD = re.compile(r"(?i)fold")


@dataclass(frozen=True, slots=True)
class Place:
    """An argument, or one match of a pattern, and the checkpoints that it stands for."""

    path: Path
    checkpoints: tuple[Path, ...]
    found: Literal["name", "pattern", "run"]  # how the checkpoints came to be looked at


def expand(arguments: Iterable[str | os.PathLike[str]], *, runs: bool = False) -> list[Place]:
    """Return the places that arguments stand for.

    What a pattern matches are places of their own, in the order in which a shell lists them. A
    directory is a run if it is the only place, or if all may be `runs`; otherwise several
    directories are checkpoints, whatever is in them.
    """
    try:
        places = [place for argument in arguments for place in _matched(Path(argument))]
        runs = runs or len(places) == 1
        return [_expanded(place) if runs else place for place in places]
    except OSError as error:
        raise MergeError(error.strerror or str(error), where=error.filename) from None


def _matched(path: Path) -> Iterator[Place]:
    # A file may be called a[1].pt: only what does not exist is a pattern.
    if os.path.lexists(path) or not glob.has_magic(str(path)):
        yield Place(path, (path,), "name")
        return
    paths = sorted(_matching(path))
    _refuse_unlisted(path.parts)
    if not paths:
        raise MergeError("no file matches the pattern", where=path)
    for one in paths:
        yield Place(one, (one,), "pattern")


def _expanded(place: Place) -> Place:
    """Return a place as a run, if it is one."""
    if place.path.is_dir():
        # A Trainer's folder may hold its final model beside checkpoint-N/. As a run it stands for
        # these folders; the files of the final model are not checkpoints of their own.
        whole = is_one(place.path)
        inside = [path for path in _of_run(place.path) if path.is_dir() or not whole]
        if inside and not (whole and of_a_run(place.path.name)):
            inside.sort(key=lambda path: natural(str(path)))
            return Place(place.path, tuple(inside), "run")
    return place


def final_models(places: Iterable[Place]) -> Iterator[str]:
    """Yield a note for each run that holds a final model too: which of the two is averaged."""
    for place in places:
        path = place.path
        if place.found == "run":
            # A file that names the newest is no model, but of the run.
            if is_one(path) and not latest(path):
                yield f"{path} holds a final model too, which is not averaged: its checkpoints are"
        elif path.is_dir() and not of_a_run(path.name):
            with contextlib.suppress(OSError):  # which is an error where it is read
                inside = [one.name for one in _of_run(path) if one.is_dir()]
                if inside:
                    what = "the final model is averaged, not its checkpoints"
                    yield f"{path}: {what} {named(inside)}"


def _matching(pattern: Path) -> list[Path]:
    return [Path(name) for name in glob.glob(str(pattern), recursive=True)]  # noqa: PTH207 - any root


def _refuse_unlisted(parts: Sequence[str]) -> None:
    """Raise MergeError for a folder that a pattern leads through and that cannot be listed."""
    # glob passes over what it cannot look into.
    for count in range(1, len(parts)):
        if glob.has_magic(parts[count]) or parts[count - 1] == "**":
            for folder in filter(Path.is_dir, _matching(Path(*parts[:count]))):
                try:
                    os.scandir(folder).close()
                except OSError as error:
                    raise failure(error, "cannot be listed", folder) from None


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


def fold_of(path: Path, run: Path) -> Path:
    """Return the folder that tells folds apart: fold*/ below or above, or that of the argument."""
    below = [one for one in path.parents if one.parent == run]
    return next((one for one in (*below, *path.parents) if _FOLD.match(one.name)), run)
