"""Small models of many kinds, and two tasks that they learn within a second or two."""

import copy
import math
import pydoc_data.topics
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from kfold_demo import accuracy, network, outputs, split

State = dict[str, Tensor]
BATCH = 32
LENGTH = 32
LETTERS = " abcdefghijklmnopqrstuvwxyz.,()_"


@dataclass(frozen=True)
class Task:
    """What models are trained on and judged by.

    The error is the share of wrong answers, or for text the cross-entropy of the next character;
    chance is the error of a model that knows only how frequent the answers are.
    """

    inputs: Tensor
    targets: Tensor
    held_out: Tensor
    truth: Tensor
    chance: float
    metric: str

    @torch.no_grad()
    def error(self, model: nn.Module) -> float:
        """Return the error of a model on the held-out data."""
        if self.metric == "accuracy":
            return 1 - accuracy(outputs(model, self.held_out), self.truth)
        return float(loss(model.eval()(self.held_out), self.truth))

    def score(self, error: float) -> float:
        """Return an error as an accuracy or a perplexity."""
        return 1 - error if self.metric == "accuracy" else math.exp(min(error, 50))


def loss(predicted: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy, of each character where there are several."""
    return nn.functional.cross_entropy(predicted.flatten(0, -2), targets.flatten())


@cache
def digits() -> Task:
    """Return the task to tell digits apart."""
    (images, labels), _, (held_out, truth) = split()
    return Task(images, labels, held_out, truth, 0.9, "accuracy")


def turned() -> Task:
    """Return the digits turned by a right angle, and each called by another's name."""
    task = digits()
    images = [value.rot90(1, [2, 3]) for value in (task.inputs, task.held_out)]
    answers = [(value * 3 + 1) % 10 for value in (task.targets, task.truth)]
    return Task(images[0], answers[0], images[1], answers[1], task.chance, task.metric)


@cache
def text() -> Task:
    """Return the task to continue Python's documentation."""
    words = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    words = re.sub(r"\s+", " ", words.lower())
    tokens = torch.tensor([LETTERS.index(letter) for letter in words if letter in LETTERS])
    windows = tokens.unfold(0, LENGTH + 1, LENGTH)[:6000]
    windows = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))]
    train, test = windows[300:], windows[:300]
    frequency = torch.bincount(train.flatten(), minlength=len(LETTERS)).clamp(min=1) / train.numel()
    chance = float(-frequency.log()[test[:, 1:]].mean())
    return Task(train[:, :-1], train[:, 1:], test[:, :-1], test[:, 1:], chance, "perplexity")


# ----------------------------------------------------------------------------------------- networks


def mlp(width: int = 64, drop: float = 0.0, depth: int = 2) -> nn.Sequential:
    """Return hidden layers and a classifier."""
    layers: list[nn.Module] = [nn.Flatten()]
    for number in range(depth):
        layers += [nn.Linear(width if number else 64, width), nn.ReLU(), nn.Dropout(drop)]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def normalised(norm: Callable[[int], nn.Module]) -> nn.Sequential:
    """Return the network of kfold_demo.py with other norms."""
    model = network()
    model[1], model[5] = norm(16), norm(32)
    return model


def layer_normed() -> nn.Sequential:
    """Return a network of two convolutions with LayerNorm."""
    model = network()
    model[1], model[5] = nn.LayerNorm([16, 8, 8]), nn.LayerNorm([32, 4, 4])
    return model


group_normed = partial(normalised, partial(nn.GroupNorm, 4))


def normed_mlp() -> nn.Sequential:
    """Return an MLP with LayerNorm."""
    layers: list[nn.Module] = [nn.Flatten()]
    for before in (64, 64, 64):
        layers += [nn.Linear(before, 64), nn.LayerNorm(64), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(64, 10))


def depthwise() -> nn.Sequential:
    """Return depthwise and pointwise convolutions with BatchNorm."""
    layers: list[nn.Module] = [nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()]
    for _ in range(2):
        layers += [nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.BatchNorm2d(16), nn.ReLU()]
        layers += [nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*layers, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256, 10))


class Residual(nn.Module):
    """Add what some layers make of their input to it."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the sum."""
        total: Tensor = inputs + self.layers(inputs)
        return total


