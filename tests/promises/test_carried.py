"""Promise 2: what a copy of a template carries on is inert, named, or refused."""

import json
import pickle
import zipfile

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

from merge_avg import MergeError
from tests.helpers import merge_checkpoints, run_command

W = torch.ones(4)


class Mine:
    """A class that nobody else knows."""


class Runs:
    """Runs a command when it is loaded."""

    def __reduce__(self):
        import os

        return os.system, ("true",)


class Builds:
    """Calls something that another class of this file is made of."""

    def __init__(self, function, *args):
        self.made = function, args

    def __reduce__(self):
        return self.made


NAME = f"{__name__}.Mine"


def saved(path, **entries):
    """Save a checkpoint with more beside its weights, and return its path."""
    weights = {"w": W + ord(path.name[0])}
    torch.save(weights | entries, path, _use_new_zipfile_serialization=path.suffix != ".old")
    return path


def run(*arguments):
    """Run the command; return its exit code, and what it wrote to the two streams."""
    done = run_command(*arguments)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("ending", [".pt", ".old"])
def test_a_copy_names_what_loading_it_calls(tmp_path, ending):
    """The summary, the JSON and --inspect name a class that is not known to be inert."""
    paths = [saved(tmp_path / f"{k}{ending}", extra=Mine()) for k in range(2)]
    out = tmp_path / f"out{ending}"
    code, _, err = run(*paths, "-o", out)
    assert code == 0
    assert f"loading it, like {paths[0]}, calls '{NAME}'" in " ".join(err.split())
    code, text, _ = run(*paths, "-o", out, "--overwrite", "--json", "--dry-run")
    assert json.loads(text)["callables"] == [NAME]
    code, text, _ = run("--inspect", out)
    assert f"loading it calls: {NAME}" in text
    code, text, _ = run("--inspect", out, "--json")
    assert json.loads(text)[0]["callables"] == [NAME]


def test_a_strict_merge_refuses_them(tmp_path):
    """With --strict-pickle it is one error before anything is written, with the ways out."""
    paths = [saved(tmp_path / "a.pt", extra=Mine()), saved(tmp_path / "b.pt")]
    code, _, err = run(*paths, "-o", tmp_path / "out.pt", "--strict-pickle")
    assert (code, (tmp_path / "out.pt").exists()) == (1, False)
    assert f"a.pt: loading it calls '{NAME}', which is not known to be harmless" in err
    assert "--weights-only" in err
    # The template decides, and outputs that carry nothing on are let through.
    merge_checkpoints(paths[::-1], tmp_path / "b_out.pt", strict_pickle=True)
    merge_checkpoints(paths, tmp_path / "out.pt", strict_pickle=True, state_dict=True)
    merge_checkpoints(paths, tmp_path / "out.safetensors", strict_pickle=True)


def test_new_files_call_nothing(tmp_path):
    """A bare state dict and a safetensors file name nothing but torch's own reconstructors."""
    path = saved(tmp_path / "a.pt", extra=Mine())
    for name, options in (("o.pt", {"state_dict": True}), ("o.safetensors", {})):
        job = merge_checkpoints([path, path], tmp_path / name, **options).job
        assert job.layout.callables == ()
    torch.load(tmp_path / "o.pt", weights_only=True)


def test_plain_checkpoints_call_nothing(tmp_path):
    """State dicts, modules, optimizers, NumPy's values and random states are known to be inert."""
    import collections
    import random

    import numpy as np

    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3), torch.nn.GELU())
    optimizer = torch.optim.AdamW(model.parameters())
    entries = {
        "model": model,
        "state_dict": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 3).state_dict(),
        "random": (random.getstate(), np.random.RandomState(0), torch.get_rng_state()),
        "numpy": (np.float32(1.5), np.arange(3), np.random.default_rng(0)),
        "half": torch.ones(2, dtype=torch.bfloat16),
        "device": torch.device("cpu"),
        "loss": collections.defaultdict(list, a=[1.0]),
    }
    for ending in (".pt", ".old"):
        path = saved(tmp_path / f"a{ending}", **entries)
        assert merge_checkpoints([path, path], tmp_path / f"o{ending}").job.layout.callables == ()


@pytest.mark.parametrize(
    "entry",
    [
        Builds(Builds, int, "1"),
        Builds(getattr, Mine, "member"),
        Builds(torch._tensor._rebuild_from_type_v2, Builds(Mine), torch.Tensor, (), {}),
    ],
    ids=["class", "getattr", "from_type"],
)
def test_calls_of_what_the_pickle_makes_are_named(tmp_path, entry, monkeypatch):
    """Nothing gets called that is not named, by whatever way."""
    monkeypatch.setattr(Mine, "member", 3, raising=False)
    path = saved(tmp_path / "a.pt", extra=entry)
    found = merge_checkpoints([path, path], tmp_path / "o.pt").job.layout.callables
    assert any(__name__ in one for one in found)


def hugging_face(path, **files):
    """A checkpoint directory with files beside the weights."""
    path.mkdir()
    save_file({"w": W}, path / "model.safetensors")
    (path / "config.json").write_text("{}")
    for name, content in files.items():
        file = path / name.replace("_dot_", ".")
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            torch.save(content, file)
    return path


