"""Break the source in small ways, one at a time, and list what no test notices.

mutmut (https://mutmut.readthedocs.io) makes the mutants, and runs the tests that belong to a module
on each. Lines that only word a message are left out. A mutant that survives is a missing test, or a
change that makes no difference.

    python -m pip install mutmut
    python scripts/mutants.py --module io/_output --show
    python scripts/mutants.py --module arithmetic/torch_mean --sample 300
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# The tests that belong to a module.
_PICKLES = "formats/pickle/test_load formats/pickle/test_machine formats/pickle/test_values"
TESTS = {
    "formats/bounded": "formats/test_bounded promises/test_bad_values",
    "formats/carried": "formats/test_carried promises/test_carried",
    "formats/pickle/callables": "formats/pickle/test_callables",
    "formats/pickle/load": _PICKLES,
    "formats/pickle/machine": _PICKLES,
    "formats/pickle/methods": "formats/pickle/test_methods",
    "formats/pickle/tensors": "formats/pickle/test_tensors formats/pickle/test_torch_objects",
    "formats/pickle/values": "formats/pickle/test_values",
    "formats/zip/records": "formats/zip/test_records",
    "io/_output": "io/test_output io/test_temporary",
    "io/_temporary": "io/test_temporary io/test_output",
    "io/_reader": "io/test_reader",
    "io/_platform": "io/test_platform io/test_output io/test_reader",
    "checkpoint/_reasons": "checkpoint/test_reasons checkpoint/test_roles formats/test_directory",
    "checkpoint/_derived": "checkpoint/test_derived",
    "plan/_masters": "plan/test_masters",
    "plan/_units": "plan/test_units agreement/test_comparison",
    "plan/_budget": "plan/test_budget",
    "plan/_provenance": "plan/test_provenance",
    "formats/safetensors": "formats/test_safetensors",
    "arithmetic/_mean": "arithmetic/test_mean",
    "arithmetic/_weights": "arithmetic/test_weights arithmetic/test_mean",
    "arithmetic/_sums": "arithmetic/test_sums arithmetic/test_torch_mean",
    "arithmetic/torch_mean": "arithmetic/test_torch_mean arithmetic/test_mean",
}
# Lines that only word a message: they may change without a test that notices.
WORDS = [
    r"\bhint\b",
    r"\bwhat\b",
    r"\bwhere=",
    r"raise (MergeError|UsageError|_damaged)",
    r"\brefuse_use\(",
    r'^\s*f?"',
    "noqa: S101",
]
ENDED = {0: "survived", 5: "survived", 33: "survived"}
ENDED |= dict.fromkeys((24, -24, 36), "timed out")  # -24: of the processor's time


def copied(folder: Path, module: str) -> Path:
    """Copy the project, set the copy up for one module, and return it."""
    tree = folder / module.replace("/", "-")
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


def run(tree: Path, module: str, children: int, sample: int) -> tuple[dict[str, str], int]:
    """Return how each mutant ended, or each of a random sample, by name, and how many there are."""
    mutmut = [sys.executable, "-m", "mutmut", "run", "--max-children", str(children)]
    meta = tree / "mutants" / "src" / "merge_avg" / f"{module}.py.meta"

    # Tests run in forked processes, which lack the threads that torch started before the fork.
    alone = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

    def ended(*names: str) -> dict[str, int | None]:
        command = [*mutmut, *names]
        done = subprocess.run(
            command, cwd=tree, env=alone, check=False, capture_output=True, text=True
        )
        codes = json.loads(meta.read_text())["exit_code_by_key"] if meta.exists() else {}
        if not codes or None in [codes[name] for name in names or codes if name in codes]:
            sys.exit(f"mutmut failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
        return dict(codes)

    if not sample:
        codes = ended()
        chosen = list(codes)
    else:
        # mutmut names all mutants once it has run one of each function.
        every = sorted(ended("*__mutmut_1"))
        chosen = random.Random(0).sample(every, min(sample, len(every)))  # noqa: S311
        codes = ended(*chosen)
    return {name: ENDED.get(codes[name] or 0, "killed") for name in chosen}, len(codes)


def shown(tree: Path, name: str) -> str:
    """Return what a mutant changes, as a short diff."""
    command = [sys.executable, "-m", "mutmut", "show", name]
    text = subprocess.run(command, cwd=tree, check=False, capture_output=True, text=True).stdout
    lines = [line for line in text.splitlines() if re.match(r"[-+@](?![-+])", line)]
    return "\n".join([name, *lines[:8]])


def main() -> int:
    """Print a line for each module, and on request the mutants that survived."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--module", choices=TESTS, action="append", help="by default all")
    parser.add_argument("--show", action="store_true", help="show what survived")
    parser.add_argument("--sample", type=int, default=0, help="try so many at random, not all")
    parser.add_argument("--children", type=int, default=2, help="processes")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        for module in options.module or TESTS:
            tree = copied(Path(name), module)
            ended, every = run(tree, module, options.children, options.sample)
            tally = collections.Counter(ended.values())
            lost = len(ended) - tally["survived"]
            share = f"{lost}/{len(ended)} noticed ({100 * lost / len(ended):.0f} %)"
            print(f"{module:22} {share}, of {every} in all", flush=True)
            for mutant, how in ended.items() if options.show else ():
                if how == "survived":
                    print(shown(tree, mutant), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
