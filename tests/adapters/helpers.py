"""Adapters of several spellings, and what they do, computed without the package."""

import json
import math
from fractions import Fraction

import torch
from safetensors.torch import load_file, save_file

# Of each spelling: the names of A, B and alpha of a module, and the module's name.
SPELLINGS = {
    "peft": ("base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight", None),
    "kohya": ("lora_unet_{}.lora_down.weight", "lora_unet_{}.lora_up.weight", "lora_unet_{}.alpha"),
    "diffusers": (
        "unet.{}.q_lora.down.weight",
        "unet.{}.q_lora.up.weight",
        None,
    ),
    "torchtune": ("{}.lora_a.weight", "{}.lora_b.weight", None),
}
SHAPES = {"first": (12, 20), "mid.q": (16, 9), "conv": (8, (4, 3, 3))}


def factors(seed, ranks, spelling="kohya", *, alphas=None, dtype=torch.float32):
    """Return an adapter with modules of these ranks, its changes being of about the same size."""
    a_name, b_name, alpha_name = SPELLINGS[spelling]
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for (module, (rows, columns)), rank in zip(SHAPES.items(), ranks, strict=True):
        wide = columns if isinstance(columns, tuple) else (columns,)
        key = module.replace(".", "_") if spelling == "kohya" else module
        state[a_name.format(key)] = torch.randn(rank, *wide, generator=generator).to(dtype)
        narrow = (1,) * (len(wide) - 1)
        b = torch.randn(rows, rank, *narrow, generator=generator)
        state[b_name.format(key)] = b.to(dtype)
        if alpha_name and alphas is not None:
            alpha = alphas[list(SHAPES).index(module)]
            state[alpha_name.format(key)] = torch.tensor(alpha, dtype=dtype)
    return state


def write_peft(folder, state, **config):
    """Write a folder as PEFT does."""
    folder.mkdir()
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
    return folder


def changes(path):
    """Return what an adapter adds to each weight, in float64, by its own rules of scaling."""
    config = {}
    if path.is_dir():
        config = json.loads((path / "adapter_config.json").read_text())
        path = path / "adapter_model.safetensors"
    elif path.with_name("adapter_config.json").exists():
        config = json.loads(path.with_name("adapter_config.json").read_text())
    state = load_file(path) if path.suffix == ".safetensors" else torch.load(path)
    found = {}
    for name, a in state.items():
        for one, other in (("lora_A.", "lora_B."), ("lora_a.", "lora_b."), ("down.w", "up.w")):
            if one in name:
                b = state[name.replace(one, other)]
                stem = name[: name.index(one)].removesuffix(".").removesuffix("lora_")
                stem = stem.removesuffix(".")
                product = b.double().flatten(1) @ a.double().flatten(1)
                found[stem] = scaling(stem, a.shape[0], state, config) * product
    return found


def scaling(stem, rank, state, config):
    """Return what a product is scaled by."""
    if f"{stem}.alpha" in state:
        return float(state[f"{stem}.alpha"]) / rank
    if not config:
        return 1.0
    module = stem.removeprefix("base_model.model.")

    def of(table, default):
        for pattern, value in config.get(table, {}).items():
            # Patterns here are the end of a name, or, as the package writes them, all of it.
            if pattern.startswith("^"):
                fits = pattern[1:].replace("\\", "") == module
            else:
                fits = f".{module}".endswith(f".{pattern}")
            if fits:
                return value
        return config[default]

    assert of("rank_pattern", "r") == rank, "the settings tell the rank of the factors"
    alpha = of("alpha_pattern", "lora_alpha")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def mean_of(paths, weights):
    """Return the weighted mean of what adapters add."""
    total = sum(map(Fraction, weights))
    parts = [float(Fraction(weight) / total) for weight in weights]
    each = [changes(path) for path in paths]
    return {
        name: sum(part * one[name] for part, one in zip(parts, each, strict=True))
        for name in each[0]
    }


def distance(found, expected):
    """Return the norm of a difference, relative to what is expected."""
    return float((found - expected).norm() / expected.norm())


def tail(matrix, rank):
    """Return the least relative error that any matrix of a rank has."""
    values = torch.linalg.svdvals(matrix)
    return float(values[rank:].norm() / values.norm())
