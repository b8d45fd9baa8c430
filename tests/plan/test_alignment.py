"""merge_avg.plan: names that meet or not, and tensors that cannot be averaged."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from merge_avg import merge_checkpoints
from merge_avg.checkpoint import BY_NAME, Name, Storage
from merge_avg.errors import MergeError, UsageError
from merge_avg.plan._alignment import is_chosen, match
from merge_avg.plan._units import make_plan
from merge_avg.report.text import lines
from merge_avg.report.values import describe
from tests.plan.helpers import BF16, F32, info, planned, rows_of


@pytest.fixture
def merge(tmp_path):
    def run(*states, **options):
        paths = [tmp_path / f"{i}.pt" for i in range(len(states))]
        for state, path in zip(states, paths, strict=True):
            torch.save({key: torch.tensor(value) for key, value in state.items()}, path)
        result = merge_checkpoints(paths, tmp_path / "out.pt", overwrite=True, **options)
        values = {key: value.tolist() for key, value in torch.load(tmp_path / "out.pt").items()}
        return values, result.job

    return run


def test_patterns_choose_what_is_averaged(merge):
    """--include and --exclude take shell patterns; what they leave out is the template's."""
    states = [
        {"enc.w": 1.0, "enc.b": 1.0, "head.w": 1.0},
        {"enc.w": 3.0, "enc.b": 3.0, "head.w": 3.0},
    ]
    assert merge(*states, include=["enc.*"])[0] == {"enc.w": 2.0, "enc.b": 2.0, "head.w": 1.0}
    assert merge(*states, exclude=["*.b", "head*"])[0] == {
        "enc.w": 2.0,
        "enc.b": 1.0,
        "head.w": 1.0,
    }
    values, job = merge(*states, include=["enc.*"], exclude=["*.b"])
    assert values == {"enc.w": 2.0, "enc.b": 1.0, "head.w": 1.0}
    assert "as not to be averaged: 'enc.b' and 1 more" in job.plan.aligned.notes[0]


def test_what_is_excluded_need_not_match(merge):
    """A head of another shape or name is no obstacle once it is excluded."""
    states = [{"w": 1.0, "head": [1.0, 2.0]}, {"w": 3.0, "head": [1.0]}, {"w": 5.0, "other": 1.0}]
    values, _ = merge(*states, exclude=["head", "other"])
    assert values == {"w": 3.0, "head": [1.0, 2.0]}


def test_a_pattern_that_fits_nothing_is_an_error(merge):
    """The message shows names as patterns see them."""
    with pytest.raises(MergeError, match="no tensor fits") as caught:
        merge({"layer.w": 1.0}, {"layer.w": 2.0}, include=["w"])
    assert "'layer.w'" in str(caught.value.hint)


def test_another_template(merge, tmp_path):
    """--template N copies another of the checkpoints; the mean and the weights stay the same."""
    states = [{"a": 1.0, "n": 10}, {"n": 20, "a": 4.0}, {"a": 7.0, "n": 30}]
    values, job = merge(*states, template=2, weights=[1, 2, 1])
    assert values == {"n": 20, "a": 4.0}
    assert list(values) == ["n", "a"]
    assert job.layouts[0].path == tmp_path / "1.pt"
    assert job.outputs[0].weights.integers == (2, 1, 1)
    values, _ = merge(*states, template=tmp_path / "2.pt", weights=[1, 0, 0], allow_trivial=True)
    assert values == {"a": 1.0, "n": 30}


def test_a_template_that_is_not_averaged(merge, tmp_path):
    """--template PATH takes everything but the weights from a checkpoint beside the inputs."""
    torch.save({"state_dict": {"a": torch.tensor(99.0)}, "epoch": 7}, tmp_path / "frame.ckpt")
    paths = [tmp_path / "x.pt", tmp_path / "y.pt"]
    for value, path in zip((1.0, 2.0), paths, strict=True):
        torch.save({"a": torch.tensor(value)}, path)
    merge_checkpoints(paths, tmp_path / "out.ckpt", template=tmp_path / "frame.ckpt")
    merged = torch.load(tmp_path / "out.ckpt")
    assert merged["state_dict"]["a"].item() == 1.5
    assert merged["epoch"] == 7


@pytest.mark.parametrize("number", [0, 3])
def test_a_template_number_that_does_not_exist(merge, number):
    """Numbers count from one, and the hint says up to where."""
    with pytest.raises(UsageError, match=f"no checkpoint number {number}") as caught:
        merge({"a": 1.0}, {"a": 2.0}, template=number)
    assert "1 to 2" in str(caught.value.hint)


def test_a_checkpoint_without_any_of_the_tensors(merge):
    """--missing available is an error where a checkpoint would add nothing to any mean."""
    states = [{"a": 1.0, "b": 1.0}, {"a": 2.0}, {"c": 3.0}]
    with pytest.raises(MergeError, match=r"2\.pt: it lacks 'a' and 1 more.*\n.*nothing of it"):
        merge(*states, missing="available")


