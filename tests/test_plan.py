"""merge_avg.plan: units and windows, as values."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merge_avg.align import Aligned
from merge_avg.dtypes import BY_NAME
from merge_avg.errors import MergeError
from merge_avg.layout import File, Layout, Storage, TensorInfo, row_major
from merge_avg.plan import Plan, make_plan, windows
from merge_avg.roles import Name

F32 = BY_NAME["float32"]
FILE = File(Path("f.pt"), 0, 0, 0, 0)


def info(key, storage, start, shape, stride=None, dtype=F32):
    return TensorInfo((key,), dtype, shape, stride or row_major(shape), start, storage)


def planned(*checkpoints: dict[str, TensorInfo], dtype: str | None = None) -> Plan:
    layouts = [
        Layout(Path(f"f{i}.pt"), "torch-zip", (FILE,), tuple(one.values()))
        for i, one in enumerate(checkpoints)
    ]
    rows = {Name((), key): tuple(one.get(key) for one in checkpoints) for key in checkpoints[0]}
    return make_plan(layouts, Aligned(rows, (), frozenset()), dtype)


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


def test_shared_elements_are_one_unit():
    """Tied tensors and overlapping slices are averaged once."""
    storage = Storage("data/0", 64, 16)
    views = {"base": info("base", storage, 0, (4,)), "small": info("small", storage, 0, (2,))}
    (unit,) = planned(views, views).units
    assert {str(name) for name, _ in unit.members} == {"base", "small"}
    assert (unit.start, unit.stop, unit.kind) == (0, 4, "mean")


def test_other_geometry_is_staged():
    """A checkpoint that keeps apart what the template ties is copied together first."""
    storage, one, two = Storage("data/0", 64, 16), Storage("a", 0, 16), Storage("b", 16, 16)
    ours = {"a": info("a", storage, 0, (4,)), "b": info("b", storage, 0, (4,))}
    theirs = {"a": info("a", one, 0, (4,)), "b": info("b", two, 0, (4,))}
    plan = planned(ours, theirs)
    (staging,) = plan.stagings
    assert (staging.checkpoint, staging.tied_in, staging.nbytes) == (1, 0, 16)
    assert plan.units[0].sources[1].storage is None
    (reverse,) = planned(theirs, ours).stagings
    assert (reverse.checkpoint, reverse.tied_in) == (0, 1)


def test_wider_strides_do_not_move_other_tensors():
    """Steps of dimensions with one element do not count as another geometry."""
    storage = Storage("data/0", 64, 16)
    ours = {"a": info("a", storage, 0, (1, 4), (4, 1))}
    theirs = {"a": info("a", storage, 0, (1, 4), (99, 1))}
    assert not planned(ours, theirs).stagings


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"shape": (1,)}, "shape"),
        ({"shape": (2,), "dtype": BY_NAME["bfloat16"]}, "bfloat16"),
        ({"shape": (2,), "dtype": BY_NAME["int32"]}, "int32"),
    ],
)
def test_differences_name_tensor_and_file(other, says):
    """Shapes and dtypes that differ are an error that names tensor, file and both values."""
    storage = Storage("data/0", 64, 8)
    ours, theirs = {"w": info("w", storage, 0, (2,))}, {"w": info("w", storage, 0, **other)}
    with pytest.raises(MergeError, match=rf"f1?.pt: tensor 'w'.*{says}.*f0.pt"):
        planned(ours, theirs)
    if says == "bfloat16":
        assert planned(ours, theirs, dtype="float32").units[0].dtype == F32


def test_quantised_codes_are_refused_and_lora_factors_warned_of():
    """Codes beside their scale have no mean; the mean of factors is not that of products."""
    storage = Storage("data/0", 64, 8)
    codes = {
        "l.weight": info("l.weight", storage, 0, (2,), dtype=BY_NAME["int8"]),
        "l.weight_scale": info("l.weight_scale", Storage("s", 128, 4), 0, (1,)),
    }
    with pytest.raises(MergeError, match="quantised"):
        planned(codes, codes)
    lora = {"l.lora_A.weight": info("l.lora_A.weight", storage, 0, (2,))}
    assert "LoRA" in planned(lora, lora).warnings[0]
