"""Which checkpoints count: no copies, and nothing that a merge has written."""

import shutil

import pytest

from merge_avg import merge_checkpoints
from merge_avg.errors import MergeError
from merge_avg.options import Criteria
from merge_avg.selection._select import select
from tests.selection.helpers import bare, lightning, names, why


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
    assert len(select([tmp_path], Criteria()).chosen) == 3


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
