"""The mean of adapters is the mean of what they do: exact, or the best of a rank."""

import json
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from merge_avg import verify_output
from merge_avg.agreement import Comparison
from merge_avg.errors import MergeError, UsageError
from tests.adapters.helpers import (
    SPELLINGS,
    changes,
    distance,
    factors,
    mean_of,
    tail,
    write_peft,
)
from tests.helpers import merge_checkpoints, noise, run_command, same_bits

FLOAT32 = 2e-7  # the largest relative distance that rounding factors to float32 makes here


def settings(rank, alpha, **more):
    """Return what adapter_config.json says."""
    return {"r": rank, "lora_alpha": alpha, **more}


def kohya(folder, seeds=3, **options):
    """Write adapters of different ranks and alphas, and return their paths."""
    ranks, alphas = [(4, 2, 3), (3, 5, 1), (2, 2, 2)], [(4, 1, 8), (3, 2.5, 2), (1, 16, 2)]
    paths = []
    for seed in range(seeds):
        paths.append(folder / f"{seed}.safetensors")
        state = factors(seed, ranks[seed], alphas=alphas[seed], **options)
        save_file(state, paths[-1], metadata={"ss_network_dim": "4", "ss_network_alpha": "4"})
    return paths


@pytest.mark.parametrize("weights", [[1, 1, 1], ["0.2", "0.7", "0.1"], [3, 0, 1]])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_exact_is_the_mean_of_the_products(tmp_path, weights, suffix):
    """Adapters of different ranks and alphas become one whose products are the means of theirs."""
    paths, out = kohya(tmp_path), tmp_path / f"out{suffix}"
    result = merge_checkpoints(paths, out, lora="exact", weights=weights)
    found, expected = changes(out), mean_of(paths, weights)
    assert found.keys() == expected.keys()
    assert all(distance(found[name], expected[name]) < FLOAT32 for name in expected)
    state = load_file(out) if suffix == ".safetensors" else torch.load(out)
    used = [k for k, weight in enumerate(weights) if weight]
    ranks = sum(load_file(paths[k])["lora_unet_first.lora_down.weight"].shape[0] for k in used)
    assert state["lora_unet_first.lora_down.weight"].shape == (ranks, 20)
    assert state["lora_unet_conv.lora_up.weight"].shape[2:] == (1, 1)
    assert not result.errors
    assert verify_output(out).hashed


@pytest.mark.parametrize("rank", [1, 2, 4, 7, 30])
def test_a_rank_is_as_good_as_can_be(tmp_path, rank):
    """The error is what Eckart and Young say that it is at least, and is reported."""
    paths, out = kohya(tmp_path), tmp_path / "out.safetensors"
    result = merge_checkpoints(paths, out, lora=f"rank:{rank}", weights=[1, 2, 1])
    found, expected = changes(out), mean_of(paths, [1, 2, 1])
    for name, matrix in expected.items():
        least = tail(matrix, rank)
        assert distance(found[name], matrix) == pytest.approx(least, rel=1e-6, abs=FLOAT32)
        error, norm = result.errors[f"{name}"]
        assert norm == pytest.approx(float(matrix.square().sum()), rel=1e-9)
        assert error == pytest.approx(norm * least**2, rel=1e-6, abs=1e-20)
    assert verify_output(out).hashed


