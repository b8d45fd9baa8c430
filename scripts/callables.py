"""Call what pickles may name, with arguments that would show, and say what runs code.

    python scripts/callables.py inert                      what `callables` calls inert, a minute
    python scripts/callables.py all --jobs 8               every public callable, half an hour

Each public callable of the standard library, NumPy and torch that a merge does not refuse is found
as a loader of pickles finds it, and called: with code, with the paths of a script and of a pickle,
with a pickle's bytes, and with a command. A process of its own does that, in an empty folder and
without a network where the system allows that. Audit hooks tell whether the code was compiled or
run, a file was opened, or a process was started.

What is known to be inert and does any of that is a mistake in the table: then the script fails. The
others are carried by a merge and named; what of them runs code is listed, to be refused as well.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import importlib
import io
import itertools
import json
import os
import pickle
import pkgutil
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from merge_avg.formats.pickle import callables

MARK = "evil"
_CODE = f"__import__('os').system('echo {MARK}')"
_RUNNING = (
    "subprocess. os.system os.exec os.posix_spawn os.fork os.spawn pty. socket.connect urllib. "
    "pickle.find_class"
).split()
_SECONDS = 5  # for one call
# They change the machine or the terminal, or never come to an end, when they are imported.
_SKIPPED = ("antigravity", "idlelib", "test", "this", "turtledemo", "lib2to3.pgen2.conv")
_ARGUMENTS = 15


class _Runs:
    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"echo {MARK}",)


def payloads(folder: Path) -> list[tuple[object, ...]]:
    """Return arguments that show whether a callable runs, compiles, opens or unpickles them."""
    script, pickled = folder / f"{MARK}.py", folder / f"{MARK}.pkl"
    raw = pickle.dumps(_Runs())
    script.write_text(_CODE)
    pickled.write_bytes(raw)
    paths = str(script), str(pickled)
    command = ["echo", MARK]
    return [
        (),
        (_CODE,),
        (_CODE, {}),
        (_CODE, {}, {}),
        (_CODE, f"<{MARK}>", "exec"),
        (paths[0],),
        (paths[0], "r"),
        (paths[1],),
        (raw,),
        (io.BytesIO(raw),),
        (raw.decode("latin1"), "latin1"),
        tuple(command),
        (command,),
        ("os", "system"),
        (None, raw),
    ]


def inert() -> Iterator[tuple[str, str]]:
    """Yield the module and name of everything that is known to be inert and is there."""
    for module, names in callables.INERT.items():
        yield from ((module, name) for name in sorted(names))
    for package in callables.INERT_CLASSES:
        for module in _modules(package):
            yield from ((module, n) for n in _names(module) if callables.is_inert(module, n))


def public(package: str) -> Iterator[tuple[str, str]]:
    """Yield the module and name of each public callable below a package, once."""
    for module in _modules(package):
        for name, value in _names(module).items():
            # A callable is taken where it is defined; one of C may not say where that is.
            home = getattr(value, "__module__", None) or module
            if callable(value) and not name.startswith("_") and home == module:
                yield module, name


def _modules(package: str) -> Iterator[str]:
    yield package
    with contextlib.suppress(BaseException):  # as `_names`
        paths = getattr(importlib.import_module(package), "__path__", [])
        for found in pkgutil.iter_modules(paths, f"{package}."):
            last = found.name.rpartition(".")[2]
            if last not in ("__main__", "tests") and not found.name.startswith(_SKIPPED):
                yield from _modules(found.name)


def _names(module: str) -> dict[str, object]:
    try:
        return dict(vars(importlib.import_module(module)))
    except BaseException:  # noqa: BLE001 - modules of other systems may do anything
        return {}


class _Watch:
    """Python's audit events that tell of code that runs."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.armed = False
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[object, ...]) -> None:
        if not self.armed:
            return
        # The name of a codec is looked for among `encodings`, and nowhere else.
        codec = event == "import" and str(arguments[0]).startswith("encodings.")
        marked = event in ("exec", "compile", "open", "import") and MARK in repr(arguments)
        if (marked and not codec) or event.startswith(tuple(_RUNNING)):
            self.seen.append(event)


