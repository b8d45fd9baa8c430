"""The report as lines of text, and in Markdown for the summary of a CI job."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from merge_avg.errors import MergeError
from merge_avg.report.text import append, lines, markdown
from merge_avg.selection import Candidate
from tests.report.helpers import relatives, report_of, save


def candidate(name, weight=None, **known):
    """Return a candidate of which only this is known, and its weight."""
    return Candidate(Path(name), **known), weight


def vectors(folder, names=("0.pt", "1.pt")):
    """Save vectors of five that differ, one for each name."""
    states = ({"w": torch.full((5,), float(number))} for number in range(len(names)))
    return save(folder, *states, names=names)


def test_every_fact_is_a_line(tmp_path):
    """After the headline there is a line for each fact, its label first."""
    first, *rest = lines(report_of(vectors(tmp_path), tmp_path / "o.pt"))
    assert first == f"averaged 2 checkpoints into {tmp_path / 'o.pt'}"
    assert rest[0] == "  averaged 1 tensor, 5 parameters (float32)"
    assert rest[-1].startswith("  read ")
    assert len(rest) == 2


def test_labels_that_need_a_colon_have_one(tmp_path):
    """Notes and warnings are set off from what they say; other labels begin a sentence."""
    state = {"model": {"w": torch.ones(3), "n": torch.tensor(1)}, "epoch": 3}
    report = report_of(save(tmp_path, state), tmp_path / "o.pt", state_dict=True)
    report = replace(report, notes=("one",), warnings=("another",))
    found = list(lines(report))
    for line in (
        "  integers: 1 tensor equal everywhere, copied",
        "  left out: epoch",
        "  note: one",
        "  warning: another",
    ):
        assert line in found


def test_weights_that_differ_are_shown(tmp_path):
    """Equal weights go without saying; a base that is not averaged has none."""
    paths = relatives(tmp_path)[:2]
    base = tmp_path / "base.pt"
    equal = list(lines(report_of(paths, tmp_path / "o.pt", base=base)))
    assert not any(line.startswith("  weights") for line in equal)
    found = list(lines(report_of(paths, tmp_path / "o.pt", base=base, weights=[1, 3])))
    assert found[1] == "  weights 0.25, 0.75"


def test_candidates_are_a_table(tmp_path):
    """A plan shows each candidate with what is known of it; a run only those beside the inputs."""
    paths = vectors(tmp_path)
    best = candidate("a.ckpt", step=1_234_567, metric=0.25, weight=0.5, why="among the best 2")
    copy = candidate("last.ckpt", step=1_234_567, chosen=False, why="a copy of a.ckpt")
    planned = report_of(paths, tmp_path / "o.pt", dry_run=True)
    found = list(lines(replace(planned, candidates=(best, copy))))
    assert found[1:3] == [
        "  + a.ckpt    step 1234567 metric 0.25 weight 0.5 among the best 2",
        "  - last.ckpt step 1234567                        a copy of a.ckpt",
    ]
    ran = report_of(paths, tmp_path / "o.pt")
    assert not any("a.ckpt" in line for line in lines(replace(ran, candidates=(best, copy))))
    more = replace(ran, candidates=(best, copy, candidate("c.ckpt", chosen=False)))
    assert sum(".ckpt" in line for line in lines(more)) == 3


def test_bars_show_who_does_not_belong(tmp_path):
    """Few checkpoints that differ have a bar each, below the agreement."""
    paths = relatives(tmp_path, count=3, layers=3)
    found = list(lines(report_of(paths, tmp_path / "o.pt")))
    place = next(n for n, line in enumerate(found) if line.startswith("  agreement "))
    bars = found[place + 1 : place + 4]
    assert all(line.startswith(f"    {path} ") for line, path in zip(bars, paths, strict=True))
    assert bars[2].count("#") < bars[0].count("#") == bars[1].count("#")


def test_bars_that_would_look_alike_are_left_out(tmp_path):
    """Checkpoints that agree equally well have no bars, nor have very many."""
    paths = relatives(tmp_path, count=2)
    assert not any("#" in line for line in lines(report_of(paths, tmp_path / "o.pt")))
    report = report_of(paths[:1] * 17, tmp_path / "o.pt")
    many = replace(report.agreement, each=(0.1, *[0.9] * 16))
    assert not any("#" in line for line in lines(replace(report, agreement=many)))


def test_the_table_of_the_readme(tmp_path):
    """The lines that the README shows of a plan are those that it gives, to the letter."""
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    start = readme.index("would average 2 checkpoints into best.ckpt")
    listed = readme[start : readme.index("```", start)].splitlines()
    names = [f"epoch={n}-step={n}00-val_loss={loss}.ckpt" for n, loss in enumerate(LOSSES, 2)]
    known = [{"step": n * 100, "epoch": n, "metric": float(v)} for n, v in enumerate(LOSSES, 2)]
    weighted = {"weight": 0.5, "why": "among the best 2"}
    left = {"chosen": False, "why": "not among the best 2"}
    last = {"step": 400, "epoch": 4, "chosen": False, "why": f"a copy of {names[2]}"}
    candidates = (
        candidate(names[1], **known[1], **weighted),
        candidate(names[2], **known[2], **weighted),
        candidate(names[0], **known[0], **left),
        candidate("last.ckpt", **last),
    )
    report = report_of(vectors(tmp_path), "best.ckpt", dry_run=True)
    found = list(lines(replace(report, candidates=candidates)))
    assert found[: len(listed)] == listed


LOSSES = ("0.333", "0.250", "0.200")


# In Markdown


def test_a_table_of_what_was_averaged(tmp_path):
    """Each checkpoint is a row with its size and weight, and the output is named."""
    text = markdown(report_of(vectors(tmp_path, ["a.pt", "b.pt"]), tmp_path / "o.pt"))
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
    centred = report.centred.mean
    assert f"- from base: {centred:.3f} (exact; by the differences to " in text
    row = next(line for line in text.splitlines() if "base.pt (base)" in line)
    assert row.endswith("| 0 |  |  |")


def test_several_averages_are_columns(tmp_path):
    """Each output has a column of weights, and a line."""
    outputs = {str(tmp_path / "x.pt"): [1, 3], str(tmp_path / "y.pt"): [0, 1]}
    text = markdown(report_of(vectors(tmp_path, ["a.pt", "b.pt"]), outputs))
    assert re.search(r"^\| checkpoint \| size \| in .*x.pt \| in .*y.pt \|$", text, re.MULTILINE)
    assert re.search(r"a\.pt \| .*B \| 0\.25 \| 0 \|", text)
    assert re.search(r"^- written: .*x.pt \(weights 0.25, 0.75\)$", text, re.MULTILINE)
    assert text.count("- written: ") == 2


def test_what_is_known_of_checkpoints_is_shown(tmp_path):
    """Steps and metrics have columns where some checkpoint has them."""
    report = report_of(vectors(tmp_path, ["a.pt", "b.pt"]), tmp_path / "o.pt")
    first, second = report.inputs
    report = replace(report, inputs=(first, replace(second, step=1_000_000, metric=0.25)))
    text = markdown(report)
    assert "| checkpoint | size | step | metric | weight |" in text
    assert "| 1000000 | 0.25 | 0.5 |" in text


@pytest.mark.parametrize(
    "name", ["a|b.pt", "`x`.pt", "<b>.pt", "a\nb.pt", "\x1b[31m.pt", "[x](y).pt"]
)
def test_names_stay_names_in_markdown(tmp_path, name):
    """Nothing in a name is Markdown, HTML, or a terminal's control."""
    text = markdown(report_of(vectors(tmp_path, [name, "plain.pt"]), tmp_path / "o.pt"))
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
