"""Small real runs in which each framework writes a checkpoint in its own way, and loads one again.

A maker's `make(folder, seed)` trains for a moment and returns the checkpoint's path. Its
`load(path)` lets the framework load a checkpoint and returns the weights that it then has.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Maker:
    """How a framework writes and loads checkpoints.

    Attributes:
        package: the framework's module.
        make: writes a checkpoint.
        load: loads one.
        output: the name of the output, where it matters to the framework.
        stored: the dtype in the file, where the framework converts it.
        refused: a word of the error, where the tensors have no mean of their own.
        said: a word of the report, where the mean needs one.
        kept: an expression that finds, in paths of tensors, those that stay the template's.
    """

    package: str
    make: Callable[[Path, int], Path]
    load: Callable[[Path], Weights]
    output: str | None = None
    stored: torch.dtype | None = None
    refused: str | None = None
    said: str = ""
    kept: str = r"opt|sched|rng|random"


def refused(package: str, make: Callable[[Path, int], Path], word: str) -> Maker:
    """Return a maker of checkpoints that have no mean."""

    def load(path: Path) -> Weights:
        raise AssertionError(path)

    return Maker(package, make, load, refused=word)


def state(module: nn.Module) -> Weights:
    """Return a copy of a module's state dict."""
    return {name: value.detach().cpu().clone() for name, value in module.state_dict().items()}


def network() -> nn.Sequential:
    """Return a small network with weights, running statistics and a counter."""
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))


def batches(count: int = 3) -> list[tuple[Tensor, Tensor]]:
    """Return random batches for `network`."""
    return [(torch.randn(6, 4), torch.randint(0, 2, (6,))) for _ in range(count)]


# Lightning


def _lightning(package: str, *, ema: bool = False) -> Maker:
    def module() -> Any:
        import importlib

        pl = importlib.import_module(package)

        class Model(pl.LightningModule):  # type: ignore[misc, name-defined]
            def __init__(self, width: int = 3) -> None:
                super().__init__()
                self.save_hyperparameters()
                self.net = network()

            def training_step(self, batch: Any, _: int) -> Tensor:
                loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
                self.log("loss", loss)
                return loss

            def configure_optimizers(self) -> Any:
                optimizer = torch.optim.AdamW(self.parameters(), lr=0.1)
                return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

        return pl, Model

    def make(folder: Path, seed: int) -> Path:
        pl, model = module()
        pl.seed_everything(seed, verbose=False)
        callbacks = [pl.callbacks.ModelCheckpoint(dirpath=folder, monitor="loss", save_last=True)]
        if ema:
            callbacks.append(pl.callbacks.EMAWeightAveraging(decay=0.5))
        trainer = pl.Trainer(
            max_epochs=2,
            accelerator="cpu",
            logger=False,
            callbacks=callbacks,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        data: Any = batches()
        trainer.fit(model(), torch.utils.data.DataLoader(data, batch_size=None))
        return folder / "last.ckpt"

    def load(path: Path) -> Weights:
        _, model = module()
        weights = state(model.load_from_checkpoint(path, map_location="cpu", weights_only=False))
        if ema:
            raw = torch.load(path, weights_only=False)["current_model_state"]
            weights |= {f"raw {name}": value for name, value in raw.items()}
        return weights

    return Maker(package, make, load, output="merged.ckpt", kept="^.'(optim|lr_|callbacks)")


# transformers


def _tiny_llama(seed: int) -> Any:
    import transformers

    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=16,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config)


def _transformers_load(path: Path) -> Weights:
    import transformers

    return state(transformers.AutoModelForCausalLM.from_pretrained(path, dtype="auto"))


def _transformers(**options: Any) -> Maker:
    def make(folder: Path, seed: int) -> Path:
        dtype = options.get("dtype", torch.float32)
        some = {key: value for key, value in options.items() if key != "dtype"}
        _tiny_llama(seed).to(dtype).save_pretrained(folder, **some)
        return folder

    return Maker("transformers", make, _transformers_load)


def _trainer(folder: Path, seed: int) -> Path:
    import transformers

    rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 4
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        save_steps=2,
        seed=seed,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        per_device_train_batch_size=2,
    )
    trainer = transformers.Trainer(_tiny_llama(seed), arguments, train_dataset=rows)
    trainer.train()
    return folder / "checkpoint-2"


# accelerate


def _accelerate(*, safe: bool) -> Maker:
    def prepared(seed: int) -> Any:
        from accelerate import Accelerator

        torch.manual_seed(seed)
        accelerator = Accelerator(cpu=True)
        model = network()
        optimizer = torch.optim.AdamW(model.parameters())
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
        return accelerator, model, optimizer

    def make(folder: Path, seed: int) -> Path:
        accelerator, model, optimizer = prepared(seed)
        for x, y in batches():
            accelerator.backward(nn.functional.cross_entropy(model(x), y))
            optimizer.step()
            optimizer.zero_grad()
        accelerator.save_state(str(folder), safe_serialization=safe)
        return folder

    def load(path: Path) -> Weights:
        accelerator, model, _ = prepared(99)
        accelerator.load_state(str(path))
        return state(model)

    return Maker("accelerate", make, load)


