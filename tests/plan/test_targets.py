"""merge_avg.plan: the layout of an output, and targets that fill every slot of it."""

import json
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from merge_avg.checkpoint import PROVENANCE_FILE, Storage, assign
from merge_avg.errors import MergeError, UsageError
from merge_avg.formats import scan
from merge_avg.options import Options
from merge_avg.plan import FILE
from merge_avg.plan._alignment import align
from merge_avg.plan._places import in_place
from merge_avg.plan._targets import OutputLayout, lay_out
from merge_avg.plan._units import Plan, make_plan
from tests.helpers import merge_checkpoints
from tests.plan.helpers import info, planned

# Of each kind of output, the name and the options.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "copy": ("o.pt", {}),
    "directory": ("o", {}),
    "bare": ("o.pt", {"state_dict": True}),
    "safetensors": ("o.safetensors", {}),
    "shards": ("o", {"max_shard_size": 60}),
}


def laid_out(path, kind, dtype=None, exclude=()) -> tuple[Plan, OutputLayout]:
    """The plan of one checkpoint twice, and the layout of an output of a kind."""
    layout = scan(path)
    weights = assign(layout).weights
    aligned = align([path] * 2, [weights] * 2, exclude=exclude)
    plan = make_plan([layout] * 2, aligned, dtype)
    name, options = KINDS[kind]
    return plan, lay_out(path.parent / name, plan, weights, Options(**options))


def filled(plan: Plan, layout: OutputLayout) -> dict[tuple[int, str], list[tuple[int, int]]]:
    """Of each slot the ranges of bytes that targets fill; they lie within their units."""
    found: dict[tuple[int, str], list[tuple[int, int]]] = {}
    for unit, targets in zip(plan.units, layout.targets, strict=True):
        for target in targets:
            assert 0 <= target.start < target.stop <= len(unit)
            view = target.view
            count = target.stop - target.start if view is None else view.numel
            stop = target.at + count * unit.dtype.itemsize
            found.setdefault((target.file, target.slot), []).append((target.at, stop))
    return found


spans = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 9)), min_size=1, max_size=5)


@given(spans, st.sampled_from([None, "bfloat16", "float64"]), st.booleans())
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "directory"])
def test_targets_fill_every_slot_once(tmp_path_factory, kind, views, dtype, excluded):
    """Whatever views tensors take, each byte of each slot has one element of one unit."""
    path = tmp_path_factory.mktemp("t") / "a.pt"
    base, odd = torch.arange(30.0), torch.arange(12.0).view(3, 4).T
    state = {f"k{i}": base[start : start + n] for i, (start, n) in enumerate(views)}
    torch.save({"model": state | {"odd": odd, "n": torch.ones(3, dtype=torch.int64)}}, path)
    try:
        plan, layout = laid_out(path, kind, dtype, ["n"] if excluded else [])
    except MergeError as error:  # a storage of which another dtype gets only a part
        assert "shares memory" in error.what  # noqa: PT017
        return
    found = filled(plan, layout)
    for number, file in enumerate(layout.files.values()):
        for name, slot in file.slots.items():
            end = 0
            for start, stop in sorted(found.pop((number, name), [])):
                assert start == end
                end = stop
            assert end == slot.nbytes
    assert not found
    if kind == "copy":
        for unit, targets in zip(plan.units, layout.targets, strict=True):
            assert sum(target.stop - target.start for target in targets) == len(unit)


@pytest.mark.filterwarnings("ignore")
def test_targets_fill_the_chunks_of_a_set(tmp_path):
    """In a copy of a distributed checkpoint each averaged tensor goes to its chunk."""
    state = {"a": torch.randn(4, 3), "b": torch.ones(5)}
    dcp.save({"model": state}, checkpoint_id=tmp_path / "d", no_dist=True)
    plan, layout = laid_out(tmp_path / "d", "directory")
    sizes = sorted(
        stop - start for ranges in filled(plan, layout).values() for start, stop in ranges
    )
    assert sizes == [20, 48]
    assert set(layout.files) == {".metadata", "__0_0.distcp", PROVENANCE_FILE}
    assert layout.directory
    assert layout.whole


def test_a_unit_in_parts_goes_to_each_part():
    """The elements of a storage in parts go to their parts, at offsets of the result's dtype."""
    parts = (Storage("a", 0, 16, file=1), Storage("b", 64, 24, file=2))
    whole = {"w": info("w", Storage("w", 0, 40, parts=parts), 2, (6,))}
    plan = planned(whole, whole, dtype="bfloat16")
    layout = plan.layouts[0]
    found = [list(in_place(unit, layout)) for unit in plan.units]
    assert [[(t.start, t.stop, t.file, t.slot, t.at) for t in one] for one in found] == [
        [(0, 2, 1, "a", 0)],
        [(0, 2, 1, "a", 4), (2, 6, 2, "b", 0)],
        [(0, 2, 2, "b", 8)],
    ]


def test_a_unit_in_tiles_goes_to_each_tile():
    """Each tile is a strided view of the unit; one with strides in its chunk is refused."""
    tiles = tuple(
        ((0, column), info("w", Storage(f"t{column}", 0, 16), 0, (2, 2))) for column in (0, 2)
    )
    whole = {"w": info("w", Storage("w", 0, 32, tiles=tiles), 0, (2, 4))}
    plan = planned(whole, whole)
    (unit,) = plan.units
    found = list(in_place(unit, plan.layouts[0]))
    assert [(t.slot, t.start, t.view.shape, t.view.stride) for t in found] == [
        ("t0", 0, (2, 2), (4, 1)),
        ("t2", 2, (2, 2), (4, 1)),
    ]
    odd = (((0, 0), info("w", Storage("t", 0, 32), 0, (2, 4), (1, 2))),)
    bad = {"w": info("w", Storage("w", 0, 32, tiles=odd), 0, (2, 4))}
    plan = planned(bad, bad)
    with pytest.raises(MergeError, match="the chunk 't' has strides"):
        list(in_place(plan.units[0], plan.layouts[0]))


