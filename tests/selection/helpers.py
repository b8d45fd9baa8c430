"""Checkpoints as frameworks write them, and what a selection says of them."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from merge_avg.options import Series, Weighting
from merge_avg.selection import choose


def lightning(folder, epoch, step, extra="", value=None):
    """Write a checkpoint of Lightning, whose weights are its step or another value."""
    path = folder / f"epoch={epoch}-step={step}{extra}.ckpt"
    weights = {"w": torch.full((2,), float(step if value is None else value))}
    torch.save({"state_dict": weights, "epoch": epoch, "global_step": step}, path)
    return path


def bare(path, value=0.0):
    """Write a state dict that says nothing about itself."""
    torch.save({"w": torch.full((2,), float(value))}, path)
    return path


def trainer(folder, step, loss=None):
    """Write a folder of transformers' Trainer."""
    folder = folder / f"checkpoint-{step}"
    folder.mkdir()
    save_file({"w": torch.full((2,), float(step))}, folder / "model.safetensors")
    torch.save({"state": {}}, folder / "optimizer.pt")
    (folder / "config.json").write_text("{}")
    log = [] if loss is None else [{"step": step, "eval_loss": loss}]
    state = {"global_step": step, "epoch": step / 10, "log_history": log}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    return folder


def select(arguments, criteria, output=Path("no such output")):
    """Choose checkpoints for their plain mean."""
    return choose(arguments, output, criteria, Series(), Weighting())


def names(choice):
    """Return the names of the chosen checkpoints."""
    return [path.name for path in choice.paths]


def why(choice):
    """Return why each candidate was chosen or left out, by its name."""
    return {one.path.name: one.why for one in choice.candidates}
