"""Small real runs of frameworks that train: their own loops, and their own saving and loading."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from tests.frameworks.makers import (
    Maker,
    Weights,
    batches,
    network,
    refused,
    state,
)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Train for a few steps, where a framework leaves that to the user."""
    for x, y in batches():
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def trained(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    step(model, optimizer)
    return model, optimizer


# ignite


def _ignite(folder: Path, seed: int) -> Any:
    """Return an engine that saves into a folder, and what it saves."""
    from ignite.engine import Engine, Events
    from ignite.handlers import Checkpoint, DiskSaver

    torch.manual_seed(seed)
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)

    def update(_: Any, batch: tuple[Tensor, Tensor]) -> float:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
        loss.backward()
        optimizer.step()
        return loss.item()

    trainer = Engine(update)
    parts = {
        "model": model,
        "optimizer": optimizer,
        "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1),
        "trainer": trainer,
    }
    saver = Checkpoint(
        parts,
        DiskSaver(str(folder), require_empty=False),
        filename_prefix="best",
        score_name="neg_loss",
        score_function=lambda engine: -engine.state.output,
        include_self=True,
    )
    trainer.add_event_handler(Events.EPOCH_COMPLETED, saver)
    return trainer, parts, saver


def _ignite_make(folder: Path, seed: int) -> Path:
    trainer, _, saver = _ignite(folder, seed)
    trainer.run(batches(), max_epochs=2)
    return folder / str(saver.last_checkpoint)


def _ignite_load(path: Path) -> Weights:
    from ignite.handlers import Checkpoint

    _, parts, _ = _ignite(path.parent, 99)
    Checkpoint.load_objects(parts, torch.load(path))
    return state(parts["model"])


# mmengine


def _mmengine(folder: Path, *, ema: bool) -> Any:
    from mmengine.hooks import EMAHook
    from mmengine.model import BaseModel
    from mmengine.registry import DefaultScope
    from mmengine.runner import Runner

    class Model(BaseModel):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, x: Tensor, y: Tensor, mode: str = "loss") -> dict[str, Tensor]:
            return {"loss": nn.functional.cross_entropy(self.net(x), y)}

    DefaultScope.get_instance("tiny", scope_name="mmengine")
    data: Any = [(x, y) for xs, ys in batches() for x, y in zip(xs, ys, strict=True)]
    return Runner(
        model=Model(),
        work_dir=str(folder),
        train_dataloader=torch.utils.data.DataLoader(data, batch_size=6),
        train_cfg={"by_epoch": True, "max_epochs": 2},
        optim_wrapper={"optimizer": {"type": "AdamW", "lr": 0.1}},
        param_scheduler={"type": "StepLR", "step_size": 1},
        default_hooks={"checkpoint": {"type": "CheckpointHook", "interval": 1}},
        custom_hooks=[EMAHook()] if ema else [],
        log_level="ERROR",
        experiment_name=folder.parent.name + folder.name,
    )


def _mmengine_maker(*, ema: bool) -> Maker:
    def make(folder: Path, seed: int) -> Path:
        torch.manual_seed(seed)
        _mmengine(folder, ema=ema).train()
        return folder / "epoch_2.pth"

    def load(path: Path) -> Weights:
        runner = _mmengine(path.parent / "again", ema=ema)
        runner.call_hook("before_run")
        # It does not say what it trusts, so torch alone would refuse its logs.
        with patch.dict(os.environ, TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD="1"):
            loaded = runner.load_checkpoint(str(path))
        weights = state(runner.model)
        if ema:
            weights |= {f"ema {name}": value for name, value in loaded["ema_state_dict"].items()}
        return weights

    return Maker("mmengine", make, load, output="epoch_9.pth")


# composer


def _composer(seed: int, **options: Any) -> Any:
    from composer import Trainer
    from composer.models import ComposerClassifier

    torch.manual_seed(seed)
    model = ComposerClassifier(network(), num_classes=2)
    data: Any = batches()
    return Trainer(
        model=model,
        optimizers=torch.optim.AdamW(model.parameters(), lr=0.1),
        train_dataloader=torch.utils.data.DataLoader(data, batch_size=None),
        max_duration="2ep",
        seed=seed,
        device="cpu",
        device_train_microbatch_size=6,
        progress_bar=False,
        **options,
    )


def _composer_make(folder: Path, seed: int) -> Path:
    from composer.algorithms import EMA

    trainer = _composer(
        seed, save_folder=str(folder), run_name="tiny", algorithms=[EMA(half_life="1ba")]
    )
    trainer.fit()
    trainer.close()
    return folder / "ep2-ba6-rank0.pt"


def _composer_load(path: Path) -> Weights:
    trainer = _composer(9, load_path=str(path), load_weights_only=True)
    return state(trainer.state.model)


