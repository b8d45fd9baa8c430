"""Checkpoints of scaled weights through the command: files, folders, other dtypes, refusals."""

import json

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from merge_avg.scaled import Scaled
from tests.helpers import FORMATS, load, save
from tests.scaled.helpers import Memory, plain, scaled_of
from tests.scaled.test_compute import BYTE, LAYOUTS, bits, random_state

DEEPSEEK = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}


def states_of(layout, count=2):
    """State dicts of one layer and a norm."""
    states = [random_state(layout, seed) for seed in range(count)]
    for seed, state in enumerate(states):
        state["norm.weight"] = torch.full((5,), float(seed))
    return states


def written(folder, states, suffix="safetensors"):
    """The paths of files with these states."""
    paths = [folder / f"in{k}.{suffix}" for k in range(len(states))]
    for path, state in zip(paths, states, strict=True):
        save(state, path)
    return paths


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_files(command, tmp_path, layout, suffix):
    """A file of scaled weights gets the scales and codes of the mean, and verifies."""
    states = states_of(layout)
    out = tmp_path / f"out.{suffix}"
    code, _, err = command(*written(tmp_path, states, suffix), "-o", out)
    assert code == 0, err
    merged = load(out)
    assert list(merged) == list(load(tmp_path / f"in0.{suffix}"))
    assert merged.pop("norm.weight").tolist() == [0.5] * 5
    (expected,) = Memory(scaled_of(states), states).run()
    for key, tensor in expected.items():
        assert merged[key].shape == tensor.shape
        assert torch.equal(bits(merged[key]), bits(tensor))
    assert command("verify", out)[0] == 0
    assert "with scales: averaged by the numbers that they stand for" in err


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equal_files(command, tmp_path, layout, suffix):
    """The mean of a checkpoint with itself has its bytes."""
    states = states_of(layout, 1)
    (path,) = written(tmp_path, states, suffix)
    out = tmp_path / f"out.{suffix}"
    assert command(path, path, "-o", out, "--allow-trivial")[0] == 0
    for key, tensor in load(out).items():
        assert torch.equal(bits(tensor), bits(states[0][key]))


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_another_dtype(command, tmp_path, layout, suffix):
    """With --dtype weights are numbers, rounded once, without scales."""
    states = states_of(layout)
    out = tmp_path / f"out.{suffix}"
    code, _, err = command(*written(tmp_path, states, suffix), "-o", out, "--dtype", "bfloat16")
    assert code == 0, err
    (expected,) = Memory(scaled_of(states, dense="bfloat16"), states).run()
    merged = load(out)
    assert merged.keys() == {*expected, "norm.weight"}
    for key, tensor in expected.items():
        assert torch.equal(merged[key], tensor)
    assert command("verify", out)[0] == 0


@pytest.mark.parametrize("window", [32, 1024, 1 << 16])
def test_experts_change_sides(command, tmp_path, monkeypatch, window):
    """The experts of GPT-OSS get the name and the shape that transformers has for numbers."""
    monkeypatch.setattr(Scaled, "window", window)
    states = states_of("mxfp4")
    paths = written(tmp_path, states)
    assert command(*paths, "-o", "out.safetensors", "--dtype", "float32")[0] == 0
    merged = load_file(tmp_path / "out.safetensors")
    assert merged.keys() == {"e.up", "norm.weight"}
    rows = [plain(s["e.up_blocks"], s["e.up_scales"], (2, 5, 96)) for s in states]
    expected = ((rows[0] + rows[1]) / 2).float().transpose(1, 2)
    assert torch.equal(merged["e.up"], expected)
    for state in states:
        state["e.up"] = torch.zeros(3)
    paths = written(tmp_path, states)
    code, _, err = command(*paths, "-o", "no.safetensors", "--dtype", "float32")
    assert code == 1
    assert "'e.up_blocks' would become 'e.up', which there is already" in err


