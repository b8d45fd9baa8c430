"""merge_avg.merger: averaging models in memory, and their BatchNorm statistics afterwards."""

import copy
import json
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from merge_avg import AverageModelMerger, MergeWarning, recalibrate_batch_norm


def tied():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
    model[1].weight = model[0].weight
    return model


def channels_last():
    return nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)


def derived(wrap):
    def make():
        with pytest.warns(FutureWarning):
            return wrap(nn.Linear(6, 4))

    return make


MAKERS = {
    "linear": lambda: nn.Linear(10, 10),
    "convolution": lambda: nn.Conv2d(3, 6, 5),
    "loss": nn.CrossEntropyLoss,
    "lstm": lambda: nn.LSTM(6, 4, 2),
    "batchnorm": lambda: nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3)),
    "weight_norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 4)),
    "spectral_norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(6, 4)),
    "old weight_norm": derived(nn.utils.weight_norm),
    "bfloat16": lambda: nn.Linear(6, 4).bfloat16(),
    "complex": lambda: nn.Linear(6, 4, dtype=torch.complex64),
    "channels_last": channels_last,
    "tied": tied,
}


def mean_of(tensors):
    first = tensors[0]
    if not (first.is_floating_point() or first.is_complex()):
        return first
    wide = torch.complex128 if first.is_complex() else torch.float64
    return (sum(t.to(wide) for t in tensors) / len(tensors)).to(first.dtype)


@pytest.mark.parametrize("name", MAKERS)
def test_every_kind_of_module_merges(name):
    """The merged model is a new one of the same type that holds the mean; the inputs stay."""
    models = [MAKERS[name]() for _ in range(3)]
    before = [copy.deepcopy(model.state_dict()) for model in models]
    merged = AverageModelMerger(models).merge_models()
    assert type(merged) is type(models[0])
    for key, value in merged.state_dict().items():
        assert torch.equal(value, mean_of([state[key] for state in before])), key
        assert value.stride() == before[0][key].stride()
    for model, state in zip(models, before, strict=True):
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    theirs = {p.data_ptr() for model in models for p in model.parameters()}
    assert theirs.isdisjoint(p.data_ptr() for p in merged.parameters())


def test_ties_modes_and_gradients_are_kept():
    """Ties, requires_grad, training mode and an LSTM's own list of weights survive."""
    models = [tied().eval() for _ in range(2)]
    models[0][0].weight.requires_grad_(requires_grad=False)
    merged = AverageModelMerger(models).merge_models()
    assert merged[0].weight is merged[1].weight
    assert not merged.training
    assert not merged[0].weight.requires_grad
    lstm = AverageModelMerger([nn.LSTM(3, 2), nn.LSTM(3, 2)]).merge_models()
    assert lstm._flat_weights[0] is lstm.weight_ih_l0
    lstm(torch.randn(4, 1, 3))[0].sum().backward()


def test_derived_weights_are_computed_anew():
    """The weight of the old weight_norm hook follows from the averaged factors at once."""
    models = [MAKERS["old weight_norm"]() for _ in range(2)]
    for model in models:
        model(torch.ones(1, 6))  # leaves a tensor with a gradient function behind
    merged = AverageModelMerger(models).merge_models()
    direction = merged.weight_v / merged.weight_v.norm(dim=1, keepdim=True)
    assert torch.allclose(merged.weight, merged.weight_g * direction)


def test_counters_are_the_first_models_and_other_integers_have_to_agree():
    """num_batches_tracked may differ; an index buffer may not."""
    models = [nn.BatchNorm1d(2) for _ in range(2)]
    models[0].num_batches_tracked.fill_(10)
    models[1].num_batches_tracked.fill_(11)
    assert AverageModelMerger(models).merge_models().num_batches_tracked == 10
    for index, model in enumerate(models):
        model.register_buffer("index", torch.arange(2) + index)
    with pytest.raises(ValueError, match=r"'index'.*models\[1\]"):
        AverageModelMerger(models).merge_models()


def test_weights_count():
    """Weights 1 and 3 give a quarter and three quarters."""
    models = [nn.Linear(1, 1, bias=False) for _ in range(2)]
    for model, value in zip(models, (0.0, 4.0), strict=True):
        nn.init.constant_(model.weight, value)
    assert AverageModelMerger(models, weights=[1, 3]).merge_models().weight.item() == 3.0
    for weights in (torch.tensor([1.0, 3.0]), iter([1, 3])):
        assert AverageModelMerger(models, weights=weights).merge_models().weight.item() == 3.0


