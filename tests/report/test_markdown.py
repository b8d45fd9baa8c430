"""The report in Markdown, for the summary of a CI job."""

import re
from dataclasses import replace

import pytest
import torch

from merge_avg.errors import MergeError
from merge_avg.report.markdown import append, markdown
from tests.report.helpers import report_of, save


def fives(folder, names):
    """Save vectors of five, one for each name."""
    states = ({"w": torch.full((5,), float(number))} for number in range(len(names)))
    return save(folder, *states, names=names)


def test_a_table_of_what_was_averaged(tmp_path):
    """Each checkpoint is a row with its size and weight, and the output is named."""
    text = markdown(report_of(fives(tmp_path, ["a.pt", "b.pt"]), tmp_path / "o.pt"))
    assert text.startswith("### merge-avg: 2 checkpoints averaged\n")
    assert "| checkpoint | size | weight |" in text
    assert len(re.findall(r"^\| .*a\.pt \| .*B \| 0\.5 \|$", text, re.MULTILINE)) == 1
    assert "- written: " in text
    assert "- averaged: 1 tensor, 5 parameters (float32)" in text


def test_the_agreement_is_told(tmp_path):
    """The agreement has a line, with a base two; the base is no checkpoint that was averaged."""
    states = ({"w": torch.arange(12.0).view(3, 4) ** number} for number in range(3))
    base, *paths = save(tmp_path, *states, names=["base.pt", "a.pt", "b.pt"])
    report = report_of(paths, tmp_path / "o.pt", base=base)
    text = markdown(report)
    assert text.startswith("### merge-avg: 2 checkpoints averaged\n")
    assert f"- agreement: {report.agreement.mean:.3f} (exact; mean cosine" in text
    centred = report.agreement.centred.mean
    assert f"- from base: {centred:.3f} (exact; by the differences to " in text
    row = next(line for line in text.splitlines() if "base.pt (base)" in line)
    assert row.endswith("| 0 |  |  |")


def test_several_averages_are_columns(tmp_path):
    """Each output has a column of weights, and a line."""
    outputs = {str(tmp_path / "x.pt"): [1, 3], str(tmp_path / "y.pt"): [0, 1]}
    text = markdown(report_of(fives(tmp_path, ["a.pt", "b.pt"]), outputs))
    assert re.search(r"^\| checkpoint \| size \| in .*x.pt \| in .*y.pt \|$", text, re.MULTILINE)
    assert re.search(r"a\.pt \| .*B \| 0\.25 \| 0 \|", text)
    assert re.search(r"^- written: .*x.pt \(weights 0.25, 0.75\)$", text, re.MULTILINE)
    assert text.count("- written: ") == 2


def test_what_is_known_of_checkpoints_is_shown(tmp_path):
    """Steps and metrics have columns where some checkpoint has them."""
    report = report_of(fives(tmp_path, ["a.pt", "b.pt"]), tmp_path / "o.pt")
    first, second = report.inputs
    report = replace(report, inputs=(first, replace(second, step=1_000_000, metric=0.25)))
    text = markdown(report)
    assert "| checkpoint | size | step | metric | weight |" in text
    assert "| 1000000 | 0.25 | 0.5 |" in text


@pytest.mark.parametrize(
    "name", ["a|b.pt", "`x`.pt", "<b>.pt", "a\nb.pt", "\x1b[31m.pt", "[x](y).pt"]
)
def test_names_stay_names(tmp_path, name):
    """Nothing in a name is Markdown, HTML, or a terminal's control."""
    text = markdown(report_of(fives(tmp_path, [name, "plain.pt"]), tmp_path / "o.pt"))
    row = next(line for line in text.splitlines() if "plain" not in line and ".pt |" in line)
    cell = row.split(" | ")[0]
    assert not re.search(r"[`<>\x1b]|\]\(", cell)
    assert row.count("|") == 4


def test_it_is_added_to_the_file(tmp_path):
    """The file keeps what was there; one that cannot be written is an error."""
    page = tmp_path / "page.md"
    page.write_text("before\n")
    append(page, "after\n")
    assert page.read_text() == "before\nafter\n"
    with pytest.raises(MergeError, match="no summary was written"):
        append(tmp_path, "x")