# MONAI


def _monai_make(folder: Path, seed: int) -> Path:
    from monai.engines import SupervisedTrainer
    from monai.handlers import CheckpointSaver

    torch.manual_seed(seed)
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=2,
        train_data_loader=[{"image": x, "label": y} for x, y in batches()],
        network=model,
        optimizer=optimizer,
        loss_function=nn.CrossEntropyLoss(),
    )
    parts = {"net": model, "opt": optimizer, "trainer": trainer}
    CheckpointSaver(str(folder), parts, save_final=True).attach(trainer)
    trainer.run()
    return folder / "checkpoint_final_iteration=6.pt"


def _monai_load(path: Path) -> Weights:
    from ignite.engine import Engine, Events
    from monai.handlers import CheckpointLoader

    model = network()
    engine = Engine(lambda *_: None)
    CheckpointLoader(str(path), {"net": model}).attach(engine)
    engine.fire_event(Events.STARTED)
    return state(model)


# fastai


def _fastai(folder: Path, seed: int, **options: Any) -> Any:
    from operator import itemgetter

    from fastai.callback import progress  # noqa: F401 - which gives learners their no_bar
    from fastai.data.core import Datasets
    from fastai.learner import Learner

    torch.manual_seed(seed)
    rows = [{"x": x, "y": int(y)} for xs, ys in batches() for x, y in zip(xs, ys, strict=True)]
    parts = [[itemgetter("x")], [itemgetter("y")]]
    data = Datasets(rows, tfms=parts, splits=[range(12), range(12, 18)])
    loaders = data.dataloaders(bs=6, val_bs=6, device="cpu")
    loss = nn.CrossEntropyLoss()
    return Learner(loaders, network(), loss_func=loss, path=folder, **options)


def _fastai_make(folder: Path, seed: int) -> Path:
    from fastai.callback.tracker import SaveModelCallback

    saver = SaveModelCallback(every_epoch=True, with_opt=True, fname="model")
    learner = _fastai(folder, seed, cbs=saver)
    with learner.no_bar(), learner.no_logging():
        learner.fit(2)
    return folder / "models" / "model_1.pth"


def _fastai_load(path: Path) -> Weights:
    learner = _fastai(path.parent, 99, model_dir="")
    return state(learner.load(path.stem, with_opt=True).model)


def _fastai_export(folder: Path, seed: int) -> Path:
    """Export a whole learner, functions included."""
    learner = _fastai(folder, seed)
    with learner.no_bar(), learner.no_logging():
        learner.fit(1)
    learner.export("export.pkl")
    return folder / "export.pkl"


# stable-baselines3: an archive of several files, and the policy alone


def _baselines(seed: int) -> Any:
    from stable_baselines3 import PPO

    options: Any = {"n_steps": 8, "batch_size": 8, "n_epochs": 1, "device": "cpu"}
    policy = {"net_arch": [4]}
    return PPO("MlpPolicy", "CartPole-v1", seed=seed, policy_kwargs=policy, **options)


def _baselines_make(folder: Path, seed: int) -> Path:
    _baselines(seed).learn(16).save(folder / "rl_model_16_steps")
    return folder / "rl_model_16_steps.zip"


def _policy_make(folder: Path, seed: int) -> Path:
    _baselines(seed).learn(16).policy.save(folder / "policy.pth")
    return folder / "policy.pth"


def _policy_load(path: Path) -> Weights:
    from stable_baselines3.common.policies import ActorCriticPolicy

    return state(ActorCriticPolicy.load(str(path), device="cpu"))


# pytorch-metric-learning: a file for each network, each optimizer and each learned loss


def _metric(folder: Path, seed: int) -> Any:
    from pytorch_metric_learning.losses import ArcFaceLoss
    from pytorch_metric_learning.trainers import MetricLossOnly
    from pytorch_metric_learning.utils.logging_presets import HookContainer

    torch.manual_seed(seed)
    trunk, embedder = network(), nn.Linear(2, 2)
    loss = ArcFaceLoss(num_classes=2, embedding_size=2)
    parts = {"trunk": trunk, "embedder": embedder, "metric_loss": loss}
    optimizers = {
        f"{name}_optimizer": torch.optim.AdamW(part.parameters(), lr=0.1)
        for name, part in parts.items()
    }
    data: Any = [(x, int(y)) for xs, ys in batches() for x, y in zip(xs, ys, strict=True)]
    hooks = HookContainer(SimpleNamespace(), record_group_name_prefix="tiny")
    trainer = MetricLossOnly(
        models={"trunk": trunk, "embedder": embedder},
        optimizers=optimizers,
        batch_size=6,
        loss_funcs={"metric_loss": loss},
        dataset=data,
        dataloader_num_workers=0,
        data_device=torch.device("cpu"),
        dtype=torch.float32,
        end_of_epoch_hook=lambda one: hooks.save_models(one, str(folder), str(one.epoch)),
    )
    return trainer, parts, hooks


