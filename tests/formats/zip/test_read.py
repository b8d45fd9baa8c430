"""merge_avg.formats.zip: zip checkpoints, byte for byte against torch.load."""

import contextlib
import io
import subprocess
import sys
import zipfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merge_avg.errors import MergeError
from merge_avg.formats import scan
from merge_avg.io._reader import Reader
from tests.helpers import merge_checkpoints
from tests.older import TORCH, since

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.complex64,
    torch.int64,
    torch.uint8,
    torch.uint16 if TORCH >= (2, 6) else torch.int16,  # which older ones cannot save
    torch.bool,
]


def rebuilt(path, info):
    """A tensor made from a layout and the file's raw bytes alone."""
    with path.open("rb") as file:
        file.seek(scan(path).offset(info.storage))
        raw = bytearray(file.read(info.storage.nbytes))
    dtype = getattr(torch, info.dtype.name)
    if not raw:
        return torch.empty(info.shape, dtype=dtype)
    return torch.frombuffer(raw, dtype=dtype).as_strided(info.shape, info.stride, info.start)


def same_bits(a, b):
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.numel():
        return True
    a, b = (t.clone(memory_format=torch.contiguous_format).flatten() for t in (a, b))
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@settings(max_examples=60)
@given(
    dtype=st.sampled_from(DTYPES),
    shape=st.lists(st.integers(0, 4), max_size=3),
    how=st.sampled_from(["plain", "transposed", "slice", "steps", "expanded", "parameter"]),
    depth=st.integers(0, 3),
    protocol=st.sampled_from([2, 3, 4, 5]),
)
def test_tensors_lie_where_the_layout_says(tmp_path_factory, dtype, shape, how, depth, protocol):
    """Every dtype, view, nesting and protocol: names and bytes are those that torch.load gives."""
    base = torch.randint(0, 2, [8, *shape]).to(dtype)
    views = {
        "plain": base,
        "transposed": base.transpose(0, -1),
        "slice": base[2:5],
        "steps": base[::3],
        "expanded": base[:1].expand(5, *shape),
        "parameter": base,
    }
    tensor = views[how]
    if how == "parameter":
        tensor = torch.nn.Parameter(tensor, requires_grad=False)
    value = {"w": tensor, "tied": tensor, "n": 3}
    for level in range(depth):
        value = {f"level{level}": value} if level % 2 else [value, "x"]
    path = tmp_path_factory.mktemp("zip") / "a.pt"
    torch.save(value, path, pickle_protocol=protocol)
    infos = scan(path).tensors
    assert [info.path[-1] for info in infos] == ["w", "tied"]
    assert infos[0].storage == infos[1].storage
    assert all(same_bits(rebuilt(path, info), tensor.detach()) for info in infos)


def test_top_level_entries_without_tensors_are_listed(tmp_path):
    """What is no tensor is known by its key."""
    torch.save({"epoch": 3, "model": {"w": torch.ones(2)}, "args": None}, tmp_path / "a.pt")
    assert scan(tmp_path / "a.pt").others == ("epoch", "args")


@since(2, 6, "which may leave out checksums")
def test_files_without_checksums_are_read_and_marked(tmp_path):
    """A file that torch wrote without CRC-32 is not damaged, only unchecked."""
    path = tmp_path / "a.pt"
    torch.serialization.set_crc32_options(compute_crc32=False)
    try:
        torch.save({"w": torch.ones(2)}, path)
    finally:
        torch.serialization.set_crc32_options(compute_crc32=True)
    layout = scan(path)
    assert "records no checksums" in layout.notes[0]
    assert layout.checksum(layout.tensors[0].storage) is None


