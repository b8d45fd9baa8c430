"""Large numbers of inputs, tensors and bytes, and names that steer terminals."""

import json
import shutil
import struct
import subprocess
import sys
import unicodedata

import pytest
import torch

from merge_avg import merge_checkpoints
from tests.helpers import FORMATS, load, save

STEERING = {
    "long": "n" * 10_000,
    "empty": "",
    "lines": "a\nerror: b\r\nc",
    "markup": "[red]x[/red] [link=http://x]y[/link]",
    "ansi": "\x1b[31mred\x1b[0m\x1b]0;title\x07\x9b2J",
    "bidi": "\u202egnp.\u2066x\u2069\u200f",
    "invisible": "a\u200bb\ufeffc\u00ad",
    "workflow": "::set-output name=x::y",
    "workflow_old": "##[set-output name=x;]y",
    "markdown": "|`<b>x</b>`|[a](http://x) ![](y) @everyone #1",
    "controls": "".join(map(chr, [*range(1, 32), *range(127, 160)])),
}


def harmless(text):
    """Assert that no line of a text is a command to a terminal or a CI runner; return the text."""
    for line in text.split("\n"):
        kinds = {unicodedata.category(c) for c in line}
        assert not kinds & {"Cc", "Cf", "Cs", "Zl", "Zp"}, line
        assert not line.lstrip().startswith("::"), line
        assert "##[" not in line, line
    return text


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("kind", STEERING)
def test_names_are_shown_and_never_obeyed(tmp_path, command, monkeypatch, kind, suffix):
    """Tensors may have any name, and whatever is printed shows the name escaped."""
    name, page = STEERING[kind], tmp_path / "summary.md"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(page))
    paths = [tmp_path / f"{i}.{suffix}" for i in range(2)]
    for i, path in enumerate(paths):
        key = "w" if kind == "empty" else f"{name}.w"
        save({name: torch.full((2,), float(i)), f"{key}.i": torch.tensor(i)}, path)
    out = tmp_path / f"out.{suffix}"
    code, stdout, err = command(*paths, "-o", out, "--int-policy", "max")
    assert code == 0, err
    assert load(out)[name].tolist() == [0.5, 0.5]
    code, shown, _ = command(*paths, "--inspect")
    assert code == 0
    for text in (stdout, err, shown, page.read_text("utf-8")):
        harmless(text)
    assert len(shown) < 10 * len(name) + 10_000
    _, text, err = command(*paths, "--inspect", "--json")
    assert name in {tensor["name"] for tensor in json.loads(harmless(text))[0]["tensors"]}
    _, text, shown = command(*paths, "-o", tmp_path / "no.pt", "--dry-run", "--json")
    assert json.loads(harmless(text))["dry_run"]
    harmless(err + shown)
    save({name: torch.ones(3)}, paths[1])
    for options in (["-o", tmp_path / "no.pt"], ["-o", tmp_path / "no.pt", "--key", name or "x"]):
        code, text, err = command(*paths, *options)
        assert (code, text) == (1, "")
        assert [line.partition(":")[0] for line in harmless(err).splitlines()] == ["error", "hint"]


@pytest.mark.parametrize("kind", ["markup", "ansi", "bidi", "workflow", "lines"])
def test_top_level_keys_and_file_names_are_too(tmp_path, command, monkeypatch, kind):
    """Keys that are kept and names of files and folders are shown escaped as well."""
    name = STEERING[kind].replace("/", "_")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    folder = tmp_path / name
    folder.mkdir()
    paths = [folder / f"{i}{name}.pt" for i in range(2)]
    for i, path in enumerate(paths):
        value = {"model": {"w": torch.full((2,), float(i))}, f"{name}_optim": {"m": torch.ones(2)}}
        torch.save({**value, name: 1, f"loss{name}": i}, path)
    code, stdout, err = command(*paths, "-o", folder / "out.pt")
    assert code == 0, err
    for text in (
        stdout,
        err,
        (tmp_path / "summary.md").read_text("utf-8"),
        command(*paths, "--inspect")[1],
    ):
        harmless(text)
    code, _, err = command(folder / f"none{name}.pt", "-o", tmp_path / "no.pt")
    assert code == 1
    harmless(err)


