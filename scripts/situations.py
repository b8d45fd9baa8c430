"""Small models in many situations, for some of which averaging works and for some it does not.

Each situation is a few lines of KINDS, at the end: models of one shape are started, then trained
apart on scikit-learn's digits or on the characters of Python's documentation. What becomes of
their mean is measured, never assumed. Every second situation of KINDS is set aside: rules about
when a mean works are made while looking at the others, the known ones. Those of FRESH were written
down after the rules, before any of them was trained.
"""

import copy
import json
import re
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from kfold_demo import network
from small_models import (
    LowRank,
    Recurrent,
    Residual,
    State,
    Task,
    Transformer,
    deep_head,
    depthwise,
    digits,
    factored,
    featured,
    fit,
    folds,
    freeze,
    group_normed,
    layer_normed,
    mlp,
    near_identity,
    normed_mlp,
    positive,
    reader,
    recurrent,
    rows,
    soft,
    text,
    tiny_matrices,
    turned,
    viewer,
    weight_normed,
    weight_normed_cnn,
    with_tanh,
)


def same(make: Callable[[], nn.Module], count: int = 3) -> list[nn.Module]:
    """Return one start for all."""
    return [make()] * count


def different(make: Callable[[], nn.Module], count: int = 3) -> list[nn.Module]:
    """Return a start for each."""
    return [make() for _ in range(count)]


def apart(
    starts: Iterable[nn.Module], task: Task, steps: int = 200, **how: Any
) -> "list[nn.Module]":
    """Train one model from each start, each on a fold of its own."""
    starts = list(starts)
    parts = list(folds(task, len(starts)))
    return [
        fit(start, task, steps, fold=part, **how) for start, part in zip(starts, parts, strict=True)
    ]


def sharing(
    make: Callable[[], nn.Module],
    prefixes: tuple[str, ...],
    count: int = 3,
    *,
    frozen: bool = False,
) -> list[nn.Module]:
    """Return starts of which the parts of these names are the same."""
    starts = different(make, count)
    common = {
        name: value for name, value in starts[0].state_dict().items() if name.startswith(prefixes)
    }
    for start in starts:
        start.load_state_dict(common, strict=False)
    return [freeze(start, prefixes) for start in starts] if frozen else starts


def with_heads(base: nn.Sequential, heads: Iterable[nn.Module], *, frozen: bool) -> list[nn.Module]:
    """Return models that have a base's layers but the last, and a head of their own."""
    models: list[nn.Module] = []
    for head in heads:
        body = copy.deepcopy(base[:-1]).requires_grad_(requires_grad=not frozen)
        ends = head if isinstance(head, nn.Sequential) else nn.Sequential(head)
        models.append(nn.Sequential(*body.children(), *ends.children()))
    return models


def permute(model: nn.Module, *axes: tuple[str, int]) -> nn.Module:
    """Return a copy whose hidden units are in another order.

    Args:
        model: The model.
        axes: Names of tensors, and the dimension of each that belongs to the units. Where it is
            longer than the least of them, each unit has a run of elements there if it is the second
            dimension (the pixels of a channel), and one in each block if it is the first (gates).
    """
    model = copy.deepcopy(model)
    state = model.state_dict()
    count = min(state[name].shape[dim] for name, dim in axes)
    order = torch.randperm(count)
    for name, dim in axes:
        value = state[name]
        if dim:
            value = value.unflatten(1, (count, -1))[:, order].flatten(1, 2)
        else:
            value = value.unflatten(0, (-1, count))[:, order].flatten(0, 1)
        state[name] = value.reshape(state[name].shape)
    model.load_state_dict(state)
    return model


def layer(*names: str) -> list[tuple[str, int]]:
    """Return the first dimension of each vector or matrix of some layers."""
    ends = "weight bias running_mean running_var".split()
    return [
        (f"{name}.{end}", 0) for name in names for end in ends[: 4 if name in {"1", "5"} else 2]
    ]


# --------------------------------------------------------------------------------------- situations


@dataclass(frozen=True)
class Models:
    """Trained models, and how they are saved.

    The checkpoint of a model is its state dict; with a base, its difference to that; with a dtype,
    rounded to it.
    """

    task: Task
    models: list[nn.Module]
    base: nn.Module | None = None
    dtype: torch.dtype | None = None

    def states(self) -> list[State]:
        """Return the state dicts to save."""
        states = []
        for model in self.models:
            state = model.state_dict()
            if self.base is not None:
                state = combined([state, self.base.state_dict()], [1, -1])
            for name, value in state.items():
                if self.dtype is not None and value.is_floating_point():
                    state[name] = value.to(self.dtype)
            states.append(state)
        return states

    def loaded(self, state: State) -> nn.Module:
        """Return the model of a state dict."""
        model = copy.deepcopy(self.models[0])
        if self.base is not None:
            state = combined([state, self.base.state_dict()], [1, 1])
        model.load_state_dict(state)
        return model


