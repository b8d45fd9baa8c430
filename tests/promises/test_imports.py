"""What a run imports: small merges are mostly imports, so that each needless one shows.

Times depend on the machine; the set of modules does not.
"""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

# What a merge needs beside what any program of typer has loaded.
LIBRARIES = {"gzip", "xxhash", "zlib_ng"}  # zlib_ng imports gzip
STANDARD = {"concurrent", "ctypes", "gc", "glob", "json", "logging", "mmap", "pkgutil", "queue"}
# What runs of other kinds need, by package.
ELSEWHERE = {
    "merge_avg.agreement": {"_torch_products"},
    "merge_avg.arithmetic": {"_sums", "torch_mean"},
    "merge_avg.cli": {"_soup"},
    "merge_avg.engine": {"_cuda", "_restride"},
    "merge_avg.formats": {"carried", "distributed", "legacy", "refused"},
    "merge_avg.report": {"_charts", "html", "inspect", "terminal", "text"},
    "merge_avg.soup": {"_evaluate", "_greedy", "_log"},
    "merge_avg": {"api", "merger", "soup", "verify"},
}
SHOWN = (
    "import atexit, sys\natexit.register(lambda: print(*sys.modules, sep='\\n', file=sys.stderr))\n"
)
HELLO = "import typer\napp = typer.Typer()\n@app.command()\ndef main(name: str): ...\napp()"


def modules(code, *args):
    """Return the modules that a process has imported when it ends."""
    run = [sys.executable, "-c", SHOWN + code, *map(str, args)]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    return set(done.stderr.split())


@pytest.fixture(scope="module")
def hello():
    """The modules of a program of typer that does nothing."""
    return modules(HELLO, "x")


def merged(folder, suffix, save):
    for number in range(2):
        save({"w": torch.full((4, 4), float(number))}, folder / f"{number}{suffix}")
    paths = folder / f"0{suffix}", folder / f"1{suffix}", "-o", folder / f"out{suffix}"
    return modules("from merge_avg.cli import entry\nentry()", *paths, "--quiet")


@pytest.mark.parametrize(
    ("suffix", "save", "others"),
    [
        (".safetensors", save_file, {"merge_avg.formats.pickle", "merge_avg.formats.zip"}),
        (".pt", torch.save, {"merge_avg.formats.safetensors"}),
    ],
    ids=["safetensors", "pt"],
)
def test_a_merge_imports_what_it_needs(tmp_path, hello, suffix, save, others):
    """Neither torch nor another format, report or command, nor a library that it does not use."""
    found = merged(tmp_path, suffix, save) - hello
    needless = {f"{package}.{name}" for package, names in ELSEWHERE.items() for name in names}
    if suffix == ".pt":
        needless.remove("merge_avg.formats.refused")  # it tells archives by their records
    assert not {one for one in found if one in needless | others}
    outside = {one.partition(".")[0] for one in found} - {"merge_avg"}
    outside = {one for one in outside if not one.startswith("_")}
    assert outside - STANDARD <= LIBRARIES


def test_the_needless_modules_exist():
    """A module of the list above that moves, or goes, is missed here."""
    import importlib

    for package, names in ELSEWHERE.items():
        for name in names - {"_sums", "torch_mean", "_torch_products"}:
            importlib.import_module(f"{package}.{name}")
