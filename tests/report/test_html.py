"""The page: one file of HTML that needs no network, and in which text is only text."""

import json
import re
import sys
from dataclasses import replace
from html import unescape

import pytest
import torch

from merge_avg.errors import MergeError, UsageError
from merge_avg.options import Options
from merge_avg.plan import prepare
from merge_avg.report import html, printable
from merge_avg.report.values import as_json
from tests.helpers import noise, run_command
from tests.report.helpers import Elements, relatives, report_of, save


def test_it_tells_all(tmp_path):
    """Inputs, weights, policies, notes, warnings, agreement and errors are in the page."""
    paths = relatives(tmp_path)
    base = tmp_path / "base.pt"
    report = report_of(paths, tmp_path / "o.pt", weights=[1, 1, 1, 2], base=base, exclude=["norm"])
    report = replace(report, warnings=("a warning of the test",))
    elements = Elements(html.page(report))
    text = " ".join(" ".join(elements.text).split())
    for entry in report.inputs:
        assert entry.path in text
    assert f"{base} (base)" in text
    figures = report.agreement
    for mean in (*figures.each, *report.centred.each):
        assert f"{mean:.3f}" in text
    assert f"Verdict: {report.verdict.word}, by {report.verdict.number:.3f}" in text
    for what in ("a warning of the test", *report.notes, "layers.2.weight", "0.4", "int_policy"):
        assert what in text
    ids = {attributes.get("id") for _, attributes in elements.found}
    assert {"heat-map", "heat-map-centred", "distances", "checkpoints", "least", "what"} <= ids
    assert sum(tag == "svg" for tag, _ in elements.found) == 3
    described = json.loads(
        unescape(re.search(r"<pre[^>]*>({.*)</pre>", html.page(report), re.DOTALL)[1])
    )
    expected = as_json(report)
    for one in (expected["agreement"], expected["agreement"]["centred"]):
        del one["tensors"]
    assert described == expected


def test_sampled_figures_have_errors(tmp_path):
    """Where a sample was looked at, the page says of how many elements, and the error."""
    paths = save(tmp_path, *({"w": noise(number, 400, 500)} for number in range(2)))
    report = report_of(paths, tmp_path / "o.pt")
    text = html.page(report)
    assert f"{report.agreement.elements:,} of the 200,000 elements" in text
    assert re.search(r"sampled, ± 0\.\d+", text)


