"""merge_avg.plan: memory is promised beforehand and the promise holds; windows hold what fits."""

import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from merge_avg.checkpoint import BY_NAME, Storage
from merge_avg.errors import MergeError
from merge_avg.plan import _budget as budget
from merge_avg.plan import batches
from merge_avg.plan._budget import MIB, plan_budget, windows
from merge_avg.plan._units import make_plan
from tests.helpers import quick
from tests.plan.helpers import info, planned, rows_of


@given(
    checkpoints=st.integers(1, 100),
    itemsize=st.sampled_from([1, 2, 4, 8, 16]),
    entries=st.integers(0, 10_000),
    memory=st.integers(1 << 20, 1 << 31),
    threads=st.one_of(st.none(), st.integers(1, 64)),
)
def test_a_plan_keeps_to_the_budget(checkpoints, itemsize, entries, memory, threads):
    """What is planned fits the budget, or the error says how much would, and that much does."""
    try:
        plan = plan_budget(checkpoints, itemsize, entries, memory, threads)
    except MergeError as error:
        least = int(str(error.hint).rpartition(" ")[2].removesuffix("KiB")) * 1024
        assert least > memory
        assert plan_budget(checkpoints, itemsize, entries, least, threads).threads == 1
        return
    assert plan.nbytes <= memory
    assert plan.threads <= (threads or 64)
    assert plan.window >= 1
    assert 1 <= plan.rows <= checkpoints


def test_the_default_is_64_mib_on_two_cores(monkeypatch):
    """Two cores take 64 MiB; a machine of many does not take them all."""
    monkeypatch.setattr(budget, "cores", lambda: 2)
    assert plan_budget(8, 4, 100).nbytes <= 64 * MIB
    assert plan_budget(8, 4, 100).threads == 2
    monkeypatch.setattr(budget, "cores", lambda: 128)
    assert plan_budget(8, 4, 100).threads == 8


def test_long_tensors_count_for_each_output():
    """Long tensors cost memory for each output after the first; a first one has room for them."""
    short, long = ([1000] * 100, [100_000] * 100)
    for outputs, more in ((1, False), (2, True)):
        plans = [plan_budget(8, 4, 800, 1 << 28, 2, outputs, one) for one in (short, long)]
        assert (plans[0].nbytes < plans[1].nbytes) == more
        assert plans[0].window == plans[1].window


def test_pairs_of_checkpoints_are_counted():
    """Products of all pairs of 1,000 checkpoints take 256 MB, which has to be asked for."""
    assert plan_budget(300, 4, 300, pairs=300**2).nbytes > 23 * 10**6
    with pytest.raises(MergeError, match="too small") as caught:
        plan_budget(1000, 4, 1000, pairs=1000**2)
    assert "--no-agreement" in str(caught.value.hint)
    assert plan_budget(1000, 4, 1000, 1 << 29, pairs=1000**2).nbytes <= 1 << 29


MEASURE = """
import json, sys, threading
import torch  # which some of the merges need
from merge_avg import merge_checkpoints
def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024
*paths, output, memory = sys.argv[1:]
floor, peak, stop = anonymous(), 0, threading.Event()
def sample():
    global peak
    while not stop.wait(0.001):
        peak = max(peak, anonymous())
thread = threading.Thread(target=sample)
thread.start()
try:
    options = {"max_memory": int(memory) or None, "threads": 2, "allow_nonfinite": True}
    options["int_policy"] = "mean"
    base = next((path for path in paths if path.endswith("base.safetensors")), None)
    if base is not None:
        paths.remove(base)
        options["base"] = base
    if "{}" in output:
        every = range(len(paths))
        rows = {output.format(left): [int(i != left) for i in every] for left in every}
        result = merge_checkpoints(paths, rows, **options)
    else:
        result = merge_checkpoints(paths, output, **options)
finally:
    stop.set()
    thread.join()
print(json.dumps([peak - floor, result.job.budget.nbytes]))
"""


def wide(generator, numel):
    exponents = torch.randint(-40, 40, (numel,), generator=generator)
    return torch.randn(numel, generator=generator) * torch.exp2(exponents.float())


