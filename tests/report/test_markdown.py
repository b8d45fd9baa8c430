"""The Markdown for the page of a CI job."""

import re

import pytest
import torch

from merge_avg.engine._run import run
from merge_avg.errors import MergeError
from merge_avg.options import Options
from merge_avg.plan import prepare
from merge_avg.report.markdown import append, markdown
from merge_avg.report.report import describe


def report_of(folder, names, outputs):
    for number, name in enumerate(names):
        torch.save({"w": torch.full((5,), float(number))}, folder / name)
    job = prepare([folder / name for name in names], outputs, Options())
    return describe(job, run(job), "1.2.3")


def test_a_table_of_what_was_averaged(tmp_path):
    """Each checkpoint is a row with its size and weight, and the output is named."""
    text = markdown(report_of(tmp_path, ["a.pt", "b.pt"], tmp_path / "o.pt"))
    assert text.startswith("### merge-avg: 2 checkpoints averaged\n")
    assert "| checkpoint | size | weight |" in text
    assert len(re.findall(r"^\| .*a\.pt \| .*B \| 0\.5 \|$", text, re.MULTILINE)) == 1
    assert "- written: " in text
    assert "- averaged: 1 tensors, 5 parameters" in text


def test_the_agreement_is_told(tmp_path):
    """The agreement has a line, with a base two; the base is no checkpoint that was averaged."""
    for number, name in enumerate(["base.pt", "a.pt", "b.pt"]):
        torch.save({"w": torch.arange(12.0).view(3, 4) ** number}, tmp_path / name)
    paths = [tmp_path / "a.pt", tmp_path / "b.pt"]
    job = prepare(paths, tmp_path / "o.pt", Options(base=tmp_path / "base.pt"))
    report = describe(job, run(job), "1.2.3")
    text = markdown(report)
    assert text.startswith("### merge-avg: 2 checkpoints averaged\n")
    assert f"- agreement: {report['agreement']['mean']:.3f} (exact)\n" in text
    centred = report["agreement"]["centred"]["mean"]
    assert re.search(
        rf"- agreement by the differences to .*base.*: {centred:.3f} \(exact\)\n", text
    )


def test_several_averages_are_columns(tmp_path):
    """Each output has a column of weights, and a line."""
    outputs = {str(tmp_path / "x.pt"): [1, 3], str(tmp_path / "y.pt"): [0, 1]}
    text = markdown(report_of(tmp_path, ["a.pt", "b.pt"], outputs))
    assert "| checkpoint | size | weight | weight |" in text
    assert re.search(r"a\.pt \| .*B \| 0\.25 \| 0 \|", text)
    assert text.count("- written: ") == 2


def test_what_is_known_of_checkpoints_is_shown(tmp_path):
    """Steps and metrics have columns where some checkpoint has them."""
    report = report_of(tmp_path, ["a.pt", "b.pt"], tmp_path / "o.pt")
    report["inputs"][1] |= {"step": 1000, "metric": 0.25}
    text = markdown(report)
    assert "| checkpoint | size | step | metric | weight |" in text
    assert "| 1000 | 0.25 | 0.5 |" in text


@pytest.mark.parametrize(
    "name", ["a|b.pt", "`x`.pt", "<b>.pt", "a\nb.pt", "\x1b[31m.pt", "[x](y).pt"]
)
def test_names_stay_names(tmp_path, name):
    """Nothing in a name is Markdown, HTML, or a terminal's control."""
    text = markdown(report_of(tmp_path, [name, "plain.pt"], tmp_path / "o.pt"))
    row = next(line for line in text.splitlines() if "plain" not in line and ".pt |" in line)
    cell = row.split(" | ")[0]
    assert not re.search(r"[`<>\x1b]|\]\(", cell)
    assert row.count("|") == 4


def test_it_is_added_to_the_page(tmp_path):
    """The page keeps what was there; one that cannot be written is an error."""
    page = tmp_path / "page.md"
    page.write_text("before\n")
    append(page, "after\n")
    assert page.read_text() == "before\nafter\n"
    with pytest.raises(MergeError, match="no summary was written"):
        append(tmp_path, "x")
