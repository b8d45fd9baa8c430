"""Compare agreement with the accuracy of a mean, where averaging works and where it does not.

The network and the digits are those of kfold_demo.py. In each situation a few networks are trained,
saved and averaged; the table shows their agreement beside the accuracy of their mean.

    python scripts/agreement.py
"""

import copy
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.optim.swa_utils import update_bn

from kfold_demo import accuracy, batches, loaded, network, outputs, split, train
from merge_avg import merge_checkpoints
from merge_avg.agreement import LEAST_AGREEMENT

COUNT = 5
(IMAGES, LABELS), _, (HELD_OUT, TRUTH) = split()


def parts() -> Iterator[torch.Tensor]:
    """Yield, for each fold, the images of all others."""
    order = torch.randperm(len(IMAGES))
    for fold in order.chunk(COUNT):
        yield order[~torch.isin(order, fold)]


def trained(model: nn.Module, chosen: torch.Tensor, times: int = 1) -> nn.Module:
    """Return a copy of a model after training."""
    model = copy.deepcopy(model)
    for _ in range(times):
        train(model, IMAGES[chosen], LABELS[chosen])
    return model


def one_run() -> list[nn.Module]:
    """Train one network, and return it after each of the last epochs."""
    everything = torch.arange(len(IMAGES))
    models = [trained(network(), everything)]
    for _ in range(COUNT - 1):
        models.append(trained(models[-1], everything))
    return models


def from_one_base() -> list[nn.Module]:
    """Train the folds from one trained network."""
    base = trained(network(), torch.arange(len(IMAGES)), times=2)
    return [trained(base, chosen) for chosen in parts()]


def from_one_initialisation() -> list[nn.Module]:
    """Train the folds from the same untrained network."""
    initial = network()
    return [trained(initial, chosen) for chosen in parts()]


def permuted() -> list[nn.Module]:
    """Return copies of one network with permuted channels, which compute the same function."""
    model = trained(network(), torch.arange(len(IMAGES)))
    models = []
    for _ in range(COUNT):
        other = copy.deepcopy(model)
        first, second = torch.randperm(16), torch.randperm(32)
        state = other.state_dict()
        for name, value in state.items():
            if name.startswith(("0.", "1.")) and value.dim():
                state[name] = value[first]
            if name.startswith(("4.", "5.")) and value.dim():
                state[name] = value[second]
        state["4.weight"] = state["4.weight"][:, first]
        state["8.weight"] = state["8.weight"].view(10, 32, 16)[:, second].reshape(10, -1)
        other.load_state_dict(state)
        models.append(other)
    return models


def different_initialisations() -> list[nn.Module]:
    """Train the folds from a different network each."""
    return [trained(network(), chosen) for chosen in parts()]


SITUATIONS: dict[str, Callable[[], list[nn.Module]]] = {
    "epochs of one run": one_run,
    "folds, fine-tuned from one base": from_one_base,
    "folds, from one initialisation": from_one_initialisation,
    "copies with permuted channels": permuted,
    "folds, from different initialisations": different_initialisations,
}


def main() -> None:
    """Train, average and print the table."""
    columns = "agreement", "each (mean)", "their mean", "after update_bn", "warned"
    table = Table("networks", *columns, title=f"accuracy on {len(TRUTH)} held-out images")
    for name, make in SITUATIONS.items():
        torch.manual_seed(0)
        models = make()
        with tempfile.TemporaryDirectory() as temporary:
            paths = [Path(temporary) / f"{number}.pt" for number in range(len(models))]
            for path, model in zip(paths, models, strict=True):
                torch.save({"model": model.state_dict()}, path)
            merged = Path(temporary) / "merged.pt"
            found = merge_checkpoints(paths, merged).agreement
            each = [accuracy(outputs(loaded(path), HELD_OUT), TRUTH) for path in paths]
            averaged = loaded(merged)
        mean = accuracy(outputs(averaged, HELD_OUT), TRUTH)
        update_bn([inputs for inputs, _ in batches(IMAGES, LABELS)], averaged)
        after = accuracy(outputs(averaged, HELD_OUT), TRUTH)
        agreement = found.mean if found is not None else float("nan")
        warned = "yes" if agreement < LEAST_AGREEMENT else "no"
        shares = [f"{share:.1%}" for share in (sum(each) / len(each), mean, after)]
        table.add_row(name, f"{agreement:.3f}", *shares, warned)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