# timm


def _timm() -> Any:
    import timm

    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2}
    return timm.models.VisionTransformer(**sizes, num_classes=2)


def _timm_make(folder: Path, seed: int) -> Path:
    from timm.utils import CheckpointSaver, ModelEmaV3

    torch.manual_seed(seed)
    model = _timm()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    ema = ModelEmaV3(model, decay=0.5)
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    ema.update(model)
    saver = CheckpointSaver(model, optimizer, model_ema=ema, checkpoint_dir=str(folder))
    saver.save_checkpoint(1, metric=0.5)
    return folder / "last.pth.tar"


def _timm_load(path: Path) -> Weights:
    import timm

    model = _timm()
    weights: Weights = {}
    for ema in (False, True):
        timm.models.load_checkpoint(model, str(path), use_ema=ema)
        weights |= {f"{ema} {name}": value for name, value in state(model).items()}
    return weights


# sentence-transformers


def _tiny_bert(seed: int) -> Any:
    import transformers

    torch.manual_seed(seed)
    config = transformers.BertConfig(
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=30,
        max_position_embeddings=16,
    )
    return transformers.BertModel(config)


def _sentence_make(folder: Path, seed: int) -> Path:
    import sentence_transformers as st
    import transformers

    try:
        from sentence_transformers import models
    except ImportError:
        from sentence_transformers.sentence_transformer import modules as models
    bert = folder / "bert"
    _tiny_bert(seed).save_pretrained(bert)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxy"]
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(bert)
    word = models.Transformer(str(bert))
    dense = models.Dense(in_features=8, out_features=4)
    model = st.SentenceTransformer(modules=[word, models.Pooling(8), dense], device="cpu")
    model.save(str(folder / "model"))
    return folder / "model"


def _sentence_load(path: Path) -> Weights:
    import sentence_transformers as st

    return state(st.SentenceTransformer(str(path), device="cpu"))


# peft


def _peft_make(folder: Path, seed: int) -> Path:
    import peft

    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(_tiny_llama(0), config)
    torch.manual_seed(seed)
    for name, value in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(value)
    model.save_pretrained(folder)
    return folder


def _peft_load(path: Path) -> Weights:
    import peft

    model = peft.PeftModel.from_pretrained(_tiny_llama(0), path)
    return {name: value for name, value in state(model).items() if "lora_" in name}


# diffusers


def _diffusers_make(folder: Path, seed: int) -> Path:
    import diffusers

    torch.manual_seed(seed)
    unet = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(4,),
        layers_per_block=1,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=2,
        add_attention=False,
    )
    vae = diffusers.VQModel(
        block_out_channels=(4,),
        latent_channels=1,
        norm_num_groups=2,
        num_vq_embeddings=4,
        mid_block_add_attention=False,
    )
    pipeline = diffusers.LDMPipeline(vqvae=vae, unet=unet, scheduler=diffusers.DDIMScheduler())
    pipeline.save_pretrained(folder)
    return folder


def _diffusers_load(path: Path) -> Weights:
    import diffusers

    pipeline = diffusers.LDMPipeline.from_pretrained(path)
    parts = {"unet": pipeline.unet, "vqvae": pipeline.vqvae}
    return {f"{a}.{b}": value for a, part in parts.items() for b, value in state(part).items()}


# speechbrain


def _speechbrain(seed: int) -> Any:
    torch.manual_seed(seed)
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    for x, y in batches():
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model, optimizer


def _speechbrain_make(folder: Path, seed: int) -> Path:
    from speechbrain.nnet.schedulers import NewBobScheduler
    from speechbrain.utils.checkpoints import Checkpointer
    from speechbrain.utils.epoch_loop import EpochCounter

    model, optimizer = _speechbrain(seed)
    counter = EpochCounter(3)
    saver = Checkpointer(
        folder,
        recoverables={
            "model": model,
            "optimizer": optimizer,
            "counter": counter,
            "scheduler": NewBobScheduler(0.1),
        },
    )
    return Path(saver.save_checkpoint(meta={"loss": 0.5}).path)


def _speechbrain_load(path: Path) -> Weights:
    from speechbrain.utils.checkpoints import Checkpointer

    model, optimizer = _speechbrain(99)
    saver = Checkpointer(path.parent, recoverables={"model": model, "optimizer": optimizer})
    found = next(one for one in saver.list_checkpoints() if Path(one.path) == path)
    saver.load_checkpoint(found)
    return state(model)


# ultralytics

_YOLO = {
    "nc": 2,
    "scales": {"n": [0.33, 0.02, 16]},
    "backbone": [[-1, 1, "Conv", [16, 3, 2]]],
    "head": [[-1, 1, "Conv", [16, 3, 2]]],
}


