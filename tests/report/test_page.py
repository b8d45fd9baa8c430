"""The page's words and structure: what a newcomer, a screen reader and a narrow screen need."""

import json
import re
import shlex
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from merge_avg.agreement import Verdict
from merge_avg.report import _charts, html
from tests.helpers import noise
from tests.report.helpers import (
    Node,
    Tree,
    contrast,
    relatives,
    report_of,
    rows_of,
    save,
    sections,
)

CSS = (Path(html.__file__).parent / "page.css").read_text()
SVG = _charts.svg


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    """Leave out the charts, which take longer than all else."""
    monkeypatch.setattr(_charts, "svg", lambda *_: "<svg ></svg>")


# What a newcomer needs


@pytest.mark.parametrize(
    ("word", "title", "means"),
    [
        ("agree", "The checkpoints agree", "should work about as well as each of them"),
        ("drifted", "The checkpoints have drifted apart", "may work or not"),
        ("strangers", "The checkpoints are strangers", "most likely does not work"),
    ],
)
def test_the_verdict_stands_on_top(tmp_path, word, title, means):
    """The first section says the verdict in words and colour, why, and what to do next."""
    report = report_of(relatives(tmp_path), tmp_path / "o.pt")
    if word != "agree":
        verdict = Verdict(word, 0.125, "they went apart", "start again", ("a.weight", "b.weight"))
        report = replace(report, verdict=verdict, warnings=verdict.doubts(report.averaged))
    found = sections(report)
    first = next(iter(found.values()))
    assert first is found["verdict"]
    assert first.attributes["class"] == f"verdict {word}"
    assert next(first.all("h2")).text == title
    assert means in first.text
    if word == "agree":
        assert "Next: evaluate the mean as you would one of the checkpoints" in first.text
        assert "Why:" not in first.text
    else:
        assert "Why: they went apart: 'a.weight', 'b.weight'." in first.text
        assert "Next: start again." in first.text
        assert f"--fail-on {word} makes it an error" in first.text
        assert f"Verdict: {word}, by 0.125." in first.text
        assert "messages" not in found, found["messages"].text
    # Each word has a colour of its own, in which nothing else is told.
    assert re.search(rf"^\.{word}\b.*background: var", CSS, re.MULTILINE)


def test_other_warnings_stay(tmp_path):
    """Beside the verdict's, each warning is in the page, above the notes."""
    report = report_of(relatives(tmp_path), tmp_path / "o.pt")
    report = replace(report, warnings=("NaN in all",), notes=("a note",))
    told = [one.text for one in sections(report)["messages"].all("p")]
    assert told == ["warning: NaN in all", "note: a note"]


def test_without_a_verdict_the_page_says_why(tmp_path):
    """Not asked for is another thing than nothing to compare, and calls for another next step."""
    paths = relatives(tmp_path)
    first = sections(report_of(paths, tmp_path / "o.pt", agreement=False))["verdict"]
    assert "without --no-agreement" in first.text
    first = sections(report_of(paths[:1], tmp_path / "o.pt"))["verdict"]
    assert "no two checkpoints with matrices" in first.text
    assert first.attributes["class"] == "verdict unknown"


def test_the_one_that_strays_is_named(tmp_path):
    """A checkpoint that agrees less than any other is named, as are the layers where it does."""
    paths = relatives(tmp_path)
    report = report_of(paths, tmp_path / "o.pt")
    found = sections(report)
    said, layers = (one.text for one in found["outliers"].all("li"))
    assert layers == f"#4 {paths[3]} stands apart in 1 layer"
    assert said.startswith(f"#4 {paths[3]} agrees least: {report.agreement.each[3]:.3f}")
    (row,) = rows_of(found["outliers"])
    far = sorted(report.agreement.tensors[2].distances)
    assert row == f"2 | #4 {paths[3]} | {far[-1]:.3f} | {far[-2]:.3f}"
    assert f"Outliers: {said}; {layers} (see What stands out)." in found["verdict"].text
    # Without it, nothing stands out.
    found = sections(report_of(paths[:3], tmp_path / "o.pt"))
    assert "No checkpoint stands apart" in found["outliers"].text
    assert not rows_of(found["outliers"])
    assert "Outliers" not in found["verdict"].text
    found = sections(report_of(paths[2:], tmp_path / "o.pt"))
    assert "Of two checkpoints neither can stand out" in found["outliers"].text


