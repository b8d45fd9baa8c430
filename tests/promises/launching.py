"""Runs of several ranks, several a second.

A server imports torch and the command once, and forks a child for each rank. The child is a process
of its own, runs `merge_avg.cli.main`, and may be killed for real. Only the limits of time and
the stretches are shorter than for users.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple, Self

LEAST = 1 << 19  # bytes of a stretch, so that small checkpoints have several


class Ended(NamedTuple):
    """How a rank ended: its exit code, negative for a signal, and what it printed."""

    code: int
    out: str
    err: str


class Server:
    """A process that forks ranks; a context."""

    def __enter__(self) -> Self:
        command = [sys.executable, "-m", "tests.promises.launching"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def run(self, folder: Path, *arguments: object, ranks: int = 1, **more: Any) -> list[Ended]:
        """Run the command in a folder as so many ranks, and return how each ended.

        `waits` is a rank that stands still when it should work. `kill` is a rank and the seconds
        after which it gets SIGKILL, or the `signal` by which it is `stopped`; they are counted from
        when such a rank stands still. `limits` are of a `Meeting`, `variables` are set in all, and
        `each` has further arguments of some.
        """
        asked = {"folder": str(folder), "arguments": [*map(str, arguments)], "ranks": ranks, **more}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return [Ended(*one) for one in json.loads(self._process.stdout.readline())]


def free_port() -> int:
    """Return a port that nobody uses."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _child(asked: dict[str, Any], rank: int, port: int, printed: Path) -> None:
    """Be a rank, and end the process."""
    for name in ("out", "err"):
        fd = os.open(printed / f"{rank}.{name}", os.O_WRONLY | os.O_CREAT, 0o600)
        os.dup2(fd, 1 if name == "out" else 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(asked["folder"])
    if asked["ranks"] > 1:
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ |= meeting | {"RANK": str(rank), "WORLD_SIZE": str(asked["ranks"])}
    os.environ |= asked.get("variables", {})
    own = asked.get("each", {}).get(str(rank), [])
    sys.argv = ["merge-avg", *asked["arguments"], *own]
    from merge_avg.cli import _ranks, main
    from merge_avg.parts import _stretches

    _stretches._LEAST = LEAST
    if asked.get("waits") == rank:
        _stand_still(printed / "waiting")
    _ranks.LIMITS.update(asked.get("limits", {}))
    code: Any = 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(code or 0))


def _stand_still(mark: Path) -> None:
    """Let this process work on its first stretch forever."""
    from merge_avg.engine import _run as engine

    def stands(*_: object, **__: object) -> None:
        mark.touch()
        while True:
            time.sleep(60)

    engine._work = stands


def _run(asked: dict[str, Any]) -> list[list[Any]]:
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        printed = Path(folder)
        children = {}
        for rank in range(asked["ranks"]):
            pid = os.fork()
            if not pid:
                _child(asked, rank, port, printed)
            children[pid] = rank
        if asked.get("kill"):
            rank, seconds = asked["kill"]
            due = time.monotonic() + 60
            while "waits" in asked and not (printed / "waiting").exists():
                time.sleep(0.01)
                assert time.monotonic() < due
            time.sleep(seconds)
            victim = next(pid for pid, one in children.items() if one == rank)
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, asked.get("signal", signal.SIGKILL))
        codes = {}
        # One that is only stopped ends last, and not by itself.
        for pid, rank in sorted(children.items(), key=lambda one: one[1] == asked.get("stopped")):
            if rank == asked.get("stopped"):
                os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            codes[rank] = os.waitstatus_to_exitcode(status)

        def text(rank: int, name: str) -> str:
            return (printed / f"{rank}.{name}").read_text()

        return [[codes[r], text(r, "out"), text(r, "err")] for r in range(asked["ranks"])]


def main() -> None:
    """Run what is asked for on stdin, a line each."""
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # as the command sets it
    import torch.distributed  # noqa: F401

    import merge_avg.cli._app
    import merge_avg.cli._merge  # noqa: F401

    for line in sys.stdin:
        print(json.dumps(_run(json.loads(line))), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
