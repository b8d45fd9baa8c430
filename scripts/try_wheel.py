"""Install the wheel for this machine as a user would, without torch, and use it.

    python scripts/try_wheel.py dist
    python scripts/try_wheel.py dist --pure    the one for any machine

pip chooses among the wheels of the folder, for an environment with neither torch nor a compiler on
the PATH. Every element of a weighted mean is compared with exact arithmetic.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import struct
import subprocess
import sys
import tempfile
import tomllib
import venv
from fractions import Fraction
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Of each dtype in safetensors: its bytes, the bits of its significand, its smallest exponent.
DTYPES = {"F32": (4, 24, -126), "F16": (2, 11, -14), "BF16": (2, 8, -126)}
WEIGHTS = [1, 2, 3]
COUNT = 5000
LOOPS = "from merge_avg.arithmetic import LOOPS; print(*LOOPS.levels if LOOPS else [])"


def value(word: int, nbytes: int, bits: int, smallest: int) -> Fraction:
    """Return the finite number that bits stand for."""
    size = word & ((1 << (8 * nbytes - 1)) - 1)
    exponent, fraction = size >> (bits - 1), size & ((1 << (bits - 1)) - 1)
    significand = fraction + (1 << (bits - 1) if exponent else 0)
    sign = -1 if word >> (8 * nbytes - 1) else 1
    return sign * significand * Fraction(2) ** (max(exponent, 1) + smallest - bits)


def rounded(mean: Fraction, bits: int, smallest: int) -> Fraction:
    """Return the nearest number of the format, ties to even."""
    exponent = smallest
    while abs(mean) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    unit = Fraction(2) ** (exponent + 1 - bits)
    return round(mean / unit) * unit  # Python rounds ties to even


def words(chance: random.Random, nbytes: int, bits: int) -> list[int]:
    """Return finite numbers of any size, as integers of their bits."""
    special = (1 << (8 * nbytes - bits)) - 1  # the exponent of infinity and NaN
    drawn = (chance.getrandbits(8 * nbytes) for _ in range(2 * COUNT))
    return [word for word in drawn if word >> (bits - 1) & special != special][:COUNT]


def write(path: Path, tensors: dict[str, list[int]]) -> None:
    """Write a safetensors file, https://github.com/huggingface/safetensors#format."""
    header, data = {}, b""
    for dtype, values in tensors.items():
        nbytes = DTYPES[dtype][0]
        raw = b"".join(word.to_bytes(nbytes, "little") for word in values)
        offsets = [len(data), len(data) + len(raw)]
        header[dtype] = {"dtype": dtype, "shape": [len(values)], "data_offsets": offsets}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def read(path: Path) -> dict[str, list[int]]:
    """Return the tensors of such a file."""
    content = path.read_bytes()
    begin = 8 + struct.unpack_from("<Q", content)[0]
    header = json.loads(content[8:begin])
    tensors = {}
    for dtype, (nbytes, _, _) in DTYPES.items():
        start, stop = (begin + at for at in header[dtype]["data_offsets"])
        places = range(start, stop, nbytes)
        tensors[dtype] = [int.from_bytes(content[k : k + nbytes], "little") for k in places]
    return tensors


def attempt(wheels: Path, folder: Path, *, pure: bool) -> str:
    """Install and use a wheel in an empty folder; return what its loops are compiled for.

    Raises:
        SystemExit: something is wrong with it.
    """
    venv.create(folder / "env", with_pip=True)
    scripts = folder / "env" / ("Scripts" if os.name == "nt" else "bin")
    kept = "HOME PIP_CONFIG_FILE PIP_CONSTRAINT SSL_CERT_FILE".split()
    kept += "APPDATA LOCALAPPDATA SYSTEMROOT TEMP USERPROFILE".split()  # of Windows
    variables = {name: os.environ[name] for name in kept if name in os.environ}

    def call(*command: str) -> str:
        program = str(scripts / command[0])
        done = subprocess.run(
            [program, *command[1:]],
            cwd=folder,
            env=variables | {"PATH": str(scripts)},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        return done.stdout

    needed = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["dependencies"]
    pip = "python", "-m", "pip", "install", "-q", "--only-binary", ":all:"
    call(*pip, *(one for one in needed if not one.startswith("torch")))
    (any_,) = wheels.glob("*-none-any.whl")
    chosen = [str(any_)] if pure else ["--find-links", str(wheels), "merge-avg"]
    call(*pip, "--no-deps", "--no-index", *chosen)
    levels = call("python", "-c", LOOPS).strip()
    if bool(levels) == pure:
        sys.exit(f"the loops of this wheel are for: {levels or 'nothing'}")

    chance = random.Random(0)  # noqa: S311 - the same numbers each time
    inputs = [
        {dtype: words(chance, nbytes, bits) for dtype, (nbytes, bits, _) in DTYPES.items()}
        for _ in WEIGHTS
    ]
    for number, tensors in enumerate(inputs):
        write(folder / f"{number}.safetensors", tensors)
    names = [f"{number}.safetensors" for number in range(len(WEIGHTS))]
    merge = "merge-avg", *names, "-w", ",".join(map(str, WEIGHTS)), "-o", "mean.safetensors", "-q"
    if pure:  # and without torch
        done = subprocess.run(
            [scripts / merge[0], *merge[1:]],
            cwd=folder,
            env=variables,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 1 or "hint: pip install torch" not in done.stderr:
            sys.exit(f"it said {done.stderr!r}")
        return "none"
    call(*merge)
    call("merge-avg", "verify", "mean.safetensors", "-q")
    call("merge-avg", "inspect", "mean.safetensors")
    found = read(folder / "mean.safetensors")
    for dtype, form in DTYPES.items():
        columns = zip(*(tensors[dtype] for tensors in inputs), found[dtype], strict=True)
        for *column, word in columns:
            terms = (w * value(x, *form) for w, x in zip(WEIGHTS, column, strict=True))
            mean = rounded(sum(terms, Fraction(0)) / sum(WEIGHTS), *form[1:])
            if value(word, *form) != mean:
                sys.exit(f"{dtype}: of {column} the mean is {mean}, not {value(word, *form)}")
    return levels


def main() -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("wheels", type=Path, help="the folder with the wheels")
    parser.add_argument("--pure", action="store_true", help="try the one for any machine")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        levels = attempt(given.wheels.resolve(), Path(folder), pure=given.pure)
    print(f"Python {sys.version.split()[0]} on {sys.platform}: the loops are for {levels}")


if __name__ == "__main__":
    main()
