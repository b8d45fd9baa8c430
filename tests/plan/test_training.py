"""Training state in directories: `weights_only` leaves it out, and keeps all that serves."""

import argparse
import json
import pickle
from fractions import Fraction
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from merge_avg import merge_checkpoints, verify_output
from merge_avg.checkpoint import dotted
from merge_avg.errors import MergeError
from merge_avg.formats import scan
from merge_avg.options import Options
from merge_avg.plan import Record, prepare
from merge_avg.plan._provenance import RecordedInput
from merge_avg.report.text import lines
from merge_avg.report.values import as_json, describe

DATA = Path(__file__).parents[1] / "data"
STATE = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"params": [0]}]}
STEPS = {"global_step": 3, "log_history": [{"loss": 1.0}]}
# What lies beside weights, by what becomes of it. Texts and bytes are written as they are, lists
# by pickle, and all else by torch.
LEFT_OUT = {
    "optimizer.pt": STATE,
    "opt_rank0.bin": STATE,
    "scheduler.pt": {"last_epoch": 3},
    "scaler.pt": {"scale": 65536.0, "growth_factor": 2.0},
    "training_args.bin": argparse.Namespace(lr=0.1),
    "rng_state_0.pth": {"cpu": torch.get_rng_state(), "python": (3, (1, 2), None)},
    "random_states_1.pkl": [3, (1, 2)],
    "sampler.bin": {"seed": 1},
    "custom_checkpoint_0.pkl": {"counted": 7},
    "optim_states.safetensors": {"0.exp_avg": torch.ones(2)},
    "optimizer.npz": b"PK\5\6" + bytes(18),
    "trainer_state.json": json.dumps(STEPS),
    "CKPT.yaml": "loss: 0.5\nunixtime: 1700000000.0\n",
    "latest": "global_step3",
    "zero_to_fp32.py": "import torch\n",
    "runs/events.out.tfevents.17.host": b"\0\1",
}
KEPT = {
    "config.json": json.dumps({"hidden": 8, "global_step": 3}),
    "generation_config.json": "{}",
    "tokenizer.json": json.dumps({"model": {"vocab": {"global_step": 0}}}),
    "special_tokens_map.json": "{}",
    "merges.txt": "global_step x",
    "spiece.model": b"\x0a\0\1",
    "chat_template.jinja": "{{ messages }}",
    "preprocessor_config.json": "{}",
    "README.md": "global_step 3",
    "modeling_mine.py": "import torch\n",
    "args.json": "{}",
    "1_Pooling/config.json": "{}",
    "scheduler/scheduler_config.json": "{}",
}
UNCLEAR = {
    "label_encoder.pkl": ["cat", "dog"],
    "scaler.pkl": [0.5, 2.0],
    "vocab.pt": {"the": 0, "a": 1},
    "mean.npy": b"\x93NUMPY",
}


def folder(path, files=(), fold=0):
    """Write a directory with one matrix and other files; return its path."""
    path.mkdir(parents=True)
    save_file({"w": torch.full((3, 4), float(fold))}, path / "model.safetensors")
    for name, content in dict(files).items():
        place = path / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str | bytes):
            place.write_bytes(content.encode() if isinstance(content, str) else content)
        elif isinstance(content, list):
            place.write_bytes(pickle.dumps(content))
        elif name.endswith(".safetensors"):
            save_file(content, place)
        else:
            torch.save(content, place)
    return path


def inside(path):
    """Return the files below a directory, without the record of the merge."""
    found = {one.relative_to(path).as_posix() for one in path.rglob("*") if one.is_file()}
    return found - {"merge_avg.json"}


def served(path, files=(), **options):
    """Merge two directories with such files by `weights_only`, and verify it; return the result."""
    pair = [folder(path / f"c{fold}", files, fold) for fold in range(2)]
    result = merge_checkpoints(pair, path / "out", weights_only=True, **options)
    verify_output(path / "out")
    return result


