"""The contents of a checkpoint, as --inspect lists them."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from merge_avg.errors import MergeError
from merge_avg.report.inspect import as_json, contents, lines
from tests.helpers import merge_checkpoints

W = torch.arange(12.0).view(4, 3)
STATE = {"a.weight": W, "b.weight": W, "part": W[1:3], "n": torch.tensor(3), "z": W.clone() * 1j}


def saved(path, **more):
    content = {"state_dict": STATE, "optimizer": {"state": {0: {"m": W + 1}}}, "epoch": 3, **more}
    torch.save(content, path)
    return path


def test_roles_shapes_and_ties(tmp_path):
    """Each tensor has its dtype, shape and role, and what shares memory has the same tie."""
    found = contents(saved(tmp_path / "a.ckpt"))
    table = {one.name: one for one in found.tensors}
    assert {name: one.role for name, one in table.items()} == {
        "state_dict.a.weight": "averaged",
        "state_dict.b.weight": "averaged",
        "state_dict.part": "averaged",
        "state_dict.n": "compared",
        "state_dict.z": "averaged",
        "optimizer.state.0.m": "kept",
    }
    assert table["state_dict.part"].shape == (2, 3)
    assert table["state_dict.z"].dtype == "complex64"
    assert [name for name, one in table.items() if one.tie == 1] == [
        "state_dict.a.weight",
        "state_dict.b.weight",
        "state_dict.part",
    ]
    assert (found.format, found.epoch, found.merged) == ("torch-zip", 3, False)


def test_a_key_decides_what_is_a_weight(tmp_path):
    """With the name of one state dict, all other tensors are kept."""
    path = saved(tmp_path / "a.ckpt", ema={"a.weight": W + 2})
    roles = {one.name: one.role for one in contents(path, "ema").tensors}
    assert roles["ema.a.weight"] == "averaged"
    assert roles["state_dict.a.weight"] == "kept"


def test_each_tensor_has_a_reason(tmp_path):
    """It says why a tensor is a weight, or why it is kept."""
    found = contents(saved(tmp_path / "a.ckpt", loss=torch.tensor(0.5), opt={"state": {0: STATE}}))
    reasons = {one.name: one.reason for one in found.tensors}
    assert reasons["state_dict.part"] == "in the state dict state_dict"
    assert reasons["optimizer.state.0.m"] == "optimizer state, by the key 'optimizer'"
    assert reasons["opt.state.0.part"] == "optimizer state of 0"
    assert reasons["loss"] == "a value beside state dicts, by its name"
    assert {one.reason for one in contents(tmp_path / "a.ckpt", "opt").tensors} == {
        "below --key",
        *(text for name, text in reasons.items() if name.startswith(("optimizer", "loss"))),
        "it is not below --key",
    }
    torch.save({"w": W}, tmp_path / "b.pt")
    assert contents(tmp_path / "b.pt").tensors[0].reason == "in the state dict at the root"


def test_a_master_weight_says_so(tmp_path):
    """Float32 in an optimizer that rounds to a weight is averaged with it."""
    groups = {"groups": [[W.clone()]]}
    torch.save({"model": {"w": W.half()}, "optimizer": groups}, tmp_path / "a.pt")
    (_, master) = contents(tmp_path / "a.pt").tensors
    assert (master.role, master.reason) == ("averaged", "a weight in float32, of an optimizer")


def test_unusual_tensors_are_named(tmp_path):
    """A tensor that cannot be averaged is listed with the reason."""
    torch.save({"w": W, "s": torch.eye(3).to_sparse()}, tmp_path / "a.pt")
    found = contents(tmp_path / "a.pt")
    assert {one.name: one.trouble for one in found.tensors} == {"w": None, "s": "a sparse tensor"}
    assert any(line.endswith("a sparse tensor") for line in lines(found))


def test_empty_tensors_share_nothing(tmp_path):
    """Tensors without elements have no memory in common, and a tensor without axes no shape."""
    torch.save({"w": W, "a": torch.empty(0), "b": torch.empty(0), "c": W.sum()}, tmp_path / "a.pt")
    found = contents(tmp_path / "a.pt")
    assert [one.tie for one in found.tensors] == [None] * 4
    assert [line.split()[2] for line in list(lines(found))[1:]] == ["4x3", "0", "0", "-"]


def test_the_json_has_its_keys(tmp_path):
    """A step that is not known is null; a tie or trouble that there is not has no key."""
    found = as_json(contents(saved(tmp_path / "a.ckpt", s=torch.eye(3).to_sparse())))
    keys = "path format bytes step epoch metrics merged others callables tensors".split()
    assert list(found) == keys
    assert (found["step"], found["epoch"], found["metrics"]) == (None, 3, {})
    assert found["others"] == ["epoch"]
    table = {one["name"]: list(one) for one in found["tensors"]}
    plain = ["name", "dtype", "shape", "role", "reason"]
    assert table["state_dict.a.weight"] == [*plain, "tie"]
    assert table["state_dict.n"] == plain
    assert table["s"] == [*plain, "trouble"]


def test_lines(tmp_path):
    """The first line is about the file; then come the tensors, and the entries without any."""
    first, *rest = lines(contents(saved(tmp_path / "a.ckpt", global_step=70)))
    assert first.startswith(f"{tmp_path / 'a.ckpt'}: torch-zip, ")
    assert first.endswith("step 70, epoch 3")
    assert len(rest) == 7
    assert "4x3" in rest[0]
    assert rest[-1] == "  without tensors: epoch, global_step"


def test_an_output_says_so(tmp_path):
    """A checkpoint that merge-avg wrote is called an output."""
    save_file({"w": W}, tmp_path / "a.safetensors")
    merge_checkpoints([tmp_path / "a.safetensors"], tmp_path / "o.safetensors")
    assert next(lines(contents(tmp_path / "o.safetensors"))).endswith("an output of merge-avg")


def test_other_files_are_refused(tmp_path):
    """Of a file that is not a checkpoint, the scan's own error is raised."""
    (tmp_path / "a.pt").write_text("hello")
    with pytest.raises(MergeError):
        contents(tmp_path / "a.pt")


def test_the_command_needs_no_torch(tmp_path):
    """--inspect prints a table or JSON, escapes control characters, and does not import torch."""
    torch.save({"w": W, "\x1b[31mred\n": W + 1}, tmp_path / "a.pt")
    code = "import sys; from merge_avg.cli import main\ntry: main()\nexcept SystemExit: pass\n"
    code += "assert 'torch' not in sys.modules"
    command = [sys.executable, "-c", code, "a.pt", "--inspect"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path)
    assert len(done.stdout.splitlines()) == 3
    assert "\\x1b[31mred\\n" in done.stdout
    done = subprocess.run(
        [*command, "--json"], check=True, capture_output=True, text=True, cwd=tmp_path
    )
    (found,) = json.loads(done.stdout)
    assert [one["name"] for one in found["tensors"]] == ["w", "\x1b[31mred\n"]
