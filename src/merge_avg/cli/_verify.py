"""The command with --verify: whether outputs are what their inputs give."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from merge_avg.cli._console import print_result, say
from merge_avg.cli._options import Display
from merge_avg.options import Options
from merge_avg.verify import verify_output


def verify(
    outputs: Sequence[Path], inputs: Path | None, options: Options, display: Display
) -> None:
    """Verify outputs of earlier merges, with the threads and the memory of the options."""
    found = []
    for output in outputs:
        one = verify_output(output, inputs, options.threads, options.max_memory)
        found.append({"output": one.output, "inputs": one.inputs, "bytes": one.nbytes})
        if not display.quiet:
            hashes = "; their hashes are as recorded" if one.hashed else ""
            given = f"what its {len(one.inputs)} inputs give{hashes}"
            say(f"{output}: all {one.nbytes:,} bytes are {given}")
    print_result(display, lambda: found, map(str, outputs))
