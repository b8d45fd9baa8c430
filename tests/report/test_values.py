"""The report of a job and its result, and its JSON, whose keys are those that scripts read."""

import json
import math
from pathlib import Path

import pytest
import torch

import merge_avg
from merge_avg.agreement import judge
from merge_avg.options import REPORTED, Criteria, Options, Series, Weighting
from merge_avg.plan import prepare
from merge_avg.report.values import ReportedOutput, as_json, describe, plain
from merge_avg.selection import choose
from tests.helpers import noise
from tests.report.helpers import relatives, report_of, save

# Frozen: a key may be added, but scripts read these.
PLANNED = """
    merge_avg output dry_run inputs outputs template base tensors parameters dtypes kept others
    whole left_out callables available bytes_to_read bytes_to_write threads memory int_policy
    policies notes warnings candidates
""".split()
RUN = "agreement bytes_read seconds differing nonfinite approximated".split()
FIGURES = "mean error each pairs shrinkage size elements odd tensors".split()
VERDICT = "word number reason advice tensors groups".split()
NESTED = {
    "inputs": ["path", "format", "bytes", "averaged", "weight", "hash"],
    "outputs": ["path", "weights"],
    "kept": ["key", "tensors", "bytes", "reason"],
}
POLICIES = """
    allow_nonfinite device dtype exclude include int_policy key lora missing normalize state_dict
    weights_for weights_only
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
    assert list(agreement) == [*FIGURES, "base", "centred", "verdict"]
    assert list(agreement["verdict"]) == VERDICT
    assert list(agreement["centred"]) == FIGURES
    assert list(agreement["each"][0]) == ["path", "mean", "error"]
    keys = ["name", "shape", "size", "elements", "mean", "error", "norm", "distances"]
    assert list(agreement["tensors"][0]) == keys


def test_its_values_are_plain(values):
    """Nothing is lost in JSON: parsed again, the values are equal."""
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    assert (values["output"], values["template"], values["base"]) == ("o.pt", "fold0.pt", "base.pt")
    assert values["merge_avg"] == merge_avg.__version__
    reason = "optimizer state, by the key 'optimizer'"
    kept = {"key": "optimizer", "tensors": 1, "bytes": 12, "reason": reason}
    assert values["kept"] == [kept]
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


# What is said of a job


def test_counts_are_of_the_template(tmp_path):
    """Floats are averaged, integers counted apart, and tensors left out by choice are kept."""
    state = {"w": torch.ones(2, 3), "n": torch.tensor(3), "left": torch.ones(7)}
    paths = save(tmp_path, state, state)
    report = report_of(paths, tmp_path / "o.pt", exclude=["left"], dtype="float16")
    counts = report.tensors
    assert counts == {"averaged": 1, "integers": 1, "kept": 1}
    assert report.parameters == 6
    # What is kept keeps its dtype.
    assert report.dtypes == {"float16": 1, "int64": 1, "float32": 1}


def test_parameters_are_elements_of_memory(tmp_path):
    """Each element that is averaged counts once: ties and masks add none, holes neither."""
    whole = torch.ones(10)
    state = {"a": whole, "tied": whole, "part": whole[2:4], "mask": torch.ones(5) > 0}
    state["strided"] = torch.ones(4, 6)[:, ::2]
    paths = save(tmp_path, state, state)
    assert report_of(paths, tmp_path / "o.pt").parameters == 10 + 12


def test_json_has_no_nan():
    """What is not a finite number is null, wherever it lies, and a path is a text."""
    value = {
        "a": [math.nan, (1.5, -math.inf)],
        "b": Path("x"),
        "c": ReportedOutput("o", (math.inf,)),
    }
    expected = {"a": [None, [1.5, None]], "b": "x", "c": {"path": "o", "weights": [None]}}
    assert plain(value) == expected


def test_bytes_are_those_of_the_files(tmp_path):
    """Bytes to write are the sizes of all outputs together, to the byte."""
    paths = save(tmp_path, *({"w": torch.full((50,), float(n))} for n in range(2)))
    outputs = {str(tmp_path / "x.pt"): [1, 3], str(tmp_path / "y.pt"): [0, 1]}
    report = report_of(paths, outputs)
    assert report.bytes_to_write == sum(Path(path).stat().st_size for path in outputs)
    # Each input is read once, however many outputs there are; and a few records of the template.
    assert report.bytes_to_read == report.result.nbytes
    assert 400 <= report.bytes_to_read < 600
    assert [entry.nbytes for entry in report.inputs] == [path.stat().st_size for path in paths]


def test_a_template_that_is_not_averaged(tmp_path):
    """It comes first, has the weight 0 and no hash, and is not counted as averaged."""
    paths = save(tmp_path, *({"w": torch.full((5,), float(n))} for n in range(3)))
    report = report_of(paths[1:], tmp_path / "o.pt", template=paths[0])
    assert report.template == str(paths[0])
    assert [entry.averaged for entry in report.inputs] == [False, True, True]
    assert [entry.weight for entry in report.inputs] == [0, 0.5, 0.5]
    assert [entry.hash is None for entry in report.inputs] == [True, False, False]


def test_hashes_can_be_left_out(tmp_path):
    """Without hashes no input has one."""
    paths = save(tmp_path, *({"w": torch.full((5,), float(n))} for n in range(2)))
    report = report_of(paths, tmp_path / "o.pt", hashes=False)
    assert {entry.hash for entry in report.inputs} == {None}


def chosen(run, **criteria):
    """Plan the merge of chosen checkpoints of a run, and return the report."""
    choice = choose([run], run / "o.ckpt", Criteria(**criteria), Series(), Weighting())
    return describe(prepare(choice.paths, choice.outputs, Options()), None, choice)


def test_candidates_have_what_is_known_of_them(tmp_path):
    """Chosen inputs carry step, epoch and metric; candidates that are inputs carry a weight."""
    names = ["epoch=1-val_loss=0.5.ckpt", "epoch=2-val_loss=0.1.ckpt", "epoch=3-val_loss=0.3.ckpt"]
    states = ({"state_dict": {"w": noise(n, 3, 3)}, "global_step": n * 10} for n in range(3))
    save(tmp_path, *states, names=names)
    report = chosen(tmp_path, best=2, metric="val_loss")
    assert [(one.step, one.epoch, one.metric) for one in report.inputs] == [
        (10, 2, 0.1),
        (20, 3, 0.3),
    ]
    table = {one["path"]: one for one in as_json(report)["candidates"]}
    found = [table[str(tmp_path / name)] for name in names]
    assert [one.get("weight") for one in found] == [None, 0.5, 0.5]
    assert [one["chosen"] for one in found] == [False, True, True]
    assert "best is the lowest val_loss" in report.notes


def test_a_checkpoint_that_was_found_twice(tmp_path):
    """Where the same file is among the candidates twice, the chosen one has the weight."""
    states = ({"state_dict": {"w": noise(n, 3, 3)}, "epoch": n} for n in range(2))
    paths = save(tmp_path, *states, names=["epoch=0.ckpt", "epoch=1.ckpt"])
    arguments = [tmp_path, paths[1]]
    choice = choose(arguments, tmp_path / "o.ckpt", Criteria(last=2), Series(), Weighting())
    report = describe(prepare(choice.paths, choice.outputs, Options()), None, choice)
    assert [weight for one, weight in report.candidates if one.chosen] == [0.5, 0.5]


@pytest.mark.parametrize("excluded", [False, True])
def test_averaged_statistics_are_a_note(tmp_path, excluded):
    """Where running statistics are averaged a note says what to do; not where they are kept."""
    state = {"bn.running_mean": torch.ones(3), "bn.running_var": torch.ones(3), "w": torch.ones(3)}
    options = {"exclude": ["bn.*"]} if excluded else {}
    paths, out = save(tmp_path, state, state), tmp_path / "o.pt"
    notes = report_of(paths, out, **options).notes
    found = [note for note in notes if "2 BatchNorm statistics averaged" in note]
    assert len(found) == (not excluded)
    assert all("recalibrate_batch_norm" in note for note in found)
    assert not any("BatchNorm" in note for note in report_of(paths[:1], out).notes)


@pytest.mark.parametrize("same", [True, False])
def test_lora_factors(tmp_path, same):
    """Equal factors A are a note, others a warning."""
    a, b = "base_model.q.lora_A.weight", "base_model.q.lora_B.weight"
    states = ({a: noise(0 if same else n, 4, 8), b: noise(n + 9, 8, 4)} for n in range(2))
    report = report_of(save(tmp_path, *states), tmp_path / "o.pt", agreement=False)
    note = any("every LoRA factor A is the same" in text for text in report.notes)
    warning = any("LoRA" in text for text in report.warnings)
    assert (note, warning) == (same, not same)


def test_figures_are_rounded(tmp_path):
    """Cosines, errors and distances have six places; norms, which have a unit, are as they are."""
    report = report_of(relatives(tmp_path), tmp_path / "o.pt", base=tmp_path / "base.pt")
    found = as_json(report)["agreement"]
    for figures in (found, found["centred"]):
        values = [figures["mean"], figures["error"], figures["shrinkage"]]
        values += [value for row in figures["pairs"] for value in row]
        values += [value for tensor in figures["tensors"] for value in tensor["distances"]]
        assert values == [round(value, 6) for value in values]
    assert any(tensor["norm"] != round(tensor["norm"], 6) for tensor in found["tensors"])
    assert found["verdict"]["number"] == round(report.verdict.number, 6)
    assert report.base == found["base"] == str(tmp_path / "base.pt")


@pytest.mark.parametrize(("scale", "word"), [(1, "drifted"), (2, "strangers"), (0.3, "agree")])
def test_the_one_that_does_not_belong_is_named(tmp_path, scale, word):
    """Where all others agree that one is apart; how much of it the mean has makes the word."""
    states = [{"w": noise(0, 30, 30) + noise(n, 30, 30) / 9} for n in (1, 2, 3)]
    paths = save(tmp_path, *states, {"w": scale * noise(9, 30, 30)})
    report = report_of(paths, tmp_path / "o.pt")
    found = as_json(report)["agreement"]
    assert found["verdict"]["word"] == word
    assert found["odd"] == str(paths[3])
    texts = [str(path) for path in paths]
    assert found["verdict"]["groups"] == ([] if word == "agree" else [texts[:3], texts[3:]])
    assert len(report.warnings) == (word != "agree")
    for warning in report.warnings:
        assert warning.startswith(f"{word}: the checkpoints fall into groups")
        assert warning.endswith(f" | {texts[3]!r}); average without it")


def test_small_weights_are_judged_like_large_ones(tmp_path):
    """The figures that are judged are not rounded to nothing where weights have a small unit."""
    states = [{"w": 1e-9 * noise(n // 2, 30, 30) + 1e-10 * noise(n + 5, 30, 30)} for n in range(4)]
    report = report_of(save(tmp_path, *states), tmp_path / "o.pt")
    assert min(report.agreement.norms) > 0
    assert report.verdict == judge(report.agreement)


def test_the_verdict_of_a_run(tmp_path):
    """A merge that is measured has one, and its names are those of the inputs; a plan has none."""
    states = [{f"w{i}": noise(10 * n + i, 30, 30) for i in range(3)} for n in range(2)]
    paths = save(tmp_path, *states)
    found = as_json(report_of(paths, tmp_path / "o.pt"))["agreement"]
    assert found["verdict"]["word"] == "strangers"
    assert found["verdict"]["tensors"] == ["w0", "w1", "w2"]
    assert found["verdict"]["groups"] == []
    assert found["odd"] is None
    for options in ({"agreement": False}, {"dry_run": True}):
        report = report_of(paths, tmp_path / "o.pt", **options)
        assert report.verdict is None
        assert report.warnings == ()