def tiny_matrices() -> nn.Sequential:
    """Return a convolutional network of many tiny matrices."""
    blocks = [
        Residual(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))
        for _ in range(12)
    ]
    ends = nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 10)
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), *blocks, *ends)


def weight_normed() -> nn.Sequential:
    """Return an MLP whose matrices are stored as lengths and directions."""
    model = mlp()
    for layer in (model[1], model[4], model[7]):
        weight_norm(layer)
    return model


def weight_normed_cnn() -> nn.Sequential:
    """Return a network of two convolutions, with matrices stored so too."""
    model = group_normed()
    for layer in (model[0], model[4], model[8]):
        weight_norm(layer)
    return model


class Transformer(nn.Module):
    """A transformer of two layers, for digits (a row is a token) or text.

    The positions are a parameter or the usual sines as a buffer. The causal mask is not saved, or
    is a buffer of floats: "large" negative or "infinite" ones to add, or "ones" where attention may
    look.
    """

    mask: Tensor
    table: Tensor

    def __init__(
        self,
        embedding: nn.Module,
        table: str = "parameter",
        mask: str = "",
        *,
        tied: bool = False,
        width: int = 32,
    ) -> None:
        super().__init__()
        self.causal = isinstance(embedding, nn.Embedding)
        length, answers = (LENGTH, len(LETTERS)) if self.causal else (8, 10)
        self.embedding = embedding
        positions = torch.randn(length, width)
        if table == "parameter":
            self.table = nn.Parameter(positions / 5)
        else:
            angles = torch.arange(length)[:, None] / 100 ** (torch.arange(width) / width)
            positions = torch.where(torch.arange(width) % 2 == 0, angles.sin(), angles.cos())
            self.register_buffer("table", positions)
        if self.causal:
            hidden = {"infinite": -math.inf, "ones": 1.0}.get(mask, -1e4)
            square = torch.full((length, length), hidden)
            square = square.tril() if mask == "ones" else square.triu(1)
            self.register_buffer("mask", square, persistent=bool(mask))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, batch_first=True, norm_first=True)
            for _ in range(2)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, answers)
        if tied and isinstance(embedding, nn.Embedding):
            nn.init.normal_(embedding.weight, std=width**-0.5)
            self.head.weight = embedding.weight

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits, of each token where the mask is causal."""
        hidden = self.embedding(inputs) + self.table
        mask = self.mask if self.causal else None
        if mask is not None and mask[0, 0] == 1:
            mask = (1 - mask) * -1e4
        for layer in self.layers:
            hidden = layer(hidden, src_mask=mask)
        hidden = self.norm(hidden if self.causal else hidden.mean(dim=1))
        predicted: Tensor = self.head(hidden)
        return predicted


class Recurrent(nn.Module):
    """An LSTM or GRU, for digits (a row is a token) or text."""

    def __init__(self, embedding: nn.Module, cell: type[nn.LSTM | nn.GRU], width: int = 64) -> None:
        super().__init__()
        self.embedding = embedding
        self.cell = cell(32, width, batch_first=True)
        self.head = nn.Linear(width, len(LETTERS) if isinstance(embedding, nn.Embedding) else 10)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits, of each token of text."""
        hidden, _ = self.cell(self.embedding(inputs))
        if not isinstance(self.embedding, nn.Embedding):
            hidden = hidden[:, -1]
        predicted: Tensor = self.head(hidden)
        return predicted


def rows() -> nn.Module:
    """Return an embedding of the rows of a digit."""
    return nn.Sequential(nn.Flatten(1, 2), nn.Linear(8, 32))


def letters(size: int = len(LETTERS)) -> nn.Module:
    """Return an embedding of characters, of which a larger one uses only the first."""
    return nn.Embedding(size, 32)


def reader(
    table: str = "parameter", mask: str = "", *, tied: bool = False, size: int = len(LETTERS)
) -> nn.Module:
    """Return a transformer for text."""
    return Transformer(letters(size), table, mask, tied=tied)


def viewer(table: str = "parameter") -> nn.Module:
    """Return a transformer for digits."""
    return Transformer(rows(), table)


def recurrent(cell: type[nn.LSTM | nn.GRU], size: int = len(LETTERS)) -> nn.Module:
    """Return an LSTM or GRU for text."""
    return Recurrent(letters(size), cell)


