"""Checkpoints whose mean is easy to tell, and soups of them."""

import torch

from merge_avg.soup import greedy
from tests.helpers import merge_checkpoints

VALUES = (4.0, 1.0, -2.0, 9.0)


def made(folder, values=VALUES):
    """Write one checkpoint for each value, which is each of its weights."""
    paths = []
    for number, value in enumerate(values):
        paths.append(folder / f"c{number}.pt")
        torch.save({"model": {"w": torch.full((3,), value)}, "epoch": number}, paths[-1])
    return paths


def weight(path):
    """Return the value of a checkpoint's weights."""
    return float(torch.load(path)["model"]["w"][0])


def soup_of(paths, output, evaluate=weight, mode="min", **options):
    """Make a greedy soup with real merges."""
    return greedy(paths, output, evaluate=evaluate, merge=merge_checkpoints, mode=mode, **options)
