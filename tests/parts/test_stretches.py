"""Stretches have each element and each copy once, wherever they are cut."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from merge_avg.engine._run import largest_chunk
from merge_avg.options import Options
from merge_avg.parts import _stretches
from merge_avg.parts._stretches import Stretch, cut, share
from merge_avg.plan import prepare
from tests.parts.helpers import MAKERS, checkpoints

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.mark.parametrize("kind", MAKERS)
def test_stretches_have_everything_once(tmp_path, kind, monkeypatch):
    """The pieces of all stretches are the units that go anywhere, in order and without a gap."""
    paths = checkpoints(tmp_path, kind, 2)
    job = prepare(paths, tmp_path / f"out{MAKERS[kind][1]}", Options())
    for least in (1, 1 << 20, 1 << 40):
        monkeypatch.setattr(_stretches, "_LEAST", least)
        work = cut(job, largest_chunk(job))
        found = {}
        for stretch in work.stretches:
            pieces = list(work.pieces(stretch))
            assert stretch.nbytes == sum(
                len(piece) * sum(s.dtype.itemsize for s in piece.unit.sources) for piece in pieces
            ) + sum(r.nbytes for _, r in list(job.layout.copies)[slice(*stretch.copies)])
            for piece in pieces:
                assert piece.start == found.get(piece.unit.number, 0)
                assert piece.start % largest_chunk(job) == 0
                found[piece.unit.number] = piece.stop
        placed = [unit for unit in job.plan.units if job.layout.targets[unit.number]]
        assert found == {unit.number: len(unit) for unit in placed}
        assert work.nbytes == job.nbytes
        copied = [k for one in work.stretches for k in range(*one.copies)]
        assert copied == list(range(len(list(job.layout.copies))))
        assert [one.number for one in work.stretches] == list(range(len(work.stretches)))


def test_the_cut_depends_on_neither_memory_nor_threads(tmp_path):
    """Runs that have other windows and workers have the same stretches."""
    paths = checkpoints(tmp_path)
    jobs = [
        prepare(paths, tmp_path / "out.pt", Options(threads=threads, max_memory=memory))
        for threads, memory in ((1, 1 << 24), (2, 1 << 28))
    ]
    assert jobs[0].budget != jobs[1].budget
    ours, theirs = (cut(job, largest_chunk(job)) for job in jobs)
    assert ours.stretches == theirs.stretches
    assert [unit.number for unit in ours.units] == [unit.number for unit in theirs.units]


@given(st.lists(st.integers(0, 1 << 40), max_size=50), st.integers(1, 60))
@settings(max_examples=100)
def test_shares_are_neighbours_of_about_equal_size(sizes, count):
    """Each stretch is in one share, in order, and no share is larger than it must be."""
    stretches = [Stretch(n, (0, 0), (0, 0), (0, 0), size) for n, size in enumerate(sizes)]
    shares = share(stretches, count)
    assert len(shares) == count
    assert [one for some in shares for one in some] == stretches
    largest = max(sizes, default=0)
    for some in shares:
        assert sum(one.nbytes for one in some) <= sum(sizes) / count + largest + 1
