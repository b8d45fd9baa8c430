"""Numbers and texts from outside are checked before they are used: options, records, files."""

import json
import os
import struct
import sys

import pytest
import torch
from safetensors.torch import save_file

from merge_avg.cli._parameters import Action, Display, SoupOptions
from merge_avg.options import Criteria, Options, Series, Weighting, meanings
from tests.helpers import merge_checkpoints, quick

# The byte ff is no text in UTF-8: in an argument, Python has a lone surrogate in its place.
TEXTS = {
    "empty": "",
    "space": " ",
    "nan": "nan",
    "inf": "-inf",
    "negative": "-1",
    "zero": "0",
    "large": "1e400",
    "tiny": "1e-9999999",
    "digits": "9" * 400,
    "too many digits": "9" * 5000,
    "zero below": "0.5/0",
    "other digits": "\u0663",
    "no digit": "\u00b2",
    "underscore": "1_0",
    "bracket": "[",
    "lines": "a\n\x1b[31mb",
    "surrogate": os.fsdecode(b"\xff"),
    "colons": "::::",
    "commas": ",,,",
    "scheme": "ema:1e-9999999",
    "powers": "ema:0.99999999999999999",
    "device": "cuda:99999999999999999999",
    "size": "9" * 400 + "GiB",
    "range": "9" * 400 + ":" + "9" * 5000,
}
NUMBERS = {
    "nan": "NaN",
    "inf": "-Infinity",
    "negative": "-1",
    "large": "1e400",
    "digits": "9" * 400,
    "too many digits": "9" * 5000,
    "half": "0.5",
    "text": '"1"',
    "surrogate": r'"\ud800"',
    "empty": '""',
    "null": "null",
    "list": "[[]]",
    "object": '{"":{}}',
    "true": "true",
}


def spellings():
    """The options of the command that take a value."""
    for cls in (Action, Criteria, Display, Options, Series, SoupOptions, Weighting):
        for name, meaning in meanings(cls):
            default = cls.__dataclass_fields__[name].default
            if meaning.command and not isinstance(default, bool):
                yield (meaning.names or [f"--{name.replace('_', '-')}"])[0]


def told(code, err):
    """Assert that a run ended by itself, and that an error is one line, with a hint at most."""
    assert code in (0, 1, 2), err
    lines = err.splitlines()
    errors = [k for k, line in enumerate(lines) if line.startswith(("error:", "Error"))]
    assert len(errors) <= 1, err
    assert "not enough memory" not in err
    if code == 1:
        assert [line.partition(":")[0] for line in lines[errors[0] :]] in (
            ["error"],
            ["error", "hint"],
        )


@pytest.fixture
def run_of_three(tmp_path):
    """Write a run of three checkpoints, and return its folder."""
    for step in (10, 20, 30):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        save_file({"w": torch.full((4, 4), float(step))}, folder / "model.safetensors")
    return tmp_path / "run"


@pytest.mark.parametrize("option", [*spellings()])
def test_every_option_checks_its_text(command, run_of_three, monkeypatch, option):
    """No text that an option may be given ends in anything but a result or an error in a line."""
    monkeypatch.setattr(sys, "stdin", None)
    for number, text in enumerate(TEXTS.values()):
        code, _, err = command(
            run_of_three, "-o", f"o{number}", "--dry-run", *SOUP.get(option, ()), f"{option}={text}"
        )
        told(code, err)


