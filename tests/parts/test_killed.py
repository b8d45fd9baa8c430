"""Wherever a run in parts is killed, the output is the old one or complete, and the run goes on."""

import os
import random
import shutil
import sys
import time

import pytest

from tests.parts.helpers import checkpoints, left, made, site, tree
from tests.promises import crashing, launching

pytestmark = [
    pytest.mark.filterwarnings("ignore", "ignore:torch.distributed is disabled"),
    pytest.mark.skipif(sys.platform != "linux", reason="forks processes that have threads"),
]
LIMITS = {"silence": 0.5, "patience": 1.5, "grace": 3.0}
CALLS = [*crashing.CALLS, "futex"]
KILLS = int(os.environ.get("MERGE_AVG_KILLS", "40"))  # 200 take five minutes
NAMES = "openat fsync link rename mkdir unlink flock".split()


def state_of(folder, output, old, whole):
    """Return whether the output is complete; assert that it is the old one, or none, otherwise."""
    found = tree(output) if output.exists() else None
    assert found in (old, whole)
    strays = [name for name in left(folder) if not name.endswith(crashing.TEMPORARY)]
    assert strays in ([], [site(output).name])
    return found == whole


def restored(output, old):
    """Put the old output back."""
    output.unlink(missing_ok=True)
    if old is not None:
        output.write_bytes(old)


@pytest.mark.large
@pytest.mark.parametrize("count", [KILLS])
def test_each_rank_is_killed_at_random_moments(tmp_path, count):
    """The others end by themselves, with one message at most, and `--resume` completes."""
    chance = random.Random(count)  # noqa: S311
    paths = checkpoints(tmp_path)
    made(paths, tmp_path / "one.pt")
    whole, output = tree(tmp_path / "one.pt"), tmp_path / "out.pt"
    (tmp_path / "one.pt").unlink()
    with launching.Server() as server:
        arguments = [*paths, "-o", output, "--overwrite"]
        server.run(tmp_path, *arguments, ranks=3)
        started = time.perf_counter()
        server.run(tmp_path, *arguments, ranks=3)
        took = time.perf_counter() - started
        for number in range(count):
            old = b"old" if number % 2 else None
            restored(output, old)
            kill = [number % 3, chance.uniform(0, took)]
            ended = server.run(tmp_path, *arguments, ranks=3, kill=kill, limits=LIMITS)
            errors = [x for one in ended for x in one.err.splitlines() if x.startswith("error: ")]
            codes = [one.code for one in ended]
            complete = state_of(tmp_path, output, old, whole)
            assert codes[number % 3] in (-9, 0), (kill, ended)
            assert {*codes} <= {-9, 0, 1}, (kill, ended)
            # Of those that had not met yet, each says so itself.
            assert len([x for x in errors if "did not" not in x]) <= 1, (kill, ended)
            assert complete or 0 not in codes, (kill, ended)
            assert len(errors) >= (1 in codes), (kill, ended)
            ranks = 1 + number % 2
            ended = server.run(tmp_path, *arguments, "--resume", ranks=ranks)
            assert [one.code for one in ended] == [0] * ranks, (kill, ended)
            assert tree(output) == whole, kill
            assert left(tmp_path) == [], kill


@pytest.mark.large
@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
@pytest.mark.parametrize("old", [None, b"old"], ids=["new", "overwrite"])
def test_a_run_is_killed_at_each_system_call(tmp_path, old):
    """SIGKILL at each system call of a small merge leaves what `--resume` completes."""
    with crashing.serving() as server:
        ((_, place),) = crashing.places(server, ["zip"], 300, [old is not None])
        whole = place.whole["."]
        resumed = [*place.arguments, "--resume"]
        runs = 0
        for call in CALLS if old else NAMES:
            for number in range(1, 1000):
                restored(place.output, old)
                log = server.folder / "log"
                inject = f"{call}:signal=KILL:when={number}"
                code = server.run(
                    place,
                    resumed,
                    lambda pid: crashing.traced(pid, inject, log),  # noqa: B023
                )
                complete = state_of(place.folder, place.output, old, whole)
                if code >= 0:
                    assert (code, complete) == (0, True), (inject, server.stderr)
                    break
                runs += 1
                # What is complete and cleaned up is not made again, but refused like any output.
                if not complete or site(place.output).exists():
                    assert server.run(place, resumed) == 0, (inject, server.stderr)
                assert place.output.read_bytes() == whole, inject
                if place.left():  # of a run that was only beginning
                    server.plain(place)(place.merge)
                assert left(place.folder) == [], inject
    assert runs > 20