def test_layers_that_stray_are_bounded(tmp_path, monkeypatch):
    """The layers with the largest distances are listed, the others counted."""
    states = [
        {
            f"{i}.w": noise(i, 40, 50)
            + noise(90 + 9 * n + i, 40, 50) * (0.1 + (n == 2) * (i + 1) / 9)
            for i in range(5)
        }
        for n in range(4)
    ]
    report = report_of(save(tmp_path, *states), tmp_path / "o.pt")
    monkeypatch.setattr(html, "_LEAST", 2)
    found = sections(report)["outliers"]
    assert [row.partition(" | ")[0] for row in rows_of(found)] == ["4", "3"]
    assert "3 more layers" in found.text


def test_groups_are_named(tmp_path):
    """Checkpoints that fall into groups are listed by group; where all differ, that is said."""
    bases = [[noise(10 * n + i, 40, 40) for i in range(3)] for n in range(3)]
    states = [
        {f"{i}.w": base[i] + noise(100 + 10 * n + i, 40, 40) / 9 for i in range(3)}
        for n, base in enumerate([bases[0], bases[1], bases[0], bases[2]])
    ]
    paths = save(tmp_path, *states)
    found = sections(report_of(paths, tmp_path / "o.pt"))
    assert [one.text for one in found["outliers"].all("li")] == [
        f"group 1 of 3: #1 {paths[0]}, #3 {paths[2]}",
        f"group 2 of 3: #2 {paths[1]}",
        f"group 3 of 3: #4 {paths[3]}",
    ]
    assert f"group 2 of 3: #2 {paths[1]}; group 3 of 3" in found["verdict"].text
    found = sections(report_of([paths[0], paths[1], paths[3]], tmp_path / "o.pt"))
    assert "no two checkpoints have anything in common" in found["outliers"].text


def test_the_norm_of_the_mean_is_explained(tmp_path):
    """Beside the figure stands what it would be of checkpoints with nothing in common."""
    report = report_of(relatives(tmp_path), tmp_path / "o.pt")
    said = sections(report)["agreement"].text
    assert "The norm of the mean is its length" in said
    assert f"It is {report.agreement.shrinkage:.3f} of the mean of their norms here" in said
    assert "0.500 is what 4 checkpoints with nothing in common have left" in said


