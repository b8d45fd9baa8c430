"""Adapters of PEFT: PEFT loads the average, which does what the mean of theirs does."""

import math

import pytest
import torch
from torch import nn

from tests.adapters.helpers import distance, tail
from tests.helpers import merge_checkpoints, run_command

pytestmark = [pytest.mark.frameworks, pytest.mark.filterwarnings("default")]
MODULES = ["tokens", "conv", "image", "q", "v"]
KINDS = {
    "a": {"r": 4, "lora_alpha": 8},
    "b": {"r": 4, "lora_alpha": 8, "rank_pattern": {"q": 6}, "alpha_pattern": {"v": 3}},
    "c": {"r": 8, "lora_alpha": 16, "use_rslora": True},
}


class Model(nn.Module):
    """A model with an embedding, convolutions and linear layers."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(50, 24)
        self.conv = nn.Conv1d(24, 24, 3, padding=1)
        self.image = nn.Conv2d(1, 4, 3, padding=1)
        self.q = nn.Linear(24, 40)
        self.v = nn.Linear(40, 24, bias=False)
        self.head = nn.Linear(24, 5)


def base():
    """Return the model that all adapters are of."""
    torch.manual_seed(0)
    return Model()


def write(folder, kinds=KINDS, **more):
    """Write an adapter of each kind as PEFT does."""
    peft = pytest.importorskip("peft")
    paths = []
    for seed, (name, kind) in enumerate(kinds.items()):
        told = {"target_modules": MODULES, "modules_to_save": ["head"]} | kind | more
        config = peft.LoraConfig(**told)
        model = peft.get_peft_model(base(), config)
        generator = torch.Generator().manual_seed(seed + 1)
        for key, value in model.named_parameters():
            if "lora_" in key or "modules_to_save" in key:
                value.data = torch.randn(value.shape, generator=generator) * 0.3
        paths.append(folder / name)
        model.save_pretrained(paths[-1])
    return paths


def changes(path):
    """Return what PEFT adds to each weight of the model when it merges an adapter into it."""
    peft = pytest.importorskip("peft")
    merged = peft.PeftModel.from_pretrained(base(), path).double().merge_and_unload()
    plain = base().double().state_dict()
    return {name: value - plain[name] for name, value in merged.state_dict().items()}


def mean(paths, weights):
    """Return the linear combination of what adapters add."""
    each = [changes(path) for path in paths]
    pairs = [[(w, one[name]) for w, one in zip(weights, each, strict=True)] for name in each[0]]
    return {name: sum(w * x for w, x in row) for name, row in zip(each[0], pairs, strict=True)}


@pytest.mark.parametrize("lora", ["exact", "rank:4"])
def test_peft_loads_the_mean(tmp_path, lora):
    """Linear layers, embeddings and convolutions of any rank and scaling, and whole modules."""
    paths = write(tmp_path)
    merge_checkpoints(paths, tmp_path / "out", lora=lora, weights=[1, 2, 1])
    found, expected = changes(tmp_path / "out"), mean(paths, [0.25, 0.5, 0.25])
    for name, matrix in expected.items():
        if matrix.any():
            exact = lora == "exact" or "head" in name
            least = 0 if exact else tail(matrix.flatten(1), 4)
            reached = distance(found[name], matrix)
            assert reached == pytest.approx(least, rel=1e-5, abs=1e-6), name
    assert run_command("verify", tmp_path / "out").returncode == 0


@pytest.mark.parametrize("weights", [[0.5, 0.5], [1.0, -0.5]])
@pytest.mark.parametrize("rslora", [False, True])
def test_beside_pefts_own(tmp_path, weights, rslora):
    """Ours is no further from the mean than `add_weighted_adapter`, which ignores rsLoRA."""
    peft = pytest.importorskip("peft")
    kinds = {name: {"r": 4, "lora_alpha": 8, "use_rslora": rslora} for name in "ab"}
    paths = write(tmp_path, kinds, target_modules=["q", "v"], modules_to_save=None)
    expected = mean(paths, weights)
    names = [f"{name}.weight" for name in ("q", "v")]
    errors = {}
    for kind in ("cat", "svd"):
        model = peft.PeftModel.from_pretrained(base(), paths[0], adapter_name="a")
        model.load_adapter(paths[1], adapter_name="b")
        rank = {"svd_rank": 8} if kind == "svd" else {}
        model.add_weighted_adapter(["a", "b"], weights, "m", combination_type=kind, **rank)
        model.set_adapter("m")
        merged = model.double().merge_and_unload().state_dict()
        plain = base().double().state_dict()
        errors[kind] = max(distance(merged[n] - plain[n], expected[n]) for n in names)
    options = {"weights": weights, "normalize": False, "overwrite": True}
    for kind, lora in (("cat", "exact"), ("svd", "rank:8")):
        merge_checkpoints(paths, tmp_path / "out", lora=lora, **options)
        ours = changes(tmp_path / "out")
        reached = max(distance(ours[name], expected[name]) for name in names)
        assert reached < 1e-6
        assert reached <= errors[kind] or math.isclose(reached, errors[kind], abs_tol=1e-6)


def test_dora_is_refused(tmp_path):
    """DoRA scales each row by a norm, which is not linear in the product."""
    paths = write(tmp_path, dict.fromkeys("ab", KINDS["a"]), use_dora=True)
    done = run_command(*paths, "-o", tmp_path / "out", "--lora", "exact")
    assert done.returncode == 1
    assert "not the product of two matrices" in done.stderr
