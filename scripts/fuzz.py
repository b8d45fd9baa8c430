"""Feed the readers with mutated files, and stop at the first that makes one misbehave.

    python scripts/fuzz.py pickle --runs 1000000 --corpus /tmp/corpus

Targets: pickle, zip, legacy, safetensors, dcp. The seeds are the frozen checkpoints of tests/data
and the small attacks of tests/promises/attacks.py. A find is another exception than MergeError, a
header that the safetensors library reads otherwise, more than 256 MiB of memory, more than 10 s, or
whatever `Fence` forbids: importing, executing, opening. It is kept in tests/data/attacks, where
tests/promises/test_attacks.py tries it later.

Needs atheris: pip install --group fuzz.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import hashlib
import importlib
import io
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parents[1]
DATA = ROOT / "tests" / "data"
FINDS = DATA / "attacks"
LARGEST = 1 << 12  # bytes of an input
_SLOW = 0.01  # seconds; a seed that takes longer would slow down all that come from it
TARGETS = ("pickle", "zip", "legacy", "safetensors", "dcp")
_MEMORY = 256  # MiB
_LENGTH = 3  # bytes before a .metadata that tell its length, in the inputs of the target dcp


def seeds(target: str) -> Iterator[bytes]:
    """Yield real files, and attacks, as inputs of a target."""
    sys.path.insert(0, str(ROOT))
    from tests.promises.attacks import ATTACKS, LARGE, PICKLES  # noqa: PLC0415

    if target == "pickle":
        yield from (data for data, _ in PICKLES.values() if isinstance(data, bytes))
    with tempfile.TemporaryDirectory() as folder:
        kinds = {"pickle": (), "dcp": ("dcp_",)}.get(target, (f"{target}_",))
        for name, make in ATTACKS.items():
            if name.startswith(kinds) and name not in LARGE:
                path = Path(folder) / name
                make(path)
                yield packed(path)
    for path in DATA.rglob("*"):
        if path.is_file() and FINDS not in path.parents:
            raw = path.read_bytes()
            if target == "zip" and raw.startswith(b"PK"):
                yield raw
            elif target == "pickle" and raw.startswith(b"PK"):
                yield from _pickles(path)
            elif target == "safetensors" and path.suffix == ".safetensors":
                yield raw
    yield from (path.read_bytes() for path in FINDS.glob(f"{target}-*"))


def _pickles(path: Path) -> Iterator[bytes]:
    import zipfile  # noqa: PLC0415

    with zipfile.ZipFile(path) as archive:
        yield from (archive.read(name) for name in archive.namelist() if name.endswith(".pkl"))


def packed(path: Path) -> bytes:
    """Return a file, or a directory of one .metadata and one file of chunks, as one input."""
    if not path.is_dir():
        return path.read_bytes()
    metadata = (path / ".metadata").read_bytes()
    return (
        len(metadata).to_bytes(8, "little")[:_LENGTH]
        + metadata
        + (path / "__0_0.distcp").read_bytes()
    )


class _Equal:
    """A value that is equal to any checksum."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, _: object) -> bool:
        return True


def repaired(data: bytes) -> bytes:
    """Return an archive whose end tells where its directory is, and how many records it has."""
    start = max(data.find(b"PK\1\2"), 0)
    stop = data.find(b"PK\5\6", start)
    stop = len(data) if stop < 0 else stop
    count = data.count(b"PK\1\2", start, stop) & 0xFFFF
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, count, count, stop - start, start, 0)
    return data[:stop] + end


class Fence:
    """Make every event that could reach outside fatal while the body of `with` runs."""

    def __init__(self, allowed: set[str]) -> None:
        self._allowed, self._armed = allowed, False
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[object, ...]) -> None:
        inside = event == "open" and str(arguments[0]) in self._allowed
        harmless = event in ("builtins.id", "array.__new__")
        if self._armed and not inside and not harmless:
            os.write(2, f"the fence: {event} {arguments!r}\n".encode())
            os.abort()  # an exception could be caught

    def __enter__(self) -> None:
        self._armed = True

    def __exit__(self, *_: object) -> None:
        self._armed = False


