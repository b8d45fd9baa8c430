"""Rules by name: some tensors have weights of their own, which are recorded and verified."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from merge_avg import MergeError, UsageError, merge_checkpoints, verify_output
from merge_avg.arithmetic import Weights
from merge_avg.checkpoint import PROVENANCE, Name
from merge_avg.formats import scan
from merge_avg.plan._rules import Rule, _rule, read_rules

NAMES = ("enc.0.weight", "enc.1.weight", "head.weight", "head.bias")


def state(seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(40, 30, generator=generator) for name in NAMES}


@pytest.fixture
def paths(tmp_path):
    """Three checkpoints, in another order than that of their names."""
    found = [tmp_path / f"{name}.pt" for name in "cab"]
    for seed, path in enumerate(found):
        torch.save({"state_dict": state(seed) | {"count": torch.tensor(seed)}, "epoch": 3}, path)
    return found


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_each_tensor_is_as_a_merge_with_its_weights_makes_it(tmp_path, paths, suffix):
    """The last rule that matches counts; what none matches has the weights of all."""
    out = tmp_path / f"out{suffix}"
    rules = {"*weight": [0, 0, 1], "enc.*": [1, "1/3", 0], "head.bias": [0.5, 0.25, 0.25]}
    merge_checkpoints(paths, out, weights=[1, 1, 0], weights_for=rules, int_policy="mean")
    verify_output(out)
    rows = {"enc.0.weight": [1, "1/3", 0], "enc.1.weight": [1, "1/3", 0], "head.weight": [0, 0, 1]}
    rows["head.bias"] = [0.5, 0.25, 0.25]
    ours = load_file(out) if suffix == ".safetensors" else torch.load(out)["state_dict"]
    for name, row in {**rows, "count": [1, 1, 0]}.items():
        single = tmp_path / f"single-{name}{suffix}"
        merge_checkpoints(paths, single, weights=row, int_policy="mean", allow_trivial=True)
        whole = load_file(single) if suffix == ".safetensors" else torch.load(single)["state_dict"]
        assert torch.equal(ours[name], whole[name]), name


def test_the_record_has_the_rules_by_the_names_of_the_inputs(tmp_path, paths):
    """However the inputs are given, the same average has the same record; each has its hash."""
    one, other = tmp_path / "one.pt", tmp_path / "other.pt"
    options = {"template": paths[0]}
    merge_checkpoints(paths, one, weights=[1, 1, 0], weights_for={"head.*": [0, 1, 3]}, **options)
    turned = [paths[2], paths[0], paths[1]]
    rules = ["head.*=3,0,1"]
    merge_checkpoints(turned, other, weights=[0, 1, 1], weights_for=rules, **options)
    assert one.read_bytes().replace(b"one/", b"") == other.read_bytes().replace(b"other/", b"")
    record = json.loads(dict(scan(one).metadata)[PROVENANCE])
    assert [entry["name"] for entry in record["inputs"]] == ["a.pt", "b.pt", "c.pt"]
    assert [entry["weight"] for entry in record["inputs"]] == ["1/2", "0/2", "1/2"]
    assert record["weights_for"] == ["head.*=1/4,3/4,0/4"]
    assert all(entry["hash"] for entry in record["inputs"])
    plain = tmp_path / "plain.pt"
    merge_checkpoints(paths, plain)
    assert "weights_for" not in json.loads(dict(scan(plain).metadata)[PROVENANCE])


def test_a_changed_input_is_found_by_a_rule_alone(tmp_path, paths):
    """An input that only a rule gives weight is hashed too."""
    out = tmp_path / "out.pt"
    merge_checkpoints(paths, out, weights=[1, 1, 0], weights_for={"head.bias": [0, 1, 1]})
    other = torch.load(paths[2])
    other["state_dict"]["head.bias"][0, 0] += 1
    torch.save(other, paths[2])
    with pytest.raises(MergeError, match=r"b\.pt: its weights are not those"):
        verify_output(out)


def test_the_agreement_is_of_all_that_is_averaged(tmp_path):
    """A checkpoint that a rule gives no weight is compared all the same, whatever the windows."""
    generator = torch.Generator().manual_seed(0)
    base = {f"{name}.weight": torch.randn(200, 300, generator=generator) for name in ("l", "head")}
    for name in "abc":
        noisy = {k: v + 0.01 * torch.randn(v.shape, generator=generator) for k, v in base.items()}
        torch.save(noisy, tmp_path / f"{name}.pt")
    found = [tmp_path / f"{name}.pt" for name in "abc"]
    for weights, rules in (([1, 1, 1], ["head*=1,0,0"]), ([1, 1, 0], ["head*=0,0,1"])):
        for threads, memory in ((1, "8MiB"), (2, None)):
            out = tmp_path / "out.pt"
            options = {"threads": threads, "max_memory": memory, "overwrite": True}
            result = merge_checkpoints(found, out, weights=weights, weights_for=rules, **options)
            assert result.agreement.mean > 0.999
            verify_output(out)


def test_a_record_that_cannot_be_meant_is_told_as_such(tmp_path, paths):
    """A rule in a forged record is not the user's."""
    out = tmp_path / "out.safetensors"
    merge_checkpoints(paths, out, weights_for={"head.*": [1, 2, 3]})
    out.write_bytes(out.read_bytes().replace(b"head.*=", b"head.*,", 1))
    with pytest.raises(MergeError, match="its provenance record cannot be gone by") as caught:
        verify_output(out)
    assert not isinstance(caught.value, UsageError)


