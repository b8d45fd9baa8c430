"""The report in words: facts, the table of checkpoints, lines of text, and Markdown."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from merge_avg.agreement import LEAST_AGREEMENT
from merge_avg.errors import MergeError
from merge_avg.report.text import (
    append,
    columns,
    facts,
    headline,
    least_agreeing,
    lines,
    markdown,
    messages,
    precision,
    style,
)
from merge_avg.selection import Candidate
from tests.helpers import noise
from tests.report.helpers import relatives, report_of, save


def said(report, **options):
    """Return the facts as pairs of label and value."""
    return [(fact.label, fact.value) for fact in facts(report, **options)]


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Return a function that reports on vectors with a counter, in the current directory."""
    monkeypatch.chdir(tmp_path)
    states = ({"w": torch.full((2500,), float(n)), "n": torch.tensor(n)} for n in range(3))
    names = [path.name for path in save(tmp_path, *states)]

    def report(outputs="o.pt", count=3, **options):
        return report_of(names[:count], outputs, **options)

    return report


def test_one_sentence_says_it(small):
    """The headline counts checkpoints, and names the output or counts those too."""
    assert headline(small(int_policy="max")) == "averaged 3 checkpoints into o.pt"
    assert headline(small(count=1, dry_run=True)) == "would average 1 checkpoint into o.pt"
    several = {f"{name}.pt": [1, 1, 1] for name in "xy"}
    assert headline(small(several, dry_run=True)) == "would average 3 checkpoints into 2 averages"


def test_a_plan_says_what_it_would_take(small):
    """A dry run has sizes, memory and threads where a run has its time."""
    planned = dict(said(small(dry_run=True, threads=2)))
    assert planned["would average"] == "1 tensor, 2,500 parameters (float32, int64)"
    assert planned["integers"] == "1 tensor to compare"
    assert planned["would read"].startswith("30.1 kB and write 12.")  # three inputs, one output
    assert planned["would take"].endswith("MiB of memory beside torch's own, with 2 threads")
    ran = dict(said(small()))
    assert ran["averaged"] == planned["would average"]
    assert ran["read"].startswith("30.1 kB in ")
    assert ran["read"].endswith("B/s)")
    assert not {"would read", "would take"} & ran.keys()


@pytest.mark.parametrize(
    ("policy", "taken"),
    [
        ("max", "the largest value"),
        ("mean", "the rounded mean"),
        ("template", "the template's value"),
        ("error", "the template's value"),
    ],
)
def test_what_became_of_integers(small, policy, taken):
    """Of integers that differ, the fact says which value the output has."""
    value = dict(said(small(int_policy=policy)))["integers"]
    assert value == f"1 tensor with different values, {taken} taken: 'n'"
    assert ("integers", "1 tensor equal everywhere, copied") in said(small(count=1))


@pytest.mark.parametrize("whole", [True, False])
def test_what_is_not_averaged(tmp_path, monkeypatch, whole):
    """Entries are kept from the template or left out; of many, the first are named."""
    monkeypatch.chdir(tmp_path)
    others = {f"epoch_{n}": n for n in range(9)}
    state = {"model": {"w": torch.ones(3)}, "optimizer": {"m": torch.ones(2)}, **others}
    torch.save(state, "a.pt")
    report = report_of(["a.pt"], "o.pt", state_dict=not whole)
    found = dict(said(report))["kept" if whole else "left out"]
    shown = "optimizer (1 tensor, 8 bytes), epoch_0, epoch_1, epoch_2, epoch_3, epoch_4, epoch_5"
    assert found == f"{'from a.pt: ' * whole}{shown}, epoch_6 and 2 more"
    longer = dict(said(report, most=40))["kept" if whole else "left out"]
    assert longer.endswith("epoch_8")


def test_outputs_are_named_with_their_weights(small):
    """Each of several outputs has a fact; a single one is in the headline."""
    outputs = {"x.pt": [1, 3, 0], "y.pt": [0, 1, 1]}
    found = [value for label, value in said(small(outputs)) if label == "written"]
    assert found == ["x.pt (weights 0.25, 0.75, 0)", "y.pt (weights 0, 0.5, 0.5)"]
    assert ("would write", found[0]) in said(small(outputs, dry_run=True))
    assert "written" not in dict(said(small()))


