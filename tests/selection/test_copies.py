"""Copies: the same weights, whatever lies around them, are counted once."""

import shutil
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

from merge_avg.formats import scan
from merge_avg.options import Criteria
from merge_avg.selection import _copies
from merge_avg.selection._copies import sum_of
from tests.older import TORCH
from tests.selection.helpers import names, select, trainer, why


def model(value, scale=1.0):
    return {
        "a.weight": torch.full((6, 4), float(value)),
        "a.bias": torch.arange(6.0) * scale,
        "b.weight": torch.arange(12.0).reshape(3, 4) + value,
        "b.steps": torch.tensor(7),
    }


def wrapped(value, **more):
    return {"model": {f"module.{name}": one for name, one in model(value).items()}, **more}


def optimizer():
    return {"state": {0: {"exp_avg": torch.rand(6, 4)}}, "param_groups": [{"params": [0]}]}


def sums(*paths):
    return [[sum_of(scan(path), rough=rough) for path in paths] for rough in (True, False)]


def save_zero(content, path):
    """Save without checksums, as torch does where they are switched off."""
    if TORCH < (2, 6):
        pytest.skip("torch writes checksums always before 2.6")
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(content, path)
    finally:
        torch.serialization.set_crc32_options(True)


def legacy(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


def deflated(content, path):
    torch.save(content, path.with_suffix(".tmp"))
    with (
        zipfile.ZipFile(path.with_suffix(".tmp")) as old,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for record in old.infolist():
            new.writestr(record.filename, old.read(record))


def distributed(content, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this is one process
        dcp.save(content, checkpoint_id=path, no_dist=True)


WRITERS = {
    "deflated.pt": lambda path: deflated(wrapped(1), path),
    "step_7": lambda path: distributed({**wrapped(1), "optim": optimizer()}, path),
    "bare.pt": lambda path: torch.save(model(1), path),
    "other root.pth": lambda path: torch.save(model(1), path),
    "wrapped.pt": lambda path: torch.save(wrapped(1, epoch=3), path),
    "optimizer.ckpt": lambda path: torch.save(wrapped(1, optim=optimizer(), lr=0.1), path),
    "unsummed.pt": lambda path: save_zero(wrapped(1), path),
    "legacy.pt": lambda path: legacy(model(1), path),
    "plain.safetensors": lambda path: save_file(model(1), path),
    "noted.safetensors": lambda path: save_file(model(1), path, {"format": "pt"}),
    "order.pt": lambda path: torch.save(dict(reversed(model(1).items())), path),
    # Views into one storage, which holds other numbers too.
    "views.pt": lambda path: torch.save(
        {**model(1), "a.bias": torch.cat([torch.ones(5), torch.arange(6.0)])[5:]}, path
    ),
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    path = tmp_path_factory.mktemp("copies") / "reference.pt"
    torch.save(model(1), path)
    return path


@pytest.mark.parametrize("name", WRITERS)
def test_the_same_weights_have_the_same_sums(reference, tmp_path, name):
    """Optimizers, roots of archives, formats, wrappers, checksums and order make no difference."""
    WRITERS[name](tmp_path / name)
    for rough in sums(reference, tmp_path / name):
        assert rough[0] == rough[1] is not None


OTHERS = {
    "value": lambda: model(2),
    "small": lambda: model(1, scale=2.0),
    "name": lambda: {f"{name}_": one for name, one in model(1).items()},
    "dtype": lambda: {**model(1), "a.bias": torch.arange(6.0).double()},
    "shape": lambda: {**model(1), "b.weight": model(1)["b.weight"].reshape(4, 3)},
    "less": lambda: {name: one for name, one in model(1).items() if name != "a.bias"},
    "strides": lambda: {**model(1), "b.weight": model(1)["b.weight"].reshape(4, 3).t()},
    "two": lambda: {"model": model(1), "ema": model(1)},
}


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("name", OTHERS)
def test_other_weights_have_other_sums(reference, tmp_path, name, suffix):
    """A value, a name, a dtype, a shape or a tensor more tells checkpoints apart."""
    content, path = OTHERS[name](), tmp_path / f"a.{suffix}"
    if suffix == "pt" or name == "two":
        torch.save(content, path)
    else:
        save_file({key: one.contiguous() for key, one in content.items()}, path)
    _, (a, b) = sums(reference, path)
    assert a != b


def test_large_weights_are_read_only_where_small_ones_are_the_same(tmp_path, monkeypatch):
    """A rough sum reads little, and a whole one, of an archive with checksums, nothing."""
    big = torch.zeros(4000)
    for name, value, last in (("a", 1.0, 0.0), ("b", 1.0, 9.0), ("c", 2.0, 0.0)):
        content = {"w": torch.cat([big, torch.tensor([last])]), "b": torch.full((4,), value)}
        save_file(content, tmp_path / f"{name}.safetensors")
        torch.save(content, tmp_path / f"{name}.pt")
    read = []

    def counting(layout, part, real=_copies._read):
        read.append(part.nbytes)
        return real(layout, part)

    monkeypatch.setattr(_copies, "_read", counting)
    rough, _ = sums(*(tmp_path / f"{name}.safetensors" for name in "abc"))
    assert rough[0] == rough[1] != rough[2]
    assert sorted(read[:6]) == [16] * 3 + [4096] * 3
    del read[:]
    rough, whole = sums(*(tmp_path / f"{name}.pt" for name in "abc"))
    assert (rough[0] == rough[1], whole[0] == whole[1]) == (True, False)
    assert read == [4096] * 3


def test_frozen_small_weights_do_not_make_checkpoints_alike(tmp_path):
    """A change of large weights alone shows in a rough sum, so nothing is read whole."""
    for name, value in (("a", 1.0), ("b", 2.0)):
        torch.save({"w": torch.full((4000,), value), "b": torch.zeros(4)}, tmp_path / f"{name}.pt")
    (a, b), _ = sums(tmp_path / "a.pt", tmp_path / "b.pt")
    assert a != b


def test_views_that_overlap_without_end_are_not_read(tmp_path):
    """Many views of one storage, each of other bytes, are not compared beyond the file's size."""
    base = torch.arange(4000.0)
    torch.save({f"w{n}": base[n : n + 3000] for n in range(50)}, tmp_path / "a.pt")
    assert sum_of(scan(tmp_path / "a.pt")) is None
    torch.save({f"w{n}": base for n in range(3)}, tmp_path / "b.pt")
    assert sum_of(scan(tmp_path / "b.pt")) is not None


# Runs


def test_a_training_that_writes_each_epoch_twice(tmp_path):
    """torchvision and DETR: checkpoint.pth is the last epoch again, under another root."""
    for epoch in range(4):
        content = {"model": model(epoch), "optimizer": optimizer(), "epoch": epoch}
        torch.save(content, tmp_path / f"model_{epoch}.pth")
        torch.save(content, tmp_path / "checkpoint.pth")
    selection = select([tmp_path], Criteria(last=3))
    assert names(selection) == ["model_1.pth", "model_2.pth", "model_3.pth"]
    assert why(selection)["checkpoint.pth"] == "a copy of model_3.pth"
    assert names(select([tmp_path], Criteria())) == [f"model_{n}.pth" for n in range(4)]


@pytest.mark.parametrize(
    ("first", "second", "count"),
    [
        ({"epoch": 3}, {"epoch": 3}, 1),
        ({"epoch": 3}, {}, 1),
        ({}, {}, 1),
        ({"epoch": 3}, {"global_step": 30}, 1),
        ({"epoch": 3, "global_step": 30}, {"epoch": 3}, 1),
        ({"epoch": 3}, {"epoch": 4}, 2),
        ({"epoch": 3, "global_step": 30}, {"epoch": 3, "global_step": 31}, 2),
    ],
)
def test_files_of_other_epochs_both_count(tmp_path, first, second, count):
    """The same weights are a copy unless both files say that they are of different times."""
    torch.save(wrapped(1, **first), tmp_path / "a.pt")
    torch.save(wrapped(1, **second, by="me"), tmp_path / "b.pt")
    torch.save(wrapped(2, epoch=9), tmp_path / "c.pt")
    assert len(select([tmp_path], Criteria()).paths) == count + 1


def test_a_name_may_count_from_one(tmp_path):
    """A name that says 4 and a file that says 3 are of one time if the weights are the same."""
    for epoch in range(4):
        torch.save(model(epoch), tmp_path / f"model_{epoch + 1}.pth")
    torch.save(wrapped(3, epoch=3), tmp_path / "last.pth")
    assert names(select([tmp_path], Criteria(last=2))) == ["model_3.pth", "model_4.pth"]
    # Two names that differ are believed.
    torch.save(model(3), tmp_path / "model_5.pth")
    assert names(select([tmp_path], Criteria(last=2))) == ["model_4.pth", "model_5.pth"]


def test_directories_are_copies(tmp_path):
    """A folder that holds the weights of another one, with other files, counts once."""
    for step in (10, 20):
        trainer(tmp_path, step)
    shutil.copytree(tmp_path / "checkpoint-20", tmp_path / "best")
    (tmp_path / "best" / "optimizer.pt").unlink()
    (tmp_path / "best" / "notes.txt").write_text("best")
    selection = select([tmp_path], Criteria(last=2))
    assert names(selection) == ["checkpoint-10", "checkpoint-20"]
    assert why(selection)["best"] == "a copy of checkpoint-20"


def test_a_copy_lends_its_metrics(tmp_path):
    """fairseq: checkpoint_best_bleu_27.5.pt is checkpoint2.pt, whose BLEU no other name tells."""
    for epoch in (1, 2, 3):
        torch.save(model(epoch), tmp_path / f"checkpoint{epoch}.pt")
        content = wrapped(epoch)
        torch.save(content, tmp_path / f"checkpoint_best_bleu_{20 + epoch % 3}.5.pt")
    selection = select([tmp_path], Criteria(best=2))
    assert names(selection) == ["checkpoint1.pt", "checkpoint2.pt"]


def test_the_copy_that_is_named_like_the_others_is_kept(tmp_path):
    """mmengine: best_coco_bbox_mAP_epoch_2.pth has no optimizer, and is not to be the template."""
    for epoch in (1, 2, 3):
        torch.save(wrapped(epoch, optimizer=optimizer()), tmp_path / f"epoch_{epoch}.pth")
    torch.save(wrapped(2), tmp_path / "best_coco_bbox_mAP_epoch_2.pth")
    assert names(select([tmp_path], Criteria(last=2))) == ["epoch_2.pth", "epoch_3.pth"]


def test_copies_are_told_with_few_layouts_at_hand(tmp_path, monkeypatch):
    """Where layouts do not fit, those of suspects are scanned again, and the result is the same."""
    from merge_avg.selection import _choose

    monkeypatch.setattr(_choose, "_MOST_TENSORS", 1)
    for number in range(5):
        torch.save(model(number % 3), tmp_path / f"{'abcde'[number]}.pt")
    selection = select([tmp_path], Criteria())
    assert names(selection) == ["a.pt", "b.pt", "c.pt"]


def test_what_cannot_be_read_is_an_error(tmp_path):
    """A file that vanished after its scan is an error that names it."""
    save_file(model(1), tmp_path / "a.safetensors")
    layout = scan(tmp_path / "a.safetensors")
    Path(tmp_path / "a.safetensors").unlink()
    with pytest.raises(ValueError, match=r"a\.safetensors: cannot be read"):
        sum_of(layout)
