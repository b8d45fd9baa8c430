"""Renew tests/data: two checkpoints of each maker, and their mean as the framework loads it."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file

from merge_avg import merge_checkpoints
from tests.frameworks.makers import MAKERS, Maker
from tests.frameworks.means import mean

DATA = Path(__file__).parent.parent / "data"
DISTRIBUTIONS = {"lightning.pytorch": "lightning", "pytorch_lightning": "pytorch-lightning"}
# These write the same files as another maker, except for a word.
LEFT_OUT = {"pytorch-lightning", "transformers", "deepspeed-1"}


def freeze(name: str, maker: Maker, place: Path) -> None:
    """Write a sample, once the framework has loaded the mean bit for bit."""
    with tempfile.TemporaryDirectory() as temporary:
        made = []
        for seed in range(2):
            folder = Path(temporary) / str(seed)
            folder.mkdir()
            made.append(maker.make(folder, seed))
        out = Path(temporary) / "out" / (maker.output or "merged")
        out.parent.mkdir()
        merge_checkpoints(made, out)
        loaded = [maker.load(path) for path in made]
        merged = maker.load(out)
        expected = {}
        for key, value in merged.items():
            right = mean([one[key] for one in loaded], maker.stored)
            if not torch.equal(value, right):
                raise ValueError(f"{name}: {key} is not the mean")
            floating = right.is_floating_point() and maker.stored is not None
            expected[key] = (right.to(maker.stored) if floating else right).contiguous().clone()
        shutil.rmtree(place, ignore_errors=True)
        for seed, path in enumerate(made):
            target = place / str(seed) / (path.name if path.is_file() else "checkpoint")
            target.parent.mkdir(parents=True)
            (shutil.copytree if path.is_dir() else shutil.copy)(path, target)
            # Texts of other authors, which no loader needs.
            for text in (*target.parent.rglob("README.md"), *target.parent.rglob("*.py")):
                text.unlink()
        save_file(expected, place / "expected.safetensors")
    package = DISTRIBUTIONS.get(maker.package, maker.package)
    about = {"maker": package, "version": version(package), "torch": torch.__version__}
    (place / "about.json").write_text(json.dumps(about) + "\n")


def main() -> None:
    """Renew the samples that are named, or all."""
    wanted = sys.argv[1:] or [name for name in MAKERS if name not in LEFT_OUT]
    for name, maker in MAKERS.items():
        if name in wanted:
            freeze(name, maker, DATA / name)
            print(name, flush=True)


if __name__ == "__main__":
    main()