def folders_of(tmp_path, config=DEEPSEEK, count=2):
    """Sharded folders as transformers writes them, and their states."""
    states = []
    for k in range(count):
        layers = [random_state("deepseek", 2 * k), random_state("deepseek", 2 * k + 1)]
        state = {f"{n}.{key}": t for n, layer in enumerate(layers) for key, t in layer.items()}
        state["norm.weight"] = torch.full((5,), float(k))
        states.append(state)
        folder = tmp_path / f"in{k}"
        folder.mkdir()
        shards = [{key: t for key, t in state.items() if key.startswith(n)} for n in ("0", "1")]
        shards[1]["norm.weight"] = state["norm.weight"]
        table = {}
        for n, shard in enumerate(shards):
            name = f"model-0000{n + 1}-of-00002.safetensors"
            save_file(shard, folder / name, {"format": "pt"})
            table |= dict.fromkeys(shard, name)
        size = sum(t.numel() * t.itemsize for t in state.values())
        index = {"metadata": {"total_size": size}, "weight_map": table}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        said = {"architectures": ["X"], "torch_dtype": "bfloat16", "quantization_config": config}
        (folder / "config.json").write_text(json.dumps(said))
    return states


def loaded(folder):
    """All tensors of a folder, as its index says."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return load_file(folder / "model.safetensors")
    table = json.loads(index.read_text())["weight_map"]
    found = {}
    for name in set(table.values()):
        shard = load_file(folder / name)
        assert {key for key, file in table.items() if file == name} == set(shard)
        found |= shard
    return found


def test_folders(command, tmp_path):
    """Shards, index and configuration are the template's; codes and scales are the mean's."""
    states = folders_of(tmp_path)
    code, _, err = command("in0", "in1", "-o", "out")
    assert code == 0, err
    merged = loaded(tmp_path / "out")
    for n in "01":
        parts = [{k: t for k, t in state.items() if k.startswith(n)} for state in states]
        (expected,) = Memory(scaled_of(parts), parts).run()
        for key, tensor in expected.items():
            assert torch.equal(bits(merged[key]), bits(tensor))
    for name in ("config.json", "model.safetensors.index.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "in0" / name).read_bytes()
    assert command("verify", "out")[0] == 0


@pytest.mark.parametrize("size", [(), ("--max-shard-size", "40KB")])
def test_folders_in_another_dtype(command, tmp_path, size):
    """Without scales, the index lists what there is, and the configuration says so."""
    states = folders_of(tmp_path)
    code, _, err = command("in0", "in1", "-o", "out", "--dtype", "float32", *size)
    assert code == 0, err
    merged = loaded(tmp_path / "out")
    assert merged.keys() == {"0.l.weight", "1.l.weight", "norm.weight"}
    for key in ("0.l.weight", "1.l.weight"):
        rows = [plain(s[key], s[f"{key}_scale_inv"], (130, 260)) for s in states]
        torch.testing.assert_close(merged[key].double(), (rows[0] + rows[1]) / 2)
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert said == {"architectures": ["X"], "torch_dtype": "float32"}
    assert "may still name another dtype" not in err
    assert command("verify", "out")[0] == 0


def test_one_file_of_a_folder(command, tmp_path):
    """A folder of shards is gathered into one file, codes and scales or numbers."""
    folders_of(tmp_path)
    assert command("in0", "in1", "-o", "out")[0] == 0
    assert command("in0", "in1", "-o", "out.safetensors")[0] == 0
    expected, merged = loaded(tmp_path / "out"), load_file(tmp_path / "out.safetensors")
    assert merged.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(bits(merged[key]), bits(tensor))
    assert command("in0", "in1", "-o", "wide.pt", "--dtype", "float32")[0] == 0
    assert torch.load(tmp_path / "wide.pt")["0.l.weight"].dtype == torch.float32
    assert command("verify", "wide.pt")[0] == 0


def test_the_report(command, tmp_path):
    """The JSON has the error of each tensor, and the agreement of what codes stand for."""
    states = folders_of(tmp_path)
    _, out, _ = command("in0", "in1", "-o", "out", "--json")
    report = json.loads(out)
    assert [one["name"] for one in report["approximated"]["tensors"]] == [
        "0.l.weight",
        "1.l.weight",
    ]
    assert 0.01 < report["approximated"]["error"] < 0.05
    rows = [
        torch.cat(
            [
                plain(s[f"{n}.l.weight"], s[f"{n}.l.weight_scale_inv"], (130, 260)).view(-1)
                for n in "01"
            ]
        )
        for s in states
    ]
    cosine = float(torch.nn.functional.cosine_similarity(*rows, 0))
    assert report["agreement"]["mean"] == pytest.approx(cosine, abs=1e-6)


def test_a_dry_run(command, tmp_path):
    """A dry run says what is read and written, and writes nothing."""
    folders_of(tmp_path)
    code, out, err = command("in0", "in1", "-o", "out", "--dry-run", "--json")
    assert code == 0, err
    report = json.loads(out)
    sizes = sum(t.numel() * t.itemsize for t in loaded(tmp_path / "in0").values())
    assert report["bytes_to_read"] >= 2 * sizes
    assert not (tmp_path / "out").exists()


def test_several_averages(command, tmp_path):
    """Averages that are made in one reading are those that are made alone."""
    states = states_of("deepseek", 3)
    paths = written(tmp_path, states)
    assert command(*paths, "-o", "avg-{name}.safetensors", "--leave-one-out")[0] == 0
    assert command(*paths[1:], "-o", "alone.safetensors")[0] == 0
    found = [load_file(one) for one in sorted(tmp_path.glob("avg-*"))]
    assert len(found) == 3
    alone = load_file(tmp_path / "alone.safetensors")
    same = [all(torch.equal(bits(one[key]), bits(t)) for key, t in alone.items()) for one in found]
    assert same.count(True) == 1


def test_markers_go_with_the_scales(command, tmp_path):
    """ComfyUI's words on quantisation stay with codes, and are left out without them."""
    states = states_of("comfy")
    for state in states:
        state["scaled_fp8"] = torch.zeros(2).to(torch.float8_e4m3fn)
        state["l.comfy_quant"] = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=BYTE)
    paths = written(tmp_path, states)
    assert command(*paths, "-o", "out.safetensors")[0] == 0
    assert load_file(tmp_path / "out.safetensors").keys() == states[0].keys()
    assert command(*paths, "-o", "wide.safetensors", "--dtype", "float16")[0] == 0
    assert load_file(tmp_path / "wide.safetensors").keys() == {"l.weight", "norm.weight"}
    assert command("verify", "wide.safetensors")[0] == 0


