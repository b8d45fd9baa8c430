"""Several averages: which checkpoints go into each, and what it is called."""

from pathlib import Path, PureWindowsPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merge_avg.errors import UsageError
from merge_avg.options import Series
from merge_avg.selection._series import distinct_names, members, outputs


def folds(count):
    return [Path(f"fold{i}.pt") for i in range(1, count + 1)]


def test_leave_one_out_has_an_average_for_each_checkpoint():
    """Each average has all checkpoints but the one that it is named after."""
    found = members(folds(3), Series(leave_one_out=True))
    assert found == {"without-fold1": (1, 2), "without-fold2": (0, 2), "without-fold3": (0, 1)}


def test_prefixes_begin_with_two():
    """The first average is of two checkpoints, and the last one of all."""
    found = members(folds(4), Series(prefixes=True))
    assert found == {"first-2": (0, 1), "first-3": (0, 1, 2), "first-4": (0, 1, 2, 3)}


def test_several_numbers_of_last_ones():
    """Each number gives an average of so many of the newest checkpoints."""
    found = members(folds(5), Series(lasts=(3, 5, 3)))
    assert found == {"last-3": (2, 3, 4), "last-5": (0, 1, 2, 3, 4)}


@pytest.mark.parametrize(("size", "stride"), [(2, 1), (3, 2), (5, 9)])
def test_windows_slide_over_the_run(size, stride):
    """Each has as many neighbours by age, and is named by its last; a stride leaves some out."""
    order = (4, 2, 0, 1, 3)
    found = members(folds(5), Series(sliding=(size, stride)), order)
    assert list(found.values()) == [order[at : at + size] for at in range(0, 6 - size, stride)]
    assert list(found) == [f"fold{chosen[-1] + 1}" for chosen in found.values()]
    stepped = members(folds(5), Series(sliding=(size, stride)), order, [30, 40, 20, 50, 10])
    assert next(iter(stepped)) == f"step-{[30, 40, 20, 50, 10][order[size - 1]]}"
    assert list(stepped.values()) == list(found.values())


@pytest.mark.parametrize("series", [Series(), Series(lasts=(3,))])
def test_otherwise_there_is_one_average_of_all(series):
    """Without a series, or with one number that the selection has seen to, all are averaged."""
    assert members(folds(3), series) == {"": (0, 1, 2)}


@pytest.mark.parametrize(
    ("series", "count", "words"),
    [
        (Series(leave_one_out=True), 1, "at least two checkpoints"),
        (Series(lasts=(2, 9)), 3, "last=9 of 3 checkpoints"),
        (Series(sliding=(4, 1)), 3, "sliding=4 of 3 checkpoints"),
        (Series(lasts=(0, 2)), 3, "last=0 of 3 checkpoints"),
    ],
)
def test_what_cannot_be_is_refused(series, count, words):
    """Series that ask for more than there is are a usage error."""
    with pytest.raises(UsageError, match=words):
        members(folds(count), series)


@given(st.integers(2, 12), st.sampled_from(["leave_one_out", "prefixes"]))
def test_every_average_has_a_place_of_its_own(count, kind):
    """Each average has an output of its own, with a weight of 0 for checkpoints left out."""
    groups = members(folds(count), Series(**{kind: True}))
    table = outputs(Path("out/avg-{name}.pt"), groups, count, lambda chosen: [1] * len(chosen))
    assert len(table) == len(groups)
    for row, chosen in zip(table.values(), groups.values(), strict=True):
        assert tuple(i for i, weight in enumerate(row) if weight) == tuple(chosen)


def test_weights_go_where_their_checkpoints_are():
    """The weights of an average's checkpoints are given in their order."""
    groups = {"a": (0, 2), "b": (1, 2)}
    table = outputs(Path("{name}.pt"), groups, 3, lambda chosen: [10 + i for i in chosen])
    assert table == {Path("a.pt"): (10, 0, 12), Path("b.pt"): (0, 11, 12)}


def test_several_averages_need_a_pattern():
    """Without {name} in the output, all averages would have the same path: a usage error."""
    groups = members(folds(3), Series(leave_one_out=True))
    with pytest.raises(UsageError, match="3 averages need as many outputs") as caught:
        outputs(Path("avg.pt"), groups, 3, lambda chosen: [1] * len(chosen))
    assert "{name}" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("given_", "names"),
    [
        (["a/x.pt", "a/y.pt"], ("x", "y")),
        (["fold1/best.ckpt", "fold2/best.ckpt"], ("fold1-best", "fold2-best")),
        (["run/epoch=1-loss=0.5.ckpt", "run/epoch=2-loss=0.4.ckpt"], None),
        (["/x.pt", "/a/x.pt"], ("-x", "a-x")),
        (["same.pt", "same.pt"], ("1-same", "2-same")),
        ([".", "x.pt"], (Path.cwd().name, "x")),
        (["..", "x.pt"], (Path.cwd().parent.name, "x")),
    ],
)
def test_names_tell_checkpoints_apart(given_, names):
    """A name has as many parts of the path as needed, or a number where nothing else differs."""
    found = distinct_names([Path(one) for one in given_])
    assert len(set(found)) == len(given_)
    assert names is None or found == names


def test_a_drive_is_no_part_of_a_name():
    """On Windows too a name is fit for a file, however much of the paths it takes."""
    found = distinct_names([PureWindowsPath("C:\\x.pt"), PureWindowsPath("C:\\a\\x.pt")])
    assert found == ("-x", "a-x")
