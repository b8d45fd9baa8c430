"""The JSON of every command: what the schema in .github/ describes, and nothing else."""

import copy
import json
import math
import re
import signal
from pathlib import Path

import jsonschema
import pytest
import torch

from merge_avg import __version__
from merge_avg.cli import _process
from tests.helpers import noise

HOME = Path(__file__).parents[2] / ".github"
SCHEMA = json.loads((HOME / "merge-avg.schema.json").read_text())
PAGE = (HOME / "JSON.md").read_text()
FAILED = ["error", "hint", "file", "tensor", "exit_code"]
SOUP = ["--eval", "sh -c 'echo 1'", "--mode", "max"]


def objects(schema):
    """Yield every part of a schema that describes the keys of an object."""
    if isinstance(schema, dict):
        if "properties" in schema:
            yield schema
        for one in schema.values():
            yield from objects(one)
    elif isinstance(schema, list):
        for one in schema:
            yield from objects(one)


def closed(kind):
    """Return a validator of one kind of object, which refuses keys that are not described."""
    whole = {"$ref": f"#/$defs/{kind}", "$defs": copy.deepcopy(SCHEMA["$defs"])}
    for one in objects(whole):
        one["additionalProperties"] = False
    return jsonschema.Draft202012Validator(whole)


def strict(text):
    """Parse JSON that has neither NaN nor infinity."""

    def refuse(word):
        raise AssertionError(word)

    return json.loads(text, parse_constant=refuse)


def checked(text, kind):
    """Return what a command printed, after making sure that it is of a kind, or a list of it."""
    value = strict(text)
    jsonschema.Draft202012Validator(SCHEMA).validate(value)
    for one in value if isinstance(value, list) else [value]:
        closed(kind).validate(one)
        assert list(one)[:2] == ["merge_avg", "schema"]
        assert (one["merge_avg"], one["schema"]) == (__version__, 1)
    return value


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Write a run of three checkpoints with all that a report can tell of, and a base beside it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    base = noise(9, 8, 8)
    torch.save({"state_dict": {"w": base, "n": torch.tensor(0)}}, "base.pt")
    for k in range(3):
        tensors = {"w": base + noise(k, 8, 8) / 9, "bn.running_mean": noise(k, 8)}
        tensors |= {"n": torch.tensor(k)} | ({} if k == 1 else {"only": torch.ones(2)})
        about = {"epoch": k, "global_step": 10 * k, "val_loss": math.inf if k == 2 else float(k)}
        entries = {"optimizer": {"m": torch.ones(3)}, "hyper": "x"}
        torch.save(about | entries | {"state_dict": tensors}, f"run/epoch={k}-step={10 * k}.ckpt")
    return [f"run/epoch={k}-step={10 * k}.ckpt" for k in range(3)]


def test_the_schema_is_one():
    """It is a schema of draft 2020-12, by the same version as what is printed."""
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["$schema"].endswith("2020-12/schema")
    versions = [one["properties"].get("schema") for one in objects(SCHEMA)]
    assert {one["const"] for one in versions if one} == {_process._SCHEMA}


def test_a_key_that_is_not_described_is_seen(run, command):
    """The checks of this file fail for one key more or less, at any depth."""
    found = strict(command("inspect", run[0], "--json")[1])[0]
    validator = closed("inspected")
    assert validator.is_valid(found)
    assert not validator.is_valid(found | {"colour": 1})
    for lost in ("tensors", "schema"):
        assert not validator.is_valid({key: found[key] for key in found if key != lost})
    found["tensors"][0]["colour"] = 1
    assert not validator.is_valid(found)


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
@pytest.mark.parametrize(
    "options",
    [
        ["--missing", "available", "--base", "base.pt"],
        ["--missing", "skip", "--leave-one-out"],
        ["--best", "2", "--metric", "val_loss", "--missing", "skip", "--no-agreement"],
        ["--include", "w", "--weights", "1,2,3", "--no-normalize", "--no-hashes"],
    ],
)
def test_a_merge(run, command, options, dry):
    """A merge and its plan, of a run or named, with one output or several, are as described."""
    given = run if "--weights" in options else ["run"]
    output = "o-{name}.ckpt" if "--leave-one-out" in options else "o.ckpt"
    code, out, err = command(*given, "-o", output, *options, *dry, "--json")
    assert code == 0, err
    found = checked(out, "merge")
    assert found["dry_run"] is bool(dry)
    assert not {"error", "exit_code"} & found.keys()
    assert ("agreement" in found) is not bool(dry)
    if "--base" in options and not dry:
        assert found["agreement"]["centred"]["tensors"][0]["name"]
        assert found["available"]
    if "--best" in options:
        assert [one["metric"] for one in found["candidates"]] == [0, 1, None]


