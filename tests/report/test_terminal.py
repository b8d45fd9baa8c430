"""The report on a terminal: tables that fit, in which names stay names."""

import io
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from merge_avg.report.terminal import show
from merge_avg.selection import Candidate
from tests.helpers import COMMAND, noise
from tests.report.helpers import report_of, save
from tests.terminal import on_terminal

NAMES = ["[red]a[bold] b.pt", "c\x1b[31m:smile:.pt", "plain.pt"]


def networks(folder, names=NAMES, *, odd=True):
    """Save networks that agree, but for the last one where it is to be odd."""
    common = noise(0, 30, 40)
    states = []
    for number in range(len(names)):
        own = noise(number + 1, 30, 40)
        last = odd and number == len(names) - 1
        content = {
            "w": own * 2 if last else common + own / 9,
            "[b]v\x1b[0m": own,
            "n": torch.ones(3),
        }
        states.append({"model": content, "epoch": number})
    return save(folder, *states, names=names)


def shown(paths, outputs, width=100, **options):
    """Return what a terminal of a width shows of a merge, without colours."""
    file = io.StringIO()
    report = report_of(paths, outputs, **options)
    show(report, Console(file=file, width=width, force_terminal=False))
    return file.getvalue()


@pytest.mark.parametrize("width", [40, 100])
def test_everything_is_told(tmp_path, monkeypatch, width):
    """Checkpoints, weights, agreement, sizes, what was kept, notes and warnings, in the width."""
    monkeypatch.chdir(tmp_path)
    paths = [path.relative_to(tmp_path) for path in networks(tmp_path)]
    text = shown(paths, "o.pt", width, exclude=["n"], weights=[1, 1, 2])
    assert max(map(len, text.splitlines())) <= width
    flat = "".join(text.split())
    assert text.startswith("averaged 3 checkpoints into o.pt")
    rows = [line for line in text.splitlines() if "plain.pt" in line]
    assert re.search(r"0\.5 +-?0\.\d{3}", rows[0])
    for what in ("averaged2tensors,2,400parameters(float32)", "kBin", "agreement0.", "(exact;"):
        assert what in flat
    assert "keptfrom[red]a[bold]b.pt:epoch" in flat
    assert "keptfromthetemplate,asnottobeaveraged:" in flat
    assert "warning" in flat
    assert "verdictstrangers(" in flat
    assert "strangers:thecheckpointsfallintogroupsthathavenothingincommon('[red]a[bold]" in flat


@pytest.mark.parametrize("width", [40, 100])
def test_names_stay_names(tmp_path, monkeypatch, width):
    """Neither rich's markup and emoji nor a terminal's control in a name is anything but text."""
    monkeypatch.chdir(tmp_path)
    paths = [path.relative_to(tmp_path) for path in networks(tmp_path)]
    text = shown(paths, "o.pt", width)
    assert "\x1b" not in text
    flat = "".join(text.split())
    assert "c\\x1b[31m:smile:.pt" in flat
    assert "[red]a[bold]" in flat


def test_bars_show_who_agrees(tmp_path):
    """The one that does not belong has the shortest bar."""
    text = shown(networks(tmp_path, ["a.pt", "b.pt", "c.pt"]), tmp_path / "o.pt", 200)
    bars = [line.count("━") for line in text.splitlines() if ".pt " in line and "0.333" in line]
    assert len(bars) == 3
    assert bars[2] < min(bars[:2])


def test_a_base_and_several_averages(tmp_path):
    """The base is marked, with a column of what was learned; several outputs have a line each."""
    paths = networks(tmp_path, ["a.pt", "b.pt", "c.pt", "base.pt"], odd=False)
    outputs = {str(tmp_path / "x.pt"): [1, 3, 0], str(tmp_path / "y.pt"): [0, 1, 1]}
    text = shown(paths[:3], outputs, 200, base=paths[3])
    assert "averaged 3 checkpoints into 2 averages" in text
    assert "base.pt (base)" in text
    assert "from base" in text
    assert "(weights 0.25, 0.75, 0)" in text


@pytest.mark.parametrize("term", ["xterm", "dumb"])
def test_a_real_terminal_of_40_columns(tmp_path, term):
    """On a narrow terminal the table fits; a dumb one gets neither colours nor box characters."""
    networks(tmp_path, ["a.pt", "b.pt", "a-rather-long-name-of-a-checkpoint-of-many.pt"])
    command = [*COMMAND, *sorted(tmp_path.glob("*.pt")), "-o", "o.pt"]
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "NO_COLOR")}
    environment["TERM"] = term
    text = on_terminal(command, 40, cwd=tmp_path, env=environment)
    summary = text[text.index("averaged 3") :]
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", summary)
    assert max(len(line.rstrip("\r")) for line in plain.split("\n")) <= 40
    assert "agrees" in plain
    assert ("\x1b" in summary) == (term == "xterm")
    assert term == "xterm" or plain.isascii()


def test_many_are_shortened_and_those_left_out_are_counted(tmp_path):
    """Of sixty checkpoints the middle is a row, and why others are left out is a line."""
    paths = save(tmp_path, *({"w": torch.full((2,), float(k))} for k in range(60)))
    chosen = [(Candidate(path), 1 / 60) for path in paths]
    left = [(Candidate(Path(f"{k}.ckpt"), chosen=False, why="too old"), None) for k in range(3)]
    report = replace(report_of(paths, tmp_path / "o.pt"), candidates=(*chosen, *left))
    file = io.StringIO()
    show(report, Console(file=file, width=200, force_terminal=False))
    text = file.getvalue()
    assert "... 45 more ..." in text
    assert sum("0.01667" in line for line in text.splitlines()) == 15
    assert re.search(r"others +3 too old", text)
