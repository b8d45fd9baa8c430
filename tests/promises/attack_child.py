"""Read checkpoints, each in a forked process with little memory and time, and say how that went.

    python -m tests.promises.attack_child read|verify FILE...

The files are read first, without limits, so that everything is imported. Then paths come on stdin,
one a line, and a JSON object for each goes to stdout. `verify` verifies each, and an output
`out.safetensors` beside it that names it as an input.
"""

from __future__ import annotations

import codecs
import ctypes
import importlib
import json
import os
import resource
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from merge_avg import MergeError
from merge_avg.arithmetic import LOOPS
from merge_avg.cli import main
from merge_avg.io import _platform
from merge_avg.report.inspect import contents, lines

MEMORY = 256 << 20  # of address space, code and libraries included
SECONDS = 20  # of processor time


def read(path: str) -> dict[str, object]:
    """Read a checkpoint in this process, and return how that went."""
    found: dict[str, object] = {"outcome": "right"}
    watch = Watch(path)
    try:
        with watch:
            found["text"] = sum(map(len, lines(contents(path))))
    except MergeError as error:
        found = {"outcome": "refused", "message": f"{error} {error.hint}"}
    except Exception:  # noqa: BLE001 - the caller asserts that there was none
        found["outcome"] = traceback.format_exc(limit=-6)
    found |= command(path) | {"events": watch.seen}
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return found | {"seconds": usage.ru_utime + usage.ru_stime, "peak": usage.ru_maxrss << 10}


class Watch:
    """Python's audit events about code, processes, the network and other files.

    Args:
        path: files whose names begin with it are not other files.
    """

    _REACHING = (
        "import exec compile code. marshal. pickle. ctypes.dlopen ctypes.dlsym ctypes.call "
        "ctypes.string_at subprocess. socket. urllib. shutil. "
        "os.exec os.fork os.kill os.link os.mkdir os.posix_spawn os.remove os.rename os.rmdir "
        "os.spawn os.startfile os.symlink os.system os.truncate"
    ).split()

    def __init__(self, path: str) -> None:
        self.seen: list[str] = []
        self._path, self._armed = path, False
        # Since Python 3.14 every call of a function in C is an event: ours are known.
        calls = [] if LOOPS is None else [LOOPS.default_rounding, *LOOPS._calls.values()]
        calls += [] if LOOPS is None else [LOOPS._products]
        calls.append(_platform._LIBC.memcmp)
        self._ours = {ctypes.cast(call, ctypes.c_void_p).value for call in calls}
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[object, ...]) -> None:
        if event == "ctypes.call_function" and arguments[0] in self._ours:
            return
        outside = event == "open" and not str(arguments[0]).startswith(self._path)
        if self._armed and (outside or event.startswith(tuple(self._REACHING))):
            self.seen.append(f"{event} {arguments!r}")

    def __enter__(self) -> None:
        self._armed = True

    def __exit__(self, *_: object) -> None:
        self._armed = False


def verified(path: str) -> dict[str, object]:
    """Verify a checkpoint in this process, and return how that went."""
    from merge_avg import verify_output

    folder = str(Path(path).parent)
    outputs = path, f"{folder}/out.safetensors"
    tempfile.tempdir = folder  # for the nameless file that a merge may need
    watch = Watch(folder)
    outcomes = []
    for output in outputs:
        try:
            with watch:
                verify_output(output, threads=1)
            outcomes.append("right")
        except MergeError as error:
            outcomes.append(f"refused: {error}")
        except Exception:  # noqa: BLE001 - the caller asserts that there was none
            outcomes.append(traceback.format_exc(limit=-6))
    runs = [command(path, "verify", output, "--threads", "1") for output in outputs]
    return {"outcomes": outcomes, "runs": runs, "events": watch.seen}


def command(path: str, *arguments: str) -> dict[str, object]:
    """Run the command in this process, by default for a dry run."""
    printed = Path(f"{path}.printed")
    keep = os.dup(2)
    fd = os.open(printed, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(fd, 2)
    plan = path, "-o", f"{path}.out.pt", "--dry-run", "--allow-trivial"
    sys.argv = ["merge-avg", *(arguments or plan)]
    code: object = 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code
    except Exception:  # noqa: BLE001 - the caller asserts that there was none
        code = traceback.format_exc(limit=-6)
    sys.stderr.flush()
    os.dup2(keep, 2)
    return {"code": code, "stderr": printed.read_text("utf-8", "replace")[:10_000]}


def apart(do: Callable[[str], dict[str, object]], path: str, nbytes: int) -> dict[str, object]:
    """Read or verify a checkpoint in a process of its own with so many bytes of memory."""
    out, into = os.pipe()
    child = os.fork()
    if not child:
        os.close(out)
        signal.signal(signal.SIGXCPU, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_AS, (nbytes, nbytes))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        try:
            raw = json.dumps(do(path)).encode()
        except BaseException:  # noqa: BLE001 - the caller asserts that there was none
            raw = json.dumps({"outcome": traceback.format_exc(limit=-6)}).encode()
        with os.fdopen(into, "wb") as pipe:
            pipe.write(raw)
        os._exit(0)
    os.close(into)
    with os.fdopen(out, "rb") as pipe:
        raw = pipe.read()
    status = os.waitpid(child, 0)[1]
    return json.loads(raw) if raw else {"outcome": f"the process died: {status}"}


def serve(what: str, first: Sequence[str]) -> None:
    """Answer the paths on stdin; see the module."""
    do = {"read": read, "verify": verified}[what]
    limit = MEMORY
    if what == "verify":
        import torch  # noqa: F401 - it alone takes more address space than the limit

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit += pages * resource.getpagesize()
    else:  # the safetensors library may need NumPy, whose size should not count
        size = Path("/proc/self/statm").read_text
        pages = int(size().split()[0])
        importlib.import_module("safetensors.numpy")
        limit += (int(size().split()[0]) - pages) * resource.getpagesize()
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        limit += 4 << 30  # address space that the allocator of free-threaded Python sets aside
    for codec in ("cp437", "latin1", "raw_unicode_escape"):  # each is a module, imported when used
        codecs.lookup(codec)
    with tempfile.TemporaryDirectory() as folder:
        command(f"{folder}/none.pt")  # for the imports of an error
    importlib.import_module("merge_avg.scaled")  # which tensors of bytes may belong to
    for path in first:
        do(path)
    for line in sys.stdin:
        print(json.dumps(apart(do, line.rstrip("\n"), limit)), flush=True)  # noqa: T201


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2:])