def test_weights_have_an_order():
    """The keys of a dict, or the letters of a text, would be other weights in silence."""
    models = [nn.Linear(1, 1), nn.Linear(1, 1)]
    for weights in ({1: 0.5, 2: 0.5}, {1, 2}, 0.5):
        with pytest.raises(TypeError, match="weights must be a list of numbers, not "):
            AverageModelMerger(models, weights=weights)
    with pytest.raises(ValueError, match="1 weights for 2 models"):
        AverageModelMerger(models, weights="12")


@pytest.mark.parametrize(
    ("models", "error", "says"),
    [
        ([], ValueError, "no models"),
        ([nn.Linear(1, 1), 3], TypeError, r"models\[1\] is not an nn.Module: int"),
        (nn.Linear(1, 1), TypeError, "list"),
        (nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)), TypeError, "list .* not Sequential"),
        (None, TypeError, "list .* not NoneType"),
        ({"a": nn.Linear(1, 1)}, TypeError, r"models\[0\] is not an nn.Module: str"),
        ([nn.Linear(2, 2), nn.Linear(2, 3)], ValueError, "'weight' has the shape"),
        ([nn.Linear(2, 2), nn.Linear(2, 2, bias=False)], ValueError, r"only models.0. has 'bias'"),
        ([nn.Linear(2, 2), nn.Linear(2, 2).half()], ValueError, "dtype"),
        ([nn.Linear(2, 2), nn.Linear(2, 2, device="meta")], ValueError, "no plain data"),
    ],
)
def test_models_that_cannot_be_merged_are_refused(models, error, says):
    """Empty lists, values that are not modules, and different structures are named errors."""
    with pytest.raises(error, match=says):
        AverageModelMerger(models).merge_models()


def test_nonfinite_weights_are_refused():
    """NaN in one model is an error that names it, unless allowed."""
    models = [nn.Linear(2, 2) for _ in range(2)]
    with torch.no_grad():
        models[1].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"'weight' of models\[1\]"):
        AverageModelMerger(models).merge_models()
    merged = AverageModelMerger(models, allow_nonfinite=True).merge_models()
    assert merged.weight.isnan().sum() == 1


def test_a_tie_in_one_model_only_is_refused_unless_the_values_agree():
    """Models that tie differently merge only where the tensors are equal anyway."""
    loose = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
    with pytest.raises(ValueError, match="tied in models"):
        AverageModelMerger([tied(), loose]).merge_models()
    loose[1].weight = nn.Parameter(loose[0].weight.detach().clone())
    AverageModelMerger([tied(), loose]).merge_models()


class _Holder(nn.Module):
    def __init__(self, values):
        super().__init__()
        self.p = nn.Parameter(values)


STRIDED = {
    "every second": lambda k: (torch.arange(8.0) * (k + 1))[::2],
    "a column": lambda k: (torch.arange(12.0).reshape(3, 4) * (k + 1))[:, 1:2],
    "expanded in one": lambda k: torch.ones(1).expand(6) if k else torch.zeros(6),
    "negated": lambda k: torch._neg_view(torch.arange(5.0) + k),
    "the imaginary part of a conjugate": lambda k: (
        torch.complex(torch.ones(5), torch.ones(5) * (k + 1)).conj().imag
    ),
}


@pytest.mark.parametrize("kind", STRIDED)
def test_vectors_with_gaps_are_read_by_their_strides(kind):
    """Tensors whose elements do not lie side by side in memory are averaged right as well."""
    tensors = [STRIDED[kind](k) for k in range(2)]
    merged = AverageModelMerger([_Holder(tensor) for tensor in tensors]).merge_models()
    assert torch.equal(merged.p.detach(), (tensors[0] + tensors[1]) / 2)


def normalized():
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))


def test_recalibrated_statistics_are_those_of_the_data():
    """Recalibration gives the statistics of the layer's inputs, as update_bn does."""
    torch.manual_seed(0)
    model = normalized().eval()
    twin = normalized().eval()
    twin.load_state_dict(model.state_dict())
    loader = [(torch.randn(32, 4) * 3 + 1, None) for _ in range(4)]
    recalibrate_batch_norm(model, loader, "cpu")
    update_bn(loader, twin)
    for name, value in twin.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])
    inputs = torch.cat([model[0](batch) for batch, _ in loader])
    torch.testing.assert_close(model[1].running_mean, inputs.mean(dim=0), atol=1e-5, rtol=1e-4)
    assert not model.training


