"""merge_avg.plan: units, and the copies that they need, as values."""

from dataclasses import replace
from pathlib import Path

import pytest

from merge_avg.checkpoint import BY_NAME, Layout, Name, Storage
from merge_avg.errors import MergeError
from merge_avg.plan._alignment import Aligned
from merge_avg.plan._sources import Source
from merge_avg.plan._units import aligned_to_page, make_plan, tiled
from tests.plan.helpers import BF16, F32, FILE, info, planned, rows_of


def test_shared_elements_are_one_unit():
    """Tied tensors and overlapping slices are averaged once."""
    storage = Storage("data/0", 64, 16)
    views = {"base": info("base", storage, 0, (4,)), "small": info("small", storage, 0, (2,))}
    (unit,) = planned(views, views).units
    assert {str(name) for name, _ in unit.members} == {"base", "small"}
    assert (unit.start, unit.stop, unit.kind) == (0, 4, "mean")


def test_other_geometry_is_copied():
    """A checkpoint that keeps apart what the template ties is copied together first."""
    storage, one, two = Storage("data/0", 64, 16), Storage("a", 0, 16), Storage("b", 16, 16)
    ours = {"a": info("a", storage, 0, (4,)), "b": info("b", storage, 0, (4,))}
    theirs = {"a": info("a", one, 0, (4,)), "b": info("b", two, 0, (4,))}
    plan = planned(ours, theirs)
    (restride,) = plan.restrides
    assert (restride.checkpoint, restride.tied_in, restride.nbytes) == (1, 0, 16)
    assert plan.units[0].sources[1].storage is None
    (reverse,) = planned(theirs, ours).restrides
    assert (reverse.checkpoint, reverse.tied_in) == (0, 1)


def test_wider_strides_do_not_move_other_tensors():
    """Steps of dimensions with one element do not count as another geometry."""
    storage = Storage("data/0", 64, 16)
    ours = {"a": info("a", storage, 0, (1, 4), (4, 1))}
    theirs = {"a": info("a", storage, 0, (1, 4), (99, 1))}
    assert not planned(ours, theirs).restrides


def test_a_plan_says_what_comes_out():
    """Floats that are averaged get the dtype that was asked for; all others keep theirs."""
    storages = [Storage(str(i), 64, 16) for i in range(3)]
    ours = {
        "w": info("w", storages[0], 0, (4,)),
        "n": info("n", storages[1], 0, (2,), dtype=BY_NAME["int64"]),
        "k": info("k", storages[2], 0, (4,)),
    }
    layouts = [Layout(Path(f"f{i}.pt"), "?", (FILE,), tuple(ours.values())) for i in range(2)]
    rows = {Name((), key): (one, one) for key, one in ours.items()}
    aligned = Aligned(rows, (), frozenset({Name((), "k")}))
    for dtype, expected in (("bfloat16", BF16), ("template", F32), (None, F32)):
        plan = make_plan(layouts, aligned, dtype)
        assert (plan.layouts, plan.aligned, plan.dtype) == (tuple(layouts), aligned, dtype)
        assert (plan.scratch, plan.restrides) == (0, ())
        results = {str(name): plan.result(name).name for name in rows}
        assert results == {"w": expected.name, "n": "int64", "k": "float32"}
        assert plan.converted() == ({storages[0]: BF16} if expected == BF16 else {})
        assert [(unit.kind, unit.dtype.name) for unit in plan.units] == [
            ("mean", expected.name),
            ("equal", "int64"),
            ("keep", "float32"),
        ]
        assert [unit.storage for unit in plan.units] == storages
        assert plan.itemsize == 8


def test_kinds_by_dtype():
    """Floats and complex numbers have a mean; integers and bools have to be equal."""
    for name, kind in (("complex64", "mean"), ("float8_e5m2", "mean"), ("bool", "equal")):
        dtype = BY_NAME[name]
        one = {"w": info("w", Storage("s", 0, 2 * dtype.itemsize), 0, (2,), dtype=dtype)}
        (unit,) = planned(one, one).units
        assert unit.kind == kind


