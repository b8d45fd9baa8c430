"""merge_avg.verify: an output is derived again, and what is not as it was is named."""

import json
import os
import subprocess
import sys
import zipfile

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from merge_avg import verify_output
from merge_avg.arithmetic._weights import Weights
from merge_avg.checkpoint import PROVENANCE
from merge_avg.engine import merge_checkpoints
from merge_avg.errors import MergeError
from merge_avg.formats import scan
from merge_avg.plan import _budget as budget
from merge_avg.options import Options
from merge_avg.plan import Hashes
from merge_avg.plan._provenance import write_record
from merge_avg.verify import read_record

KINDS = ["pt", "safetensors", "shards", "dcp", "one file of shards", "shards of one file", "bare"]


def state(fold):
    generator = torch.Generator().manual_seed(fold)
    weights = {f"layer{i}.weight": torch.randn(40, 30, generator=generator) for i in range(4)}
    return weights | {"steps": torch.tensor(fold), "mask": torch.tensor([True, False])}


def made(folder, kind, count=3):
    """Checkpoints of a kind, and the options and the name of their average."""
    paths = []
    for fold in range(count):
        values = state(fold)
        path = folder / f"c{fold}"
        if kind in ("pt", "bare", "shards of one file"):
            path = folder / f"c{fold}.pt"
            torch.save({"state_dict": values, "optimizer": {"m": torch.ones(50)}}, path)
        elif kind == "safetensors":
            path = folder / f"c{fold}.safetensors"
            save_file(values, path, metadata={"format": "pt"})
        elif kind == "dcp":
            path.mkdir()
            dcp.save({"model": values}, checkpoint_id=path, no_dist=True)
        else:
            path.mkdir()
            keys = list(values)
            for number in (0, 1):
                part = {key: values[key] for key in keys[number::2]}
                save_file(part, path / f"model-0000{number + 1}-of-00002.safetensors")
            (path / "config.json").write_text("{}")
        paths.append(path)
    names = {"pt": "o.pt", "safetensors": "o.safetensors", "bare": "o.pt"}
    names |= {"one file of shards": "o.safetensors", "shards of one file": "o"}
    options = {"bare": {"state_dict": True}, "shards of one file": {"max_shard_size": 9000}}
    return paths, folder / names.get(kind, "o"), options.get(kind, {})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_output_passes(tmp_path, kind):
    """What a merge wrote is found to be what its inputs give, and nothing is written."""
    paths, out, options = made(tmp_path, kind)
    merge_checkpoints(paths, out, weights=["0.5", "0.25", "0.25"], **options)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    found = verify_output(out)
    assert found.inputs == tuple(paths)
    assert found.hashed
    files = [out] if out.is_file() else [path for path in out.rglob("*") if path.is_file()]
    assert found.nbytes == sum(path.stat().st_size for path in files)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["pt", "safetensors", "shards", "dcp"])
