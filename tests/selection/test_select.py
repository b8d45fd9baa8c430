"""Which checkpoints are chosen, which are not, and the words for it."""

from pathlib import Path

import pytest

from merge_avg import merge_checkpoints
from merge_avg.errors import MergeError
from merge_avg.options import Criteria
from merge_avg.selection._select import select
from tests.selection.helpers import bare, lightning, names, why


def test_named_files_are_taken_as_they_are(tmp_path):
    """Files that are named one by one keep their order, copies included, and are not even read."""
    paths = [tmp_path / "b.pt", tmp_path / "a.pt", tmp_path / "b.pt"]
    selection = select(paths, Criteria())
    assert selection.chosen == tuple(paths)
    assert selection.notes == ()


def test_a_run_is_sorted_by_step(tmp_path):
    """A directory of checkpoints stands for all of them, the oldest first, by number."""
    for epoch, step in ((2, 1000), (0, 10), (1, 100)):
        lightning(tmp_path, epoch, step)
    found = names(select([tmp_path], Criteria()))
    assert found == ["epoch=0-step=10.ckpt", "epoch=1-step=100.ckpt", "epoch=2-step=1000.ckpt"]


def test_other_files_of_a_run_are_left_out_with_the_reason(tmp_path):
    """Files of a run that are not checkpoints are in the table, with the reason."""
    lightning(tmp_path, 0, 10)
    (tmp_path / "broken.pt").write_bytes(b"PK\x03\x04 and no more")
    selection = select([tmp_path], Criteria())
    assert names(selection) == ["epoch=0-step=10.ckpt"]
    assert why(selection)["broken.pt"].startswith("no checkpoint:")
    with pytest.raises(MergeError, match="damaged"):
        select([tmp_path / "broken.pt"], Criteria(last=1))


def test_a_missing_file_is_an_error(tmp_path):
    """A path that does not exist is an error that names it."""
    with pytest.raises(MergeError, match="No such file"):
        select([tmp_path / "none.pt", Path("x.pt")], Criteria(last=1))


def test_b9_earlier_outputs_do_not_count(tmp_path):
    """B9: what an earlier merge wrote into the run is left out, and the table says why."""
    paths = [lightning(tmp_path, epoch, epoch) for epoch in range(3)]
    merge_checkpoints(paths, tmp_path / "epoch=9-step=9.ckpt")
    selection = select([tmp_path], Criteria(last=2))
    assert names(selection) == ["epoch=1-step=1.ckpt", "epoch=2-step=2.ckpt"]
    assert why(selection)["epoch=9-step=9.ckpt"] == "an earlier output of merge-avg"


def test_the_output_itself_does_not_count(tmp_path):
    """The file that the merge is to write is not a candidate, whatever is in it."""
    lightning(tmp_path, 0, 1)
    out = bare(tmp_path / "out.pt")
    assert names(select([tmp_path], Criteria(), out)) == ["epoch=0-step=1.ckpt"]


def test_nothing_left_is_an_error(tmp_path):
    """A run that holds only an earlier output is an error that says what is there."""
    bare(tmp_path / "a.pt")
    merge_checkpoints([tmp_path / "a.pt"], tmp_path / "o.pt")
    (tmp_path / "a.pt").unlink()
    with pytest.raises(MergeError, match=r"no checkpoint to average.*o\.pt"):
        select([tmp_path], Criteria())
