"""Whether this process is one of several ranks, as torchrun, srun and other launchers tell.

| variables | ranks |
|---|---|
| RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT | if all are set, and WORLD_SIZE is more than 1 |
| SLURM_PROCID, SLURM_STEP_NUM_TASKS, SLURM_STEP_NODELIST | the same, of tasks that srun started |

The first win. Anything less is a plain run: `RANK=0` alone may be left from another program, and
a batch script that does not say `srun` has SLURM_PROCID and SLURM_NTASKS, but is one process.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from merge_avg.errors import UsageError

_TORCH = "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"
_SLURM = "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST"
_FIRST_PORT, _PORTS = 15_000, 15_000  # below those that systems give to clients
PLAIN = "for a plain run within another program's launch: env -u RANK -u SLURM_STEP_NUM_TASKS ..."


@dataclass(frozen=True)
class Seat:
    """The place of this process among the ranks."""

    rank: int
    count: int
    local: int  # its number on this machine
    # Where rank 0 waits for the others; None where the variables of torch tell torch.
    address: str | None = None
    port: int = 0

    def device(self, name: str, gpus: int) -> str:
        """Return the device of this rank: of several GPUs, each local rank has its own."""
        return f"cuda:{self.local % gpus}" if name == "cuda" and gpus else name


def find_seat(variables: Mapping[str, str]) -> Seat | None:
    """Return this process's place among ranks; None where it runs alone."""
    if all(variables.get(name) for name in _TORCH):
        count = _number(variables, "WORLD_SIZE")
        if count > 1:
            return Seat(_rank(variables, "RANK", count), count, _local(variables, "LOCAL_RANK"))
    elif all(variables.get(name) for name in _SLURM):
        count = _number(variables, "SLURM_STEP_NUM_TASKS")
        if count > 1:
            rank, local = (
                _rank(variables, "SLURM_PROCID", count),
                _local(variables, "SLURM_LOCALID"),
            )
            step = f"{variables.get('SLURM_JOB_ID')}.{variables.get('SLURM_STEP_ID')}"
            port = _FIRST_PORT + zlib.crc32(step.encode()) % _PORTS
            return Seat(rank, count, local, first_host(variables["SLURM_STEP_NODELIST"]), port)
    return None


def first_host(nodes: str) -> str:
    """Return the first host of a list as Slurm writes it: n[01-03,7],x begins with n01."""
    head = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", head[0] if head else "")


def _rank(variables: Mapping[str, str], name: str, count: int) -> int:
    rank = _number(variables, name)
    if rank >= count:
        raise UsageError(f"{name}={rank} is not one of {count} ranks", hint=PLAIN)
    return rank


def _local(variables: Mapping[str, str], name: str) -> int:
    return _number(variables, name) if variables.get(name) else 0


def _number(variables: Mapping[str, str], name: str) -> int:
    text = variables[name]
    if not re.fullmatch(r"\d{1,7}", text):
        raise UsageError(f"{name}={text!r} is not a number", hint=PLAIN)
    return int(text)