def test_every_flipped_bit_is_found(tmp_path, kind):
    """Wherever a bit of the output flips, in weights, headers or padding, it fails."""
    paths, out, options = made(tmp_path, kind)
    merge_checkpoints(paths, out, **options)
    files = [out] if out.is_file() else sorted(path for path in out.rglob("*") if path.is_file())
    for path in files:
        data = path.read_bytes()
        for at in {len(data) // 2, len(data) - 1, len(data) // 3}:
            path.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
            with pytest.raises(MergeError):
                verify_output(out)
        path.write_bytes(data + b"more")
        with pytest.raises(MergeError):
            verify_output(out)
        path.write_bytes(data)
    assert verify_output(out)


def test_the_tensor_that_differs_is_named(tmp_path):
    """A flipped bit in a weight names the tensor, the place and how many bytes differ."""
    paths, out, _ = made(tmp_path, "safetensors")
    merge_checkpoints(paths, out)
    info = next(info for info in scan(out).tensors if info.path[-1] == "layer2.weight")
    with out.open("r+b") as file:
        file.seek(info.storage.offset + 40)
        byte = file.read(1)[0]
        file.seek(info.storage.offset + 40)
        file.write(bytes([byte ^ 1]))
    where = f"1 bytes .*first at {info.storage.offset + 40:,} in tensor 'layer2.weight'"
    with pytest.raises(MergeError, match=where):
        verify_output(out)
    paths, out, _ = made(tmp_path, "pt")
    merge_checkpoints(paths, out)
    info = next(info for info in scan(out).tensors if info.path[-1] == "layer1.weight")
    data = bytearray(out.read_bytes())
    data[info.storage.offset] ^= 1
    out.write_bytes(data)
    with pytest.raises(MergeError, match=r"tensor 'state_dict.layer1.weight'"):
        verify_output(out)


def test_all_bytes_that_differ_are_counted(tmp_path):
    """Bytes that differ are counted over a whole tensor, and those that are equal are not."""
    paths, out, _ = made(tmp_path, "safetensors")
    merge_checkpoints(paths, out)
    info = next(info for info in scan(out).tensors if info.path[-1] == "layer2.weight")
    data = bytearray(out.read_bytes())
    start, stop = info.storage.offset, info.storage.offset + info.storage.nbytes
    for at in range(start + 3, stop, 2):
        data[at] ^= 255
    out.write_bytes(data)
    count = len(range(start + 3, stop, 2))
    with pytest.raises(MergeError, match=f"{count:,} bytes .*first at {start + 3:,} in tensor"):
        verify_output(out)


def test_an_input_that_changed_is_named(tmp_path):
    """Other weights of the same size are told by the hash, another size by itself."""
    paths, out, _ = made(tmp_path, "safetensors")
    merge_checkpoints(paths, out)
    save_file(state(7) | {"steps": torch.tensor(1)}, paths[1], metadata={"format": "pt"})
    with pytest.raises(MergeError, match="hash differs") as caught:
        verify_output(out)
    assert caught.value.where == str(paths[1])
    save_file({"more": torch.ones(3), **state(1)}, paths[1], metadata={"format": "pt"})
    with pytest.raises(MergeError, match="bytes, and had") as caught:
        verify_output(out)
    assert caught.value.where == str(paths[1])


def test_an_input_that_is_missing_or_renamed_is_named(tmp_path):
    """What is missing is named, and a file of its size is offered."""
    paths, out, _ = made(tmp_path, "pt")
    merge_checkpoints(paths, out)
    os.rename(paths[2], tmp_path / "renamed.pt")
    with pytest.raises(MergeError, match=r"its input c2.pt is not in") as caught:
        verify_output(out)
    assert "renamed.pt has the same size" in caught.value.hint
    (tmp_path / "renamed.pt").unlink()
    with pytest.raises(MergeError, match=r"c2.pt is not in") as caught:
        verify_output(out)
    assert "--inputs" in caught.value.hint


def test_inputs_may_have_moved_together(tmp_path, monkeypatch):
    """Inputs are named from the directory of all, wherever that is by now."""
    runs = tmp_path / "runs"
    for fold in range(3):
        (runs / f"fold{fold}").mkdir(parents=True)
        torch.save(state(fold), runs / f"fold{fold}" / "model.pt")
    paths = sorted(runs.rglob("*.pt"))
    merge_checkpoints(paths, tmp_path / "o.pt")
    runs.rename(tmp_path / "moved")
    assert verify_output(tmp_path / "o.pt", tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "moved")
    assert verify_output("../o.pt")


def test_each_of_several_averages_verifies_alone(tmp_path):
    """Averages that were made in one reading, a template that is not averaged, and any options."""
    paths, _, _ = made(tmp_path, "pt")
    rows = {tmp_path / f"without{k}.pt": [int(i != k) for i in range(3)] for k in range(3)}
    merge_checkpoints(paths, rows)
    assert [len(verify_output(path).inputs) for path in rows] == [2, 2, 2]
    out = tmp_path / "o.pt"
    options = {"weights": [1, "0.5", "-1/3"], "normalize": False, "dtype": "bfloat16"}
    merge_checkpoints(paths, out, exclude=["layer1*"], int_policy="max", **options)
    assert verify_output(out)
    merge_checkpoints(paths, out, overwrite=True, hashes=False, agreement=False, missing="skip")
    assert not verify_output(out).hashed


def saved(content, path):
    """Saves without the record that differs whenever some byte of the content does."""
    torch.save(content, path)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            if not name.endswith("serialization_id"):
                archive.writestr(zipfile.ZipInfo(name), data)


@pytest.mark.parametrize("missing", ["skip", "available"])
@pytest.mark.parametrize("weights", [[1, 1, 0], [0, 1, 1]])
def test_a_checkpoint_without_weight_keeps_its_say(tmp_path, missing, weights):
    """One with the weight zero, that lacks a tensor, is an input where that decides something."""
    paths, out, _ = made(tmp_path, "safetensors")
    fewer = state(2)
    del fewer["layer3.weight"]
    save_file(fewer, paths[2])
    merge_checkpoints(paths, out, weights=weights, missing=missing)
    assert set(verify_output(out).inputs) == set(paths)
    rows = {tmp_path / f"without{k}.safetensors": [int(i != k) for i in range(3)] for k in range(3)}
    merge_checkpoints(paths, rows, missing=missing)
    assert all(verify_output(path).hashed for path in rows)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["record", "text", "skipped", "gap", "file"])