def combined(states: list[State], weights: list[float]) -> State:
    """Return a linear combination of state dicts, with the other tensors of the first."""
    result = dict(states[0])
    for name, first in result.items():
        if first.is_floating_point():
            parts = zip(states, weights, strict=True)
            total = sum((weight * state[name].double() for state, weight in parts), torch.zeros(()))
            result[name] = total.to(first.dtype)
    return result


# Fresh ones are a third: see above.
Half = Literal["known", "set aside", "fresh"]


@dataclass(frozen=True)
class Situation:
    """A way in which models came about."""

    kind: str
    name: str
    half: Half
    make: Callable[[], Models]

    @property
    def folder(self) -> str:
        """The name of the folder of its checkpoints."""
        return re.sub(r"[^a-z0-9]+", "-", f"{self.kind} {self.name}".lower()).strip("-")

    def keep(self, folder: Path, seed: int = 0) -> dict[str, Any]:
        """Return what is known of its checkpoints in a folder, where they are trained but once."""
        folder /= self.folder
        results = folder / "results.json"
        if results.exists():
            known: dict[str, Any] = json.loads(results.read_text())
            return known
        folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(zlib.crc32(f"{self.folder} {seed}".encode()))
        made = self.make()
        states = made.states()
        for number, state in enumerate(states):
            torch.save({"model": state}, folder / f"{number}.pt")
        about = {"kind": self.kind, "name": self.name, "set_aside": self.half != "known"}
        found = about | judged(made)
        results.write_text(json.dumps(found, indent=1) + "\n")
        return found


def judged(made: Models) -> dict[str, Any]:
    """Return the scores of each model, of their mean, and after recomputing BatchNorm."""
    task = made.task
    states = made.states()
    each = [task.error(made.loaded(state)) for state in states]
    model = made.loaded(combined(states, [1 / len(states)] * len(states)))
    errors = [task.error(model)]
    if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        update_bn(list(task.inputs.split(64)), model)
        errors.append(task.error(model))
    after = task.score(errors[1]) if errors[1:] else None
    return {
        "metric": task.metric,
        "each": [task.score(error) for error in each],
        "mean": task.score(errors[0]),
        "after_update_bn": after,
        "truth": truth(task, each, min(errors)),
    }


def truth(task: Task, each: list[float], mean: float) -> str:
    """Return whether a mean works, is hurt or is broken, from errors.

    What counts is the share of what each has learned (its way from chance) that the mean has lost.
    It works when it lost less than 3 %, and is broken when it lost 20 %. Where almost every answer
    is right, three times as many wrong ones are broken too from 6 % on. With BatchNorm, the better
    of the mean and the recomputed mean counts: the weights are judged, not the statistics.
    """
    before = sum(each) / len(each)
    lost = (mean - before) / (task.chance - before)
    if lost < 0.03:
        return "works"
    many = task.metric == "accuracy" and lost >= 0.06 and mean >= 3 * before
    return "broken" if lost >= 0.2 or many else "hurt"


def on_digits(starts: Iterable[nn.Module], steps: int = 300, **how: Any) -> Models:
    """Train apart on digits."""
    return Models(digits(), apart(starts, digits(), steps, **how))


def on_text(starts: Iterable[nn.Module], steps: int = 400, **how: Any) -> Models:
    """Train apart on text."""
    return Models(text(), apart(starts, text(), steps, **({"rate": 4e-3} | how)))


def on_turned(starts: Iterable[nn.Module], steps: int = 200, **how: Any) -> Models:
    """Train apart on turned digits."""
    return Models(turned(), apart(starts, turned(), steps, **how))


def in_bf16(made: Models) -> Models:
    """Return models to be saved in bfloat16."""
    return replace(made, dtype=torch.bfloat16)


def based(make: Callable[[], Any], steps: int = 300) -> Any:
    """Return a model after training on digits."""
    return fit(make(), digits(), steps)


def read(make: Callable[[], nn.Module], steps: int = 400, **how: Any) -> nn.Module:
    """Return a model after training on text."""
    return fit(make(), text(), steps, rate=4e-3, **how)


def grouped(make: Callable[[], nn.Module], *sizes: int) -> list[nn.Module]:
    """Return as many equal starts as each size says."""
    return [start for size in sizes for start in same(make, size)]


def snapshots(model: nn.Module, task: Task, count: int, every: int, **how: Any) -> Models:
    """Return states of one run."""
    models = [fit(model, task, every, **how)]
    for _ in range(count - 1):
        models.append(fit(models[-1], task, every, **how))
    return Models(task, models)


