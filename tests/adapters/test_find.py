"""Factors are found by their names and shapes; what is no product of two is refused by name."""

import json

import pytest
import torch
from safetensors.torch import save_file

from merge_avg.errors import MergeError, UsageError
from tests.adapters.helpers import distance, factors, tail, write_peft
from tests.helpers import merge_checkpoints, noise

A, B = "q.lora_A.weight", "q.lora_B.weight"


def pair(folder, *states):
    """Write two checkpoints of some state dicts; the second is by default the first."""
    paths = [folder / f"{k}.pt" for k in range(2)]
    for path, state in zip(paths, [*states, states[0]], strict=False):
        torch.save(state, path)
    return paths


def plain(**more):
    """Return one product, and what else there is."""
    names = {name.replace("__", "."): value for name, value in more.items()}
    return {A: noise(1, 2, 9), B: noise(2, 7, 2), **names}


OTHERS = {
    "DoRA": {"q.lora_magnitude_vector.weight": noise(3, 7)},
    "DoRA of kohya": {"q.dora_scale": noise(3, 7, 1)},
    "a middle factor": {"q.lora_mid.weight": noise(3, 2, 2, 3, 3)},
    "a bias of B": {"q.lora_B.bias": noise(3, 7)},
    "AdaLoRA": {"q.lora_E": noise(3, 2, 1)},
    "LoHa": {"v.hada_w1_a": noise(3, 9, 2), "v.hada_w1_b": noise(4, 2, 9)},
    "LoKr": {"v.lokr_w1": noise(3, 2, 2), "v.lokr_w2": noise(4, 4, 4)},
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_kinds_are_refused(tmp_path, name):
    """Tensors of an adapter beside the two factors are named, with a way on."""
    paths = pair(tmp_path, plain() | OTHERS[name])
    with pytest.raises(MergeError, match="not the product of two matrices") as caught:
        merge_checkpoints(paths, tmp_path / "o.pt", lora="exact")
    assert next(iter(OTHERS[name])) in str(caught.value)
    assert "--lora factors" in caught.value.hint
    assert sorted(tmp_path.iterdir()) == paths


SETTINGS = {
    "PiSSA": {"init_lora_weights": "pissa_niter_4"},
    "DoRA": {"use_dora": True},
    "biases of B": {"lora_bias": True},
    "target_parameters": {"target_parameters": ["experts"]},
    "LOHA": {"peft_type": "LOHA"},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_other_kinds_are_refused(tmp_path, name):
    """What adapter_config.json says counts too."""
    state = factors(0, (2, 2, 2), "peft")
    paths = [write_peft(tmp_path / k, state, r=2, lora_alpha=2, **SETTINGS[name]) for k in "ab"]
    with pytest.raises(MergeError, match="pissa" if name == "PiSSA" else name):
        merge_checkpoints(paths, tmp_path / "o", lora="rank:2")


def test_an_adapter_without_factors_is_named_by_its_settings(tmp_path):
    """A folder of IA3 is refused as IA3."""
    state = {"base_model.model.q.ia3_l": noise(1, 7, 1)}
    paths = [write_peft(tmp_path / k, state) for k in "ab"]
    for path in paths:
        (path / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    with pytest.raises(MergeError, match="an adapter with IA3"):
        merge_checkpoints(paths, tmp_path / "o", lora="exact")


BROKEN = {
    "it has no LoRA factors": ({"q.weight": noise(1, 3, 3)},),
    "the other factor of 'q.lora_A.weight' is missing": ({A: noise(1, 2, 9)},),
    "have no product": ({A: noise(1, 2, 9), B: noise(2, 7, 3)},),
    "which does not go with": (plain(), {A: noise(1, 2, 8), B: noise(2, 7, 2)}),
    "it lacks 'v.lora_A.weight'": (
        plain(v__lora_A__weight=noise(1, 2, 9), v__lora_B__weight=noise(1, 7, 2)),
        plain(),
    ),
    "it has 'v.lora_A.weight', which": (
        plain(),
        plain(v__lora_A__weight=noise(1, 2, 9), v__lora_B__weight=noise(1, 7, 2)),
    ),
    "no plain matrix of floats": (plain() | {A: noise(1, 9, 2).t()},),
    "not one number other than zero": (plain(q__alpha=torch.zeros(())),),
    "holds NaN or infinity": (plain() | {A: noise(1, 2, 9) / 0},),
    "are factors of one side": (plain(q__lora_a__weight=noise(1, 2, 9)),),
}


@pytest.mark.parametrize("what", BROKEN)
def test_factors_that_do_not_fit_are_refused(tmp_path, what):
    """The error names what does not go together, and nothing is left behind."""
    paths = pair(tmp_path, *BROKEN[what])
    with pytest.raises(MergeError, match=what.replace("'", ".")):
        merge_checkpoints(paths, tmp_path / "o.pt", lora="exact", allow_nonfinite=True)
    assert sorted(tmp_path.iterdir()) == paths


def test_factors_of_other_dtypes_get_the_templates(tmp_path):
    """Float16 beside float32 is no trouble: each is a number, and the template's dtype is kept."""
    paths = pair(tmp_path, plain(), {name: value.half() for name, value in plain().items()})
    merge_checkpoints(paths, tmp_path / "o.pt", lora="exact")
    assert torch.load(tmp_path / "o.pt")[A].dtype == torch.float32


def test_a_single_file_of_peft_needs_its_settings(tmp_path):
    """Without them nothing says what scales its products."""
    paths = [tmp_path / f"{k}.safetensors" for k in range(2)]
    for seed, path in enumerate(paths):
        save_file(factors(seed, (2, 2, 2), "peft"), path)
    with pytest.raises(MergeError, match="what scales it is unknown") as caught:
        merge_checkpoints(paths, tmp_path / "o.safetensors", lora="exact")
    assert "adapter_config.json" in caught.value.hint


def test_a_single_file_says_what_its_settings_have_to_be(tmp_path):
    """Settings beside an input are not copied to the output's place: a note says what they are."""
    paths = [
        write_peft(tmp_path / k, factors(n, (2, 2, 2), "peft"), r=2, lora_alpha=6)
        / "adapter_model.safetensors"
        for n, k in enumerate("ab")
    ]
    result = merge_checkpoints(paths, tmp_path / "o.safetensors", lora="exact")
    assert any("has to say r=4, lora_alpha=12" in note for note in result.notes)


def test_settings_that_belong_elsewhere_are_refused(tmp_path):
    """A rank that the factors do not have is an error, with both."""
    state = factors(0, (2, 2, 2), "peft")
    paths = [write_peft(tmp_path / k, state, r=3, lora_alpha=6) for k in "ab"]
    with pytest.raises(MergeError, match="have the rank 2, expected 3"):
        merge_checkpoints(paths, tmp_path / "o", lora="exact")


PATTERNS = {
    "is too complex": {"(a+)+$": 2},
    "is no regular expression": {"(": 2},
    "the rank of 'first' is 'x'": {"first": "x"},
    "its rank_pattern is not an object": [1],
}


@pytest.mark.parametrize("what", PATTERNS)
def test_patterns_are_not_trusted(tmp_path, what):
    """A pattern that could take forever, or is none, is refused before it is matched."""
    state = factors(0, (2, 2, 2), "peft")
    paths = [
        write_peft(tmp_path / k, state, r=2, lora_alpha=6, rank_pattern=PATTERNS[what])
        for k in "ab"
    ]
    with pytest.raises(MergeError, match=what):
        merge_checkpoints(paths, tmp_path / "o", lora="exact")


@pytest.mark.parametrize("text", ["{", '{"r": 1, "r": 2}', "[]"])
def test_settings_that_are_no_json_are_refused(tmp_path, text):
    """A file that is broken is named."""
    state = factors(0, (2, 2, 2), "peft")
    paths = [write_peft(tmp_path / k, state, r=2, lora_alpha=6) for k in "ab"]
    for path in paths:
        (path / "adapter_config.json").write_text(text)
    with pytest.raises(MergeError, match="not JSON as it should be"):
        merge_checkpoints(paths, tmp_path / "o", lora="exact")


def test_exclude_keeps_a_product(tmp_path):
    """Products that are not to be averaged stay the template's, with their rank in the settings."""
    paths = [
        write_peft(tmp_path / k, factors(n, (2, 2, 2), "peft"), r=2, lora_alpha=6)
        for n, k in enumerate("ab")
    ]
    merge_checkpoints(paths, tmp_path / "o", lora="exact", exclude=["*mid*"])
    config = json.loads((tmp_path / "o/adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"]) == (4, {r"^mid\.q": 2})
    assert (config["lora_alpha"], config["alpha_pattern"]) == (12, {r"^mid\.q": 6})


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"lora": "rank:0"}, "no way 'rank:0'"),
        ({"lora": "best"}, "no way 'best'"),
        ({"lora": "exact", "fail_on": "strangers"}, "no verdict"),
        ({"lora": "exact", "weights_for": {"q.*": [1, 0]}}, "rules by name"),
        ({"lora": "exact", "base": __file__}, "not compared with a base"),
    ],
)
def test_options_that_do_not_go_together(tmp_path, options, what):
    """Wrong usage is told as such."""
    with pytest.raises(UsageError, match=what):
        merge_checkpoints(pair(tmp_path, plain()), tmp_path / "o.pt", **options)


