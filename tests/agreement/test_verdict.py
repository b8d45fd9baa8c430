"""The verdict: agree, drifted or strangers, on figures and on small checkpoints."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merge_avg.agreement import LEAST_AGREEMENT, Agreement, TensorAgreement, groups_of, judge
from merge_avg.agreement import _comparison as comparison
from merge_avg.errors import MergeError
from tests.arithmetic.helpers import needs_loops
from tests.helpers import merge_checkpoints, noise

# On figures


def tensor(name, shape, mean, scale=1.0):
    """Return the figures of a matrix; by a scale of 1 it keeps the size of its inputs."""
    size = math.prod(shape)
    norm = scale * math.sqrt(size / math.prod(shape[1:]))
    return TensorAgreement(name, shape, size, size, mean, 0.0, norm, ())


def stack(*means, shape=(64, 64), scale=1.0):
    """Return figures of matrices in a row."""
    return [tensor(f"w{i}", shape, mean, scale) for i, mean in enumerate(means)]


def picture(tensors, pairs=None, norms=None, mean=None):
    """Return an agreement; if no cosines are given, all of three checkpoints are the same."""
    means = [one.mean for one in tensors if one.mean is not None]
    if mean is None:
        mean = sum(means) / len(means) if means else 1.0
    if pairs is None:
        pairs = [[1.0 if i == j else mean for j in range(3)] for i in range(3)]
    count = len(pairs)
    each = []
    for i, row in enumerate(pairs):
        known = [value for j, value in enumerate(row) if j != i and value is not None]
        each.append(sum(known) / len(known) if known else None)
    norms = tuple(norms or [1.0] * count)
    figures = tuple(map(tuple, pairs)), tuple(each), (0.0,) * count, norms, 1.0
    return Agreement(mean, 0.0, *figures, 1000, 1000, tuple(tensors))


def in_groups(*sizes, inside=0.9, between=0.0):
    """Return the cosines of groups of checkpoints, and their mean over all pairs."""
    of = [number for number, size in enumerate(sizes) for _ in range(size)]
    pairs = [[inside if a == b else between for b in of] for a in of]
    off = [pairs[i][j] for i in range(len(of)) for j in range(i)]
    for i, row in enumerate(pairs):
        row[i] = 1.0
    return pairs, sum(off) / len(off)


def test_relatives_agree():
    """Where all matrices are near, the number is the mean cosine, and there is nothing to say."""
    found = judge(picture(stack(0.9, 0.8, 0.95), mean=0.88))
    assert (found.word, found.number) == ("agree", 0.88)
    assert (found.reason, found.advice, found.tensors, found.groups) == ("", "", (), ())


def test_three_in_a_row_are_strangers_whatever_the_total():
    """Three matrices in a row that have nothing in common are named, with the number of two."""
    shapes = [(64, 64), (64, 64), (48, 64), (40, 48), (10, 40), (64, 64)]
    means = [0.99, 0.99, 0.02, 0.1, 0.01, 0.99]
    pairs = enumerate(zip(shapes, means, strict=True))
    found = judge(picture([tensor(f"w{i}", *one) for i, one in pairs], mean=0.97))
    assert found.word == "strangers"
    assert found.number == 0.1
    assert found.tensors == ("w2", "w3", "w4")
    assert "in a row" in found.reason
    assert "one initialisation" in found.advice


def test_a_stream_that_others_share_is_no_layer_of_other_units():
    """Matrices that read from it and write to it lie in a row by their shapes only."""
    found = judge(picture(stack(0.99, 0.99, 0.02, 0.1, 0.01, 0.0, 0.99), mean=0.97))
    assert (found.word, len(found.tensors)) == ("drifted", 4)


@pytest.mark.parametrize("means", [(0.9, 0.0, 0.05, 0.9), (0.0, 0.1, 0.9, 0.9)])
def test_two_in_a_row_are_doubtful(means):
    """With one layer of other units the mean may work: it is to be measured."""
    found = judge(picture(stack(*means), mean=0.8))
    assert (found.word, found.number) == ("drifted", max(sorted(means)[:2]))
    assert len(found.tensors) == 2
    assert "evaluate" in found.advice


def test_two_that_are_all_there_is_are_strangers():
    """Where there is nothing else, two in a row are the whole network; after a frozen part not."""
    assert judge(picture(stack(0.0, 0.1))).word == "strangers"
    frozen = tensor("frozen", (64, 64), None, 0.0)
    assert judge(picture([frozen, *stack(0.0, 0.1)])).word == "drifted"


def test_one_alone_is_a_mean_of_what_it_computes():
    """A single matrix between parts that agree, such as a fresh linear head, is no doubt."""
    alone = ((0.9, 0.0, 0.9), (0.9, 0.9, 0.0), (0.0, 0.9, 0.9), (0.0, 0.9, 0.0, 0.9, 0.0))
    for means in alone:
        found = judge(picture(stack(*means), mean=0.7))
        assert (found.word, found.number) == ("agree", 0.7)
    found = judge(picture(stack(0.0)))
    assert (found.word, found.number) == ("agree", 0.0)


def test_parallel_heads_do_not_feed_each_other():
    """Heads that all read one backbone are no layers in a row, however many differ."""
    heads = [tensor(f"head{i}", (10, 64), 0.0) for i in range(5)]
    found = judge(picture([*stack(0.9, 0.9, 0.9), *heads], mean=0.8))
    assert (found.word, found.tensors) == ("agree", ())


@pytest.mark.parametrize(
    "shapes",
    [
        ((256, 64), (256, 64), (10, 64)),  # an LSTM's gates
        ((192, 64), (64, 64), (10, 64)),  # a GRU's, and queries, keys and values
        ((16, 1, 3, 3), (32, 16, 3, 3), (10, 512)),  # convolutions, and a classifier of all places
        ((16, 1, 3, 3), (16, 16, 1, 1), (16, 1, 3, 3)),  # depthwise ones
        ((128, 32), (32, 64), (10, 32)),  # a gated layer
        ((64, 32), (48, 64), (10, 48)),
    ],
)
def test_layers_in_a_row_are_known_by_their_shapes(shapes):
    """What reads the units that the matrix before it makes is in a row with it."""
    layers = [tensor(f"w{i}", shape, 0.0) for i, shape in enumerate(shapes)]
    rest = [tensor(f"v{i}", (7, 5), 0.9) for i in range(3)]
    found = judge(picture([*rest, *layers], mean=0.8))
    assert (found.word, found.tensors) == ("strangers", ("w0", "w1", "w2"))


@pytest.mark.parametrize(
    ("sizes", "word"),
    [
        ((8, 2), "drifted"),
        ((3, 3), "strangers"),
        ((2, 1), "strangers"),
        ((4, 1), "drifted"),
        ((8, 1, 1), "agree"),
        ((9, 1), "agree"),
        ((2, 2, 2), "strangers"),
        ((4, 3, 2), "strangers"),
    ],
)
def test_groups_are_judged_by_what_the_mean_has_of_them(sizes, word):
    """What does not belong to the largest group is noise in the mean, or half of it."""
    pairs, mean = in_groups(*sizes)
    found = picture(stack(*[max(mean, 0.3)] * 4), pairs, mean=mean)
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    groups = tuple(tuple(range(end - size, end)) for size, end in zip(sizes, ends, strict=True))
    assert groups_of(found) == groups
    verdict = judge(found)
    assert verdict.word == word
    assert verdict.groups == (() if word == "agree" else groups)
    few = "average without it" if sizes[1:] == (1,) else "average those of one group"
    assert verdict.advice == ("" if word == "agree" else few)


def test_groups_are_weighed_by_norms():
    """A stranger that is small is noise beside three relatives, and one that is large is not."""
    pairs, _ = in_groups(3, 1)
    for norm, word in [(0.1, "agree"), (1, "drifted"), (5, "strangers")]:
        found = picture(stack(0.9, 0.9, 0.9), pairs, [1, 1, 1, norm], mean=0.6)
        assert judge(found).word == word


def test_groups_need_two_of_a_kind():
    """Checkpoints that are all apart make no groups; nor does one that has no cosine."""
    pairs, mean = in_groups(1, 1, 1)
    found = judge(picture(stack(0.0, 0.0, 0.0), pairs, mean=mean))
    assert (found.word, found.groups) == ("strangers", ())
    pairs, _ = in_groups(3, 1)
    for i in range(3):
        pairs[i][3] = pairs[3][i] = None
    found = picture(stack(0.9, 0.9, 0.9), pairs, [1, 1, 1, 0])
    assert groups_of(found) == ()
    assert judge(found).word == "agree"


def test_chains_are_one_group():
    """States of a long run, of which each is near the next only, belong together."""
    count = 12
    pairs = [[max(1 - abs(i - j) * 0.5, 0.0) for j in range(count)] for i in range(count)]
    assert groups_of(picture(stack(0.5), pairs)) == ()


def test_far_apart_is_to_be_measured():
    """One start and long training: below the least agreement the advice is to evaluate."""
    found = judge(picture(stack(0.4, 0.3, 0.5), mean=0.39))
    assert (found.word, found.number, found.tensors) == ("drifted", 0.39, ())
    assert "BatchNorm" in found.advice
    least = picture(stack(0.6, 0.6, 0.6), mean=LEAST_AGREEMENT)
    assert judge(least).word == "agree"


def test_differences_to_a_base_are_not_called_strangers():
    """Weights that are all far smaller than a network's are differences: cosines tell little."""
    small = picture(stack(0.05, 0.01, 0.02, scale=0.01))
    found = judge(small)
    assert (found.word, found.number) == ("drifted", pytest.approx(0.08 / 3, abs=0.02))
    assert "base" in found.advice
    mixed = picture([*stack(0.05, 0.01, 0.02, scale=0.01), tensor("v", (9, 9), 0.0)])
    assert judge(mixed).word == "strangers"


