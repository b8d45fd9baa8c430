"""Checkpoints of frameworks that cannot be installed beside current ones, key for key.

Each maker names the source that it follows. The networks are trained for a moment, so optimizers
and their like hold real states. `load` takes the tensors that the framework would load.
"""

from __future__ import annotations

import argparse
import random
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.frameworks.makers import Maker, Weights, batches, network, refused, state


def _train(seed: int, model: nn.Module | None = None) -> Any:
    """Return a network, its optimizer and its scheduler after a few steps."""
    torch.manual_seed(seed)
    model = model or network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10)
    for x, y in batches():
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        scheduler.step()
    return model, optimizer, scheduler


def _read(*keys: str) -> Any:
    """Return a loader of the state dicts at dotted paths in a file."""

    def load(path: Path) -> Weights:
        loaded = torch.load(path, weights_only=False)
        weights: Weights = {}
        for key in keys:
            part = loaded
            for word in key.split(".") if key else []:
                part = part[word]
            weights |= {f"{key} {name}": value for name, value in part.items()}
        return weights

    return load


def _espnet(folder: Path, seed: int) -> dict[str, Any]:
    """Write what espnet2/train/trainer.py, Trainer.run, writes after an epoch."""
    model, optimizer, scheduler = _train(seed)
    stats = {1: {"train": {"loss": 0.5}, "valid": {"loss": 0.4, "acc": 0.8}}}
    checkpoint = {
        "model": model.state_dict(),
        "reporter": {"stats": stats, "epoch": 1},
        "optimizers": [optimizer.state_dict()],
        "schedulers": [scheduler.state_dict()],
        "scaler": None,
    }
    torch.save(checkpoint, folder / "checkpoint.pth")
    torch.save(model.state_dict(), folder / "1epoch.pth")
    for link in ("latest.pth", "valid.acc.best.pth"):
        (folder / link).symlink_to("1epoch.pth")
    return checkpoint


def _espnet_make(folder: Path, seed: int) -> Path:
    _espnet(folder, seed)
    return folder / "checkpoint.pth"


def _espnet_epoch(folder: Path, seed: int) -> Path:
    _espnet(folder, seed)
    return folder / "1epoch.pth"


def _icefall_make(folder: Path, seed: int) -> Path:
    """Write what icefall/checkpoint.py, save_checkpoint, writes with a running average."""
    model, optimizer, scheduler = _train(seed)
    average = network().double()
    average.load_state_dict(state(model))
    checkpoint = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "grad_scaler": torch.amp.GradScaler("cpu").state_dict(),
        "sampler": {"epoch": 1, "num_batches": 3, "seed": seed, "diagnostics": {}},
        "model_avg": average.to(torch.float32).state_dict(),
        # These come from the recipe's AttributeDict.
        "best_train_loss": 0.5,
        "best_valid_loss": float("inf"),
        "best_train_epoch": 1,
        "batch_idx_train": 3,
        "env_info": {"torch-version": "2.13.0", "hostname": "node"},
        "exp_dir": Path("exp"),
    }
    torch.save(checkpoint, folder / "epoch-1.pt")
    return folder / "epoch-1.pt"


def _catalyst_make(folder: Path, seed: int) -> Path:
    """Write what catalyst/utils/torch.py, pack_checkpoint, packs for a learned criterion."""
    model, optimizer, scheduler = _train(seed)
    checkpoint = {
        "criterion_state_dict": nn.Linear(2, 2).state_dict(),
        "epoch_metrics": {"valid": {"loss": 0.5, "accuracy01": 0.7}},
        "loader_metrics": {"loss": 0.5},
        "model_state_dict": model.state_dict(),
        "optimizer_state_dict": optimizer.state_dict(),
        "scheduler_state_dict": scheduler.state_dict(),
        "stage_key": "stage",
        "stage_epoch_step": 2,
    }
    torch.save(checkpoint, folder / "stage.2_full.pth")
    return folder / "stage.2_full.pth"


def _fairseq_make(folder: Path, seed: int) -> Path:
    """Write what fairseq/trainer.py, Trainer.state_dict, holds with --store-ema."""
    model, optimizer, _ = _train(seed)
    history = {
        "criterion_name": "CrossEntropyCriterion",
        "optimizer_name": "FairseqAdam",
        "lr_scheduler_state": {"best": 0.5},
        "num_updates": 3,
    }
    checkpoint = {
        "args": None,
        "cfg": {"model": {"_name": "tiny"}, "optimization": {"lr": [0.1]}},
        "model": model.state_dict(),
        "criterion": nn.Linear(2, 2).state_dict(),
        "optimizer_history": [history],
        "task_state": {},
        "extra_state": {
            "metrics": [("default", {"loss": 0.5})],
            "previous_training_time": 1.5,
            "ema": network().state_dict(),
            "train_iterator": {"epoch": 2, "iterations_in_epoch": 0, "shuffle": True},
            "val_loss": 0.5,
        },
        "last_optimizer_state": optimizer.state_dict(),
    }
    torch.save(checkpoint, folder / "checkpoint1.pt")
    return folder / "checkpoint1.pt"


