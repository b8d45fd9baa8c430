"""Kill real runs of the command or make their system calls fail, several a second.

A server imports torch and the command once, and forks a child for each run. The child is a process
of its own, runs `merge_avg.cli.main`, and is killed for real. `strace` makes the n-th system call
of a kind fail in it, or kills it there. `judge` and `Place.complete` compare what is left with what
is promised.

    python scripts/crash.py kill --count 300      SIGKILL, SIGTERM, SIGINT, SIGHUP at random moments
    python scripts/crash.py calls --signal TERM   a signal at each system call (needs strace)
    python scripts/crash.py inject                a failure of each system call (needs strace)
"""

from __future__ import annotations

import argparse
import atexit
import collections
import contextlib
import json
import os
import random
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

TEMPORARY = ".merge-avg-tmp"
BROKEN = "broken promise"
Tree = Mapping[str, bytes]

# System calls of a merge, and how each of them can fail.
CALLS = {
    "openat": "EACCES EMFILE ENOSPC EIO",
    "newfstatat": "EACCES EIO",
    "fstat": "EIO",
    "read": "EIO EINTR",
    "pread64": "EIO EINTR",
    "preadv": "EIO EINTR",
    "preadv2": "EIO EINTR",
    "write": "ENOSPC EIO EPIPE EINTR",
    "pwrite64": "ENOSPC EDQUOT EIO EINTR",
    "fallocate": "ENOSPC EDQUOT EOPNOTSUPP EINTR",
    "ftruncate": "EFBIG EIO EINTR",
    "fsync": "EIO ENOSPC EDQUOT EINTR",
    "link": "EPERM EIO EDQUOT",
    "rename": "EACCES EIO ENOSPC",
    "renameat2": "EINVAL EIO",
    "unlink": "EACCES EIO",
    "unlinkat": "EACCES EIO",
    "rmdir": "EACCES EIO",
    "mkdir": "EACCES EDQUOT",
    "flock": "ENOLCK EOPNOTSUPP",
    "getdents64": "EIO",
    "close": "EIO EINTR",
}


# Makers of checkpoints, one for each kind of output.


def _state(fold: int, size: int) -> dict[str, Any]:
    import torch

    generator = torch.Generator().manual_seed(fold)
    return {
        "w": torch.randn(size, generator=generator),
        "v": torch.randn(size // 2, 2, generator=generator),
        "n": torch.tensor(3),
    }


def _zip(path: Path, fold: int, size: int) -> Path:
    import torch

    torch.save({"state_dict": _state(fold, size), "epoch": fold}, path.with_suffix(".pt"))
    return path.with_suffix(".pt")


def _legacy(path: Path, fold: int, size: int) -> Path:
    import torch

    path = path.with_suffix(".pt")
    torch.save(_state(fold, size), path, _use_new_zipfile_serialization=False)
    return path


def _safetensors(path: Path, fold: int, size: int) -> Path:
    from safetensors.torch import save_file

    save_file(_state(fold, size), path.with_suffix(".safetensors"), {"format": "pt"})
    return path.with_suffix(".safetensors")


def _shards(path: Path, fold: int, size: int) -> Path:
    from safetensors.torch import save_file

    path.mkdir()
    table = {}
    for number, (key, tensor) in enumerate(_state(fold, size).items(), 1):
        name = f"model-{number:05}-of-00003.safetensors"
        save_file({key: tensor}, path / name, {"format": "pt"})
        table[key] = name
    index = {"metadata": {"total_size": 0}, "weight_map": table}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "config.json").write_text("{}")
    return path


def _dcp(path: Path, fold: int, size: int) -> Path:
    from torch.distributed.checkpoint import state_dict_saver

    import tests.older  # noqa: F401 - of older releases

    state_dict_saver.save({"model": _state(fold, size)}, checkpoint_id=path, no_dist=True)
    return path


def _tied(path: Path, fold: int, size: int) -> Path:
    """Write tensors that are tied in the first checkpoint only, which takes a scratch file."""
    import torch

    tensor = torch.full((size,), float(fold))
    other = tensor if not fold else tensor.clone()
    torch.save({"a": tensor, "b": other, "t": _state(fold, size)["v"]}, path.with_suffix(".pt"))
    return path.with_suffix(".pt")