def test_what_learned_nothing_does_not_count():
    """Between strangers a matrix that is the same in all, or has no cosine, breaks no row."""
    frozen = tensor("frozen", (64, 64), None, 0.0)
    few = tensor("few", (3, 3), None)
    layers = stack(0.0, 0.1, 0.0)
    found = judge(picture([layers[0], frozen, layers[1], few, layers[2], *[frozen] * 9]))
    assert (found.word, found.tensors) == ("strangers", ("w0", "w1", "w2"))
    assert judge(picture([frozen] * 3)).word == "agree"
    assert judge(picture([])).word == "agree"


def test_very_many_checkpoints_and_tensors():
    """Hundreds of checkpoints and tens of thousands of tensors are judged like few."""
    for sizes in ((1,) * 300, (150, 150), (299, 1), (3,) * 100):
        pairs, mean = in_groups(*sizes)
        found = picture(stack(0.9, 0.9), pairs, mean=mean)
        assert [len(group) for group in groups_of(found)] == list(sizes)
    many = stack(*[0.0] * 20_000)
    assert judge(picture(many)).tensors == tuple(one.name for one in many)


# On checkpoints


def saved(folder, states):
    paths = [folder / f"{number}.pt" for number in range(len(states))]
    for path, state in zip(paths, states, strict=True):
        torch.save(state, path)
    return paths


