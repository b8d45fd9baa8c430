"""merge_avg.formats.directory: directories as checkpoints, in and out."""

import argparse
import errno
import json
import os
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from merge_avg.errors import MergeError
from merge_avg.formats import scan
from tests import helpers
from tests.helpers import merge_checkpoints

KEYS = ["embed.weight", "layers.0.weight", "layers.1.weight", "norm.weight", "head.weight"]


def weights(fold):
    generator = torch.Generator().manual_seed(fold)
    return {key: torch.randn(4, 3, generator=generator) for key in KEYS}


def mean(folds):
    return {
        key: (sum(weights(f)[key].double() for f in folds) / len(folds)).float() for key in KEYS
    }


def save_shards(path, state, cuts, *, binary=False, index=True):
    """A sharded checkpoint as transformers writes it; `cuts` are where shards begin."""
    path.mkdir(parents=True, exist_ok=True)
    base, suffix = ("pytorch_model", ".bin") if binary else ("model", ".safetensors")
    keys = list(state)
    edges = [0, *cuts, len(keys)]
    table = {}
    for number in range(len(edges) - 1):
        name = f"{base}-{number + 1:05}-of-{len(edges) - 1:05}{suffix}"
        part = {key: state[key] for key in keys[edges[number] : edges[number + 1]]}
        if binary:
            torch.save(part, path / name)
        else:
            save_file(part, path / name, metadata={"format": "pt"})
        table |= dict.fromkeys(part, name)
    if index:
        size = sum(t.nbytes for t in state.values())
        value = {"metadata": {"total_size": size, "x": "kept"}, "weight_map": table}
        (path / f"{base}{suffix}.index.json").write_text(json.dumps(value))
    (path / "config.json").write_text('{"model_type": "tiny"}')


def load(path):
    """The tensors of a directory of shards, by its index."""
    (index,) = path.glob("*.index.json")
    table = json.loads(index.read_text())["weight_map"]
    merged = {}
    for name in sorted(set(table.values())):
        file = path / name
        part = load_file(file) if name.endswith(".safetensors") else torch.load(file)
        assert {key for key, home in table.items() if home == name} == set(part)
        merged |= part
    return merged


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in theirs)


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("index", [False, True])
def test_shard_boundaries_may_differ(tmp_path, binary, index):
    """Shards are matched by the names of tensors; the output has the template's boundaries."""
    save_shards(tmp_path / "a", weights(0), [2, 3], binary=binary, index=True)
    save_shards(tmp_path / "b", weights(1), [1], binary=binary, index=index)
    save_file(weights(2), tmp_path / "c.safetensors")
    paths = [tmp_path / "a", tmp_path / "b", tmp_path / "c.safetensors"]
    merge_checkpoints(paths, tmp_path / "out")
    assert same(load(tmp_path / "out"), mean(range(3)))
    names = {p.name for p in (tmp_path / "a").iterdir()}
    assert {p.name for p in (tmp_path / "out").iterdir()} == names | {"merge_avg.json"}
    assert (tmp_path / "out" / "config.json").read_text() == '{"model_type": "tiny"}'


def test_shards_become_one_file(tmp_path):
    """-o FILE gathers the shards, as .safetensors or .pt."""
    save_shards(tmp_path / "a", weights(0), [2])
    save_shards(tmp_path / "b", weights(1), [3])
    merge_checkpoints([tmp_path / "a", tmp_path / "b"], tmp_path / "out.safetensors")
    merge_checkpoints([tmp_path / "a", tmp_path / "b"], tmp_path / "out.pt")
    assert same(load_file(tmp_path / "out.safetensors"), mean(range(2)))
    assert same(torch.load(tmp_path / "out.pt"), mean(range(2)))
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata().keys() == {"format", "merge_avg"}


@pytest.mark.parametrize("binary", [False, True])
def test_resharding(tmp_path, binary):
    """--max-shard-size cuts anew, with an index, and keeps the rest of the directory."""
    save_shards(tmp_path / "a", weights(0), [1, 2, 3], binary=binary)
    save_shards(tmp_path / "b", weights(1), [2], binary=binary)
    paths = [tmp_path / "a", tmp_path / "b"]
    merge_checkpoints(paths, tmp_path / "out", max_shard_size=100)
    merged = load(tmp_path / "out")
    assert same(merged, mean(range(2)))
    shards = [p for p in (tmp_path / "out").iterdir() if "-of-00003" in p.name]
    assert len(shards) == 3
    assert (tmp_path / "out" / "config.json").exists()
    merge_checkpoints(paths, tmp_path / "one", max_shard_size=10**9)
    assert not list((tmp_path / "one").glob("*.index.json"))


