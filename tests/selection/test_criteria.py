"""What is asked for: no copies, steps and epochs, the last, the best by a metric."""

import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merge_avg.errors import MergeError, UsageError
from merge_avg.options import Criteria, parse_range
from tests.selection.helpers import bare, lightning, names, select, trainer, why

# Copies


def test_b9_last_is_a_copy(tmp_path):
    """B9: last.ckpt with the content of another checkpoint counts once, and a note says so."""
    for epoch in range(3):
        path = lightning(tmp_path, epoch, epoch * 10)
    shutil.copy(path, tmp_path / "last.ckpt")
    selection = select([tmp_path], Criteria(last=3))
    assert names(selection) == [f"epoch={i}-step={i * 10}.ckpt" for i in range(3)]
    assert why(selection)["last.ckpt"] == "a copy of epoch=2-step=20.ckpt"
    assert any("last.ckpt is a copy" in note for note in selection.notes)


def test_links_are_copies(tmp_path):
    """A checkpoint of the run and a link to it count once."""
    path = bare(tmp_path / "checkpoint1.pt")
    (tmp_path / "checkpoint_last.pt").symlink_to(path)
    assert names(select([tmp_path], Criteria())) == ["checkpoint1.pt"]


def test_same_size_is_not_the_same(tmp_path):
    """Checkpoints without a step that have the same size but different weights all count."""
    for fold in range(3):
        bare(tmp_path / f"fold{fold}.pt", fold)
    assert len(select([tmp_path], Criteria()).paths) == 3


# The best


@pytest.mark.parametrize(("metric", "best"), [("bleu", [20, 30]), ("loss", [10, 20])])
def test_b10_the_best_of_fairseq(tmp_path, metric, best):
    """B10: of BLEU 10, 20, 30 the best two are 20 and 30; of a loss 10 and 20."""
    for value in (10, 20, 30):
        bare(tmp_path / f"checkpoint_best_{metric}_{value}.pt", value)
    selection = select([tmp_path], Criteria(best=2))
    assert names(selection) == [f"checkpoint_best_{metric}_{value}.pt" for value in best]
    word = "highest" if metric == "bleu" else "lowest"
    assert f"best is the {word} {metric}" in selection.notes


def test_the_direction_is_asked_for(tmp_path):
    """A metric whose direction is not obvious needs --mode, which overrides an obvious one too."""
    for value in (1, 2, 3):
        lightning(tmp_path, value, value, f"-quux={value}.0-loss={value}.0")
    with pytest.raises(UsageError, match="'quux' is better is not obvious") as caught:
        select([tmp_path], Criteria(best=1, metric="quux"))
    assert "--mode min" in str(caught.value.hint)
    chosen = select([tmp_path], Criteria(best=1, metric="quux", mode="max"))
    assert names(chosen) == ["epoch=3-step=3-quux=3.0-loss=3.0.ckpt"]
    chosen = select([tmp_path], Criteria(best=1, metric="loss", mode="max"))
    assert names(chosen) == ["epoch=3-step=3-quux=3.0-loss=3.0.ckpt"]


def test_the_metric_is_asked_for(tmp_path):
    """With several metrics, or none, the one that decides has to be named."""
    lightning(tmp_path, 0, 0, "-a=1.0-b=2.0")
    with pytest.raises(UsageError, match="known are 'a', 'b'"):
        select([tmp_path], Criteria(best=1))
    bare(tmp_path / "x.pt")
    with pytest.raises(UsageError, match="depends on a metric; no checkpoint tells one"):
        select([tmp_path / "x.pt"], Criteria(best=1))
    with pytest.raises(MergeError, match=r"has the metric 'quux'\n.*name its log with "):
        select([tmp_path / "x.pt"], Criteria(best=1, metric="quux"))


def test_metrics_from_a_log(tmp_path):
    """A CSV log gives the metric where neither the file nor its name does."""
    for epoch in (1, 2, 3):
        bare(tmp_path / f"checkpoint{epoch}.pt", epoch)
    (tmp_path / "log.csv").write_text("epoch,acc\n1,0.5\n2,0.9\n3,0.8\n")
    criteria = Criteria(best=2, metric="acc", metrics_file=tmp_path / "log.csv")
    assert names(select([tmp_path], criteria)) == ["checkpoint2.pt", "checkpoint3.pt"]


def test_the_best_of_a_trainer(tmp_path):
    """`loss` finds eval_loss, if no other metric ends so, and NaN is never the best."""
    for step, loss in ((1, 0.5), (2, 0.1), (3, float("nan"))):
        trainer(tmp_path, step, loss)
    selection = select([tmp_path], Criteria(best=1, metric="loss"))
    assert names(selection) == ["checkpoint-2"]
    assert why(selection)["checkpoint-3"] == "its metric is not a number"


def test_of_equals_the_later_one_is_better(tmp_path):
    """Of two checkpoints with the same score the later one is better, in both directions."""
    for epoch in (1, 2, 3):
        lightning(tmp_path, epoch, epoch, "-acc=0.5-loss=0.5")
    for metric in ("acc", "loss"):
        chosen = select([tmp_path], Criteria(best=1, metric=metric))
        assert names(chosen) == ["epoch=3-step=3-acc=0.5-loss=0.5.ckpt"]