def _target(name: str, folder: Path) -> tuple[Callable[[bytes], object], set[str]]:
    """Return the function that reads an input, and the paths that it may open."""
    from merge_avg.checkpoint import File, Layout, assign, dotted  # noqa: PLC0415
    from merge_avg.errors import MergeError  # noqa: PLC0415
    from merge_avg.formats import distributed, legacy, safetensors  # noqa: PLC0415
    from merge_avg.formats import zip as torch_zip  # noqa: PLC0415
    from merge_avg.formats.pickle.torch_objects import objects_at  # noqa: PLC0415

    def write(path: Path, raw: bytes) -> None:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.write(fd, raw)
        os.close(fd)

    def stamp(data: bytes, path: Path = Path("input")) -> File:
        return File(path, len(data), 0, 0, 0)

    def scanned(module: object) -> Callable[[bytes], object]:
        def read(data: bytes) -> object:
            return assign(module.scan(io.BytesIO(data), stamp(data)))  # type: ignore[attr-defined]

        return read

    # A mutated archive would seldom have the right checksums, or its directory where it says.
    vars(torch_zip)["zlib"] = SimpleNamespace(
        decompressobj=zlib.decompressobj, error=zlib.error, crc32=lambda _: _Equal()
    )

    def read_zip(data: bytes) -> object:
        with contextlib.suppress(MergeError):
            scanned(torch_zip)(data)
        return scanned(torch_zip)(repaired(data))

    metadata, chunks = folder / ".metadata", folder / "__0_0.distcp"

    def read_set(data: bytes) -> object:
        length = int.from_bytes(data[:_LENGTH], "little")
        first, second = data[_LENGTH : _LENGTH + length], data[_LENGTH + length :]
        for path, raw in ((metadata, first), (chunks, second)):
            write(path, raw)
        files = {
            path.name: (number, stamp(raw, path))
            for number, (path, raw) in enumerate(((metadata, first), (chunks, second)))
        }
        return distributed.scan_set(folder, files)

    single, check = folder / "a.safetensors", safetensors.check

    def strict(layout: Layout) -> None:
        try:
            check(layout)
        except MergeError as error:
            raw = single.read_bytes()[8:]
            length = layout.files[0].base - 8
            if safetensors._header(raw[:length], 0).odd:  # noqa: SLF001
                raise  # as meant: readers of JSON disagree, and the library decides
            raise AssertionError(error.what) from None

    # A scan asks the library, since NumPy is loaded: here a difference is a find, not a refusal.
    vars(safetensors)["check"] = strict

    def read_safetensors(data: bytes) -> object:
        write(single, data)
        return assign(safetensors.scan(io.BytesIO(data), stamp(data, single)))

    readers: dict[str, Callable[[bytes], object]] = {
        "pickle": lambda data: [dotted(info.path) for info in objects_at(data).tensors],
        "zip": read_zip,
        "legacy": scanned(legacy),
        "safetensors": read_safetensors,
        "dcp": read_set,
    }
    return readers[name], {str(metadata), str(chunks), str(single)}


def fuzz(name: str, folder: Path, arguments: list[str]) -> None:
    """Run libFuzzer in this process, which it ends; inputs that are files go to `folder`."""
    import atheris  # noqa: PLC0415

    # The safetensors library imports NumPy for its first file, which the fence would forbid.
    for module in ("numpy", "safetensors") if name == "safetensors" else ():
        importlib.import_module(module)

    with atheris.instrument_imports(include=["merge_avg"]):
        from merge_avg.errors import MergeError  # noqa: PLC0415

        read, allowed = _target(name, folder)
    fence = Fence(allowed)
    # What Python and atheris would import when they first need it.
    importlib.import_module("faulthandler")
    for codec in ("utf-8", "latin1", "cp437", "raw_unicode_escape", "unicode_escape"):
        codecs.lookup(codec)
    for path in sorted(Path(arguments[-1]).iterdir()):
        start = time.perf_counter()
        with contextlib.suppress(MergeError):
            read(path.read_bytes())
        if time.perf_counter() - start > _SLOW:
            path.unlink()

    def once(data: bytes) -> None:
        with fence, contextlib.suppress(MergeError):
            read(data)

    atheris.Setup([sys.argv[0], *arguments], once)
    atheris.Fuzz()


def _memory() -> str | None:
    return "/dev/shm" if os.path.isdir("/dev/shm") else None  # noqa: PTH112, S108


def run(name: str, runs: int, seconds: int, corpus: Path) -> int:
    """Fuzz in a process of its own, keep finds, and return the exit code."""
    corpus.mkdir(parents=True, exist_ok=True)
    for data in seeds(name):
        if len(data) <= LARGEST:
            (corpus / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=_memory()) as folder:
        inputs = Path(folder) / "inputs"
        inputs.mkdir()
        arguments = [f"-runs={runs}", f"-max_total_time={seconds}", f"-rss_limit_mb={_MEMORY}"]
        arguments += ["-timeout=10", f"-max_len={LARGEST}", f"-artifact_prefix={folder}/"]
        arguments += ["-print_final_stats=1", "-verbosity=1", "-close_fd_mask=0", str(corpus)]
        done = subprocess.run(
            [sys.executable, __file__, name, "--in-process", str(inputs), *arguments],
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            check=False,
        )
        finds = sorted(path for path in Path(folder).iterdir() if path.is_file())
        for find in finds:
            FINDS.mkdir(exist_ok=True)
            digest = hashlib.sha256(find.read_bytes()).hexdigest()[:8]
            shutil.copy(find, FINDS / f"{name}-{digest}")
            print(f"{name}: found {FINDS / f'{name}-{digest}'}")
    stats = dict(re.findall(r"stat::(\w+):\s+(\d+)", done.stderr))
    count = stats.get("number_of_executed_units", "?")
    rate, peak = stats.get("average_exec_per_sec", "?"), stats.get("peak_rss_mb", "?")
    print(f"{name}: {count} executions, {rate} a second, peak {peak} MB, {len(finds)} finds")
    if done.returncode or finds:
        print(done.stderr[-4000:])
    return done.returncode


def main() -> None:
    """Parse the arguments, and fuzz."""
    if "--in-process" in sys.argv:
        fuzz(sys.argv[1], Path(sys.argv[3]), sys.argv[4:])
        return
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("target", choices=(*TARGETS, "all"))
    parser.add_argument("--runs", type=int, default=10_000, help="executions (of each target)")
    parser.add_argument("--seconds", type=int, default=0, help="at most this long; 0 for no limit")
    parser.add_argument("--corpus", type=Path, help="a folder to go on from, and to add to")
    options = parser.parse_args()
    codes = []
    for name in TARGETS if options.target == "all" else (options.target,):
        with tempfile.TemporaryDirectory() as folder:
            corpus = (options.corpus or Path(folder)) / name
            codes.append(run(name, options.runs, options.seconds, corpus))
    sys.exit(max(codes))


if __name__ == "__main__":
    main()