def test_agreement_with_a_base(tmp_path):
    """The cosine has its precision and what it is of; so has the one of the differences."""
    report = report_of(relatives(tmp_path), tmp_path / "o.pt", base=tmp_path / "base.pt")
    found = dict(said(report))
    mean = f"{report.agreement.mean:.3f}"
    assert found["agreement"] == f"{mean} (exact; mean cosine between the checkpoints' matrices)"
    assert found["from base"].endswith(f"(exact; by the differences to {tmp_path / 'base.pt'})")
    # The other layers agree as well as all together, or better.
    assert [value for label, value in said(report) if label == "least"] == [
        f"{least_agreeing(report.agreement, 1)[0].mean:.3f} about 'model.layers.2.weight'"
    ]


def test_a_base_without_differences_is_a_note(tmp_path):
    """Where fewer than two checkpoints differ from the base, that is said in words."""
    paths = relatives(tmp_path)
    report = report_of([paths[0], paths[0]], tmp_path / "o.pt", base=paths[0])
    assert ("note", f"no two checkpoints differ from {paths[0]}") in said(report)
    assert "from base" not in dict(said(report))


def test_messages_end_with_warnings(tmp_path):
    """Tensors that some checkpoint lacks are notes, NaN is a warning, and warnings come last."""
    nan = torch.full((2,), float("nan"))
    paths = save(tmp_path, {"a": nan, "b": torch.ones(3)}, {"a": torch.ones(2)})
    report = report_of(paths, tmp_path / "o.pt", missing="available", allow_nonfinite=True)
    report = replace(report, warnings=("the last word",))
    found = [(fact.label, fact.value, fact.style) for fact in messages(report)]
    assert found[0] == ("note", "'b' is averaged over 1 of 2 checkpoints", "")
    assert found[-2:] == [
        ("warning", "NaN or infinity in 'a'", "doubtful"),
        ("warning", "the last word", "doubtful"),
    ]


def test_precision(tmp_path):
    """Exact figures say so; of a sample the error has one digit, and is not called 0."""
    paths = save(tmp_path, *({"w": noise(number, 400, 500)} for number in range(2)))
    figures = report_of(paths, tmp_path / "o.pt").agreement
    assert precision(figures) == f"sampled, +-{figures.error:.1g}"
    assert precision(replace(figures, error=0.0)) == "sampled, +-0.0001"
    assert precision(replace(figures, elements=figures.size)) == "exact"


def test_cosines_have_a_style():
    """Below the mark a cosine is doubtful, and one that is not known is neither."""
    values = (LEAST_AGREEMENT, LEAST_AGREEMENT - 0.001, -1.0, None)
    assert [style(value) for value in values] == ["good", "doubtful", "doubtful", ""]


def test_the_least_agreeing_come_first(tmp_path):
    """Tensors without a cosine do not count."""
    report = report_of(relatives(tmp_path), tmp_path / "o.pt")
    first, *rest = report.agreement.tensors
    figures = replace(report.agreement, tensors=(replace(first, mean=None), *rest))
    found = least_agreeing(figures, 9)
    assert [tensor.name for tensor in found][:1] == ["model.layers.2.weight"]
    assert [tensor.mean for tensor in found] == sorted(tensor.mean for tensor in rest)


# The table of checkpoints


def test_columns(tmp_path, monkeypatch):
    """Each input has a cell in each column; what is known of none has no column."""
    monkeypatch.chdir(tmp_path)
    names = [path.name for path in relatives(tmp_path)]
    report = report_of(names, "o.pt", base="base.pt", weights=[1, 1, 1, 2])
    first, *rest = report.inputs
    report = replace(report, inputs=(replace(first, step=1_234_567, metric=1 / 3), *rest))
    table = {column.title: column for column in columns(report)}
    titles = "checkpoint format size step metric weight agrees".split()
    assert list(table) == [*titles, "from base"]
    assert table["checkpoint"].cells == (*names, "base.pt (base)")
    assert table["step"].cells == ("1234567", "", "", "", "")
    assert table["metric"].cells == ("0.333333", "", "", "", "")
    assert table["weight"].cells == ("0.2", "0.2", "0.2", "0.4", "0")
    means = [f"{mean:.3f}" for mean in report.agreement.each]
    assert table["agrees"].cells == (*means, "")
    assert [mean for mean, _ in table["agrees"].cosines] == [*report.agreement.each, None]


def test_weights_of_few_outputs_are_columns(small):
    """Up to six outputs have a column each; weights of more are in the facts only."""
    for count in (6, 7):
        report = small({f"x{n}.pt": [n, 1, 1] for n in range(count)}, dry_run=True)
        titles = [column.title for column in columns(report) if column.title.startswith("in ")]
        assert titles == ([f"in x{n}.pt" for n in range(6)] if count == 6 else [])


