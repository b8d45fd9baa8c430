"""Breaks the source in small ways, one at a time, and lists what no test notices.

mutmut (https://mutmut.readthedocs.io) makes the mutants and runs the tests that belong to a module
on each. Lines that only word a message are left out. A mutant that survives is a test that is
missing, or a change that makes no difference.

    python -m pip install mutmut
    python scripts/mutants.py [--module output] [--show]
"""

from __future__ import annotations

import argparse
import collections
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Which tests belong to a module.
TESTS = {
    "output": "test_output test_temporary",
    "temporary": "test_temporary test_output",
    "weights": "test_weights",
    "plan": "test_plan",
    "files": "test_files",
    "average": "test_average",
}
# Messages may be worded in any way.
WORDS = [
    r"\bhint\b",
    r"\bwhat\b",
    r"\bwhere=",
    r"raise (MergeError|UsageError|_damaged)",
    r'^\s*f?"',
    "noqa: S101",
]
ENDED = {0: "survived", 5: "survived", 33: "survived", 24: "timed out", 36: "timed out"}


def copied(folder: Path, module: str) -> Path:
    """A copy of the project that is set up for one module."""
    tree = folder / module
    ignored = shutil.ignore_patterns(".git", "__pycache__", ".*_cache", "mutants", ".hypothesis")
    shutil.copytree(ROOT, tree, ignore=ignored)
    tests = [f"tests/{name}.py" for name in TESTS[module].split()]
    with (tree / "pyproject.toml").open("a") as file:
        file.write(
            f"""
[tool.mutmut]
source_paths = ["src/"]
only_mutate = ["src/merge_avg/{module}.py"]
also_copy = ["tests", "scripts", "pyproject.toml", "README.md"]
pytest_add_cli_args_test_selection = {json.dumps(tests)}
do_not_mutate_patterns = {json.dumps(WORDS)}
"""
        )
    return tree


def run(tree: Path, module: str, children: int) -> dict[str, str]:
    """How each mutant ended, by its name."""
    command = [sys.executable, "-m", "mutmut", "run", "--max-children", str(children)]
    done = subprocess.run(command, cwd=tree, check=False, capture_output=True, text=True)
    meta = tree / "mutants" / "src" / "merge_avg" / f"{module}.py.meta"
    codes = json.loads(meta.read_text())["exit_code_by_key"] if meta.exists() else {}
    if not codes or None in codes.values():
        sys.exit(f"mutmut failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return {name: ENDED.get(code, "killed") for name, code in codes.items()}


def shown(tree: Path, name: str) -> str:
    """What a mutant changes."""
    command = [sys.executable, "-m", "mutmut", "show", name]
    text = subprocess.run(command, cwd=tree, check=False, capture_output=True, text=True).stdout
    lines = [line for line in text.splitlines() if re.match(r"[-+@](?![-+])", line)]
    return "\n".join([name, *lines[:8]])


def main() -> int:
    """Prints a line a module, and what survived where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--module", choices=TESTS, action="append", help="by default all")
    parser.add_argument("--show", action="store_true", help="show what survived")
    parser.add_argument("--children", type=int, default=2, help="processes")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        for module in options.module or TESTS:
            tree = copied(Path(name), module)
            ended = run(tree, module, options.children)
            tally = collections.Counter(ended.values())
            lost = len(ended) - tally["survived"]
            share = f"{lost}/{len(ended)} noticed ({100 * lost / len(ended):.0f} %)"
            print(f"{module:10} {share}", flush=True)
            for mutant, how in ended.items() if options.show else ():
                if how == "survived":
                    print(shown(tree, mutant), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