def _megatron_rank(seed: int, rank: int) -> dict[str, Any]:
    model, optimizer, _ = _train(10 * seed + rank)
    masters = [value.detach().clone() for value in model.parameters()]
    rng = {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.RandomState(seed).get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": torch.get_rng_state(),
        "rng_tracker_states": {"model-parallel-rng": torch.get_rng_state()},
    }
    return {
        "args": argparse.Namespace(num_layers=1, params_dtype=torch.bfloat16, iteration=3),
        "checkpoint_version": 3.0,
        "iteration": 3,
        "model": {"language_model": {"encoder": model.bfloat16().state_dict()}},
        "optimizer": {
            "optimizer": optimizer.state_dict(),
            "grad_scaler": {"scale": torch.tensor([65536.0]), "growth_tracker": seed},
            "fp32_from_fp16_params": [masters],
        },
        "opt_param_scheduler": {"max_lr": 0.1, "num_steps": 24},
        "rng_state": [rng],
    }


def _megatron_make(folder: Path, seed: int) -> Path:
    """Write what megatron/training/checkpointing.py, save_checkpoint, writes for two ranks."""
    for rank in range(2):
        place = folder / "iter_0000003" / f"mp_rank_{rank:02d}"
        place.mkdir(parents=True)
        torch.save(_megatron_rank(seed, rank), place / "model_optim_rng.pt")
    return folder / "iter_0000003"


def _megatron_load(path: Path) -> Weights:
    weights: Weights = {}
    for rank in ("mp_rank_00", "mp_rank_01"):
        loaded = torch.load(path / rank / "model_optim_rng.pt", weights_only=False)
        model = loaded["model"]["language_model"]["encoder"]
        masters = loaded["optimizer"]["fp32_from_fp16_params"][0]
        weights |= {f"{rank} {name}": value for name, value in model.items()}
        weights |= {f"{rank} master {i}": value for i, value in enumerate(masters)}
    return weights


def _nemo_make(folder: Path, seed: int) -> Path:
    """Write what NeMo's SaveRestoreConnector.save_to packs into a .nemo archive."""
    torch.save(_train(seed)[0].state_dict(), folder / "model_weights.ckpt")
    (folder / "model_config.yaml").write_text("target: nemo.collections.asr.models.Tiny\n")
    with tarfile.open(folder / "tiny.nemo", "w:") as archive:
        for name in ("model_config.yaml", "model_weights.ckpt"):
            archive.add(folder / name, arcname=f"./{name}")
    return folder / "tiny.nemo"


def _nemo_unpacked(folder: Path, seed: int) -> Path:
    _nemo_make(folder, seed).unlink()
    return folder


def _nemo_load(path: Path) -> Weights:
    weights: Weights = torch.load(path / "model_weights.ckpt")
    return weights


def _kohya_make(folder: Path, seed: int) -> Path:
    """Write what networks/lora.py of sd-scripts, LoRANetwork.save_weights, writes."""
    from safetensors.torch import save_file

    noise = torch.Generator().manual_seed(seed)
    weights = {}
    for name in ("lora_unet_mid_block_attentions_0_proj_in", "lora_te_text_model_encoder_fc1"):
        weights[f"{name}.lora_down.weight"] = torch.randn(2, 8, generator=noise).half()
        weights[f"{name}.lora_up.weight"] = torch.randn(4, 2, generator=noise).half()
        weights[f"{name}.alpha"] = torch.tensor(1.0).half()
    about = {"ss_epoch": "2", "ss_steps": "6", "ss_network_dim": "2", "ss_network_alpha": "1.0"}
    save_file(weights, folder / "tiny-000002.safetensors", about)
    return folder / "tiny-000002.safetensors"


def _kohya_load(path: Path) -> Weights:
    from safetensors.torch import load_file

    return load_file(path)


def _openclip_make(folder: Path, seed: int) -> Path:
    """Write what src/open_clip_train/main.py of open_clip writes, with a learned temperature."""

    class Clip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.visual = network()
            self.logit_scale = nn.Parameter(torch.tensor(2.6593))

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.visual(x) * self.logit_scale.exp()
            return logits

    model, optimizer, _ = _train(seed, Clip())
    checkpoint = {
        "epoch": 1,
        "name": "tiny",
        "state_dict": {f"module.{name}": value for name, value in model.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "scaler": torch.amp.GradScaler("cpu").state_dict(),
    }
    torch.save(checkpoint, folder / "epoch_1.pt")
    return folder / "epoch_1.pt"


STRUCTURES = {
    "espnet2": Maker("torch", _espnet_make, _read("model")),
    "espnet2-epoch": Maker("torch", _espnet_epoch, _read("")),
    "icefall": Maker("torch", _icefall_make, _read("model", "model_avg"), output="epoch-9.pt"),
    "catalyst": Maker("torch", _catalyst_make, _read("model_state_dict", "criterion_state_dict")),
    "fairseq": Maker("torch", _fairseq_make, _read("model", "criterion", "extra_state.ema")),
    "megatron-lm": Maker(
        "torch", _megatron_make, _megatron_load, kept=r"'(optimizer'\]\['(opt|grad)|rng_state)"
    ),
    "nemo": refused("torch", _nemo_make, "tar"),
    "nemo-unpacked": Maker("torch", _nemo_unpacked, _nemo_load),
    "kohya": Maker("torch", _kohya_make, _kohya_load, output="merged.safetensors", said="factors"),
    "open-clip": Maker("torch", _openclip_make, _read("state_dict")),
}
