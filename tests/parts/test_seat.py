"""Which variables make a process one of several ranks, and which do not."""

import pytest

from merge_avg.errors import UsageError
from merge_avg.parts import Seat, find_seat
from merge_avg.parts._seat import first_host

TORCH = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
STEP = {
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NODELIST": "gpu[07-10],x2",
    "SLURM_JOB_ID": "123",
    "SLURM_STEP_ID": "0",
}
# As sbatch gives them to a script, in which nothing says srun.
BATCH = {
    "SLURM_PROCID": "0",
    "SLURM_NTASKS": "8",
    "SLURM_JOB_NODELIST": "n[1-8]",
    "SLURM_NPROCS": "8",
}


def test_torchrun_makes_ranks():
    """The four variables of torch make a rank, and torch is told where to meet by the same."""
    assert find_seat(TORCH | {"LOCAL_RANK": "1"}) == Seat(1, 4, 1)
    assert find_seat(TORCH) == Seat(1, 4, 0)


def test_srun_makes_ranks_that_meet_at_its_first_host():
    """All tasks of a step know the same host and port, and another step has another port."""
    seats = [find_seat(STEP | {"SLURM_PROCID": str(rank)}) for rank in range(8)]
    assert {(seat.address, seat.port) for seat in seats} == {("gpu07", seats[0].port)}
    assert [seat.rank for seat in seats] == list(range(8))
    assert find_seat(STEP | {"SLURM_STEP_ID": "1"}).port != seats[0].port
    assert 1024 < seats[0].port < 32768


def test_torchrun_within_srun_counts():
    """Where srun starts a torchrun on each node, the ranks are those of torchrun."""
    assert find_seat(STEP | TORCH) == Seat(1, 4, 0)


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"RANK": "0"},
        {"RANK": "0", "WORLD_SIZE": "8"},
        {"RANK": "0", "WORLD_SIZE": "8", "MASTER_ADDR": "", "MASTER_PORT": "1"},
        TORCH | {"WORLD_SIZE": "1", "RANK": "0"},
        BATCH,
        STEP | {"SLURM_STEP_NUM_TASKS": "1"},
        {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"},
    ],
)
def test_anything_less_is_a_plain_run(variables):
    """What another program left, or a batch script has, makes no ranks."""
    assert find_seat(variables) is None


@pytest.mark.parametrize(
    "variables",
    [TORCH | {"RANK": "4"}, TORCH | {"WORLD_SIZE": "many"}, STEP | {"SLURM_PROCID": "-1"}],
)
def test_nonsense_is_refused(variables):
    """Variables that contradict each other are named, with the way to a plain run."""
    with pytest.raises(UsageError) as raised:
        find_seat(variables)
    assert "env -u RANK" in raised.value.hint


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("n[01-03,7],x", "n01"),
        ("n[7]", "n7"),
        ("r[1-2]c[3-4],x", "r1c3"),
        ("n[1-2].example.org,x", "n1.example.org"),
    ],
)
def test_lists_of_hosts_are_read(nodes, first):
    """The first host of a list is the one that Slurm's own tools name first."""
    assert first_host(nodes) == first


def test_each_local_rank_has_a_gpu():
    """Of several GPUs each local rank takes its own; where the launcher shows one, that."""
    assert [Seat(k, 4, k).device("cuda", 4) for k in range(4)] == [f"cuda:{k}" for k in range(4)]
    assert Seat(3, 4, 3).device("cuda", 1) == "cuda:0"
    assert Seat(3, 4, 3).device("cuda:2", 4) == "cuda:2"
    assert Seat(3, 4, 3).device("cpu", 4) == "cpu"