@dataclass(frozen=True)
class Kind:
    """A kind of input and output.

    Attributes:
        make: writes a checkpoint; its arguments are a path, the number of the fold, and a size.
        output: the name of the output.
        options: further options of the command.
        verify: whether the run verifies an output that is there, instead of writing it.
    """

    make: Callable[[Path, int, int], Path]
    output: str
    options: tuple[str, ...] = ()
    verify: bool = False


KINDS = {
    "zip": Kind(_zip, "out.pt"),
    "legacy": Kind(_legacy, "out.pt"),
    "safetensors": Kind(_safetensors, "out.safetensors"),
    "shards": Kind(_shards, "out"),
    "dcp": Kind(_dcp, "out"),
    "dcp-cut": Kind(_dcp, "out", ("--max-shard-size", "64KiB", "--weights-only")),
    "cut": Kind(_zip, "out", ("--max-shard-size", "1KiB")),
    "scratch": Kind(_tied, "out.safetensors"),
    "verify-zip": Kind(_zip, "out.pt", verify=True),
    "verify-shards": Kind(_shards, "out", verify=True),
}


# A directory for runs: what is in it, and what may be in it after a run.


def tree(path: Path) -> Tree:
    """Return the bytes of a file, or of all files in a directory."""
    if path.is_file():
        return {".": path.read_bytes()}
    files = (one for one in path.rglob("*") if one.is_file())
    return {str(one.relative_to(path)): one.read_bytes() for one in files}


class Place:
    """A directory with three checkpoints of a kind, and the command's arguments.

    Args:
        folder: an empty directory.
        kind: a key of KINDS.
        size: the number of elements of the largest tensor.
        overwrite: whether there is an output already, which the run replaces.
    """

    def __init__(self, folder: Path, kind: str, size: int, *, overwrite: bool) -> None:
        self.folder = folder
        made = KINDS[kind]
        inputs = [made.make(folder / f"in{fold}", fold, size) for fold in range(3)]
        self.output = folder / made.output
        names = [path.name for path in inputs]
        self.merge = [*names, "-o", made.output, "--threads", "2", *made.options, "--overwrite"]
        self.verifies = made.verify
        self.again = self.merge
        self.arguments = self.merge if overwrite else self.merge[:-1]
        if self.verifies:
            self.again = self.arguments = ["verify", made.output, "--threads", "2"]
        self._inputs = {path: tree(path) for path in inputs}
        self.before: Tree | None = None
        self.whole: Tree = {}
        self._overwrite = overwrite

    def learn(self, run: Callable[[Sequence[str]], None]) -> None:
        """Learn the complete output from a run that nothing disturbs, then write the old one."""
        run(self.merge)
        self.whole = tree(self.output)
        if self.verifies:
            self.before = self.whole
        elif self._overwrite:
            self.before = {
                name: data[: len(data) // 2] + b"old" for name, data in self.whole.items()
            }
        self.reset()

    def reset(self) -> None:
        """Put the old output back, or remove the output."""
        if self.output.is_dir():
            shutil.rmtree(self.output)
        self.output.unlink(missing_ok=True)
        for name, data in (self.before or {}).items():
            path = self.output if name == "." else self.output / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)

    def clean(self) -> None:
        """Remove whatever a run left that it should not have."""
        for path in self.folder.iterdir():
            if path not in self._inputs:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.reset()

    def left(self) -> list[str]:
        """Return the names of temporaries that are there."""
        return [path.name for path in self.folder.iterdir() if path.name.endswith(TEMPORARY)]

    def complete(self) -> bool:
        """Return whether the output is complete.

        Assert that it is what was there before otherwise, that inputs are untouched, and that
        nothing else is there but temporaries.
        """
        known = {*self._inputs, self.output}
        strays = {one for one in self.folder.iterdir() if one not in known} - {
            self.folder / name for name in self.left()
        }
        assert not strays, strays
        assert all(tree(path) == data for path, data in self._inputs.items()), "inputs changed"
        found = tree(self.output) if self.output.exists() else None
        if found == self.whole:
            return True
        assert found == self.before, "the output is neither old nor complete"
        return False