def test_what_is_kept_of_the_template_is_hashed(tmp_path, kind):
    """Where the template changed beside its weights, it is blamed and not the output."""
    directory = kind == "file"
    paths, out, _ = made(tmp_path, "shards" if directory else "pt")
    big = torch.arange(300_000.0)

    def template(change):
        values = {"a": big[:1000], "b": big[200_000:], "kept": torch.full((70_000,), 1.0)}
        values["kept"][69_000] += change == "skipped"
        big[100_000] = 5.0 if change == "gap" else 100_000.0
        beside = {"m": torch.full((5,), 2.0 + (change == "record"))}
        epoch = 7 + (change == "text")
        saved({"state_dict": values, "optimizer": beside, "epoch": epoch}, paths[0])

    options = {"weights": [0, 1, 1]}
    if not directory:
        for path in paths:
            template(None)
            path.write_bytes(paths[0].read_bytes())
        options["exclude"] = ["kept"]
    merge_checkpoints(paths, out, **options)
    assert verify_output(out).hashed
    if directory:
        (paths[0] / "config.json").write_text("[]")
    else:
        template(kind)
    with pytest.raises(MergeError, match="beside its weights is not what") as caught:
        verify_output(out, max_memory=12 << 20)
    assert caught.value.where == str(paths[0])


def test_holes_in_what_is_averaged_are_hashed(tmp_path):
    """Elements of the template between those of a strided tensor are told by its hash too."""
    paths = [tmp_path / f"{fold}.pt" for fold in range(3)]
    big, small = torch.arange(90_000.0), torch.ones(5_000)
    for path in paths:
        saved({"a": big[::2], "b": small}, path)
    out = tmp_path / "o.pt"
    merge_checkpoints(paths, out, weights=[0, 1, 1])
    assert verify_output(out, max_memory=12 << 20).hashed
    big[1001] = 0.0
    saved({"a": big[::2], "b": small}, paths[0])
    with pytest.raises(MergeError, match="beside its weights") as caught:
        verify_output(out)
    assert caught.value.where == str(paths[0])


def test_a_file_that_does_not_belong_to_an_output_is_named(tmp_path):
    """A stray file in a directory is what fails, by name."""
    paths, out, _ = made(tmp_path, "shards")
    merge_checkpoints(paths, out)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(MergeError, match="its inputs give no such file") as caught:
        verify_output(out)
    assert caught.value.where == str(out / "notes.txt")