def test_parts_and_their_shares(run, command):
    """A part that does not finish, and what each part would read, are as described."""
    options = ["-o", "o.ckpt", "--missing", "skip", "--json"]
    code, out, err = command(*run, *options, "--part", "1/9", "--dry-run")
    assert code == 0, err
    assert len(checked(out, "merge")["shares"]) == 9
    code, out, err = command(*run, *options, "--part", "9/9")
    assert code == 0, err
    found = checked(out, "merge")
    assert found["part"]["number"] == 9
    assert found["agreement"] is None
    code, out, err = command(*run, *options, "--resume")
    assert code == 0, err
    assert "part" not in checked(out, "merge")


def test_a_soup_a_verification_and_contents(run, command):
    """What the other commands print is as described, an object for each checkpoint named."""
    code, out, err = command("soup", *run, "-o", "s.ckpt", "--missing", "skip", *SOUP, "--json")
    assert code == 0, err
    assert checked(out, "soup")["score"] == 1
    code, out, err = command("verify", "s.ckpt", "s.ckpt", "--inputs", "run", "--json")
    assert code == 0, err
    assert [one["output"] for one in checked(out, "verified")] == ["s.ckpt"] * 2
    tied = torch.ones(4)
    ties = {"a": tied, "b": tied, "t": torch.eye(2).to_sparse(), "n": torch.tensor(1)}
    torch.save({"state_dict": ties}, "tied.pt")
    code, out, err = command("inspect", run[2], "tied.pt", "--json")
    assert code == 0, err
    first, second = checked(out, "inspected")
    assert first["metrics"] == {"val_loss": None}
    assert {key for one in second["tensors"] for key in one} >= {"tie", "trouble"}


@pytest.mark.parametrize(
    ("arguments", "code", "file", "tensor"),
    [
        (["run", "-o", "o.ckpt"], 1, "run/epoch=1-step=10.ckpt", "state_dict.only"),
        (["verify", "base.pt"], 1, "base.pt", None),
        (["inspect", "lost.pt"], 1, "lost.pt", None),
        (["soup", "run", "-o", "s.ckpt", *SOUP, "--exclude", "*"], 1, None, None),
        (["run", "-o", "o.ckpt", "--wieghts", "1"], 2, None, None),
        (["inspect"], 2, None, None),
        (["verify", "base.pt", "--key", "x"], 2, None, None),
        (["soup", "run", "-o", "s.ckpt"], 2, None, None),
        (["run", "-o", "o.ckpt", "--max-memory", "big"], 2, None, None),
        (["run"], 2, None, None),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_a_failure(run, command, arguments, code, file, tensor, first):
    """A refusal or wrong usage is one object, wherever --json stands; stderr says the same."""
    words = [*arguments[:1], "--json", *arguments[1:]] if first else [*arguments, "--json"]
    found, out, err = command(*words)
    assert found == code, err
    value = checked(out, "failure")
    assert list(value)[2:] == FAILED
    assert value["exit_code"] == code
    lines = [f"error: {value['error']}"]
    lines += [f"hint: {value['hint']}"] if value["hint"] else []
    assert err.splitlines() == lines
    assert tensor == value["tensor"]
    assert file is None or (value["file"], value["error"].startswith(file)) == (file, True)


def test_an_option_behind_the_end_of_options_is_a_checkpoint(run, command):
    """After -- and in a longer word --json asks for nothing."""
    for words in (["-o", "o.pt", "--", "lost.pt", "--json"], ["lost.pt", "-o", "o --json"]):
        assert command(*words)[:2] == (1, "")
    assert checked(command("lost.pt", "-o", "o", "--json", "--", "b.pt")[1], "failure")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (lambda: signal.raise_signal(signal.SIGTERM), 143),
        (lambda: signal.raise_signal(signal.SIGINT), 130),
        (lambda: signal.raise_signal(signal.SIGHUP), 129),
        (lambda: bytearray(1 << 62), 1),
        (lambda: Path("lost.pt").stat(), 1),
    ],
)
def test_what_the_system_says(run, command, monkeypatch, error, code):
    """Signals, a lack of memory and an error of the system are one object too."""
    monkeypatch.setattr("merge_avg.cli._merge.prepare", lambda *_, **__: error())
    monkeypatch.setattr(signal, "getsignal", lambda _: signal.default_int_handler)
    found, out, err = command(*run, "-o", "o.ckpt", "--json")
    value = checked(out, "failure")
    assert (found, value["exit_code"]) == (code, code)
    assert value["error"] in err
    assert (code == 1) is err.startswith("error: ")


