"""merge_avg.plan: units are cut and packed into windows."""

from hypothesis import given
from hypothesis import strategies as st

from merge_avg.checkpoint import BY_NAME, Storage
from merge_avg.plan import batches
from merge_avg.plan._units import make_plan
from merge_avg.plan._windows import windows
from tests.plan.helpers import info, planned, rows_of


@given(
    spans=st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)), min_size=1, max_size=8),
    limit=st.integers(1, 40),
)
def test_units_tile_the_storage_and_windows_tile_the_units(spans, limit):
    """Whatever views tensors take, every element of the storage is in exactly one window."""
    storage = Storage("data/0", 64, 80 * 4)
    views = {str(i): info(str(i), storage, start, (n,)) for i, (start, n) in enumerate(spans)}
    plan = planned(views, views)
    seen: list[int] = []
    for window in windows(plan.units, limit):
        assert sum(piece.stop - piece.start for piece in window) <= limit
        for piece in window:
            seen += range(piece.unit.start + piece.start, piece.unit.start + piece.stop)
    assert sorted(seen) == list(range(80))
    covered = {e for start, n in spans for e in range(start, start + n)}
    meant = {e for u in plan.units if u.kind == "mean" for e in range(u.start, u.stop)}
    assert covered <= meant


@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=6),
    limit=st.sampled_from([1, 2, 4, 8, 16]),
)
def test_batches_hold_whole_chunks(sizes, limit):
    """Windows keep to their limit, and all of a chunk is in one batch, in order."""
    storages = [Storage(str(i), 0, 4 * size) for i, size in enumerate(sizes)]
    ours = {str(i): info(str(i), storages[i], 0, (size,)) for i, size in enumerate(sizes)}
    chunks: dict[tuple[str, int], list[int]] = {}
    for batch in batches(planned(ours, ours).units, limit, 8):
        inside: dict[tuple[str, int], list[int]] = {}
        for window in batch:
            assert 0 < sum(piece.stop - piece.start for piece in window) <= limit
            for piece in window:
                for element in range(piece.start, piece.stop):
                    key = piece.unit.storage.name, element // 8
                    inside.setdefault(key, []).append(element)
        assert not chunks.keys() & inside.keys()
        chunks |= inside
    for (name, number), elements in chunks.items():
        assert elements == list(range(8 * number, min(8 * number + 8, sizes[int(name)])))
    assert sum(map(len, chunks.values())) == sum(sizes)


def test_windows_hold_what_is_alike():
    """Pieces of one window have the same kind, dtypes and checkpoints."""
    storages = [Storage(str(i), 0, 16) for i in range(4)]
    ours = {
        "a": info("a", storages[0], 0, (4,)),
        "n": info("n", storages[1], 0, (4,), dtype=BY_NAME["int32"]),
        "b": info("b", storages[2], 0, (4,)),
        "c": info("c", storages[3], 0, (4,)),
    }
    theirs = {"a": ours["a"], "n": ours["n"], "b": ours["b"]}
    units = make_plan(*rows_of(ours, theirs)).units
    names = [["".join(str(p.unit.members[0][0]) for p in window)] for window in windows(units, 100)]
    assert names == [["ab"], ["n"], ["c"]]
    sizes = [[(p.start, p.stop) for p in window] for window in windows(units[:1] + units[2:3], 3)]
    assert sizes == [[(0, 3)], [(0, 3)], [(3, 4), (3, 4)]]  # whole windows first, then what is left
