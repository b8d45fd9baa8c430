"""merge_avg.checkpoint._reasons: why a tensor is kept, and is no weight."""

from pathlib import Path

import pytest
import torch

from merge_avg.checkpoint import BY_NAME, Layout, Storage, TensorInfo, assign, dotted, kind_of
from merge_avg.checkpoint._reasons import Reasons
from merge_avg.formats import scan

W = {"w": torch.ones(2)}
SLOTS = {"exp_avg": torch.ones(2), "step": torch.tensor(3.0)}
CPU, CUDA = torch.get_rng_state(), torch.zeros(16, dtype=torch.uint8)


def roles(value, tmp_path):
    """Return the names of weights, and why each other tensor is kept."""
    torch.save(value, tmp_path / "a.pt")
    found = assign(scan(tmp_path / "a.pt"))
    why = {dotted(path): reason.text for path, reason in found.reasons.items()}
    return sorted(map(str, found.weights)), why


@pytest.mark.parametrize("key", ["opt", "zz", "o", "G_opt", "model_optim", 7])
def test_state_beside_param_groups_is_an_optimizers(tmp_path, key):
    """Whatever the dict is called, and whatever its parameters are: numbers or names."""
    for name in (0, "w", "module.layer"):
        state = {"state": {name: SLOTS}, "param_groups": [{"lr": torch.ones(2)}], "scale": W["w"]}
        weights, why = roles({"model": W, "nested": {key: state}}, tmp_path)
        assert weights == ["model.w"]
        if key != "model_optim":  # which the key tells as well
            assert set(why.values()) == {"optimizer state (state beside param_groups)"}


CHAINED = "chained_0.optimizer.state.exp_avg.w"


@pytest.mark.parametrize(
    ("value", "text", "key"),
    [
        ({"n": {"o": {"state": {0: W}, "param_groups": []}}}, "(state beside param_groups)", "n.o"),
        ({"state": {0: W}, "param_groups": []}, "(state beside param_groups)", "state"),
        ({"n": {"optims": {"x": {"v": W}}}}, "optimizer state, by the key 'optims'", "n.optims"),
        ({"x": {"y": {"state": {0: W}}}}, "optimizer state of 0", "x"),
        ({"x": {"opt": {"exp_avg": W}}}, "optimizer state of 'w'", "x"),
        ({CHAINED: W["w"]}, "optimizer state of 'w'", "chained_0.optimizer"),
        ({"x": {"y": CPU}}, "random-number state, by its form or name", "x"),
        ({"val_loss": torch.tensor(0.5)}, "a value beside state dicts, by its name", "val_loss"),
        ({"updates": torch.tensor(5)}, "a number beside state dicts", "updates"),
    ],
)
def test_a_reason_has_the_key_that_a_summary_counts(tmp_path, value, text, key):
    """The name of what is kept as a whole, and the words for it."""
    torch.save({"model": W, **value}, tmp_path / "a.pt")
    (reason,) = assign(scan(tmp_path / "a.pt")).reasons.values()
    assert (reason.text[-len(text) :], reason.key) == (text, key)


def test_an_optimizer_at_the_root_may_have_flat_names():
    """What comes before the first dot tells its own tensors from those of a model."""
    dtype = BY_NAME["float32"]
    names = ["state.0.step", "param_groups.0.lr", "model.w", "states.w"]
    tensors = [TensorInfo((one,), dtype, (2,), (1,), 0, Storage(one, 0, 8)) for one in names]
    layout = Layout(Path("a"), "directory", (), tuple(tensors), optimizers=((),))
    found = [Reasons(layout).why_kept(info) for info in tensors]
    assert [one and one.key for one in found] == ["state", "param_groups", None, None]


@pytest.mark.parametrize(("key", "known"), [("OPTIM", True), ("Loop", True), ("ranged", False)])
def test_patterns_match_whole_keys_in_any_letter_case(key, known):
    """So Optimizer and OPTIMIZER are one."""
    assert (kind_of(key) is not None) == known


def test_a_model_may_be_added_to_an_optimizers_dict(tmp_path):
    """At the root only `state` and `param_groups` belong to the optimizer."""
    value = {"state": {"w": SLOTS}, "param_groups": [], "model": W}
    assert roles(value, tmp_path)[0] == ["model.w"]


@pytest.mark.parametrize(
    "value",
    [
        {"model": W, "x": {"state": {0: SLOTS}}},
        {"model": W, "x": {"state": {"w": SLOTS}}},
        {"model": W, "opt": {"exp_avg": W, "exp_avg_sq": W}},
        {"w": W["w"], "optimizer.state.exp_avg.w": W["w"]},
        {"w": W["w"], "chained_0.optimizer.state.exp_avg.w": W["w"]},
        {"a.w": W["w"], "optim.state.a.w.exp_avg": W["w"]},
        {"a.w": W["w"], "opt.state.a.w.exp_avg": W["w"]},
    ],
)
def test_slots_are_known_by_the_names_of_weights(tmp_path, value):
    """Where no param_groups are beside them: below a parameter's name, or around it."""
    weights, why = roles(value, tmp_path)
    assert all("state" not in name and "exp_avg" not in name for name in weights)
    assert len(weights) == 1
    assert {text.partition(" of ")[0] for text in why.values()} == {"optimizer state"}


