"""Notes for the user on the checkpoints and the output of a job."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from merge_avg.checkpoint import TEMPLATE, Layout, Roles, dotted, kind_of
from merge_avg.errors import named
from merge_avg.formats.beside import notes_beside
from merge_avg.formats.bounded import read
from merge_avg.formats.shards import shard_of
from merge_avg.options import Options
from merge_avg.plan._composites import Together
from merge_avg.plan._targets import OutputLayout
from merge_avg.plan._units import Plan


def stale_notes(roles: Roles, together: Together, options: Options) -> Iterator[str]:
    """Yield a note where an optimizer's state, which is kept, does not fit factors any more."""
    optimizer = any(one.reason.startswith("optimizer") for one in roles.kept)
    if options.lora != "factors" and together.texts and optimizer and not options.weights_only:
        what = "the optimizer's state is the template's, and does not fit factors of another rank"
        yield f"{what}; --weights-only leaves it out"


def notes_of(plan: Plan, options: Options, output: OutputLayout, count: int) -> list[str]:
    """Return notes for the user on the first `count` checkpoints, beside those on names."""
    layouts = plan.layouts[:count]
    notes = [*dict.fromkeys(note for layout in layouts for note in layout.notes)]
    shards = (layout.path for layout in layouts if not layout.members and shard_of(layout.path))
    if path := next(shards, None):
        what = f"one of {shard_of(path)} shards; to average all of them, pass their directory"
        notes.append(f"{path} is {what}")
    if output.directory:
        folders = [layout for layout in layouts if layout.members]
        notes += notes_beside(folders, plan.texts) if layouts[0].members else ()
        # Files that say how a model of Hugging Face is built.
        for name in ("config.json", "adapter_config.json"):
            there = [f for layout in folders for f in layout.files if f.path == layout.path / name]
            for file in there:
                read(file.path)  # nobody has such a file of gigabytes
            if there and options.dtype not in (None, TEMPLATE) and name not in plan.texts:
                notes.append(f"{name} is the template's, and may still name another dtype")
    return [*notes, *_array_notes(layouts, output)]


def _array_notes(layouts: Sequence[Layout], output: OutputLayout) -> Iterator[str]:
    """Yield a note on NumPy arrays that differ from the template's, unless they are state."""
    optimizers = set(layouts[0].optimizers)
    others = [dict(layout.arrays) for layout in layouts[1:]]
    differ = [
        dotted(path)
        for path, digest in layouts[0].arrays
        if not any(kind_of(key) or path[:depth] in optimizers for depth, key in enumerate(path))
        and any(other.get(path, digest) != digest for other in others)
    ]
    if differ:
        what = "is a NumPy array that differs", "the template's is kept"
        if len(differ) > 1:
            what = "are NumPy arrays that differ", "the template's are kept"
        kept = what[1] if output.whole else "the output has none"
        yield f"{named(differ)} {what[0]} between the checkpoints; {kept}"
