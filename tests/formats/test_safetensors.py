"""merge_avg.formats.safetensors: against the safetensors library, and files that lie."""

import itertools
import json
import re
import subprocess
import sys
from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from merge_avg import merge_checkpoints
from merge_avg.checkpoint import BY_NAME, BY_SAFETENSORS, PROVENANCE, NewTensor
from merge_avg.errors import MergeError
from merge_avg.formats import check, safetensors, scan
from merge_avg.formats.safetensors import _opened, create
from tests.older import ordered, typed


def written(path, header, data=b""):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def entry(start, stop, dtype="F32", shape=None):
    shape = [(stop - start) // 4] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def tensor(name, dtype, shape):
    return NewTensor(name, BY_NAME[dtype], shape, (), 0, name, 0)


def library_reads(path):
    try:
        with _opened(path, "pt"):
            return True
    except SafetensorError:
        return False


def test_tensors_lie_where_the_library_reads_them(tmp_path):
    """Names, shapes, metadata and bytes are those of the safetensors library."""
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
        expected = tensors[str(info.path[0])]
        found = raw[layout.offset(info.storage) :][: info.storage.nbytes]
        assert found == expected.flatten().view(torch.uint8).numpy().tobytes() or not found
        assert info.shape == expected.shape


@typed
def test_every_dtype_of_the_library_has_the_size_that_it_says(tmp_path):
    """The library takes a tensor of each dtype in the table, with the bytes that are expected."""
    header, at = {}, 0
    for code, dtype in BY_SAFETENSORS.items():
        size = 2 if code == "F4" else 4 * dtype.itemsize
        header[code] = entry(at, at + size, code, [4])
        at += size
    check(scan(written(tmp_path / "a.safetensors", header, bytes(at))))


ATTACKS = {
    "hole": {"a": entry(0, 4), "b": entry(8, 12)},
    "overlap": {"a": entry(0, 8), "b": entry(4, 12)},
    "negative shape": {"a": entry(0, 12, shape=[-3])},
    "huge shape": {"a": entry(0, 12, shape=[2**62, 2**62])},
    "wrong size": {"a": entry(0, 12, shape=[2])},
    "float shape": {"a": entry(0, 12, shape=[3.0])},
    "float shape again": {"a": entry(0, 8, shape=[2]), "b": entry(8, 12, shape=[1.0])},
    "bool shape": {"a": entry(0, 4, shape=[1]), "b": entry(4, 12, "F64", shape=[True])},
    "reversed range": {"a": entry(12, 0, shape=[3])},
    "negative range": {"a": entry(-12, 0, shape=[3])},
    "range of one": {"a": {"dtype": "F32", "shape": [3], "data_offsets": [12]}},
    "range of texts": {"a": {"dtype": "F32", "shape": [3], "data_offsets": "ab"}},
    "half a byte": {"a": entry(0, 12, "F4", shape=[25])},
    "half a byte again": {"a": entry(0, 1, "F4", shape=[1]), "b": entry(1, 12, "U8", shape=[11])},
    "unknown dtype": {"a": entry(0, 12, dtype="F33")},
    "dtype of a list": {"a": entry(0, 12, dtype=["F32"])},
    "no shape": {"a": {"dtype": "F32", "data_offsets": [0, 12]}},
    "a number for a tensor": {"a": 3},
    "metadata of numbers": {"__metadata__": {"a": 1}, "a": entry(0, 12)},
    "deep": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "no JSON": b"{hello",
    "no UTF-8": b'{"\xff":1}',
    "past the end": {"a": entry(0, 400)},
    "bytes after": {"a": entry(0, 4)},
}
TWICE = {
    "a tensor": b'{"a":%b,"a":%b}' % ((json.dumps(entry(0, 12)).encode(),) * 2),
    "metadata": b'{"__metadata__":{"a":"b","a":"c"},"a":%b}' % json.dumps(entry(0, 12)).encode(),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_files_that_lie_are_refused_as_the_library_refuses_them(tmp_path, attack):
    """Each way in which a header can lie is a MergeError that names the file, before any check."""
    path = written(tmp_path / "a.safetensors", ATTACKS[attack], bytes(12))
    with pytest.raises(MergeError) as caught:
        scan(path)
    assert caught.value.where == str(path)
    assert "library" not in caught.value.what
    assert not library_reads(path)


@pytest.mark.parametrize("twice", TWICE)
def test_names_that_appear_twice_are_refused_although_the_library_takes_one(tmp_path, twice):
    """Which of two tensors of a name counts is left to each reader, so neither does here."""
    path = written(tmp_path / "a.safetensors", TWICE[twice], bytes(12))
    with pytest.raises(MergeError, match="a key appears twice"):
        scan(path)
    assert library_reads(path)


ODD = {
    "half a character": b'{"\\ud800":%b}',
    "half a character in a key": b'{"a":{"\\udfff":1,%b}',
    "minus zero": b'{"a":{"dtype":"F32","shape":[3],"data_offsets":[-0,12]}}',
    "NaN": b'{"a":{"x":NaN,%b}',
    "an endless number": b'{"a":{"x":1e999,%b}',
    "deep": b'{"a":{"x":' + b"[" * 300 + b"]" * 300 + b",%b}",
}


@pytest.mark.parametrize("odd", ODD)
def test_where_readers_of_json_disagree_the_library_decides(tmp_path, odd):
    """What Python reads and the library refuses is refused, also where no framework is loaded."""
    inside = json.dumps(entry(0, 12)).encode()
    header = ODD[odd].replace(b"%b", inside if odd == "half a character" else inside[1:])
    path = written(tmp_path / "a.safetensors", header, bytes(12))
    assert json.loads(header)
    code = (
        "from merge_avg.errors import MergeError; from merge_avg.formats import scan\n"
        f"try: scan({str(path)!r})\n"
        "except MergeError as error: print(error.what)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("the safetensors library does not accept it")


def test_escapes_and_further_keys_are_read(tmp_path):
    """A name in escapes, and keys of an entry that nobody knows, are odd but right."""
    raw = b'{"w\\u00f6":{"x":[1,"y"],%b}' % json.dumps(entry(0, 12)).encode()[1:]
    layout = scan(written(tmp_path / "a.safetensors", raw, bytes(12)))
    assert [info.path for info in layout.tensors] == [("wö",)]


DTYPES = ["F32", "BF16", "F8_E8M0", "F4", "C64", "BOOL", "F33"]
CORRUPT: st.SearchStrategy[object] = st.sampled_from(
    [None, 1, "F32", [], [1.0], [True], [-1], [0, 0], [0, 4], [2**64], {}]
)


@st.composite
def headers(draw):
    """A header, most often right, and the number of bytes that follow it."""
    header, at = {}, 0
    for name in draw(st.lists(st.sampled_from("abc"), max_size=3, unique=True)):
        dtype, shape = draw(st.sampled_from(DTYPES)), draw(st.lists(st.integers(0, 4), max_size=3))
        count = torch.Size(shape).numel()
        known = BY_SAFETENSORS.get(dtype)
        size = count // 2 if dtype == "F4" else count * (known.itemsize if known else 1)
        at += draw(st.sampled_from([0] * 9 + [1, -1]))
        stop = at + size + draw(st.sampled_from([0] * 9 + [1]))
        header[name] = entry(at, stop, dtype, shape)
        for field in draw(st.sampled_from([()] * 9 + [("shape",), ("dtype",), ("data_offsets",)])):
            header[name][field] = draw(CORRUPT)
        at = stop
    return header, max(at + draw(st.sampled_from([0] * 9 + [1, -1])), 0)


@typed
@given(made=headers(), spaces=st.integers(0, 8))
def test_whatever_is_read_the_library_reads_too(tmp_path_factory, made, spaces):
    """The two readers refuse the same headers of tensors, and see the same in the others."""
    header, nbytes = made
    path = tmp_path_factory.getbasetemp() / "agree.safetensors"
    raw = json.dumps(header).encode() + b" " * spaces
    written(path, raw, bytes(nbytes))
    refused = None
    try:
        assert len(scan(path).tensors) == len(header)
    except MergeError as error:
        refused = error.what
    assert library_reads(path) == (refused is None)
    assert "library" not in (refused or "")


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": BY_NAME["int32"]},
        {"shape": (1, 3)},
        {"path": ("b",), "storage": None},
    ],
)
def test_a_header_that_the_library_reads_otherwise_is_refused(tmp_path, change):
    """Another dtype, shape or name than the library's is an error that names the file."""
    path = written(tmp_path / "a.safetensors", {"a": entry(0, 12)}, bytes(12))
    layout = scan(path)
    info = layout.tensors[0]
    if "storage" in change:
        change = change | {"storage": replace(info.storage, name="b")}
    with pytest.raises(MergeError, match="reads its header in another way") as caught:
        check(replace(layout, tensors=(replace(info, **change),)))
    assert caught.value.where == str(path)
    with pytest.raises(MergeError, match="in another way"):
        check(replace(layout, metadata=(("format", "pt"),)))


@ordered
def test_two_tensors_in_another_order_are_refused(tmp_path):
    """Which bytes are whose is part of what the library has to see."""
    path = written(tmp_path / "a.safetensors", {"a": entry(0, 4), "b": entry(4, 8)}, bytes(8))
    layout = scan(path)
    with pytest.raises(MergeError, match="in another way"):
        check(replace(layout, tensors=layout.tensors[::-1]))


def test_a_file_that_the_library_refuses_is_refused(tmp_path):
    """The library's words are part of the message."""
    path = written(tmp_path / "a.safetensors", {"a": entry(0, 4)}, bytes(4))
    layout = scan(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(MergeError, match=r"safetensors library does not accept it \(.+\)"):
        check(layout)


def test_files_of_a_directory_are_checked(tmp_path):
    """A directory is checked file by file; files of other formats are passed over."""
    written(tmp_path / "a.safetensors", {"a": entry(0, 4)}, bytes(4))
    torch.save({"b": torch.ones(1)}, tmp_path / "b.pt")
    layout = scan(tmp_path)
    check(layout)
    written(tmp_path / "a.safetensors", {"a": entry(0, 4, "I32")}, bytes(4))
    with pytest.raises(MergeError, match="in another way"):
        check(layout)


@pytest.mark.parametrize("loaded", [None, "numpy", "torch"])
def test_the_library_is_asked_where_its_framework_is_loaded(tmp_path, loaded):
    """A scan imports neither torch nor NumPy, and opens the file twice only if one is there."""
    path = written(tmp_path / "a.safetensors", {"a": entry(0, 4)}, bytes(4))
    code = (
        f"import sys; {f'import {loaded}' if loaded else ''}\n"
        "from merge_avg.formats import scan\n"
        "before = set(sys.modules)\n"
        f"scan({str(path)!r})\n"
        "print({'torch', 'numpy'} & (set(sys.modules) - before), 'safetensors' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"set() {loaded is not None}\n"


def test_a_header_is_parsed_once_for_equal_files(tmp_path):
    """Files of one run share their tensors; the number of a shard is part of what they are."""
    for name in "ab":
        written(tmp_path / name, {"a": entry(0, 4)}, bytes(4))
    first, second = scan(tmp_path / "a"), scan(tmp_path / "b")
    assert first.tensors is second.tensors
    with (tmp_path / "a").open("rb") as file:
        other = safetensors.scan(file, first.files[0], 1)
    assert other.tensors[0].storage.file == 1


@pytest.mark.parametrize(
    ("attack", "words"),
    [
        ("wrong size", "tensor 'a' has 12 bytes, expected 8 for its shape and dtype"),
        ("half a byte", "tensor 'a' has 12 bytes, expected whole bytes"),
        ("reversed range", "tensor 'a' has an impossible range"),
        ("hole", "a hole before tensor 'b'"),
        ("overlap", "an overlap at tensor 'b'"),
        ("past the end", "it is cut short: 85 bytes, expected 473"),
        ("bytes after", "8 bytes follow after the last tensor"),
    ],
)
def test_what_lies_is_named(tmp_path, attack, words):
    """A message says which tensor it is, how many bytes there are, and how many there should be."""
    path = written(tmp_path / "a.safetensors", ATTACKS[attack], bytes(12))
    with pytest.raises(MergeError, match=re.escape(words)):
        scan(path)


@pytest.mark.parametrize("length", [2**63, 2**40, 100, 3])
def test_header_lengths_that_lie_are_refused(tmp_path, length):
    """A header longer than the file, or than the format allows, reads nothing."""
    path = tmp_path / "a.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b"{}")
    short = f"cut short: 10 bytes, expected {8 + length:,}"
    with pytest.raises(MergeError, match=short if length < 2**40 else "neither a zip"):
        scan(path)
    path.write_bytes(bytes(8) + b"{}")
    with pytest.raises(MergeError, match="the safetensors header is damaged"):
        scan(path)


@pytest.mark.parametrize(
    ("loaded", "installed", "framework"),
    [
        ("torch", "numpy", "pt"),
        ("numpy", "numpy", "numpy"),
        ("", "numpy", "numpy"),
        ("", "torch", "pt"),
        ("", "", "numpy"),
    ],
)
def test_the_library_opens_files_by_what_is_loaded(
    tmp_path, monkeypatch, loaded, installed, framework
):
    """A loaded torch or NumPy opens them; for odd headers NumPy or torch, if there is one."""
    usual = written(tmp_path / "a.safetensors", {"a": entry(0, 4)}, bytes(4))
    odd = written(tmp_path / "b.safetensors", {"a": entry(0, 4) | {"x": 1}}, bytes(4))
    for name in {"torch", "numpy"} - {loaded}:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == installed)
    opened = mock.Mock(side_effect=SafetensorError)
    monkeypatch.setattr("safetensors.safe_open", opened)
    if not loaded:
        scan(usual)
        assert not opened.called
    for path in (usual, odd) if loaded else (odd,):
        with pytest.raises(MergeError, match="the safetensors library does not accept it"):
            scan(path)
        opened.assert_called_with(path, framework, backend="pread")


def created(path, layout, record=b""):
    """Write a layout, with zeros for all tensors, and return its bytes."""
    with path.open("wb") as file:
        for offset, data in itertools.chain(layout.opening(), layout.closing(record, [0, 0])):
            file.seek(offset)
            file.write(data)
        assert file.tell() == layout.start(record)
        file.truncate(layout.nbytes(record))
    return path.read_bytes()


@pytest.mark.parametrize("record", [b"", '{"source": "ö"}'.encode()])
@pytest.mark.parametrize("recorded", [True, False])
def test_new_files_load_and_say_pt(tmp_path, record, recorded):
    """A layout is a valid file for the library, with format pt, the metadata and the record."""
    tensors = [tensor("wö", "float32", (2, 3)), tensor("empty", "int8", (0,))]
    layout = create(tensors, {"a": "b", PROVENANCE: "of another file"}, recorded=recorded)
    path = tmp_path / "a.safetensors"
    raw = created(path, layout, record)
    assert "wö".encode() in raw  # readers disagree on escapes
    assert torch.equal(load_file(path)["wö"], torch.zeros(2, 3))
    more = {PROVENANCE: record.decode()} if record and recorded else {}
    with safe_open(path, "pt") as opened:
        assert opened.metadata() == {"format": "pt", "a": "b"} | more
    assert [(slot.offset, slot.nbytes) for slot in layout.slots.values()] == [(0, 24), (24, 0)]
    assert layout.start(record) % 8 == 0


def test_new_files_may_be_empty(tmp_path):
    """A file without a tensor is valid, with its record too."""
    path = tmp_path / "a.safetensors"
    created(path, create([], {}), b"{}")
    assert load_file(path) == {}
    assert scan(path).tensors == ()


def test_names_that_no_file_can_hold_are_refused():
    """Half a character, and the name of the metadata, are no names of tensors."""
    names = ("a", "w\ud800", "b")
    with pytest.raises(MergeError, match=r"cannot hold the name 'w\\ud800'"):
        create([tensor(name, "float32", (1,)) for name in names], {})
    with pytest.raises(MergeError, match="name '__metadata__'"):
        create([tensor("__metadata__", "float32", (1,))], {})


@ordered
def test_packed_codes_are_copied_as_they_lie(tmp_path):
    """A tensor of 4-bit codes takes half a byte an element in the copy too, and is kept."""
    paths = [tmp_path / "0.safetensors", tmp_path / "1.safetensors"]
    for path in paths:
        written(path, {"codes": entry(0, 4, "F4", [8]), "w": entry(4, 8)}, bytes(range(4)) * 2)
    out = tmp_path / "out.safetensors"
    merge_checkpoints(paths, out, exclude=("codes",))
    check(scan(out))
    layout = scan(out)
    assert out.read_bytes()[layout.offset(layout.tensors[0].storage) :][:4] == bytes(range(4))


def test_dtypes_without_a_code_are_refused():
    """complex128 has no place in the format, and the message says what has."""
    with pytest.raises(MergeError, match="complex128"):
        create([tensor("w", "complex128", (1,))], {})
