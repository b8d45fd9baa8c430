"""Attack the promises of SECURITY.md, all of them or some, and print what each attack counted.

    python scripts/attack.py                        an hour or two, on two cores
    python scripts/attack.py callables arithmetic

Each attack is a script or a set of tests of its own, which can be run alone: see `ATTACKS`. The
first that finds something ends this one with its output and exit code 1.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_ALL = ["-m", "pytest", "-q", "-m", "large or not large"]
# What follows the name of Python; the last line of the output has the counts.
ATTACKS = {
    "files": [*_ALL, "tests/promises/test_attacks.py"],
    "carried": [*_ALL, "tests/promises/test_carried.py", "tests/formats/pickle"],
    "values": [*_ALL, "tests/promises/test_bad_values.py", "tests/promises/test_bounds.py"],
    "readers": [*_ALL, "tests/promises/test_differential.py"],
    "callables": ["scripts/callables.py", "all"],
    "killed": ["scripts/crash.py", "kill", "--count", "120"],
    "killed at each call": ["scripts/crash.py", "calls"],
    "failing calls": ["scripts/crash.py", "inject", "--limit", "3"],
    "surroundings": [*_ALL, "tests/promises/test_crash.py"],
    "arithmetic": [*_ALL, "tests/promises/test_arithmetic.py"],
    "sanitizers": ["scripts/sanitize.py"],
}


def main() -> None:
    """Run the attacks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of: {', '.join(ATTACKS)}")
    names = parser.parse_args().names or list(ATTACKS)
    unknown = [name for name in names if name not in ATTACKS]
    if unknown:
        parser.error(f"there is no attack {unknown[0]!r}")
    for name in names:
        start = time.monotonic()
        command = [sys.executable, *ATTACKS[name]]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{name}:\n{done.stdout[-8000:]}\n{done.stderr[-8000:]}")
        last = done.stdout.strip().splitlines()[-1]
        print(f"{name}: {last} ({time.monotonic() - start:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