@given(
    ranks=st.lists(st.tuples(*[st.integers(1, 6)] * 3), min_size=2, max_size=4),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    numbers=st.lists(st.integers(1, 9), min_size=4, max_size=4),
    alphas=st.lists(st.sampled_from([1.0, 2.0, 0.5, 7.25]), min_size=3, max_size=3),
    rank=st.none() | st.integers(1, 12),
)
def test_any_adapters(ranks, dtype, numbers, alphas, rank):
    """For any ranks, weights and alphas the products are the mean, or as near as can be."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = [folder / f"{k}.safetensors" for k in range(len(ranks))]
        for seed, (path, row) in enumerate(zip(paths, ranks, strict=True)):
            save_file(factors(seed, row, alphas=alphas, dtype=dtype), path)
        weights = numbers[: len(paths)]
        lora = "exact" if rank is None else f"rank:{rank}"
        merge_checkpoints(paths, folder / "o.safetensors", lora=lora, weights=weights)
        found, expected = changes(folder / "o.safetensors"), mean_of(paths, weights)
    rounding = FLOAT32 if dtype == torch.float32 else 1e-12
    for name, matrix in expected.items():
        least = 0 if rank is None else tail(matrix, rank)
        assert distance(found[name], matrix) == pytest.approx(least, rel=1e-6, abs=rounding)


def test_equal_adapters_give_their_bytes(tmp_path):
    """The exact mean of copies has the tensors of each, to the bit."""
    state = factors(0, (4, 2, 3), alphas=(4, 1, 8))
    paths = [tmp_path / f"{k}.safetensors" for k in range(3)]
    for path in paths:
        save_file(state, path)
    merge_checkpoints(paths, tmp_path / "out.safetensors", lora="exact")
    found = load_file(tmp_path / "out.safetensors")
    assert all(same_bits(found[name], value) for name, value in state.items())


@pytest.mark.parametrize("shared", ["down", "up"])
def test_a_factor_in_common_keeps_the_rank(tmp_path, shared):
    """Where A or B is the same everywhere, the exact mean is that of the other, rounded once."""
    first = factors(0, (4, 2, 3), alphas=(4, 1, 8))
    paths = [tmp_path / f"{k}.safetensors" for k in range(3)]
    for seed, path in enumerate(paths):
        other = factors(seed, (4, 2, 3), alphas=(4, 1, 8))
        save_file({n: first[n] if shared in n else other[n] for n in first}, path)
    weights = ["0.1", "0.2", "0.7"]
    merge_checkpoints(paths, tmp_path / "exact.safetensors", lora="exact", weights=weights)
    merge_checkpoints(paths, tmp_path / "plain.safetensors", weights=weights)
    found, plain = (load_file(tmp_path / f"{n}.safetensors") for n in ("exact", "plain"))
    assert all(same_bits(found[name], value) for name, value in plain.items())


def test_some_that_repeat_add_no_rank(tmp_path):
    """Of four adapters of which two have one A, two others one B, the rank is that of two."""
    paths = [tmp_path / f"{k}.pt" for k in range(4)]
    for seed, path in enumerate(paths):
        a, b = noise(seed // 2 if seed < 2 else seed, 3, 9), noise(9 if seed > 1 else seed, 7, 3)
        torch.save({"q.lora_down.weight": a, "q.lora_up.weight": b}, path)
    merge_checkpoints(paths, tmp_path / "o.pt", lora="exact", weights=[1, 2, 3, 4])
    assert torch.load(tmp_path / "o.pt")["q.lora_down.weight"].shape == (6, 9)
    found, expected = changes(tmp_path / "o.pt"), mean_of(paths, [1, 2, 3, 4])
    assert distance(found["q"], expected["q"]) < FLOAT32


def test_a_folder_of_peft(tmp_path):
    """Ranks, alphas, patterns and rsLoRA of each count, and the settings are written anew."""
    a = write_peft(tmp_path / "a", factors(0, (4, 4, 4), "peft"), **settings(4, 8, more=[1]))
    patterns = {"rank_pattern": {"q": 6}, "alpha_pattern": {"mid.q": 3, "conv": 16}}
    b = write_peft(tmp_path / "b", factors(1, (2, 6, 2), "peft"), **settings(2, 5, **patterns))
    rs = settings(8, 16, use_rslora=True)
    c = write_peft(tmp_path / "c", factors(2, (8, 8, 8), "peft"), **rs)
    (a / "README.md").write_text("a card")
    for lora, rank in (("exact", 30), ("rank:5", 5)):
        out = tmp_path / lora.replace(":", "")
        merge_checkpoints([a, b, c], out, lora=lora, weights=[1, 2, 1], template=1)
        found, expected = changes(out), mean_of([a, b, c], [1, 2, 1])
        for name, matrix in expected.items():
            least = tail(matrix, rank)
            assert distance(found[name], matrix) == pytest.approx(least, rel=1e-6, abs=FLOAT32)
        config = json.loads((out / "adapter_config.json").read_text())
        assert config["more"] == [1]
        assert (config["peft_type"], config["use_rslora"]) == ("LORA", False)
        assert (out / "README.md").read_text() == "a card"
        assert verify_output(out).hashed


def test_a_rank_that_stays_keeps_the_settings(tmp_path):
    """With the template's rank its settings hold, and are copied as they are."""
    paths = [tmp_path / name for name in "ab"]
    for seed, path in enumerate(paths):
        write_peft(path, factors(seed, (4, 4, 4), "peft"), **settings(4, 8, use_rslora=True))
    merge_checkpoints(paths, tmp_path / "out", lora="rank:4")
    config = tmp_path / "out/adapter_config.json"
    assert config.read_bytes() == (paths[0] / "adapter_config.json").read_bytes()
    found, expected = changes(tmp_path / "out"), mean_of(paths, [1, 1])
    for name, matrix in expected.items():
        assert distance(found[name], matrix) == pytest.approx(tail(matrix, 4), rel=1e-6)