def rates(base: nn.Module, task: Task, *chosen: float, steps: int = 200) -> Models:
    """Fine-tune a model at several learning rates."""
    parts = folds(task, len(chosen))
    models = [
        fit(base, task, steps, rate=rate, fold=part)
        for rate, part in zip(chosen, parts, strict=True)
    ]
    return Models(task, models)


def with_start(make: Callable[[], nn.Module], count: int, every: int) -> Models:
    """Return states of one run, the first of them before it has learned anything."""
    start = make()
    found = snapshots(start, digits(), count, every)
    return Models(found.task, [start, *found.models])


def decays(base: nn.Module, *chosen: float) -> Models:
    """Fine-tune a model with several weight decays."""
    parts = zip(chosen, folds(digits(), len(chosen)), strict=True)
    models = [fit(base, digits(), 600, decay=decay, rate=5e-3, fold=part) for decay, part in parts]
    return Models(digits(), models)


def shared_steps(make: Callable[[], nn.Module], steps: int, then: int = 400, **how: Any) -> Models:
    """Train together for some steps, then apart."""
    return on_digits(same(lambda: fit(make(), digits(), steps, **how)), then, **how)


def permuted(model: nn.Module, count: int, *units: list[tuple[str, int]]) -> list[nn.Module]:
    """Return copies of a model whose units are in other orders."""
    models = []
    for _ in range(count):
        other = model
        for axes in units:
            other = permute(other, *axes)
        models.append(other)
    return models


def rescaled(model: nn.Module, signs: bool) -> nn.Module:  # noqa: FBT001
    """Return a copy of an MLP that computes the same with other scales or signs within."""
    model = copy.deepcopy(model)
    state = model.state_dict()
    for before, after in (("1", "4"), ("4", "7")):
        count = len(state[f"{before}.bias"])
        scale = torch.randn(count).sign() if signs else (2 * torch.randn(count)).exp()
        state[f"{before}.weight"] *= scale[:, None]
        state[f"{before}.bias"] *= scale
        state[f"{after}.weight"] /= scale
    return model


def low_rank(model: nn.Module, rank: int = 8) -> nn.Module:
    """Return a frozen copy of a model with factors beside its linear layers, the last aside."""
    model = copy.deepcopy(model).requires_grad_(requires_grad=False)
    names = [name for name, part in model.named_modules() if isinstance(part, nn.Linear)]
    for name in names[:-1]:
        if not name.endswith("out_proj"):  # which attention reads without calling it
            wrapped = LowRank(cast(nn.Linear, model.get_submodule(name)), rank)
            model.set_submodule(name, wrapped)
    return model


def adapted(model: nn.Module) -> nn.Module:
    """Return a frozen copy of an MLP with an adapter after each hidden layer."""
    layers: list[nn.Module] = []
    for part in copy.deepcopy(model).requires_grad_(requires_grad=False).children():
        layers.append(part)
        if isinstance(part, nn.ReLU):
            layers.append(Residual(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 64)))
    return nn.Sequential(*layers)


def random_masks(model: nn.Module, kept: float) -> State:
    """Return masks at random."""
    return {
        n: (torch.rand_like(p) < kept).float() for n, p in model.named_parameters() if p.dim() > 1
    }


def magnitude_masks(model: nn.Module, kept: float) -> State:
    """Return masks that keep the largest elements."""
    return {
        name: (value.abs() >= value.abs().flatten().quantile(1 - kept)).float()
        for name, value in model.named_parameters()
        if value.dim() > 1
    }


def pruned(starts: list[nn.Module], masks: Callable[[nn.Module], State], task: Task) -> Models:
    """Train apart, prune, and train on."""
    models = apart(starts, task)
    return Models(task, [fit(model, task, 200, masks=masks(model)) for model in models])


def once_masked(starts: list[nn.Module], kept: float, task: Task) -> Models:
    """Train apart with the same masks."""
    masks = random_masks(starts[0], kept)
    return Models(task, apart(starts, task, 400, masks=masks))


def redrawn(base: nn.Module, *names: str, count: int = 3) -> list[nn.Module]:
    """Return frozen copies of a model, with some layers drawn anew and to be trained."""
    models = []
    for _ in range(count):
        model = copy.deepcopy(base).requires_grad_(requires_grad=False)
        for name in names:
            part = cast(nn.Linear, model.get_submodule(name).requires_grad_(requires_grad=True))
            part.reset_parameters()
        models.append(model)
    return models