def test_what_serves_stays_and_what_resumes_a_training_goes(tmp_path):
    """Each file of a directory, by what it holds; what is unclear stays, with a note."""
    result = served(tmp_path, LEFT_OUT | KEPT | UNCLEAR)
    assert inside(tmp_path / "out") == {"model.safetensors", *KEPT, *UNCLEAR}
    for name in (*KEPT, *UNCLEAR):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "c0" / name).read_bytes()
    assert torch.equal(load_file(tmp_path / "out/model.safetensors")["w"], torch.full((3, 4), 0.5))
    what = "what may be training state, or be needed to serve, is kept"
    some = "'label_encoder.pkl', 'mean.npy', 'scaler.pkl' and 1 more"
    assert f"{what}: {some}" in result.job.notes


@pytest.mark.parametrize(
    ("name", "left"),
    [
        (
            "transformers-trainer",
            "optimizer.pt rng_state.pth scheduler.pt trainer_state.json training_args.bin",
        ),
        ("accelerate", "optimizer.bin random_states_0.pkl scheduler.bin"),
        (
            "deepspeed-2",
            "global_step3/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt latest",
        ),
        ("skorch", "criterion.pt history.json optimizer.pt"),
        ("speechbrain", "CKPT.yaml optimizer.ckpt scheduler.ckpt"),
        ("diffusers", ""),
        ("sentence-transformers", ""),
        ("transformers-sharded", ""),
    ],
)
def test_what_libraries_save(tmp_path, name, left):
    """Of directories that libraries wrote all is there but their training state."""
    paths = [DATA / name / fold / "checkpoint" for fold in "01"]
    result = merge_checkpoints(paths, tmp_path / "out", weights_only=True)
    assert inside(tmp_path / "out") == inside(paths[0]) - set(left.split())
    report = as_json(describe(result.job, result))
    assert report["left_out"] == {one: (paths[0] / one).stat().st_size for one in left.split()}
    verify_output(tmp_path / "out", DATA / name)


def test_the_report_names_what_is_left_out(tmp_path):
    """The summary has the files and their bytes, and no entry of theirs among what is kept."""
    files = {"optimizer.pt": STATE, "trainer_state.json": '{} "global_step"', "config.json": "{}"}
    result = served(tmp_path, files)
    report = describe(result.job, result)
    size = sum((tmp_path / "c0" / name).stat().st_size for name in [*files][:2]) / 1000
    said = [line.strip() for line in lines(report)]
    assert f"left out: 2 files, {size:.1f} kB: 'optimizer.pt', 'trainer_state.json'" in said
    assert f"kept from {tmp_path / 'c0'}: config.json" in said
    assert (report.kept, report.whole) == ((), True)
    plan = describe(
        prepare([tmp_path / "c0"] * 2, tmp_path / "o", Options(weights_only=True)), None
    )
    assert plan.left_out == report.left_out
    assert plan.bytes_to_write < (tmp_path / "c0/optimizer.pt").stat().st_size
    whole = describe(prepare([tmp_path / "c0"] * 2, tmp_path / "o", Options()), None)
    assert (whole.left_out, [one.key for one in whole.kept]) == ({}, ["optimizer"])


def test_it_is_the_older_option_by_another_name(tmp_path):
    """Either name gives the same bytes; the record of a file has the older one only."""
    pair = [folder(tmp_path / f"c{fold}", {"optimizer.pt": STATE}, fold) for fold in range(2)]
    for number, given in enumerate(({"weights_only": True}, {"state_dict": True})):
        merge_checkpoints(pair, tmp_path / f"d{number}", **given)
        merge_checkpoints(pair, tmp_path / f"f{number}.safetensors", **given)
    assert inside(tmp_path / "d0") == inside(tmp_path / "d1") == {"model.safetensors"}
    records = [(tmp_path / name / "merge_avg.json").read_text() for name in ("d0", "d1")]
    assert records[0] == records[1]
    assert records[0].endswith('"exclude": [], "weights_only": true}')
    one, two = ((tmp_path / f"f{number}.safetensors").read_bytes() for number in range(2))
    assert one == two
    assert b'state_dict\\": true' in one
    assert b"weights_only" not in one
    merge_checkpoints(pair, tmp_path / "plain")
    assert "weights_only" not in (tmp_path / "plain/merge_avg.json").read_text()


def test_records_from_before_mean_what_they_meant(tmp_path):
    """Shards with `state_dict` had everything beside them, and are verified so."""
    path = folder(tmp_path / "c0", {"optimizer.pt": STATE})
    options = Options(state_dict=True, max_shard_size=1 << 20)
    record = Record((), RecordedInput("c0", 1, None, Fraction(0)), options, "0", None)
    assert "optimizer.pt" in prepare([path], tmp_path / "o", options, made_by=record).layout.files
    assert "optimizer.pt" not in prepare([path], tmp_path / "o", options).layout.files


