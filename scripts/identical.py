"""Compares the outputs of two installed versions of merge-avg, byte for byte.

python scripts/identical.py OLD_PYTHON NEW_PYTHON      interpreters with a version installed each

A sample of every format is made, and the frozen checkpoints of tests/data are taken too. Each is
merged by both versions with many options. Outputs have to be the same, or the same refusal; and the
new version has to verify what the old one wrote. Only the version in the provenance may differ.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint import save  # type: ignore[attr-defined]

DATA = Path(__file__).parents[1] / "tests" / "data"
# What is asked of every sample, and the ending of the output where it is not the sample's own.
CASES: dict[str, tuple[list[str], str | None]] = {
    "plain": ([], None),
    "weights": (["--weights", "1,2,3"], None),
    "sum": (["--weights", "1,-1,1", "--no-normalize"], None),
    "bfloat16": (["--dtype", "bfloat16"], None),
    "float64": (["--dtype", "float64", "--no-hashes"], None),
    "state dict": (["--state-dict"], None),
    "to safetensors": ([], ".safetensors"),
    "to pt": (["--no-agreement"], ".pt"),
    "shards": (["--max-shard-size", "1KB"], ""),
    "one shard": (["--max-shard-size", "1GB"], ""),
    "some": (["--exclude", "*bias*"], None),
    "skip": (["--missing", "skip", "--int-policy", "mean"], None),
    "available": (["--missing", "available", "--int-policy", "max"], None),
    "template": (["--template", "2"], None),
    "one thread": (["--threads", "1", "--max-memory", "12MiB"], None),
    "left out": (["--leave-one-out"], None),
    "prefixes": (["--prefixes"], None),
}
SEVERAL = {"left out", "prefixes"}
UNRECORDED = "it does not say what it was made of"


def state(seed: int) -> dict[str, Any]:
    """Return a state dict with ties, strides, integers, and tensors without elements."""
    torch.manual_seed(seed)
    table = torch.randn(60, 8)
    return {
        "embedding.weight": table,
        "head.weight": table,
        "layer.weight": torch.randn(64, 64).t(),
        "layer.bias": torch.randn(64).to(torch.bfloat16),
        "layer.scale": torch.randn(()),
        "norm.half": torch.randn(33, 3).half(),
        "norm.num_batches_tracked": torch.tensor(100 + seed),
        "positions": torch.arange(9),
        "none": torch.zeros(0, 3),
    }


def wrapped(seed: int) -> dict[str, Any]:
    """Return a training checkpoint around a state dict."""
    moments = {0: {"exp_avg": torch.randn(5, 5)}}
    optimizer = {"state": moments, "param_groups": [{"lr": 0.1}]}
    return {"epoch": seed, "state_dict": state(seed), "optimizer": optimizer}


def plain(seed: int) -> dict[str, torch.Tensor]:
    """Return a state dict whose tensors stand alone."""
    return {name: tensor.contiguous().clone() for name, tensor in state(seed).items()}


def deflated(path: Path) -> None:
    """Pack an archive again, with compression."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in records.items():
            archive.writestr(name, content)