# As lines


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
    assert rest[:2] == [f"  {tmp_path / f'{number}.pt'} weight 0.5" for number in (0, 1)]
    assert rest[2] == "  averaged 1 tensor, 5 parameters (float32)"
    assert rest[-1].startswith("  read ")
    assert len(rest) == 4


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


def test_each_checkpoint_has_its_weight(tmp_path):
    """Each checkpoint is a line with its weight; a base that is not averaged has none."""
    paths = relatives(tmp_path)[:2]
    base = tmp_path / "base.pt"
    found = list(lines(report_of(paths, tmp_path / "o.pt", base=base, weights=[1, 3])))
    assert found[1:3] == [f"  {paths[0]} weight 0.25", f"  {paths[1]} weight 0.75"]
    assert "base.pt" not in found[3]


def test_many_checkpoints_are_shortened_in_the_middle(tmp_path):
    """Of sixty checkpoints the first and the last are shown, and the others counted, each way."""
    paths = vectors(tmp_path, names=[f"{number:02}.pt" for number in range(60)])
    report = report_of(paths, tmp_path / "o.pt")
    found = [line for line in lines(report) if ".pt" in line][1:]
    assert [Path(line.split()[0]).name for line in found] == [
        f"{number:02}.pt" for number in (*range(8), *range(53, 60))
    ]
    assert "  ... 45 more ..." in lines(report)
    assert sum(".pt |" in line for line in markdown(report).splitlines()) == 15
    assert "| ... 45 more ... |" in markdown(report).replace("&#46;", ".")


def test_many_that_are_left_out_are_counted_by_reason(tmp_path):
    """A plan shows the chosen of many candidates, and a line for each reason of the others."""
    chosen = [candidate(f"{step}.pt", step=step, weight=0.5, why="chosen") for step in (58, 59)]
    older = [candidate(f"{n}.pt", step=n, chosen=False, why="not chosen") for n in range(40)]
    other = [candidate(f"x{n}", chosen=False, why=f"no checkpoint: {n}") for n in range(18)]
    planned = report_of(vectors(tmp_path), tmp_path / "o.pt", dry_run=True)
    found = list(lines(replace(planned, candidates=(*chosen, *older, *other))))
    assert [line.split()[1] for line in found[1:3]] == ["58.pt", "59.pt"]
    assert found[3:5] == ["  - 40 more: not chosen", "  - 18 more: no checkpoint"]


def test_candidates_are_a_table(tmp_path):
    """Each candidate is shown with what is known of it, and why it is left out."""
    paths = vectors(tmp_path)
    best = candidate("a.ckpt", step=1_234_567, metric=0.25, weight=0.5, why="among the best 2")
    copy = candidate("last.ckpt", step=1_234_567, chosen=False, why="a copy of a.ckpt")
    planned = report_of(paths, tmp_path / "o.pt", dry_run=True)
    found = list(lines(replace(planned, candidates=(best, copy))))
    assert found[1:3] == [
        "  + a.ckpt    step 1234567 metric 0.25 weight 0.5 among the best 2",
        "  - last.ckpt step 1234567                        a copy of a.ckpt",
    ]
    chosen = list(lines(replace(planned, candidates=(best,))))
    assert chosen[1] == "  a.ckpt step 1234567 metric 0.25 weight 0.5"  # why goes without saying


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


def test_the_verdict_comes_first(tmp_path):
    """The first fact is the word with its number, and the reason where there is one."""
    paths = relatives(tmp_path, count=2, layers=9)
    label, value = said(report_of(paths, tmp_path / "o.pt"))[0]
    assert (label, re.sub(r"0\.\d{3}", "0.9", value)) == ("verdict", "agree (0.9)")
    states = ({f"w{i}": noise(10 * n + i, 30, 30) for i in range(3)} for n in range(2))
    report = report_of(save(tmp_path, *states), tmp_path / "o.pt")
    label, value = said(report)[0]
    assert label == "verdict"
    assert value == f"strangers ({report.verdict.number:.3f}; {report.verdict.reason})"
    label, value = said(report)[-1]
    assert label == "warning"
    assert value.startswith("strangers: ")
    assert value.endswith("instead (--fail-on strangers makes it an error)")
    assert not dict(said(report_of(paths, tmp_path / "o.pt", dry_run=True))).get("verdict")


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
