"""Nothing is lost and no traceback shown, whatever fails and wherever a run is stopped."""

import contextlib
import errno
import itertools
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from merge_avg import MergeError
from merge_avg.cli import main
from merge_avg.io import _platform as platform
from tests.helpers import merge_checkpoints
from tests.promises import crashing
from tests.promises.crashing import KINDS, Place, judge

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled", "ignore::UserWarning"
)
large = pytest.mark.large


# Make the n-th system call fail within this process. Unlike strace this works on every system, and
# it can make calls move fewer bytes than they were asked to.

ERRORS = {
    "open": [errno.EACCES, errno.ENOSPC, errno.EMFILE],
    "close": [errno.EIO],
    "preadv": [errno.EIO],
    "pwrite": [errno.ENOSPC, errno.EDQUOT, errno.EIO],
    "fsync": [errno.EIO, errno.ENOSPC],
    "replace": [errno.EACCES, errno.EIO],
    "rename": [errno.EACCES, errno.ENOSPC],
    "link": [errno.EPERM, errno.EIO],
    "unlink": [errno.EACCES],
    "rmdir": [errno.EIO],
    "mkdir": [errno.EACCES, errno.EDQUOT],
    "posix_fallocate": [errno.ENOSPC, errno.EOPNOTSUPP, errno.EFBIG],
    "ftruncate": [errno.EIO],
    "stat": [errno.EACCES, errno.EIO],
    "fstat": [errno.EIO],
    "scandir": [errno.EACCES],
}


class Failing:
    """Wrappers of the functions in ERRORS: the n-th call of all of them fails (0: none)."""

    def __init__(self, number=0):
        self._number = number
        self._lock = threading.Lock()
        self.calls = 0
        self.failed = None

    def patch(self, monkeypatch):
        for name in ERRORS:
            monkeypatch.setattr(os, name, self._wrapped(name, getattr(os, name)))

    def _wrapped(self, name, real):
        def call(*args, **kwargs):
            with self._lock:
                self.calls += 1
                fails = self.calls == self._number
            if not fails:
                return real(*args, **kwargs)
            if name == "close":  # Linux closes in any case
                real(*args)
            number = ERRORS[name][self._number % len(ERRORS[name])]
            self.failed = f"{name} {errno.errorcode[number]}"
            raise OSError(number, os.strerror(number), *args[:1])

        return call


class Runner:
    """The command within this process, in a place of its own."""

    def __init__(self, monkeypatch, capsys):
        self.monkeypatch, self._capsys = monkeypatch, capsys

    def run(self, place, arguments, failing=None):
        with self.monkeypatch.context() as patch:
            patch.chdir(place.folder)
            patch.setattr(sys, "argv", ["merge-avg", *arguments])
            if failing is not None:
                failing.patch(patch)
            code = 0
            try:
                main()
            except SystemExit as end:
                code = end.code
        return code, self._capsys.readouterr().err

    def plain(self, place):
        def run(arguments):
            code, err = self.run(place, arguments)
            assert code == 0, err

        return run


@pytest.fixture
def runner(monkeypatch, capsys):
    return Runner(monkeypatch, capsys)


def placed(runner, folder, kind, *, overwrite, size=40):
    place = Place(folder, kind, size, overwrite=overwrite)
    place.learn(runner.plain(place))
    return place


# Calls by which a directory is removed: where one fails, the next run removes the directory.
REMOVING = {"unlink", "rmdir", "open", "close", "scandir", "stat", "fstat"}


@pytest.mark.parametrize(
    ("kind", "overwrite", "step"),
    [
        ("zip", False, 2),
        ("shards", True, 9),
        ("verify-shards", True, 7),
        *(
            pytest.param(kind, overwrite, 1, marks=large)
            for kind, overwrite in itertools.product(KINDS, (False, True))
        ),
    ],
)
def test_every_call_that_fails_is_one_message(runner, tmp_path, kind, overwrite, step):
    """Whichever call fails, the run succeeds or ends in one message; the output is old or new."""
    place = placed(runner, tmp_path, kind, overwrite=overwrite)
    codes = set()
    for number in itertools.count(1, step):
        failing = Failing(number)
        code, err = runner.run(place, place.arguments, failing)
        if failing.failed is None:
            assert failing.calls > 30
            break
        try:
            judge(place, code, err)
            if place.left():
                assert failing.failed.split()[0] in REMOVING
                runner.plain(place)(place.again)
                assert place.complete()
                assert not place.left()
        except AssertionError as error:
            raise AssertionError(f"call {number}, {failing.failed}: {error}") from error
        place.reset()
        codes.add(code)
    assert codes - {3} == {0, 1}