@pytest.mark.parametrize(
    "value",
    [
        {"w": W["w"], "optimizer.encoder.weight": W["w"]},
        {"opt": W, "projector": {"v": torch.ones(2)}},
        {"model": W, "ema": {"0.99": W, "0.999": W}},
        {"model": W, "state": {"w": torch.ones(2), "v": torch.ones(2)}},
        {"w": W["w"], "ema.w": W["w"]},
        {"nets": {0: W, 1: W}},
        {"nets": {"w": {"v": torch.ones(2)}}, "model": W},
        {"opt": {"encoder": {"v": torch.ones(2)}}, "model": W},
        {"model": W, "f1": torch.ones(1, 1)},
        {"net": {**W, "count": torch.tensor(5), "part": {"v": torch.ones(2)}}},
    ],
)
def test_names_of_models_are_no_optimizers(tmp_path, value):
    """A module may be called optimizer, a model opt, and an EMA has the names of the weights."""
    assert not roles(value, tmp_path)[1]


@pytest.mark.parametrize("key", ["loss", "arcface_loss", "score", "accuracy", "sampler", "scaler"])
def test_containers_of_vectors_are_learned(tmp_path, key):
    """A loss with class centers, a score network: only numbers and integers are state."""
    learned = {"centers": torch.ones(3, 2)}
    assert set(roles({"model": W, key: learned}, tmp_path)[0]) == {f"{key}.centers", "model.w"}
    state = {"last": torch.tensor(0.5), "order": torch.arange(9)}
    weights, why = roles({"model": W, key: state}, tmp_path)
    assert weights == ["model.w"]
    assert all(text.endswith(f", by the key {key!r}") for text in why.values())


@pytest.mark.parametrize("key", ["callbacks", "loops", "trainer"])
def test_an_ema_that_a_callback_keeps_is_known_by_its_names(tmp_path, key):
    """It has a tensor of the name and shape of each weight; what else lies there is kept."""
    state = {"EMA": {"shadow": W, "best": torch.ones(3)}, "other": {"w": torch.ones(5)}}
    weights, why = roles({"model": W, key: state}, tmp_path)
    assert weights == sorted(["model.w", f"{key}.EMA.shadow.w"])
    assert set(why) == {f"{key}.EMA.best", f"{key}.other.w"}


def test_the_only_weights_may_lie_among_other_state(tmp_path):
    """A trainer that is saved whole holds the model, where nothing else does."""
    optimizer = {"state": {0: SLOTS}, "param_groups": []}
    value = {"trainer": {"net": W, "optimizer": optimizer}, "args": {"x": W["w"]}}
    assert roles(value, tmp_path)[0] == ["trainer.net.w"]


@pytest.mark.parametrize("name", ["log_alpha", "logit_scale", "temperature", "log_vars", "beta"])
def test_single_floats_beside_state_dicts_are_averaged(tmp_path, name):
    """A learned number need not be in a state dict, nor be a Parameter."""
    value = {"actor": W, "critic": W, name: torch.tensor(0.5)}
    assert name in roles(value, tmp_path)[0]


METRICS = [
    "loss",
    "val_loss",
    "best_loss",
    "acc1",
    "best_prec1",
    "best",
    "lr",
    "epoch",
    "f1",
    "mAP",
    "mIoU",
    "loss2",
    "val_reward",
]


@pytest.mark.parametrize("name", METRICS)
def test_metrics_beside_state_dicts_are_kept(tmp_path, name):
    """What training loops call metrics and settings, of no dimension or of one element."""
    for value in (torch.tensor(0.5), torch.ones(1)):
        weights, why = roles({"model": W, name: value}, tmp_path)
        assert (weights, list(why)) == (["model.w"], [name])
    learned = torch.nn.Parameter(torch.tensor(0.5))
    assert name in roles({"model": W, name: learned}, tmp_path)[0], "a Parameter is no metric"


def test_integers_beside_state_dicts_are_kept_unless_in_one(tmp_path):
    """A counter beside state dicts is state; one in a state dict at the root is compared."""
    value = {"model": W, "updates": torch.tensor(5)}
    assert roles(value, tmp_path) == (["model.w"], {"updates": "a number beside state dicts"})
    value = {**W, "bn.num_batches_tracked": torch.tensor(5), "q._extra_state": {"amax": W["w"]}}
    assert roles(value, tmp_path)[0] == ["bn.num_batches_tracked", "q._extra_state.amax", "w"]


@pytest.mark.parametrize("key", ["torch", "seed", "generator", "x"])
def test_random_number_state_is_known_by_its_form(tmp_path, key):
    """The state of torch's generator under any key, and those of devices beside it."""
    for value in (
        {"model": W, key: CPU, "cuda_seed": CUDA},
        {"model": W, key: {"cpu": CPU, "cuda": [CUDA, CUDA]}},
        {"model": W, key: {"of": {"cpu": CPU, "cuda": CUDA}}},
    ):
        weights, why = roles(value, tmp_path)
        assert weights == ["model.w"]
        assert set(why.values()) == {"random-number state, by its form or name"}


def test_bytes_of_another_form_are_no_random_state(tmp_path):
    """A uint8 tensor that stands alone may be anything, also of 16 bytes."""
    assert roles({"model": {**W, "mask": CUDA}}, tmp_path)[0] == ["model.mask", "model.w"]


def test_names_of_absurd_length_mean_nothing(tmp_path):
    """Neither do names of thousands of parts: looking into them would take their square."""
    assert not kind_of("x" * 300 + "_optimizer")
    name = ".".join(["optimizer"] * 300)
    assert roles({"w": W["w"], f"{name}.w": W["w"]}, tmp_path)[0] == [f"{name}.w", "w"]
