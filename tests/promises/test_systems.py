"""Merges on macOS and Windows, as far as Linux can be made to lack and refuse what they do."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import merge_avg
from tests.helpers import noise, save
from tests.promises import systems

SYSTEMS = ["macos", "windows"]
# Runs commands in one process, which takes no longer than the imports of one.
CHILD = """
import json, sys
from merge_avg.cli import main

codes = []
for words in json.load(sys.stdin):
    sys.argv = ["merge-avg", *words]
    try:
        main()
        codes.append(0)
    except SystemExit as stop:
        codes.append(stop.code or 0)
import sitecustomize
print(json.dumps([codes, sorted(set(sitecustomize.TAKEN))]))
"""


def surroundings(system, folder):
    """The environment of a process that finds what a system has."""
    folder.mkdir(exist_ok=True)
    shutil.copy(systems.__file__, folder / "sitecustomize.py")
    root = Path(merge_avg.__file__).parent.parent
    path = os.pathsep.join(map(str, (folder, root, Path(systems.__file__).parents[2])))
    return {**os.environ, "PYTHONPATH": path, "MERGE_AVG_TEST_SYSTEM": system}


def inputs(folder):
    """Three checkpoints of a kind each: files, deflated ones, and directories."""
    kinds = {"zip": ".pt", "plain": ".safetensors", "deflated": ".pt", "shards": ""}
    made = {kind: [folder / f"{kind}{n}{end}" for n in range(3)] for kind, end in kinds.items()}
    for n in range(3):
        state = {"a": noise(n, 300, 70), "b": noise(n + 9, 5).half(), "count": torch.tensor(7)}
        save(state, made["plain"][n])
        save({"model": state, "epoch": n}, made["zip"][n])
        with (
            zipfile.ZipFile(made["zip"][n]) as whole,
            zipfile.ZipFile(made["deflated"][n], "w", zipfile.ZIP_DEFLATED) as small,
        ):
            for name in whole.namelist():
                small.writestr(name, whole.read(name))
        made["shards"][n].mkdir()
        weights = {"a": "one.safetensors", "b": "two.safetensors", "count": "two.safetensors"}
        for file in set(weights.values()):
            held = {name: state[name] for name, place in weights.items() if place == file}
            save(held, made["shards"][n] / file)
        index = {"metadata": {}, "weight_map": weights}
        (made["shards"][n] / "model.safetensors.index.json").write_text(json.dumps(index))
    return made


def bytes_of(path):
    """All files at a path or below it."""
    files = [path] if path.is_file() else [one for one in path.rglob("*") if one.is_file()]
    return {one.relative_to(path).as_posix(): one.read_bytes() for one in files}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Checkpoints, and what their merges are here."""
    folder = tmp_path_factory.mktemp("made")
    kinds = inputs(folder)
    for kind, paths in kinds.items():
        merge_avg.merge_checkpoints(paths, folder / f"here-{kind}{paths[0].suffix}")
    return kinds


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_same_bytes_without_what_a_system_lacks(made, tmp_path, system):
    """Each kind is merged, replaced and verified, to the bytes that Linux gives."""
    folder = tmp_path / "out"
    folder.mkdir()
    outputs = {kind: folder / f"out-{kind}{paths[0].suffix}" for kind, paths in made.items()}
    outputs["shards"].mkdir()  # an empty one is filled
    commands, codes = [], []
    for kind, paths in made.items():
        merge = [*map(str, paths), "-o", str(outputs[kind]), "-q"]
        verify = ["verify", str(outputs[kind]), "--inputs", str(paths[0].parent), "-q"]
        commands += [merge, merge, [*merge, "--overwrite"], verify]
        codes += [0, 1, 0, 0]
    dead = folder / ".out-zip.pt.00000000-00000000.merge-avg-tmp"
    dead.touch()
    os.utime(dead, (0, 0))
    done = subprocess.run(
        [sys.executable, "-c", CHILD],
        input=json.dumps(commands),
        env=surroundings(system, tmp_path / "site"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found, taken = json.loads(done.stdout.splitlines()[-1])
    assert found == codes, done.stderr
    assert taken == [{"macos": "full", "windows": "locking"}[system]]
    for kind, path in outputs.items():
        here = made[kind][0].parent / f"here-{kind}{path.suffix}"
        assert bytes_of(path) == bytes_of(here), kind
    assert sorted(folder.iterdir()) == sorted(outputs.values())


STOPPED = """
import signal, time, weakref
from merge_avg import cli, plan

class Thing: pass

def bad(*_, **__):
    thing = Thing()
    ref = weakref.ref(thing, lambda _: signal.raise_signal(15))
    del thing  # what the callback raises is written off
    print("went on", flush=True)
    end = time.monotonic() + 30
    while time.monotonic() < end: pass

plan.prepare = bad
cli.main()
"""


def test_a_signal_that_is_lost_comes_again_without_alarms(made, tmp_path):
    """Where a system has no alarms, one whose exception was lost ends the command all the same."""
    command = [sys.executable, "-c", STOPPED, *made["plain"], "-o", tmp_path / "out.safetensors"]
    env = surroundings("windows", tmp_path / "site")
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (143, "went on\n")
    assert done.stderr == "stopped; each output is as it was, or complete\n"


# What the test below leaves out: tests that patch or count on what only Linux has.
LINUX = (
    "in_memory_comes_there or only_a_hint or is_asked_for or order_budget_and_threads or "
    "terminal_shows or killed_soup_left or ignored_signal or handlers_are_as_before"
)


@pytest.mark.large
@pytest.mark.parametrize("system", SYSTEMS)
def test_other_tests_hold_without_what_a_system_lacks(tmp_path, system):
    """Tests of formats, plans, merges, soups, verification and signals pass there as well."""
    packages = (
        "engine formats plan selection soup test_api.py test_signals.py test_verify.py "
        "cli/test_process.py"
    )
    places = [Path(systems.__file__).parents[1] / one for one in packages.split()]
    options = "-q", "-p", "no:cacheprovider", f"--basetemp={tmp_path / 'base'}"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "-k", f"not ({LINUX})", *map(str, places)],
        env=surroundings(system, tmp_path / "site"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:]