@pytest.mark.parametrize("kind", ["zip", "dcp"])
def test_short_counts_lose_nothing(runner, tmp_path, kind, monkeypatch):
    """Reads and writes that move only a few bytes at a time give the same output."""
    place = placed(runner, tmp_path, kind, overwrite=False)
    preadv, pwrite = os.preadv, os.pwrite
    monkeypatch.setattr(os, "preadv", lambda fd, parts, at: preadv(fd, [parts[0][:7]], at))
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:5], at))
    code, err = runner.run(place, place.arguments)
    assert judge(place, code, err)


def test_directories_that_cannot_be_exchanged(runner, tmp_path, monkeypatch):
    """Where two renames are needed, the first is undone if the second fails."""
    place = placed(runner, tmp_path, "shards", overwrite=True)
    monkeypatch.setattr(platform, "exchange", lambda *_: False)
    renamed, failing = [], []
    real = os.rename

    def rename(*names):
        renamed.append(names)
        if [len(renamed)] == failing:
            raise OSError(errno.EIO, "Input/output error")
        real(*names)

    monkeypatch.setattr(os, "rename", rename)
    # The first finds a directory in its place; the second moves that aside, the third puts the
    # new one there. One more undoes the second.
    for fails, calls, complete in ((2, 2, False), (3, 4, False), (0, 3, True)):
        renamed.clear()
        failing[:] = [fails]
        code, err = runner.run(place, place.arguments)
        assert judge(place, code, err) == complete
        assert len(renamed) == calls
        assert not place.left()


# Runs in processes of their own, which are killed for real.


@pytest.fixture(scope="module")
def server():
    with crashing.serving() as server:
        yield server


@pytest.mark.parametrize(
    ("kinds", "count", "size", "overwrite"),
    [
        ("zip shards", 6, 100_000, (True,)),
        pytest.param(" ".join(KINDS), 140, 3_000_000, (False, True), marks=large),
    ],
)
def test_killed_runs(server, kinds, count, size, overwrite):
    """After a signal at any moment the output is old or complete, and the next run cleans up."""
    tally = crashing.kill(server, kinds.split(), count, count, size, overwrite)
    assert sum(n for ended, n in tally.items() if ended.startswith("SIG")) == count


needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")


@needs_strace
@pytest.mark.parametrize(
    ("kinds", "what", "limit"),
    [
        ("zip", {"link": "signal=KILL error=EIO", "renameat2": "signal=KILL error=EIO"}, 9),
        pytest.param("zip shards", dict.fromkeys(crashing.CALLS, "signal=KILL"), 9, marks=large),
        pytest.param("zip shards", dict.fromkeys(crashing.CALLS, "error=EIO"), 3, marks=large),
    ],
)
def test_system_calls_that_kill_or_fail(server, kinds, what, limit):
    """After a failure or a kill at any system call the output is old or complete."""
    tally = crashing.each_call(server, kinds.split(), what, limit, (True,))
    assert not [ended for ended in tally if ended.startswith(crashing.BROKEN)]
    assert sum(tally.values()) >= 3


@pytest.fixture
def place(server):
    ((_, place),) = crashing.places(server, ["zip"], 300, (True,))
    return place


def test_two_runs_into_one_place(server):
    """Of several runs into one output one writes it; others may replace only what they saw."""
    for label, place in crashing.places(server, ["zip", "shards"], 300_000):
        server.run(place, place.arguments, together=4)
        assert place.complete()
        assert not place.left()
        # One that begins when another has ended may replace its output.
        assert set(server.codes) <= {0, 1}
        assert min(server.codes) == 0
        assert "--overwrite" in label or sorted(server.codes) == [0, 1, 1, 1]


@pytest.mark.parametrize("closed", [[0], [1], [2], [0, 1, 2]])
def test_closed_streams(server, place, closed):
    """A merge without stdin, stdout or stderr succeeds, and none of its files becomes a stream."""
    code = server.run(place, place.arguments, closed=closed)
    assert judge(place, code, server.stderr)
    assert server.stdout == ("" if 1 in closed else "out.pt\n")


def test_streams_that_cannot_be_written(server, place):
    """A full stderr does no harm; a full stdout is an error, after the output is complete."""
    assert server.run(place, place.arguments, stderr="/dev/full") == 0
    assert place.complete()
    assert server.run(place, place.again, stdout="/dev/full") == 3
    assert judge(place, 3, server.stderr)
    assert "all is done, but stdout cannot be written" in server.stderr


def test_readers_that_leave(server, place):
    """A merge goes on without a traceback when its reader leaves, as in `2>&1 | head -1`."""
    reader, writer = os.pipe()
    end = f"/proc/{os.getpid()}/fd/{writer}"

    def leave(_):
        os.close(reader)
        os.close(writer)
        return contextlib.nullcontext()

    code = server.run(place, place.arguments, leave, stdout=end, stderr=end)
    assert code == 0
    assert place.complete()