class LowRank(nn.Module):
    """A linear layer that does not change, and two factors that do."""

    def __init__(self, layer: nn.Linear, rank: int = 8) -> None:
        super().__init__()
        self.base = layer.requires_grad_(requires_grad=False)
        self.a = nn.Parameter(torch.randn(rank, layer.in_features) / layer.in_features**0.5)
        self.b = nn.Parameter(torch.zeros(layer.out_features, rank))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the sum of both."""
        changed: Tensor = self.base(inputs) + 2 * inputs @ self.a.T @ self.b.T
        return changed


def deep_head(inputs: int) -> nn.Module:
    """Return a head of three layers."""
    return nn.Sequential(
        nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
    )


def with_tanh() -> nn.Module:
    """Return an MLP that does not care about the signs of its hidden units."""
    model = mlp()
    model[2], model[5] = nn.Tanh(), nn.Tanh()
    return model


def factored() -> nn.Module:
    """Return an MLP whose layers are products of thin matrices."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Sequential(nn.Linear(64, 16, bias=False), nn.Linear(16, 96)),
        nn.ReLU(),
        nn.Sequential(nn.Linear(96, 16, bias=False), nn.Linear(16, 96)),
        nn.ReLU(),
        nn.Linear(96, 10),
    )


def positive() -> nn.Module:
    """Return an MLP whose weights are drawn around a positive number."""
    model = mlp()
    for part in model:
        if isinstance(part, nn.Linear):
            part.weight.data = torch.rand_like(part.weight).div(0.5 * part.in_features)
    return model


def near_identity(noise: float) -> nn.Module:
    """Return an MLP whose layers begin near the identity."""
    model = mlp()
    for part in (model[1], model[4]):
        part.weight = nn.Parameter(torch.eye(64) + noise * torch.randn(64, 64) / 8)
    return model


def featured() -> nn.Module:
    """Return an MLP on random features, which are large and the same for all."""
    model = mlp(256)
    first = model.get_submodule("1")
    nn.init.normal_(first.get_parameter("weight"), generator=torch.Generator().manual_seed(0))
    nn.init.zeros_(first.get_parameter("bias"))
    return freeze(model, ("1.",))


def soft(scale: float) -> nn.Module:
    """Return a linear classifier that begins with large weights."""
    linear = nn.Linear(64, 10)
    nn.init.normal_(linear.weight, std=scale)
    return nn.Sequential(nn.Flatten(), linear)


def freeze(model: nn.Module, prefixes: tuple[str, ...], *, but: bool = False) -> nn.Module:
    """Freeze the parameters of these names, or all but them."""
    for name, parameter in model.named_parameters():
        if name.startswith(prefixes) != but:
            parameter.requires_grad = False
    return model


# ----------------------------------------------------------------------------------------- training


def fit(
    model: nn.Module,
    task: Task,
    steps: int = 200,
    *,
    rate: float = 2e-3,
    decay: float = 0.01,
    momentum: float | None = None,
    fold: Tensor | None = None,
    order: int | None = None,
    masks: State | None = None,
) -> nn.Module:
    """Return a copy of a model after training, by AdamW or with momentum by SGD.

    Args:
        model: The model, whose frozen parameters stay.
        task: What to learn.
        steps: How many batches.
        rate: The learning rate.
        decay: The weight decay.
        momentum: That of SGD.
        fold: Which of the data to train on, instead of all.
        order: A seed for the order of the data.
        masks: Which elements stay zero.
    """
    model = copy.deepcopy(model).train()
    chosen = torch.arange(len(task.inputs)) if fold is None else fold
    generator = None if order is None else torch.Generator().manual_seed(order)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=decay)
    if momentum is not None:
        optimizer = torch.optim.SGD(parameters, lr=rate, momentum=momentum, weight_decay=decay)
    for _ in range(steps):
        batch = chosen[torch.randint(len(chosen), (BATCH,), generator=generator)]
        optimizer.zero_grad()
        loss(model(task.inputs[batch]), task.targets[batch]).backward()
        optimizer.step()
        for name, mask in (masks or {}).items():
            model.get_parameter(name).data *= mask
    return model


def folds(task: Task, count: int) -> Iterator[Tensor]:
    """Yield, for each fold, the data of all others."""
    order = torch.randperm(len(task.inputs))
    for fold in order.chunk(max(count, 2))[:count]:
        yield order[~torch.isin(order, fold)]
