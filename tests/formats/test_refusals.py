"""What the field writes and nobody can average, made by the real writers: refused by name."""

import io
import pickle
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from merge_avg.errors import MergeError
from tests.helpers import merge_checkpoints

pytestmark = pytest.mark.filterwarnings("ignore")


def script(path):
    torch.jit.script(nn.Linear(2, 2)).save(path)


def exported(path):
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),)), path)


def old_tar(path):
    with tarfile.open(path, "w") as archive:
        for name in ("sys_info", "pickle", "tensors", "storages"):
            member = tarfile.TarInfo(name)
            member.size = 3
            archive.addfile(member, io.BytesIO(b"abc"))


def arrays(path):
    with path.open("wb") as file:
        np.savez(file, a=np.zeros(2))


def zipped(*names):
    def write(path):
        with zipfile.ZipFile(path, "w") as archive:
            for name in names:
                archive.writestr(name, "{}")

    return write


def content(data):
    return lambda path: path.write_bytes(data)


def saved(value):
    return lambda path: torch.save(value() if callable(value) else value, path)


def optimizer():
    model = nn.Linear(2, 2)
    adam = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    adam.step()
    return adam.state_dict()


def gptq():
    codes, scales = torch.zeros(4, 4, dtype=torch.int32), torch.ones(2, 2)
    return {"l.qweight": codes, "l.scales": scales, "l.qzeros": codes, "l.g_idx": codes[0]}


def four_bit():
    codes = torch.zeros(4, 1, dtype=torch.uint8)
    return {
        "w.weight": codes,
        "w.weight.absmax": torch.ones(1),
        "w.weight.quant_map": torch.ones(4),
    }


def nested(**options):
    return {"w": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], **options)}


def half(write):
    def cut(path):
        write(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return cut


class Rounded(torch.Tensor):
    """A wrapper without a storage of its own, as torchao's tensors are."""

    __module__ = "torchao.dtypes"

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape)

    def __init__(self, inner):
        self.inner = inner

    def __tensor_flatten__(self):
        return ["inner"], {}


def wrapped(path):
    args = (Rounded, torch.float32, (2,), (1,), 0, torch.strided, torch.device("cpu"), False)
    whole = (torch._utils._rebuild_wrapper_subclass, Rounded, args, {})
    fake = type("F", (), {"__reduce__": lambda _: (torch._tensor._rebuild_from_type_v2, whole)})
    import sys

    sys.modules.setdefault("torchao", sys)
    sys.modules["torchao.dtypes"] = sys.modules[__name__]
    try:
        torch.save({"w": fake()}, path)
    finally:
        del sys.modules["torchao"], sys.modules["torchao.dtypes"]


CASES = {
    "torchscript": (script, "TorchScript", "state_dict()"),
    "pt2": (exported, "torch.export", "torch.save"),
    "tar": (old_tar, "before 0.1.10", "torch.load"),
    "npz": (arrays, "NumPy archive", "safetensors"),
    "h5": (content(b"\x89HDF\r\n\x1a\n"), "HDF5", "safetensors"),
    "keras": (zipped("metadata.json", "model.weights.h5"), "Keras", "safetensors"),
    "gguf": (content(b"GGUF\3\0\0\0"), "GGUF", "before you convert"),
    "onnx": (content(b"\x08\x0a\x12\x07pytorch"), "ONNX", "before you export"),
    "sb3": (zipped("data", "policy.pth"), "Stable-Baselines3", "policy.pth"),
    "optimizer": (saved(optimizer), "an optimizer's state and no weights", "model's state dict"),
    "qint": (
        saved(lambda: {"w": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)}),
        "'w' is a quantised tensor",
        "plain tensor",
    ),
    "bitsandbytes": (saved(four_bit), "'w.weight' holds quantised codes", "before you quantise"),
    "gptq": (saved(gptq), "'l.qweight' holds quantised codes", "before you quantise"),
    "torchao": (wrapped, "'w' is a tensor quantised by torchao", "plain tensor"),
    "sparse": (
        saved(lambda: {"w": torch.eye(3).to_sparse()}),
        "'w' is a sparse tensor",
        "plain tensor",
    ),
    "csr": (saved(lambda: {"w": torch.eye(3).to_sparse_csr()}), "'w' is a sparse tensor", "plain"),
    "nested": (saved(nested), "'w' is a nested tensor", "plain tensor"),
    "jagged": (saved(lambda: nested(layout=torch.jagged)), "'w' is a nested tensor", "plain"),
    "meta": (saved({"w": torch.empty(2, device="meta")}), "'w' is a meta tensor", "plain"),
    "bare": (saved(torch.ones(2)), "single tensor without a name", "state dict"),
    "no tensors": (saved({"epoch": 3}), "holds no tensors", "state dict"),
    "lfs": (content(b"version https://git-lfs.github.com/spec/v1\n"), "Git LFS", "git lfs pull"),
    "html": (content(b"<!DOCTYPE html><html>"), "web page", "fetch"),
    "empty": (content(b""), "is empty", "again"),
    "truncated": (half(saved({"w": torch.ones(2000)})), "damaged", "again"),
    "pickle": (content(pickle.dumps({"w": [1.0]})), "a pickle, but not a checkpoint", "torch.save"),
}


@pytest.mark.parametrize("name", list(CASES))
def test_it_is_refused_by_name_with_the_way_out(tmp_path, name):
    """One error that says what the file is, a hint that says what to do, and no output."""
    write, says, hint = CASES[name]
    path = tmp_path / f"a.{name}"
    write(path)
    with pytest.raises(MergeError) as caught:
        merge_checkpoints([path, path], tmp_path / "out.pt")
    assert says in str(caught.value)
    assert hint in str(caught.value.hint)
    assert str(path) in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_tied_tensors_of_two_dtypes_elsewhere_are_refused(tmp_path):
    """What shares memory in the template cannot have two dtypes in another checkpoint."""
    w = torch.ones(3)
    torch.save({"a": w, "b": w}, tmp_path / "0.pt")
    torch.save({"a": w, "b": w.double()}, tmp_path / "1.pt")
    paths = [tmp_path / "0.pt", tmp_path / "1.pt"]
    with pytest.raises(MergeError, match="'a', 'b' have different dtypes, but share") as caught:
        merge_checkpoints(paths, tmp_path / "o.pt", dtype="template")
    assert str(tmp_path / "1.pt") in str(caught.value)
    assert "--template" in str(caught.value.hint)
    assert not (tmp_path / "o.pt").exists()