def test_one_best_per_fold(tmp_path):
    """The best of each folder is taken, whether the folders are named or the one above them."""
    for fold in (1, 2, 10):
        (tmp_path / f"fold{fold}").mkdir()
        for epoch in (1, 2):
            value = 1 - abs(epoch - 1 - fold % 2) / 2
            lightning(tmp_path / f"fold{fold}", epoch, epoch, f"-acc={value}-f={fold}")
    criteria = Criteria(one_best_per_fold=True, metric="acc")
    whole = select([tmp_path], criteria).paths
    assert [path.parent.name for path in whole] == ["fold1", "fold2", "fold10"]
    assert [path.name[:7] for path in whole] == ["epoch=2", "epoch=1", "epoch=1"]
    listed = select([tmp_path / "fold2", tmp_path / "fold1"], criteria).paths
    assert {path.parent.name for path in listed} == {"fold1", "fold2"}
    assert len(listed) == 2


# Steps, epochs and counts


def test_b12_steps_are_numbers(tmp_path):
    """B12: step 10 among 10, 100 and 1000 is one checkpoint."""
    for step in (10, 100, 1000):
        trainer(tmp_path, step)
    assert names(select([tmp_path], Criteria(steps=parse_range("10")))) == ["checkpoint-10"]
    assert names(select([tmp_path], Criteria(steps=parse_range("50:")))) == [
        "checkpoint-100",
        "checkpoint-1000",
    ]
    assert len(select([tmp_path], Criteria(steps=parse_range(":1000:100"))).paths) == 2


def test_steps_that_are_not_there(tmp_path):
    """A range without a checkpoint in it is an error that lists what is there."""
    trainer(tmp_path, 10)
    with pytest.raises(MergeError, match="there are 'checkpoint-10'"):
        select([tmp_path], Criteria(steps=parse_range("20:30")))


@pytest.mark.parametrize("criteria", [Criteria(last=5), Criteria(best=5, metric="loss")])
def test_b14_fewer_than_asked_for(tmp_path, criteria):
    """B14: asking for five where three are is an error that lists them."""
    for epoch in range(3):
        lightning(tmp_path, epoch, epoch, f"-loss={epoch}.0")
    with pytest.raises(MergeError, match=r"5 are asked for, and there are 3 .*epoch=0.*epoch=2"):
        select([tmp_path], criteria)


def test_what_is_needed_and_not_known(tmp_path):
    """The last of files that tell neither step nor epoch is an error, not a guess by time."""
    bare(tmp_path / "a.pt")
    bare(tmp_path / "b.pt", 1)
    with pytest.raises(MergeError, match="its step or epoch is not known"):
        select([tmp_path], Criteria(last=1))


def test_an_interval_lies_between_those_chosen(tmp_path):
    """From the newest back, checkpoints too near to the next chosen one are left out."""
    for step in (10, 20, 25, 50, 55, 60):
        trainer(tmp_path, step)
    selection = select([tmp_path], Criteria(min_interval=20))
    assert names(selection) == ["checkpoint-25", "checkpoint-60"]
    assert why(selection)["checkpoint-55"] == "too near to the next one"


def test_b13_gaps_are_mentioned(tmp_path):
    """B13: the last three of epochs 1, 2, 50 are taken, and the gap is mentioned."""
    for epoch in (1, 2, 50):
        bare(tmp_path / f"checkpoint{epoch}.pt", epoch)
    selection = select([tmp_path], Criteria(last=3))
    assert names(selection) == ["checkpoint1.pt", "checkpoint2.pt", "checkpoint50.pt"]
    assert "there is a gap between epoch 2 and epoch 50 of those chosen" in selection.notes
    assert not select([tmp_path], Criteria(last=2)).notes


@given(st.sets(st.integers(0, 10_000), min_size=1, max_size=9), st.integers(1, 9))
def test_the_last_are_the_highest(tmp_path_factory, steps, count):
    """For any steps, the last N are the N highest, in order, or it is an error."""
    folder = tmp_path_factory.mktemp("run")
    for step in steps:
        bare(folder / f"model_step_{step}.pt", step)
    if count > len(steps):
        with pytest.raises(MergeError, match="asked for"):
            select([folder], Criteria(last=count))
        return
    expected = [f"model_step_{step}.pt" for step in sorted(steps)[-count:]]
    assert names(select([folder], Criteria(last=count))) == expected


@pytest.mark.parametrize(
    "criteria",
    [
        Criteria(last=0),
        Criteria(best=-1, metric="loss"),
        Criteria(min_interval=0),
        Criteria(last=2, best=2),
        Criteria(last=2, one_best_per_fold=True),
        Criteria(best=2, one_best_per_fold=True),
    ],
)
def test_criteria_that_do_not_fit(tmp_path, criteria):
    """Numbers below one, and two ways to choose at once, are usage errors."""
    with pytest.raises(UsageError):
        select([bare(tmp_path / "a.pt")], criteria)


# Ranges, as options spell them


@pytest.mark.parametrize(
    ("text", "bounds"),
    [
        ("1:5", (1, 5, None)),
        (":5", (None, 5, None)),
        ("1:", (1, None, None)),
        ("7", (7, 7, None)),
        ("0:100:10", (0, 100, 10)),
    ],
)
def test_ranges(text, bounds):
    """Bounds are inclusive, and each may be left out."""
    assert parse_range(text) == bounds


@pytest.mark.parametrize("text", ["", "a", "1:2:3:4", "5:1", "1:5:0", "-3:2", "1.5:2"])
def test_other_texts_are_not_ranges(text):
    """Any other text is a usage error that shows how to write a range."""
    with pytest.raises(UsageError, match="range") as caught:
        parse_range(text)
    assert caught.value.hint