def test_whole_tensors_are_averaged_as_ever(tmp_path):
    """What is saved beside the factors, as by modules_to_save, has its plain mean."""
    paths = [tmp_path / name for name in "abc"]
    for seed, path in enumerate(paths):
        whole = {"base_model.model.head.weight": noise(seed + 50, 5, 7)}
        write_peft(
            path,
            factors(seed, (4, 2, 3), "peft") | whole,
            **settings(4, 8, rank_pattern={"mid.q": 2, "conv": 3}),
        )
    merge_checkpoints(paths, tmp_path / "out", lora="exact")
    merge_checkpoints(paths, tmp_path / "plain")
    found, plain = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("out", "plain"))
    assert same_bits(found["base_model.model.head.weight"], plain["base_model.model.head.weight"])


def test_metadata_of_kohya(tmp_path):
    """The rank and alpha in the metadata are those of the output, or Dynamic if they vary."""
    paths = kohya(tmp_path)
    for lora, expected in (("rank:2", ("2", "Dynamic")), ("exact", ("Dynamic", "Dynamic"))):
        merge_checkpoints(paths, tmp_path / "o.safetensors", lora=lora, overwrite=True)
        with safe_open(tmp_path / "o.safetensors", "pt") as file:
            found = file.metadata()
        assert found["ss_network_dim"] in (expected[0], "Dynamic")
        assert found["ss_network_alpha"] == expected[1]


def test_metadata_of_diffusers(tmp_path):
    """Settings in the metadata of a file scale its products, and are written anew."""
    paths = [tmp_path / f"{k}.safetensors" for k in range(2)]
    for seed, (path, rank) in enumerate(zip(paths, (2, 3), strict=True)):
        state = {"unet.q.lora_A.weight": noise(seed, rank, 9)}
        state |= {"unet.q.lora_B.weight": noise(seed + 9, 7, rank)}
        told = {"unet.r": rank, "unet.lora_alpha": 4 * rank + seed, "unet.target_modules": ["q"]}
        save_file(state, path, metadata={"lora_adapter_metadata": json.dumps(told)})
    merge_checkpoints(paths, tmp_path / "o.safetensors", lora="exact")
    with safe_open(tmp_path / "o.safetensors", "pt") as file:
        told = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (told["unet.r"], told["unet.lora_alpha"], told["unet.target_modules"]) == (5, 20, ["q"])
    a, b = (load_file(path) for path in paths)
    product = "unet.q.lora_B.weight", "unet.q.lora_A.weight"
    expected = 4 * (a[product[0]].double() @ a[product[1]].double())
    expected += 13 / 3 * (b[product[0]].double() @ b[product[1]].double())
    found = load_file(tmp_path / "o.safetensors")
    merged = 4 * (found[product[0]].double() @ found[product[1]].double())
    assert distance(merged, expected / 2) < FLOAT32


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling(tmp_path, spelling):
    """PEFT's, kohya's, diffusers' and torchtune's names are those of factors."""
    paths = []
    for seed in range(2):
        folder = tmp_path / str(seed)
        folder.mkdir()
        paths.append(folder / "adapter.pt")
        torch.save(factors(seed, (2, 3, 2), spelling), paths[-1])
        if spelling in ("peft", "torchtune"):
            config = settings(2, 4, rank_pattern={"mid.q": 3})
            (folder / "adapter_config.json").write_text(json.dumps(config))
    out = tmp_path / "0/out.pt"
    merge_checkpoints(paths, out, lora="rank:2")
    state = torch.load(out)
    assert {value.shape[0] for name, value in state.items() if "down" in name} <= {2}
    expected = mean_of(paths, [1, 1])
    assert len(expected) == 3
    # All modules but one have the rank that the settings beside the output say.
    for name, matrix in expected.items():
        if "mid" not in name:
            assert distance(changes_of(state, name, spelling), matrix) == pytest.approx(
                tail(matrix, 2), rel=1e-6
            )


