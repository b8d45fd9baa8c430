"""merge_avg.plan: tensors that cannot be averaged are refused by name."""

from dataclasses import replace

import pytest

from merge_avg.checkpoint import BY_NAME, Name, Storage
from merge_avg.errors import MergeError
from merge_avg.plan._checks import refuse_quantised
from merge_avg.plan._units import make_plan
from tests.plan.helpers import BF16, F32, info, planned, rows_of


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


def test_bytes_of_two_dtypes_are_refused():
    """A storage that is viewed as two dtypes has no mean; the message names both."""
    storage = Storage("s", 0, 16)
    views = {"a": info("a", storage, 0, (4,)), "b": info("b", storage, 0, (4,), dtype=BF16)}
    with pytest.raises(MergeError, match=r"^f0.pt: 'a', 'b' view the same bytes") as caught:
        planned(views, views)
    assert caught.value.where == "f0.pt"


def test_tensors_that_share_memory_share_their_lot():
    """Kept in part, or lacking in part: both are errors that say which and with what."""
    storage = Storage("s", 0, 16)
    both = {"a": info("a", storage, 0, (4,)), "b": info("b", storage, 0, (4,))}
    with pytest.raises(MergeError, match=r"^f0.pt: 'b' is to be kept, but shares memory with 'a'"):
        make_plan(*rows_of(both, both, skipped="b"))
    (unit,) = make_plan(*rows_of(both, both, skipped="ab"), "bfloat16").units
    assert (unit.kind, unit.dtype) == ("keep", F32)
    with pytest.raises(MergeError, match=r"^f1.pt: it lacks 'b', which shares memory") as caught:
        make_plan(*rows_of(both, {"a": both["a"]}))
    assert "--missing skip" in str(caught.value.hint)


def test_overlaps_that_only_the_template_has_are_refused():
    """A tensor that overlaps itself in the template cannot be copied there."""
    odd = info("w", Storage("s", 0, 24), 0, (2, 3), (1, 1))
    plain = info("w", Storage("s", 0, 24), 0, (2, 3))
    with pytest.raises(MergeError, match=r"^f1.pt: tensor 'w' overlaps itself in f0.pt"):
        planned({"w": odd}, {"w": plain})
    assert not planned({"w": odd}, {"w": odd}).restrides


@pytest.mark.parametrize(
    ("key", "stem", "dtype", "shape", "refused"),
    [
        ("l.weight", "l.weight_scale", "int8", (2,), True),
        ("l.weight", "l.scales", "int8", (2,), True),
        ("l.qweight", "l.qzeros", "int32", (2,), True),
        ("l.weight", "l.g_idx", "int32", (2,), False),
        ("l.weight", "l.weight.absmax", "bool", (2,), False),
        ("l.weight", "l.weight_scale", "int8", (), False),
        ("l.bias", "l.scales", "int8", (2,), False),
        ("l.weight", "l.scaled", "int8", (2,), False),
        ("weight", "scales", "int8", (2,), False),
        ("a.b.l.weight", "a.b.l.scales", "uint8", (2,), True),
        ("l.qweight", "l.scales", "int64", (2,), False),
        ("l.weight", "l.scales", "float16", (2,), False),
    ],
)
def test_what_counts_as_quantised_codes(key, stem, dtype, shape, refused):
    """Small integers beside a scale of the same name, or of the same layer, have no mean."""
    found = BY_NAME[dtype]
    one = {
        key: info(key, Storage("c", 0, 8), 0, shape, dtype=found),
        stem: info(stem, Storage("s", 0, 8), 0, (2,)),
    }
    # A name that only another checkpoint has ends no search.
    layouts, aligned = rows_of(one, one)
    aligned = replace(aligned, rows={Name((), "absent"): (None, None), **aligned.rows})
    if not refused:
        planned(one, one)
        return
    for plan in (lambda: planned(one, one), lambda: refuse_quantised(layouts[0], aligned.rows)):
        with pytest.raises(MergeError, match=rf"^f0.pt: tensor '{key}' holds quantised codes"):
            plan()


@pytest.mark.parametrize(
    ("key", "factor"),
    [
        ("l.lora_A.weight", True),
        ("l.lora_embedding_A", True),
        ("lora_down.weight", True),
        ("l.lora_B.weight", False),
        ("l.flora_Ab", False),
    ],
)
def test_factors_are_known_by_name(key, factor):
    """The A of low-rank products, as PEFT and kohya name it."""
    one = {key: info(key, Storage("s", 0, 8), 0, (2,))}
    plan = planned(one, one)
    assert plan.factors == ({Name((), key)} if factor else frozenset())
    assert bool(plan.warnings) == factor


def test_troubles_and_dtypes_are_named():
    """What cannot be averaged is named with its file; the hint asks for a dtype that holds both."""
    good = info("w", Storage("s", 0, 8), 0, (2,))
    with pytest.raises(MergeError, match="tensor 'w' is a sparse tensor, which cannot"):
        planned({"w": good}, {"w": replace(good, trouble="a sparse tensor")})
    planned({"w": replace(good, trouble=None)}, {"w": good})
    layouts, aligned = rows_of(
        {"w": good}, {"w": replace(good, trouble="a sparse tensor")}, skipped="w"
    )
    make_plan(layouts, aligned)
    for ours, theirs, hint in (
        ("float32", "bfloat16", "--dtype float32"),
        ("float64", "float32", "--dtype float64"),
        ("bfloat16", "float64", "--dtype float64"),
        ("float32", "complex64", "save both with the same dtype"),
        ("int32", "int64", "save both with the same dtype"),
    ):
        one, other = (replace(good, dtype=BY_NAME[name]) for name in (ours, theirs))
        with pytest.raises(MergeError, match=f"^f1.pt: tensor 'w' is {theirs}, in f0.pt") as got:
            planned({"w": one}, {"w": other}, dtype=None)
        assert hint in str(got.value.hint)
    for pair in (("float32", "complex64"), ("int32", "float32")):
        one, other = (replace(good, dtype=BY_NAME[name]) for name in pair)
        with pytest.raises(MergeError, match=r"is (complex64|float32), in f0.pt"):
            planned({"w": one}, {"w": other}, dtype="float32")