def test_a_file_becomes_shards(tmp_path):
    """A template that is a file is cut into a directory of safetensors; ties stay together."""
    state = weights(0)
    state["head.weight"] = state["embed.weight"]
    torch.save({"state_dict": state, "epoch": 1}, tmp_path / "a.pt")
    merge_checkpoints([tmp_path / "a.pt"], tmp_path / "out", max_shard_size=48)
    assert same(load(tmp_path / "out"), state)


def test_another_dtype_changes_the_index(tmp_path):
    """With --dtype, the index says the new size and keeps what else it says."""
    save_shards(tmp_path / "a", weights(0), [2])
    result = merge_checkpoints([tmp_path / "a"], tmp_path / "out", dtype="bfloat16")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 5 * 12 * 2, "x": "kept"}
    assert all(t.dtype == torch.bfloat16 for t in load(tmp_path / "out").values())
    assert any("config.json" in note for note in result.job.notes)


def test_one_shard_alone(tmp_path):
    """A shard given by itself is averaged, and the summary says that it is one of several."""
    save_shards(tmp_path / "a", weights(0), [2])
    save_shards(tmp_path / "b", weights(1), [2])
    name = "model-00001-of-00002.safetensors"
    result = merge_checkpoints([tmp_path / "a" / name, tmp_path / "b" / name], tmp_path / "o.pt")
    assert set(torch.load(tmp_path / "o.pt")) == set(KEYS[:2])
    assert any("one of 2 shards" in note for note in result.job.notes)


def test_sub_folders_are_state_dicts_of_their_own(tmp_path):
    """Each folder is averaged with its namesake; other files come from the template."""
    for fold in range(2):
        for part, key in (("unet", "w"), ("vae", "w"), ("text", "v")):
            (tmp_path / str(fold) / part).mkdir(parents=True)
            value = torch.full((2,), float(fold + len(part)))
            save_file({key: value}, tmp_path / str(fold) / part / "model.safetensors")
        (tmp_path / str(fold) / "vae" / "config.json").write_text(str(fold))
    folds = [tmp_path / "0", tmp_path / "1"]
    merge_checkpoints(folds, tmp_path / "out")
    for part, key in (("unet", "w"), ("vae", "w"), ("text", "v")):
        merged = load_file(tmp_path / "out" / part / "model.safetensors")
        assert merged[key].tolist() == [len(part) + 0.5] * 2
    assert (tmp_path / "out" / "vae" / "config.json").read_text() == "0"
    with pytest.raises(MergeError, match="can hold one state dict"):
        merge_checkpoints(folds, tmp_path / "out.safetensors")
    merge_checkpoints(folds, tmp_path / "out.safetensors", key="unet")
    assert load_file(tmp_path / "out.safetensors")["w"].tolist() == [4.5, 4.5]
    shutil.rmtree(tmp_path / "1" / "vae")
    with pytest.raises(MergeError, match="state dicts"):
        merge_checkpoints(folds, tmp_path / "out2")


def test_two_forms_of_a_model(tmp_path):
    """model.safetensors and pytorch_model.bin beside it are both averaged, not mixed."""
    for fold in range(2):
        (tmp_path / str(fold)).mkdir()
        save_file(weights(fold), tmp_path / str(fold) / "model.safetensors")
        torch.save(weights(fold), tmp_path / str(fold) / "pytorch_model.bin")
    merge_checkpoints([tmp_path / "0", tmp_path / "1"], tmp_path / "out")
    assert same(load_file(tmp_path / "out" / "model.safetensors"), mean(range(2)))
    assert same(torch.load(tmp_path / "out" / "pytorch_model.bin"), mean(range(2)))


def test_a_bin_beside_a_safetensors_directory(tmp_path):
    """One input has pytorch_model.bin, the other model.safetensors: the same state dict."""
    for fold in range(2):
        (tmp_path / str(fold)).mkdir()
    save_file(weights(0), tmp_path / "0" / "model.safetensors")
    torch.save(weights(1), tmp_path / "1" / "pytorch_model.bin")
    merge_checkpoints([tmp_path / "0", tmp_path / "1"], tmp_path / "out")
    assert same(load_file(tmp_path / "out" / "model.safetensors"), mean(range(2)))


