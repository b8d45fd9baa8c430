"""merge_avg.checkpoint: file layouts, as each format makes them."""

import json
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.distributed.checkpoint import save as save_dcp  # type: ignore[attr-defined]

from merge_avg.checkpoint import BY_NAME, FileLayout, NewTensor, RecordFile, Slot, Storage
from merge_avg.formats import copy, format_for, scan

KINDS = ["torch-zip", "torch-legacy", "safetensors", "torch-dcp", "new .pt", "new .safetensors"]
STATE = {
    "é.weight": torch.randn(5, 7),
    "b": torch.ones(3, dtype=torch.int16),
    "none": torch.ones(0),
}


def new(suffix, names=("a", "ü"), *, recorded=True):
    """The layout of a new file."""
    f32 = BY_NAME["float32"]
    tensors = [NewTensor(name, f32, (3, 2), (2, 1), 0, name, 24) for name in names]
    return format_for(suffix).create(tensors, {}, recorded=recorded)


def layouts(folder, kind) -> Iterator[FileLayout]:
    """The layouts of the files of a copy, of which the float weights are averaged."""
    if kind.startswith("new"):
        yield new(kind.removeprefix("new "))
        return
    path = folder / "a"
    if kind == "safetensors":
        save_file(STATE, path)
    elif kind == "torch-dcp":
        save_dcp({"model": STATE}, checkpoint_id=path, no_dist=True)
    else:
        zipped = kind == "torch-zip"
        torch.save(
            {"model": STATE, "m": torch.ones(9)}, path, _use_new_zipfile_serialization=zipped
        )
    layout = scan(path)
    for number, member in enumerate(layout.members or (layout,)):
        mine = [s for t in layout.tensors for s in t.storage.ranges if s.file == number]
        averaged = {storage.name for storage in mine[::2] if storage.nbytes}
        if member and averaged:  # unlike the file that tells of the others in a set
            assert member.format == kind
            yield copy(member, {}, averaged, recorded=not layout.members)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("record", [b"", b'{"merge_avg": "0"}', b'{"name": "\xc3\xa9"}' * 99])
def test_slots_and_literals_tile_a_file(tmp_path, kind, record):
    """No two slots overlap, and literals fill the rest of the file: no byte has two sources."""
    for layout in layouts(tmp_path, kind):
        start, spans = layout.start(record), []
        for slot in layout.rooms.values():
            spans.append((start + slot.offset, start + slot.offset + slot.nbytes))
            assert slot.number < layout.count
        for at, data in (*layout.opening(), *layout.closing(record, [0] * layout.count)):
            spans.append((at, at + len(data)))
        end = 0
        for first, last in sorted(spans):
            assert first == end
            end = last
        assert end == layout.nbytes(record)
        numbers = [slot.number for slot in layout.rooms.values()]
        assert len(set(numbers)) == len(numbers)


texts = st.text(st.characters(codec="utf-8"), max_size=200)


@given(texts, st.lists(texts.filter(lambda name: name != "__metadata__"), unique=True, max_size=3))
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_record_of_any_text_has_room(suffix, text, names):
    """The size and the start of the slots are known from a draft, whatever the record says."""
    record = json.dumps({"inputs": text}, ensure_ascii=False).encode()
    draft = json.dumps({"inputs": "0" * len(text.encode())}).encode()
    layout = new(suffix, names)
    closing = list(layout.closing(record, [0] * layout.count))
    assert layout.nbytes(record) == max(at + len(data) for at, data in closing + [
        (layout.start(record) + slot.offset, bytes(slot.nbytes)) for slot in layout.slots.values()
    ])  # fmt: skip
    whole = b"".join(data for _, data in closing)
    if suffix == ".pt":  # as it is, in a record of its own
        assert record in whole
        if len(draft) == len(record):
            assert layout.nbytes(draft) == layout.nbytes(record)
    else:  # a text in the header
        header = json.loads(whole[8:])
        assert header["__metadata__"]["merge_avg"] == record.decode()
        assert layout.start(record) == len(whole)
    assert new(suffix, names, recorded=False).start(record) <= layout.start(record)


def test_a_file_for_the_record_alone():
    """In a directory the record has a file, which is as long as the record."""
    layout = RecordFile()
    assert (layout.nbytes(b"abc"), layout.start(b"abc"), layout.count) == (3, 0, 0)
    assert list(layout.opening()) == []
    assert list(layout.closing(b"abc", [])) == [(0, b"abc")]


def test_rooms_are_slots_and_copies():
    """Room is found by name, whether weights are written there or bytes are copied."""
    layout = FileLayout(8, (), {"a": Slot(0, 0, 4)}, ((Storage("b", 0, 4), Slot(3, 4, 4)),))
    assert layout.rooms == {"a": Slot(0, 0, 4), "b": Slot(3, 4, 4)}
    assert layout.count == 4  # of numbers, not of slots
