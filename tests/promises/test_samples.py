"""Frozen checkpoints of real frameworks, from tests/data, averaged without the frameworks."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from merge_avg import merge_checkpoints
from merge_avg.formats import scan

DATA = Path(__file__).parents[1] / "data"
SAMPLES = sorted(path.parent.name for path in DATA.glob("*/about.json"))
DIRECTORIES = [name for name in SAMPLES if (DATA / name / "0" / "checkpoint").is_dir()]


def raw(layout):
    """Return the tensors of a checkpoint, read from its bytes, by last name and shape."""
    found = {}
    for info in layout.tensors:
        if info.trouble:
            continue
        raw = layout.where(info).read_bytes()[layout.offset(info.storage) :]
        data = raw[: info.storage.nbytes]
        dtype = getattr(torch, info.dtype.name)
        flat = torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0)
        view = flat.as_strided(info.shape, info.stride, info.start).contiguous()
        name = str(info.path[-1]).replace("_orig_mod.", "")
        found.setdefault((name, view.shape), []).append(view)
    return found


@pytest.mark.parametrize("name", SAMPLES)
def test_the_output_holds_what_the_framework_loaded(name, tmp_path):
    """Every weight that the framework loaded from the mean is in the output, bit for bit."""
    paths = [next((DATA / name / fold).iterdir()) for fold in ("0", "1")]
    out = tmp_path / ("merged" if paths[0].is_dir() else paths[0].name)
    merge_checkpoints(paths, out)
    merged = [tensor for tensors in raw(scan(out)).values() for tensor in tensors]
    for key, value in load_file(DATA / name / "expected.safetensors").items():
        alike = (one for one in merged if one.shape == value.shape and one.dtype == value.dtype)
        assert any(torch.equal(one, value) for one in alike), key


@pytest.mark.parametrize("name", DIRECTORIES)
def test_files_without_weights_stay(name, tmp_path):
    """Files of a directory that hold no weights are the template's, byte for byte."""
    paths = [next((DATA / name / fold).iterdir()) for fold in ("0", "1")]
    out = tmp_path / "merged"
    job = merge_checkpoints(paths, out).job
    theirs = {p.relative_to(paths[0]): p.read_bytes() for p in paths[0].rglob("*") if p.is_file()}
    ours = {p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert ours.keys() == theirs.keys() | {Path("merge_avg.json")}
    del ours[Path("merge_avg.json")]
    changed = {str(path) for path in ours if ours[path] != theirs[path]}
    averaged = {unit.storage.file for unit in job.plan.units}
    names = [str(file.path.relative_to(paths[0])) for file in job.layouts[0].files]
    assert changed <= {names[number] for number in averaged}