def test_what_is_no_weight_is_kept(tmp_path):
    """Optimizer, scheduler, RNG and settings stay the template's, byte for byte, even if odd."""
    for fold in range(2):
        folder = tmp_path / str(fold)
        folder.mkdir()
        save_file(weights(fold), folder / "model.safetensors")
        torch.save({"state": {0: {"m": torch.ones(2) * fold}}}, folder / "optimizer.pt")
        torch.save({"x": torch.ones(1) * fold}, folder / "rng_state_0.pth")
        (folder / "random_states_0.pkl").write_bytes(b"\x80\x04 no pickle at all")
        (folder / "scaler.pt").write_bytes(b"PK\x03\x04 damaged")
        (folder / "counter.ckpt").write_text(str(fold))
    merge_checkpoints([tmp_path / "0", tmp_path / "1"], tmp_path / "out")
    for file in (tmp_path / "0").iterdir():
        if file.name != "model.safetensors":
            assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
    assert same(load_file(tmp_path / "out" / "model.safetensors"), mean(range(2)))


def megatron(step, rank):
    """Return what Megatron-LM's save_checkpoint writes for a rank of tensor parallelism."""
    weight = torch.full((4, 2), float(step + 10 * rank))
    optimizer = {"state": {0: {"exp_avg": torch.ones(8) * step}}, "param_groups": []}
    return {
        "args": argparse.Namespace(hidden_size=4),
        "iteration": step,
        "model": {"language_model": {"embedding": {"word_embeddings": {"weight": weight}}}},
        "optimizer": {"optimizer": optimizer},
        "rng_state": [{"torch_rng_state": torch.get_rng_state()}],
    }


@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_of_megatron_are_averaged_rank_by_rank(tmp_path, ranks):
    """mp_rank_XX/model_optim_rng.pt holds a model, whatever else its name says."""
    for step in (1, 2):
        for rank in range(ranks):
            folder = tmp_path / f"iter_{step:07d}" / f"mp_rank_{rank:02d}"
            folder.mkdir(parents=True)
            torch.save(megatron(step, rank), folder / "model_optim_rng.pt")
    paths = [tmp_path / "iter_0000001", tmp_path / "iter_0000002"]
    merge_checkpoints(paths, tmp_path / "out", template=1)
    for rank in range(ranks):
        path = tmp_path / "out" / f"mp_rank_{rank:02d}" / "model_optim_rng.pt"
        found, ours = torch.load(path, weights_only=False), megatron(1, rank)
        weight = found["model"]["language_model"]["embedding"]["word_embeddings"]["weight"]
        assert weight.unique().tolist() == [1.5 + 10 * rank]
        state = [one["optimizer"]["optimizer"]["state"][0]["exp_avg"] for one in (found, ours)]
        assert torch.equal(*state)


@pytest.mark.parametrize(
    "names",
    [
        ["best_metric_model.pth"],
        ["last.pth", "best_loss.pth", "best_acc.pth", "loss.pt"],
        ["model.safetensors", "scaler.safetensors"],
        ["optimizer.pt"],
        ["model.pt", "model_optim.pt"],
    ],
)
def test_a_file_of_weights_may_be_called_anything(tmp_path, names):
    """What it holds decides; a scaler of inputs is no gradient scaler."""
    for fold in range(2):
        (tmp_path / str(fold)).mkdir()
        for name in names:
            path = tmp_path / str(fold) / name
            if name.startswith("scaler"):
                save_file({"mean": torch.ones(3) * fold}, path)
            else:
                helpers.save(weights(fold), path)
    assert not scan(tmp_path / "0").notes
    merge_checkpoints([tmp_path / "0", tmp_path / "1"], tmp_path / "out")
    for name in names:
        expected = {"mean": torch.full((3,), 0.5)} if "scaler" in name else mean(range(2))
        assert same(helpers.load(tmp_path / "out" / name), expected), name