def with_new_heads(
    base: nn.Module, make: Callable[[], nn.Module], count: int = 3
) -> list[nn.Module]:
    """Return copies of a transformer, each with a head of its own."""
    models: list[nn.Module] = []
    for _ in range(count):
        model = cast(Transformer, copy.deepcopy(base))
        model.head = cast(nn.Linear, make())
        models.append(model)
    return models


def with_new_blocks(base: nn.Module, count: int = 3) -> list[nn.Module]:
    """Return copies of a transformer, each with a last block of its own."""
    models = []
    for _ in range(count):
        model = copy.deepcopy(base)
        fresh = viewer().state_dict()
        blocks = {name: value for name, value in fresh.items() if name.startswith("layers.1.")}
        model.load_state_dict(blocks, strict=False)
        models.append(model)
    return models


def other_heads(model: nn.Module) -> nn.Module:
    """Return a copy of a transformer whose attention has its heads in another order."""
    model = copy.deepcopy(model)
    order = torch.randperm(4)
    for name, value in model.state_dict().items():
        if "self_attn.in_proj" in name:
            value.copy_(value.unflatten(0, (3, 4, 8))[:, order].reshape(value.shape))
        elif "self_attn.out_proj.weight" in name:
            value.copy_(value.unflatten(1, (4, 8))[:, order].flatten(1))
    return model


def difference(make: Callable[[], nn.Module], task: Task, steps: int, **how: Any) -> Models:
    """Fine-tune a model, to be saved as differences to it."""
    base = based(make)
    return Models(task, apart(same(lambda: base), task, steps, **how), base=base)


