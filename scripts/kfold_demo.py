"""Averages the five folds of a real k-fold training, and shows what became of the accuracy.

A small CNN with BatchNorm is trained on scikit-learn's digits, one fold at a time, always from the
same initialisation; the checkpoints are averaged by the command merge-avg itself.

    python scripts/kfold_demo.py [DIRECTORY]

DIRECTORY, if given, keeps the checkpoints.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import KFold, train_test_split
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

FOLDS = 5
EPOCHS = 8


def network() -> nn.Sequential:
    """A CNN for 8 x 8 images in ten classes."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 10),
    )


def batches(images: Tensor, labels: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The images in batches of 64, shuffled."""
    order = torch.randperm(len(images))
    return [(images[part], labels[part]) for part in order.split(64)]


def train(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Trains a model in place."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    model.train()
    for _ in range(EPOCHS):
        for inputs, targets in batches(images, labels):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()


@torch.no_grad()
def outputs(model: nn.Module, images: Tensor) -> Tensor:
    """The model's probabilities."""
    predicted: Tensor = model.eval()(images).softmax(dim=1)
    return predicted


def loaded(path: Path) -> nn.Sequential:
    """The network with the weights of a checkpoint."""
    model = network()
    model.load_state_dict(torch.load(path, weights_only=True)["model"])
    return model


def main(directory: Path) -> None:
    """Trains, averages and prints the table."""
    torch.manual_seed(0)
    digits = load_digits()
    data = (digits.images / 16).astype(np.float32)[:, None]
    parts = train_test_split(data, digits.target, test_size=0.25, random_state=0)
    images, held_out, labels, truth = (torch.from_numpy(part) for part in parts)
    initial = network().state_dict()
    initial = {name: value.clone() for name, value in initial.items()}

    paths = []
    for fold, (chosen, _) in enumerate(KFold(FOLDS, shuffle=True, random_state=0).split(images)):
        model = network()
        model.load_state_dict(initial)
        train(model, images[chosen], labels[chosen])
        paths.append(directory / f"fold{fold}.pt")
        torch.save({"model": model.state_dict(), "epoch": EPOCHS, "fold": fold}, paths[-1])

    merged = directory / "merged.pt"
    command = [sys.executable, "-m", "merge_avg", *map(str, paths), "-o", str(merged)]
    subprocess.run([*command, "--overwrite"], check=True)

    def accuracy(predicted: Tensor) -> float:
        return float((predicted.argmax(dim=1) == truth).float().mean())

    each = [outputs(loaded(path), held_out) for path in paths]
    rows = [(f"fold {fold}", accuracy(predicted)) for fold, predicted in enumerate(each)]
    rows.append(("averaged weights", accuracy(outputs(loaded(merged), held_out))))
    recalibrated = loaded(merged)
    update_bn([inputs for inputs, _ in batches(images, labels)], recalibrated)
    rows.append(("averaged weights, after update_bn", accuracy(outputs(recalibrated, held_out))))
    ensemble = torch.stack(each).mean(dim=0)
    rows.append(("ensemble of the five outputs", accuracy(ensemble)))

    table = Table("model", "accuracy", title=f"{len(truth)} held-out images")
    for name, value in rows:
        table.add_row(name, f"{value:.1%}")
    Console().print(table)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