def test_a_kept_tensor_cannot_share_what_is_converted(tmp_path):
    """A copy converts whole storages: a tensor that is kept in one of them is named."""
    base = torch.arange(8.0)
    torch.save({"a": base[:4], "b": base[4:]}, tmp_path / "a.pt")
    with pytest.raises(
        MergeError, match=r"tensor 'b' is kept, but shares memory .*converts"
    ) as got:
        laid_out(tmp_path / "a.pt", "copy", "float64", ["b"])
    assert "--weights-only" in str(got.value.hint)
    assert laid_out(tmp_path / "a.pt", "copy", None, ["b"])


def test_shards_hold_what_fits_and_name_it(tmp_path):
    """Shards keep the order and the limit, and the index says which tensor lies where."""
    state = {f"k{i}": torch.full((5,), float(i)) for i in range(5)}
    torch.save({"model": state}, tmp_path / "a.pt")
    _, layout = laid_out(tmp_path / "a.pt", "shards")
    *shards, index, record = layout.files
    assert shards == [f"model-0000{k}-of-00002.safetensors" for k in (1, 2)]
    assert [sum(slot.nbytes for slot in layout.files[one].slots.values()) for one in shards] == [
        60,
        40,
    ]
    ((_, text),) = layout.files[index].literals
    table = json.loads(text)
    assert table["weight_map"] == {f"k{i}": shards[i > 2] for i in range(5)}
    assert table["metadata"] == {"total_size": 100}
    assert record == PROVENANCE_FILE
    assert not layout.whole


def test_the_name_or_the_template_tells_the_format(tmp_path):
    """A copy needs no ending; what is new does, where the template's kind cannot be kept."""
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pt")
    assert set(laid_out(tmp_path / "a.pt", "directory")[1].files) == {FILE}
    save_file({"w": torch.ones(2)}, tmp_path / "a.safetensors")
    assert laid_out(tmp_path / "a.safetensors", "copy")[1].files[FILE].checked  # it is a zip
    with pytest.raises(UsageError, match="the name 'o' does not say which format to write"):
        laid_out(tmp_path / "a.safetensors", "directory")


def test_a_new_file_holds_one_state_dict(tmp_path):
    """Two state dicts have no names in one; the error lists them."""
    torch.save({"a": {"w": torch.ones(2)}, "b": {"w": torch.ones(2)}}, tmp_path / "a.pt")
    with pytest.raises(MergeError, match="can hold one state dict, not 'a', 'b'") as caught:
        laid_out(tmp_path / "a.pt", "safetensors")
    assert caught.value.where == str(tmp_path / "o.safetensors")


@pytest.mark.parametrize("kind", ["safetensors", "bare", "shards"])
def test_a_root_beside_nested_tensors_can_be_written(tmp_path, kind):
    """With --key '', or where all that is nested is excluded; the error says both."""
    state = {"w": torch.ones(2), "b": torch.ones(1), "q._extra_state": {"amax": torch.ones(2)}}
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(MergeError, match=r"one state dict, not '', 'q\._extra_state'") as caught:
        laid_out(tmp_path / "a.pt", kind)
    assert "--key ''" in str(caught.value.hint)
    for options in ({"key": ""}, {"exclude": ["q._extra_state.*"]}, {"exclude": ["amax", "b"]}):
        merge_checkpoints([tmp_path / "a.pt"] * 2, tmp_path / "o.pt", state_dict=True, **options)
        assert set(torch.load(tmp_path / "o.pt")) == {"w", "b"}
        (tmp_path / "o.pt").unlink()


@pytest.mark.parametrize("kind", ["safetensors", "bare", "shards"])
@pytest.mark.parametrize("part", ["conj", "imag"])
def test_lazy_views_are_not_written_anew(tmp_path, kind, part):
    """A new file would hold the bytes without the sign that is pending; a copy keeps both."""
    lazy = torch.tensor([1 + 2j]).conj()
    lazy = lazy if part == "conj" else lazy.imag
    torch.save({"lazy": lazy, "w": torch.ones(9)}, tmp_path / "a")
    with pytest.raises(MergeError, match=r"'lazy' is a lazy view .+ a new file cannot hold"):
        laid_out(tmp_path / "a", kind, exclude=("lazy",))
    merge_checkpoints([tmp_path / "a"] * 2, tmp_path / "o.pt", exclude=("lazy",))
    assert torch.equal(torch.load(tmp_path / "o.pt")["lazy"], lazy)


def test_copies_are_what_is_not_averaged(tmp_path):
    """In a copy, the records without weights are copied from the template."""
    torch.save(
        {"model": {"w": torch.ones(2)}, "optimizer": {"m": torch.ones(9)}}, tmp_path / "a.pt"
    )
    plan, layout = laid_out(tmp_path / "a.pt", "copy")
    assert 36 in {storage.nbytes for _, storage in layout.copies}
    assert {storage for _, storage in layout.copies}.isdisjoint(u.storage for u in plan.units)