@pytest.mark.parametrize(
    ("model", "noted"), [(normalized(), 1), (nn.Linear(4, 4), 0)], ids=["batchnorm", "none"]
)
def test_a_note_says_that_statistics_were_averaged(tmp_path, model, noted):
    """The command's report points to recalibration where running statistics were averaged."""
    paths = [tmp_path / "first.pt", tmp_path / "second.pt"]
    for number, path in enumerate(paths):
        state = model.state_dict()
        torch.save({name: value + number for name, value in state.items()}, path)
    command = [sys.executable, "-m", "merge_avg", *paths, "-o", tmp_path / "mean.pt", "--json"]
    done = subprocess.run(command, capture_output=True, check=True)
    found = [note for note in json.loads(done.stdout)["notes"] if "BatchNorm" in note]
    assert len(found) == noted
    for note in found:
        assert "2 BatchNorm statistics averaged" in note
        assert "recalibrate_batch_norm" in note


def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 300), nn.Linear(300, 64))


def relatives(count):
    """Copies of one network, each with a little noise of its own."""
    models = [network(0) for _ in range(count)]
    for seed, model in enumerate(models):
        torch.manual_seed(seed + 1)
        for parameter in model.parameters():
            parameter.data += torch.randn_like(parameter) / 100
    return models


@pytest.mark.parametrize("kind", [list, tuple, nn.ModuleList, iter], ids=lambda kind: kind.__name__)
def test_models_come_in_any_order_that_is_kept(kind):
    """A list, a tuple, an nn.ModuleList and an iterator hold the same models."""
    models = relatives(3)
    merged = AverageModelMerger(kind(models), weights=[1, 2, 1]).merge_models()
    mean = sum(w * model[0].weight.double() for w, model in zip((1, 2, 1), models, strict=True)) / 4
    assert torch.equal(merged[0].weight, mean.float())


def test_unrelated_models_are_warned_of():
    """Networks that were initialised apart have a mean that does not work: it says so, here."""
    with pytest.warns(MergeWarning, match=r"^strangers: .*\('0.weight', '2.weight'") as caught:
        AverageModelMerger([network(seed) for seed in range(3)]).merge_models()
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_the_stranger_is_named():
    """Of three relatives and one stranger, the warning names the groups."""
    models = [*relatives(3), network(9)]
    with pytest.warns(MergeWarning, match=r"models\[0\]'.* | 'models\[3\]'"):
        AverageModelMerger(models).merge_models()


@pytest.mark.parametrize(
    ("models", "weights"),
    [
        (relatives(3), None),
        ([network(0)] * 2, None),
        ([network(0)], None),
        ([network(0), network(1)], [1, 0]),
        ([nn.Conv2d(3, 4, 3).half(), nn.Conv2d(3, 4, 3).half()], None),
    ],
    ids=["relatives", "copies", "one", "a weight of zero", "a single matrix"],
)
def test_models_that_agree_are_not_warned_of(models, weights):
    """Relatives, copies, one model alone, what has no weight, and a layer alone cause no doubt."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AverageModelMerger(models, weights=weights).merge_models()


def test_strangers_that_hold_nan_are_merged_where_that_is_allowed():
    """Figures that are not finite say nothing, and stop nothing."""
    models = [network(0), network(1)]
    models[0][0].weight.data[0, 0] = torch.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merged = AverageModelMerger(models, allow_nonfinite=True).merge_models()
    assert merged[0].weight.isnan().sum() == 1


@pytest.mark.large  # mypy takes its time
def test_the_merged_model_has_the_type_of_the_models(tmp_path):
    """A strict type checker knows what comes out: a Linear of Linears, a Module of a ModuleList."""
    (tmp_path / "typed.py").write_text(
        "from torch import nn\nfrom merge_avg import AverageModelMerger\n"
        "a: nn.Linear = AverageModelMerger([nn.Linear(1, 1)]).merge_models()\n"
        "b: nn.Module = AverageModelMerger(nn.ModuleList([nn.Linear(1, 1)])).merge_models()\n"
        "c: nn.LSTM = AverageModelMerger([nn.Linear(1, 1)]).merge_models()\n"
    )
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "typed.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("typed.py:5: error: Incompatible types"), done.stdout
    assert "Found 1 error" in done.stdout