def test_an_index_and_its_shards_go_together(tmp_path):
    """An index names only what is there: that of an optimizer's shards goes with them."""
    names = [f"optimizer-0000{number}-of-00002.safetensors" for number in (1, 2)]
    shards = {name: {f"m{number}": torch.ones(2)} for number, name in enumerate(names)}
    table = {f"m{number}": name for number, name in enumerate(names)}
    index = {"optimizer.safetensors.index.json": json.dumps({"weight_map": table})}
    served(
        tmp_path, shards | index | {"config.json": "{}"}, max_shard_size=1 << 20, dtype="float16"
    )
    assert inside(tmp_path / "out") == {"config.json", "model.safetensors"}
    assert load_file(tmp_path / "out/model.safetensors")["w"].dtype == torch.float16


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_sets_of_files_stay_or_go_as_one(tmp_path):
    """Of FSDP's folders that of the optimizer goes; of one that has both, its chunks."""
    pairs = []
    for fold in range(2):
        weights = {"w": torch.full((3, 4), float(fold))}
        for name, state in {
            "a/model_0": weights,
            "a/optimizer_0": {"optimizer": STATE},
            "b": {"model": weights, "optimizer": STATE},
        }.items():
            place = tmp_path / str(fold) / name
            place.mkdir(parents=True)
            dcp.save(state, checkpoint_id=place, no_dist=True)
        torch.save({"last_epoch": 1}, tmp_path / str(fold) / "a/scheduler.bin")
        pairs.append(tmp_path / str(fold))
    merge_checkpoints([one / "a" for one in pairs], tmp_path / "a", weights_only=True)
    assert inside(tmp_path / "a") == {"model_0/.metadata", "model_0/__0_0.distcp"}
    found = {"w": torch.zeros(3, 4)}
    dcp.load(found, checkpoint_id=tmp_path / "a/model_0", no_dist=True)
    assert torch.equal(found["w"], torch.full((3, 4), 0.5))
    verify_output(tmp_path / "a")
    job = merge_checkpoints([one / "b" for one in pairs], tmp_path / "b", weights_only=True).job
    assert inside(tmp_path / "b") == {".metadata", "__0_0.distcp"}
    assert "left out of distributed checkpoints: 'optimizer'" in job.notes
    assert [*map(dotted, (one.path for one in scan(tmp_path / "b").tensors))] == ["model.w"]
    verify_output(tmp_path / "b")


def test_state_in_a_file_of_weights_is_named(tmp_path):
    """A file that loaders read by its structure is not taken apart."""
    for fold in range(2):
        (tmp_path / str(fold)).mkdir()
        whole = {"model": {"w": torch.full((3,), float(fold))}, "optimizer": STATE, "iteration": 3}
        torch.save(whole, tmp_path / str(fold) / "model_optim_rng.pt")
    job = merge_checkpoints([tmp_path / "0", tmp_path / "1"], tmp_path / "o", weights_only=True).job
    note = "training state is kept that lies in a file with weights: 'model_optim_rng.pt'"
    assert note in job.notes
    assert torch.load(tmp_path / "o/model_optim_rng.pt")["model"]["w"].tolist() == [0.5] * 3


def test_weights_that_are_not_asked_for_stay(tmp_path):
    """Of a pipeline all is needed to serve, whichever of its state dicts is averaged."""
    parts = {f"{name}/model.safetensors": {"w": torch.ones(2)} for name in ("unet", "vae")}
    served(tmp_path, parts | {"optimizer.pt": STATE}, key="unet.model", exclude=["*nothing"])
    assert inside(tmp_path / "out") == {"model.safetensors", *parts}


def test_a_loader_of_what_is_left_calls_less(tmp_path):
    """What only training state names is no reason to refuse a directory that lacks it."""
    files = {"training_args.bin": {"x": Options()}}
    assert served(tmp_path, files, strict_pickle=True).job.layout.callables == ()
    with pytest.raises(MergeError, match="loading it calls"):
        merge_checkpoints([tmp_path / "c0", tmp_path / "c1"], tmp_path / "o", strict_pickle=True)