def test_each_input_is_read_once(tmp_path):
    """Hashes come from the one reading, though windows be far smaller than what is hashed."""
    paths = []
    for fold in range(3):
        generator = torch.Generator().manual_seed(fold)
        paths.append(tmp_path / f"{fold}.safetensors")
        save_file({"a": torch.randn(1_000_000, generator=generator)}, paths[-1])
    script = (
        "import os, sys\n"
        "from merge_avg.engine import merge_checkpoints\n"
        "def count(): return int(open('/proc/self/io').read().split()[1])\n"
        "before = count()\n"
        "result = merge_checkpoints(sys.argv[1:], 'o.safetensors', max_memory=11 << 20)\n"
        "assert result.job.budget.window < 1 << 16, result.job.budget\n"
        "print(count() - before)\n"
    )
    command = [sys.executable, "-c", script, *map(str, paths)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 12_000_000 + 1_000_000
    assert verify_output(tmp_path / "o.safetensors").hashed


def test_another_version_is_told(tmp_path):
    """What another version made is held against the same bytes, and the hint names both."""
    out = damaged(tmp_path, lambda record: record | {"merge_avg": "99.0"})
    with pytest.raises(MergeError, match="bytes are not what") as caught:
        verify_output(out)
    assert "merge-avg 99.0 made it" in caught.value.hint


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_equal_merges_give_equal_bytes(tmp_path, suffix):
    """Nothing in an output tells when, where, in which order or in how many threads it was made."""
    outputs = []
    for place, options in (("a", {}), ("b", {"threads": 3}), ("c", {"max_memory": 9 << 20})):
        folder = tmp_path / place
        folder.mkdir()
        paths, out, _ = made(folder, suffix)
        if place == "b":
            paths = [paths[0], paths[2], paths[1]]
        merge_checkpoints(paths, out, **options)
        outputs.append(out.read_bytes())
    assert len(set(outputs)) == 1


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(
        st.sampled_from([1, 7, 1000, 131_072, 140_000, 270_000]), min_size=1, max_size=4
    ),
    threads=st.integers(1, 3),
    window=st.sampled_from([10, 13, 16, 17]),
)
def test_hashes_do_not_depend_on_windows(tmp_path_factory, sizes, threads, window):
    """However large the windows are, smaller than chunks of some dtype too, hashes stay."""
    folder = tmp_path_factory.mktemp("hashes")
    paths = []
    for fold in range(2):
        generator = torch.Generator().manual_seed(fold)
        values = {
            str(i): torch.randn(size, generator=generator).to([torch.float32, torch.float16][i % 2])
            for i, size in enumerate(sizes)
        }
        paths.append(folder / f"{fold}.safetensors")
        save_file(values, paths[-1])
    first = merge_checkpoints(paths, folder / "a.safetensors").hashes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(budget, "_LARGEST_WINDOW", 4 << window)
        result = merge_checkpoints(paths, folder / "b.safetensors", threads=threads)
    assert result.job.budget.window == 1 << window
    assert result.hashes == first
    assert len({*first.read, first.kept}) == 3


def test_gaps_of_a_storage_are_hashed_nowhere(tmp_path):
    """What an output leaves out is in no hash, whatever the budget was."""
    paths = []
    for fold in range(2):
        generator = torch.Generator().manual_seed(fold)
        base = torch.randn(90_000, generator=generator)
        paths.append(tmp_path / f"{fold}.pt")
        torch.save({"a": base[:40_000], "b": base[50_000:]}, paths[-1])
    out = tmp_path / "o.safetensors"
    merge_checkpoints(paths, out, max_memory=12 << 20)
    assert verify_output(out).hashed


def damaged(folder, change):
    """An output whose record was changed."""
    paths, out, _ = made(folder, "safetensors")
    merge_checkpoints(paths, out)
    record = json.loads(dict(scan(out).metadata)[PROVENANCE])
    save_file(state(0), out, metadata={PROVENANCE: json.dumps(change(record))})
    return out