def archive(path, records, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as file:
        for name, data in records.items():
            file.writestr(name, data)


@pytest.mark.parametrize(
    ("records", "says"),
    [
        ({"a/data.pkl": b"N.", "a/constants.pkl": b"N."}, "TorchScript"),
        ({"arr_0.npy": b""}, "NumPy"),
        ({"policy.pth": b"", "data": b""}, "Stable-Baselines3"),
        ({"readme.txt": b""}, "not a checkpoint of torch.save"),
        ({"a/data.pkl": b"N.", "a/byteorder": b"middle"}, "unknown byte order"),
        ({"a/data.pkl": b"garbage"}, "damaged"),
    ],
)
def test_other_archives_are_named(tmp_path, records, says):
    """Archives of other programs, byte orders and broken pickles are refused by name."""
    archive(tmp_path / "a.pt", records)
    with pytest.raises(MergeError, match=says):
        scan(tmp_path / "a.pt")


def repacked(path, method=zipfile.ZIP_STORED, *, swap=False):
    """An archive of torch.save packed anew by another program, perhaps of another byte order."""
    with zipfile.ZipFile(path) as file:
        records = {name: file.read(name) for name in file.namelist()}
    for name, data in records.items():
        if swap and name.endswith("byteorder"):
            records[name] = b"big"
        elif swap and "/data/" in name and not name.endswith("id"):
            records[name] = torch.frombuffer(bytearray(data), dtype=torch.int32).numpy().byteswap()
    archive(path, records, method)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("swap", [True, False])
def test_repacked_deflated_and_big_endian_archives_are_averaged(tmp_path, method, swap):
    """What another program packed, or another machine wrote, is averaged and kept as it should."""
    paths = []
    for fold in range(3):
        paths.append(tmp_path / f"{fold}.pt")
        weights = {"w": torch.arange(70000.0) + fold, "v": torch.full((3, 2), 1.0 * fold)}
        moments = torch.tensor([fold, 7], dtype=torch.int32)
        torch.save({"model": weights, "optimizer": moments}, paths[-1])
        repacked(paths[-1], method, swap=swap)
    merge_checkpoints(paths, tmp_path / "out.pt")
    merged = torch.load(tmp_path / "out.pt")
    assert torch.equal(merged["model"]["w"], torch.arange(70000.0) + 1)
    assert torch.equal(merged["model"]["v"], torch.ones(3, 2))
    assert merged["optimizer"].tolist() == [0, 7]


def test_a_record_that_cannot_be_unpacked_is_named(tmp_path):
    """Where there is no room to unpack a record, one error says so, and how much is needed."""
    path = tmp_path / "a.pt"
    torch.save({"w": torch.ones(2000)}, path)
    repacked(path, zipfile.ZIP_DEFLATED)
    reader = Reader(scan(path), tmp_path / "none")
    storage = scan(path).tensors[0].storage
    with pytest.raises(MergeError, match=r"'data/0' cannot be unpacked \(No such") as caught:
        reader.read(memoryview(bytearray(4)), storage, 0)
    assert "8,000 bytes are needed" in str(caught.value.hint)


@pytest.mark.parametrize("tool", ["zip", "zip64", "streamed"])
def test_archives_of_other_programs_are_read(tmp_path, tool):
    """Zip files as Python writes them: with comments, in zip64, and with sizes behind the data."""
    torch.save({"w": torch.arange(5.0)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as file:
        records = {name: file.read(name) for name in file.namelist()}
    buffer = io.BytesIO()
    if tool == "streamed":
        buffer.seekable = lambda: False
    with zipfile.ZipFile(buffer, "w") as file:
        file.comment = b"packed by hand" if tool == "zip" else b""
        for name, data in records.items():
            with file.open(name, "w", force_zip64=tool == "zip64") as record:
                record.write(data)
    (tmp_path / "b.pt").write_bytes(buffer.getvalue())
    merge_checkpoints([tmp_path / "a.pt", tmp_path / "b.pt"], tmp_path / "out.pt")
    assert torch.load(tmp_path / "out.pt")["w"].tolist() == [0, 1, 2, 3, 4]


def test_other_compressions_are_refused(tmp_path):
    """A record packed by a method that torch does not know is named, with the way out."""
    torch.save({"w": torch.ones(2000)}, tmp_path / "a.pt")
    repacked(tmp_path / "a.pt", zipfile.ZIP_BZIP2)
    with pytest.raises(MergeError, match="compressed in an unusual way"):
        scan(tmp_path / "a.pt")


def test_a_pickle_that_unpacks_without_end_is_refused(tmp_path):
    """A deflated pickle of absurd size is refused before it fills the memory."""
    archive(tmp_path / "a.pt", {"a/data.pkl": bytes(300 << 20)}, zipfile.ZIP_DEFLATED)
    with pytest.raises(MergeError, match="absurdly large"):
        scan(tmp_path / "a.pt")


def test_records_that_do_not_fit_are_refused(tmp_path):
    """A storage whose record is missing, or of another size, is named."""
    torch.save({"w": torch.ones(20)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as file:
        records = {name: file.read(name) for name in file.namelist()}
    for change, says in ((None, "no record"), (b"short", "expected 80")):
        changed = {n: d for n, d in records.items() if n != "a/data/0"}
        if change is not None:
            changed["a/data/0"] = change
        archive(tmp_path / "b.pt", changed)
        with pytest.raises(MergeError, match=says):
            scan(tmp_path / "b.pt")


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (torch.ones(2), "single tensor"),
        ({"w": torch.ones(2).to_sparse()}, None),
        ({"w": torch.ones(2, dtype=torch.complex64).conj()}, None),
    ],
)
def test_tensors_without_plain_numbers_are_marked(tmp_path, value, says):
    """Sparse tensors and lazy views carry what is wrong with them; a bare tensor is refused."""
    torch.save(value, tmp_path / "a.pt")
    if says:
        with pytest.raises(MergeError, match=says):
            scan(tmp_path / "a.pt")
    else:
        assert scan(tmp_path / "a.pt").tensors[0].trouble


def test_every_flipped_byte_is_survived(tmp_path):
    """A damaged file gives a layout or a MergeError, never another exception."""
    buffer = io.BytesIO()
    torch.save({"w": torch.ones(2), "n": [1, "x"]}, buffer)
    path = tmp_path / "a.pt"
    for place in range(0, len(buffer.getvalue()), 3):
        raw = bytearray(buffer.getvalue())
        raw[place] ^= 0xFF
        path.write_bytes(raw)
        with contextlib.suppress(MergeError):
            scan(path)


def test_scanning_needs_neither_torch_nor_numpy(tmp_path):
    """A layout is read without importing what takes seconds to import."""
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pt")
    code = (
        "import sys; from merge_avg.formats import scan; "
        f"assert scan({str(tmp_path / 'a.pt')!r}).tensors; "
        "assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