def verdict_on(folder, states, **options):
    paths = saved(folder, states)
    return judge(merge_checkpoints(paths, folder / "o.pt", overwrite=True, **options).agreement)


def layers(seed, count=3, names="head"):
    """Return weights of a size that a network has, the same for the same seed."""
    return {f"{names}.{i}.weight": noise(100 * seed + i, 64, 64) / 8 for i in range(count)}


def near(state, seed):
    """Return a state after a little training."""
    items = enumerate(state.items())
    return {name: value + noise(77 * seed + i, *value.shape) / 40 for i, (name, value) in items}


def test_a_frozen_part_hides_no_strangers(tmp_path):
    """Beside a large backbone that is the same everywhere, strange heads are strangers."""
    body = {"body.weight": 10 * noise(5, 500, 64)}
    found = verdict_on(tmp_path, [body | layers(seed) for seed in (1, 2, 3)])
    assert found.word == "strangers"
    assert abs(found.number) < 0.1
    assert found.tensors == tuple(layers(1))


def test_buffers_that_are_the_same_hide_no_strangers(tmp_path):
    """A positional table and a mask with infinities weigh nothing, whatever their size."""
    table = {"table": 100 * noise(5, 200, 64), "mask": torch.full((64, 64), -math.inf).triu(1)}
    found = verdict_on(tmp_path, [table | layers(seed) for seed in (1, 2)])
    assert (found.word, found.tensors) == ("strangers", tuple(layers(1)))
    alike = verdict_on(tmp_path, [table | near(layers(1), seed) for seed in (1, 2)])
    assert alike.word == "agree"


