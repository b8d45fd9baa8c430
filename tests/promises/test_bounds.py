"""Texts that a checkpoint brings cost little: 256 MiB of address space beside the interpreter."""

import json
import os
import re
import subprocess
import sys
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from tests.helpers import quick

# Everything that a merge without torch imports is there before the limit is set.
LIMITED = """
import resource, sys
import merge_avg.cli._app, merge_avg.cli._merge, merge_avg.verify, merge_avg.formats.zip
import merge_avg.formats.directory, merge_avg.formats.safetensors, merge_avg.report.inspect
import merge_avg.report.values, safetensors, numpy
from merge_avg.cli import main
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + (256 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
main()
"""


def run(folder, *arguments):
    """Run the command within the limit; return its exit code and what it says."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *arguments, "--threads=1"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "MALLOC_ARENA_MAX": "2"},
    )
    assert not re.search("(not enough|takes more) memory", done.stderr), done.stderr
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr


def refused(folder, *arguments):
    """Assert that the command ends with an error in one line, and return that."""
    code, err = run(folder, *arguments)
    found = [line for line in err.splitlines() if line.startswith("error:")]
    assert code in (1, 2), err
    assert len(found) == 1, err
    assert len(found[0]) < 1000
    return found[0]


def directory(folder, name, value=1.0):
    """Write a checkpoint of two files, and return its folder."""
    path = folder / name
    path.mkdir()
    save_file({"w": torch.full((4, 4), value)}, path / "model.safetensors")
    (path / "config.json").write_text("{}")
    return path


@pytest.mark.parametrize(
    "name", ["config.json", "adapter_config.json", "model.safetensors.index.json"]
)
@pytest.mark.parametrize("nbytes", [6 << 30, 40 << 20])
def test_a_huge_text_is_not_read(tmp_path, name, nbytes):
    """A sparse file of gigabytes takes no memory, whichever text it stands for."""
    for n in range(2):
        with (directory(tmp_path, f"c{n}") / name).open("ab") as file:
            file.truncate(nbytes + n)
    assert "longer than" in refused(tmp_path, "c0", "c1", "-o", "o", "--dry-run")


def test_a_huge_state_is_passed_over(tmp_path):
    """A Trainer's state of gigabytes, or of very many values, keeps nobody from averaging."""
    for n, text in enumerate((b" ", b'{"log_history":[' + b"{}," * 9_000_000 + b"{}]}")):
        path = directory(tmp_path, f"checkpoint-{n + 1}") / "trainer_state.json"
        path.write_bytes(text)
        if not n:
            os.truncate(path, 6 << 30)
    code, err = run(tmp_path, ".", "-o", "o", "--last", "2", "--dry-run")
    assert code == 0, err


def test_a_huge_latest_is_not_read(tmp_path):
    """A file `latest` of gigabytes is not read: it holds no name."""
    for n in range(2):
        directory(tmp_path, f"global_step{n}")
    with (tmp_path / "latest").open("wb") as file:
        file.truncate(6 << 30)
    assert "it holds 2 checkpoints" in refused(tmp_path, ".", ".", "-o", "o")


INDICES = {
    "many": b'{"weight_map":{' + b",".join(b'"%d":"a"' % n for n in range(2_000_000)) + b"}}",
    "deep": b'{"weight_map":' + b'{"a":' * 3_000_000,
    "lists": b'{"weight_map":[' + b"[]," * 8_000_000 + b"[]]}",
    "wide": ('{"weight_map":"' + "\u20ac" * 10_000_000 + '"}').encode(),
    "digits": b'{"weight_map":' + b"9" * 30_000_000 + b"}",
}


@pytest.mark.parametrize("kind", quick(INDICES, next(iter(INDICES))))
def test_an_index_is_read_within_bounds(tmp_path, kind):
    """An index of very many or very deep values is refused as damaged."""
    (directory(tmp_path, "c") / "model.safetensors.index.json").write_bytes(INDICES[kind])
    refused(tmp_path, "c", "c", "-o", "o")


