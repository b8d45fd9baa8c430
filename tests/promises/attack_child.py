"""Reads checkpoints, each in a process of its own with little memory and time, and tells of it.

Paths come on stdin, one a line, and a JSON object for each goes to stdout. With the argument
`verify` it verifies each, and an output `out.safetensors` beside it that says that it is an input.
"""

from __future__ import annotations

import codecs
import json
import os
import resource
import signal
import sys
import tempfile
import traceback
from pathlib import Path

import merge_avg.formats.distributed
import merge_avg.formats.legacy
import merge_avg.formats.refused
import merge_avg.formats.safetensors
import merge_avg.plan._job
import merge_avg.report.report

# Imported before memory is limited, as what the command imports later.
import merge_avg.selection._choose
from merge_avg.cli import main
from merge_avg.errors import MergeError
from merge_avg.report.inspect import contents, lines

MEMORY = 256 << 20  # of address space, code and libraries included
VERIFY, FIRST = sys.argv[1:2] == ["verify"], sys.argv[2:]
LIMIT = MEMORY
SECONDS = 20  # of processor time


def read(path: str) -> dict[str, object]:
    """What reading does, in this process."""
    found: dict[str, object] = {"outcome": "right"}
    watch = Watch(path)
    try:
        with watch:
            found["text"] = sum(map(len, lines(contents(path))))
    except MergeError as error:
        found = {"outcome": "refused", "message": f"{error} {error.hint}"}
    except Exception:  # noqa: BLE001 - which would be the finding
        found["outcome"] = traceback.format_exc(limit=-6)
    found |= command(path) | {"events": watch.seen}
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return found | {"seconds": usage.ru_utime + usage.ru_stime, "peak": usage.ru_maxrss << 10}


class Watch:
    """What Python's audit hooks tell of code, processes, the network and other files."""

    _REACHING = (
        "import exec compile code. marshal. pickle. ctypes.dlopen ctypes.dlsym ctypes.call "
        "ctypes.string_at subprocess. socket. urllib. shutil. "
        "os.exec os.fork os.kill os.link os.mkdir os.posix_spawn os.remove os.rename os.rmdir "
        "os.spawn os.startfile os.symlink os.system os.truncate"
    ).split()

    def __init__(self, path: str) -> None:
        """Files whose names do not begin with `path` are others."""
        self.seen: list[str] = []
        self._path, self._armed = path, False
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[object, ...]) -> None:
        outside = event == "open" and not str(arguments[0]).startswith(self._path)
        if self._armed and (outside or event.startswith(tuple(self._REACHING))):
            self.seen.append(f"{event} {arguments!r}")

    def __enter__(self) -> None:
        self._armed = True

    def __exit__(self, *_: object) -> None:
        self._armed = False


def verified(path: str) -> dict[str, object]:
    """What verifying does, in this process."""
    folder = str(Path(path).parent)
    outputs = path, f"{folder}/out.safetensors"
    tempfile.tempdir = folder  # for the nameless file that a merge may need
    watch = Watch(folder)
    outcomes = []
    for output in outputs:
        try:
            with watch:
                merge_avg.verify.verify_output(output, threads=1)
            outcomes.append("right")
        except MergeError as error:
            outcomes.append(f"refused: {error}")
        except Exception:  # noqa: BLE001 - which would be the finding
            outcomes.append(traceback.format_exc(limit=-6))
    runs = [command(path, "--verify", output, "--threads", "1") for output in outputs]
    return {"outcomes": outcomes, "runs": runs, "events": watch.seen}


def command(path: str, *arguments: str) -> dict[str, object]:
    """What the command does; by default a dry run."""
    printed = Path(f"{path}.printed")
    keep = os.dup(2)
    fd = os.open(printed, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(fd, 2)
    sys.argv = ["merge-avg", *(arguments or (path, "-o", f"{path}.out.pt", "--dry-run"))]
    code: object = 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code
    except Exception:  # noqa: BLE001 - as above
        code = traceback.format_exc(limit=-6)
    sys.stderr.flush()
    os.dup2(keep, 2)
    return {"code": code, "stderr": printed.read_text("utf-8", "replace")[:10_000]}


def apart(path: str) -> dict[str, object]:
    """What reading does, in a process of its own."""
    out, into = os.pipe()
    child = os.fork()
    if not child:
        os.close(out)
        signal.signal(signal.SIGXCPU, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        try:
            raw = json.dumps((verified if VERIFY else read)(path)).encode()
        except BaseException:  # noqa: BLE001 - as above
            raw = json.dumps({"outcome": traceback.format_exc(limit=-6)}).encode()
        with os.fdopen(into, "wb") as pipe:
            pipe.write(raw)
        os._exit(0)
    os.close(into)
    with os.fdopen(out, "rb") as pipe:
        raw = pipe.read()
    status = os.waitpid(child, 0)[1]
    return json.loads(raw) if raw else {"outcome": f"the process died: {status}"}


if __name__ == "__main__":
    if VERIFY:  # torch alone has more address space than that
        import merge_avg.agreement._torch_products
        import merge_avg.arithmetic.torch_mean
        import merge_avg.engine._restride
        import merge_avg.verify

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        LIMIT = MEMORY + pages * resource.getpagesize()
    for codec in ("cp437", "latin1", "raw_unicode_escape"):  # which are modules, imported once
        codecs.lookup(codec)
    with tempfile.TemporaryDirectory() as folder:  # what the command imports, imported once
        command(f"{folder}/none.pt")
        for path in FIRST:  # what verifying imports
            verified(path)
    for line in sys.stdin:
        print(json.dumps(apart(line.rstrip("\n"))), flush=True)  # noqa: T201