def judge(place: Place, code: int, stderr: str) -> bool:
    """Assert what holds after a run that was not killed outright; return whether it was complete.

    The run ends with one message and exit code 1, with 0 and the whole output, with both a message
    and the whole output and 3, or after a signal with the signal's code.
    """
    for word in ("Traceback", "Exception ignored", "Error:"):
        assert word not in stderr, stderr
    complete = place.complete()
    errors = stderr.count("error: ")
    if code == 0:
        assert complete, stderr
        assert not errors, stderr
    elif code in (1, 3):
        assert errors == 1, stderr
        assert place.verifies or complete == (code == 3), stderr
    else:
        assert code in (129, 130, 143), (code, stderr)
        assert not errors, stderr
    return complete


# Processes: a server, and the runs that it forks.


def _serve() -> None:
    """Fork a run for each line of stdin.

    A run waits until the server closes its gate, a pipe: so whoever asked can begin to trace it.
    """
    import torch

    import merge_avg.cli

    torch.set_num_threads(1)
    # A run before the first fork leaves the children nothing to import.
    with tempfile.TemporaryDirectory() as folder:
        torch.save({"w": torch.ones(2)}, f"{folder}/a.pt")
        sys.argv = ["merge-avg", f"{folder}/a.pt", "-o", f"{folder}/b.pt", "--allow-trivial"]
        with contextlib.suppress(SystemExit), contextlib.redirect_stdout(sys.stderr):
            merge_avg.cli.main()
    for line in sys.stdin:
        asked = json.loads(line)
        ready, gate = os.pipe(), os.pipe()
        pids = []
        for number in range(asked["together"]):
            pids.append(os.fork())
            if not pids[-1]:
                _begin(asked, str(number or ""), ready[1], gate)
                _end()
        for _ in pids:
            os.read(ready[0], 1)
        print(*pids, flush=True)
        sys.stdin.readline()
        for fd in (*ready, *gate):
            os.close(fd)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        print(*codes, flush=True)


def _begin(asked: Mapping[str, Any], number: str, ready: int, gate: tuple[int, int]) -> None:
    """Set up a forked process as asked, and wait until the gate is closed."""
    os.chdir(asked["folder"])
    for fd, name in enumerate((os.devnull, asked["stdout"] + number, asked["stderr"] + number)):
        opened = os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(opened, fd)
        os.close(opened)
    for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(one, signal.default_int_handler if one == signal.SIGINT else signal.SIG_DFL)
    sys.argv = ["merge-avg", *asked["arguments"]]
    os.close(gate[1])
    os.write(ready, b".")
    waiting = select.poll()
    waiting.register(gate[0], 0)
    waiting.poll()
    for name, value in asked["environment"].items():
        os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)
    if asked["largest"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (asked["largest"],) * 2)
    if asked["processes"] is not None:
        resource.setrlimit(resource.RLIMIT_NPROC, (asked["processes"],) * 2)
    if asked["uid"]:
        os.setuid(asked["uid"])
    if asked["audit"]:
        log = os.open(asked["audit"], os.O_WRONLY | os.O_CREAT)

        def hook(event: str, args: tuple[Any, ...]) -> None:
            if event == "open" or event.startswith(("os.", "shutil.")):
                os.write(log, json.dumps([event, args], default=str).encode() + b"\n")

        sys.addaudithook(hook)
    for fd, name in enumerate(("stdin", "stdout", "stderr")):  # as Python itself does at start-up
        if fd in asked["closed"]:
            os.close(fd)
            setattr(sys, name, None)
        else:
            setattr(sys, name, open(fd, "w" if fd else "r", closefd=False))  # noqa: SIM115


def _end() -> NoReturn:
    """Run the command and Python's exit functions, but do not free torch, which takes a second."""
    import merge_avg.cli

    code: Any = 0
    try:
        merge_avg.cli.main(last=True)
    except SystemExit as end:
        code = end.code
    except BaseException:  # noqa: BLE001 - Python prints it in the same way
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    os._exit(int(code or 0))