def test_missing_tensors(merge):
    """--missing says what becomes of names that some checkpoint lacks."""
    states = [{"a": 1.0, "b": 1.0}, {"a": 2.0, "b": 3.0}, {"a": 6.0, "c": 9.0}]
    with pytest.raises(MergeError, match="lacks 'b'"):
        merge(*states)
    assert merge(*states, missing="skip")[0] == {"a": 3.0, "b": 1.0}
    values, job = merge(*states, missing="available")
    assert values == {"a": 3.0, "b": 2.0}
    report = describe(job, None)
    assert report.available == {"b": 2}
    assert "  note: 'b' is averaged over 2 of 3 checkpoints" in list(lines(report))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("w", "module.w"),
        ("_orig_mod.module.layer.w", "module._orig_mod.layer.w"),
        ("model._orig_mod.layer.w", "model.layer.w"),
        ("layer.module.w", "layer.w"),
        ("model.layer.w", "layer.w"),
        ("_fsdp_wrapped_module.layer.w", "layer._checkpoint_wrapped_module.w"),
    ],
)
def test_prefixes_of_wrappers_are_looked_through(merge, ours, theirs):
    """Names that differ by wrappers only are the same tensor; the template's names stay."""
    values, job = merge({ours: 1.0, f"{ours}2": 1.0}, {theirs: 3.0, f"{theirs}2": 5.0})
    assert values == {ours: 2.0, f"{ours}2": 3.0}
    assert "were matched without the prefix" in job.plan.aligned.notes[0]


def matched(template, other):
    """The keys of another checkpoint by the template's, and the note; values share no storage."""
    ours, theirs = (
        {Name((), key): info(key, Storage(str(place), 0, 8), 0, (2,)) for key, place in one.items()}
        for one in (template, other)
    )
    column, note = match(Path("a.pt"), ours, Path("b.pt"), theirs)
    return {str(name): one.path[0] for name, one in column.items()}, note


def apart(*keys):
    """Keys of tensors that lie in storages of their own."""
    return {key: number for number, key in enumerate(keys)}


def test_names_that_meet_as_they_are_stay():
    """A prefix is looked through only where more names meet without it."""
    both = apart("module.w", "w")
    assert matched(both, dict(reversed(both.items()))) == ({"w": "w", "module.w": "module.w"}, None)
    found, note = matched(apart("model.w", "x"), apart("model.w", "y"))
    assert (found, note) == ({"model.w": "model.w", "y": "y"}, None)


def test_the_smallest_change_that_helps_is_made():
    """Wrappers are dropped before the prefix of a model is; the note says which."""
    found, note = matched(apart("model.w"), apart("module.model.w"))
    assert found == {"model.w": "module.model.w"}
    assert note == "b.pt: names were matched without the prefixes of wrappers (module., _orig_mod.)"
    found, note = matched(apart("w"), apart("module.model.w"))
    assert found == {"w": "module.model.w"}
    assert note == "b.pt: names were matched without the prefix model."


def test_a_change_that_makes_two_names_one_is_not_made():
    """Where dropping a prefix would confuse two tensors, names stay apart."""
    found, note = matched(apart("v"), apart("model.w", "w"))
    assert (set(found), note) == ({"model.w", "w"}, None)


@pytest.mark.parametrize("kept", ["head", "emb"])
def test_a_tie_that_was_dropped_is_found(kept):
    """A checkpoint that holds one of two tied tensors meets a template that holds both."""
    found, note = matched({"emb": 0, "head": 0, "w": 1}, {kept: 5, "w": 6})
    assert found == {"emb": kept, "head": kept, "w": "w"}
    assert "was matched with the tensor that it is tied to" in str(note)


def test_a_tie_that_the_template_dropped_is_no_extra():
    """The other way round, the second name of a tied tensor is not one too many."""
    found, note = matched({"emb": 0, "w": 1}, {"emb": 5, "head": 5, "w": 6})
    assert found == {"emb": "emb", "w": "w"}
    assert note == "b.pt: 'head' was matched with the tensor that it is tied to"


@pytest.mark.parametrize(
    ("include", "exclude", "chosen"),
    [
        ((), (), True),
        (("enc.*",), (), True),
        (("net.enc.*",), (), True),
        (("dec.*",), (), False),
        (("enc.*",), ("*.w",), False),
        ((), ("net.*",), False),
        (("x|enc.w",), (), False),
        (("x", "enc", "enc.[!v]", "y"), ("enc", "c.w", "enc.w."), True),
        (tuple(f"enc.w{k}*" for k in range(1000)), (), False),
    ],
)
def test_patterns_take_keys_and_whole_names(include, exclude, chosen):
    """A pattern fits a key in its state dict or the name with its path; exclusion wins."""
    assert is_chosen(Name(("net",), "enc.w"), include, exclude) == chosen


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


def test_a_merge_of_nothing_is_an_error(tmp_path):
    """Where no tensor is in every checkpoint, leaving out those that are not leaves none."""
    for number, key in enumerate(("a", "b")):
        torch.save({key: torch.ones(2)}, tmp_path / f"{number}.pt")
    paths = [tmp_path / "0.pt", tmp_path / "1.pt"]
    with pytest.raises(MergeError, match="none of its tensors is in every checkpoint"):
        merge_checkpoints(paths, tmp_path / "o.pt", missing="skip")
    assert not (tmp_path / "o.pt").exists()
