"""Average real checkpoints of each framework, and let the framework load the result.

This makes an environment for each group of packages (transformers 4 and 5 exclude each other),
installs the project into it, and runs the tests that are marked `frameworks`. With --samples it
renews the frozen checkpoints in tests/data, which the default tests average without any framework.
The writers are in tests/frameworks: makers.py, trainers.py and libraries.py use the frameworks,
structures.py follows the sources of those that cannot be installed (the default tests run these).

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
OLDER = "composer or olmo or torchtune"
GROUPS = {
    "frameworks": f"not ({OLDER})",
    "frameworks-transformers4": "(transformers or accelerate or peft)"
    " and not (sentence or accelerated)",
    "frameworks-older": OLDER,
}
# These ask for older releases than they run with, so they come without what they depend on, which
# their group lists.
ALONE = {
    "frameworks-older": [
        "ai2-olmo-core>=3",
        "cached-path>=1.8",  # OLMo-core's
        "mosaicml>=0.32",
        "torchao==0.13.0",  # torchtune's
        "torchdata==0.11.0",  # torchtune's and composer's
        "torchtune==0.6.1",
    ]
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
        for package in ALONE.get(group, []):
            subprocess.run([*pip, *limits, "--no-deps", package], check=True)
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
