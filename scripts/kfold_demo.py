"""Average the five folds of a real k-fold training, and compare the accuracy before and after.

A small CNN with BatchNorm is trained on scikit-learn's digits, one fold at a time, always from the
same initialisation. The command merge-avg averages the checkpoints: all of them, all but one, and
as a greedy soup.

    python scripts/kfold_demo.py [DIRECTORY]
    python scripts/kfold_demo.py --evaluate CHECKPOINT

DIRECTORY, if given, keeps the checkpoints. --evaluate prints the accuracy of one on the images that
the soup chooses by.
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
    """Return a CNN for 8 x 8 images in ten classes."""
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
    """Return the images in batches of 64, shuffled."""
    order = torch.randperm(len(images))
    return [(images[part], labels[part]) for part in order.split(64)]


def train(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Train a model in place."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    model.train()
    for _ in range(EPOCHS):
        for inputs, targets in batches(images, labels):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()


@torch.no_grad()
def outputs(model: nn.Module, images: Tensor) -> Tensor:
    """Return the model's probabilities."""
    predicted: Tensor = model.eval()(images).softmax(dim=1)
    return predicted


def loaded(path: Path) -> nn.Sequential:
    """Return the network with the weights of a checkpoint."""
    model = network()
    model.load_state_dict(torch.load(path, weights_only=True)["model"])
    return model


def accuracy(predicted: Tensor, truth: Tensor) -> float:
    """Return how often the most probable class is the right one."""
    return float((predicted.argmax(dim=1) == truth).float().mean())


def split() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return images and labels to train with, to choose by, and to test on."""
    digits = load_digits()
    data = (digits.images / 16).astype(np.float32)[:, None]
    parts = train_test_split(data, digits.target, test_size=0.25, random_state=0)
    images, held_out, labels, truth = (torch.from_numpy(part) for part in parts)
    return (images, labels), (held_out[::3], truth[::3]), (held_out, truth)


def evaluate(path: Path) -> None:
    """Print the accuracy of a checkpoint on the images to choose by."""
    _, (images, truth), _ = split()
    print(f"accuracy {accuracy(outputs(loaded(path), images), truth):.6f}")


def merge(*arguments: str | Path) -> None:
    """Run the command."""
    command = [sys.executable, "-m", "merge_avg", *map(str, arguments)]
    subprocess.run([*command, "--overwrite"], check=True)


def main(directory: Path) -> None:
    """Train, average and print the table."""
    torch.manual_seed(0)
    (images, labels), _, (held_out, truth) = split()
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
    merge(*paths, "-o", merged)
    merge(*paths, "-o", directory / "avg-{name}.pt", "--leave-one-out")
    soup = directory / "soup.pt"
    Path(f"{soup}.soup.jsonl").unlink(missing_ok=True)
    score = f'"{sys.executable}" "{Path(__file__).resolve()}" --evaluate {{}}'
    merge("soup", *paths, "-o", soup, "--eval", score, "--mode", "max")

    each = [outputs(loaded(path), held_out) for path in paths]
    rows = [(f"fold {fold}", accuracy(predicted, truth)) for fold, predicted in enumerate(each)]
    rows.append(("averaged weights", accuracy(outputs(loaded(merged), held_out), truth)))
    recalibrated = loaded(merged)
    update_bn([inputs for inputs, _ in batches(images, labels)], recalibrated)
    name = "averaged weights, after update_bn"
    rows.append((name, accuracy(outputs(recalibrated, held_out), truth)))
    rows.append(("greedy soup", accuracy(outputs(loaded(soup), held_out), truth)))
    ensemble = torch.stack(each).mean(dim=0)
    rows.append(("ensemble of the five outputs", accuracy(ensemble, truth)))
    # Tested on the held-out images, not on those of the fold that is left out: the other folds were
    # trained on them.
    for fold in range(FOLDS):
        without = outputs(loaded(directory / f"avg-without-fold{fold}.pt"), held_out)
        rows.append((f"averaged weights without fold {fold}", accuracy(without, truth)))

    table = Table("model", "accuracy", title=f"{len(truth)} held-out images")
    for name, value in rows:
        table.add_row(name, f"{value:.1%}")
    Console().print(table)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--evaluate"]:
        evaluate(Path(sys.argv[2]))
    elif len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