def test_markers_of_what_stays(command, tmp_path):
    """A layer that keeps its codes keeps its mark, and so does the file; numbers are no marks."""
    states = states_of("comfy")
    for state in states:
        kept = {key.replace("l.", "k."): value for key, value in state.items() if "l." in key}
        state.update(kept, scaled_fp8=torch.zeros(2).to(torch.float8_e4m3fn))
        for key in ("l.comfy_quant", "k.comfy_quant"):
            state[key] = torch.tensor(list(b"{}"), dtype=BYTE)
        state["l.pre_quant"] = torch.ones(3)
    options = "--dtype", "float16", "--exclude", "k.*"
    assert command(*written(tmp_path, states), "-o", "out.safetensors", *options)[0] == 0
    gone = {key for key in states[0] if "l." in key and "scale" in key} | {"l.comfy_quant"}
    assert load_file(tmp_path / "out.safetensors").keys() == states[0].keys() - gone


def test_numbers_and_codes_are_not_mixed(command, tmp_path):
    """Codes are not averaged as numbers where the template has numbers in their place."""
    state = states_of("deepseek")[0]
    numbers = {"l.weight": torch.ones(state["l.weight"].shape), "norm.weight": torch.ones(5)}
    paths = written(tmp_path, [numbers, state])
    options = "--missing", "skip", "--dtype", "float32"
    code, _, err = command(*paths, "-o", "out.safetensors", *options)
    assert code == 1
    assert "tensor 'l.weight' holds codes with scales" in err


