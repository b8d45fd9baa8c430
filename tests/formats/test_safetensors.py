"""merge_avg.formats.safetensors: against the safetensors package, and files that lie."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from merge_avg.checkpoint._dtypes import BY_NAME
from merge_avg.errors import MergeError
from merge_avg.formats._scan import scan
from merge_avg.formats.safetensors import fresh


def written(path, header, data=b""):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def entry(start, stop, dtype="F32", shape=None):
    shape = [(stop - start) // 4] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def test_tensors_lie_where_the_package_reads_them(tmp_path):
    """Names, shapes, metadata and bytes are those of the safetensors package."""
    tensors = {
        f"{dtype}": torch.ones(2, 3).to(dtype)
        for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float8_e5m2)
    } | {"empty": torch.zeros(0, 3), "scalar": torch.tensor(2.0)}
    path = tmp_path / "a.safetensors"
    save_file(tensors, path, {"key": "value"})
    layout = scan(path)
    raw = path.read_bytes()
    assert dict(layout.metadata) == {"key": "value"}
    assert {info.path[0] for info in layout.tensors} == set(tensors)
    for info in layout.tensors:
        tensor = tensors[str(info.path[0])]
        place = info.storage
        found = raw[place.offset : place.offset + place.nbytes]
        assert found == tensor.flatten().view(torch.uint8).numpy().tobytes() or not found
        assert info.shape == tensor.shape


ATTACKS = {
    "hole": {"a": entry(0, 4), "b": entry(8, 12)},
    "overlap": {"a": entry(0, 8), "b": entry(4, 12)},
    "negative shape": {"a": entry(0, 12, shape=[-3])},
    "huge shape": {"a": entry(0, 12, shape=[2**62, 2**62])},
    "wrong size": {"a": entry(0, 12, shape=[2])},
    "float shape": {"a": entry(0, 12, shape=[3.0])},
    "reversed range": {"a": entry(12, 0, shape=[3])},
    "unknown dtype": {"a": entry(0, 12, dtype="F33")},
    "no shape": {"a": {"dtype": "F32", "data_offsets": [0, 12]}},
    "metadata of numbers": {"__metadata__": {"a": 1}, "a": entry(0, 12)},
    "duplicate key": b'{"a":%b,"a":%b}' % ((json.dumps(entry(0, 12)).encode(),) * 2),
    "deep": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "no JSON": b"{hello",
    "no UTF-8": b'{"\xff":1}',
    "past the end": {"a": entry(0, 400)},
    "bytes after": {"a": entry(0, 4)},
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_files_that_lie_are_refused(tmp_path, attack):
    """Each way in which a header can lie is a MergeError that names the file."""
    path = written(tmp_path / "a.safetensors", ATTACKS[attack], bytes(12))
    with pytest.raises(MergeError) as caught:
        scan(path)
    assert caught.value.where == str(path)


@pytest.mark.parametrize("length", [2**63, 2**40, 100, 0])
def test_header_lengths_that_lie_are_refused(tmp_path, length):
    """A header longer than the file, or than the format allows, reads nothing."""
    path = tmp_path / "a.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b"{}")
    with pytest.raises(MergeError):
        scan(path)


def test_fresh_files_load_and_say_pt(tmp_path):
    """A skeleton is a valid file for the package, with format pt and the metadata given."""
    skeleton = fresh(
        [("wö", BY_NAME["float32"], (2, 3)), ("empty", BY_NAME["int8"], (0,))], {"a": "b"}
    )
    path = tmp_path / "a.safetensors"
    with path.open("wb") as file:
        for offset, data in skeleton.literals:
            file.seek(offset)
            file.write(data)
        file.truncate(skeleton.nbytes)
    assert torch.equal(load_file(path)["wö"], torch.zeros(2, 3))
    with safe_open(path, "pt") as opened:
        assert opened.metadata() == {"format": "pt", "a": "b"}


def test_dtypes_without_a_code_are_refused():
    """complex128 has no place in the format, and the message says what has."""
    with pytest.raises(MergeError, match="complex128"):
        fresh([("w", BY_NAME["complex128"], (1,))], {})
