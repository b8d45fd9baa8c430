"""Ranks: several processes on this machine, which meet over the loopback."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from merge_avg import verify_output
from tests.helpers import quick, run_command
from tests.parts.helpers import MAKERS, checkpoints, left, made, site, tree
from tests.promises.launching import Server, free_port
from tests.promises.test_schema import checked

pytestmark = [
    pytest.mark.filterwarnings("ignore", "ignore:torch.distributed is disabled"),
    pytest.mark.skipif(sys.platform != "linux", reason="forks processes that have threads"),
]
SHORT = {"silence": 1.0, "patience": 20.0, "grace": 2.0}


@pytest.fixture(scope="module")
def server():
    with Server() as one:
        yield one


@pytest.mark.parametrize(
    ("kind", "count"),
    quick([(k, n) for k in MAKERS for n in (2, 3, 5)], ("zip", 3), ("strided", 2)),
)
def test_ranks_make_the_same_bytes(tmp_path, server, kind, count):
    """Ranks give what one process gives; rank 0 alone prints, and tells the rates of all."""
    paths, suffix = checkpoints(tmp_path, kind), MAKERS[kind][1]
    made(paths, tmp_path / f"one{suffix}", weights=[3, 1, 1])
    output = tmp_path / f"ranks{suffix}"
    first, *others = server.run(tmp_path, *paths, "-o", output, "-w", "3,1,1", ranks=count)
    assert (first.code, first.out) == (0, f"{output}\n"), first.err
    assert others == [(0, "", "")] * (count - 1)
    assert f"  ranks {count}; slowest " in first.err
    assert tree(output) == tree(tmp_path / f"one{suffix}")
    assert left(tmp_path) == []
    if kind == "legacy":  # which has no record
        return
    verify_output(output)
    verified = server.run(tmp_path, "verify", output, ranks=2)
    assert [(one.code, one.out) for one in verified] == [(0, f"{output}\n"), (0, "")]


@pytest.mark.large
def test_several_averages_by_ranks(tmp_path, server):
    """Ranks make several outputs in one reading."""
    paths = checkpoints(tmp_path)
    for folder, ranks in (("one", 1), ("ranks", 3)):
        (tmp_path / folder).mkdir()
        where = f"{folder}/avg-{{name}}.pt"
        ended = server.run(tmp_path, *paths, "-o", where, "--leave-one-out", ranks=ranks)
        assert [one.code for one in ended] == [0] * ranks, ended[0].err
    assert tree(tmp_path / "one") == tree(tmp_path / "ranks")
    assert len(tree(tmp_path / "one")) == 3


@pytest.mark.large
def test_the_result_in_json(tmp_path, server):
    """The JSON of rank 0 has what each rank did, and the bytes of all."""
    paths = checkpoints(tmp_path)
    first, other = server.run(tmp_path, *paths, "-o", "out.pt", "--json", ranks=2)
    found = checked(first.out, "merge")
    assert [one["rank"] for one in found["ranks"]] == [0, 1]
    assert sum(one["bytes"] for one in found["ranks"]) == found["bytes_read"]
    assert found["bytes_read"] == found["bytes_to_read"]
    assert found["agreement"]["verdict"]["word"]
    assert other.out == ""


def test_a_dry_run_shows_each_share(tmp_path, server):
    """A dry run of ranks tells what each is to read, and the memory that it takes."""
    paths = checkpoints(tmp_path)
    ended = server.run(tmp_path, *paths, "-o", "out.pt", "--dry-run", ranks=3, limits=SHORT)
    assert [one.code for one in ended] == [0, 0, 0], ended
    assert [f"share {k} would read" in ended[0].err for k in range(4)] == [True] * 3 + [False]
    assert left(tmp_path) == []
    assert not (tmp_path / "out.pt").exists()


def test_torchrun_starts_ranks(tmp_path, larger):
    """`torchrun -m merge_avg` makes the bytes of one process."""
    paths = checkpoints(tmp_path)
    made(paths, tmp_path / "one.pt")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    port = ["--master-port", str(free_port()), "-m", "merge_avg"]
    done = subprocess.run(
        [*command, *port, *paths, "-o", tmp_path / "out.pt"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'out.pt'}\n"), done.stderr
    assert tree(tmp_path / "out.pt") == tree(tmp_path / "one.pt")
    assert "ranks 2" in done.stderr


@pytest.mark.large
def test_srun_starts_ranks(tmp_path, larger):
    """The variables of a step of Slurm make ranks that meet by themselves."""
    paths = checkpoints(tmp_path)
    made(paths, tmp_path / "one.pt")
    step = {
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_STEP_ID": str(time.time_ns() % 1000),
    }
    runs = [
        subprocess.Popen(
            [sys.executable, "-m", "merge_avg", *paths, "-o", "out.pt", "-q"],
            cwd=tmp_path,
            env=os.environ | step | {"SLURM_PROCID": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    printed = [one.communicate()[0] for one in runs]
    assert [one.returncode for one in runs] == [0, 0]
    assert printed == ["out.pt\n", ""]
    assert tree(tmp_path / "out.pt") == tree(tmp_path / "one.pt")


@pytest.mark.parametrize(
    "variables",
    [{"RANK": "0"}, {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_JOB_NODELIST": "n[1-4]"}],
    ids=["RANK", "batch"],
)
def test_variables_that_were_left_change_nothing(tmp_path, variables):
    """With `RANK=0` alone, or in a batch script without srun, a run is a plain one."""
    paths = checkpoints(tmp_path, "safetensors", 2)
    output = tmp_path / "out.safetensors"
    done = run_command(*paths, "-o", output, env=os.environ | variables)
    assert (done.returncode, done.stdout) == (0, f"{output}\n")
    assert "ranks" not in done.stderr


def failed(ended, rank, *said):
    """Assert that all ranks failed, with one message in all, which names the rank and the cause."""
    assert {one.code for one in ended} == {1}, ended
    errors = [line for one in ended for line in one.err.splitlines() if line.startswith("error")]
    assert len(errors) == 1, errors
    assert f"rank {rank} (" in errors[0]
    for text in said:
        assert text in errors[0]


def test_an_error_of_a_rank_ends_all(tmp_path, server):
    """What one rank cannot read is told once, by rank 0, and every rank ends with code 1."""
    paths = checkpoints(tmp_path)
    each = {"1": ["--key", "nowhere"]}
    ended = server.run(tmp_path, *paths, "-o", "out.pt", ranks=3, each=each, limits=SHORT)
    failed(ended, 1, "nowhere")
    assert [bool(one.err) for one in ended] == [True, False, False]
    assert left(tmp_path) == []


def test_ranks_that_plan_another_merge_are_named(tmp_path, server):
    """A rank with another option, or that sees another size, is told with the difference."""
    paths = checkpoints(tmp_path)
    each = {"2": ["--allow-nonfinite"]}
    ended = server.run(tmp_path, *paths, "-o", "out.pt", ranks=3, each=each, limits=SHORT)
    failed(ended, 2, "--allow-nonfinite is True here, and False there")


@pytest.mark.large
def test_damage_in_a_share_ends_all(tmp_path, server):
    """A record that is damaged ends all ranks, and the old output stays."""
    paths = checkpoints(tmp_path)
    raw = bytearray(paths[1].read_bytes())
    raw[3 << 18] ^= 1
    paths[1].write_bytes(raw)
    (tmp_path / "out.pt").write_bytes(b"old")
    ended = server.run(tmp_path, *paths, "-o", "out.pt", "--overwrite", ranks=2, limits=SHORT)
    assert {one.code for one in ended} == {1}, ended
    assert "is damaged: its CRC-32 does not match" in ended[0].err
    assert ended[1].err == ""
    assert (tmp_path / "out.pt").read_bytes() == b"old"


@pytest.mark.parametrize("rank", quick([0, 2], 0))
def test_a_rank_that_dies_ends_all_and_resume_completes(tmp_path, server, rank):
    """After SIGKILL the others end by themselves with one message, and `--resume` completes."""
    paths = checkpoints(tmp_path)
    made(paths, tmp_path / "one.pt")
    # A rank that stands before its first stretch, so that it is alive when it is killed.
    ended = server.run(
        tmp_path, *paths, "-o", "out.pt", ranks=3, kill=[rank, 0.1], limits=SHORT, waits=rank
    )
    assert [one.code for one in ended] == [-9 if k == rank else 1 for k in range(3)], ended
    errors = [x for one in ended for x in one.err.splitlines() if x.startswith("error")]
    assert len(errors) == 1
    assert f"rank {rank} (" in errors[0]
    assert not (tmp_path / "out.pt").exists()
    assert site(tmp_path / "out.pt").exists()
    (first, _) = server.run(tmp_path, *paths, "-o", "out.pt", "--resume", ranks=2)
    assert first.code == 0, first.err
    assert tree(tmp_path / "out.pt") == tree(tmp_path / "one.pt")
    assert left(tmp_path) == []


@pytest.mark.large
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_stands_still_ends_all(tmp_path, server, rank):
    """Where all of a rank stops, as when its machine loses power, the others end by themselves."""
    paths = checkpoints(tmp_path)
    ended = server.run(
        tmp_path,
        *paths,
        "-o",
        "out.pt",
        ranks=3,
        waits=rank,
        kill=[rank, 0.1],
        signal=signal.SIGSTOP,
        stopped=rank,
        limits=SHORT,
    )
    others = [one for k, one in enumerate(ended) if k != rank]
    assert [one.code for one in others] == [1, 1]
    errors = [x for one in others for x in one.err.splitlines() if x.startswith("error")]
    assert len(errors) == 1
    assert f"rank {rank} (" in errors[0]


@pytest.mark.large
def test_a_rank_that_hangs_ends_all(tmp_path, server):
    """A rank whose storage hangs is told as such, and ends though one of its threads does not."""
    paths = checkpoints(tmp_path)
    ended = server.run(
        tmp_path,
        *paths,
        "-o",
        "out.pt",
        ranks=2,
        limits=SHORT | {"stall": 1.0, "grace": 0.5},
        waits=1,
    )
    failed(ended, 1, "read and wrote nothing for 1 s: does its storage hang?")


@pytest.mark.large
def test_ranks_that_never_come(tmp_path, server):
    """Where other ranks do not come in time, the error says how to make a plain run."""
    paths = checkpoints(tmp_path, "safetensors", 2)
    variables = {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    (one,) = server.run(
        tmp_path, *paths, "-o", "out.safetensors", limits={"patience": 1.0}, variables=variables
    )
    assert one.code == 1
    assert "rank 1 did not come within 1 s" in one.err
    assert "hint: for a plain run within another program's launch: env -u RANK" in one.err


@pytest.mark.large
def test_commands_of_one_process_leave_other_ranks_alone(tmp_path, server):
    """Under ranks the first inspects and verifies; a soup is refused, and parts are."""
    paths = checkpoints(tmp_path, "safetensors", 2)
    ended = server.run(tmp_path, "inspect", paths[0], ranks=2)
    assert [one.code for one in ended] == [0, 0]
    assert [bool(one.out) for one in ended] == [True, False]
    soup = [*paths, "-o", "s.safetensors", "--eval", "echo 1", "--mode", "max"]
    ended = server.run(tmp_path, "soup", *soup, ranks=2)
    assert [one.code for one in ended] == [2, 0]
    assert "a soup is not made by several ranks" in ended[0].err
    ended = server.run(tmp_path, *paths, "-o", "out.safetensors", "--part", "1/2", ranks=2)
    assert {one.code for one in ended} == {1}
    assert Path(tmp_path / "out.safetensors").exists() is False


@pytest.mark.large
def test_a_run_begins_anew_unless_one_is_at_work(tmp_path, server):
    """Ranks without `--resume` remove what a dead run left, but not what a living one works on."""
    from merge_avg.io import Site

    paths = checkpoints(tmp_path)
    made(paths, tmp_path / "one.pt")
    made(paths, tmp_path / "out.pt", part="1/2")
    living = Site(tmp_path / "out.pt")
    living.enter()
    ended = server.run(tmp_path, *paths, "-o", "out.pt", ranks=2)
    failed(ended, 0, "another run is at work on it")
    living.close()
    ended = server.run(tmp_path, *paths, "-o", "out.pt", ranks=2)
    assert [one.code for one in ended] == [0, 0], ended[0].err
    assert tree(tmp_path / "out.pt") == tree(tmp_path / "one.pt")