def _metric_make(folder: Path, seed: int) -> Path:
    _metric(folder, seed)[0].train(num_epochs=1)
    return folder


def _metric_load(path: Path) -> Weights:
    trainer, parts, hooks = _metric(path, 99)
    hooks.load_latest_saved_models(trainer, str(path), torch.device("cpu"))
    return {f"{a}.{b}": value for a, part in parts.items() for b, value in state(part).items()}


# torchtune


def _torchtune(folder: Path, seed: int) -> Any:
    from torchtune.models.llama3 import llama3
    from torchtune.training import FullModelTorchTuneCheckpointer

    torch.manual_seed(seed)
    sizes = {"embed_dim": 16, "num_heads": 2, "num_kv_heads": 1, "num_layers": 1}
    model = llama3(vocab_size=16, max_seq_len=8, **sizes)
    (folder / "base").mkdir(exist_ok=True)
    torch.save(model.state_dict(), folder / "base" / "base.bin")
    saver = FullModelTorchTuneCheckpointer(
        checkpoint_dir=str(folder / "base"),
        checkpoint_files=["base.bin"],
        model_type="LLAMA3",
        output_dir=str(folder / "out"),
    )
    return model, saver


def _torchtune_make(folder: Path, seed: int) -> Path:
    model, saver = _torchtune(folder, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for epoch in range(2):
        tokens = torch.randint(0, 16, (2, 8))
        model(tokens).square().mean().backward()
        optimizer.step()
        recipe = {"optimizer": optimizer.state_dict(), "epochs_run": epoch + 1, "seed": seed}
        saver.save_checkpoint({"model": model.state_dict()} | recipe, epoch, epoch == 0)
    return folder / "out" / "epoch_1"


def _torchtune_load(path: Path) -> Weights:
    from torchtune.training import FullModelTorchTuneCheckpointer

    loader = FullModelTorchTuneCheckpointer(
        checkpoint_dir=str(path),
        checkpoint_files=[next(path.glob("*.bin")).name],
        model_type="LLAMA3",
        output_dir=str(path.parent / "again"),
    )
    weights: Weights = loader.load_checkpoint()["model"]
    return weights


def _torchtune_adapter(folder: Path, seed: int) -> Path:
    """Write an adapter beside the base model that it was trained on, which stays as it is."""
    from torchtune.models.llama3 import lora_llama3
    from torchtune.modules.peft import get_adapter_params

    _, saver = _torchtune(folder, 0)
    torch.manual_seed(seed)
    sizes = {"embed_dim": 16, "num_heads": 2, "num_kv_heads": 1, "num_layers": 1}
    rank = {"lora_rank": 2, "lora_alpha": 4.0}
    model = lora_llama3(["q_proj"], vocab_size=16, max_seq_len=8, **sizes, **rank)
    adapter = get_adapter_params(model)
    optimizer = torch.optim.AdamW(adapter.values(), lr=0.1)
    for _ in range(2):
        model(torch.randint(0, 16, (2, 8))).square().mean().backward()
        optimizer.step()
    weights = {name: value.detach() for name, value in adapter.items()}
    saver.save_checkpoint({"adapter": weights}, epoch=0, adapter_only=True)
    return folder / "out" / "epoch_0"


def _torchtune_adapter_load(path: Path) -> Weights:
    loaded: Weights = torch.load(path / "adapter_model.pt")
    return loaded


# OLMo-core


def _olmo_make(folder: Path, seed: int) -> Path:
    from olmo_core.distributed.checkpoint import _prepare_state_dict
    from olmo_core.train.checkpoint import Checkpointer

    model, optimizer = trained(seed)
    saved = SimpleNamespace(state_dict_to_save=lambda: _prepare_state_dict(model, optimizer))
    progress = {"global_step": 3, "rng": {"torch": torch.get_rng_state()}}
    Checkpointer(work_dir=folder / "work").save(folder / "step3", saved, progress)
    return folder / "step3"


def _olmo_load(path: Path) -> Weights:
    from olmo_core.distributed.checkpoint import load_model_and_optim_state

    model = network()
    load_model_and_optim_state(
        path / "model_and_optim", model, torch.optim.AdamW(model.parameters())
    )
    return state(model)


# Megatron-core


def _megatron(seed: int) -> Any:
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
    from torch.distributed import HashStore  # type: ignore[attr-defined]

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
    model, optimizer = trained(seed)
    sharded = {"model": make_sharded_tensors_for_checkpoint(model.state_dict(), "model.")}
    for slot in ("exp_avg", "exp_avg_sq"):
        values = {name: optimizer.state[value][slot] for name, value in model.named_parameters()}
        prefix = f"optimizer.state.{slot}."
        sharded[prefix] = make_sharded_tensors_for_checkpoint(values, prefix)
    return sharded | {"iteration": 3, "rng_state": torch.get_rng_state()}


def _megatron_make(folder: Path, seed: int) -> Path:
    from megatron.core import dist_checkpointing

    (folder / "iter_0000003").mkdir()
    # It asks for a GPU, whether there is one or not.
    with patch("torch.cuda.synchronize"), patch("torch.cuda.current_device", lambda: "cpu"):
        dist_checkpointing.save(_megatron(seed), str(folder / "iter_0000003"))
    return folder / "iter_0000003"


def _megatron_load(path: Path) -> Weights:
    from megatron.core import dist_checkpointing

    loaded: Weights = dist_checkpointing.load(_megatron(99), str(path))["model"]
    return loaded


# fvcore, whose Checkpointer detectron2 uses


def _fvcore(folder: Path, seed: int) -> Any:
    from fvcore.common.checkpoint import Checkpointer

    model, optimizer = trained(seed)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    saver = Checkpointer(model, str(folder), optimizer=optimizer, scheduler=scheduler)
    return model, saver


def _fvcore_make(folder: Path, seed: int) -> Path:
    from fvcore.common.checkpoint import PeriodicCheckpointer

    _, saver = _fvcore(folder, seed)
    PeriodicCheckpointer(saver, period=3, max_iter=9).step(2)
    return folder / "model_0000002.pth"


def _fvcore_load(path: Path) -> Weights:
    model, saver = _fvcore(path.parent, 99)
    saver.load(str(path))
    return state(model)


# pytorch-accelerated and poutyne


def _accelerated(seed: int) -> Any:
    from pytorch_accelerated import Trainer

    torch.manual_seed(seed)
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    trainer = Trainer(model, nn.CrossEntropyLoss(), optimizer, callbacks=())
    data: Any = [(x, y) for xs, ys in batches() for x, y in zip(xs, ys, strict=True)]
    trainer.train(data, num_epochs=1, per_device_batch_size=6)
    return trainer


def _accelerated_make(folder: Path, seed: int) -> Path:
    extra = {"best_metric": 0.25, "epoch": 1}
    _accelerated(seed).save_checkpoint(folder / "best_model.pt", checkpoint_kwargs=extra)
    return folder / "best_model.pt"


def _accelerated_load(path: Path) -> Weights:
    trainer = _accelerated(99)
    trainer.load_checkpoint(path)
    return state(trainer.model)


def _poutyne(folder: Path, seed: int) -> Any:
    from poutyne import ModelBundle

    torch.manual_seed(seed)
    return ModelBundle.from_network(
        str(folder), network(), optimizer="adamw", loss_function="cross_entropy", device="cpu"
    )


def _poutyne_make(folder: Path, seed: int) -> Path:
    _poutyne(folder, seed).train(batches(), batches(1), epochs=2, verbose=False)
    return folder


def _poutyne_load(path: Path) -> Weights:
    bundle = _poutyne(path, 99)
    bundle.load_checkpoint("last", verbose=False)
    return state(bundle.model.network)


TRAINERS = {
    "ignite": Maker("ignite", _ignite_make, _ignite_load),
    "mmengine": _mmengine_maker(ema=False),
    "mmengine-ema": _mmengine_maker(ema=True),
    "composer": Maker("composer", _composer_make, _composer_load),
    "monai": Maker("monai", _monai_make, _monai_load),
    "fastai": Maker("fastai", _fastai_make, _fastai_load, output="merged.pth"),
    "fastai-export": refused("fastai", _fastai_export, "cloudpickle"),
    "stable-baselines3": refused("stable_baselines3", _baselines_make, "zip"),
    "stable-baselines3-policy": Maker("stable_baselines3", _policy_make, _policy_load),
    "metric-learning": Maker("pytorch_metric_learning", _metric_make, _metric_load),
    "torchtune": Maker("torchtune", _torchtune_make, _torchtune_load),
    "torchtune-adapter": Maker(
        "torchtune", _torchtune_adapter, _torchtune_adapter_load, said="factors"
    ),
    "olmo-core": Maker("olmo_core", _olmo_make, _olmo_load, kept=r"/optim\.|rng"),
    "megatron-core": Maker("megatron.core", _megatron_make, _megatron_load),
    "fvcore": Maker("fvcore", _fvcore_make, _fvcore_load),
    "pytorch-accelerated": Maker("pytorch_accelerated", _accelerated_make, _accelerated_load),
    "poutyne": Maker("poutyne", _poutyne_make, _poutyne_load),
}
