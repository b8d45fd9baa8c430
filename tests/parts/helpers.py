"""Checkpoints that are cut into several stretches, in every format."""

import torch
from safetensors.torch import save_file

from merge_avg import merge_checkpoints

SIZE = 1 << 17  # elements of float32: of three checkpoints, three stretches as short as here


def state(seed):
    """Weights of a small network, among them matrices, integers, and two dtypes."""
    size = SIZE
    g = torch.Generator().manual_seed(seed)
    base = torch.Generator().manual_seed(99)
    shared = torch.randn(size // 512, 512, generator=base)
    noise = torch.randn(shared.shape, generator=g) * 0.1
    return {
        "a": shared + noise,
        "b": torch.randn(size, generator=g),
        "c": (torch.randn(size // 256, 256, generator=base) + 0.1).to(torch.bfloat16),
        "d": torch.randn(7, generator=g),
        "e": torch.randn(size // 512, 512, generator=g) * 0.1 + shared,
        "n": torch.tensor(3),
    }


def zipped(path, seed):
    """Write what torch.save writes, with a state that is copied."""
    extra = {"moments": torch.ones(SIZE + 3) * seed}
    torch.save({"state_dict": state(seed), "optimizer": extra, "epoch": seed}, path)


def legacy(path, seed):
    """Write what torch.save wrote before 1.6."""
    torch.save(state(seed), path, _use_new_zipfile_serialization=False)


def plain(path, seed):
    """Write a safetensors file."""
    save_file(state(seed), path, {"format": "pt"})


def strided(path, seed):
    """Write tensors that lie otherwise than the first checkpoint's, views with gaps, and a pair."""
    one = state(seed)
    big = one["b"].reshape(-1, 512)
    one["a"] = one["a"] if not seed else one["a"].t().contiguous().t()
    one["v"] = big[:, :100]
    one["t"] = one["d"] if not seed else one["d"].clone()
    one.pop("b")
    torch.save(one, path)


def sharded(path, seed):
    """Write a directory of shards with an index."""
    import json

    path.mkdir()
    table = {}
    for number, (key, tensor) in enumerate(state(seed).items(), 1):
        name = f"model-{number:05}-of-00006.safetensors"
        save_file({key: tensor}, path / name, {"format": "pt"})
        table[key] = name
    index = {"metadata": {"total_size": 0}, "weight_map": table}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "config.json").write_text("{}")


def distributed(path, seed):
    """Write what torch.distributed.checkpoint writes."""
    from torch.distributed.checkpoint import state_dict_saver

    state_dict_saver.save({"model": state(seed)}, checkpoint_id=path, no_dist=True)


MAKERS = {
    "zip": (zipped, ".pt"),
    "legacy": (legacy, ".pt"),
    "safetensors": (plain, ".safetensors"),
    "strided": (strided, ".pt"),
    "sharded": (sharded, ""),
    "dcp": (distributed, ""),
}


def checkpoints(folder, kind="zip", count=3):
    """Write checkpoints of a kind into a folder, and return their paths."""
    make, suffix = MAKERS[kind]
    paths = [folder / f"in{seed}{suffix}" for seed in range(count)]
    for seed, path in enumerate(paths):
        make(path, seed)
    return paths


def tree(path):
    """Return the bytes of a file, or of all files of a directory."""
    if path.is_file():
        return path.read_bytes()
    files = (one for one in sorted(path.rglob("*")) if one.is_file())
    return {str(one.relative_to(path)): one.read_bytes() for one in files}


def left(folder):
    """Return the names in a folder that a run should not have left."""
    return sorted(one.name for one in folder.iterdir() if one.name.startswith("."))


def site(path):
    """Return where the parts of an output lie."""
    return path.with_name(f".{path.name}.merge-avg-parts")


def made(paths, output, **options):
    """Merge, as one process does."""
    return merge_checkpoints(paths, output, **options)