def test_gaps_stay_the_templates():
    """What no weight covers, before, between and behind, is kept from the template's storage."""
    storage, other = Storage("s", 64, 40), Storage("o", 0, 16)
    ours = {"a": info("a", storage, 2, (2,)), "b": info("b", storage, 6, (2,))}
    theirs = {"a": info("a", other, 0, (2,)), "b": info("b", other, 2, (2,))}
    plan = planned(ours, theirs)
    spans = [(unit.kind, unit.start, unit.stop) for unit in plan.units]
    assert spans == [
        ("keep", 0, 2), ("mean", 2, 4), ("keep", 4, 6), ("mean", 6, 8), ("keep", 8, 10)
    ]  # fmt: skip
    for unit in plan.units:
        assert (unit.storage, unit.dtype) == (storage, F32)
        first, *rest = unit.sources
        assert (first.checkpoint, first.storage, first.offset) == (0, storage, 4 * unit.start)
        assert [(s.checkpoint, s.dtype, s.storage) for s in rest] == (
            [(1, F32, other)] if unit.kind == "mean" else []
        )
        if unit.kind == "keep":
            assert unit.members == ()
    assert [unit.sources[1].offset for unit in plan.units if unit.kind == "mean"] == [0, 8]
    alone = planned(ours)
    assert [(unit.kind, unit.start) for unit in alone.units] == [(a, b) for a, b, _ in spans]


def test_neighbours_are_units_of_their_own():
    """Tensors that only touch in a storage are not one unit, whatever their order."""
    storage = Storage("s", 0, 16)
    views = {"b": info("b", storage, 2, (2,)), "a": info("a", storage, 0, (2,))}
    units = planned(views, views).units
    assert [(unit.start, unit.stop, str(unit.members[0][0])) for unit in units] == [
        (0, 2, "a"),
        (2, 4, "b"),
    ]


def test_checkpoints_that_lack_a_tensor_take_no_part():
    """A unit's sources are those that have it, also behind one that has not."""
    one = {"w": info("w", Storage("s", 0, 16), 0, (4,))}
    (unit,) = make_plan(*rows_of(one, {}, one)).units
    assert [source.checkpoint for source in unit.sources] == [0, 2]


def test_restrides_get_rooms_of_their_own():
    """Each copy has its place in the scratch file, on pages of their own; all of it counts."""
    storage = Storage("s", 0, 400_000)
    ours, theirs = {}, {}
    for number in range(3):
        key = "abc"[number]
        ours[key] = info(key, storage, 1 + number * 30_000, (100, 200))
        theirs[key] = info(key, Storage(key, 8, 80_000), 0, (100, 200), (1, 100), dtype=F32)
    plan = planned(ours, theirs, theirs)
    assert [(s.checkpoint, s.offset, s.nbytes, s.tied_in) for s in plan.restrides] == [
        (1 + n % 2, n * 131_072, 80_000, 0) for n in range(6)
    ]
    assert plan.scratch == 6 * 131_072
    means = [unit for unit in plan.units if unit.kind == "mean"]
    for number, (unit, key) in enumerate(zip(means, "abc", strict=True)):
        for index in (1, 2):
            source = unit.sources[index]
            offset = (2 * number + index - 1) * 131_072
            assert source == Source(index, F32, None, offset)
            ((name, part, view),) = plan.restrides[2 * number + index - 1].pairs
            assert (str(name), part) == (key, theirs[key])
            assert view == replace(ours[key], start=0)


def test_a_restride_has_the_dtype_of_its_checkpoint():
    """Tensors that are copied into another geometry keep their own dtype and size."""
    ours = {"w": info("w", Storage("s", 0, 24), 0, (2, 3))}
    theirs = {"w": info("w", Storage("t", 0, 12), 0, (2, 3), (1, 2), dtype=BF16)}
    plan = planned(ours, theirs, dtype="float32")
    (restride,) = plan.restrides
    assert restride.nbytes == 12
    assert restride.pairs[0][2].dtype == BF16
    assert plan.units[0].sources[1] == Source(1, BF16, None, 0)


