"""Measure merge-avg beside other ways to average checkpoints, on the same files in the same run.

    python scripts/bench.py                       every workload, warm cache
    python scripts/bench.py --quick               small files, for a smoke run
    python scripts/bench.py float32 tiny --cold --repeat 5 --json bench.json --plot bench.png
    python scripts/bench.py --curve               time and memory over the number and size of files

Every contender is a process of its own. Contenders take turns, so that a noisy machine is noisy for
all of them. Where there is a GPU, merge-avg and the loop run on it too. Each time is also printed
as a ratio to the limit, which is to read what has to be read of every input once and to copy one
input with fsync: once as it is, and once less what `python -c "import torch"` takes in the same
run. For small merges, `above hello` is the time above that of a command of typer which prints a
word. Memory is that of the whole process; `anon` leaves out mapped files and code.
"""

from __future__ import annotations

import argparse
import compileall
import functools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

import merge_avg

MB = 1_000_000


# Workloads: seeded files


@dataclass(frozen=True)
class Workload:
    """Checkpoints to average.

    Attributes:
        count: how many there are.
        nbytes: the size of each.
        make: writes one; its arguments are a path, a seed and a size.
        suffix: the ending of inputs and output.
        needed: the part of a file that has to be read, which is its weights and comes first.
        dry: whether it is a dry run, of files that are sparse: only merge-avg makes one.
    """

    count: int
    nbytes: int
    make: Callable[[Path, int, int], None]
    suffix: str
    needed: float = 1.0
    dry: bool = False