def _child(names: list[tuple[str, str]], *, together: bool) -> None:
    """Call each name in a fork of this process, and print what it did as a line of JSON."""
    warnings.simplefilter("ignore")
    for module in {module for module, _ in names}:
        _names(module)  # imported here, and not in each fork
    watch = _Watch()
    for module, name in names:
        done = 0
        seen: set[str] = set()
        if together:
            seen = {event for _, events in _called(watch, module, name) for event in events}
            done = _ARGUMENTS
        # A call that ends its process, or takes too long, is passed over.
        while done < _ARGUMENTS:
            words = _forked(watch, module, name, done).split()
            seen |= {word for word in words if not word.isdigit()}
            done += 1 + sum(map(str.isdigit, words))
        if seen:
            print(json.dumps({"module": module, "name": name, "seen": sorted(seen)}))
    print(json.dumps({"called": len(names)}))


def _forked(watch: _Watch, module: str, name: str, first: int) -> str:
    """Return the numbers of the calls that came to an end, and the events that they caused."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        for index, events in _called(watch, module, name, first):
            os.write(write, f"{index} {' '.join(events)} ".encode()[:4000])
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    os.waitpid(pid, 0)
    return text


def _called(
    watch: _Watch, module: str, name: str, first: int = 0
) -> Iterator[tuple[int, list[str]]]:
    """Call a name with one payload after the other, and yield the number of each and its events."""
    pid, null = os.getpid(), os.open(os.devnull, os.O_RDWR)
    streams = [os.dup(number) for number in range(3)]
    for index, arguments in list(enumerate(payloads(Path.cwd())))[first:]:
        for number in range(3):
            os.dup2(null, number)
        signal.alarm(_SECONDS)
        with contextlib.suppress(BaseException):
            # As a loader of pickles finds it.
            function = pickle.Unpickler(io.BytesIO()).find_class(module, name)  # noqa: S301
            watch.armed = True
            function(*arguments)
        watch.armed = False
        signal.alarm(0)
        if os.getpid() != pid:  # it forked
            os._exit(0)
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        yield index, watch.seen
        watch.seen = []
    for descriptor in (null, *streams):
        os.close(descriptor)


def _run(names: list[tuple[str, str]], *, together: bool) -> list[dict[str, Any]]:
    """Call names in a process of its own, and return what it found."""
    command = [sys.executable, __file__, "child", *(["--together"] if together else [])]
    alone = [shutil.which("unshare") or "false", "-rn"]
    if not subprocess.run([*alone, "true"], capture_output=True, check=False).returncode:
        command = [*alone, *command]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            command,
            input=json.dumps(names),
            capture_output=True,
            text=True,
            check=False,
            cwd=folder,
            env={**os.environ, "HOME": folder, "TMPDIR": folder},
        )
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if not found or "called" not in found[-1]:
        raise SystemExit(f"a child ended early: {done.stderr[-2000:]}")
    return found


def main() -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("inert", "all", "child"))
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--together", action="store_true", help="in one process: quick")
    parser.add_argument("--package", action="append", help="instead of all three")
    arguments = parser.parse_args()
    if arguments.what == "child":
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 24, 1 << 24))
        _child(
            [(module, name) for module, name in json.load(sys.stdin)], together=arguments.together
        )
        return
    warnings.simplefilter("ignore")
    library = sorted(sys.stdlib_module_names - set(_SKIPPED))
    packages = arguments.package or [*library, "numpy", "torch"]
    with contextlib.redirect_stdout(io.StringIO()):
        names = [] if arguments.package else list(inert())
        if arguments.what == "all":
            names += [one for package in packages for one in public(package)]
    verdicts = {one: callables.verdict(*one) for one in dict.fromkeys(names)}
    counts: dict[str, int] = {
        word: list(verdicts.values()).count(word) for word in sorted(set(verdicts.values()))
    }
    tried = [one for one, verdict in verdicts.items() if verdict != "dangerous"]
    # Neighbours are in one process: what one of them leaves behind shows in few.
    size = len(tried) if arguments.together else 200
    batches = [tried[start : start + size] for start in range(0, len(tried), size)]
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        found = list(
            itertools.chain.from_iterable(
                pool.map(partial(_run, together=arguments.together), batches)
            )
        )
    running = [one for one in found if "seen" in one]
    for one in running:
        one["verdict"] = verdicts[one["module"], one["name"]]
        print(json.dumps(one))
    called = sum(one.get("called", 0) for one in found)
    wrong = [one for one in running if one["verdict"] == "inert"]
    summary = counts | {"called": called, "run code": len(running), "inert and run": len(wrong)}
    print(json.dumps(summary))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