def test_tiles_go_to_their_corners():
    """A tensor that is stored in tiles is copied tile by tile, each to its offset."""
    tiles = tuple(
        ((row, column), info("t", Storage(f"{row}{column}", 0, 8), 0, (1, 2)))
        for row in range(2)
        for column in (0, 2)
    )
    whole = info("w", Storage("all", 0, 32, tiles=tiles), 0, (2, 4))
    view = info("w", Storage("s", 0, 80), 10, (2, 4), (5, 1))
    found = list(tiled(whole, view))
    assert [part for part, _ in found] == [tile for _, tile in tiles]
    assert [place.start for _, place in found] == [10, 12, 15, 17]
    assert all(place.shape == (1, 2) and place.stride == (5, 1) for _, place in found)
    (alone,) = tiled(replace(view, dtype=BF16), view)
    assert alone == (replace(view, dtype=BF16), replace(view, dtype=BF16))
    with pytest.raises(ValueError, match="shorter"):
        list(tiled(whole, replace(view, stride=(1,))))


def test_pages():
    """Offsets are rounded up to 64 KiB."""
    assert [aligned_to_page(n) for n in (0, 1, 65_536, 65_537)] == [0, 65_536, 65_536, 131_072]


def test_what_has_no_elements_is_no_unit():
    """Empty tensors are neither read nor written."""
    empty = {"e": info("e", Storage("s", 0, 16), 0, (0, 3))}
    assert planned(empty, empty).units == ()


def test_ties_are_checked_wherever_they_are_not():
    """What one checkpoint ties has to agree in all that keep it apart, each pair once."""
    a, b = Storage("a", 0, 80_000), Storage("b", 80_000, 80_000)
    apart = {"x": info("x", a, 0, (20_000,)), "y": info("y", b, 0, (20_000,))}
    tied = {"x": apart["x"], "y": info("y", a, 0, (20_000,))}
    plan = planned(apart, tied, apart, tied)
    assert [(s.checkpoint, s.tied_in, s.offset, s.nbytes) for s in plan.restrides] == [
        (0, 1, 0, 80_000),
        (2, 1, 131_072, 80_000),
    ]
    assert plan.scratch == 262_144
    for restride in plan.restrides:
        assert [(str(name), part, view.start) for name, part, view in restride.pairs] == [
            ("x", apart["x"], 0),
            ("y", apart["y"], 0),
        ]
    shifted = {"x": apart["x"], "y": info("y", a, 1, (19_999,))}
    other = {"x": apart["x"], "y": info("y", b, 0, (19_999,))}
    assert not planned(other, shifted).restrides
    lacking = make_plan(*rows_of(apart, tied, {"x": apart["x"]}))
    assert [s.checkpoint for s in lacking.restrides] == [0]


def test_what_comes_behind_a_checkpoint_that_lacks_it_is_checked():
    """A tensor that one checkpoint lacks is compared, and its ties looked for, in the others."""
    good = info("w", Storage("s", 0, 8), 0, (2,))
    with pytest.raises(MergeError, match=r"tensor 'w' has the shape \[3\]"):
        make_plan(*rows_of({"w": good}, {}, {"w": replace(good, shape=(3,))}))
    a, b = Storage("a", 0, 80), Storage("b", 80, 80)
    apart = {key: info(key, one, 2, (2, 3), (1, 2)) for key, one in (("x", a), ("y", b))}
    tied = {key: info(key, a, 2, (2, 3), (1, 2)) for key in "xy"}
    first = {"e": info("e", a, 0, (0,)), **apart}
    (restride,) = make_plan(*rows_of(first, {"e": first["e"], **tied})).restrides
    assert [(view.start, view.stride, part) for _, part, view in restride.pairs] == [
        (0, (3, 1), apart["x"]),
        (0, (3, 1), apart["y"]),
    ]