def samples(folder: Path) -> Iterator[tuple[str, list[Path], str]]:
    """Yield samples: a name, three checkpoints, and the ending of an output of their kind."""
    for seed in range(3):
        torch.save(wrapped(seed), folder / f"zip{seed}.pt")
        torch.save(wrapped(seed), folder / f"deflated{seed}.pt")
        deflated(folder / f"deflated{seed}.pt")
        legacy = folder / f"legacy{seed}.pt"
        torch.save(wrapped(seed), legacy, _use_new_zipfile_serialization=False)
        save_file(plain(seed), folder / f"safe{seed}.safetensors", {"format": "pt", "a": "ä"})
        shards = folder / f"shards{seed}"
        shards.mkdir()
        tensors = sorted(plain(seed).items())
        for number, part in enumerate((tensors[:4], tensors[4:]), start=1):
            save_file(dict(part), shards / f"model-{number:05}-of-00002.safetensors")
        (shards / "config.json").write_text('{"torch_dtype": "float32"}')
        with contextlib.redirect_stdout(sys.stderr):
            save({"model": plain(seed)}, checkpoint_id=folder / f"dcp{seed}", no_dist=True)
    for name, ending in (
        ("zip*.pt", ".pt"),
        ("deflated*.pt", ".pt"),
        ("legacy*.pt", ".pt"),
        ("safe*.safetensors", ".safetensors"),
        ("shards*", ""),
        ("dcp*", ""),
    ):
        yield name, sorted(folder.glob(name)), ending
    for frozen in sorted(DATA.iterdir()):
        found = sorted(frozen.glob("[0-9]"))
        if len(found) > 1:
            inside = [sorted(one.iterdir()) for one in found]
            single = all(len(files) == 1 and files[0].is_file() for files in inside)
            paths = [files[0] for files in inside] if single else found
            yield frozen.name, paths, paths[0].suffix if single else ""


def run(python: str, arguments: list[str]) -> tuple[int, str]:
    """Run the command of an installed version; return its exit code and what it says."""
    command = [python, "-W", "ignore", "-m", "merge_avg", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


def tree(path: Path) -> dict[str, bytes]:
    """Return the files below a path, or the file itself, by relative path."""
    files = [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file())
    return {one.relative_to(path.parent).as_posix(): one.read_bytes() for one in files}


def verify(python: str, output: Path, paths: list[Path]) -> tuple[int, str]:
    """Verify an output, whose inputs are named from the deepest directory that holds them all."""
    parents = [path.parent for path in paths]
    for folder in (Path(os.path.commonpath(parents)), *parents):
        code, said = run(python, ["--verify", str(output), "--inputs", str(folder)])
        if not code or UNRECORDED in said:
            break
    return code, said


def main() -> int:
    """Compare, and print a line for each difference."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("old", help="an interpreter with the old version")
    parser.add_argument("new", help="an interpreter with the new version")
    options = parser.parse_args()
    counts = {"same": 0, "refused alike": 0, "different": 0, "verified": 0, "not verified": 0}
    with tempfile.TemporaryDirectory() as name:
        inputs, outputs = Path(name, "in"), Path(name, "out")
        inputs.mkdir()
        for sample, paths, ending in samples(inputs):
            for case, (asked, wanted) in CASES.items():
                if "--weights" in asked and len(paths) != 3:
                    continue
                stem = "avg-{name}" if case in SEVERAL else "avg"
                suffix = ending if wanted is None else wanted
                made, codes = [], []
                for python in (options.old, options.new):
                    shutil.rmtree(outputs, ignore_errors=True)
                    outputs.mkdir()
                    where = ["-q", "-o", str(outputs / f"{stem}{suffix}")]
                    # Of which checkpoint is the template by default, versions think otherwise.
                    where += [] if case == "template" else ["--template", "1"]
                    codes.append(run(python, [*map(str, paths), *asked, *where]))
                    made.append(tree(outputs))
                    if python == options.old and not codes[0][0]:
                        for one in sorted(outputs.iterdir()):
                            code, said = verify(options.new, one, paths)
                            if UNRECORDED in said:
                                continue  # a legacy file has no room for it
                            counts["not verified" if code else "verified"] += 1
                            if code:
                                print(f"{sample}, {case}: {one.name} is not verified: {said}")
                same = made[0] == made[1] and codes[0][0] == codes[1][0]
                alike = same and codes[0][0] != 0
                counts["refused alike" if alike else "same" if same else "different"] += 1
                if not same:
                    print(f"{sample}, {case}: {codes}")
    for what, count in counts.items():
        print(f"{count:6} {what}")
    return int(counts["different"] + counts["not verified"] > 0)


if __name__ == "__main__":
    sys.exit(main())
