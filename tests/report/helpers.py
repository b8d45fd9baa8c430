"""Checkpoints and reports that several tests of the report share."""

import torch

from merge_avg.engine import run
from merge_avg.options import Options
from merge_avg.plan import prepare
from merge_avg.report.values import describe
from tests.helpers import noise


def report_of(paths, output, *, dry_run=False, choice=None, **options):
    """Merge checkpoints, or only plan to, and return the report."""
    job = prepare(paths, output, Options(overwrite=True, **options))
    return describe(job, None if dry_run else run(job), choice)


def save(folder, *states, names=None):
    """Save states as 0.pt, 1.pt, ... or under other names, and return the paths."""
    paths = [folder / name for name in names or (f"{n}.pt" for n in range(len(states)))]
    for path, state in zip(paths, states, strict=True):
        torch.save(state, path)
    return paths


def relatives(folder, count=4, names=None, layers=5):
    """Save base.pt and fine-tunes of it, the last of which strays in one layer."""
    base = {f"layers.{i}.weight": noise(i, 40, 50) for i in range(layers)} | {"norm": torch.ones(9)}
    torch.save({"model": base}, folder / "base.pt")
    states = []
    for number in range(count):
        content = {
            key: value + noise(99 * number + 70 + place, 40, 50) / 9 if value.dim() > 1 else value
            for place, (key, value) in enumerate(base.items())
        }
        if number == count - 1:
            content["layers.2.weight"] = noise(5000, 40, 50)
        states.append({"model": content, "epoch": number})
    return save(folder, *states, names=names or [f"fold{n}.pt" for n in range(count)])