def changes_of(state, name, spelling):
    """Return what a module of rank 2 does, where alpha is 4 in settings, and 2 without."""
    (a,) = (
        v
        for k, v in state.items()
        if k.startswith(f"{name}") and ("A" in k or "down" in k or "lora_a" in k)
    )
    (b,) = (
        v
        for k, v in state.items()
        if k.startswith(f"{name}") and ("B" in k or "up" in k or "lora_b" in k)
    )
    scale = 2 if spelling in ("peft", "torchtune") else 1
    return scale * b.double().flatten(1) @ a.double().flatten(1)


def test_the_agreement_is_that_of_the_products(tmp_path):
    """Cosines are those of the changes; factors that differ by a rotation agree in all."""
    paths = [tmp_path / f"{k}.pt" for k in range(2)]
    a, b = noise(1, 4, 30), noise(2, 20, 4)
    turn = torch.linalg.qr(noise(3, 4, 4)).Q
    torch.save({"q.lora_A.weight": a, "q.lora_B.weight": b}, paths[0])
    torch.save({"q.lora_A.weight": turn.T @ a, "q.lora_B.weight": b @ turn}, paths[1])
    result = merge_checkpoints(paths, tmp_path / "o.pt", lora="rank:4")
    assert result.agreement.mean == pytest.approx(1, abs=1e-6)
    assert result.verdict is None
    assert result.agreement.size == 600
    paths = kohya(tmp_path)
    result = merge_checkpoints(paths, tmp_path / "p.safetensors", lora="exact")
    each = [changes(path) for path in paths]
    vectors = torch.stack([torch.cat([m.flatten() for m in one.values()]) for one in each])
    lengths = vectors.norm(dim=1)
    cosines = vectors @ vectors.T / lengths[:, None] / lengths
    found = torch.tensor(result.agreement.pairs, dtype=torch.float64)
    torch.testing.assert_close(found, cosines, rtol=0, atol=1e-7)
    name, matrices = "lora_unet_first", [one["lora_unet_first"] for one in each]
    (about,) = (one for one in result.agreement.tensors if one.name == name)
    middle = sum(matrices) / 3
    scale = (sum(float(m.square().sum()) for m in matrices) / 3) ** 0.5
    expected = [float((m - middle).norm()) / scale for m in matrices]
    assert about.distances == pytest.approx(expected, rel=1e-6)


def test_too_little_agreement_writes_nothing(tmp_path):
    """--min-agreement goes by the cosine between the products."""
    paths = kohya(tmp_path)
    with pytest.raises(MergeError, match=r"0\.9 is asked for"):
        merge_checkpoints(paths, tmp_path / "o.safetensors", lora="exact", min_agreement=0.9)
    assert not (tmp_path / "o.safetensors").exists()


def test_several_averages_are_refused(tmp_path):
    """Averages of other members have other ranks, so that each is made alone."""
    paths = kohya(tmp_path)
    with pytest.raises(UsageError, match="of a single average"):
        merge_checkpoints(paths, tmp_path / "{name}.pt", lora="exact", leave_one_out=True)
    assert sorted(tmp_path.iterdir()) == paths