def test_what_fails_after_the_merge_is_a_part_of_its_result(run, command, monkeypatch):
    """Exit code 3 has one object as well: the result, and what was not written."""
    pytest.importorskip("matplotlib")

    def came_meanwhile(report):
        Path("r.html").write_text("theirs")
        return "page"

    monkeypatch.setattr("merge_avg.report.html.page", came_meanwhile)
    options = ["-o", "o.ckpt", "--missing", "skip", "--report", "r.html", "--json"]
    code, out, _ = command(*run, *options)
    value = checked(out, "merge")
    assert (code, value["exit_code"], value["output"]) == (3, 3, "o.ckpt")
    assert (value["file"], value["tensor"]) == ("r.html", None)
    assert value["error"].endswith("the average itself was written")


def test_a_signal_after_the_result_adds_nothing(run, command, monkeypatch):
    """Stdout has one object, whenever the command is interrupted."""
    printed = _process.print_result

    def interrupted(*given):
        printed(*given)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("merge_avg.cli._app.print_result", interrupted)
    code, out, _ = command("inspect", run[0], "--json")
    assert (code, len(checked(out, "inspected"))) == (143, 1)


HOSTILE = {
    "NaN": math.nan,
    "infinity": math.inf,
    "minus infinity": -math.inf,
    "no float": 10**400,
    "no text": 10**5000,
    "nearly infinite": 1e308,
}


@pytest.mark.parametrize("value", HOSTILE.values(), ids=HOSTILE)
def test_numbers_that_json_lacks(run, command, value):
    """Metrics and steps of any value, scores without bound and tensors of NaN are valid JSON."""
    for path in run:
        content = torch.load(path)
        content |= {"val_loss": value, "metrics": {"m": value}, "step": value, "\x1b##[x": value}
        content["state_dict"]["w"] = torch.tensor([[3e38, math.nan, 1.0], [math.inf, 2.0, -3e38]])
        torch.save(content, path)
    checked(command("inspect", *run, "--json")[1], "inspected")
    options = ["-o", "o.ckpt", "--missing", "skip", "--allow-nonfinite", "--json"]
    code, out, err = command(*run, *options)
    assert (code, checked(out, "merge")["nonfinite"]) == (0, ["state_dict.w"]), err
    best = ["--best", "2", "--metric", "val_loss", "--dry-run", "--overwrite"]
    code, out, err = command("run", *options, *best)
    checked(out, "failure" if code else "merge")


@pytest.mark.parametrize("score", ["inf", "-inf", "1e999", "nan"])
def test_scores_without_bound(run, command, score):
    """An infinite score is null in the JSON; one that is not a number is a failure."""
    evaluation = ["--eval", f"sh -c 'echo {score}'", "--mode", "max"]
    options = ["-o", "s.ckpt", "--missing", "skip", *evaluation, "--json"]
    code, out, _ = command("soup", *run, *options)
    if score == "nan":
        assert (code, checked(out, "failure")["file"]) == (1, run[0])
    else:
        found = checked(out, "soup")
        assert (code, found["score"], found["singles"][0]["score"]) == (0, None, None)


def test_every_key_is_explained():
    """The page names each key and each exit code that the schema has."""
    words = set(re.findall(r"`\.?(?:\w+\.)*(\w+)`", PAGE))
    keys = {key for one in objects(SCHEMA) for key in one["properties"]}
    common = {"path", "bytes", "mean", "error", "elements", "size", "tensors", "shape", "name"}
    policies = set(SCHEMA["$defs"]["merge"]["properties"]["policies"]["properties"])
    counts = {"integers"}
    assert keys - words - common - policies - counts == set()
    for code in SCHEMA["$defs"]["failure"]["properties"]["exit_code"]["enum"]:
        assert re.search(rf"^\|[\d ,]*\b{code}\b", PAGE, re.MULTILINE)