SOUP = {
    "--soup": ["--eval=echo 1", "--mode=max"],
    "--eval": ["--soup=greedy", "--mode=max"],
    "--eval-json": ["--soup=greedy", "--mode=max", "--eval=echo 1"],
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_every_argument_is_checked(command, run_of_three, text):
    """Paths of inputs and outputs of any text end in a result or an error in a line."""
    for arguments in ([text, "-o", "o"], [run_of_three, "-o", text], ["--inspect", "--", text]):
        code, _, err = command("--quiet", *arguments)
        told(code, err)


@pytest.mark.parametrize("number", NUMBERS.values(), ids=NUMBERS)
@pytest.mark.parametrize("entry", ["global_step", "epoch", "log_history", "row", "metric"])
def test_a_trainers_state_may_hold_anything(command, run_of_three, entry, number):
    """A state that makes no sense keeps nobody from averaging, and is printed as strict JSON."""
    state = {"row": '"log_history": [%s]', "metric": '"log_history": [{"step": 10, "eval_x": %s}]'}
    text = state.get(entry, f'"{entry}": %s') % number
    (run_of_three / "checkpoint-10/trainer_state.json").write_text("{" + text + "}")
    code, out, err = command(run_of_three, "-o", "o", "--last", "2", "--json")
    assert (code, json.loads(out, parse_constant=pytest.fail)["dry_run"]) == (0, False), err
    code, out, err = command("--inspect", "--json", run_of_three / "checkpoint-10")
    assert code == 0, err
    json.loads(out, parse_constant=pytest.fail)


@pytest.mark.parametrize("number", NUMBERS.values(), ids=NUMBERS)
def test_a_log_may_hold_anything(command, run_of_three, number):
    """Cells of a log that make no sense are an error in a line, or no metric."""
    rows = f'[{{"step": 10, "loss": {number}}}, {{"step": {number}, "loss": 1}}, {number}]'
    (run_of_three.parent / "log.json").write_text(rows)
    (run_of_three.parent / "log.csv").write_text(f"step,loss\n10,{number}\n{number},1\n{number}\n")
    for log in ("log.json", "log.csv"):
        code, out, err = command(
            run_of_three, "-o", "o", "--overwrite", "--metrics", log, "--best", "1", "--json"
        )
        told(code, err)
        if code == 0:
            json.loads(out, parse_constant=pytest.fail)


def entries(value, path=()):
    """The places in a record: of each object's entries, and of the first of each list."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value[:1])
    for key, inner in pairs:
        yield (*path, key)
        if isinstance(inner, dict | list):
            yield from entries(inner, (*path, key))


@pytest.mark.parametrize("name", quick(NUMBERS, "nan", "digits", "surrogate"))
def test_a_record_may_hold_anything(command, tmp_path, name):
    """Whatever a provenance record has in whichever place, to verify it ends in a line."""
    number = NUMBERS[name]
    for n in range(2):
        save_file({"w": torch.full((4, 4), float(n))}, tmp_path / f"{n}.safetensors")
    paths = [tmp_path / f"{n}.safetensors" for n in range(2)]
    merge_checkpoints(paths, tmp_path / "o.safetensors", include=["w"])
    raw = (tmp_path / "o.safetensors").read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    record = json.loads(header["__metadata__"]["merge_avg"])
    places = list(entries(record))
    assert len(places) > 20
    for place in places:
        changed = json.loads(header["__metadata__"]["merge_avg"])
        inner = changed
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = "<here>"
        header["__metadata__"]["merge_avg"] = json.dumps(changed).replace('"<here>"', number)
        text = json.dumps(header).encode()
        header["__metadata__"]["merge_avg"] = json.dumps(record)
        (tmp_path / "o.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + raw[start:])
        for arguments in (
            ["--verify"],
            ["--inspect", "--json"],
            ["-o", "p.safetensors", "--overwrite"],
        ):
            code, _, err = command("o.safetensors", *arguments)
            told(code, err)


@pytest.mark.parametrize("name", quick(NUMBERS, "nan", "digits", "surrogate"))
def test_an_index_and_a_header_may_hold_anything(command, tmp_path, name):
    """Metadata, names and files that make no sense are carried on, or an error in a line."""
    number = NUMBERS[name]
    folder = tmp_path / "c"
    folder.mkdir()
    save_file({"w": torch.ones(4, 4)}, folder / "model-00001-of-00001.safetensors")
    index = folder / "model.safetensors.index.json"
    for text in (
        '{"weight_map": %s}',
        '{"weight_map": {"w": %s}}',
        '{"metadata": %s, "weight_map": {}}',
    ):
        index.write_text(text % number)
        for more in ([], ["--dtype", "float16"]):
            told(*command("c", "-o", "d", "--overwrite", *more)[::2])
    entry = '"w":{"dtype":"F32","shape":[16],"data_offsets":[0,64]}'
    for header in (
        f'{{"__metadata__":{number},{entry}}}',
        f'{{"__metadata__":{{"a":{number}}},{entry}}}',
        f'{{"w":{{"dtype":{number},"shape":[16],"data_offsets":[0,64]}}}}',
        f'{{"w":{{"dtype":"F32","shape":[{number}],"data_offsets":[0,64]}}}}',
        f'{{"w":{{"dtype":"F32","shape":[16],"data_offsets":[0,{number}]}}}}',
        f'{{{number}:{{"dtype":"F32","shape":[16],"data_offsets":[0,64]}}}}',
    ):
        raw = header.encode()
        (tmp_path / "s.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(64))
        for output in ("o.safetensors", "o.pt"):
            told(*command("s.safetensors", "-o", output, "--overwrite")[::2])


@pytest.mark.parametrize(
    "name", ["a\udcff", "9" * 200, "epoch=nan", "step=1e300", "x=-inf-loss=1e999"]
)
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_name_may_be_anything(command, tmp_path, monkeypatch, name, suffix):
    """Files of any name are averaged, shown, chosen and verified; pages and logs hold the name."""
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "page.md"))
    for n in range(3):
        state = {"w": torch.full((4, 4), float(n)) + torch.eye(4)}
        path = tmp_path / "run" / f"{name}-{n}.{suffix}"
        path.parent.mkdir(exist_ok=True)
        torch.save(state, path) if suffix == "pt" else save_file(state, tmp_path / "x")
        if suffix != "pt":
            os.rename(tmp_path / "x", path)
    out = f"{name}.{suffix}"
    for arguments in (
        ["run", "-o", out, "--report", "r.html", "--json"],
        ["run", "-o", "{name}" + out, "--leave-one-out"],
        ["run", "-o", f"s{out}", "--soup", "greedy", "--eval", "echo 1", "--mode", "max", "--json"],
        ["run", "-o", f"l{out}", "--last", "1"],
        ["--verify", out, "--inputs", "run", "--json"],
        ["--inspect", f"run/{name}-1.{suffix}", "--json"],
    ):
        told(*command(*arguments)[::2])
