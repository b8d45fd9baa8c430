"""The report's JSON: its keys are those that scripts read."""

import json
import subprocess
import sys

import pytest
import torch

import merge_avg.report
from merge_avg.options import REPORTED
from merge_avg.report import as_json
from tests.report.helpers import relatives, report_of, save

# Frozen: a key may be added, but scripts read these.
PLANNED = """
    merge_avg output dry_run inputs outputs template base tensors parameters dtypes kept others
    whole available bytes_to_read bytes_to_write threads memory int_policy policies notes warnings
    candidates
""".split()
RUN = "agreement bytes_read seconds differing nonfinite".split()
FIGURES = "mean error each pairs shrinkage size elements odd tensors".split()
NESTED = {
    "inputs": ["path", "format", "bytes", "averaged", "weight", "hash"],
    "outputs": ["path", "weights"],
    "kept": ["key", "tensors", "bytes"],
}
POLICIES = """
    allow_nonfinite device dtype exclude include int_policy key missing normalize state_dict
""".split()


@pytest.fixture
def values(tmp_path, monkeypatch):
    """Return the JSON of a merge with a base and an entry that is kept."""
    monkeypatch.chdir(tmp_path)
    paths = relatives(tmp_path)
    torch.save(torch.load(paths[0]) | {"optimizer": {"m": torch.ones(3)}}, paths[0])
    report = report_of([path.name for path in paths], "o.pt", base="base.pt", include=["*"])
    return as_json(report)


def test_a_run_has_its_keys(values):
    """Every key of a merge that ran is there, at every depth, and no other."""
    assert sorted(values) == sorted(PLANNED + RUN)
    for name, keys in NESTED.items():
        assert list(values[name][0]) == keys
    assert list(values["tensors"]) == ["averaged", "integers", "kept"]
    assert sorted(values["policies"]) == POLICIES == sorted(REPORTED)
    agreement = values["agreement"]
    assert list(agreement) == [*FIGURES, "base", "centred"]
    assert list(agreement["centred"]) == FIGURES
    assert list(agreement["each"][0]) == ["path", "mean", "error"]
    keys = ["name", "size", "elements", "mean", "error", "norm", "distances"]
    assert list(agreement["tensors"][0]) == keys


def test_its_values_are_plain(values):
    """Nothing is lost in JSON: parsed again, the values are equal."""
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    assert (values["output"], values["template"], values["base"]) == ("o.pt", "fold0.pt", "base.pt")
    assert values["merge_avg"] == merge_avg.__version__
    assert values["kept"] == [{"key": "optimizer", "tensors": 1, "bytes": 12}]
    assert values["policies"]["include"] == ["*"]
    assert [len(one["hash"]) for one in values["inputs"] if one["averaged"]] == [32] * 4
    (base,) = (one for one in values["inputs"] if not one["averaged"])
    assert base["weight"] == 0
    assert "hash" not in base


def test_a_plan_has_no_results(tmp_path):
    """A dry run has the keys of a plan only; one that ran has `agreement`, null or not."""
    paths = save(tmp_path, {"w": torch.ones(3)})
    planned = as_json(report_of(paths, tmp_path / "o.pt", dry_run=True))
    assert sorted(planned) == sorted(PLANNED)
    assert planned["dry_run"] is True
    ran = as_json(report_of(paths, tmp_path / "o.pt"))
    assert ran["dry_run"] is False
    assert ran["agreement"] is None


def test_several_outputs_have_their_own_weights(tmp_path):
    """Inputs have no weight of their own where there is more than one output."""
    paths = save(tmp_path, *({"w": torch.ones(3)} for _ in range(2)))
    outputs = {str(tmp_path / "x.pt"): [1, 3], str(tmp_path / "y.pt"): [0, 1]}
    found = as_json(report_of(paths, outputs))
    assert [one["weights"] for one in found["outputs"]] == [[0.25, 0.75], [0, 1]]
    assert not any("weight" in one for one in found["inputs"])


def test_the_face_is_light():
    """Importing `printable`, as the command does for --help, imports no report."""
    code = (
        "import sys, merge_avg.report.printable\n"
        "assert not {name for name in sys.modules if name.startswith('merge_avg.')} - "
        "{'merge_avg._version', 'merge_avg.errors', 'merge_avg.report', "
        "'merge_avg.report.printable'}\n"
        "from merge_avg.report import Report, as_json, describe\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = merge_avg.report.nothing