def test_ids_are_distinct_and_nothing_is_loaded(tmp_path):
    """No script, no style sheet, no address to load from; no id twice; small."""
    paths = relatives(tmp_path)
    report = report_of(paths, tmp_path / "o.pt", base=tmp_path / "base.pt")
    text = html.page(report)
    elements = Elements(text)
    tags = {tag for tag, _ in elements.found}
    assert not tags & {"script", "link", "iframe", "object", "base", "form", "foreignobject"}
    for tag, attributes in elements.found:
        for name in ("src", "href", "xlink:href", "data", "action"):
            assert attributes.get(name, "#").startswith(("#", "data:image/png;base64,")), tag
        assert not any(name.startswith("on") for name in attributes)
    ids = [attributes["id"] for _, attributes in elements.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    referred = set(re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', text))
    assert {one or other for one, other in referred} <= set(ids)
    assert len(text) < 300_000
    assert html.page(report) == text


NASTY = [
    "<script>alert(1)</script>",
    "{{ 7 * 7 }}{% raw %}</style>",
    "a\"onload='x'&amp;",
    "$\\frac{1}{2}$",
    "\x1b[31mé漢\udc80",
]


@pytest.mark.parametrize("nasty", NASTY)
def test_names_are_text(tmp_path, nasty):
    """HTML, formulas, controls and undecodable bytes in names of files and tensors are text."""
    name = nasty.replace("/", "") + ".pt"
    paths = relatives(tmp_path, names=[name, "b.pt", "c.pt", "d.pt"])
    for number, path in enumerate(paths):
        torch.save({nasty: noise(number, 40, 50), f"{nasty}.1.w": noise(number + 9, 40, 50)}, path)
    report = report_of(paths, tmp_path / "o.pt", template=paths[1], base=paths[0])
    text = html.page(report)
    text.encode()
    elements = Elements(text)
    assert "script" not in {tag for tag, _ in elements.found}
    assert not any(name.startswith("on") for _, found in elements.found for name in found)
    assert "\x1b" not in text
    shown = "".join(elements.text)
    assert printable(name) in shown
    assert printable(nasty) in shown
    ticks = [unescape(label) for label in re.findall(r"<text[^>]*>([^<]*)</text>", text)]
    assert any(printable(nasty)[-12:] in label for label in ticks)


def test_odd_numbers_of_everything(tmp_path):
    """One checkpoint, many, identical ones, and zeros make pages too."""
    paths = relatives(tmp_path, count=26, layers=60)
    for chosen in (paths[:1], paths, [paths[0], paths[0]]):
        text = html.page(report_of(chosen, tmp_path / "o.pt"))
        assert ("<svg" in text) == (len(chosen) > 1)
    text = html.page(report_of(paths[:3], tmp_path / "o.pt", agreement=False))
    assert "It was not measured" in text
    states = ({"w": noise(1, 40, 50) * (n > 0), "z": torch.zeros(3, 3)} for n in range(3))
    report = report_of(save(tmp_path, *states), tmp_path / "o.pt")
    assert report.agreement.pairs[0] == (1, None, None)
    assert "nan" not in html.page(report).lower().replace("nonfinite", "")


# Before the merge, and the file


def test_what_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    """A page over an output, an input or an older page, elsewhere, or without what it needs."""
    paths = relatives(tmp_path)
    job = prepare(paths, tmp_path / "o.pt", Options())
    old = tmp_path / "old.html"
    old.write_text("old")
    linked = tmp_path / "linked.html"
    linked.symlink_to(paths[0])
    html.refuse(tmp_path / "r.html", job)
    for path, kind, message in [
        (tmp_path / "o.pt" / "r.html", UsageError, "is the output, or lies in it"),
        (tmp_path / "r.pt", UsageError, "another ending"),
        (linked, MergeError, "the output is the input"),
        (old, MergeError, "exists already"),
        (tmp_path / "none" / "r.html", MergeError, "does not exist"),
    ]:
        with pytest.raises(kind, match=message):
            html.refuse(path, job)
    for needed in ("matplotlib", "jinja2"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, needed, None)
            with pytest.raises(MergeError, match=f"needs {needed}") as raised:
                html.refuse(tmp_path / "r.html", job)
        assert "merge-avg[report]" in raised.value.hint


def test_the_command_writes_it(tmp_path):
    """--report writes the page beside the output; a refusal leaves neither."""
    relatives(tmp_path)
    folds = [f"fold{n}.pt" for n in range(4)]

    def merge(*arguments):
        return run_command(*folds, *arguments, cwd=tmp_path)

    for wrong, code in [
        (["-o", "o.pt", "--report", "r.html", "--dry-run"], 2),
        (["-o", "o.pt", "--report", "fold0.html/r.html"], 1),
        (["-o", "o.pt", "--report", "r.html", "--min-agreement", "0.999"], 1),
    ]:
        assert merge(*wrong).returncode == code
        assert not (tmp_path / "o.pt").exists()
        assert not (tmp_path / "r.html").exists()
    done = merge("-o", "o.pt", "--report", "r.html", "--base", "base.pt")
    assert (done.returncode, done.stdout) == (0, "o.pt\n")
    assert 'id="heat-map-centred"' in (tmp_path / "r.html").read_text()
    assert merge("-o", "p.pt", "--report", "r.html").returncode == 1
    assert not (tmp_path / "p.pt").exists()
    assert merge("-o", "o.pt", "--report", "r.html", "--overwrite").returncode == 0
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_page_that_cannot_be_written_is_an_error(tmp_path):
    """Where the page fails after the merge, the error says that the average is there."""
    report = report_of(relatives(tmp_path), tmp_path / "o.pt")
    (tmp_path / "r.html").write_text("made in the meantime")
    with pytest.raises(MergeError, match="the average itself was written"):
        html.write(tmp_path / "r.html", report, overwrite=False)
    assert (tmp_path / "r.html").read_text() == "made in the meantime"