def test_a_checkpoint_without_weight_may_be_wrapped(tmp_path):
    """Names of one that has no weight meet the template's too."""
    paths = kohya(tmp_path)
    state = {f"module.{name}": value for name, value in load_file(paths[2]).items()}
    save_file(state, paths[2])
    merge_checkpoints(paths, tmp_path / "o.safetensors", lora="exact", weights=[1, 1, 0])
    found, expected = changes(tmp_path / "o.safetensors"), mean_of(paths[:2], [1, 1])
    assert all(distance(found[name], expected[name]) < FLOAT32 for name in expected)


def test_task_arithmetic(tmp_path):
    """Weights that are not normalized, negative ones too, are those of the changes."""
    paths = kohya(tmp_path)
    options = {"weights": [1, -0.5, 2], "normalize": False}
    merge_checkpoints(paths, tmp_path / "o.safetensors", lora="exact", **options)
    each, found = [changes(path) for path in paths], changes(tmp_path / "o.safetensors")
    for name, matrix in found.items():
        expected = each[0][name] - 0.5 * each[1][name] + 2 * each[2][name]
        assert distance(matrix, expected) < FLOAT32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_factors(tmp_path, dtype):
    """Factors are rounded once to their dtype, or stay wide with --dtype."""
    paths = kohya(tmp_path, dtype=dtype)
    merge_checkpoints(paths, tmp_path / "n.safetensors", lora="exact")
    merge_checkpoints(paths, tmp_path / "w.safetensors", lora="exact", dtype="float32")
    expected = mean_of(paths, [1, 1, 1])
    narrow, wide = (changes(tmp_path / f"{name}.safetensors") for name in "nw")
    for name, matrix in expected.items():
        assert distance(wide[name], matrix) < FLOAT32
        assert FLOAT32 < distance(narrow[name], matrix) < torch.finfo(dtype).eps
    assert load_file(tmp_path / "n.safetensors")["lora_unet_conv.lora_up.weight"].dtype == dtype


def test_an_alpha_that_is_rounded(tmp_path):
    """Where alpha does not fit its dtype, the factors make up for it."""
    paths = kohya(tmp_path)
    for path in paths:
        state = load_file(path)
        narrow = {name: torch.tensor(1.1).bfloat16() for name in state if "alpha" in name}
        save_file(state | narrow, path)
    merge_checkpoints(paths, tmp_path / "o.safetensors", lora="exact", template=2)
    found, expected = changes(tmp_path / "o.safetensors"), mean_of(paths, [1, 1, 1])
    assert all(distance(found[name], expected[name]) < FLOAT32 for name in expected)
    alpha = load_file(tmp_path / "o.safetensors")["lora_unet_first.alpha"]
    first = load_file(paths[1])["lora_unet_first.alpha"]
    assert 0 < abs(float(alpha) - float(first) / 3 * 9) < 0.02


def test_what_has_no_length_is_zero(tmp_path):
    """Of a rank that the mean does not have, the factors are zeros."""
    paths = [tmp_path / f"{k}.pt" for k in range(2)]
    for path in paths:
        torch.save({"q.lora_down.weight": noise(0, 2, 9), "q.lora_up.weight": noise(1, 7, 2)}, path)
    merge_checkpoints(paths, tmp_path / "o.pt", lora="rank:4")
    found = torch.load(tmp_path / "o.pt")
    assert not found["q.lora_down.weight"][2:].any()
    assert not found["q.lora_up.weight"][:, 2:].any()
    assert distance(changes(tmp_path / "o.pt")["q"], mean_of(paths, [1, 1])["q"]) < FLOAT32


def test_threads_and_memory_change_no_byte(tmp_path):
    """The result depends neither on the number of threads nor on the memory that there is."""
    paths = kohya(tmp_path)
    outputs = []
    for threads, memory in ((1, None), (2, None), (1, 24 << 20)):
        options = {"threads": threads, "max_memory": memory, "overwrite": True}
        merge_checkpoints(paths, tmp_path / "o.safetensors", lora="rank:3", **options)
        outputs.append((tmp_path / "o.safetensors").read_bytes())
    assert len(set(outputs)) == 1


