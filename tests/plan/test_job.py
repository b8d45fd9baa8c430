"""merge_avg.plan: a job is what is known before any payload is read, or one error."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from merge_avg.errors import MergeError, UsageError
from merge_avg.formats import scan
from merge_avg.options import Options
from merge_avg.plan import prepare
from merge_avg.plan._job import _template_first


@pytest.fixture
def paths(tmp_path):
    """Three checkpoints with an optimizer beside the model."""
    found = [tmp_path / f"{k}.pt" for k in range(3)]
    for k, path in enumerate(found):
        model = {"w": torch.full((4, 3), float(k)), "b": torch.ones(2)}
        torch.save({"model": model, "optimizer": {"m": torch.ones(9)}}, path)
    return found


def test_a_job_knows_what_will_be_read_and_written(paths, tmp_path):
    """Bytes to read are each checkpoint's weights and what is copied; nothing is written yet."""
    job = prepare(paths, tmp_path / "o.pt", Options(weights=[1, 0, 1]))
    copied = sum(storage.nbytes for _, storage in job.layout.copies)
    assert copied >= 36
    assert job.nbytes == 3 * (48 + 8) + copied
    assert job.averaged == (0, 2)
    assert [output.weights.integers for output in job.outputs] == [(1, 0, 1)]
    assert [layout.path for layout in job.layouts] == paths
    assert (job.layouts[0].archive is None, job.layouts[1].archive is None) == (False, True)
    assert not (tmp_path / "o.pt").exists()


def test_outputs_of_one_job_share_a_layout(paths, tmp_path):
    """Several outputs differ in their weights, and none records an agreement."""
    rows = {str(tmp_path / f"{name}.pt"): row for name, row in (("x", [1, 1, 0]), ("y", [0, 1, 3]))}
    job = prepare(paths, rows, Options())
    assert [output.path.name for output in job.outputs] == ["x.pt", "y.pt"]
    assert job.averaged == (0, 1, 2)
    assert b'"agreement": null' in job.record(job.outputs[0])
    one = prepare(paths, tmp_path / "x.pt", Options())
    assert b'"agreement": "+0.000000"' in one.record(one.outputs[0])


def test_texts_of_the_template_are_kept_by_copies_only(paths, tmp_path):
    """What is hashed of the template beside its records depends on what the output has of it."""
    copy = prepare(paths, tmp_path / "o.pt", Options())
    bare = prepare(paths, tmp_path / "o.pt", Options(state_dict=True))
    assert any(b"optimizer" in text for text in copy.kept_texts)
    assert not any(b"optimizer" in text for text in bare.kept_texts)


def test_layouts_that_are_known_are_not_scanned_again(paths, tmp_path, monkeypatch):
    """A selection hands its layouts on."""
    known = {path: scan(path) for path in paths}
    monkeypatch.setattr("merge_avg.plan._job.scan", None)
    assert prepare(paths, tmp_path / "o.pt", Options(), layouts=known).layouts[0] == known[paths[0]]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"paths": []}, "there are no checkpoints to average"),
        ({"outputs": {}}, "there are no outputs to write"),
        ({"outputs": {"x.pt": [1, 1, 1]}, "weights": [1, 1, 1]}, "the weights are given twice"),
        ({"outputs": {"x.pt": [1, 1, 1], "y.pth": [1, 1, 1]}}, "x.pt and y.pth end differently"),
        ({"weights": [1, 2]}, "2 weights for 3 checkpoints"),
        ({"weights": [1, 2, -1]}, "the weight -1 is negative"),
        ({"dtype": "int8"}, "the dtype 'int8' cannot be written"),
        ({"agreement": False, "base": "b.pt"}, "the agreement is asked for"),
        ({"agreement": False, "min_agreement": 0.5}, "the agreement is asked for"),
        ({"agreement": False, "fail_on": "drifted"}, "the agreement is asked for"),
        ({"fail_on": "agree"}, "'agree' is not a verdict to fail on"),
        ({"min_agreement": float("nan")}, "agreement nan is out of range"),
        ({"min_agreement": 1.5}, "agreement 1.5 is out of range"),
        ({"template": 4}, "there is no checkpoint number 4"),
        ({"template": "9" * 200}, "there is no checkpoint number 999"),
        ({"threads": 0}, "threads is out of range"),
        ({"threads": 257}, "threads is out of range"),
        ({"include": ["a*"] * 501, "exclude": ["b"] * 500}, "more than 1,000 patterns"),
    ],
)
def test_contradictions_are_usage_errors(paths, tmp_path, given, says):
    """Options that do not fit each other or the inputs are refused, whatever the files hold."""
    inputs = given.pop("paths", paths)
    outputs = given.pop("outputs", tmp_path / "o.pt")
    with pytest.raises(UsageError, match=says):
        prepare(inputs, outputs, Options(**given))


