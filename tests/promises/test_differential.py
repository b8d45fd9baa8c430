"""Generated files are read bit for bit as torch and safetensors read them.

The default suite tries a few hundred files, and `-m large` thousands.
"""

import warnings
from collections import OrderedDict

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from merge_avg.checkpoint import BY_NAME
from merge_avg.engine._restride import strided
from merge_avg.formats import scan
from merge_avg.io import Reader
from tests.helpers import bits
from tests.older import TORCH

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.complex64,
    torch.complex128,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    *((torch.uint16, torch.uint32, torch.uint64) if TORCH >= (2, 6) else ()),  # to save them
]
SAFE = [dtype for dtype in DTYPES if dtype != torch.complex128]
NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=0, max_size=8)
PLAIN = st.none() | st.booleans() | st.integers(-(2**40), 2**70) | st.floats() | st.text(max_size=5)


@st.composite
def bases(draw, dtypes=DTYPES):
    """Draw a tensor of random bytes that owns its storage."""
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    dtype = draw(st.sampled_from(dtypes))
    count = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.tensor(list(draw(st.binary(min_size=count, max_size=count))), dtype=torch.uint8)
    if dtype == torch.bool:
        raw &= 1
    return raw.view(dtype).reshape(shape)


@st.composite
def views(draw, base):
    """Draw a view of a tensor: cut, stepped, transposed, expanded, or the tensor itself."""
    for _ in range(draw(st.integers(0, 3))):
        how = draw(st.sampled_from(["cut", "step", "transpose", "expand", "index", "diagonal"]))
        dims = base.dim()
        if how == "expand":
            base = base.unsqueeze(0).expand(draw(st.integers(1, 3)), *base.shape)
        elif not dims:
            continue
        elif how == "transpose":
            base = base.transpose(draw(st.integers(0, dims - 1)), draw(st.integers(0, dims - 1)))
        elif how == "diagonal" and dims > 1:
            base = base.diagonal()
        else:
            dim = draw(st.integers(0, dims - 1))
            extent = base.shape[dim]
            start = draw(st.integers(0, extent))
            if how == "cut":
                base = base.narrow(dim, start, draw(st.integers(0, extent - start)))
            elif how == "step" and extent:
                base = base[(slice(None),) * dim + (slice(None, None, draw(st.integers(1, 3))),)]
            elif how == "index" and start < extent:
                base = base.select(dim, start)
    return base


@st.composite
def trees(draw):
    """Draw a state dict in containers, some of whose tensors share storages."""
    pool = [draw(bases()) for _ in range(draw(st.integers(1, 3)))]

    def leaf():
        kind = draw(st.sampled_from(["view", "view", "tie", "parameter", "plain"]))
        one = draw(st.sampled_from(pool))
        if kind == "plain":
            return draw(PLAIN)
        if kind == "tie":
            return one
        view = draw(views(one))
        numbers = view.is_floating_point() and view.dtype.itemsize > 1
        return torch.nn.Parameter(view) if kind == "parameter" and numbers else view

    def node(depth):
        if not depth or draw(st.booleans()):
            return leaf()
        count = draw(st.integers(0, 3))
        kind = draw(st.sampled_from(["dict", "ordered", "list", "tuple", "numbers"]))
        children = [node(depth - 1) for _ in range(count)]
        if kind in ("list", "tuple"):
            return children if kind == "list" else tuple(children)
        keys = draw(
            st.lists(
                st.integers(0, 9) if kind == "numbers" else NAMES,
                min_size=count, max_size=count, unique=True,
            )
        )  # fmt: skip

        return (OrderedDict if kind == "ordered" else dict)(zip(keys, children, strict=True))

    return {"w": pool[0], **{f"k{i}": node(3) for i in range(draw(st.integers(0, 4)))}}


def flat(value, path=()):
    """Yield every tensor of a tree with its path, as torch read it."""
    if isinstance(value, torch.Tensor):
        yield path, value.detach()
    elif isinstance(value, dict | list | tuple):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for key, child in pairs:
            yield from flat(child, (*path, key))


def ours(path, folder):
    """Return every tensor of a file with its path, from its layout and the bytes read by it."""
    layout = scan(path)
    reader = Reader(layout, folder)
    found = []
    for info in layout.tensors:
        assert not info.trouble, info
        raw = bytearray(info.storage.nbytes)
        if raw:
            reader.read(memoryview(raw), info.storage, 0)
        words = torch.frombuffer(raw or bytearray(16), dtype=torch.uint8)
        view = strided(words, info, info.start) if info.numel else torch.empty(0)
        found.append((info.path, info.dtype.name, info.shape, bits(view)))
    reader.finish()
    reader.close()
    return found


def described(entries):
    """Return what `ours` returns, of the tensors that torch read."""
    return [
        (path, str(t.dtype).removeprefix("torch."), tuple(t.shape), bits(t)) for path, t in entries
    ]


def same_files(tmp_path, tree, protocol, zipped):
    # torch itself does not read legacy files of dtypes that have no class of storages.
    assume(zipped or all(BY_NAME[name].storage for _, name, _, _ in described(flat(tree))))
    path = tmp_path / "a.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(tree, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
        # weights_only refuses protocols above 3 and some dtypes; these files are our own.
        theirs = torch.load(path, weights_only=protocol < 4)
    assert ours(path, path.parent) == described(flat(theirs))


def same_tensors(tmp_path, tensors, metadata):
    path = tmp_path / "a.safetensors"
    save_file({key: t.contiguous().clone() for key, t in tensors.items()}, path, metadata)
    with safe_open(path, "pt") as file:
        theirs = [((key,), file.get_tensor(key)) for key in file.keys()]  # noqa: SIM118
        assert dict(scan(path).metadata) == (file.metadata() or {})
    assert sorted(ours(path, path.parent)) == sorted(described(theirs))


MANY = settings(max_examples=3000, suppress_health_check=list(HealthCheck))
SOME = settings(max_examples=300, suppress_health_check=list(HealthCheck))
FEW = settings(max_examples=200, suppress_health_check=list(HealthCheck))
FILES = given(tree=trees(), protocol=st.integers(2, 5), zipped=st.booleans())
TENSORS = given(
    tensors=st.dictionaries(
        NAMES.filter(lambda name: name != "__metadata__"), bases(SAFE), min_size=1, max_size=4
    ),
    metadata=st.none() | st.dictionaries(NAMES, st.text(max_size=5), max_size=3),
)


@SOME
@FILES
def test_files_of_torch(tmp_path, tree, protocol, zipped):
    """Files of any dtypes, views, ties, nesting and protocol hold what torch.load returns."""
    same_files(tmp_path, tree, protocol, zipped)


@FEW
@TENSORS
def test_files_of_safetensors(tmp_path, tensors, metadata):
    """Names, dtypes, shapes, bytes and metadata are those that the safetensors library returns."""
    same_tensors(tmp_path, tensors, metadata)


@pytest.mark.large
@MANY
@FILES
def test_thousands_of_files_of_torch(tmp_path, tree, protocol, zipped):
    """Thousands of files hold what torch.load returns."""
    same_files(tmp_path, tree, protocol, zipped)


@pytest.mark.large
@MANY
@TENSORS
def test_thousands_of_files_of_safetensors(tmp_path, tensors, metadata):
    """Thousands of files hold what the safetensors library returns."""
    same_tensors(tmp_path, tensors, metadata)