def test_fresh_layers_after_a_body_that_agrees(tmp_path):
    """One fresh matrix after fine-tuned ones agrees, two may work, and wide ones are no stream."""
    for count, word in [(1, "agree"), (2, "drifted"), (3, "drifted")]:
        body = layers(9, 6, "body")
        states = [near(body, seed) | layers(seed, count) for seed in (1, 2, 3)]
        assert verdict_on(tmp_path, states).word == word


def test_differences_of_strangers_to_one_base_do_not_agree(tmp_path):
    """All have the base in them, so that their cosines lie at a half."""
    base = layers(9)
    states = [{name: layers(n)[name] - base[name] for name in base} for n in (1, 2, 3)]
    found = verdict_on(tmp_path, states)
    assert found.word == "drifted"
    assert found.number == pytest.approx(0.5, abs=0.05)


def test_a_column_of_scales_is_no_matrix(tmp_path):
    """The lengths of weight norm, all positive, hide no strangers in the directions beside them."""
    scales = {f"{name}_g": 10 + noise(n, 64, 1).abs() for n, name in enumerate(layers(1))}
    found = verdict_on(tmp_path, [layers(n) | scales for n in (1, 2, 3)])
    near_ones = [
        layers(n) | {name: value + n / 10 for name, value in scales.items()} for n in (1, 2, 3)
    ]
    assert found.word == verdict_on(tmp_path, near_ones).word == "strangers"


def test_permuted_units_are_strangers(tmp_path):
    """A network and a copy that computes the same with its hidden units in another order."""
    generator = torch.Generator().manual_seed(0)
    first, second, last = noise(1, 64, 32), noise(2, 48, 64), noise(3, 10, 48)
    states = []
    for _ in range(3):
        one, two = (torch.randperm(size, generator=generator) for size in (64, 48))
        states.append({"a": first[one], "b": second[two][:, one], "c": last[:, two]})
    found = verdict_on(tmp_path, states)
    assert (found.word, found.tensors) == ("strangers", ("a", "b", "c"))


@pytest.mark.parametrize("sizes", [(8, 2), (3, 3), (2, 1)])
def test_groups_of_checkpoints_are_named(tmp_path, sizes):
    """Checkpoints of two initialisations, in any order, are told apart."""
    of = [group for group, size in enumerate(sizes) for _ in range(size)][::-1]
    states = [near(layers(group), seed) for seed, group in enumerate(of)]
    found = verdict_on(tmp_path, states)
    assert found.word == ("drifted" if sizes == (8, 2) else "strangers")
    ours = [tuple(i for i, group in enumerate(of) if group == one) for one in (0, 1)]
    assert sorted(found.groups) == sorted(ours)


