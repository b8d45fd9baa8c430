"""Compiles the loops of merge_avg.arithmetic while a wheel is built.

Without a C compiler, or with CC=false, the wheel is for any machine and leaves the loops to torch.
A compiler for another machine is told of in CC, and that machine in MERGE_AVG_PLATFORM, as the tags
of wheels name it; then no wheel is built if the compiler fails.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from packaging.tags import platform_tags

SOURCES = "kernel.c", "level.h", "loops.h"
# No result of these loops sets errno or a floating-point exception that anybody reads. Nothing here
# lets a compiler change a rounding: -ffast-math would.
FLAGS = ["-O3", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math"]


def digest(folder: Path) -> str:
    """Return the digest of the sources, which the library knows: tests refuse one of others."""
    sources = (folder / name for name in SOURCES)
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()


def library_name(platform: str) -> str:
    """Return the name of the library on a platform, as the tags of wheels name it."""
    known = {"win": ".dll", "macosx": ".dylib"}
    return "_loops" + known.get(platform.partition("_")[0], ".so")


def build(folder: Path, library: Path) -> None:
    """Compile the sources in a folder.

    Raises:
        OSError: there is no compiler.
        subprocess.CalledProcessError: it fails.
    """
    compiler = shlex.split(os.environ.get("CC", "cc"))
    flags = [*FLAGS, f'-DSOURCE="{digest(folder)}"']
    # By its name alone, which macOS keeps in a library: the same sources give the same bytes.
    command = [*compiler, *flags, "-o", library.name, str(folder / "kernel.c"), "-lm"]
    subprocess.run(command, cwd=library.parent, check=True, capture_output=True, text=True)


class KernelHook(BuildHookInterface[Any]):
    """The build hook that hatchling calls."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and say for which machines the wheel is."""
        package = Path(self.root) / "src" / "merge_avg" / "arithmetic"
        platform = os.environ.get("MERGE_AVG_PLATFORM")
        tag = platform or next(iter(platform_tags()))
        self._made = tempfile.TemporaryDirectory()
        place = package if version == "editable" else Path(self._made.name)
        library = place / library_name(tag)
        library.unlink(missing_ok=True)
        try:
            build(package, library)
        except (OSError, subprocess.CalledProcessError) as error:
            what = getattr(error, "stderr", None) or error
            if platform:
                sys.exit(f"no loops for {platform}: {what}")
            self.app.display_warning(f"the loops of merge-avg are left to torch: {what}")
            return
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{tag}"
        if version != "editable":
            build_data["force_include"][str(library)] = f"merge_avg/arithmetic/{library.name}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:  # noqa: ARG002
        """Remove the library, which the wheel has by now."""
        self._made.cleanup()