def test_a_name_breaks_the_tie_with_a_note(tmp_path):
    """An optimizer's file that looks like a state dict is kept beside a model, and named."""
    for fold in range(2):
        (tmp_path / str(fold)).mkdir()
        save_file(weights(fold), tmp_path / str(fold) / "model.safetensors")
        save_file({"momentum": torch.ones(3) * fold}, tmp_path / str(fold) / "optim.safetensors")
    layout = scan(tmp_path / "0")
    assert [
        note
        for note in layout.notes
        if "optim.safetensors is not averaged because of its name" in note
    ]
    merge_checkpoints([tmp_path / "0", tmp_path / "1"], tmp_path / "out")
    assert same(load_file(tmp_path / "out" / "optim.safetensors"), {"momentum": torch.zeros(3)})


def test_large_files_that_are_copied_unread_are_named(tmp_path):
    """An export beside the weights stays the template's: it is named if it is as large as they."""
    save_file({"w": torch.zeros(1 << 18)}, tmp_path / "model.safetensors")
    (tmp_path / "model.onnx").write_bytes(bytes(1 << 20))
    (tmp_path / "small.onnx").write_bytes(bytes(1000))
    (tmp_path / "tokenizer.json").write_bytes(bytes(1 << 21))
    (note,) = scan(tmp_path).notes
    assert note == "'model.onnx' is not read: weights in it are not averaged"


def test_a_dangerous_pickle_beside_the_weights_is_refused(tmp_path):
    """An optimizer's file may be odd, but not run code: the output would carry it on."""

    class Evil:
        def __reduce__(self):
            return os.system, ("true",)

    save_file(weights(0), tmp_path / "model.safetensors")
    torch.save({"state": Evil()}, tmp_path / "optimizer.pt")
    with pytest.raises(MergeError, match="would run code"):
        scan(tmp_path)


def broken(tmp_path, change):
    save_shards(tmp_path / "a", weights(0), [2, 3])
    change(tmp_path / "a")
    return tmp_path / "a"


def rewrite_index(path, change):
    file = path / "model.safetensors.index.json"
    value = json.loads(file.read_text())
    change(value["weight_map"])
    file.write_text(json.dumps(value))


SHARD = "model-0000{}-of-00003.safetensors"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda p: (p / SHARD.format(2)).unlink(), "which is missing"),
        (
            lambda p: [(p / SHARD.format(2)).unlink(), *(x.unlink() for x in p.glob("*.json"))],
            "1 of 3 shards are missing, the first is model-00002-of-00003.safetensors",
        ),
        (lambda p: save_file(weights(1), p / SHARD.format(3)), "both in"),
        (lambda p: save_file(weights(1), p / "model.safetensors"), "both in"),
        (lambda p: (p / SHARD.format(1)).write_bytes(b""), "is empty"),
        (lambda p: (p / SHARD.format(1)).write_bytes(b"version https://git-lfs"), "git lfs"),
        (lambda p: (p / "x.bin").write_bytes(b"version https://git-lfs"), "git lfs"),
        (
            lambda p: rewrite_index(p, lambda m: m.update({KEYS[0]: SHARD.format(3)})),
            "which does not hold it",
        ),
        (lambda p: rewrite_index(p, lambda m: m.update({"x": "../../x"})), "which is outside"),
        (lambda p: rewrite_index(p, lambda m: m.update({"x": "/etc/passwd"})), "which is outside"),
        (lambda p: (p / "model.safetensors.index.json").write_text("{"), "index is damaged"),
        (lambda p: (p / "model.safetensors.index.json").write_text("{}"), "without a weight_map"),
        (lambda p: (p / "link.json").symlink_to("nowhere"), "link to nothing"),
        (lambda p: [x.unlink() for x in p.iterdir()], "without a checkpoint"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, change, says):
    """Missing and doubled shards, indexes that lie, and placeholders are errors of one line."""
    path = broken(tmp_path, change)
    with pytest.raises(MergeError) as caught:
        scan(path)
    assert says in f"{caught.value} {caught.value.hint}"


def test_a_run_is_not_a_checkpoint(tmp_path):
    """A folder of checkpoints is refused by their names; beside weights they are left out."""
    for step in (1, 20):
        save_shards(tmp_path / "run" / f"checkpoint-{step}", weights(step), [2])
    with pytest.raises(MergeError, match="2 checkpoints: 'checkpoint-1', 'checkpoint-20'"):
        scan(tmp_path / "run")
    save_file(weights(0), tmp_path / "run" / "model.safetensors")
    layout = scan(tmp_path / "run")
    assert len(layout.files) == 1
    assert "checkpoint-1" in layout.notes[0]