def matrices(kind):
    """The same as matrices, which are compared as well; a sixth as small ones, looked at whole."""

    def made(generator, numel):
        (values,) = kind(generator, numel).values()
        parts = values[: numel // 6].split(7)
        small = {f"s{number}": part.view(-1, 1).clone() for number, part in enumerate(parts[:500])}
        return {"a": values.view(-1, 100), **small}

    return made


KINDS = {
    "float32": lambda g, n: {"a": torch.randn(n, generator=g)},
    "wide float32": lambda g, n: {"a": wide(g, n)},
    "float64": lambda g, n: {"a": torch.randn(n, generator=g, dtype=torch.float64)},
    "float64 ties": lambda g, n: {"a": torch.randn(n, generator=g, dtype=torch.float64).round()},
    "far float64": lambda g, n: {"a": wide(g, 3 * n).double() ** 9},  # settled one by one
    "bfloat16": lambda g, n: {"a": torch.randn(n, generator=g).bfloat16()},
    "float8": lambda g, n: {"a": torch.randn(n, generator=g).to(torch.float8_e4m3fn)},
    "complex64": lambda g, n: {"a": torch.randn(n, generator=g, dtype=torch.complex64)},
    "nan": lambda g, n: {
        "a": torch.randn(n, generator=g).masked_fill(torch.rand(n) < 0.01, float("nan"))
    },
}
KINDS = {kind: matrices(make) for kind, make in KINDS.items()}
KINDS["all nan"] = lambda g, n: {"a": torch.full((n,), float("nan")).bfloat16()}
KINDS["integers"] = lambda g, n: {
    "a": torch.randint(99, (n,), generator=g).to(torch.int8),
    "b": torch.randint(1 << 40, (n,), generator=g),
}
KINDS["many tensors"] = lambda g, n: {
    f"k{i}": torch.randn(3, 9, generator=g) for i in range(n // 500)
}


def scaled(g, shape, block):
    """Codes in float8 with a scale for each block."""
    codes = (torch.randn(shape, generator=g) * 60).clamp(-448, 448).to(torch.float8_e4m3fn)
    counts = [-(-extent // size) for extent, size in zip(shape, block, strict=True)]
    return codes, torch.rand(counts, generator=g) + 0.5


def layers(count, *about):
    """Some layers of such codes."""

    def made(g, n):
        pairs = [scaled(g, *about) for _ in range(count)]
        keys = ("weight", "weight_scale_inv")
        return {
            f"{k}.{key}": t for k, p in enumerate(pairs) for key, t in zip(keys, p, strict=True)
        }

    return made


KINDS["blocks of float8"] = layers(2, (1024, 2000), (128, 128))
KINDS["rows of float8"] = layers(2, (20, 100_000), (1, 100_000))
KINDS["many of float8"] = layers(2000, (8, 8), (8, 8))
# Of long tensors an output keeps the checksums of parts.
KINDS["long tensors"] = lambda g, n: {f"k{i}": torch.randn(n // 60, generator=g) for i in range(60)}
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def held(paths, output, memory):
    """The memory that a merge took in a process of its own, and what was predicted."""
    command = [sys.executable, "-c", MEASURE, *map(str, paths), str(output), str(memory)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    measured, predicted = json.loads(done.stdout)
    assert measured <= predicted
    return predicted


def saved(folder, kind, names, numel):
    """Checkpoints of a kind, each of other numbers."""
    paths = []
    for fold, name in enumerate(names):
        paths.append(folder / f"{name}.safetensors")
        save_file(KINDS[kind](torch.Generator().manual_seed(fold), numel), paths[-1])
    return paths


@linux
@pytest.mark.parametrize(
    ("kind", "memory"),
    quick(
        [(kind, memory) for kind in KINDS for memory in (0, 12 * MIB)]
        + [(kind, 256 * MIB) for kind in ("float64 ties", "all nan", "integers")],
        ("float32", 12 * MIB),
        ("float64 ties", 12 * MIB),
        ("bfloat16", 0),
        ("nan", 12 * MIB),
        ("many tensors", 0),
        ("blocks of float8", 0),
    ),
)
def test_the_promise_holds(tmp_path, kind, memory):
    """The process takes no more anonymous memory, above the import, than the plan predicts."""
    if kind == "many tensors" and memory:
        memory = 20 * MIB
    if memory and "of float8" in kind:
        memory = 64 * MIB if "many" in kind else 40 * MIB
    predicted = held(saved(tmp_path, kind, range(5), 600_000), tmp_path / "o.pt", memory)
    assert not memory or predicted <= memory


@linux
@pytest.mark.parametrize("kind", ["float32", pytest.param("many tensors", marks=pytest.mark.large)])
def test_the_promise_holds_with_a_base(tmp_path, kind):
    """A base that the checkpoints are compared with takes no more than predicted either."""
    held(saved(tmp_path, kind, (0, 1, 2, "base"), 600_000), tmp_path / "o.pt", 0)


@linux
@pytest.mark.parametrize(
    "kind",
    quick(
        [
            "float32",
            "wide float32",
            "float64 ties",
            "bfloat16",
            "complex64",
            "long tensors",
            "blocks of float8",
        ],
        "long tensors",
    ),
)
def test_the_promise_holds_for_several_averages(tmp_path, kind):
    """Nine averages at a time take no more than predicted, within a budget of 20 MiB."""
    paths = saved(tmp_path, kind, range(9), 400_000)
    memory = 40 * MIB if "of float8" in kind else 20 * MIB
    assert held(paths, tmp_path / "o{}.pt", memory) <= memory
    assert len(list(tmp_path.glob("o*.pt"))) == 9


@linux
@pytest.mark.parametrize(
    ("count", "output"),
    quick([(2, "o.pt"), (6, "o.pt"), (12, "o{}.pt")]),
)
def test_the_promise_holds_for_very_many_tensors(tmp_path, count, output):
    """What is known of 20,000 tensors of each checkpoint is part of the prediction.

    Twelve outputs take hardly more than one: what is known of tensors is known once.
    """
    paths = [tmp_path / f"{fold}.pt" for fold in range(count)]
    for fold, path in enumerate(paths):
        torch.save({f"layers.{i}.w": torch.full((3, 9), float(fold)) for i in range(20_000)}, path)
    held(paths, tmp_path / output, 0)


@linux
@pytest.mark.large
def test_the_promise_holds_for_integers_of_many_checkpoints(tmp_path):
    """Of integers that all differ only a few are Python's at a time, which take ten times more."""
    paths = [tmp_path / f"{fold}.safetensors" for fold in range(16)]
    for fold, path in enumerate(paths):
        generator = torch.Generator().manual_seed(fold)
        numbers = torch.randint(300, 30_000, (300_000,), generator=generator)
        save_file({"n": numbers.to(torch.int16)}, path)
    held(paths, tmp_path / "o.pt", 0)


@given(
    spans=st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)), min_size=1, max_size=8),
    limit=st.integers(1, 40),
)
def test_units_tile_the_storage_and_windows_tile_the_units(spans, limit):
    """Whatever views tensors take, every element of the storage is in exactly one window."""
    storage = Storage("data/0", 64, 80 * 4)
    views = {str(i): info(str(i), storage, start, (n,)) for i, (start, n) in enumerate(spans)}
    plan = planned(views, views)
    seen: list[int] = []
    for window in windows(plan.units, limit):
        assert sum(piece.stop - piece.start for piece in window) <= limit
        for piece in window:
            seen += range(piece.unit.start + piece.start, piece.unit.start + piece.stop)
    assert sorted(seen) == list(range(80))
    covered = {e for start, n in spans for e in range(start, start + n)}
    meant = {e for u in plan.units if u.kind == "mean" for e in range(u.start, u.stop)}
    assert covered <= meant


@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=6),
    limit=st.sampled_from([1, 2, 4, 8, 16]),
)
def test_batches_hold_whole_chunks(sizes, limit):
    """Windows keep to their limit, and all of a chunk is in one batch, in order."""
    storages = [Storage(str(i), 0, 4 * size) for i, size in enumerate(sizes)]
    ours = {str(i): info(str(i), storages[i], 0, (size,)) for i, size in enumerate(sizes)}
    chunks: dict[tuple[str, int], list[int]] = {}
    for batch in batches(planned(ours, ours).units, limit, 8):
        inside: dict[tuple[str, int], list[int]] = {}
        for window in batch:
            assert 0 < sum(piece.stop - piece.start for piece in window) <= limit
            for piece in window:
                for element in range(piece.start, piece.stop):
                    key = piece.unit.storage.name, element // 8
                    inside.setdefault(key, []).append(element)
        assert not chunks.keys() & inside.keys()
        chunks |= inside
    for (name, number), elements in chunks.items():
        assert elements == list(range(8 * number, min(8 * number + 8, sizes[int(name)])))
    assert sum(map(len, chunks.values())) == sum(sizes)


def test_a_window_has_a_greatest_number_of_pieces():
    """Of tensors of one number a window would have very many, each of which takes memory."""
    storages = [Storage(str(i), 4 * i, 4) for i in range(9000)]
    ours = {str(i): info(str(i), one, 0, (1,)) for i, one in enumerate(storages)}
    found = [*windows(make_plan(*rows_of(ours, ours)).units, 1 << 17)]
    assert [len(window) for window in found] == [4096, 4096, 808]
    assert [p.unit.number for window in found for p in window] == [*range(9000)]


def test_windows_hold_what_is_alike():
    """Pieces of one window have the same kind, dtypes and checkpoints."""
    storages = [Storage(str(i), 0, 16) for i in range(4)]
    ours = {
        "a": info("a", storages[0], 0, (4,)),
        "n": info("n", storages[1], 0, (4,), dtype=BY_NAME["int32"]),
        "b": info("b", storages[2], 0, (4,)),
        "c": info("c", storages[3], 0, (4,)),
    }
    theirs = {"a": ours["a"], "n": ours["n"], "b": ours["b"]}
    units = make_plan(*rows_of(ours, theirs)).units
    names = [["".join(str(p.unit.members[0][0]) for p in window)] for window in windows(units, 100)]
    assert names == [["ab"], ["n"], ["c"]]
    sizes = [[(p.start, p.stop) for p in window] for window in windows(units[:1] + units[2:3], 3)]
    assert sizes == [[(0, 3)], [(0, 3)], [(3, 4), (3, 4)]]  # whole windows first, then what is left
