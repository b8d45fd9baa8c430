"""Average real checkpoints of each framework, and let the framework load the result.

This makes an environment for each group of packages (transformers 4 and 5 exclude each other),
installs the project into it, and runs the tests that are marked `frameworks`. With --samples it
renews the frozen checkpoints in tests/data, which the default tests average without any framework.

    python scripts/frameworks.py [--constraint FILE] [--environments DIR] [--samples]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Dependency groups, and the tests that each can run, as an expression of pytest's -k.
GROUPS = {
    "frameworks": "",
    "frameworks-transformers4": "transformers and not sentence or accelerate or peft",
}


def environment(group: str, folder: Path, constraint: Path | None) -> Path:
    """Make an environment with a dependency group and this project, and return its Python."""
    python = folder / group / "bin" / "python"
    if not python.exists():
        venv.create(folder / group, with_pip=True)
        pip = [str(python), "-m", "pip", "install", "-q"]
        limits = ["-c", str(constraint)] if constraint else []
        subprocess.run([*pip, "-U", "pip>=25.1"], check=True)
        # torch first, so that no other package chooses one.
        subprocess.run([*pip, *limits, "torch", "torchvision"], check=True)
        subprocess.run([*pip, *limits, "-e", str(ROOT), "--group", group], check=True, cwd=ROOT)
    return python


def main() -> int:
    """Run everything, and return an exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--constraint", type=Path, help="constraints for pip, to choose a torch")
    parser.add_argument("--environments", type=Path, help="directory that keeps them between runs")
    parser.add_argument("--samples", action="store_true", help="renew tests/data instead")
    options = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.environments or Path(temporary)
        for group, chosen in GROUPS.items():
            python = environment(group, folder, options.constraint)
            print(f"== {group}", flush=True)
            if options.samples:
                command = [str(python), "-m", "tests.frameworks.samples"]
                failed |= subprocess.run(command, cwd=ROOT, check=False).returncode
                break
            command = [str(python), "-m", "pytest", "-m", "frameworks", "-k", chosen]
            failed |= subprocess.run(command, cwd=ROOT, check=False).returncode
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