def test_checkpoints_are_numbered_by_age(command, tmp_path):
    """Steps and epochs are in the table; all else has its order, whichever the template is."""
    for step in (500, 1000, 1500, 2000):
        state = {"w": noise(1, 40, 50) + noise(step, 40, 50) * (1 if step == 1000 else 0.1)}
        content = {"state_dict": state, "epoch": step // 100, "global_step": step}
        torch.save(content, tmp_path / f"{step:04}.pt")
    command(
        "*.pt", "-o", "o.pt", "--report", "r.html", "--weighting", "linear", "--base", "0500.pt"
    )
    text = (tmp_path / "r.html").read_text()
    found = {one.attributes["id"]: one for one in Tree(text).root.all("section")}
    table = next(found["checkpoints"].all("table"))
    head = [one.text for one in table.all("th")]
    assert head[:8] == ["#", "checkpoint", "format", "size", "step", "epoch", "weight", "agrees"]
    rows = [row.split(" | ") for row in rows_of(table)]
    assert [[row[at] for at in (0, 4, 5, 6)] for row in rows] == [
        ["1", "500", "5", "0.1"],
        ["2", "1000", "10", "0.2"],
        ["3", "1500", "15", "0.3"],
        ["4", "2000", "20", "0.4"],
    ]
    assert min(rows, key=lambda row: float(row[7])) == rows[1]
    assert "#2 1000.pt agrees least" in found["outliers"].text
    ((layer, stray, *_),) = (row.split(" | ") for row in rows_of(found["outliers"]))
    assert (layer, stray) == ("state_dict", "#2 1000.pt")
    assert rows_of(found["tensors"])[0].endswith(" (#2)")
    (data,) = (one for one in found["json"].all("pre"))
    described = json.loads(data.children[0])
    assert described["inputs"][0]["path"] == described["template"] == "2000.pt"
    hashes = {one["path"]: one["hash"] for one in described["inputs"]}
    origin = [row.split(" | ") for row in rows_of(found["origin"])]
    assert {row[1]: row[3] for row in origin[:4]} == hashes


# Where it came from


def verify_command(page):
    """The commands in a page that verify its outputs."""
    found = next(one for one in Tree(page).root.all("section") if one.attributes["id"] == "origin")
    return [line for one in found.all("pre") for line in one.children[0].splitlines()]


@pytest.mark.parametrize(
    ("inputs", "output", "expected"),
    [
        (["a.pt", "b.pt"], "o.pt", "merge-avg verify o.pt"),
        (["in x/a.pt", "in x/b.pt"], "o 1.pt", "merge-avg verify 'o 1.pt' --inputs 'in x'"),
        (["in/a.pt", "b.pt"], "out/o.pt", "merge-avg verify out/o.pt --inputs ."),
        (["in/a.pt", "in/b.pt"], "in/o.safetensors", "merge-avg verify in/o.safetensors"),
        (["{here}/in/a.pt", "in/b.pt"], "./-x.pt", "merge-avg verify ./-x.pt --inputs {here}/in"),
    ],
)
def test_the_command_verifies(command, tmp_path, inputs, output, expected):
    """The command in the page, as it stands, verifies the output; --inputs only where needed."""
    states = [{"w": noise(n, 40, 50)} for n in range(2)]
    for folder in ("in", "in x", "out"):
        (tmp_path / folder).mkdir()
    places = [one.format(here=tmp_path) for one in inputs]
    save(tmp_path, *states, names=places)
    code, *_ = command(*places, "-o", output, "--report", "r.html")
    assert code == 0
    (found,) = verify_command((tmp_path / "r.html").read_text())
    assert found == expected.format(here=tmp_path)
    code, out, _ = command(*shlex.split(found)[1:])
    assert (code, out) == (
        0,
        f"{expected.split(' --')[0].removeprefix('merge-avg verify ')}\n".replace("'", ""),
    )


def test_several_outputs_have_one_command(command, tmp_path, monkeypatch):
    """Outputs whose inputs are named alike are verified together, and of many some are named."""
    relatives(tmp_path)
    monkeypatch.setattr(html, "_NAMED", 3)
    command(
        *(f"fold{n}.pt" for n in range(4)),
        "--leave-one-out",
        "-o",
        "{name}.pt",
        "--report",
        "r.html",
    )
    text = (tmp_path / "r.html").read_text()
    (found,) = verify_command(text)
    assert len(shlex.split(found)) == 2 + 3
    assert "The other 1 output can be verified" in text
    assert command(*shlex.split(found)[1:])[0] == 0


def test_a_format_without_room_says_so(tmp_path):
    """Of an output in the format before torch 1.6 the page says that it cannot be verified."""
    paths = relatives(tmp_path)
    for path in paths:
        torch.save(torch.load(path), path, _use_new_zipfile_serialization=False)
    text = html.page(report_of(paths, tmp_path / "o.pt"))
    assert verify_command(text) == []
    assert "no room for a record of its inputs" in text


def test_hashes_of_the_inputs_are_in_the_page(tmp_path):
    """Each input has its size and hash, and so has what comes from the template beside weights."""
    paths = relatives(tmp_path)
    report = report_of(paths, tmp_path / "o.pt", base=tmp_path / "base.pt")
    rows = rows_of(sections(report)["origin"])
    for number, one in enumerate(report.inputs[:4], 1):
        assert rows[number - 1] == f"{number} | {one.path} | {one.nbytes:,} | {one.hash}"
        assert re.fullmatch("[0-9a-f]{32}", one.hash)
    assert rows[-1].endswith(f" | {report.result.hashes.kept:032x}")
    found = sections(report_of(paths, tmp_path / "o.pt", hashes=False))["origin"]
    assert "No hashes were recorded (--no-hashes)" in found.text
    assert len(rows_of(found)) == 4


# All tensors


def test_all_tensors_are_listed(tmp_path):
    """Of each tensor there is what was done with it, its dtype and shape, and the agreement."""
    states = [
        {
            "a.w": noise(n, 40, 50).half(),
            "a.b": torch.ones(3) * n,
            "n": torch.tensor(7),
            "k": torch.ones(2),
        }
        for n in range(2)
    ]
    report = report_of(save(tmp_path, *states), tmp_path / "o.pt", exclude=["k"])
    (one,) = report.agreement.tensors
    assert rows_of(sections(report)["tensors"]) == [
        f"a.w | averaged | float16 | 40x50 | {one.mean:.3f} | {max(one.distances):.3f} (#1)",
        "a.b | averaged | float32 | 3 |  | ",
        "n | compared | int64 | one value |  | ",
        "k | kept | float32 | 2 |  | ",
    ]


def test_many_tensors_come_in_parts(tmp_path, monkeypatch):
    """A page has parts of bounded size, which are closed, and says how many it leaves out."""
    report = report_of(relatives(tmp_path, layers=8), tmp_path / "o.pt")
    monkeypatch.setattr(html, "_PART", 3)
    found = sections(report)["tensors"]
    assert [one.text for one in found.all("summary")] == [
        "Tensors 1 to 3 of 9: model.layers.0.weight to model.layers.2.weight",
        "Tensors 4 to 6 of 9: model.layers.3.weight to model.layers.5.weight",
        "Tensors 7 to 9 of 9: model.layers.6.weight to model.norm",
    ]
    assert not any("open" in one.attributes for one in found.all("details"))
    assert "left out" not in found.text
    monkeypatch.setattr(html, "_MOST_TENSORS", 4)
    found = sections(report)["tensors"]
    assert [len(rows_of(one)) for one in found.all("details")] == [3, 1]
    assert "The first 4 tensors are here" in found.text
    assert "5 more are left out" in found.text


# For every reader


def structured(report):
    """Assert what a screen reader, a keyboard and a narrow screen need of a page."""
    root = Tree(html.page(report)).root
    (page,) = root.all("html")
    assert page.attributes["lang"] == "en"
    assert next(root.all("title")).text.startswith("merge-avg: ")
    metas = {
        one.attributes.get("name"): one.attributes["content"]
        for one in root.all("meta")
        if "content" in one.attributes
    }
    assert metas["viewport"] == "width=device-width, initial-scale=1"
    assert metas["color-scheme"] == "light dark"
    # One main landmark holds everything, and headings leave out no level.
    (main,) = root.all("main")
    (body,) = root.all("body")
    assert [one for one in body.children if isinstance(one, Node) or one.strip()] == [main]
    levels = [int(one.tag[1]) for one in root.all("h1", "h2", "h3", "h4")]
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    for one in root.all("section"):
        assert next(child for child in one.children if isinstance(child, Node)).tag == "h2"
    ids = {one.attributes["id"]: one for one in root.all("caption", "section", "figure")}
    regions = [one for one in root.all("div", "pre") if one.attributes.get("role") == "region"]
    names = [
        ids[one.attributes["aria-labelledby"]].text
        if "aria-labelledby" in one.attributes
        else one.attributes["aria-label"]
        for one in regions
    ]
    assert all(names)
    assert len(names) == len(set(names))
    # Whatever scrolls can be reached by the keyboard.
    for one in root.all("div", "pre"):
        scrolls = one.tag == "pre" or one.attributes.get("class") == "scroll"
        assert scrolls == (one.attributes.get("role") == "region")
        assert scrolls == (one.attributes.get("tabindex") == "0")
    for table in root.all("table"):
        assert table.parent.attributes["class"] == "scroll"
        assert next(child for child in table.children if isinstance(child, Node)).tag == "caption"
        heads = [one for one in table.all("th") if any(a.tag == "thead" for a in one.above)]
        assert all(one.text and one.attributes["scope"] == "col" for one in heads)
        rows = [row for body in table.all("tbody") for row in body.all("tr")]
        assert rows
        for row in rows:
            cells = [one for one in row.children if isinstance(one, Node)]
            assert len(cells) == len(heads)
            (head,) = (one for one in cells if one.tag == "th")
            assert head.attributes["scope"] == "row"
            assert head.text
            assert any(one.text for one in cells if one.tag == "td")
    for picture in root.all("svg"):
        frame = picture.parent.attributes
        assert frame["role"] == "img"
        assert frame["aria-label"]
    for one in root.all("a"):
        assert one.attributes["href"][1:] in ids
        assert one.text


def test_pages_are_structured(tmp_path):
    """Headings, tables, regions and pictures are as a screen reader needs them, in every kind."""
    paths = relatives(tmp_path)
    structured(report_of(paths, tmp_path / "o.pt", base=tmp_path / "base.pt", exclude=["norm"]))
    structured(report_of(paths[:1], tmp_path / "o.pt", hashes=False))
    zeros = ({"z": torch.zeros(3, 3)} for _ in range(2))
    structured(report_of(save(tmp_path, *zeros), tmp_path / "o.pt"))
    strangers = ({f"{i}.w": noise(9 * n + i, 40, 40) for i in range(3)} for n in range(3))
    structured(report_of(save(tmp_path, *strangers), tmp_path / "o.pt"))


def palettes():
    """The colours of the style sheet by name, for light and for dark."""
    light, dark = CSS.split("@media (prefers-color-scheme: dark)")
    return [
        dict(re.findall(r"--([a-z0-9-]+): (#[0-9a-f]{6});", text))
        for text in (light, dark.partition("} }")[0])
    ]


def test_colours_can_be_read():
    """In light and dark, text has a contrast of 4.5 on all it stands on, and lines have 3."""
    assert contrast("#000000", "#ffffff") == 21
    for colours in palettes():
        for ground in ("page", "box", "good", "doubt", "bad"):
            for text in ("ink", "link"):
                assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
        for ground in ("page", "box"):
            assert contrast(colours["soft"], colours[ground]) >= 4.5
        for number in range(1, 9):
            assert contrast(colours[f"line-{number}"], colours["box"]) >= 3, number
        for word in ("good", "doubt", "bad"):
            assert contrast(colours[f"{word}-edge"], colours[word]) >= 3, word


def test_both_schemes_have_all_colours(tmp_path, monkeypatch):
    """Light and dark name the same colours, and the page and its charts use no other."""
    monkeypatch.setattr(_charts, "svg", SVG)
    light, dark = palettes()
    assert light.keys() == dark.keys()
    text = html.page(report_of(relatives(tmp_path), tmp_path / "o.pt", base=tmp_path / "base.pt"))
    assert set(re.findall(r"var\(--([a-z0-9-]+)\)", text)) <= light.keys()
    style, rest = text.split("</style>", 1)
    assert not re.search("#[0-9a-f]{6}", style.partition("body {")[2])
    # On a cell of the heat map, black or white is read in either scheme.
    assert set(re.findall("(?:fill|stroke): (#[0-9a-f]{6})", rest)) <= {"#ffffff", "#000000"}