def test_no_memory_is_too_little(paths, tmp_path):
    """A budget of zero is not the default."""
    with pytest.raises(MergeError, match="the memory budget is too small"):
        prepare(paths, tmp_path / "o.pt", Options(max_memory=0))


def test_a_tensor_without_weight_is_refused_by_planning(tmp_path):
    """Where all that have a tensor have the weight zero, that shows before anything is read."""
    both, one = {"w": torch.ones(2), "v": torch.ones(2)}, {"w": torch.ones(2)}
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    save_file(both, files[0])
    save_file(one, files[1])
    options = Options(missing="available", weights=[0, 1])
    with pytest.raises(MergeError, match="every checkpoint that has 'v' has the weight zero"):
        prepare(files, tmp_path / "o.safetensors", options)
    prepare(files, tmp_path / "o.safetensors", Options(missing="available", weights=[1, 0]))


def test_a_checkpoint_named_twice_is_scanned_once(paths, tmp_path, monkeypatch):
    """However often a record names a file, it is scanned once, and once more as the template."""
    found = []
    monkeypatch.setattr(
        "merge_avg.plan._job.scan", lambda path: (found.append(path), scan(path))[1]
    )
    prepare(paths[:1] * 50, tmp_path / "o.pt", Options())
    assert len(found) <= 2


def test_the_template_comes_first(tmp_path, monkeypatch):
    """A number counts from one; a file of that name wins; a path that is no input is added."""
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "2"):
        (tmp_path / name).touch()
    inputs = [tmp_path / "a", tmp_path / "b"]
    assert _template_first(inputs, None) == [(inputs[0], 0), (inputs[1], 1)]
    swapped = [(inputs[1], 1), (inputs[0], 0)]
    assert _template_first(inputs, 2) == _template_first(inputs, "b") == swapped
    found = _template_first(inputs, "2")
    assert [number for _, number in found] == [None, 0, 1]
    (tmp_path / "2").unlink()
    assert _template_first(inputs, "2") == swapped


def test_an_output_never_replaces_an_input(paths, tmp_path):
    """An output that is an input, lies in one, or holds one is refused, --overwrite or not."""
    run = tmp_path / "run"
    run.mkdir()
    save_file({"w": torch.ones(2)}, run / "model.safetensors")
    with pytest.raises(MergeError, match="the output is the input"):
        prepare(paths, paths[1], Options(overwrite=True))
    with pytest.raises(MergeError, match="the output lies in the input"):
        prepare([run], run / "o.pt", Options(overwrite=True))
    with pytest.raises(MergeError, match="the output holds the input"):
        prepare([run / "model.safetensors"], run, Options(overwrite=True, max_shard_size=100))


class Running:
    """Statistics of observations, as scripts of reinforcement learning pickle them."""

    def __init__(self, mean):
        self.mean, self.var, self.count = np.full(3, mean), np.full(3, mean), mean


def arrays(tmp_path, value, **more):
    """Save two checkpoints of a number each, and return the notes of their merge."""
    found = [tmp_path / f"{k}.pt" for k in (1, 2)]
    for k, path in enumerate(found):
        torch.save(value(float(k)), path)
    return prepare(found, tmp_path / "o.pt", Options(**more)).notes


def test_arrays_that_differ_are_named(tmp_path):
    """In a state dict, and in an object in a list; those that agree are not."""
    differ = "NumPy array that differs between the checkpoints; the template's is kept"
    ones, w = np.ones(2), torch.ones(2)
    assert arrays(tmp_path, lambda x: {"m": {"w": w, "mean": np.full(2, x), "same": ones}}) == (
        f"'m.mean' is a {differ}",
    )
    (several,) = arrays(tmp_path, lambda x: [{"w": w}, Running(x)])
    assert several.startswith("'1.mean' and 1 more are NumPy arrays that differ")
    assert several.endswith("the template's are kept")
    (bare,) = arrays(tmp_path, lambda x: {"w": w, "mean": np.full(2, x)}, state_dict=True)
    assert bare.startswith("'mean' is a NumPy array")
    assert bare.endswith("the output has none")


def test_arrays_that_are_state_are_not_named(tmp_path):
    """Below an optimizer, told by its name or by what it holds, and in random-number states."""

    def value(x):
        mean = np.full(2, x)
        kept = {"optimizer": {"m": mean}, "rng_state": mean, "metrics": [mean]}
        return {"w": torch.ones(2), **kept, "o": {"state": {0: mean}, "param_groups": []}}

    assert arrays(tmp_path, value) == ()
