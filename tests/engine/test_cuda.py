"""A GPU gives the bytes of the CPU, and a device that is not there is refused."""

import pytest
import torch

from merge_avg import merge_checkpoints
from merge_avg.engine._cuda import find_device
from merge_avg.errors import MergeError

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.complex64]


@pytest.mark.parametrize("name", ["cuda:99", "tpu", "meta", "cuda:x"])
def test_unknown_devices_are_refused(name):
    """A device that is not there is one clear error."""
    with pytest.raises(MergeError, match="there is no device"):
        find_device(name)


def test_the_cpu_has_no_memory_of_its_own():
    """Any name of the CPU is the CPU."""
    assert find_device("cpu") == find_device("cpu:0") == ("cpu", None)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gpu_gives_the_bytes_of_the_cpu(tmp_path, dtype):
    """On a real device: the same bytes, and nothing stays allocated."""
    paths = [tmp_path / f"{fold}.pt" for fold in range(5)]
    for fold, path in enumerate(paths):
        generator = torch.Generator().manual_seed(fold)
        torch.save({"w": (torch.randn(700_000, generator=generator) * 100).to(dtype)}, path)
    merge_checkpoints(paths, tmp_path / "cpu.pt")
    merge_checkpoints(paths, tmp_path / "gpu.pt", device="cuda")
    assert (tmp_path / "cpu.pt").read_bytes() == (tmp_path / "gpu.pt").read_bytes()