@pytest.mark.parametrize(
    "change",
    [
        lambda record: [],
        lambda record: record | {"inputs": []},
        lambda record: record | {"inputs": [{"name": "/etc/passwd"}]},
        lambda record: record | {"template": record["template"] | {"name": "../c0.safetensors"}},
        lambda record: record | {"template": 5},
        lambda record: record | {"missing": "everything"},
        lambda record: record | {"max_shard_size": float("inf")},
        lambda record: record | {"inputs": record["inputs"] * 5000},
        lambda record: record | {"inputs": [record["inputs"][0] | {"bytes": "x"}]},
        lambda record: record | {"inputs": [record["inputs"][0] | {"hash": "xyz"}]},
        lambda record: {key: value for key, value in record.items() if key != "normalize"},
    ],
)
def test_records_that_lie_are_refused(tmp_path, change):
    """A record that was tampered with is one error, and nothing outside is looked at."""
    with pytest.raises(MergeError, match="damaged"):
        verify_output(damaged(tmp_path, change))


@pytest.mark.parametrize("weight", ["nan", "1/0", "-1", "1e999999999"])
def test_odd_weights_in_a_record_are_refused(tmp_path, weight):
    """Weights that are none are an error too."""

    def change(record):
        return record | {"inputs": [one | {"weight": weight} for one in record["inputs"]]}

    with pytest.raises(MergeError):
        verify_output(damaged(tmp_path, change))


def test_what_says_nothing_cannot_be_verified(tmp_path):
    """A checkpoint that no merge wrote is an error with a word of why."""
    torch.save(state(0), tmp_path / "a.pt")
    with pytest.raises(MergeError, match="does not say what it was made of"):
        verify_output(tmp_path / "a.pt")


def test_the_record_has_one_length(tmp_path):
    """Whatever hashes and agreement turn out to be, the record is as long as it was laid out."""
    paths, _, _ = made(tmp_path, "pt")
    layouts = [scan(path) for path in paths]
    weights, options = Weights.uniform(3), Options()
    most = (1 << 128) - 1
    lengths = {
        len(write_record(layouts, weights, options, "0", hashes, agreement))
        for hashes in (None, Hashes((0,) * 3, 0), Hashes((most,) * 3, most))
        for agreement in (None, 1.0, -1.0, 0.123456789, -1e-9)
    }
    assert len(lengths) == 1


def test_the_record_can_be_read_by_others(tmp_path):
    """It is a JSON record of the archive, with the inputs, their hashes and the agreement."""
    paths, out, _ = made(tmp_path, "pt")
    result = merge_checkpoints(paths, out)
    with zipfile.ZipFile(out) as archive:
        name = next(name for name in archive.namelist() if name.endswith("merge_avg.json"))
        record = json.loads(archive.read(name))
    assert [one["name"] for one in record["inputs"]] == ["c0.pt", "c1.pt", "c2.pt"]
    assert [int(one["hash"], 16) for one in record["inputs"]] == list(result.hashes.read)
    assert abs(float(record["agreement"]) - result.agreement.mean) < 1e-6
    assert read_record(scan(out)).template.name == "c0.pt"


def test_the_command(tmp_path):
    """--verify prints the outputs, or JSON, and exits with 1 where something is not as it was."""
    paths, _, _ = made(tmp_path, "pt")

    def run(*options, what=("--verify", "o.pt")):
        command = [sys.executable, "-m", "merge_avg", *what, *options]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    report = json.loads(run("-o", "o.pt", "--json", what=map(str, paths)).stdout)
    assert len({one["hash"] for one in report["inputs"]}) == 3
    done = run()
    assert (done.returncode, done.stdout) == (0, "o.pt\n")
    assert "are what its 3 inputs give" in done.stderr
    (found,) = json.loads(run("--json", "--inputs", ".", "-q").stdout)
    assert found["inputs"] == ["c0.pt", "c1.pt", "c2.pt"]
    paths[0].unlink()
    done = run()
    assert done.returncode == 1
    assert "its input c0.pt is not in" in done.stderr
    assert done.stdout == ""