LOGS = {
    "long": lambda: b"step,loss\n" + b"1,1\n" * 10_000_000,
    "rows": lambda: b"step,loss\n" + b"1,1\n" * 6_000_000,
    "columns": lambda: b"a," * 1_000_000 + b"\n" + b"1\n" * 1_000_000,
    "objects": lambda: b"[" + b"{}," * 9_000_000 + b"{}]",
    "cells": lambda: b"[" + b'{"step":1},' * 900_000 + b"{}]",
}


@pytest.mark.parametrize("kind", quick(LOGS, "rows"))
def test_a_log_is_read_within_bounds(tmp_path, kind):
    """A log of metrics of very many rows, columns or values is refused."""
    for n in range(2):
        directory(tmp_path, f"checkpoint-{n + 1}")
    (tmp_path / "log").write_bytes(LOGS[kind]())
    refused(tmp_path, ".", "-o", "o", "--metrics", "log", "--best", "1", "--metric", "loss")


def recorded(path, text):
    """Write a checkpoint whose record of provenance is a text, deflated."""
    torch.save({"w": torch.ones(4, 4)}, path)
    with zipfile.ZipFile(path) as archive:
        names = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in names:
            archive.writestr(name, data)
        root = names[0][0].split("/")[0]
        archive.writestr(f"{root}/merge_avg.json", text, zipfile.ZIP_DEFLATED)


def made_of(folder, weights, **values):
    """Return the record of an output of one input, named as often as there are weights."""
    torch.save({"w": torch.ones(4, 4)}, folder / "in.pt")
    one = {"name": "in.pt", "bytes": (folder / "in.pt").stat().st_size, "hash": None}
    options = {"normalize": True, "missing": "error", "int_policy": "error", "state_dict": False}
    options |= dict.fromkeys(("dtype", "key", "max_shard_size", "agreement"))
    options |= {"allow_nonfinite": False, "include": [], "exclude": []}
    inputs = [one | {"weight": weight} for weight in weights]
    made = {"merge_avg": "0.1.0", "inputs": inputs, "template": one}
    return json.dumps(made | options | values).encode()


RECORDS = {
    "lists": lambda folder: b"[" + b"[]," * 5_000_000 + b"[]]",
    "objects": lambda folder: b'{"inputs":[' + b"{}," * 5_000_000 + b"{}]}",
    "denominators": lambda folder: made_of(folder, [f"1/{10**97 + n}" for n in range(10_000)]),
    "long weights": lambda folder: made_of(folder, [f"{'9' * 4200}/{'7' * 4200}"] * 1000),
    "inputs": lambda folder: made_of(folder, ["1/10000"] * 10_000),
    "pairs": lambda folder: made_of(folder, ["1/10000"] * 10_000, agreement="+0.500000"),
    "names": lambda folder: made_of(folder, ["1/1"], include=["b"] * 2_000_000),
    "patterns": lambda folder: made_of(
        folder, ["1/1"], exclude=[f"*a*b*{n}" for n in range(500_000)]
    ),
    "digits": lambda folder: b'{"inputs":' + b"9" * 16_000_000 + b"}",
}


@pytest.mark.parametrize("kind", quick(RECORDS, "digits", "lists"))
def test_a_record_is_read_within_bounds(tmp_path, kind):
    """A record that asks for very much is refused, and costs little where it is only shown."""
    recorded(tmp_path / "o.pt", RECORDS[kind](tmp_path))
    refused(tmp_path, "--verify", "o.pt")
    assert run(tmp_path, "--inspect", "o.pt")[0] == 0


def test_escapes_are_counted_in_a_header(tmp_path):
    """A record in the metadata of safetensors, written in escapes, is no way around the bounds."""
    text = b"\\u005b" + b"\\u005b]\\u002c" * 5_000_000 + b"1]"
    header = b'{"__metadata__":{"merge_avg":"%b"},' % text
    header += b'"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    data = len(header).to_bytes(8, "little") + header + bytes(4)
    (tmp_path / "o.safetensors").write_bytes(data)
    refused(tmp_path, "--verify", "o.safetensors")
    refused(tmp_path, "--inspect", "o.safetensors")
