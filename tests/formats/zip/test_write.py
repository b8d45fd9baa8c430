"""merge_avg.formats.zip.write: archives that torch and zipfile read."""

import itertools
import zipfile
import zlib

import pytest
import torch

from merge_avg.checkpoint import BY_NAME, NewTensor
from merge_avg.formats.zip import create
from tests.older import TORCH

RECORD = b'{"merge_avg": "1"}'


def tensor(name, dtype, shape, stride, start, storage, nbytes):
    return NewTensor(name, BY_NAME[dtype], shape, stride, start, storage, nbytes)


def filled(path, layout, contents, record):
    """Write a layout whose slots hold these bytes."""
    checksums = [0] * layout.count
    with path.open("wb") as file:
        file.truncate(layout.nbytes(record))
        for name, slot in layout.slots.items():
            file.seek(slot.offset)
            file.write(contents[name])
            checksums[slot.number] = zlib.crc32(contents[name])
        for offset, data in itertools.chain(layout.opening(), layout.closing(record, checksums)):
            file.seek(offset)
            file.write(data)
    return path


@pytest.mark.parametrize("recorded", [True, False])
def test_a_new_state_dict_is_what_torch_loads(tmp_path, recorded):
    """Names, dtypes, shapes, views and ties come back; the archive passes zipfile's own test."""
    numbers, short = torch.arange(6.0), torch.arange(3).to(torch.uint16)
    tensors = [
        tensor("w", "float32", (2, 3), (3, 1), 0, "s", 24),
        tensor("wö.t", "float32", (3, 2), (1, 3), 0, "s", 24),
        tensor("tail", "float32", (2,), (1,), 4, "s", 24),
        tensor("untyped", "uint16", (3,), (1,), 0, "u", 6),
        tensor("none", "float64", (0,), (1,), 0, "e", 0),
    ]
    contents = {"s": numbers.numpy().tobytes(), "u": short.numpy().tobytes(), "e": b""}
    layout = create(tensors, {}, recorded=recorded)
    path = filled(tmp_path / "a.pt", layout, contents, RECORD)
    loaded = torch.load(path, weights_only=TORCH >= (2, 6))  # which older ones do not with uint16
    assert torch.equal(loaded["w"], numbers.view(2, 3))
    assert torch.equal(loaded["wö.t"], numbers.view(2, 3).t())
    assert loaded["tail"].tolist() == [4, 5]
    assert loaded["tail"].untyped_storage().data_ptr() == loaded["w"].data_ptr()
    assert torch.equal(loaded["untyped"], short)
    assert loaded["none"].shape == (0,)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert ("archive/merge_avg.json" in archive.namelist()) == recorded
        if recorded:
            assert archive.read("archive/merge_avg.json") == RECORD


def test_it_has_the_bytes_that_torch_would_write(tmp_path):
    """Layout, flags and directory are those of torch.save, but for the pickle's memo."""
    value = torch.arange(6.0)
    torch.save({"w": value}, tmp_path / "archive.pt")
    theirs = zipfile.ZipFile(tmp_path / "archive.pt")
    layout = create([tensor("w", "float32", (6,), (1,), 0, "s", 24)], {}, recorded=False)
    path = filled(tmp_path / "b.pt", layout, {"s": value.numpy().tobytes()}, b"")
    ours = zipfile.ZipFile(path)
    with theirs, ours:
        for one in ours.infolist():
            if one.filename not in theirs.namelist() and TORCH < (2, 7):
                continue  # the records .format_version and .storage_alignment are newer
            other = theirs.getinfo(one.filename)
            assert (one.flag_bits, one.compress_type) == (other.flag_bits, other.compress_type)
            if one.filename != "archive/data.pkl":
                assert ours.read(one) == theirs.read(other)


def test_data_begins_at_multiples_of_64(tmp_path):
    """Every slot is aligned, whatever the names before it."""
    tensors = [tensor("x" * n, "int8", (n,), (1,), 0, f"{n}", n) for n in range(1, 70)]
    layout = create(tensors, {})
    assert all(slot.offset % 64 == 0 for slot in layout.slots.values())


def test_sizes_beyond_32_bits_are_laid_out_in_zip64(tmp_path):
    """The fields that hold them are there, and the file has exactly the size that was said."""
    size = 5 << 30
    layout = create(
        [
            tensor("w", "int8", (size,), (1,), 0, "s", size),
            tensor("v", "int8", (1,), (1,), 0, "t", 1),
        ],
        {},
    )
    path = tmp_path / "a.pt"
    with path.open("wb") as file:  # sparse: nothing is written to the slots
        for offset, data in itertools.chain(
            layout.opening(), layout.closing(RECORD, [0] * layout.count)
        ):
            file.seek(offset)
            file.write(data)
    assert path.stat().st_size == layout.nbytes(RECORD)
    with zipfile.ZipFile(path) as archive:
        infos = {info.filename: info for info in archive.infolist()}
    assert infos["archive/data/0"].file_size == size
    assert infos["archive/data/1"].header_offset > size
