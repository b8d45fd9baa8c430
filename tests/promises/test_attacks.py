"""Files that lie are refused with one error or read right, in little memory and time."""

import contextlib
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from merge_avg import MergeError
from merge_avg.checkpoint import PROVENANCE
from merge_avg.formats import scan
from merge_avg.formats.pickle.load import load
from merge_avg.formats.pickle.values import PickleError
from tests.helpers import merge_checkpoints
from tests.promises import attacks
from tests.promises.attacks import ATTACKS, DATA, LARGE, archive, made, record, state

ROOT = Path(__file__).parents[2]
FOUND = sorted((ROOT / "tests" / "data" / "attacks").glob("*"))
# Files whose lie does not matter to what is read: the output is right.
RIGHT = {
    "directory_inside_itself",
    "dcp_many_files",
    "dcp_planner",
    "dcp_planner_number",
    "dcp_right",
    "safetensors_name_regex",
    "zip_bomb_mark",
    "zip_up_name",
    *(
        f"{kind}_pickle_{name}"
        for kind in ("zip", "legacy")
        for name in (
            "frame_short",
            "key_nan",
            "key_number",
            "key_object",
            "name_long",
            "name_regex",
            "surrogate",
        )
    ),
}
LATE = {"zip_deflate_followed"}  # found only when the weights are read
# Pickles that are read, except for a tensor that cannot be averaged.
UNUSUAL = {f"{kind}_pickle_subclass_bomb" for kind in ("zip", "legacy")}
SLOW = LARGE | {name for name in ATTACKS if "pickle" in name and not name.startswith("zip")}


def named(names, slow=SLOW):
    return [pytest.param(name, marks=pytest.mark.large if name in slow else ()) for name in names]


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """Write a file of each format, and one of none.

    Children read these first, to have everything imported before memory is limited: imports would
    count as memory and as files that are opened.
    """
    folder = tmp_path_factory.mktemp("right")
    contents = {
        "zip": archive(record("a/data.pkl", state()), DATA),
        "legacy": attacks.legacy(state()),
        "safetensors": attacks.safetensors({"a": attacks.entry()}),
        "stranger": b"hello",
    }
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    ATTACKS["dcp_right"](folder / "dcp")
    paths = sorted(folder.iterdir())
    write_output_of(folder / "zip")
    return paths


@pytest.fixture(scope="module")
def child(first):
    """Read a path in a process with 256 MiB of memory, and return how that went."""
    with asked("read", *first) as read:
        yield read


@pytest.fixture(scope="module")
def verifier(first):
    """Verify a path, and an output that names it as an input, with 256 MiB beside torch."""
    with asked("verify", *first) as verify:
        yield verify


def write_output_of(path):
    """Write an output beside a checkpoint that names the checkpoint as an input of its size."""
    out = path.with_name("out.safetensors")
    save_file({"w": torch.ones(4)}, path.with_name("other.safetensors"))
    merge_checkpoints([path.with_name("other.safetensors")] * 2, out)
    said = json.loads(dict(scan(out).metadata)[PROVENANCE])
    try:
        nbytes = scan(path).nbytes if path.is_dir() else path.stat().st_size
    except MergeError:
        nbytes = 0
    said["inputs"][1] |= {"name": path.name, "bytes": nbytes}
    save_file({"w": torch.ones(4)}, out, {PROVENANCE: json.dumps(said)})


@contextlib.contextmanager
def asked(*arguments):
    """Start a process that reads checkpoints in children of its own."""
    command = [sys.executable, "-m", "tests.promises.attack_child", *map(str, arguments)]
    # glibc sets aside 64 or 128 MiB of address space for each thread that finds its lock taken: so
    # much of the limit was left to chance.
    env = os.environ | {"MALLOC_ARENA_MAX": "1"}
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True, env=env
    ) as process:

        def read(path):
            print(path, file=process.stdin, flush=True)
            return json.loads(process.stdout.readline())

        yield read
        process.stdin.close()


def check(found):
    """Assert that reading ended in a result or one error, and did nothing else."""
    assert found["outcome"] in ("right", "refused"), found["outcome"]
    assert found["events"] == []
    assert found["code"] in (0, 1), found["code"]
    assert "Traceback" not in found["stderr"]
    assert "more memory than this process" not in found.get("message", "")
    if found["code"]:
        first, *hints = found["stderr"].rstrip("\n").split("\n")
        assert first.startswith("error: ")
        assert not hints or (len(hints) == 1 and hints[0].startswith("hint: "))


@pytest.mark.parametrize("name", named(ATTACKS))
def test_an_attack_is_refused_or_read_right(child, tmp_path, name):
    """An attack ends in one error or a result within 256 MiB and seconds, whoever reads it."""
    path = tmp_path / "a.pt"
    ATTACKS[name](path)
    found = child(path)
    check(found)
    assert found["outcome"] == ("right" if name in RIGHT | UNUSUAL | LATE else "refused")
    assert found["code"] == (0 if name in RIGHT | LATE else 1)
    assert not (tmp_path / "a.pt.out.pt").exists()