def test_identical_copies_agree(tmp_path):
    """Where nothing differs the agreement is 1, of each and of all pairs."""
    states = [layers(1)] * 3
    assert verdict_on(tmp_path, states).number == 1
    found = merge_checkpoints(saved(tmp_path, states), tmp_path / "p.pt").agreement
    assert (found.mean, found.error, found.shrinkage) == (1, 0, 1)
    assert found.pairs == ((1, 1, 1),) * 3
    assert all(one.mean is None and one.norm == 0 for one in found.tensors)
    two = verdict_on(tmp_path, [layers(1), layers(1), layers(2)])
    assert (two.word, two.groups) == ("strangers", ((0, 1), (2,)))


def test_a_merge_of_copies_passes_any_least_agreement(tmp_path):
    """The gate compares the verdict's number: 1 of copies, and that of a row of strangers."""
    out = tmp_path / "o.pt"
    merge_checkpoints(saved(tmp_path, [layers(1)] * 2), out, min_agreement=1)
    body = layers(9, 30, "body")
    paths = saved(tmp_path, [near(body, seed) | layers(seed) for seed in (1, 2)])
    found = merge_checkpoints(paths, out, overwrite=True).agreement
    assert found.mean > 0.8
    with pytest.raises(MergeError, match=r"agree by -?0\.0\d\d, and 0.5 is asked for"):
        merge_checkpoints(paths, out, overwrite=True, min_agreement=0.5)


def test_a_merge_fails_on_a_verdict_or_a_worse_one(tmp_path):
    """Of `fail_on`: drifted refuses both doubtful verdicts, strangers the worse, and none agree."""
    body = {"a": noise(8, 40, 40), "b": noise(9, 40, 40)}
    apart = [
        {name: one + 1.3 * noise(seed + len(name), 40, 40) for name, one in body.items()}
        for seed in (1, 2)
    ]
    states = {"agree": [layers(1)] * 2, "drifted": apart, "strangers": [layers(1), layers(2)]}
    out, words = tmp_path / "o.pt", list(states)
    for bad, word in enumerate(words):
        paths = saved(tmp_path, states[word])
        assert merge_checkpoints(paths, tmp_path / "p.pt", overwrite=True).verdict.word == word
        for asked in words[1 : bad + 1]:
            with pytest.raises(MergeError, match=f"the verdict is {word}: .*\nhint: ") as caught:
                merge_checkpoints(paths, out, fail_on=asked)
            assert (caught.value.where, out.exists()) == (str(out), False)
        for asked in words[bad + 1 :]:
            merge_checkpoints(paths, out, overwrite=True, fail_on=asked)
        out.unlink(missing_ok=True)


def test_nan_in_all_is_the_same_and_in_one_is_not(tmp_path):
    """NaN that every checkpoint has counts for nothing; of NaN in one there is no figure."""
    states = [near(layers(1), seed) for seed in (1, 2)]
    for state in states:
        state["head.0.weight"][3] = math.nan
    assert verdict_on(tmp_path, states, allow_nonfinite=True).word == "agree"
    states[1]["head.1.weight"][0, 0] = math.nan
    paths = saved(tmp_path, states)
    out = tmp_path / "o.pt"
    result = merge_checkpoints(paths, out, overwrite=True, allow_nonfinite=True)
    assert result.agreement is None


def test_zeros_have_no_direction(tmp_path):
    """A matrix of zeros in one checkpoint, and a checkpoint of zeros, leave the others theirs."""
    states = [near(layers(1), seed) for seed in (1, 2, 3)]
    states[0]["head.1.weight"].zero_()
    assert verdict_on(tmp_path, states).word == "agree"
    empty = {name: torch.zeros_like(value) for name, value in states[0].items()}
    found = verdict_on(tmp_path, [*states[1:], empty])
    assert (found.word, found.groups) == ("agree", ())


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn, torch.bfloat16])
def test_other_numbers(tmp_path, dtype):
    """Strangers and relatives are told apart in complex numbers and in few bits."""

    def cast(state):
        if dtype.is_complex:
            return {name: torch.complex(value, value.flip(0)) for name, value in state.items()}
        return {name: (4 * value).to(dtype) for name, value in state.items()}

    strange = [cast(layers(seed)) for seed in (1, 2)]
    alike = [cast(near(layers(1), seed)) for seed in (1, 2)]
    assert verdict_on(tmp_path, strange).word == "strangers"
    assert verdict_on(tmp_path, alike).word == "agree"