def _tensors(seed: int, sizes: Sequence[int], dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for number, nbytes in enumerate(sizes):
        numel = max(nbytes // dtype.itemsize, 1)
        flat = torch.empty(numel).uniform_(-1, 1, generator=generator).to(dtype)
        tensors[f"layers.{number}.weight"] = flat.view(-1, 64) if numel % 64 == 0 else flat
    return tensors


def _split(nbytes: int, parts: int) -> list[int]:
    return [nbytes // parts // 256 * 256] * parts


def _float32(path: Path, seed: int, nbytes: int) -> None:
    torch.save(_tensors(seed, _split(nbytes, 40), torch.float32), path)


def _bfloat16(path: Path, seed: int, nbytes: int) -> None:
    save_file(_tensors(seed, _split(nbytes, 40), torch.bfloat16), path)


def _nested(path: Path, seed: int, nbytes: int) -> None:
    """Write a model like ResNet-50 in a container, with an optimizer that has one moment."""
    weights = _tensors(seed, _split(nbytes // 2, 160), torch.float32)
    state = {i: {"momentum_buffer": value * 0.1} for i, value in enumerate(weights.values())}
    optimizer = {"state": state, "param_groups": [{"lr": 0.1, "params": list(state)}]}
    torch.save({"state_dict": weights, "optimizer_states": [optimizer], "epoch": seed}, path)


def _sharded(path: Path, seed: int, nbytes: int) -> None:
    """Write a directory as transformers does, with the names and proportions of a Llama."""
    path.mkdir()
    layers = 16
    hidden = int((nbytes / 2 / (13 * layers + 4)) ** 0.5) // 64 * 64
    square, wide, row = (hidden, hidden), (3 * hidden, hidden), (hidden,)
    shapes: dict[str, tuple[int, ...]] = {"lm_head": (2 * hidden, hidden)}
    shapes |= {"model.embed_tokens": (2 * hidden, hidden)}
    for layer in range(layers):
        parts: dict[str, tuple[int, ...]] = {}
        parts |= {f"self_attn.{part}_proj": square for part in "qkvo"}
        parts |= {"mlp.gate_proj": wide, "mlp.up_proj": wide, "mlp.down_proj": (hidden, 3 * hidden)}
        parts |= {"input_layernorm": row, "post_attention_layernorm": row}
        shapes |= {f"model.layers.{layer}.{part}": shape for part, shape in parts.items()}
    shapes |= {"model.norm": row}
    table: dict[str, str] = {}
    for shard in range(4):
        chosen = list(shapes.items())[shard::4]
        sizes = [2 * math.prod(shape) for _, shape in chosen]
        values = _tensors(seed * 4 + shard, sizes, torch.bfloat16).values()
        pairs = zip(chosen, values, strict=True)
        tensors = {f"{name}.weight": value.view(shape) for (name, shape), value in pairs}
        file = f"model-{shard + 1:05}-of-00004.safetensors"
        save_file(tensors, path / file, metadata={"format": "pt"})
        table |= dict.fromkeys(tensors, file)
    index = {"metadata": {"total_size": nbytes}, "weight_map": table}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_attention_heads": hidden // 64,
        "num_hidden_layers": layers,
        "vocab_size": 2 * hidden,
    }
    (path / "config.json").write_text(json.dumps(config))


def _one(path: Path, seed: int, nbytes: int) -> None:
    save_file(_tensors(seed, [nbytes], torch.float32), path)


def _tiny(path: Path, seed: int, nbytes: int) -> None:
    torch.save(_tensors(seed, _split(nbytes, 20_000), torch.float32), path)


def _many(path: Path, seed: int, nbytes: int) -> None:
    save_file(_tensors(seed, _split(nbytes, 20_000), torch.float32), path)


def _of_1_kb(path: Path, seed: int, nbytes: int) -> None:
    torch.save(_tensors(seed, _split(nbytes, nbytes // 1000), torch.float32), path)


def _adapter(path: Path, seed: int, nbytes: int) -> None:
    save_file(_tensors(seed, _split(nbytes, 400), torch.bfloat16), path)


def _small(path: Path, seed: int, nbytes: int) -> None:
    tensors = _tensors(seed, _split(nbytes, 60), torch.float32)
    torch.save({"state_dict": tensors, "epoch": seed}, path)


def _sparse(path: Path, _: int, nbytes: int) -> None:
    """Write the headers of a mixture of experts like DeepSeek-V3, in shards, and no weights."""
    path.mkdir()
    width, narrow, layers = 7168, 2048, max(61 * nbytes // (1400 * 1000 * MB), 4)
    shapes = {"lm_head": [129280, width], "model.embed_tokens": [129280, width]}
    attention = {"q_a": [1536, width], "q_b": [24576, 1536], "kv_b": [32768, 512]}
    for layer in range(layers):
        front = f"model.layers.{layer}"
        shapes |= {f"{front}.self_attn.{part}_proj": shape for part, shape in attention.items()}
        shapes |= {f"{front}.input_layernorm": [width], f"{front}.mlp.gate": [256, width]}
        for expert in range(256 if layer >= 3 else 1):
            parts = {"gate": [narrow, width], "up": [narrow, width], "down": [width, narrow]}
            inside = f"{front}.mlp.experts.{expert}"
            shapes |= {f"{inside}.{part}_proj": shape for part, shape in parts.items()}
    table: dict[str, str] = {}
    for shard in range(84):
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        file, end = f"model-{shard + 1:05}-of-00084.safetensors", 0
        for name, shape in [*shapes.items()][shard * len(shapes) // 84 :][: len(shapes) // 84 + 1]:
            if (key := f"{name}.weight") not in table:
                table[key] = file
                start, end = end, end + 2 * math.prod(shape)
                about = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
                header[key] = about
        raw = json.dumps(header).encode()
        with (path / file).open("wb") as handle:
            handle.write(len(raw).to_bytes(8, "little") + raw)
            handle.truncate(8 + len(raw) + end)
    index = {"metadata": {"total_size": nbytes}, "weight_map": table}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


WORKLOADS = {
    "float32": Workload(8, 1400 * MB, _float32, ".pt"),
    "bfloat16": Workload(8, 700 * MB, _bfloat16, ".safetensors"),
    "nested": Workload(20, 200 * MB, _nested, ".ckpt", 0.5),
    "sharded": Workload(3, 4000 * MB, _sharded, ""),
    "one": Workload(2, 4000 * MB, _one, ".safetensors"),
    "tiny": Workload(8, 20 * MB, _tiny, ".pt"),
    "many": Workload(8, 20 * MB, _many, ".safetensors"),
    "adapters": Workload(8, 26 * MB, _adapter, ".safetensors"),
    "small": Workload(5, 4 * MB, _small, ".pt"),
    "sparse": Workload(4, 1400 * 1000 * MB, _sparse, "", dry=True),
}


# Contenders: merge-avg, and what people use today

_LOAD = """
import json, pathlib, shutil, sys, torch
from safetensors.torch import load_file, save_file
*inputs, output = sys.argv[1:]
def load(path, **options):
    if path.endswith(".safetensors"):
        return load_file(path)
    if (folder := pathlib.Path(path)).is_dir():
        state = {}
        for file in folder.glob("*.safetensors"):
            state |= load_file(file)
        return state
    return torch.load(path, map_location="cpu", weights_only=True, **options)
def weights(checkpoint):
    return checkpoint["state_dict"] if "state_dict" in checkpoint else checkpoint
def save(checkpoint):
    if (folder := pathlib.Path(inputs[0])).is_dir():
        copied = shutil.ignore_patterns("*.safetensors")
        shutil.copytree(folder, output, ignore=copied, dirs_exist_ok=True)
        table = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        for name in set(table.values()):
            shard = {key: value for key, value in checkpoint.items() if table[key] == name}
            save_file(shard, output + "/" + name, metadata={"format": "pt"})
        return
    (save_file if output.endswith(".safetensors") else torch.save)(checkpoint, output)
"""
# The loop that most tools have: the sum has the dtype of the first checkpoint.
_LOOP = (
    _LOAD
    + """
first = load(inputs[0] OPTIONS)
total = weights(first)
total.update({key: value.clone() for key, value in total.items()})
for path in inputs[1:]:
    for key, value in weights(load(path OPTIONS)).items():
        total[key] += value
for value in total.values():
    value /= len(inputs)
save(first)
"""
)
# The same, with the sum in a GPU's memory.
_GPU_LOOP = (
    _LOAD
    + """
first = load(inputs[0])
state = weights(first)
total = {key: value.cuda() for key, value in state.items()}
for path in inputs[1:]:
    for key, value in weights(load(path)).items():
        total[key] += value.cuda()
for key, value in total.items():
    state[key] = (value / len(inputs)).cpu()
save(first)
"""
)
_AVERAGED_MODEL = (
    _LOAD
    + """
from torch.optim.swa_utils import AveragedModel
class Holder(torch.nn.Module):
    def __init__(self, state):
        super().__init__()
        self.values = torch.nn.ParameterList(
            torch.nn.Parameter(value, requires_grad=False) for value in state.values())
first = load(inputs[0])
state = weights(first)
averaged = AveragedModel(Holder(state))
averaged.update_parameters(Holder(state))
for path in inputs[1:]:
    averaged.update_parameters(Holder(weights(load(path))))
for key, value in zip(state, averaged.module.values):
    state[key] = value.data
save(first)
"""
)


@dataclass(frozen=True)
class Contender:
    """A way to average.

    Attributes:
        command: makes the command from inputs and an output; None where it cannot take them.
    """

    command: Callable[[Sequence[Path], Path], list[str] | None]


def _python(code: str) -> Contender:
    def command(inputs: Sequence[Path], output: Path) -> list[str]:
        return [sys.executable, "-c", code, *map(str, inputs), str(output)]

    return Contender(command)


def _ours(*options: str) -> Contender:
    def command(inputs: Sequence[Path], output: Path) -> list[str]:
        paths = map(str, inputs)
        return [sys.executable, "-m", "merge_avg", *paths, "-o", str(output), "-q", *options]

    return Contender(command)


def _limit(needed: float) -> Contender:
    """Read a part of every file, and copy the first checkpoint with fsync."""

    def command(inputs: Sequence[Path], output: Path) -> list[str]:
        one = inputs[0]
        files = sorted(one.glob("*.safetensors")) if one.is_dir() else [one]
        every = [path / file.name if path.is_dir() else path for path in inputs for file in files]
        read = f"cat {' '.join(map(str, every))} > /dev/null"
        if needed < 1:
            parts = [(path, int(path.stat().st_size * needed) // (1 << 16)) for path in every]
            read = "; ".join(f"dd if={path} of=/dev/null bs=64K count={n}" for path, n in parts)
        copies = (f"dd if={f} of={output}.{i} bs=1M conv=fsync" for i, f in enumerate(files))
        return ["sh", "-c", "; ".join([read, *copies])]

    return Contender(command)


_IMPORT = Contender(lambda *_: [sys.executable, "-c", "import torch"])
_TYPER = """
import typer
app = typer.Typer()
@app.command()
def main(name: str = "world"):
    print(f"hello {name}")
app()
"""
_HELLO = Contender(lambda *_: [sys.executable, "-c", _TYPER])
# What each race has beside its contenders.
_MARKS = {"import torch": _IMPORT, "hello": _HELLO}


def _mergekit(program: Path) -> Contender:
    """Run mergekit's linear method; `program` is its mergekit-yaml, which takes directories."""

    def command(inputs: Sequence[Path], output: Path) -> list[str] | None:
        if inputs[0].suffix == ".ckpt":
            return None
        models = [{"model": str(path), "parameters": {"weight": 1.0}} for path in inputs]
        config = output.with_name("mergekit.yml")
        value: dict[str, object] = {"merge_method": "linear", "models": models}
        if inputs[0].is_dir():
            config.write_text(json.dumps(value | {"dtype": "bfloat16"}))
            return [str(program), "--no-copy-tokenizer", str(config), str(output)]
        config.write_text(json.dumps(value))
        return [str(program.with_name("mergekit-pytorch")), str(config), str(output)]

    return Contender(command)


_SD_MECHA = """
import pathlib, sys, sd_mecha, torch
from safetensors import safe_open
*inputs, output = [pathlib.Path(path).absolute() for path in sys.argv[1:]]
with safe_open(inputs[0], "pt") as file:
    dtype = file.get_tensor(next(iter(file.keys()))).dtype
models = [sd_mecha.model(path) for path in inputs]
mean = sd_mecha.n_average(*models)
sd_mecha.merge(mean, output=output, merge_dtype=torch.float32, output_dtype=dtype)
"""


def _sd_mecha(python: Path) -> Contender:
    """Run sd-mecha's plain average, which takes safetensors; `python` has it installed."""

    def command(inputs: Sequence[Path], output: Path) -> list[str] | None:
        if inputs[0].suffix != ".safetensors":
            return None
        return [str(python), "-c", _SD_MECHA, *map(str, inputs), str(output)]

    return Contender(command)


# Measuring


@dataclass(frozen=True)
class Reading:
    """One run: seconds, and memory in MiB."""

    wall: float
    cpu: float
    anonymous: float
    resident: float


def measure(command: Sequence[str], log: Path, patience: float) -> Reading | None:
    """Run a command; return None if it fails, or takes more than `patience` seconds."""
    with log.open("w") as file:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=file, stderr=file)
        anonymous = resident = 0
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            found = _memory(process.pid)
            anonymous = max(anonymous, found.get("RssAnon", 0))
            resident = max(resident, found.get("VmHWM", 0))
            if time.perf_counter() - started > patience:
                process.kill()
                file.write(f"\nstopped after {patience:g} s")
            time.sleep(0.004)
        wall = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        return None
    cpu = usage.ru_utime + usage.ru_stime
    return Reading(wall, cpu, anonymous / 1024, resident / 1024)


def _memory(pid: int) -> dict[str, int]:
    """Return what the kernel counts for a process, in KiB.

    `ru_maxrss` would not do: a child inherits its parent's peak.
    """
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:  # it has just ended
        return {}
    pairs = (line.split() for line in lines if line.startswith(("RssAnon:", "VmHWM:")))
    return {name[:-1]: int(value) for name, value, *_ in pairs}


def _drop_cache(paths: Sequence[Path]) -> None:
    for path in paths:
        for file in path.rglob("*") if path.is_dir() else [path]:
            fd = os.open(file, os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def _warm_cache(paths: Sequence[Path]) -> None:
    for path in paths:
        for file in path.rglob("*") if path.is_dir() else [path]:
            with file.open("rb", buffering=0) as handle:
                while handle.read(8 * MB):
                    pass


def _clean(output: Path) -> None:
    for path in output.parent.glob(f"{output.stem}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def race(
    inputs: Sequence[Path],
    suffix: str,
    *,
    contenders: dict[str, Contender],
    repeat: int,
    cold: bool,
    patience: float,
    needed: float = 1.0,
    dry: bool = False,
) -> dict[str, Reading]:
    """Return the median of each contender over interleaved runs, the limit and marks too."""
    output = inputs[0].parent / f"output{suffix}"
    readings: dict[str, list[Reading]] = {}
    failed: set[str] = set()
    for _ in range(repeat):
        every = {"limit": _HELLO if dry else _limit(needed), **_MARKS, **contenders}
        for name, contender in every.items():
            command = contender.command(inputs, output)
            if command is None or name in failed:
                continue
            _clean(output)
            if not dry:
                (_drop_cache if cold else _warm_cache)(inputs)
            log = inputs[0].parent / "log"
            reading = measure(command, log, patience if name in contenders else math.inf)
            if reading is None:
                failed.add(name)
                last = log.read_text(errors="replace").strip().splitlines()[-1:]
                print(f"  {name} failed: {' '.join(last)}", flush=True)
                continue
            readings.setdefault(name, []).append(reading)
    _clean(output)
    return {name: _median(some) for name, some in readings.items()}


def _median(readings: Sequence[Reading]) -> Reading:
    columns = zip(*(asdict(reading).values() for reading in readings), strict=True)
    return Reading(*map(statistics.median, columns))


def ratios(results: dict[str, Reading], name: str) -> tuple[float, float]:
    """Return wall time over the limit's: as it is, and less the time of importing torch."""
    limit, loading = results["limit"].wall, results["import torch"].wall
    wall = results[name].wall
    return wall / limit, max(wall - loading, 0.0) / limit


def show(title: str, results: dict[str, Reading]) -> None:
    """Print a table."""
    print(f"\n{title}")
    titles = "wall s", "x limit", "less import", "above hello", "cpu s", "anon MiB", "rss MiB"
    print(f"  {'':<16}" + "".join(f"{title:>12}" for title in titles))
    for name, r in results.items():
        whole, less = ratios(results, name)
        above = r.wall - results["hello"].wall
        numbers = f"{r.wall:12.2f}{whole:12.2f}{less:12.2f}{above:12.2f}{r.cpu:12.2f}"
        print(f"  {name:<16}{numbers}{r.anonymous:12.0f}{r.resident:12.0f}", flush=True)


def _made(workload: Workload, folder: Path, count: int, nbytes: int) -> list[Path]:
    paths = [folder / f"input{seed}{workload.suffix}" for seed in range(count)]
    for seed, path in enumerate(paths):
        workload.make(path, seed, nbytes)
    return paths


def _curves(
    run: Callable[[Sequence[Path], str], dict[str, Reading]], folder: Path, scale: int
) -> list[dict[str, object]]:
    """Measure time and memory over the number of checkpoints, of tensors, and over their size."""
    rows: list[dict[str, object]] = []
    grid = [("count", count, 100 * MB // scale) for count in (2, 4, 8, 16, 32, 64)]
    grid += [("nbytes", 4, nbytes * MB // scale) for nbytes in (50, 100, 200, 400, 800, 1600)]
    # And of tensors of 1 KB each, over their number, and over that of the checkpoints.
    grid += [("tensors", 8, number * 1000 // scale) for number in (5_000, 20_000, 80_000)]
    grid += [("inputs", count, 20 * MB // scale) for count in (2, 8, 32)]
    for curve, count, nbytes in grid:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            many = curve in ("tensors", "inputs")
            tensors, make = (nbytes // 1000, _of_1_kb) if many else (40, _float32)
            inputs = _made(replace(WORKLOADS["float32"], make=make), Path(place), count, nbytes)
            results = run(inputs, ".pt")
            show(f"{count} checkpoints of {nbytes / MB:g} MB in {tensors:,} tensors", results)
            rows += [
                {
                    "curve": curve,
                    "count": count,
                    "inputs": count,
                    "tensors": tensors,
                    "nbytes": nbytes,
                    "contender": name,
                    **asdict(reading),
                }
                for name, reading in results.items()
            ]
    return rows


def _races(
    run: Callable[..., dict[str, Reading]], folder: Path, names: Sequence[str], scale: int
) -> list[dict[str, object]]:
    """Measure workloads, one after the other."""
    rows: list[dict[str, object]] = []
    for name in names:
        workload = WORKLOADS[name]
        nbytes = workload.nbytes // scale
        with tempfile.TemporaryDirectory(dir=folder) as place:
            inputs = _made(workload, Path(place), workload.count, nbytes)
            dry = {"contenders": {"merge-avg": _ours("--dry-run")}, "dry": True}
            about = dry if workload.dry else {"needed": workload.needed}
            results = run(inputs, workload.suffix, **about)
        show(f"{name}: {workload.count} x {nbytes / MB:.1f} MB", results)
        for who, reading in results.items():
            whole, less = ratios(results, who)
            row = {"workload": name, "contender": who, "ratio": whole, "less_import": less}
            rows.append({**row, **asdict(reading)})
    return rows


def _plot(rows: Sequence[dict[str, object]], path: Path) -> None:
    """Draw ratios and memory of workloads as bars, or time and memory of curves as lines."""
    import matplotlib as mpl  # noqa: PLC0415 - only where a plot is asked for

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    names = [name for name in _names(rows, "contender") if name not in _MARKS]
    bars = "workload" in rows[0]
    kinds = _names(rows, "workload" if bars else "curve")
    shape = (1, 2) if bars else (len(kinds), 2)
    figure, grid = plt.subplots(*shape, figsize=(13, 5 * shape[0]), squeeze=False)
    if bars:
        for axis, field in zip(grid[0], ("ratio", "anonymous"), strict=True):
            for place, name in enumerate(names):
                found = {str(r["workload"]): r[field] for r in rows if r["contender"] == name}
                xs = [x + (place - len(names) / 2) * 0.8 / len(names) for x in range(len(kinds))]
                heights = [float(str(found.get(kind, 0))) for kind in kinds]
                axis.bar(xs, heights, 0.8 / len(names), label=name)
            axis.set_xticks(range(len(kinds)), kinds)
    for kind, axes in [] if bars else zip(kinds, grid, strict=True):
        for axis, field in zip(axes, ("wall", "anonymous"), strict=True):
            for name in names:
                drawn = [r for r in rows if r["contender"] == name and r["curve"] == kind]
                points = sorted((float(str(r[kind])), float(str(r[field]))) for r in drawn)
                axis.plot(*zip(*points, strict=True), "-o", label=name)
            steps = sorted({int(str(r[kind])) for r in rows if r["curve"] == kind})
            axis.set_xscale("log")
            axis.set_xticks(steps, [str(n // MB if kind == "nbytes" else n) for n in steps])
            axis.minorticks_off()
            about = {"nbytes": "MB of a checkpoint", "tensors": "tensors of 1 KB in each of 8"}
            about["inputs"] = "checkpoints of 20,000 tensors of 1 KB"
            axis.set_xlabel(about.get(kind, "checkpoints"))
    for left, right in grid:
        left.set_ylabel("wall time / limit" if bars else "wall time, s")
        right.set_ylabel("peak anonymous memory, MiB")
        left.set_yscale("log")
        right.set_yscale("log")
        right.set_ylim(bottom=10)
        right.legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _names(rows: Sequence[dict[str, object]], field: str) -> list[str]:
    return list(dict.fromkeys(str(row[field]) for row in rows))


def main() -> None:
    """Run what was asked for, and print and save the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workloads", nargs="*", help=f"of {', '.join(WORKLOADS)}; by default all")
    parser.add_argument("--quick", action="store_true", help="files a hundredth as large")
    parser.add_argument("--cold", action="store_true", help="drop the inputs from the page cache")
    parser.add_argument(
        "--curve", action="store_true", help="measure over the number and the size of files instead"
    )
    parser.add_argument("--ours", action="store_true", help="leave out other tools")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each contender")
    parser.add_argument(
        "--patience", type=float, default=300.0, help="seconds that a contender may take"
    )
    parser.add_argument("--folder", type=Path, help="directory for the files")
    parser.add_argument("--mergekit", type=Path, help="mergekit-yaml of an environment with it")
    parser.add_argument("--sd-mecha", type=Path, help="python of an environment with sd-mecha")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    parser.add_argument("--plot", type=Path, help="file for a plot, as PNG (needs matplotlib)")
    options = parser.parse_args()
    if unknown := set(options.workloads) - set(WORKLOADS):
        parser.error(f"no such workload: {', '.join(sorted(unknown))}")
    bare = _ours("--no-agreement", "--no-hashes")
    contenders = {"merge-avg": _ours(), "less measuring": bare}
    if torch.cuda.is_available():
        contenders["on a GPU"] = _ours("--device", "cuda")
    if not options.ours:
        contenders |= {
            "naive loop": _python(_LOOP.replace("OPTIONS", "")),
            "mmap loop": _python(_LOOP.replace("OPTIONS", ", mmap=True")),
            "AveragedModel": _python(_AVERAGED_MODEL),
        }
        if torch.cuda.is_available():
            contenders["loop on a GPU"] = _python(_GPU_LOOP)
        if options.mergekit:
            contenders["mergekit"] = _mergekit(options.mergekit)
        if options.sd_mecha:
            contenders["sd-mecha"] = _sd_mecha(options.sd_mecha)
    # pip compiles what it installs, but not an editable install.
    compileall.compile_dir(Path(merge_avg.__file__).parent, quiet=1)
    run = functools.partial(
        race,
        contenders=contenders,
        repeat=options.repeat,
        cold=options.cold,
        patience=options.patience,
    )
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        if options.curve:
            rows = _curves(run, folder, 10 if options.quick else 1)
        else:
            names = options.workloads or list(WORKLOADS)
            rows = _races(run, folder, names, 100 if options.quick else 1)
    if options.json:
        about = {"torch": torch.__version__, "cores": os.cpu_count(), "cold": options.cold}
        options.json.write_text(json.dumps({**about, "results": rows}, indent=1) + "\n")
    if options.plot:
        _plot(rows, options.plot)


if __name__ == "__main__":
    main()
