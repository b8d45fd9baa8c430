"""Compiles src/merge_avg/arithmetic/kernel.c while a wheel is built.

Where there is no C compiler (or CC=false says so) the wheel is for any machine, and leaves these
loops to torch.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from packaging.tags import platform_tags

FLAGS = ["-O3", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math"]


def compiled(source: Path, library: Path) -> None:
    """Makes the library, which knows the digest of its source.

    Raises:
        OSError: there is no compiler.
        subprocess.CalledProcessError: it refuses.
    """
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    compiler = shlex.split(os.environ.get("CC", "cc"))
    command = [*compiler, *FLAGS, f'-DSOURCE="{digest}"', "-o", str(library), str(source)]
    subprocess.run(command, check=True, capture_output=True, text=True)


class KernelHook(BuildHookInterface[Any]):
    """What hatchling calls."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compiles, and says for which machines the wheel is then."""
        package = Path(self.root) / "src" / "merge_avg" / "arithmetic"
        self._made = tempfile.TemporaryDirectory()
        place = package if version == "editable" else Path(self._made.name)
        library = place / "_loops.so"
        library.unlink(missing_ok=True)
        try:
            compiled(package / "kernel.c", library)
        except (OSError, subprocess.CalledProcessError) as error:
            what = getattr(error, "stderr", None) or error
            self.app.display_warning(f"the loops of merge-avg are left to torch: {what}")
            return
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{next(iter(platform_tags()))}"
        if version != "editable":
            build_data["force_include"][str(library)] = "merge_avg/arithmetic/_loops.so"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:  # noqa: ARG002
        """Removes what the wheel has by now."""
        self._made.cleanup()