def test_windows_hold_tensors_of_one_rule(tmp_path):
    """Small tensors that alternate between rules are averaged each by its own."""
    for seed in range(2):
        values = {f"{kind}.{n}": torch.full((3,), float(seed)) for n in range(9) for kind in "xy"}
        save_file(values, tmp_path / f"{seed}.safetensors")
    found = [tmp_path / f"{seed}.safetensors" for seed in range(2)]
    merge_checkpoints(found, tmp_path / "o.safetensors", weights_for={"x.*": [3, 1]})
    for name, value in load_file(tmp_path / "o.safetensors").items():
        assert value.tolist() == [0.25 if name[0] == "x" else 0.5] * 3
    combined = tmp_path / "c.safetensors"
    rules = {"x.*": [3, -5]}
    merge_checkpoints(found, combined, weights=[1, 1], weights_for=rules, normalize=False)
    verify_output(combined)
    assert load_file(combined)["x.3"].tolist() == [-5] * 3
    assert load_file(combined)["y.3"].tolist() == [1] * 3


@pytest.mark.parametrize(
    ("rules", "error", "words"),
    [
        (["head.*"], UsageError, r"'head\.\*' is not understood"),
        (["=1,2,3"], UsageError, "not understood"),
        (["head.*=1,2"], UsageError, "2 weights for 3 checkpoints"),
        (["head.*=1,x,2"], UsageError, "'x' is not a finite number"),
        (["head.*=0,0,0"], UsageError, "all zero"),
        (["tail.*=1,2,3"], MergeError, r"no averaged tensor is like 'tail\.\*'"),
        (["*=1,2,3", "head.*=1,2,3", "head.b*=1,2,3", "head.w*=1,0,0"], MergeError, r"'head\.\*'"),
        (["head.*=1,2,3"] * 1001, UsageError, "more than 1,000 rules"),
    ],
)
def test_rules_that_cannot_be_meant_are_refused(tmp_path, paths, rules, error, words):
    """What is no rule, has other weights than there are checkpoints, or decides nothing."""
    with pytest.raises(error, match=words):
        merge_checkpoints(paths, tmp_path / "out.pt", weights_for=rules)
    assert not (tmp_path / "out.pt").exists()


def test_tied_tensors_have_one_rule(tmp_path):
    """Two names of one memory cannot have two means."""
    for seed in range(2):
        tied = torch.full((4, 4), float(seed))
        torch.save({"a.weight": tied, "b.weight": tied}, tmp_path / f"{seed}.pt")
    found = [tmp_path / f"{seed}.pt" for seed in range(2)]
    with pytest.raises(MergeError, match="share their memory, but not their weights"):
        merge_checkpoints(found, tmp_path / "o.pt", weights_for={"a.*": [1, 3]})
    merge_checkpoints(found, tmp_path / "o.pt", weights_for={"?.weight": [1, 3]})
    assert torch.load(tmp_path / "o.pt")["b.weight"].unique().tolist() == [0.75]


def test_several_averages_have_no_rules(tmp_path, paths):
    """A rule would be of which of them?"""
    with pytest.raises(UsageError, match="of a single average"):
        merge_checkpoints(
            paths, tmp_path / "{name}.pt", leave_one_out=True, weights_for=["*=1,2,3"]
        )


def test_the_command_takes_rules_and_says_what_they_decide(tmp_path, paths, command):
    """Each rule is one option; the summary and the JSON have it."""
    out = tmp_path / "out.pt"
    rules = ["--weights-for", "enc.*=1,0,0", "--weights-for", "head.*=0,1,1"]
    code, text, err = command(*paths, "-o", out, *rules, "--json")
    assert code == 0, err
    assert json.loads(text)["policies"]["weights_for"] == ["enc.*=1,0,0", "head.*=0,1,1"]
    assert "note: 'state_dict.enc.0.weight'" in err
    assert "the weights are 0, 1, 1, as of 'head.*'" in err
    code, _, err = command("soup", *paths, "-o", "s.pt", "--eval", "x", "--mode", "min", *rules)
    assert code == 2


@given(st.lists(st.sampled_from(["a*", "*b", "ab", "c", "*"]), min_size=1, max_size=4))
def test_the_last_rule_that_matches_counts(patterns):
    """As in a list of exceptions that grows."""
    rules = [Rule(pattern, Weights.uniform(2)) for pattern in patterns]
    fits = {"a*": True, "*b": True, "ab": True, "c": False, "*": True}
    expected = max((n for n, pattern in enumerate(patterns) if fits[pattern]), default=-1)
    assert _rule(Name((), "ab"), rules) == expected


def test_a_template_that_is_not_averaged_has_no_weight_in_a_rule():
    """Weights are given for the inputs, and the job may have others."""
    (rule,) = read_rules(["x=y=1,2"], [None, 1, 0], 2, normalize=True)
    assert (rule.pattern, rule.weights.integers) == ("x=y", (0, 2, 1))
