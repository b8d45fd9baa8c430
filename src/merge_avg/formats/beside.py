"""Files beside weights in directories: which differ, and which rows of embeddings that concerns.

    config.json, tokenizer_config.json     how a model is built and fed
    vocab.json, added_tokens.json          {"token": id, ...}
    vocab.txt                              a token a line
    tokenizer.json                         {"model": {"vocab": ...}, "added_tokens": [...]}

An output has the template's. What they say may not fit the weights of others.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from merge_avg.checkpoint import File, Layout
from merge_avg.errors import named
from merge_avg.formats import bounded
from merge_avg.formats.directory import latest, of_a_run, relative
from merge_avg.formats.shards import is_index

# What training loops write anew with each checkpoint, and nobody who loads the model reads.
PROGRESS = re.compile(rb"global_step|log_history|unixtime|\"(train|valid)_loss\"")
# Megatron's, and verl's; and DeepSpeed's.
_TRACKERS = ("latest_checkpointed_iteration.txt", "latest")
_PROSE = (".md", ".log", ".csv")
_TOKENIZERS = (".model", ".spm")  # of sentencepiece, which are not text
_LARGEST = 1 << 24  # bytes of a table of tokens: those of 250,000 are shorter
_MOST_TOKENS = 1 << 20
_MOST_NAMES = 8


def notes_beside(layouts: Sequence[Layout], written: Container[str] = ()) -> Iterator[str]:
    """Yield notes on what the template's directory has and others have otherwise.

    Files that are `written` anew are left out.
    """
    folders = [
        {relative(one, k): one.files[k] for k, member in enumerate(one.members) if member is None}
        for one in {layout.path: layout for layout in layouts}.values()
    ]
    differing: list[str] = []
    ids: set[int] = set()
    for name, ours in folders[0].items():
        others = [folder[name] for folder in folders[1:] if name in folder]
        if others and name not in written and not is_index(name) and _differ(name, ours, others):
            differing.append(name)
            known = _tokens(name, ours.path)
            for other in others if known else ():
                theirs = _tokens(name, other.path)
                ids |= {i for i in known.keys() | theirs if known.get(i) != theirs.get(i)}
    if len(differing) == 1:
        yield f"{differing[0]} differs between the checkpoints; the template's is kept"
    elif differing:
        what = "differ between the checkpoints; the template's are kept"
        yield f"{named(differing, _MOST_NAMES)} {what}"
    if ids:
        first, last = min(ids), max(ids)
        some = f"token ids {first} to {last} mean" if len(ids) > 1 else f"token id {first} means"
        if 1 < len(ids) <= last - first:
            some = f"{len(ids):,} token ids from {first} to {last} mean"
        yield f"{some} different tokens: these rows of embeddings are means of unrelated vectors"


def tracker_notes(template: Path, output: Path) -> Iterator[str]:
    """Yield a note where loaders find a checkpoint by a file that is beside it, not in it.

    Only the output is written: such a file says which of all checkpoints there is the one to load,
    and that is for the user to say.
    """
    for name in _TRACKERS:
        told = latest(template.absolute().parent, name)
        if not told or not of_a_run(template.absolute().name):
            continue
        place, wanted = output.absolute().parent / name, output.name
        if told.isdecimal():  # Megatron's number of steps, and not the folder's name
            numbers = re.findall(r"\d+", output.name)
            if not of_a_run(output.name) or len(numbers) != 1:
                what = f"loaders find it by {name} and a name such as {template.name} only"
                yield f"{output}: {what}"
                continue
            wanted = str(int(numbers[0]))
        there = latest(place.parent, name)
        if not there:
            yield f"loaders find {output} by a file beside it: echo {wanted} > {place}"
        elif there != wanted:
            yield f"{place} names {there!r}: loaders take that one, and not {output}"


def _differ(name: str, ours: File, others: Sequence[File]) -> bool:
    """Return whether a file that says something about the model differs between checkpoints."""
    suffix = PurePosixPath(name).suffix.lower()
    if not suffix or suffix in _PROSE:
        return False
    resized = any(other.nbytes != ours.nbytes for other in others)
    if max(file.nbytes for file in (ours, *others)) > bounded.LARGEST:
        return resized
    head, digest = bounded.sketch(ours.path)
    if (b"\0" in head and suffix not in _TOKENIZERS) or PROGRESS.search(head):
        return False
    return resized or any(bounded.sketch(other.path)[1] != digest for other in others)


def _tokens(name: str, path: Path) -> Mapping[int, str]:
    """Return the tokens that a file tells, by their ids; none if it is another kind of file."""
    last = PurePosixPath(name).name.lower()
    if not re.search("vocab|token", last) or path.stat().st_size > _LARGEST:
        return {}
    raw = bounded.read(path, _LARGEST)
    if last.endswith(".txt"):
        few = raw.count(b"\n") < _MOST_TOKENS
        return dict(enumerate(raw.decode("utf-8", "replace").split("\n") if few else ()))
    try:
        found = dict(_pairs(bounded.loads(raw)))
    except ValueError:
        return {}
    return {i: token for i, token in found.items() if isinstance(token, str)}


def _pairs(table: Mapping[str, Any]) -> Iterator[tuple[int, Any]]:
    match table:
        case {"model": {"vocab": dict() as vocab}}:
            yield from _pairs(vocab)
        case {"model": {"vocab": list() as vocab}}:  # of unigrams, with their scores
            yield from ((i, one[0]) for i, one in enumerate(vocab) if isinstance(one, list) and one)
        case _:
            yield from ((i, token) for token, i in table.items() if type(i) is int)
    added, decoder = table.get("added_tokens"), table.get("added_tokens_decoder")
    for entry in added if isinstance(added, list) else ():
        match entry:
            case {"id": int(i), "content": token}:
                yield i, token
    for i, entry in decoder.items() if isinstance(decoder, dict) else ():
        if i.isdecimal() and len(i) < 10 and isinstance(entry, dict):
            yield int(i), entry.get("content")