PICKLES = {name for name in ATTACKS if "pickle" in name}
# One unpickler serves every format, so the pickles in zip files stand for those of the others; the
# slow ones among them take --verify as long as reading, and are left out.
ONCE = [
    name
    for name in ATTACKS
    if name not in PICKLES or (name.startswith("zip") and name not in LARGE)
]


@pytest.mark.parametrize("name", named(ONCE, PICKLES | LARGE))
def test_an_attack_cannot_be_verified(verifier, tmp_path, name):
    """--verify refuses an attack as an output and as an input, within 256 MiB beside torch."""
    path = tmp_path / "a.pt"
    ATTACKS[name](path)
    write_output_of(path)
    found = verifier(path)
    for outcome, run in zip(found["outcomes"], found["runs"], strict=True):
        assert outcome.startswith("refused: "), outcome
        assert "more memory than this process" not in outcome
        assert run["code"] == 1
        check(run | {"outcome": "refused", "events": found["events"]})


def test_what_fuzzing_found_stays_fixed(child, tmp_path):
    """Each file that once broke a reader is refused or read."""
    for number, path in enumerate(FOUND):
        target, data = path.name.partition("-")[0], path.read_bytes()
        place = tmp_path / f"{number}.pt"
        if target == "dcp":
            length = int.from_bytes(data[:3], "little")
            place.mkdir()
            (place / ".metadata").write_bytes(data[3 : 3 + length])
            (place / "__0_0.distcp").write_bytes(data[3 + length :])
        elif target == "pickle":
            place.write_bytes(archive(record("a/data.pkl", data), DATA))
        else:
            place.write_bytes(data)
        check(child(place))


def bytes_of(path):
    """Return the bytes of each tensor of a file, by name."""
    raw, layout = path.read_bytes(), scan(path)
    storages = {info.path: info.storage for info in layout.tensors}
    return {name: raw[layout.offset(one) :][: one.nbytes] for name, one in storages.items()}


@pytest.mark.parametrize(
    "name", named(name for name in sorted(RIGHT) if not name.startswith(("dcp", "directory")))
)
def test_what_is_read_is_averaged_right(tmp_path, name):
    """The mean of an odd file with itself has the file's own bytes."""
    path, out = tmp_path / "a.pt", tmp_path / "out.pt"
    ATTACKS[name](path)
    merge_checkpoints([path, path], out)
    assert bytes_of(out) == bytes_of(path)


@pytest.mark.parametrize("name", sorted(LATE))
def test_a_lie_that_shows_late_is_refused(tmp_path, name):
    """A lie that shows only when the weights are read is an error and leaves no output."""
    path, out = tmp_path / "a.pt", tmp_path / "out.pt"
    ATTACKS[name](path)
    with pytest.raises(MergeError, match="is damaged"):
        merge_checkpoints([path, path], out)
    assert not out.exists()


STACKS = [
    b"",
    b"N",
    b"NN",
    b"NNNN",
    b"(",
    b"(N",
    b"(NN",
    b"}N",
    b"}NN",
    b"])",
    b"\x8f(N",
    b"K\1K\2",
]
STACKS += [b"cx\ny\n)", b"cx\ny\n)R}", b"cos\nsystem\n)", b"(cos\nsystem\n", b"Nq\0", b"))"]
TAILS = [
    b"",
    b".",
    b"\0.",
    b"\1\0\0\0.",
    b"\xff" * 9 + b".",
    b"a\nb\n.",
    b"1\n.",
    b"\0" * 12 + b".",
]


def test_every_opcode_on_every_stack():
    """Each of 256 bytes as an opcode, on stacks that fit or not, is a value or a PickleError."""
    for code, stack, tail in itertools.product(range(256), STACKS, TAILS):
        data = stack + bytes([code]) + tail
        with contextlib.suppress(PickleError):
            load(data, persistent=lambda pid: pid, call=lambda *_: None)


@pytest.mark.parametrize("protocol", range(6))
def test_every_protocol_may_be_claimed(tmp_path, protocol):
    """Opcodes mean the same under every protocol that a pickle may claim."""
    data = b"\x80" + bytes([protocol]) + made(state())[2:]
    (tmp_path / "a.pt").write_bytes(archive(record("a/data.pkl", data), DATA))
    assert [info.path for info in scan(tmp_path / "a.pt").tensors] == [("w",)]


def test_a_process_without_memory_says_so(tmp_path, monkeypatch):
    """A file that takes more memory than the process may have is an error without a traceback."""

    def full(*_):
        raise MemoryError

    monkeypatch.setattr("merge_avg.formats.scan_file", full)
    (tmp_path / "a.pt").write_bytes(b"PK\3\4")
    with pytest.raises(MergeError, match="more memory than this process may have"):
        scan(tmp_path / "a.pt")
