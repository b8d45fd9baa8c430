"""Build and check everything that a release publishes.

    pip install --group wheels
    python scripts/wheels.py dist

That is the source distribution, a wheel for any machine, and for each platform a wheel with the
compiled loops. One machine builds them all: the loops know nothing of Python, and Zig compiles C
for any system. scripts/try_wheel.py tries one where it belongs.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shlex
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from io import BytesIO
from pathlib import Path

from elftools.elf.elffile import ELFFile

ROOT = Path(__file__).resolve().parents[1]
# The platforms that have wheels, as Zig names them. No torch asks for less than glibc 2.17, or for
# less than macOS 11.
TARGETS = {
    "manylinux_2_17_x86_64": "x86_64-linux-gnu.2.17",
    "manylinux_2_17_aarch64": "aarch64-linux-gnu.2.17",
    "musllinux_1_2_x86_64": "x86_64-linux-musl",
    "musllinux_1_2_aarch64": "aarch64-linux-musl",
    "macosx_11_0_x86_64": "x86_64-macos.11.0",
    "macosx_11_0_arm64": "aarch64-macos.11.0",
    "win_amd64": "x86_64-windows-gnu",
    "win_arm64": "aarch64-windows-gnu",
}


def call(*command: str, cwd: Path = ROOT, **variables: str) -> str:
    """Run a Python module as a command, and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=cwd,
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout


def build(folder: Path) -> None:
    """Build all distributions; the wheels from the source distribution."""
    call("hatchling", "build", "-t", "sdist", "-d", str(folder))
    (source,) = folder.glob("*.tar.gz")
    with tempfile.TemporaryDirectory() as place:
        with tarfile.open(source) as archive:
            archive.extractall(place, filter="data")
        (tree,) = Path(place).iterdir()
        wheel = "hatchling", "build", "-t", "wheel", "-d", str(folder)
        call(*wheel, cwd=tree, CC="false")
        for platform, target in TARGETS.items():
            # Without symbols, which nobody debugs.
            compiler = shlex.join([sys.executable, "-m", "ziglang", "cc", "-target", target, "-s"])
            call(*wheel, cwd=tree, CC=compiler, MERGE_AVG_PLATFORM=platform)


def check(folder: Path) -> None:
    """Check that the index accepts what was built, and that each wheel needs no more than it may.

    Raises:
        SystemExit: something is wrong with one.
    """
    files = sorted(map(str, folder.iterdir()))
    wheels = [Path(file) for file in files if file.endswith(".whl")]
    print(call("twine", "check", "--strict", *files), end="")
    print(call("check_wheel_contents", *map(str, wheels)), end="")
    for wheel in wheels:
        platform = wheel.stem.split("-")[-1]
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if "/_loops." in name]
            content = [archive.read(name) for name in names]
        if len(content) != (platform != "any"):
            sys.exit(f"{wheel}: it has {names}")
        if platform.startswith("manylinux"):
            # Of versions of symbols; auditwheel breaks its lines anywhere.
            shown = "".join(call("auditwheel", "show", str(wheel)).split())
            fine = f'platformtag:"{platform}"' in shown
        elif platform.startswith("musllinux"):
            # auditwheel knows libc by another name. musl's loader takes any that begins like this
            # for itself (https://git.musl-libc.org/cgit/musl/tree/ldso/dynlink.c).
            dynamic = ELFFile(BytesIO(*content)).get_section_by_name(".dynamic")
            needed = [tag.needed for tag in dynamic.iter_tags("DT_NEEDED")]
            shown, fine = f"it needs {needed}", needed == ["libc.so"]
        elif platform.startswith("win"):
            shown = call("delvewheel", "show", str(wheel))
            fine = "copied into the wheel.\n    None" in shown
        else:  # of macOS: delocate looks there
            continue
        if not fine:
            sys.exit(f"{wheel}: {shown}")


def main() -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="a new folder, or an empty one")
    folder = parser.parse_args().folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        sys.exit(f"{folder} is not empty")
    build(folder)
    check(folder)
    for one in sorted(folder.iterdir()):
        print(hashlib.sha256(one.read_bytes()).hexdigest(), f"{one.stat().st_size:>9,}", one.name)


if __name__ == "__main__":
    main()