@pytest.mark.parametrize("term", ["dumb", "xterm"])
@pytest.mark.parametrize("hangs_up", [False, True])
def test_terminals(server, place, hangs_up, term):
    """A merge succeeds on a narrow terminal and on one that hangs up, without HOME or a locale."""
    reader, writer = pty.openpty()

    def disturb(_):
        if hangs_up:
            os.close(writer)
            os.close(reader)
        return contextlib.nullcontext()

    environment = {"HOME": None, "TERM": term, "COLUMNS": "40", "LANG": None, "LC_ALL": "C"}
    code = server.run(
        place, place.arguments, disturb, stderr=os.ttyname(writer), environment=environment
    )
    assert code == 0
    assert place.complete()
    if not hangs_up:
        shown = os.read(reader, 1 << 16).decode()
        os.close(reader)
        os.close(writer)
        assert "averaged 3 checkpoints" in shown
        assert "Traceback" not in shown


def test_files_that_may_not_be_so_large(server, place):
    """A limit on the size of files is one error with a hint, before anything is read."""
    code = server.run(place, place.arguments, largest=500, stderr=os.devnull)
    assert code == 1
    assert not place.complete()
    code = server.run(place, place.arguments, largest=1500)
    assert not judge(place, code, server.stderr)
    assert "File too large" in server.stderr
    assert "--max-shard-size" in server.stderr


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_a_directory_that_may_not_be_written_to(server, place):
    """A directory of another user is one error."""
    for folder in (place.folder, place.folder.parent):
        folder.chmod(0o755)
    code = server.run(place, place.arguments, uid=65534)
    assert not judge(place, code, server.stderr)
    assert "Permission denied" in server.stderr


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_threads_that_cannot_begin(server, place):
    """A user who may start no more threads gets one error."""
    for folder in (place.folder, place.folder.parent):
        folder.chmod(0o777)
    code = server.run(place, place.arguments, uid=65534, processes=1)
    assert not judge(place, code, server.stderr)
    assert "not enough memory" in server.stderr
    assert "--threads" in server.stderr


def test_names_that_are_not_text(server, place, tmp_path):
    """Files whose names are not UTF-8 are read and written, and reports show the names escaped."""
    name, out = os.fsdecode(b"in\xff.pt"), os.fsdecode(b"out\xfe.pt")
    shutil.copy(place.folder / "in0.pt", place.folder / name)
    arguments = [name, "in1.pt", "in2.pt", "-o", out, "--json"]
    summary = tmp_path / "summary.md"
    code = server.run(place, arguments, environment={"GITHUB_STEP_SUMMARY": str(summary)})
    assert code == 0, server.stderr
    assert r"in\udcff.pt" in server.stderr
    assert r"udcff.pt" in summary.read_text("utf-8")
    merged = torch.load(place.folder / out)["state_dict"]
    assert torch.equal(merged["n"], torch.tensor(3))


def test_a_soup_that_was_killed_is_cleaned_up(server, place):
    """The next run removes what a killed soup left beside its output."""
    kill, evaluate = server.folder / "kill.sh", server.folder / "evaluate.sh"
    kill.write_text("case $1 in *trial*) kill -9 $PPID; esac; echo 1")
    evaluate.write_text("echo 1")
    arguments = [*place.again, "--soup", "greedy", "--mode", "max", "--eval"]
    for script, expected in ((kill, -signal.SIGKILL), (evaluate, 0)):
        code = server.run(place, [*arguments, f"sh {script} {{}}"])
        assert code == expected, server.stderr
        (place.folder / "out.pt.soup.jsonl").unlink()
        left = [path.name for path in place.folder.glob(".*")]
        assert bool(left) == bool(code)
        assert all("merge-avg-tmp" in name for name in left)


# Inputs that change, and disks that are full.


def lengthen(path):
    with path.open("ab") as file:
        file.write(b"more")


def shorten(path):
    os.truncate(path, 100)


def write_again(path):
    with path.open("r+b") as file:
        file.write(b"P")