class Server:
    """A process that has torch imported, and runs the command in children."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.promises.crashing", "serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.stdout = self.stderr = ""
        self.codes: list[int] = []
        for name in ("stdout", "stderr"):
            (folder / name).touch()

    def run(
        self,
        place: Place,
        arguments: Sequence[str],
        disturb: Callable[[int], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
        **setting: Any,
    ) -> int:
        """Run the command in a place, and return its exit code, which is negative for a signal.

        `codes` has the exit codes of all runs, where several run at once.

        Args:
            place: the directory for it.
            arguments: the command's.
            disturb: makes a context from the pid, entered before the run and left after it.
            setting: `stdout` and `stderr`, files for them; `closed`, descriptors to close;
                `environment`, variables to set or (None) to remove; `largest`, the limit on the
                size of a file; `uid`, the user; `together`, the number of runs at once; `audit`, a
                log for Python's audit events about files; `processes`, the limit on the user's
                processes and threads.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        names = {name: str(self.folder / name) for name in ("stdout", "stderr")}
        asked: dict[str, Any] = {"folder": str(place.folder), "arguments": list(arguments), **names}
        asked |= {"environment": {}, "largest": 0, "uid": 0, "closed": [], "together": 1}
        asked |= {"audit": None, "processes": None} | setting
        print(json.dumps(asked), file=self._process.stdin, flush=True)
        pid, *_ = map(int, self._process.stdout.readline().split())
        with disturb(pid):
            print(file=self._process.stdin, flush=True)
            self.codes = [int(code) for code in self._process.stdout.readline().split()]
        self.stdout, self.stderr = (
            (self.folder / name).read_text(errors="replace") for name in ("stdout", "stderr")
        )
        return self.codes[0]

    def plain(self, place: Place) -> Callable[[Sequence[str]], None]:
        """Return a function that runs the command undisturbed; the run has to succeed."""

        def run(arguments: Sequence[str]) -> None:
            code = self.run(place, arguments)
            assert code == 0, self.stderr

        return run

    def close(self) -> None:
        """End the server."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


@contextlib.contextmanager
def traced(pid: int, inject: str, log: Path) -> Iterator[None]:
    """Let strace inject something into a process and its threads, and log what it did."""
    calls = inject.partition(":")[0]
    command = ["strace", "-f", "-o", str(log), "-e", f"trace={calls}", "-e", f"inject={inject}"]
    with subprocess.Popen([*command, "-p", str(pid)], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        while "attached" not in (line := process.stderr.readline()):
            assert line, "strace could not attach"
        yield


def _send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has ended
        os.kill(pid, number)


@contextlib.contextmanager
def signalled(pid: int, number: int, after: float) -> Iterator[None]:
    """Send a signal to a process some seconds after entering the context."""
    timer = threading.Timer(after, _send, (pid, number))
    timer.start()
    yield
    timer.cancel()
    timer.join()


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    """Start a server in a directory of its own."""
    with tempfile.TemporaryDirectory(prefix="merge-avg-crash") as name:
        server = Server(Path(name))
        try:
            yield server
        finally:
            server.close()


def places(
    server: Server, kinds: Sequence[str], size: int, overwrite: Sequence[bool] = (False, True)
) -> Iterator[tuple[str, Place]]:
    """Yield a label and a place for each kind of output, with and without an old one."""
    for kind in kinds:
        for old in overwrite if not KINDS[kind].verify else overwrite[-1:]:
            folder = Path(tempfile.mkdtemp(prefix=kind, dir=server.folder))
            place = Place(folder, kind, size, overwrite=old)
            place.learn(server.plain(place))
            yield f"{kind}{' --overwrite' if old else ''}", place


def recovered(server: Server, place: Place) -> None:
    """Assert that the next run completes and removes what a dead one left."""
    server.plain(place)(place.again)
    assert place.complete()
    assert not place.left(), place.left()
    place.reset()


def kill(
    server: Server,
    kinds: Sequence[str],
    count: int,
    seed: int,
    size: int,
    overwrite: Sequence[bool],
) -> collections.Counter[str]:
    """Kill runs at random moments, and count how they ended."""
    chance = random.Random(seed)  # noqa: S311
    tally: collections.Counter[str] = collections.Counter()
    made = []
    for _, place in places(server, kinds, size, overwrite):
        started = time.perf_counter()
        server.plain(place)(place.arguments)
        made.append((place, 0.9 * (time.perf_counter() - started)))
        place.reset()
    for number in range(count):
        place, took = made[number % len(made)]
        sent = chance.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
        after = chance.uniform(0, took)
        code = server.run(place, place.arguments, lambda pid: signalled(pid, sent, after))  # noqa: B023
        # Below zero by SIGKILL, or by a signal that came before the command, or after it.
        complete = place.complete() if code < 0 else judge(place, code, server.stderr)
        assert code == -signal.SIGKILL or not place.left(), (code, place.left())
        ended = "in time" if not code else "complete" if complete else "left as it was"
        tally[f"{sent.name}: {ended}"] += 1
        tally["temporaries left by SIGKILL, removed by the next run"] += len(place.left())
        recovered(server, place)
    return tally


def each_call(
    server: Server,
    kinds: Sequence[str],
    errors: Mapping[str, str],
    limit: int,
    overwrite: Sequence[bool],
) -> collections.Counter[str]:
    """Make the n-th system call of each kind fail or kill, for each n that there is."""
    tally: collections.Counter[str] = collections.Counter()
    for label, place in places(server, kinds, 300, overwrite):
        for call, failures in errors.items():
            for failure in failures.split():
                for number in range(1, limit + 1):
                    inject = f"{call}:{failure}:when={number}"
                    try:
                        ended = _injected(server, place, inject)
                        if not ended:
                            break
                        tally[ended] += 1
                        if place.left():
                            tally[f"temporaries left at {call}, removed by the next run"] += 1
                        recovered(server, place)
                    except AssertionError as error:
                        tally[f"{BROKEN}: {label}, {inject}: {error}"] += 1
                        place.clean()
    return tally


def _injected(server: Server, place: Place, inject: str) -> str:
    """Run with an injection of strace; return how that ended, or "" if there was no such call."""
    log = server.folder / "log"
    code = server.run(place, place.arguments, lambda pid: traced(pid, inject, log))
    text = log.read_text(errors="replace")
    if code >= 0 and "INJECTED" not in text and "--- SIG" not in text:
        place.reset()
        return ""
    if code < 0:
        return "killed, complete" if place.complete() else "killed, left as it was"
    complete = judge(place, code, server.stderr)
    assert "signal=" not in inject or not place.left(), place.left()
    return f"exit code {code}, {'complete' if complete else 'left as it was'}"


def main() -> int:
    """Run what is asked for, and print how many runs ended in which way."""
    parser = argparse.ArgumentParser(prog="scripts/crash.py", description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["kill", "calls", "inject", "serve"])
    parser.add_argument("--count", type=int, default=300, help="kill: number of runs")
    parser.add_argument("--seed", type=int, default=0, help="kill: seed of the random moments")
    parser.add_argument("--kinds", default=",".join(KINDS), help="kinds of outputs")
    parser.add_argument("--calls", default=",".join(CALLS), help="system calls to inject at")
    parser.add_argument("--signal", default="KILL", help="calls: signal to send")
    parser.add_argument("--limit", type=int, default=10_000, help="most calls of a kind")
    parser.add_argument("--size", type=int, default=3_000_000, help="kill: number of elements")
    parser.add_argument("--overwrite", choices=["yes", "no", "both"], default="both")
    options = parser.parse_args()
    if options.what == "serve":
        _serve()
        return 0
    kinds = options.kinds.split(",")
    overwrite = {"yes": (True,), "no": (False,), "both": (False, True)}[options.overwrite]
    chosen = {call: CALLS[call] for call in options.calls.split(",")}
    if options.what == "calls":
        failures = dict.fromkeys([*chosen, "futex"], f"signal={options.signal}")
    else:
        failures = {
            call: " ".join(f"error={one}" for one in text.split()) for call, text in chosen.items()
        }
    with serving() as server:
        if options.what == "kill":
            tally = kill(server, kinds, options.count, options.seed, options.size, overwrite)
        else:
            tally = each_call(server, kinds, failures, options.limit, overwrite)
    for ended, count in sorted(tally.items()):
        print(f"{count:6} {ended}")
    return int(any(ended.startswith(BROKEN) for ended in tally))


if __name__ == "__main__":
    sys.exit(main())