def test_an_input_that_changed_is_named(tmp_path):
    """Verifying an average of adapters tells which of them is another one now."""
    paths = kohya(tmp_path)
    merge_checkpoints(paths, tmp_path / "o.safetensors", lora="rank:3")
    raw = bytearray(paths[1].read_bytes())
    raw[-1] ^= 1
    paths[1].write_bytes(raw)
    with pytest.raises(MergeError, match="its weights are not those") as caught:
        verify_output(tmp_path / "o.safetensors")
    assert caught.value.where == str(paths[1])


def test_damage_is_found(tmp_path):
    """A record of an archive whose CRC-32 does not match is an error."""
    paths = [tmp_path / f"{k}.pt" for k in range(2)]
    for seed, path in enumerate(paths):
        torch.save(factors(seed, (4, 2, 3)), path)
    raw = bytearray(paths[1].read_bytes())
    value = factors(1, (4, 2, 3))["lora_unet_mid_q.lora_up.weight"].numpy().tobytes()
    raw[raw.index(value)] ^= 1
    paths[1].write_bytes(raw)
    with pytest.raises(MergeError, match="is damaged"):
        merge_checkpoints(paths, tmp_path / "o.pt", lora="rank:2")


def test_long_factors_take_little_memory(tmp_path):
    """An embedding's factors of 60 MB are worked on in blocks."""
    for seed in range(2):
        state = {"e.lora_embedding_A": noise(seed, 50, 300_000)}
        torch.save(state | {"e.lora_embedding_B": noise(seed + 9, 16, 50)}, tmp_path / f"{seed}.pt")
    code = f"""
        import resource, torch
        from merge_avg import merge_checkpoints
        torch.linalg.svd(torch.linalg.qr(torch.randn(300, 100).double()).R)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        paths = [{str(tmp_path / "0.pt")!r}, {str(tmp_path / "1.pt")!r}]
        result = merge_checkpoints(paths, {str(tmp_path / "o.pt")!r}, lora="rank:50", threads=1)
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(after - before, result.job.budget.nbytes >> 10)
    """
    pytest.importorskip("resource")  # which Windows lacks
    run = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    taken, promised = map(int, done.stdout.split())
    assert taken < promised < 64 << 10  # KiB


def test_the_command(tmp_path):
    """The command says what it would do, does it, and says how near it is."""
    kohya(tmp_path)
    names = [f"{k}.safetensors" for k in range(3)]
    dry = run_command(*names, "-o", "o.safetensors", "--lora", "rank:2", "--dry-run", cwd=tmp_path)
    assert dry.returncode == 0, dry.stderr
    assert "would average 9 tensors" in dry.stderr
    options = "--lora", "rank:2", "--json"
    done = run_command(*names, "-o", "o.safetensors", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    expected = mean_of([tmp_path / name for name in names], [1, 1, 1])
    found = {one["name"]: one["error"] for one in told["approximated"]["tensors"]}
    assert found == pytest.approx({n: tail(m, 2) for n, m in expected.items()}, rel=1e-6)
    whole = sum(float(m.square().sum()) for m in expected.values())
    rest = sum(float(m.square().sum()) * tail(m, 2) ** 2 for m in expected.values())
    assert told["approximated"]["error"] == pytest.approx((rest / whole) ** 0.5, rel=1e-6)
    assert told["policies"]["lora"] == "rank:2"
    shown = run_command(*names, "-o", "o.safetensors", "--lora", "rank:2", "-f", cwd=tmp_path)
    assert f"the relative error is {told['approximated']['error']:.3g}" in shown.stderr
    checked = run_command("verify", "o.safetensors", cwd=tmp_path)
    assert checked.returncode == 0, checked.stderr


def test_products_of_no_comparison_are_none():
    """A comparison without units and composites is of nothing."""
    assert Comparison([0, 1], ()).result() is None