def test_parts_are_refused(tmp_path):
    """A product is computed whole: parts and ranks are an error, before anything is written."""
    paths = pair(tmp_path, plain())
    with pytest.raises(MergeError, match="computed whole"):
        merge_checkpoints(paths, tmp_path / "o.pt", lora="exact", resume=True)
    assert sorted(tmp_path.iterdir()) == paths


def test_names_with_wrappers_meet(tmp_path):
    """Factors below module. are those of the template without it."""
    state = plain()
    paths = pair(tmp_path, state, {f"module.{name}": value for name, value in state.items()})
    merge_checkpoints(paths, tmp_path / "o.pt", lora="exact")
    found = torch.load(tmp_path / "o.pt")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], value) for name, value in state.items())


@pytest.mark.parametrize("lora", ["exact", "rank:2"])
def test_a_full_model_with_factors(tmp_path, lora):
    """A checkpoint of training is copied where shapes stay; else it gives a bare state dict."""
    states = [
        {
            "state_dict": {
                "q.weight": noise(seed, 7, 9),
                A: noise(seed, 2, 9),
                B: noise(seed, 7, 2),
            },
            "epoch": seed,
        }
        for seed in range(2)
    ]
    paths = pair(tmp_path, *states)
    merge_checkpoints(paths, tmp_path / "o.pt", lora=lora)
    found = torch.load(tmp_path / "o.pt")
    assert ("epoch" in found) == (lora == "rank:2")
    found = found.get("state_dict", found)
    assert found[A].shape == (4 if lora == "exact" else 2, 9)
    mean = (noise(0, 7, 9) + noise(1, 7, 9)) / 2
    torch.testing.assert_close(found["q.weight"], mean, rtol=1e-6, atol=1e-7)
    products = [one["state_dict"][B].double() @ one["state_dict"][A].double() for one in states]
    least = tail(sum(products) / 2, found[A].shape[0])
    merged = found[B].double() @ found[A].double()
    assert distance(merged, sum(products) / 2) == pytest.approx(least, rel=1e-6, abs=2e-7)


