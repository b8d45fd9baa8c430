"""Numbers that are not finite, and values that follow from others: copied, or refused by name."""

import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from merge_avg import verify_output
from merge_avg.arithmetic import _mean
from merge_avg.checkpoint import BY_NAME
from merge_avg.engine._diagnose import _SPECIAL, _special
from merge_avg.errors import MergeError
from tests.helpers import bits, load, merge_checkpoints, noise, save

INF, NAN = math.inf, math.nan
FLOATS = ["float64", "float32", "float16", "bfloat16", "float8_e5m2", "complex64"]


@pytest.fixture
def merge(tmp_path):
    """Merge state dicts, verify the output, and return its tensors and the result."""

    def merged(*states, suffix="pt", **options):
        paths = [tmp_path / f"{number}.{suffix}" for number in range(len(states))]
        for state, path in zip(states, paths, strict=True):
            save(state, path)
        out = tmp_path / f"out.{suffix}"
        result = merge_checkpoints(paths, out, overwrite=True, **options)
        assert verify_output(out).output == out
        return load(out), result

    return merged


def odd(dtype, seed=0):
    """A tensor of noise with infinities and NaN of unusual bits at the same places."""
    dtype = getattr(torch, dtype)
    values = noise(seed, 3000).to(dtype)
    real = torch.view_as_real(values).view(-1) if dtype.is_complex else values
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[real.itemsize]
    for place, number in ((0, INF), (7, -INF), (2048, NAN), (2999, -INF)):
        real[place : place + 1] = torch.tensor([number]).to(real.dtype)
    real.view(words)[2049] = real.view(words)[2048] ^ 1  # NaN of other bits
    return values


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("route", ["loops", "cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("weights", [None, [1, 2, 0.123456789123], [2, -1, 1]])
def test_what_is_the_same_everywhere_is_copied_to_the_bit(
    merge, monkeypatch, dtype, route, weights
):
    """Infinities and NaN of any bits stay; all other elements are what they were without them."""
    if route != "loops":
        monkeypatch.setattr(_mean, "LOOPS", None)
    options = {"weights": weights, "normalize": weights is None or min(weights) > 0}
    options |= {"device": "cuda"} if route == "cuda" else {}
    states = [{"w": odd(dtype, seed), "v": noise(seed, 5)} for seed in range(3)]
    found, result = merge(*states, **options)
    real = [torch.view_as_real(s["w"]).view(-1) if s["w"].is_complex() else s["w"] for s in states]
    mine = torch.view_as_real(found["w"]).view(-1) if found["w"].is_complex() else found["w"]
    places = [0, 7, 2048, 2049, 2999]
    assert [bits(mine[k : k + 1]) for k in places] == [bits(real[0][k : k + 1]) for k in places]
    for state in states:
        part = torch.view_as_real(state["w"]).view(-1) if state["w"].is_complex() else state["w"]
        part.view(WORDS[part.itemsize])[places] = 0
    plain, _ = merge(*states, **options)
    other = torch.view_as_real(plain["w"]).view(-1) if plain["w"].is_complex() else plain["w"]
    rest = [k for k in range(len(mine)) if k not in places]
    mine, other = (one.view(WORDS[one.itemsize]) for one in (mine, other))
    assert bits(mine[rest]) == bits(other[rest])
    assert torch.equal(found["v"], plain["v"])
    assert result.nonfinite == ("w",)  # NaN is told


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_causal_mask_and_observers_are_copied_without_a_word(merge, suffix):
    """Infinities alone are what somebody meant; with weights of one file as well."""
    mask = torch.full((1, 1, 4, 4), -INF).triu(1)
    states = [
        {"w": torch.full((3, 3), k), "mask": mask, "min": torch.tensor(INF)} for k in (1.0, 3.0)
    ]
    for some in (states, states[:1]):
        found, result = merge(*some, suffix=suffix)
        assert bits(found["mask"]) == bits(mask)
        assert found["min"].item() == INF
        assert found["w"].mean() == len(some)
        assert result.nonfinite == ()
        assert result.agreement is None or result.agreement.mean == pytest.approx(1)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_what_is_copied_is_converted(merge, dtype):
    """With --dtype an infinity stays one, of its sign, and NaN is the usual one."""
    states = [{"w": odd("float32", seed)} for seed in range(2)]
    found, _ = merge(*states, dtype=dtype)
    want = states[0]["w"].to(getattr(torch, dtype))
    assert torch.equal(found["w"].isnan(), want.isnan())
    assert torch.equal(found["w"][[0, 7, 2999]], want[[0, 7, 2999]])
    if dtype == "float32":
        assert bits(found["w"][2048:2050]) == bits(want[2048:2050])


def test_mixed_dtypes_agree_on_infinities(merge):
    """An infinity is the same in float32 and bfloat16."""
    mask = torch.full((4, 4), -INF).triu(1)
    found, _ = merge({"m": mask}, {"m": mask.bfloat16()}, dtype="float32")
    assert bits(found["m"]) == bits(mask)


def test_several_outputs_each_look_at_their_own(tmp_path):
    """An output of checkpoints that share an infinity has it, whatever the others hold."""
    paths = [tmp_path / f"{k}.pt" for k in range(3)]
    for number, path in enumerate(paths):
        save({"w": torch.tensor([INF if number < 2 else 1.0, float(number)])}, path)
    merge_checkpoints(paths, {tmp_path / "a.pt": [1, 1, 0], tmp_path / "b.pt": [1, 3, 0]})
    assert load(tmp_path / "a.pt")["w"].tolist() == [INF, 0.5]
    assert load(tmp_path / "b.pt")["w"].tolist() == [INF, 0.75]
    with pytest.raises(MergeError, match=r"0\.pt: tensor 'w' .*\(1 element of those read"):
        merge_checkpoints(
            paths, {tmp_path / "a.pt": [1, 1, 0], tmp_path / "b.pt": [1, 1, 1]}, overwrite=True
        )


def test_tensors_that_few_have_and_templates_without_a_weight(merge):
    """What counts is what the averaged checkpoints that have a tensor hold."""
    states = [
        {"w": torch.tensor([1.0, 5]), "m": torch.tensor([7.0])},
        {"w": torch.tensor([INF, 1])},
    ]
    states.append({"w": torch.tensor([INF, 3]), "m": torch.tensor([-INF])})
    found, _ = merge(*states, weights=[0, 1, 1], missing="available")
    assert found["w"].tolist() == [INF, 2]
    assert found["m"].tolist() == [-INF]


@pytest.mark.parametrize(
    ("values", "where"),
    [
        ([1, NAN], "1.pt"),
        ([NAN, 1], "0.pt"),
        ([INF, -INF], "0.pt"),
        ([INF, NAN], "0.pt"),
        ([1, 1, INF], "2.pt"),
        ([INF, INF, 1], "0.pt"),
    ],
)
@pytest.mark.parametrize(
    "options", [{}, {"dtype": "bfloat16"}, {"normalize": False, "weights": [1, 1, 1]}]
)
def test_what_some_have_otherwise_is_refused(merge, values, where, options):
    """The file and the tensor are named; --allow-nonfinite follows IEEE 754."""
    if "weights" in options:
        options = options | {"weights": [1] * len(values)}
    states = [{"v": torch.ones(3), "w": torch.tensor([2.0, value, -INF])} for value in values]
    with pytest.raises(
        MergeError, match=r"tensor 'w' holds NaN or infinity \(1 element of those read at once"
    ) as caught:
        merge(*states, **options)
    assert str(caught.value.where).endswith(where)
    found, result = merge(*states, allow_nonfinite=True, **options)
    assert not found["w"][1].isfinite()
    assert result.nonfinite == ("w",)


def test_what_does_not_fit_is_refused_beside_what_is_copied(merge):
    """An infinity that is the same everywhere hides no mean that overflows."""
    states = [{"w": torch.tensor([INF, 1e6 * k])} for k in (1, 2)]
    with pytest.raises(MergeError, match="the mean of tensor 'w' does not fit float16"):
        merge(*states, dtype="float16")
    found, _ = merge(*[{"w": torch.tensor([INF, 6e4])}] * 2, dtype="float16")
    assert found["w"].tolist() == [INF, 60000]


def test_holes_between_tensors_may_hold_anything(tmp_path):
    """Elements that no tensor has are the template's, finite or not."""
    for number in range(2):
        flat = torch.tensor([1.0, NAN if number else INF, 3.0, 2.0 * number])
        torch.save({"w": flat[::2], "v": flat[3:]}, tmp_path / f"{number}.pt")
    merge_checkpoints([tmp_path / "0.pt", tmp_path / "1.pt"], tmp_path / "o.pt")
    found = torch.load(tmp_path / "o.pt")
    assert found["w"].tolist() == [1, 3]
    assert found["v"].tolist() == [1]


def spectral(kind, seed, power=9):
    """A layer under spectral norm, of weights that are near each other."""
    torch.manual_seed(seed)
    layer = nn.ConvTranspose2d(4, 6, 3) if kind == "transposed" else nn.Linear(8, 6)
    with torch.no_grad():
        layer.weight.copy_(noise(99, *layer.weight.shape) + 0.01 * noise(seed, *layer.weight.shape))
    norm = parametrizations.spectral_norm if kind == "new" else nn.utils.spectral_norm
    layer = norm(layer, n_power_iterations=power)
    layer(torch.randn(2, 4, 5, 5) if kind == "transposed" else torch.randn(2, 8))
    return layer


@pytest.mark.filterwarnings("ignore:.*spectral_norm.*deprecated:FutureWarning")
@pytest.mark.parametrize("kind", ["old", "new", "transposed"])
def test_vectors_of_spectral_norm_are_refused_where_they_differ(merge, kind):
    """The hint's way out keeps the template's; vectors that are the same are averaged."""
    states = [
        {k: v.detach() for k, v in spectral(kind, seed).state_dict().items()} for seed in (1, 2)
    ]
    with pytest.raises(
        MergeError, match="is of unit length, as vectors of spectral norm"
    ) as caught:
        merge(*states)
    assert "_u' --exclude '" in str(caught.value.hint)
    found, _ = merge(*states, exclude=["*_u", "*_v"])
    ours = [name for name in states[0] if name.endswith(("_u", "_v"))]
    assert all(torch.equal(found[name], states[0][name]) for name in ours)
    states[1] |= {name: states[0][name] for name in ours}
    found, _ = merge(*states)
    assert all(torch.equal(found[name], states[0][name]) for name in ours)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unit_vectors_of_any_name_are_told_by_their_length(merge, dtype):
    """u0 of BigGAN is refused; a vector of the same shape and another length has a mean."""
    states = [{"c.weight": noise(k, 6, 4), "c.u0": noise(k, 1, 6)} for k in range(2)]
    states = [{name: value.to(dtype) for name, value in state.items()} for state in states]
    found, _ = merge(*states)
    exact = (states[0]["c.u0"].double() + states[1]["c.u0"].double()) / 2
    assert torch.equal(found["c.u0"], exact.to(dtype))
    for state in states:
        state["c.u0"] = nn.functional.normalize(state["c.u0"].float()).to(dtype)
    with pytest.raises(MergeError, match=r"tensor 'c\.u0' is of unit length") as caught:
        merge(*states)
    assert "--exclude '*u0'" in str(caught.value.hint)


@pytest.mark.parametrize("part", ["base", "mask"])
def test_parts_of_other_parametrizations_are_told_by_their_values(merge, part):
    """Bases that are orthogonal, and masks, have no mean where they differ."""
    states = []
    for seed in range(2):
        base = (
            torch.linalg.qr(noise(seed, 8, 8))[0]
            if part == "base"
            else (noise(seed, 8, 8) > 0).float()
        )
        names = (f"l.parametrizations.weight.{one}" for one in ("original", f"0.{part}"))
        states.append(dict(zip(names, (noise(seed, 8, 8), base.contiguous()), strict=True)))
    said = "of unit length" if part == "base" else "a mask of zeros and ones"
    with pytest.raises(MergeError, match=f"'l.parametrizations.weight.0.{part}' is {said}"):
        merge(*states)
    states[1][f"l.parametrizations.weight.0.{part}"] *= 0.9
    merge(*states)


def pruned(seed, amount=0.3):
    """A pruned layer."""
    torch.manual_seed(seed)
    layer = nn.Linear(8, 6)
    prune.l1_unstructured(layer, "weight", amount=amount)
    return layer


def test_masks_of_pruning_are_refused_where_they_differ(merge):
    """Made permanent, the pruned weights have the mean that they should."""
    layers = [pruned(1), pruned(2)]
    with pytest.raises(MergeError, match="'weight_mask' is a mask of zeros and ones") as caught:
        merge(*[layer.state_dict() for layer in layers])
    assert "prune.remove" in str(caught.value.hint)
    assert "--exclude '*weight_mask'" in str(caught.value.hint)
    means = sum(layer.weight.detach().double() for layer in layers) / 2
    for layer in layers:
        prune.remove(layer, "weight")
    found, _ = merge(*[layer.state_dict() for layer in layers])
    assert torch.equal(found["weight"], means.float())


def test_the_same_mask_gives_the_mean_of_the_products(merge):
    """With one mask, the mean of the weights below it is that of the pruned ones."""
    states = [pruned(1).state_dict(), pruned(2).state_dict()]
    states[1]["weight_mask"] = states[0]["weight_mask"]
    found, _ = merge(*states)
    products = [s["weight_orig"].double() * s["weight_mask"] for s in states]
    means = ((products[0] + products[1]) / 2).float()
    assert torch.equal(found["weight_orig"] * found["weight_mask"], means)


def test_learned_masks_have_a_mean(merge):
    """A tensor that is called a mask and holds other numbers is a weight."""
    states = [{"mask_token": noise(k, 1, 1, 8), "cls_token": noise(k + 5, 1, 1, 8)} for k in (0, 1)]
    found, _ = merge(*states)
    exact = (states[0]["mask_token"].double() + states[1]["mask_token"].double()) / 2
    assert torch.equal(found["mask_token"], exact.float())


@pytest.mark.parametrize(("same", "warned"), [("A", False), ("B", False), ("", True)])
def test_the_warning_of_factors_takes_two_that_differ(merge, same, warned):
    """Where one factor is the same everywhere, the product of means is the mean of products."""
    states = [
        {
            "q.weight": noise(9, 16, 16),
            "q.into": noise(0 if same == "A" else k, 2, 16),
            "q.out_of": noise(5 if same == "B" else k + 6, 16, 2),
        }
        for k in range(2)
    ]
    _, result = merge(*states)
    assert any("LoRA" in text for text in result.warnings) == warned


def test_opaque_state_is_the_template_s(merge):
    """Of another length, dtype or content, or absent: torch's own name for what is no weight."""
    theirs = [torch.arange(5).byte(), torch.arange(9).byte() + 7, torch.ones(3), None]
    states = [
        {"l.weight": torch.full((2, 2), float(k))} | ({} if t is None else {"l._extra_state": t})
        for k, t in enumerate(theirs)
    ]
    found, result = merge(*states)
    assert torch.equal(found["l._extra_state"], theirs[0])
    assert found["l.weight"].mean() == 1.5
    said = "kept from the template, as state of a module beside weights: 'l._extra_state'"
    assert said in result.job.plan.aligned.notes


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_counters_of_one_element_may_differ(merge, shape):
    """A place in a queue is the template's, as the number of batches is."""
    states = [{"w": torch.ones(2), "queue_ptr": torch.full(shape, 64 * k)} for k in (1, 2)]
    found, result = merge(*states)
    assert found["queue_ptr"].item() == 64
    assert result.differing == ("queue_ptr",)
    states[1]["queue_ptr"] = torch.tensor([1, 2])
    states[0]["queue_ptr"] = torch.tensor([2, 1])
    with pytest.raises(MergeError, match="int64 tensor 'queue_ptr' holds 1") as caught:
        merge(*states)
    assert "--exclude 'queue_ptr'" in str(caught.value.hint)


def test_the_state_of_a_metric_is_named_with_its_way_out(merge):
    """Shapes and integers that differ are errors whose hint leaves all metrics out."""
    states = [{"w": torch.ones(2), "val_metrics.acc.preds": torch.ones(k)} for k in (1, 2)]
    with pytest.raises(MergeError, match="has the shape") as caught:
        merge(*states)
    assert caught.value.hint == "--exclude 'val_metrics.*' keeps the template's"
    found, _ = merge(*states, exclude=["val_metrics.*"])
    assert torch.equal(found["val_metrics.acc.preds"], torch.ones(1))


REAL = [name for name in _SPECIAL if BY_NAME[name].kind == "float"]
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@pytest.mark.parametrize("name", REAL)
def test_what_is_not_finite_is_found_and_converted_as_by_torch(name):
    """Of every float8 and float16, and of wide numbers with all kinds of NaN, into every dtype."""
    dtype = getattr(torch, name)
    if dtype.itemsize <= 2:
        every = torch.arange(1 << 8 * dtype.itemsize, dtype=torch.int32)
        values = every.to(WORDS[dtype.itemsize]).view(dtype)
    else:
        plain = torch.tensor([0, -0.0, 1, 1e-40, 3e38, INF, -INF, NAN], dtype=dtype)
        words = plain.view(WORDS[dtype.itemsize])
        odd = [words, words ^ 1, words | 5, ~words, words | 1 << 8 * dtype.itemsize - 2]
        values = torch.cat(odd).view(dtype)
    wide = values.float() if dtype.itemsize == 1 else values
    for other in REAL:
        target = getattr(torch, other)
        expected = values.to(target).view(WORDS[target.itemsize])
        if target != dtype:
            if other == "float8_e4m3fn":  # older releases of torch have NaN for infinity here
                expected = wide.clamp(-448, 448).to(target).view(WORDS[1])
            usual = torch.tensor([NAN], dtype=target).view(WORDS[target.itemsize])
            expected = expected.where(~wide.isnan(), usual)
        expected = expected.where(~wide.isfinite(), 0)
        found = _special(bits(values), BY_NAME[name], BY_NAME[other])
        assert found == bits(expected), other