def test_deepspeed_names_the_latest(tmp_path):
    """Of several global_step folders, the one that the file `latest` names is taken."""
    for step in (1, 2):
        folder = tmp_path / f"global_step{step}"
        folder.mkdir()
        torch.save({"module": {"w": torch.ones(2) * step}}, folder / "mp_rank_00_model_states.pt")
    (tmp_path / "latest").write_text("global_step2")
    layout = scan(tmp_path)
    assert {str(file.path.parent.name) for file in layout.files} == {tmp_path.name, "global_step2"}


def test_zero_3_is_refused_with_the_converter(tmp_path):
    """A ZeRO-3 file holds hollow tensors: it is refused, and the converter is named."""
    folder = tmp_path / "global_step1"
    folder.mkdir()
    value = {"module": {"w": torch.ones(0)}, "ds_config": {}, "ds_version": "0.19"}
    torch.save(value, folder / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    with pytest.raises(MergeError, match="ZeRO-3") as caught:
        scan(tmp_path)
    assert "zero_to_fp32.py" in str(caught.value.hint)


def linked(path, blobs, state):
    """A snapshot of a hub's cache: links to files elsewhere."""
    save_shards(blobs, state, [2])
    path.mkdir(parents=True)
    for file in blobs.iterdir():
        (path / file.name).symlink_to(os.path.relpath(file, path))
    return path


def test_the_links_of_a_hub_cache_are_followed(tmp_path):
    """Files of a snapshot are links to the blobs beside it; links to directories are left out."""
    path = linked(tmp_path / "m" / "snapshots" / "1a2b", tmp_path / "m" / "blobs", weights(0))
    (path / "deep").symlink_to("../../blobs", target_is_directory=True)
    notes = merge_checkpoints([path], tmp_path / "out").job.notes
    assert not any("outside" in note for note in notes)
    assert any("deep is a link to a directory and is left out" in note for note in notes)
    assert not any(file.is_symlink() for file in (tmp_path / "out").iterdir())
    assert same(load(tmp_path / "out"), weights(0))


def test_links_that_lead_out_are_told_or_refused(tmp_path):
    """Weights that lie elsewhere are read with a word; no other file from elsewhere is copied."""
    path = linked(tmp_path / "a", tmp_path / "elsewhere", weights(0))
    notes = merge_checkpoints([path], tmp_path / "out.pt").job.notes
    assert any("links to a file outside" in note for note in notes)
    with pytest.raises(
        MergeError, match="outside of the checkpoint, and would be copied"
    ) as caught:
        merge_checkpoints([path], tmp_path / "out")
    assert str(tmp_path / "elsewhere") in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_the_output_is_kept_apart_from_the_inputs(tmp_path):
    """An output that is, holds or lies in an input is refused, and a foreign directory too."""
    save_shards(tmp_path / "in" / "a", weights(0), [2])
    paths = [tmp_path / "in" / "a"]
    for out, says in (
        (tmp_path / "in" / "a", "is the input"),
        (tmp_path / "in" / "a" / "merged", "lies in the input"),
        (tmp_path / "in", "holds the input"),
        (tmp_path / "in" / "a" / "out.safetensors", "lies in the input"),
    ):
        with pytest.raises(MergeError, match=says):
            merge_checkpoints(paths, out, overwrite=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(MergeError, match=r"'thesis\.txt', which would be lost"):
        merge_checkpoints(paths, tmp_path / "mine", overwrite=True)
    with pytest.raises(MergeError, match="exists already"):
        merge_checkpoints(paths, tmp_path / "mine")
    merge_checkpoints(paths, tmp_path / "out")
    merge_checkpoints(paths, tmp_path / "out", overwrite=True)


def adapters(tmp_path, *, equal):
    for fold in range(2):
        torch.manual_seed(0 if equal else fold)
        a = torch.randn(2, 3)
        torch.manual_seed(10 + fold)
        state = {"q.lora_A.weight": a, "q.lora_B.weight": torch.randn(3, 2)}
        (tmp_path / str(fold)).mkdir()
        save_file(state, tmp_path / str(fold) / "adapter_model.safetensors")
        (tmp_path / str(fold) / "adapter_config.json").write_text(f'{{"lora_alpha": {fold}}}')
    return [tmp_path / "0", tmp_path / "1"]


def test_lora_factors(tmp_path):
    """Adapters are averaged with a warning, and without it where every A is the same."""
    result = merge_checkpoints(adapters(tmp_path, equal=False), tmp_path / "out")
    assert any("mean(B) @ mean(A)" in warning for warning in result.warnings)
    assert any("adapter_config.json differs" in note for note in result.job.notes)
    (tmp_path / "same").mkdir()
    result = merge_checkpoints(adapters(tmp_path / "same", equal=True), tmp_path / "out2")
    assert not result.warnings


def test_overwriting_loses_nothing(tmp_path):
    """A directory is replaced only if the new one has all of its files, and no input lies in it."""
    save_shards(tmp_path / "a", weights(0), [2])
    save_shards(tmp_path / "out", weights(1), [2])
    merge_checkpoints([tmp_path / "a"], tmp_path / "out", overwrite=True)
    (tmp_path / "out" / "checkpoint-1").mkdir()
    (tmp_path / "out" / "checkpoint-1" / "model.safetensors").touch()
    with pytest.raises(MergeError, match="would be lost"):
        merge_checkpoints([tmp_path / "a"], tmp_path / "out", overwrite=True)
    (tmp_path / "blobs").mkdir()
    save_file(weights(1), tmp_path / "blobs" / "model.safetensors")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "model.safetensors").symlink_to("../blobs/model.safetensors")
    with pytest.raises(MergeError, match="holds the input"):
        merge_checkpoints([tmp_path / "linked"], tmp_path / "blobs", overwrite=True)
    assert (tmp_path / "linked" / "model.safetensors").exists()


def test_resharding_keeps_names_and_optimizers(tmp_path):
    """Shards are called as the file was, where it was; files that hold no weights come along."""
    for fold in range(2):
        folder = tmp_path / str(fold) / "transformer"
        folder.mkdir(parents=True)
        save_file(weights(fold), folder / "diffusion_pytorch_model.safetensors")
        torch.save({"state": {0: {"m": torch.ones(2)}}}, tmp_path / str(fold) / "optimizer.pt")
    merge_checkpoints([tmp_path / "0", tmp_path / "1"], tmp_path / "out", max_shard_size=100)
    names = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.*")}
    base = "transformer/diffusion_pytorch_model"
    shards = {f"{base}-{n:05}-of-00003.safetensors" for n in (1, 2, 3)}
    assert names == {*shards, f"{base}.safetensors.index.json", "optimizer.pt", "merge_avg.json"}
    assert same(load(tmp_path / "out" / "transformer"), mean(range(2)))


def test_other_indexes_are_just_files(tmp_path):
    """A file that only ends like an index is kept; an empty shard counts as one."""
    save_shards(tmp_path / "a", {**weights(0), "none": torch.zeros(0)}, [5])
    (tmp_path / "a" / "search.index.json").write_text('{"a": 1}')
    merge_checkpoints([tmp_path / "a"], tmp_path / "out")
    assert (tmp_path / "out" / "search.index.json").read_text() == '{"a": 1}'


def test_latest_goes_with_what_it_names(tmp_path):
    """Where the newest folder is left out as a checkpoint of its own, so is what names it."""
    for fold in range(2):
        folder = tmp_path / f"{fold}"
        save_file(weights(fold), folder_of(folder) / "model.safetensors")
        save_file(weights(fold), folder_of(folder / "global_step2") / "model.safetensors")
        (folder / "latest").write_text("global_step2\n")
        (folder / "notes.txt").write_text("global_step2")
    merge_checkpoints([tmp_path / "0", tmp_path / "1"], tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"model.safetensors", "notes.txt", "merge_avg.json"}
    for fold in range(2):  # one that names anything else is copied
        (tmp_path / f"{fold}" / "latest").write_text("elsewhere")
    merge_checkpoints([tmp_path / "0", tmp_path / "1"], tmp_path / "more")
    assert (tmp_path / "more" / "latest").read_text() == "elsewhere"


def folder_of(path):
    path.mkdir()
    return path


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    """It may hold weights: it is named, and not left out in silence."""
    save_file(weights(0), tmp_path / "model.safetensors")
    folder = folder_of(tmp_path / "sub")
    real = os.scandir

    def scandir(path):
        if os.fspath(path) == str(folder):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(MergeError, match=r"cannot be read \(Permission denied\)") as caught:
        scan(tmp_path)
    assert caught.value.where == str(folder)