def test_a_shard_of_scales_alone(command, tmp_path):
    """A shard of which nothing is left is not copied beside the new ones."""
    states = states_of("deepseek")
    for number, state in enumerate(states):
        folder = tmp_path / f"in{number}"
        folder.mkdir()
        shards = [{}, {}]
        for key, value in state.items():
            shards["scale" in key][key] = value
        names = [f"model-0000{k + 1}-of-00002.safetensors" for k in range(2)]
        for name, shard in zip(names, shards, strict=True):
            save_file(shard, folder / name)
        table = {key: names["scale" in key] for key in state}
        index = {"metadata": {}, "weight_map": table}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert command("in0", "in1", "-o", "out", "--dtype", "bfloat16")[0] == 0
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert found == {"model.safetensors", "merge_avg.json"}
    assert command("verify", "out")[0] == 0


def test_kept_layers(command, tmp_path):
    """A layer that is excluded keeps codes and scales; a part of one cannot be."""
    states = states_of("deepseek")
    paths = written(tmp_path, states)
    assert command(*paths, "-o", "out.safetensors", "--exclude", "l.*")[0] == 0
    merged = load_file(tmp_path / "out.safetensors")
    for key in ("l.weight", "l.weight_scale_inv"):
        assert torch.equal(bits(merged[key]), bits(states[0][key]))
    code, _, err = command(*paths, "-o", "no.safetensors", "--exclude", "*scale*")
    assert code == 1
    assert "hint: choose both: --exclude 'l.*' keeps them" in err


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"quant_method": "awq"}, "its config.json names the scheme 'awq'"),
        ({"quant_method": ["fp8"]}, "its config.json names the scheme ['fp8']"),
        (
            {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"},
            "its config.json names the format 'nvfp4-pack-quantized'",
        ),
    ],
)
def test_schemes_that_are_not_understood(command, tmp_path, config, said):
    """A scheme that the configuration names and nobody here knows is refused by its name."""
    folders_of(tmp_path, config)
    code, _, err = command("in0", "in1", "-o", "out")
    assert code == 1
    assert said in err
    assert not (tmp_path / "out").exists()


def change(state, key, value):
    """A state with another tensor."""
    return {**state, key: value}


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("l.weight_scale_2", torch.ones(()), "'l.weight_scale_inv' and 'l.weight_scale_2' beside"),
        ("l.weight_zero_point", torch.ones(2, 3), "'l.weight_zero_point' beside it"),
        ("l.weight_scale_inv", torch.ones(3, 2), "its scales have the shape [3, 2] for codes"),
    ],
)
def test_scales_that_are_not_understood(command, tmp_path, key, value, said):
    """Scales of two levels, zero points and other shapes are refused, with what is odd."""
    states = [change(state, key, value) for state in states_of("deepseek")]
    code, _, err = command(*written(tmp_path, states), "-o", "out.safetensors")
    assert code == 1
    assert "tensor 'l.weight' holds quantised codes that are not understood: " in err
    assert said in err


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("l.weight_scale_inv", None, "it lacks 'l.weight_scale_inv'"),
        ("l.weight_scale_inv", torch.ones(1), "has the shape [1], expected [2, 3]"),
        ("l.weight", torch.ones(130, 260), "is float32, in"),
        ("l.weight_scale_inv", torch.ones(2, 3).bfloat16(), "is bfloat16, in"),
    ],
)
def test_checkpoints_that_are_quantised_otherwise(command, tmp_path, key, value, said):
    """Checkpoints have to be quantised alike: what differs is named."""
    states = states_of("deepseek")
    states[1][key] = value
    states[1] = {key: tensor for key, tensor in states[1].items() if tensor is not None}
    code, _, err = command(*written(tmp_path, states), "-o", "out.safetensors")
    assert code == 1
    assert err.count("error:") == 1
    assert said in err
    assert "in1.safetensors" in err


