"""merge_avg.formats.legacy: files as torch.save wrote them before torch 1.6."""

import pickle
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from merge_avg.errors import MergeError
from merge_avg.formats import scan
from tests.helpers import merge_checkpoints


def save(value, path, **more):
    torch.save(value, path, _use_new_zipfile_serialization=False, **more)


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.complex64]


@given(
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=6),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=6, max_size=6),
    protocol=st.integers(2, 5),
)
def test_tensors_lie_where_torch_reads_them(tmp_path_factory, shapes, dtypes, protocol):
    """Each tensor's bytes are at the place that the layout says, for every pickle protocol."""
    path = tmp_path_factory.mktemp("legacy") / "a.pt"
    state = {
        str(i): (torch.rand(shape) * 9).to(dtype)
        for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=False))
    }
    save(state, path, pickle_protocol=protocol)
    data = path.read_bytes()
    theirs = torch.load(path, weights_only=False)
    for info in scan(path).tensors:
        ours = data[info.storage.offset :][: info.storage.nbytes]
        assert ours == bytes(theirs[info.path[0]].untyped_storage())


def test_the_mean_is_a_legacy_file_again(tmp_path):
    """Ties, views, kept tensors and everything else come back as torch.load reads them."""
    paths = []
    for fold in range(3):
        base = torch.arange(6.0) * (fold + 1)
        model = {"full": base, "part": base[:2], "t": torch.ones(2, 3).t() * fold, "tie": base}
        paths.append(tmp_path / f"{fold}.pt")
        save({"model": model, "epoch": fold, "optimizer": {"m": torch.ones(2) * fold}}, paths[-1])
    merge_checkpoints(paths, tmp_path / "out.pt", template=1)
    assert (tmp_path / "out.pt").stat().st_size == paths[0].stat().st_size
    merged = torch.load(tmp_path / "out.pt")
    model = merged["model"]
    assert model["full"].tolist() == [0, 2, 4, 6, 8, 10]
    assert model["part"].data_ptr() == model["full"].data_ptr() == model["tie"].data_ptr()
    assert torch.equal(model["t"], torch.ones(3, 2))
    assert merged["epoch"] == 0
    assert merged["optimizer"]["m"].tolist() == [0, 0]


def test_another_dtype(tmp_path):
    """--dtype changes the classes of averaged storages and leaves the others."""
    for fold in range(2):
        value = {"model": {"w": torch.ones(3) * fold}, "optimizer": {"m": torch.ones(2)}}
        save(value, tmp_path / f"{fold}.pt")
    paths = [tmp_path / "0.pt", tmp_path / "1.pt"]
    merge_checkpoints(paths, tmp_path / "out.pt", dtype="bfloat16")
    merged = torch.load(tmp_path / "out.pt")
    assert merged["model"]["w"].dtype == torch.bfloat16
    assert merged["model"]["w"].tolist() == [0.5] * 3
    assert merged["optimizer"]["m"].tolist() == [1, 1]


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
def test_a_whole_module_and_a_zip_beside_it(tmp_path):
    """A pickled module is read without its class, and averaged with a zip file's state dict."""
    models = [nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)) for _ in range(2)]
    save(models[0], tmp_path / "a.pt")
    torch.save(models[1].state_dict(), tmp_path / "b.pt")
    merge_checkpoints([tmp_path / "a.pt", tmp_path / "b.pt"], tmp_path / "out.pt")
    merged = torch.load(tmp_path / "out.pt", weights_only=False)
    expected = (models[0][0].weight.double() + models[1][0].weight.double()) / 2
    assert torch.equal(merged[0].weight, expected.float())


def old_view(path):
    """A storage that is a view of another, as torch wrote them before version 0.4."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            if isinstance(value, str) and value.startswith("@"):
                view = None if value == "@0" else ("v", 2, 3)
                return ("storage", torch.FloatStorage, "1", "cpu", 6, view)
            return None

    def tensor(name, size):
        args = (name, 0, (size,), (1,), False, {})
        return type("T", (), {"__reduce__": lambda _: (torch._utils._rebuild_tensor_v2, args)})()

    with path.open("wb") as file:
        for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
            pickle.dump(value, file, protocol=2)
        Pickler(file, protocol=2).dump({"whole": tensor("@0", 6), "view": tensor("@1", 3)})
        pickle.dump(["1"], file, protocol=2)
        file.write(struct.pack("<q6f", 6, *range(6)))


def test_old_views_of_storages(tmp_path):
    """A storage that views another from an offset on is read from there, and shares its memory."""
    old_view(tmp_path / "a.pt")
    assert torch.load(tmp_path / "a.pt")["view"].tolist() == [2, 3, 4]
    merge_checkpoints([tmp_path / "a.pt"] * 2, tmp_path / "out.safetensors")
    merge_checkpoints([tmp_path / "a.pt"] * 2, tmp_path / "out.pt")
    assert torch.load(tmp_path / "out.pt")["view"].tolist() == [2, 3, 4]


def test_damage_is_named(tmp_path):
    """A file that is cut short anywhere is an error of one line, never a crash."""
    save({"w": torch.ones(300)}, tmp_path / "a.pt")
    data = (tmp_path / "a.pt").read_bytes()
    for size in (20, 60, 200, len(data) - 1300, len(data) - 5):
        (tmp_path / "b.pt").write_bytes(data[:size])
        with pytest.raises(MergeError, match=r"b.pt: "):
            scan(tmp_path / "b.pt")


def test_a_bare_pickle_is_named(tmp_path):
    """A state dict pickled without torch.save is refused, with the way out."""
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"w": torch.ones(2)}))
    with pytest.raises(MergeError, match="a pickle, but not a checkpoint"):
        scan(tmp_path / "a.pkl")


@pytest.mark.parametrize("count", [299, 301, 2**62])
def test_a_count_that_lies_is_named(tmp_path, count):
    """The number of elements before a storage has to be that of the pickle."""
    save({"w": torch.ones(300)}, tmp_path / "a.pt")
    data = bytearray((tmp_path / "a.pt").read_bytes())
    data[-1208:-1200] = count.to_bytes(8, "little")
    (tmp_path / "a.pt").write_bytes(data)
    with pytest.raises(MergeError, match="damaged, or the file is cut short"):
        scan(tmp_path / "a.pt")


def test_a_scan_tells_optimizers_and_parameters(tmp_path):
    """The layout names the dicts that hold an optimizer's state, and knows Parameters."""
    net = nn.Linear(1, 1)
    state = torch.optim.SGD(net.parameters()).state_dict()
    save({"net": net, "o": state, "epoch": 3}, tmp_path / "a.pt")
    torch.save({"net": net, "o": state, "epoch": 3}, tmp_path / "b.pt")
    for layout in map(scan, (tmp_path / "a.pt", tmp_path / "b.pt")):
        assert layout.optimizers == (("o",),)
        assert [info.learned for info in layout.tensors] == [True, True]
        assert (("epoch",), 3) in layout.scalars
        assert layout.notes == ()