def change_secretly(path):
    """Write other bytes, with the size and times as before: only a checksum can tell."""
    before = path.stat()
    data = bytearray(path.read_bytes())
    at = data.rindex(b"\x00\x00\x80?" * 8)
    data[at : at + 4] = b"\x00\x00\x00@"
    with path.open("r+b") as file:
        file.write(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


CHANGES = [lengthen, shorten, write_again]


@pytest.mark.parametrize(
    ("suffix", "change"),
    # Files of safetensors have no checksums, so a secret change of one cannot be found.
    [*itertools.product(["pt", "safetensors"], CHANGES), ("pt", change_secretly)],
)
def test_inputs_that_change_while_they_are_read(tmp_path, suffix, change):
    """An input that changes while it is read is an error, and the old output stays."""
    paths = [tmp_path / f"{fold}.{suffix}" for fold in range(2)]
    for path in paths:
        state = {"v": torch.zeros(300_000), "w": torch.ones(300_000)}
        torch.save(state, path) if suffix == "pt" else save_file(state, path)
    out = tmp_path / f"out.{suffix}"
    out.write_bytes(b"old")
    todo = [change]

    def progress(*_):
        if todo:
            todo.pop()(paths[1])

    with pytest.raises(MergeError) as caught:
        merge_checkpoints(paths, out, overwrite=True, threads=1, progress=progress)
    assert str(paths[1]) in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {out.name, *(p.name for p in paths)}
    assert out.read_bytes() == b"old"


def test_an_input_that_is_replaced_is_read_as_it_was(tmp_path):
    """A rename over an input that is open does not change what is read."""
    paths = [tmp_path / f"{fold}.pt" for fold in range(2)]
    for path in paths:
        torch.save({"w": torch.ones(5000)}, path)
    torch.save({"w": torch.zeros(9)}, tmp_path / "new.pt")
    todo = [paths[0]]

    def progress(*_):
        if todo:
            (tmp_path / "new.pt").replace(todo.pop())

    merge_checkpoints(paths, tmp_path / "out.pt", threads=1, progress=progress)
    assert torch.load(tmp_path / "out.pt")["w"].eq(1).all()


def test_an_output_on_another_file_system(tmp_path):
    """The output may lie on another file system than the inputs."""
    other = Path("/dev/shm")  # noqa: S108
    if not os.access(other, os.W_OK) or other.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no other file system to write to")
    for fold in range(2):
        torch.save({"w": torch.full((4,), float(fold))}, tmp_path / f"{fold}.pt")
    with tempfile.TemporaryDirectory(dir=other) as name:
        folder = Path(name)
        paths = [tmp_path / f"{fold}.pt" for fold in range(2)]
        for _ in range(2):
            merge_checkpoints(paths, folder / "out.pt", overwrite=True)
            merge_checkpoints(paths, folder / "out", max_shard_size=8, overwrite=True)
        assert torch.load(folder / "out.pt")["w"].tolist() == [0.5] * 4
        assert sorted(path.name for path in folder.iterdir()) == ["out", "out.pt"]


FULL = """
set -e
mount -t tmpfs -o size=200k tmpfs disk
cp old disk/out.pt
! "$@" a.pt b.pt -o disk/out.pt --overwrite 2>one
! "$@" tied.pt b.pt -o disk/out.safetensors 2>two
ls -A disk >left
cmp old disk/out.pt
"""


def test_a_disk_that_is_full(tmp_path):
    """No space for the output or the scratch file is one error, and the old output stays."""
    inside = ["unshare", "--user", "--map-root-user", "--mount"]
    if shutil.which("unshare") is None or subprocess.run([*inside, "true"], check=False).returncode:
        pytest.skip("no file system can be mounted here")
    (tmp_path / "disk").mkdir()
    (tmp_path / "old").write_bytes(b"old")
    tensor = torch.ones(30_000)
    torch.save({"a": torch.ones(60_000), "b": tensor}, tmp_path / "a.pt")
    torch.save({"a": torch.zeros(60_000), "b": tensor}, tmp_path / "b.pt")
    torch.save({"a": torch.ones(90_000)[:60_000], "b": tensor}, tmp_path / "tied.pt")
    command = [*inside, "sh", "-c", FULL, "sh", sys.executable, "-m", "merge_avg"]
    done = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("one", "two"):
        text = (tmp_path / name).read_text()
        assert text.count("error: ") == 1, text
        assert "No space left on device" in text
        assert "hint: free some space" in text
    assert (tmp_path / "left").read_text() == "out.pt\n"


def test_inputs_are_only_ever_opened_for_reading(server, place, tmp_path):
    """Inputs are opened for reading only, and never removed or renamed."""
    code = server.run(place, place.arguments, audit=str(tmp_path / "log"))
    assert judge(place, code, server.stderr)
    events = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    ours = [(event, args) for event, args in events if "in0.pt" in str(args[0])]
    assert len(ours) >= 2
    assert {event for event, _ in ours} == {"open"}
    assert all(args[2] & os.O_ACCMODE == os.O_RDONLY for _, args in ours)
    assert [args[1] for event, args in events if event == "os.link"] == ["out.pt"]