def test_a_code_that_shares_its_memory(command, tmp_path):
    """Codes that are a part of a larger storage are refused: the rest would be lost."""
    whole = torch.zeros(200, 260).to(torch.float8_e4m3fn)
    states = states_of("deepseek")
    for state in states:
        state["l.weight"] = whole[:130]
    paths = [tmp_path / f"in{k}.pt" for k in range(2)]
    for path, state in zip(paths, states, strict=True):
        torch.save(state, path)
    code, _, err = command(*paths, "-o", "out.pt")
    assert code == 1
    assert "hint: save it as .clone()" in err


def test_a_base(command, tmp_path):
    """Scaled tensors are not compared with a base, and a note says so."""
    paths = written(tmp_path, states_of("deepseek", 3))
    code, _, err = command(*paths[:2], "-o", "out.safetensors", "--base", paths[2])
    assert code == 0, err
    assert f"note: tensors with scales are not compared with {paths[2]}" in err
    assert "no two checkpoints differ" not in err


def test_parts(command, tmp_path):
    """Scaled tensors are computed by one process, and parts are refused."""
    paths = written(tmp_path, states_of("deepseek"))
    code, _, err = command(*paths, "-o", "out.safetensors", "--part", "1/2")
    assert code == 1
    assert "'l.weight' is computed whole, not in parts or by ranks" in err


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("options", [(), ("--dtype", "float32")])
def test_distributed_checkpoints(command, tmp_path, options):
    """A distributed checkpoint of one chunk a tensor is averaged, in place or into one file."""
    states = states_of("deepseek")
    for k, state in enumerate(states):
        dcp.save({"model": state}, checkpoint_id=tmp_path / f"in{k}", no_dist=True)
    code, _, err = command("in0", "in1", "-o", "out.safetensors", *options)
    assert code == 0, err
    paths = written(tmp_path, states)
    assert command(*paths, "-o", "expected.safetensors", *options)[0] == 0
    expected, merged = (load_file(tmp_path / f"{n}.safetensors") for n in ("expected", "out"))
    assert merged.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(bits(merged[key]), bits(tensor))
    if not options:
        assert command("in0", "in1", "-o", "out")[0] == 0
        assert command("verify", "out")[0] == 0


def test_rules_by_name(command, tmp_path):
    """Other weights for some tensors do not go with scales, and say so."""
    paths = written(tmp_path, states_of("deepseek"))
    code, _, err = command(*paths, "-o", "out.safetensors", "--weights-for", "norm.*=1,0")
    assert code == 2
    assert "rules by name are not for tensors with scales" in err


def test_too_large_numbers(command, tmp_path):
    """A mean that does not fit the dtype that is asked for is refused."""
    states = states_of("comfy")
    for state in states:
        state["l.scale_weight"] = torch.tensor(1e30)
    paths = written(tmp_path, states)
    code, _, err = command(*paths, "-o", "out.safetensors", "--dtype", "float16")
    assert code == 1
    assert "does not fit float16" in err
    assert command(*paths, "-o", "out.safetensors", "--dtype", "float32")[0] == 0
    for state in states:
        state["l.scale_weight"] = torch.tensor(60000.0, dtype=torch.float16)
    paths = written(tmp_path, states)
    sums = "-w", "300,300", "--no-normalize"
    code, _, err = command(*paths, "-o", "sum.safetensors", *sums)
    assert code == 1
    assert "does not fit scales of float16" in err
