"""Run the tests of the arithmetic on loops that check each address and each undefined operation.

    python scripts/sanitize.py

The loops are compiled in a copy of the project with GCC's sanitizers.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from build_kernel import digest

ROOT = Path(__file__).resolve().parents[1]
FLAGS = "-O1 -g -shared -fPIC -fno-math-errno -fno-trapping-math -fsanitize=address,undefined"
TESTS = ["tests/arithmetic", "tests/agreement", "tests/promises/test_arithmetic.py"]


def main() -> int:
    """Run the script."""
    compiler = shlex.split(os.environ.get("CC", "gcc"))

    def library(name: str) -> str:
        command = [*compiler, f"-print-file-name={name}"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    with tempfile.TemporaryDirectory() as folder:
        for name in ("src", "tests", "scripts"):
            shutil.copytree(ROOT / name, Path(folder, name))
        for name in ("pyproject.toml", "README.md", "CHANGELOG.md"):
            shutil.copy(ROOT / name, folder)
        package = Path(folder, "src", "merge_avg", "arithmetic")
        macros = ["-fno-sanitize-recover=all", f'-DSOURCE="{digest(package)}"']
        files = ["-o", str(package / "_loops.so"), str(package / "kernel.c")]
        subprocess.run([*compiler, *FLAGS.split(), *macros, *files], check=True)
        environment = os.environ | {
            "LD_PRELOAD": f"{library('libasan.so')} {library('libubsan.so')}",
            "ASAN_OPTIONS": "detect_leaks=0",  # Python itself leaks on purpose
            "PYTHONPATH": str(package.parents[1]),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS]
        return subprocess.run(command, cwd=folder, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
