"""Sets of files that one file tells of, such as distributed checkpoints: which are written anew."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import PurePosixPath

from merge_avg.checkpoint import Layout, TreePath, kind_of
from merge_avg.formats import Asked, NewSet, Piece, set_format
from merge_avg.formats.directory import relative


def unneeded(template: Layout, serve: Collection[TreePath] | None) -> set[tuple[int, str]]:
    """Return the storages of tensors that do not serve, by their file's number and their name."""
    return {
        (part.file, part.name)
        for info in (template.tensors if serve is not None and template.members else ())
        if info.path not in (serve or ())
        for part in info.storage.ranges
    }


def sets_anew(template: Layout, asked: Asked) -> dict[int, tuple[NewSet, frozenset[int]]]:
    """Return the sets that cannot stay as they are, by the number of the file that tells of all.

    With each come the numbers of its files. A set that nothing of serves goes or stays as a whole.
    """
    found = {}
    for number, file in enumerate(template.files if template.members else ()):
        form, member = set_format(file.path.name), template.members[number]
        if form is None or member is None:
            continue
        folder = file.path.parent
        numbers = frozenset(
            k
            for k, one in enumerate(template.members)
            if one is not None and one.set_member and template.files[k].path.parent == folder
        )
        storages = {
            (part.file, part.name) for info in member.tensors for part in info.storage.ranges
        }
        lean = asked.lean and any(map(kind_of, member.others))
        changed = any(asked.converted.get(k) for k in numbers)
        wanted = lean or changed or asked.limit or not storages.isdisjoint(asked.dropped)
        if wanted and not storages.issubset(asked.dropped):
            found[number] = form.code.rewrite(template, number, asked), numbers
    return found


def pieces_of(
    template: Layout, anew: Mapping[int, tuple[NewSet, frozenset[int]]], places: Mapping[str, int]
) -> dict[tuple[int, str], list[tuple[int, Piece]]]:
    """Return what chunks of sets became that are written anew, with the number of their file."""
    pieces = {}
    for number, (new, _) in anew.items():
        folder = PurePosixPath(relative(template, number)).parent
        for home, some in new.pieces.items():
            pieces[home] = [(places[str(folder / one.file)], one) for one in some]
    return pieces