@pytest.mark.parametrize(
    ("files", "names"),
    [
        ({"training_args_dot_bin": Mine()}, [NAME]),
        ({"vocabulary_dot_pkl": pickle.dumps(Mine(), 4)}, [NAME]),
        ({"no_suffix": pickle.dumps(Mine(), 2)}, [NAME]),
        ({"old_dot_data": pickle.dumps(Mine(), 0)}, [NAME]),
        ({"two_dot_pickle": pickle.dumps(3, 4) + pickle.dumps(Mine(), 4)}, [NAME]),
        ({"large_dot_pickle": pickle.dumps([b"x" * 200_000, Mine()], 4)}, [NAME]),
        ({"modeling_mine_dot_py": b"x = 1"}, ["the code in modeling_mine.py"]),
        ({"cut_dot_pkl": pickle.dumps([Mine()] * 3, 4)[:-9]}, ["whatever cut.pkl names"]),
        ({"README_dot_md": b"# A model\n", "vocab_dot_txt": b"cat\nice\n", "e": b""}, []),
        ({"optimizer_dot_pt": {"state": {0: {"m": W}}, "param_groups": []}}, []),
    ],
)
def test_files_that_are_copied_are_looked_into(tmp_path, files, names):
    """Pickles of any kind and name, and code, are named where a directory carries them on."""
    path = hugging_face(tmp_path / "a", **files)
    job = merge_checkpoints([path, path], tmp_path / "out").job
    assert list(job.layout.callables) == names
    assert merge_checkpoints([path], tmp_path / "o.safetensors").job.layout.callables == ()
    sharded = merge_checkpoints([path], tmp_path / "shards", max_shard_size=4).job
    assert list(sharded.layout.callables) == names


@pytest.mark.parametrize("name", ["a.bin", "a.pkl", "a.joblib", "plain", "optimizer.pt", "a.txt"])
@pytest.mark.parametrize("protocol", [0, 2, 4, "zip", "legacy", "cut"])
def test_files_that_run_code_are_refused(tmp_path, name, protocol):
    """Neither the name nor the kind of a file hides a callable that is known to run code."""
    path = hugging_face(tmp_path / "a")
    if protocol in ("zip", "legacy"):
        new = protocol == "zip"
        torch.save(Runs(), path / name, _use_new_zipfile_serialization=new)
    elif protocol == "cut":
        (path / name).write_bytes(pickle.dumps([Runs(), 1], 4)[:-3])
    else:
        (path / name).write_bytes(pickle.dumps(Runs(), protocol))
    with pytest.raises(MergeError, match=r"system, which would run code") as caught:
        merge_checkpoints([path, path], tmp_path / "out")
    assert name in str(caught.value)


def test_an_archive_that_cannot_be_read_is_named(tmp_path):
    """A zip file of something else may hold anything."""
    path = hugging_face(tmp_path / "a")
    with zipfile.ZipFile(path / "extra.npz", "w") as file:
        file.writestr("a.npy", b"")
    job = merge_checkpoints([path, path], tmp_path / "out").job
    assert job.layout.callables == ("whatever extra.npz names",)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_objects_of_a_distributed_checkpoint_count(tmp_path):
    """They are pickles between the chunks, which torch loads as such."""
    for number in range(2):
        dcp.save(
            {"model": {"w": W}, "mine": Mine()}, checkpoint_id=tmp_path / str(number), no_dist=True
        )
    job = merge_checkpoints([tmp_path / "0", tmp_path / "1"], tmp_path / "out").job
    assert job.layout.callables == (NAME,)
    dcp.save({"model": {"w": W}, "mine": Runs()}, checkpoint_id=tmp_path / "2", no_dist=True)
    with pytest.raises(MergeError, match=r"system, which would run code"):
        merge_checkpoints([tmp_path / "2"], tmp_path / "out2")


@pytest.mark.parametrize("target", ["secret", "blobs_elsewhere"])
def test_only_the_blobs_of_a_repository_are_followed(tmp_path, target):
    """A folder called snapshots is no way out: neither to what lies above, nor by other links."""
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "blobs_elsewhere").write_text("secret")
    repository = tmp_path / "home"
    (repository / "snapshots").mkdir(parents=True)
    (repository / "secret").write_text("secret")
    path = hugging_face(repository / "snapshots" / "m")
    (repository / "blobs").symlink_to(tmp_path / "outside")
    where = "../../secret" if target == "secret" else "../../blobs/blobs_elsewhere"
    (path / "vocab.txt").symlink_to(where)
    with pytest.raises(MergeError, match=r"vocab\.txt: it is a link to .*, outside"):
        merge_checkpoints([path], tmp_path / "out")


def test_a_part_of_a_snapshot_has_its_blobs(tmp_path):
    """A folder of a snapshot, as of a pipeline's model, is read as the whole is."""
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    path = tmp_path / "models--a--b" / "snapshots" / "1a2b" / "unet"
    path.mkdir(parents=True)
    save_file({"w": W}, blobs / "123")
    (blobs / "456").write_text("{}")
    (path / "model.safetensors").symlink_to("../../../blobs/123")
    (path / "config.json").symlink_to("../../../blobs/456")
    merge_checkpoints([path], tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_text() == "{}"