@pytest.mark.parametrize("suffix", FORMATS)
def test_64_inputs(tmp_path, suffix):
    """The mean of 64 files is the mean of their float64 values, rounded once."""
    paths, total = [tmp_path / f"{i}.{suffix}" for i in range(64)], torch.zeros(300).double()
    for i, path in enumerate(paths):
        value = torch.randn(300, generator=torch.Generator().manual_seed(i))
        total += value.double()
        save({"w": value}, path)
    merge_checkpoints(paths, tmp_path / f"out.{suffix}")
    assert torch.equal(load(tmp_path / f"out.{suffix}")["w"], (total / 64).float())


def measured(*arguments):
    """Run the command in a process of its own and return its peak anonymous memory in bytes."""
    code = (
        "import atexit, re, sys, threading, time\n"
        "peak = [0]\n"
        "def watch():\n"
        "    while True:\n"
        "        text = open('/proc/self/status').read()\n"
        "        peak[0] = max(peak[0], int(re.search(r'RssAnon:\\s+(\\d+)', text)[1]))\n"
        "        time.sleep(0.02)\n"
        "threading.Thread(target=watch, daemon=True).start()\n"
        "atexit.register(lambda: print('peak', peak[0], file=sys.stderr))\n"
        "from merge_avg.cli import main\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stderr.rstrip().rpartition(" ")[2]) << 10


@pytest.mark.large
@pytest.mark.parametrize("suffix", FORMATS)
def test_100_000_tensors(tmp_path, suffix):
    """A hundred thousand tensors with names as in real models are averaged."""
    paths, count = [tmp_path / f"{i}.{suffix}" for i in range(2)], 100_000
    for fold, path in enumerate(paths):
        value = torch.arange(2.0 * count).view(count, 2) * (fold + 1)
        state = {
            f"model.layers.{i // 100}.experts.{i % 100}.weight": row.clone()
            for i, row in enumerate(value)
        }
        save(state, path)
    out = tmp_path / f"out.{suffix}"
    measured(*paths, "-o", out)
    merged = load(out)
    assert list(merged) == list(state) or suffix == "safetensors"
    rows = torch.stack([merged[name] for name in state])
    assert torch.equal(rows, torch.arange(2.0 * count).view(count, 2) * 1.5)


@pytest.mark.large
def test_a_tensor_of_12_gb(tmp_path):
    """One tensor of 12 GB, most of it a hole in a sparse file, is averaged in little memory."""
    nbytes = 12_000_000_000
    free = shutil.disk_usage(tmp_path).free
    if free < nbytes + (1 << 30):
        pytest.skip(f"needs 13 GB of disk, has {free:,} bytes")
    header = {"w": {"dtype": "F32", "shape": [nbytes // 4], "data_offsets": [0, nbytes]}}
    raw = json.dumps(header).encode()
    paths = [tmp_path / f"{i}.safetensors" for i in range(2)]
    places = (0, nbytes // 2, nbytes - 4)
    for fold, path in enumerate(paths):
        with path.open("wb") as file:
            file.write(len(raw).to_bytes(8, "little") + raw)
            for at in places:
                file.seek(8 + len(raw) + at)
                file.write(struct.pack("<f", 1.0 + 2 * fold))
    out = tmp_path / "out.safetensors"
    assert measured(*paths, "-o", out) < 600 << 20
    with out.open("rb") as file:
        base = 8 + int.from_bytes(file.read(8), "little")
        for at in (*places, 4, nbytes // 2 + 4):
            file.seek(base + at)
            assert struct.unpack("<f", file.read(4))[0] == (2.0 if at in places else 0.0)
    assert out.stat().st_size == base + nbytes
    out.unlink()