# A new one goes to the end of its kind: who is set aside follows from the place, and stays.
KINDS: dict[str, dict[str, Callable[[], Models]]] = {
    "same initialisation": {
        "CNN with BatchNorm": lambda: on_digits(same(network, 5)),
        "MLP": lambda: on_digits(same(mlp)),
        "LSTM": lambda: on_text(same(lambda: recurrent(nn.LSTM))),
        "transformer": lambda: on_text(same(reader)),
        "CNN with GroupNorm": lambda: on_digits(same(group_normed)),
        "CNN with LayerNorm": lambda: on_digits(same(layer_normed)),
        "transformer of digits": lambda: on_digits(same(viewer)),
        "GRU": lambda: on_text(same(lambda: recurrent(nn.GRU))),
    },
    "different initialisations": {
        "CNN with BatchNorm": lambda: on_digits(different(network, 5)),
        "MLP": lambda: on_digits(different(mlp)),
        "LSTM": lambda: on_text(different(lambda: recurrent(nn.LSTM))),
        "transformer": lambda: on_text(different(reader)),
        "CNN with GroupNorm": lambda: on_digits(different(group_normed)),
        "CNN with LayerNorm": lambda: on_digits(different(layer_normed)),
        "transformer of digits": lambda: on_digits(different(viewer)),
        "GRU": lambda: on_text(different(lambda: recurrent(nn.GRU))),
        "MLP with LayerNorm": lambda: on_digits(different(normed_mlp)),
        "two deep MLPs": lambda: on_digits(different(partial(mlp, 48, depth=5), 2)),
    },
    "equal buffers": {
        "sines and large mask, different": lambda: on_text(
            different(partial(reader, "sines", "large"))
        ),
        "sines, different": lambda: on_digits(different(partial(viewer, "sines"))),
        "sines and mask of ones, different": lambda: on_text(
            different(partial(reader, "sines", "ones"))
        ),
        "infinite mask, different": lambda: on_text(different(partial(reader, mask="infinite"))),
        "sines and infinite mask, same": lambda: on_text(
            same(partial(reader, "sines", "infinite"))
        ),
        "sines and large mask, same": lambda: on_text(same(partial(reader, "sines", "large"))),
        "random features, different": lambda: on_digits(different(featured)),
        "random features, same": lambda: on_digits(same(featured)),
        "mask of ones, same": lambda: on_text(same(partial(reader, mask="ones"))),
        "large mask, different": lambda: on_text(different(partial(reader, mask="large"))),
    },
    "permuted": {
        "channels of a CNN": lambda: Models(
            digits(),
            permuted(
                based(network),
                5,
                [*layer("0", "1"), ("4.weight", 1)],
                [*layer("4", "5"), ("8.weight", 1)],
            ),
        ),
        "MLP": lambda: Models(
            digits(),
            permuted(
                based(mlp), 3, [*layer("1")[:2], ("4.weight", 1)], [*layer("4"), ("7.weight", 1)]
            ),
        ),
        "feed-forward layers of a transformer": lambda: Models(
            text(),
            permuted(
                read(reader),
                3,
                *(
                    [*layer(f"layers.{n}.linear1"), (f"layers.{n}.linear2.weight", 1)]
                    for n in range(2)
                ),
            ),
        ),
        "LSTM": lambda: Models(
            text(),
            permuted(
                read(lambda: recurrent(nn.LSTM)),
                3,
                [
                    ("cell.weight_ih_l0", 0),
                    ("cell.weight_hh_l0", 0),
                    ("cell.bias_ih_l0", 0),
                    ("cell.bias_hh_l0", 0),
                    ("cell.weight_hh_l0", 1),
                    ("head.weight", 1),
                ],
            ),
        ),
        "scales": lambda: Models(
            digits(), [rescaled(m, signs=False) for m in same(lambda: based(mlp))]
        ),
        "signs": lambda: Models(
            digits(), [rescaled(m, signs=True) for m in same(lambda: based(with_tanh))]
        ),
        "one layer of a deep MLP": lambda: Models(
            digits(), permuted(based(partial(mlp, depth=5)), 3, [*layer("7"), ("10.weight", 1)])
        ),
        "feed-forward layer of one block": lambda: Models(
            digits(),
            permuted(
                based(viewer), 3, [*layer("layers.1.linear1"), ("layers.1.linear2.weight", 1)]
            ),
        ),
    },
    "drifted": {
        "CNN with LayerNorm": lambda: on_digits(same(layer_normed), 1200, rate=1e-2),
        "MLP with LayerNorm": lambda: on_digits(same(normed_mlp), 2500, rate=1e-2),
        "MLP by weight decay": lambda: on_digits(same(mlp), 2500, rate=5e-3, decay=0.5),
        "transformer by weight decay": lambda: on_digits(same(viewer), 900, rate=4e-3, decay=0.5),
        "CNN with LayerNorm by weight decay": lambda: on_digits(
            same(layer_normed), 1200, rate=4e-3, decay=0.5
        ),
        "CNN with BatchNorm by SGD": lambda: on_digits(
            same(network), 1000, rate=0.1, momentum=0.9, decay=5e-3
        ),
        "MLP with LayerNorm by SGD": lambda: on_digits(
            same(normed_mlp), 2000, rate=0.1, momentum=0.9, decay=5e-3
        ),
        "CNN with GroupNorm by weight decay": lambda: on_digits(
            same(group_normed), 1200, rate=1e-2, decay=0.3
        ),
        "LSTM": lambda: on_text(same(lambda: recurrent(nn.LSTM), 2), 900, rate=1e-2, decay=0.3),
        "CNN with BatchNorm": lambda: on_digits(same(network), 1200, rate=1e-2, decay=0.3),
        "MLP": lambda: on_digits(same(mlp), 2500, rate=1e-2),
        "GRU": lambda: on_text(same(lambda: recurrent(nn.GRU), 2), 600, rate=1e-2, decay=0.3),
    },
    "heads": {
        "linear on a frozen CNN": lambda: on_digits(
            with_heads(based(group_normed), different(lambda: nn.Linear(512, 10)), frozen=True)
        ),
        "linear on a frozen MLP": lambda: on_digits(
            with_heads(based(mlp), different(lambda: nn.Linear(64, 10), 5), frozen=True)
        ),
        "deep on a frozen CNN": lambda: on_digits(
            with_heads(based(group_normed), different(partial(deep_head, 512)), frozen=True)
        ),
        "deep on a frozen MLP": lambda: on_digits(
            with_heads(based(mlp), different(partial(deep_head, 64)), frozen=True)
        ),
        "linear on a fine-tuned MLP": lambda: on_digits(
            with_heads(based(mlp), different(lambda: nn.Linear(64, 10)), frozen=False)
        ),
        "linear on a fine-tuned CNN": lambda: on_digits(
            with_heads(based(group_normed), different(lambda: nn.Linear(512, 10), 5), frozen=False)
        ),
        "deep on a fine-tuned CNN": lambda: on_digits(
            with_heads(based(group_normed), different(partial(deep_head, 512)), frozen=False)
        ),
        "deep on a fine-tuned deep MLP": lambda: on_digits(
            with_heads(
                based(partial(mlp, 64, depth=6)), different(partial(deep_head, 64)), frozen=False
            )
        ),
    },
    "frozen embedding": {
        "transformer, different": lambda: on_text(sharing(reader, ("embedding",), frozen=True)),
        "LSTM, different": lambda: on_text(
            sharing(lambda: recurrent(nn.LSTM), ("embedding",), frozen=True)
        ),
        "GRU, same": lambda: on_text(same(lambda: freeze(recurrent(nn.GRU), ("embedding",)))),
        "transformer, same": lambda: on_text(same(lambda: freeze(reader(), ("embedding",)))),
        "large, GRU, different": lambda: on_text(
            sharing(lambda: recurrent(nn.GRU, 4000), ("embedding",), frozen=True)
        ),
        "large, transformer, different": lambda: on_text(
            sharing(partial(reader, size=4000), ("embedding",), frozen=True)
        ),
        "large, transformer, same": lambda: on_text(
            same(lambda: freeze(reader(size=4000), ("embedding",)))
        ),
        "large, LSTM, same": lambda: on_text(
            same(lambda: freeze(recurrent(nn.LSTM, 4000), ("embedding",)))
        ),
    },
    "factors": {
        "low rank, different, MLP": lambda: on_turned(
            different(partial(low_rank, based(mlp))), 600, rate=5e-3
        ),
        "low rank, different, transformer": lambda: on_turned(
            different(partial(low_rank, based(viewer))), 500, rate=5e-3
        ),
        "low rank, same A, MLP": lambda: on_turned(
            same(lambda: low_rank(based(mlp))), 600, rate=5e-3
        ),
        "low rank, same A, transformer": lambda: on_turned(
            same(lambda: low_rank(based(viewer))), 500, rate=5e-3
        ),
        "products of thin matrices, same": lambda: on_digits(same(factored)),
        "products of thin matrices, different": lambda: on_digits(different(factored)),
        "adapters, different": lambda: on_turned(different(partial(adapted, based(mlp))), 500),
        "adapters, same": lambda: on_turned(same(lambda: adapted(based(mlp))), 500),
    },
    "groups": {
        "8 and 2 CNNs": lambda: on_digits(grouped(network, 8, 2), 200),
        "8 and 2 MLPs": lambda: on_digits(grouped(mlp, 8, 2)),
        "3 and 3 MLPs": lambda: on_digits(grouped(mlp, 3, 3)),
        "3 and 3 CNNs": lambda: on_digits(grouped(group_normed, 3, 3), 200),
        "2 of 10 odd, each from its own, CNNs": lambda: on_digits(
            grouped(group_normed, 8, 1, 1), 200
        ),
        "2 of 10 odd, each from its own, MLPs": lambda: on_digits(grouped(mlp, 8, 1, 1)),
        "1 of 5 odd": lambda: on_digits(grouped(layer_normed, 4, 1)),
        "3 pairs": lambda: on_digits(grouped(network, 2, 2, 2)),
        "7 and 3 CNNs": lambda: on_digits(grouped(group_normed, 7, 3), 200),
        "5 and 5 MLPs": lambda: on_digits(grouped(normed_mlp, 5, 5)),
        "8 and 2 CNNs with GroupNorm": lambda: on_digits(grouped(group_normed, 8, 2), 200),
        "8 and 2 MLPs with LayerNorm": lambda: on_digits(grouped(normed_mlp, 8, 2), 400),
        "4 and 1 LSTMs": lambda: on_text(grouped(lambda: recurrent(nn.LSTM), 4, 1)),
        "4 and 1 transformers": lambda: on_digits(grouped(viewer, 4, 1)),
    },
    "differences": {
        "few steps on the same task": lambda: difference(mlp, digits(), 20),
        "few steps on another task": lambda: difference(mlp, turned(), 60),
        "many steps on the same task": lambda: difference(group_normed, digits(), 300),
        "a step with noise": lambda: difference(layer_normed, digits(), 1, rate=5e-4),
        "strangers": lambda: Models(digits(), on_digits(different(mlp)).models, base=mlp()),
        "strangers to a trained base": lambda: Models(
            digits(), on_digits(different(group_normed)).models, base=based(group_normed)
        ),
    },
    "sparse": {
        "same masks, same initialisation": lambda: once_masked(same(mlp), 0.2, digits()),
        "same masks, different initialisations": lambda: once_masked(different(mlp), 0.2, digits()),
        "pruned by magnitude, same initialisation": lambda: pruned(
            same(group_normed), partial(magnitude_masks, kept=0.1), digits()
        ),
        "pruned by magnitude, same initialisation, MLP": lambda: pruned(
            same(mlp), partial(magnitude_masks, kept=0.15), digits()
        ),
        "pruned by magnitude, different initialisations": lambda: pruned(
            different(mlp), partial(magnitude_masks, kept=0.15), digits()
        ),
        "pruned at random, same initialisation": lambda: pruned(
            same(mlp), partial(random_masks, kept=0.3), digits()
        ),
    },
    "tied": {
        "same": lambda: on_text(same(partial(reader, tied=True))),
        "different": lambda: on_text(different(partial(reader, tied=True))),
        "different, with sines": lambda: on_text(different(partial(reader, "sines", tied=True))),
        "fine-tuned": lambda: on_text(
            same(lambda: read(partial(reader, tied=True))), 100, rate=1e-3
        ),
    },
    "bf16": {
        "same": lambda: in_bf16(on_digits(same(mlp))),
        "different": lambda: in_bf16(on_digits(different(group_normed))),
        "different transformers": lambda: in_bf16(
            on_text(different(partial(reader, "sines", "large")))
        ),
        "fine-tuned so little that most is equal": lambda: in_bf16(
            on_digits(same(lambda: based(group_normed)), 10, rate=2e-5)
        ),
    },
    "one run": {
        "epochs of a CNN": lambda: snapshots(based(network), digits(), 5, 150),
        "epochs of an LSTM": lambda: snapshots(
            read(lambda: recurrent(nn.LSTM), 200), text(), 4, 80
        ),
        "SWA of an MLP": lambda: snapshots(
            based(mlp), digits(), 6, 150, rate=0.05, momentum=0.9, decay=1e-3
        ),
        "SWA of a CNN with LayerNorm": lambda: snapshots(
            based(layer_normed), digits(), 5, 200, rate=0.05, momentum=0.9, decay=1e-3
        ),
        "from the first epochs": lambda: snapshots(mlp(), digits(), 5, 80),
        "far apart, by weight decay": lambda: snapshots(
            based(normed_mlp), digits(), 3, 800, rate=5e-3, decay=0.5
        ),
        "with the start itself": lambda: with_start(network, 4, 100),
        "with the start itself, MLP": lambda: with_start(mlp, 2, 200),
    },
    "fine-tunes": {
        "low rates": lambda: rates(based(network), digits(), 1e-4, 2e-4, 5e-4, 1e-3),
        "low rates, transformer": lambda: rates(read(reader), text(), 1e-4, 3e-4, 1e-3),
        "high rates": lambda: rates(based(group_normed), digits(), 3e-3, 1e-2, 3e-2),
        "high rates, MLP": lambda: rates(based(mlp), digits(), 3e-3, 1e-2, 3e-2),
        "another task": lambda: on_turned(same(lambda: based(network)), 300),
        "another task, MLP": lambda: on_turned(same(lambda: based(mlp)), 300),
        "other weight decays": lambda: decays(based(mlp), 0.01, 0.1, 0.3),
        "other weight decays, CNN": lambda: decays(based(group_normed), 0.01, 0.1, 0.5),
    },
    "little trained": {
        "biases and norms": lambda: on_turned(
            same(lambda: freeze(based(layer_normed), ("1.", "5.", "0.bias", "4.bias"), but=True)),
        ),
        "the last layer": lambda: on_turned(same(lambda: freeze(based(mlp), ("7.",), but=True))),
        "drawn anew: one layer": lambda: on_digits(redrawn(based(partial(mlp, depth=4)), "4")),
        "drawn anew: two layers in a row": lambda: on_digits(
            redrawn(based(partial(mlp, depth=5)), "4", "7")
        ),
        "drawn anew: a block of a transformer": lambda: on_digits(
            redrawn(based(viewer), "layers.1.linear1", "layers.1.linear2")
        ),
        "drawn anew: the first layers of a CNN": lambda: on_digits(
            redrawn(based(group_normed), "0", "4")
        ),
    },
    "copies": {
        "three": lambda: Models(digits(), same(lambda: based(network))),
        "three, text": lambda: Models(text(), same(lambda: read(lambda: recurrent(nn.GRU)))),
        "two and a stranger": lambda: Models(digits(), [*same(lambda: based(mlp), 2), based(mlp)]),
        "four and a stranger": lambda: Models(
            digits(), [*same(lambda: based(group_normed), 4), based(group_normed)]
        ),
    },
    "small kernels": {
        "depthwise, same": lambda: on_digits(same(depthwise)),
        "depthwise, different": lambda: on_digits(different(depthwise)),
        "tiny matrices, different": lambda: on_digits(different(tiny_matrices), 200),
        "tiny matrices, same": lambda: on_digits(same(tiny_matrices), 200),
    },
    "seeds": {
        "dropout": lambda: Models(
            digits(), [fit(m, digits(), 400, order=1) for m in same(partial(mlp, drop=0.3))]
        ),
        "order": lambda: Models(digits(), [fit(m, digits(), 400) for m in same(mlp)]),
        "order, transformer": lambda: Models(
            digits(), [fit(m, digits(), 400) for m in same(viewer)]
        ),
        "initialisation": lambda: Models(
            digits(), [fit(m, digits(), 400, order=1) for m in different(mlp)]
        ),
    },
    "shared steps": {
        "5, CNN with LayerNorm": lambda: shared_steps(layer_normed, 5, 800, rate=5e-3),
        "100, CNN with LayerNorm": lambda: shared_steps(layer_normed, 100, 800, rate=5e-3),
        "20, transformer": lambda: shared_steps(viewer, 20, 500, rate=4e-3),
        "100, transformer": lambda: shared_steps(viewer, 100, 500, rate=4e-3),
        "50, MLP with LayerNorm": lambda: shared_steps(normed_mlp, 50, 1500, rate=5e-3),
        "10, MLP": lambda: shared_steps(mlp, 10, 1500, rate=5e-3),
    },
    "weight norm": {
        "same": lambda: on_digits(same(weight_normed)),
        "different": lambda: on_digits(different(weight_normed)),
        "fine-tuned at a high rate": lambda: on_digits(
            same(lambda: based(weight_normed)), 1000, rate=1e-2
        ),
        "fine-tuned": lambda: on_digits(same(lambda: based(weight_normed))),
    },
    "partly same": {
        "the first layer of a CNN": lambda: on_digits(sharing(network, ("0.", "1."))),
        "the first layers of an MLP": lambda: on_digits(
            sharing(partial(mlp, depth=4), ("1.", "4."))
        ),
        "all but the head": lambda: on_digits(sharing(group_normed, ("0.", "1.", "4.", "5."))),
        "all but the embedding": lambda: on_text(
            sharing(lambda: recurrent(nn.LSTM), ("cell", "head"))
        ),
        "the largest of an LSTM": lambda: on_text(
            sharing(lambda: recurrent(nn.LSTM), ("cell.weight_hh", "embedding"))
        ),
        "all but a layer": lambda: on_text(
            sharing(reader, ("embedding", "table", "layers.0", "norm", "head"))
        ),
        "a large embedding": lambda: on_text(sharing(partial(reader, size=4000), ("embedding",))),
        "a large embedding, GRU": lambda: on_text(
            sharing(lambda: recurrent(nn.GRU, 4000), ("embedding",))
        ),
    },
    "not centred": {
        "positive, different": lambda: on_digits(different(positive), 500),
        "positive, same": lambda: on_digits(same(positive), 500),
        "near the identity": lambda: on_digits(different(partial(near_identity, 0.3))),
        "less near the identity": lambda: on_digits(different(partial(near_identity, 1.0))),
        "positive, different, trained little": lambda: on_digits(different(positive), 120),
        "positive, same, trained little": lambda: on_digits(same(positive), 120),
    },
    "one layer": {
        "large weights": lambda: on_digits(different(partial(soft, 0.3)), 1000, rate=5e-3),
        "larger weights": lambda: on_digits(different(partial(soft, 1.0), 5), 1000, rate=1e-2),
    },
}

