"""Small real uses of libraries with special values: quantised, low-rank, learned or averaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.frameworks.makers import MAKERS, Maker, Weights, batches, network, refused, state
from tests.frameworks.trainers import step, trained

# optimum-quanto, whose weights are floats until they are frozen


def _quanto(folder: Path, seed: int, *, freeze: bool) -> Path:
    from optimum.quanto import Calibration, qint8, quantize
    from optimum.quanto import freeze as quanto_freeze

    torch.manual_seed(seed)
    model = network()
    quantize(model, weights=qint8, activations=qint8)
    with torch.no_grad(), Calibration():
        model(batches(1)[0][0])
    step(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    if freeze:
        quanto_freeze(model)
    torch.save(model.state_dict(), folder / "model.pt")
    return folder / "model.pt"


def _quanto_make(folder: Path, seed: int) -> Path:
    return _quanto(folder, seed, freeze=False)


def _quanto_frozen(folder: Path, seed: int) -> Path:
    return _quanto(folder, seed, freeze=True)


def _quanto_load(path: Path) -> Weights:
    from optimum.quanto import qint8, quantize

    model = network()
    quantize(model, weights=qint8, activations=qint8)
    model.load_state_dict(torch.load(path))
    return state(model)


# bitsandbytes and torchao, whose packed values have no mean


def _bitsandbytes_make(folder: Path, seed: int) -> Path:
    import bitsandbytes as bnb
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    layer = bnb.nn.Linear4bit(64, 64, quant_type="nf4")
    layer.load_state_dict(nn.Linear(64, 64).state_dict())
    layer.to("cpu")  # which packs the weight
    save_file(layer.state_dict(), folder / "model.safetensors")
    return folder / "model.safetensors"


def _torchao_make(folder: Path, seed: int) -> Path:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    torch.manual_seed(seed)
    model = network()
    quantize_(model, Int8WeightOnlyConfig())
    torch.save(model.state_dict(), folder / "model.pt")
    return folder / "model.pt"


# lycoris: low-rank factors under names of its own


def _lycoris(algorithm: str) -> Maker:
    def make(folder: Path, seed: int) -> Path:
        from lycoris import LycorisNetwork

        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
        LycorisNetwork.apply_preset({"target_module": ["Linear", "Sequential"]})
        net = LycorisNetwork(model, lora_dim=2, alpha=1, network_module=algorithm)
        net.apply_to()
        torch.manual_seed(seed)
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
        for _ in range(3):
            model(torch.randn(4, 8)).square().mean().backward()
            optimizer.step()
        net.save_weights(str(folder / "last.safetensors"), torch.float32, {})
        return folder / "last.safetensors"

    return Maker("lycoris", make, _safetensors_load, "merged.safetensors", said="factors")


def _safetensors_load(path: Path) -> Weights:
    from safetensors.torch import load_file

    return load_file(path)


# gpytorch: learned values without dimensions, and infinite bounds


def _gaussian(seed: int) -> Any:
    import gpytorch

    class Model(gpytorch.models.ExactGP):  # type: ignore[misc]
        def __init__(self, x: Tensor, y: Tensor, likelihood: Any) -> None:
            super().__init__(x, y, likelihood)
            self.mean_module = gpytorch.means.ConstantMean()
            prior = gpytorch.priors.GammaPrior(3.0, 6.0)
            kernel = gpytorch.kernels.RBFKernel(ard_num_dims=4, lengthscale_prior=prior)
            self.covar_module = gpytorch.kernels.ScaleKernel(kernel)

        def forward(self, x: Tensor) -> Any:
            mean, covariance = self.mean_module(x), self.covar_module(x)
            return gpytorch.distributions.MultivariateNormal(mean, covariance)

    torch.manual_seed(seed)
    x, y = torch.randn(6, 4), torch.randn(6)
    model = Model(x, y, gpytorch.likelihoods.GaussianLikelihood())
    return gpytorch, model, x, y


def _gaussian_make(folder: Path, seed: int) -> Path:
    gpytorch, model, x, y = _gaussian(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    goal = gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model)
    for _ in range(3):
        optimizer.zero_grad()
        (-goal(model(x), y)).backward()
        optimizer.step()
    torch.save(model.state_dict(), folder / "model_state.pth")
    return folder / "model_state.pth"


def _gaussian_load(path: Path) -> Weights:
    model = _gaussian(99)[1]
    model.load_state_dict(torch.load(path))
    return state(model)


# ema-pytorch


def _ema(seed: int) -> Any:
    from ema_pytorch import EMA

    model, optimizer = trained(seed)
    return EMA(model, beta=0.5, update_after_step=0, update_every=1), model, optimizer


def _ema_make(folder: Path, seed: int) -> Path:
    ema, model, optimizer = _ema(seed)
    for _ in range(3):
        step(model, optimizer)
        ema.update()
    torch.save({"step": 3, "ema": ema.state_dict(), "opt": optimizer.state_dict()}, folder / "3.pt")
    return folder / "3.pt"


def _ema_load(path: Path) -> Weights:
    ema, _, _ = _ema(99)
    ema.load_state_dict(torch.load(path)["ema"])
    return state(ema)


# setfit: a sentence transformer and a pickled head beside it


def _setfit_make(folder: Path, seed: int) -> Path:
    import numpy as np
    import sentence_transformers as st
    import setfit
    from sklearn.linear_model import LogisticRegression

    body = st.SentenceTransformer(str(MAKERS["sentence-transformers"].make(folder, seed)))
    head = LogisticRegression().fit(np.random.default_rng(seed).normal(size=(6, 4)), [0, 1] * 3)
    setfit.SetFitModel(body, head).save_pretrained(str(folder / "setfit"))
    return folder / "setfit"


LIBRARIES = {
    "quanto": Maker("optimum.quanto", _quanto_make, _quanto_load),
    "quanto-frozen": Maker("optimum.quanto", _quanto_frozen, _quanto_load, refused="quantised"),
    "bitsandbytes": refused("bitsandbytes", _bitsandbytes_make, "quant"),
    "torchao": refused("torchao", _torchao_make, "quantised"),
    "lycoris-locon": _lycoris("locon"),
    "lycoris-loha": _lycoris("loha"),
    "lycoris-lokr": _lycoris("lokr"),
    "gpytorch": Maker("gpytorch", _gaussian_make, _gaussian_load),
    "ema-pytorch": Maker("ema_pytorch", _ema_make, _ema_load),
    "setfit": refused("setfit", _setfit_make, "model_head.pkl"),
}
