"""The words that every way to show a report has in common."""

from dataclasses import replace

import pytest
import torch

from merge_avg.report._facts import (
    columns,
    facts,
    headline,
    least_agreeing,
    messages,
    precision,
    style,
)
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
    assert [style(value) for value in (0.5, 0.499, -1.0, None)] == [
        "good",
        "doubtful",
        "doubtful",
        "",
    ]


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
        titles = [column.title for column in columns(report) if column.kind == "weight"]
        assert titles == ([f"in x{n}.pt" for n in range(6)] if count == 6 else [])