# A new one would not be fresh: write another list, and say when.
FRESH: dict[str, dict[str, Callable[[], Models]]] = {
    "differences": {
        "strangers, transformer": lambda: Models(
            digits(), on_digits(different(viewer)).models, base=viewer()
        ),
        "strangers to a trained base, BatchNorm": lambda: Models(
            digits(), on_digits(different(network)).models, base=based(network)
        ),
    },
    "weight norm": {"different, CNN": lambda: on_digits(different(weight_normed_cnn))},
    "heads": {
        "deep on a fine-tuned transformer": lambda: on_digits(
            with_new_heads(based(viewer), partial(deep_head, 32))
        ),
        "linear on a fine-tuned transformer": lambda: on_digits(
            with_new_heads(based(viewer), lambda: nn.Linear(32, 10))
        ),
    },
    "blocks": {
        "the last of a fine-tuned transformer": lambda: on_digits(with_new_blocks(based(viewer)))
    },
    "groups": {
        "6 and 2 GRUs": lambda: on_text(grouped(lambda: recurrent(nn.GRU), 6, 2)),
        "4, 3 and 2 deep MLPs": lambda: on_digits(grouped(partial(mlp, depth=4), 4, 3, 2)),
    },
    "drifted": {
        "depthwise convolutions": lambda: on_digits(same(depthwise), 1000, rate=1e-2),
        "LSTM of digits": lambda: on_digits(
            same(lambda: Recurrent(rows(), nn.LSTM)), 1000, rate=1e-2
        ),
    },
    "permuted": {
        "heads of attention": lambda: Models(
            text(), [other_heads(model) for model in same(lambda: read(reader))]
        )
    },
}

SITUATIONS = [
    Situation(kind, name, "set aside" if number % 2 else "known", make)
    for kind, members in KINDS.items()
    for number, (name, make) in enumerate(members.items())
] + [
    Situation(kind, name, "fresh", make)
    for kind, members in FRESH.items()
    for name, make in members.items()
]

# Attention's fast path reads the weights of layers that LowRank replaces.
torch.backends.mha.set_fastpath_enabled(value=False)