def test_factors_that_are_tied_are_not_copied(tmp_path):
    """Two products with one A in common memory would overwrite each other's in a copy."""
    paths = []
    for seed in range(2):
        a = noise(seed, 2, 9)
        state = {A: a, B: noise(seed + 5, 7, 2), "k.lora_A.weight": a}
        paths.append(tmp_path / f"{seed}.pt")
        torch.save(state | {"k.lora_B.weight": noise(seed + 9, 7, 2)}, paths[-1])
    with pytest.raises(MergeError, match="shares its memory"):
        merge_checkpoints(paths, tmp_path / "o.pt", lora="rank:2")
    merge_checkpoints(paths, tmp_path / "o.safetensors", lora="rank:2")


def test_named_adapters(tmp_path):
    """Names with that of an adapter in them, as in a model's own state dict, are factors."""
    state = {name.replace(".weight", ".default.weight"): v for name, v in plain().items()}
    merge_checkpoints(pair(tmp_path, state), tmp_path / "o.pt", lora="exact")
    assert torch.load(tmp_path / "o.pt").keys() == state.keys()


def test_folders_into_a_file(tmp_path):
    """A file has no settings beside it: a note says what they have to be."""
    paths = [
        write_peft(tmp_path / k, factors(n, (2, 2, 2), "peft"), r=2, lora_alpha=6)
        for n, k in enumerate("ab")
    ]
    for lora, told in (("exact", "r=4, lora_alpha=12"), ("rank:2", "r=2, lora_alpha=6")):
        options = {"lora": lora, "overwrite": True}
        result = merge_checkpoints(paths, tmp_path / "o.safetensors", **options)
        assert any(f"has to say {told}" in note for note in result.notes)


def test_include_takes_what_all_have(tmp_path):
    """Products that a checkpoint lacks stay the template's where they are left out."""
    more = plain(v__lora_A__weight=noise(1, 2, 9), v__lora_B__weight=noise(1, 7, 2))
    paths = pair(tmp_path, more, plain())
    merge_checkpoints(paths, tmp_path / "o.pt", lora="exact", include=["q.*"])
    assert torch.load(tmp_path / "o.pt").keys() == more.keys()


def test_ranks_that_a_header_claims_take_no_memory(tmp_path):
    """Products of a total rank of 40,000 need memory that has to be asked for."""
    state = {A: torch.zeros(20_000, 1).half(), B: torch.zeros(1, 20_000).half()}
    with pytest.raises(MergeError, match="memory budget is too small"):
        merge_checkpoints(pair(tmp_path, state), tmp_path / "o.pt", lora="rank:1")


def test_settings_that_differ_are_named(tmp_path):
    """Those of scaling all count; of others the template's are kept, and a note says which."""
    paths = [
        write_peft(tmp_path / k, factors(n, (2, 2, 2), "peft"), r=2, lora_alpha=6 + n, base=k)
        for n, k in enumerate("ab")
    ]
    result = merge_checkpoints(paths, tmp_path / "o", lora="exact")
    assert "adapter_config.json differs in 'base'; the template's is kept" in result.notes