def _ultralytics_make(folder: Path, seed: int) -> Path:
    from copy import deepcopy

    from ultralytics.nn.tasks import ClassificationModel

    torch.manual_seed(seed)
    model = ClassificationModel(deepcopy(_YOLO), verbose=False)
    for value in model.parameters():
        nn.init.normal_(value)
    # The keys that BaseTrainer.save_model writes; training itself would need data sets.
    checkpoint = {
        "epoch": 1,
        "best_fitness": 0.5,
        "model": None,
        "ema": deepcopy(model).half(),
        "updates": 3,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1).state_dict(),
        "train_args": {"task": "classify"},
        "date": "2026-01-01",
        "version": "8",
    }
    torch.save(checkpoint, folder / "last.pt")
    return folder / "last.pt"


def _ultralytics_load(path: Path) -> Weights:
    from ultralytics import YOLO

    weights: Weights = state(YOLO(path, task="classify", verbose=False).model)
    return weights


# skorch


def _skorch(seed: int) -> Any:
    import skorch

    torch.manual_seed(seed)
    return skorch.NeuralNetClassifier(
        network, criterion=nn.CrossEntropyLoss, max_epochs=1, verbose=0, train_split=None
    )


def _skorch_make(folder: Path, seed: int) -> Path:
    import skorch.callbacks

    net = _skorch(seed)
    net.set_params(callbacks=[skorch.callbacks.Checkpoint(dirname=str(folder), monitor=None)])
    x, y = batches(1)[0]
    net.fit(x.numpy(), y.numpy())
    return folder


def _skorch_load(path: Path) -> Weights:
    net = _skorch(99).initialize()
    net.load_params(f_params=str(path / "params.pt"), f_optimizer=str(path / "optimizer.pt"))
    return state(net.module_)


# deepspeed keeps global state, so every checkpoint is made and loaded in a process of its own


def deepspeed_engine(stage: int) -> Any:
    """Return an engine for one process without a GPU."""
    import deepspeed

    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    config = {
        "train_micro_batch_size_per_gpu": 6,
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": True},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def deepspeed_process(what: str, stage: int, path: str, seed: int, port: int) -> None:
    """Make a checkpoint, or load one and write its weights beside it."""
    os.environ |= {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "DS_ACCELERATOR": "cpu",
    }
    torch.manual_seed(seed)
    engine = deepspeed_engine(stage)
    if what == "make":
        for x, y in batches():
            engine.backward(nn.functional.cross_entropy(engine(x.bfloat16()).float(), y))
            engine.step()
        engine.save_checkpoint(path, tag="global_step3")
        return
    where, _ = engine.load_checkpoint(path)
    assert where is not None
    masters = engine.optimizer.single_partition_of_fp32_groups
    numel = sum(value.numel() for value in engine.module.parameters())  # the rest is padding
    weights = state(engine.module) | {"fp32": masters[0].detach()[:numel].clone()}
    torch.save(weights, Path(path) / "loaded.pt")


def _deepspeed(stage: int) -> Maker:
    def run(what: str, path: Path, seed: int) -> None:
        import socket

        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        call = f"deepspeed_process({what!r}, {stage}, {str(path)!r}, {seed}, {port})"
        code = f"from tests.frameworks.makers import deepspeed_process\n{call}"
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(done.stderr[-3000:])

    def make(folder: Path, seed: int) -> Path:
        run("make", folder, seed)
        return folder

    def load(path: Path) -> Weights:
        run("load", path, 99)
        weights: Weights = torch.load(path / "loaded.pt")
        (path / "loaded.pt").unlink()
        return weights

    return Maker("deepspeed", make, load, kept="base_optimizer_state")


MAKERS = {
    "lightning": _lightning("lightning.pytorch"),
    "lightning-ema": _lightning("lightning.pytorch", ema=True),
    "pytorch-lightning": _lightning("pytorch_lightning"),
    "transformers": _transformers(),
    "transformers-sharded": _transformers(max_shard_size="2KB"),
    "transformers-bfloat16": _transformers(dtype=torch.bfloat16),
    "transformers-trainer": Maker("transformers", _trainer, _transformers_load),
    "accelerate": _accelerate(safe=True),
    "accelerate-bin": _accelerate(safe=False),
    "timm": Maker("timm", _timm_make, _timm_load, output="merged.pth.tar"),
    "sentence-transformers": Maker("sentence_transformers", _sentence_make, _sentence_load),
    "peft": Maker("peft", _peft_make, _peft_load),
    "diffusers": Maker("diffusers", _diffusers_make, _diffusers_load),
    "speechbrain": Maker(
        "speechbrain", _speechbrain_make, _speechbrain_load, output="CKPT+2026-01-01+00-00-00+00"
    ),
    "ultralytics": Maker(
        "ultralytics", _ultralytics_make, _ultralytics_load, "merged.pt", torch.float16
    ),
    "skorch": Maker("skorch", _skorch_make, _skorch_load),
    "deepspeed-1": _deepspeed(1),
    "deepspeed-2": _deepspeed(2),
}