# What does not matter


@needs_loops
@pytest.mark.parametrize("based", [False, True])
def test_torch_finds_the_same(tmp_path, monkeypatch, based):
    """Without the compiled loops the figures are the same, of the differences to a base as well."""
    frozen = {"frozen": noise(6, 30, 64), "part": noise(7, 10, 300)}
    states = [frozen | near(layers(1), seed) for seed in (1, 2, 3)]
    for seed, state in enumerate(states):
        state["part"] = state["part"].clone()
        state["part"][::2] += noise(seed, 5, 300)
        state["part"][1, ::3] = math.copysign(0.0, seed - 1)
    paths = saved(tmp_path, states)
    base = tmp_path / "base.pt"
    torch.save(frozen | layers(1), base)
    options = {"overwrite": True, "base": base if based else None}
    compiled = merge_checkpoints(paths, tmp_path / "o.pt", **options)
    monkeypatch.setattr(comparison, "LOOPS", None)
    plain = merge_checkpoints(paths, tmp_path / "o.pt", **options)
    pairs = [(compiled.agreement, plain.agreement), (compiled.centred, plain.centred)][: 1 + based]
    for ours, theirs in pairs:
        assert ours.mean == pytest.approx(theirs.mean, abs=1e-12)
        for one, other in zip(ours.tensors, theirs.tensors, strict=True):
            assert one.mean == (other.mean and pytest.approx(other.mean, abs=1e-12))
            assert one.norm == pytest.approx(other.norm)
            assert one.distances == pytest.approx(other.distances, abs=1e-6)
    assert judge(compiled.agreement).word == judge(plain.agreement).word
    assert sum(one.mean is None for one in compiled.agreement.tensors) == 1
    if based:
        # What is the same in all checkpoints may still be no part of the base.
        wanted = torch.stack([state["part"] - frozen["part"] for state in states]).double()
        (found,) = (one for one in compiled.centred.tensors if one.name == "part")
        assert found.norm == pytest.approx(float(wanted.square().sum().div(3).sqrt()), rel=1e-6)


@settings(max_examples=12)
@given(
    st.permutations(range(5)),
    st.integers(1, 4),
    st.sampled_from([8, 64]),
    st.sampled_from([(5,), (3, 2), (1,) * 5, (4, 1)]),
)
def test_order_threads_and_windows_do_not_matter(tmp_path_factory, order, threads, mib, sizes):
    """The verdict is the same, of the same checkpoints, however they are read."""
    folder = tmp_path_factory.mktemp("a")
    of = [group for group, size in enumerate(sizes) for _ in range(size)]
    frozen = {"frozen": noise(5, 900, 64)}
    states = [near(layers(group), seed) | frozen for seed, group in enumerate(of)]
    paths = saved(folder, states)
    one = judge(merge_checkpoints(paths, folder / "o.pt", threads=1).agreement)
    mixed = [paths[i] for i in order]
    options = {"threads": threads, "max_memory": mib << 20, "overwrite": True}
    other = judge(merge_checkpoints(mixed, folder / "o.pt", **options).agreement)
    assert (other.word, other.reason, other.tensors) == (one.word, one.reason, one.tensors)
    assert other.number == pytest.approx(one.number, abs=1e-9)
    back = {tuple(sorted(order[i] for i in group)) for group in other.groups}
    assert back == set(one.groups)
