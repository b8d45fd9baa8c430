"""A GPU gives the bytes of the CPU, and a device that is not there is refused."""

import filecmp

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from merge_avg import AverageModelMerger, merge_checkpoints
from merge_avg.engine._cuda import find_device
from merge_avg.errors import MergeError
from tests.helpers import run_command

DTYPES = [
    torch.float32,
    torch.bfloat16,
    torch.float64,
    torch.float16,
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
]


def write(folder, dtype, *, count=5, numel=700_000):
    """Write checkpoints with plain, transposed and special elements of a dtype."""
    paths = [folder / f"{fold}.pt" for fold in range(count)]
    for fold, path in enumerate(paths):
        generator = torch.Generator().manual_seed(fold)
        real = torch.randn(numel, generator=generator) * 100
        if not dtype.is_floating_point and not dtype.is_complex:
            real = torch.arange(numel)
        odd = real[:5000].clone()
        if dtype != torch.int64:
            odd[fold * 7] = torch.inf
            odd[100 + fold] = torch.nan
        tensors = {"w": real, "t": real.view(-1, 100), "odd": odd}
        tensors = {name: value.to(dtype) for name, value in tensors.items()}
        torch.save({**tensors, "t": tensors["t"].t(), "one": real[0].to(dtype)}, path)
    return paths


@pytest.mark.parametrize("name", ["cuda:99", "tpu", "meta", "cuda:x"])
def test_unknown_devices_are_refused(name):
    """A device that is not there is one clear error."""
    with pytest.raises(MergeError, match="there is no device"):
        find_device(name)


def test_the_cpu_has_no_memory_of_its_own():
    """Any name of the CPU is the CPU."""
    assert find_device("cpu") == find_device("cpu:0") == ("cpu", None)


@pytest.mark.gpu
@pytest.mark.parametrize("memory", [16 << 20, 512 << 20])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gpu_gives_the_bytes_of_the_cpu(tmp_path, dtype, memory):
    """On a real device: the same bytes in many windows and in few, and nothing stays allocated."""
    paths = write(tmp_path, dtype)
    options = {"allow_nonfinite": True, "max_memory": memory}
    merge_checkpoints(paths, tmp_path / "cpu.pt", **options)
    before = torch.cuda.memory_allocated()
    merge_checkpoints(paths, tmp_path / "gpu.pt", device="cuda", **options)
    assert torch.cuda.memory_allocated() == before
    assert filecmp.cmp(tmp_path / "cpu.pt", tmp_path / "gpu.pt", shallow=False)


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 2, 3, 40])
def test_weights_and_several_averages_are_the_same_on_a_gpu(tmp_path, count):
    """Weighted means, some of which leave a checkpoint out, are the same to the bit."""
    paths = write(tmp_path, torch.float32, count=count, numel=60_000)
    options = {"allow_trivial": count == 1, "allow_nonfinite": True}
    options["weights"] = [k % 3 + 0.5 for k in range(count)]
    for device in ("cpu", "cuda:0"):
        merge_checkpoints(paths, tmp_path / f"{device[:3]}.pt", device=device, **options)
    assert filecmp.cmp(tmp_path / "cpu.pt", tmp_path / "cud.pt", shallow=False)


@pytest.mark.gpu
def test_leave_one_out_is_the_same_on_a_gpu(tmp_path):
    """Several averages in one pass, by the command, are the same to the bit."""
    for fold in range(4):
        generator = torch.Generator().manual_seed(fold)
        tensors = {f"w{k}": torch.randn(40_001, generator=generator) for k in range(5)}
        tensors["half"] = tensors["w0"].bfloat16()
        save_file(tensors, tmp_path / f"fold{fold}.safetensors")
    names = [f"fold{fold}.safetensors" for fold in range(4)]
    for device in ("cpu", "cuda"):
        output = f"{device}-{{name}}.safetensors"
        arguments = [*names, "--leave-one-out", "-o", output, "--device", device]
        done = run_command(*arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    outputs = sorted(tmp_path.glob("cpu-*"))
    assert len(outputs) == 4
    for ours in outputs:
        theirs = ours.with_name(ours.name.replace("cpu", "cuda"))
        assert filecmp.cmp(ours, theirs, shallow=False)


@pytest.mark.gpu
def test_checkpoints_saved_on_a_gpu_are_averaged_on_the_cpu(tmp_path):
    """The device that a file names matters to nobody: its tensors keep it, whoever adds."""
    paths = [tmp_path / f"{fold}.pt" for fold in range(3)]
    values = [torch.randn(1000, 30, device="cuda") for _ in paths]
    for path, value in zip(paths, values, strict=True):
        torch.save({"w": value, "t": value.t()}, path)
    for device in ("cpu", "cuda"):
        merge_checkpoints(paths, tmp_path / f"{device}.pt", device=device)
    assert filecmp.cmp(tmp_path / "cpu.pt", tmp_path / "cuda.pt", shallow=False)
    merged = torch.load(tmp_path / "cpu.pt", weights_only=True)
    assert merged["w"].device.type == "cuda"
    exact = torch.stack([value.double() for value in values]).mean(0).float()
    torch.testing.assert_close(merged["w"], exact, rtol=1e-7, atol=1e-7)
    assert torch.equal(merged["t"], merged["w"].t())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_models_on_a_gpu_have_the_mean_of_models_on_the_cpu(dtype):
    """AverageModelMerger gives the same elements wherever the models are, also if they differ."""
    models = []
    for seed in range(5):
        torch.manual_seed(seed)
        models.append(nn.Sequential(nn.Linear(300, 500), nn.BatchNorm1d(500)).to(dtype))
    expected = AverageModelMerger(models, [1, 2, 3, 4, 5]).merge_models().state_dict()
    on_gpu = [model.to("cuda") for model in models]
    for some in (on_gpu, [on_gpu[0], on_gpu[1].cpu(), *on_gpu[2:]]):
        merged = AverageModelMerger(some, [1, 2, 3, 4, 5]).merge_models()
        for name, value in merged.state_dict().items():
            assert value.device.type == "cuda"
            assert torch.equal(value.cpu(), expected[name])


@pytest.mark.gpu
def test_a_gpu_without_memory_is_one_error(tmp_path):
    """Where another process has taken the memory, the error names a way on, and nothing is left."""
    paths = write(tmp_path, torch.float32, count=3, numel=3_000_000)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 4096) / total)
    options = {"device": "cuda", "max_memory": 1 << 30, "allow_nonfinite": True}
    try:
        with pytest.raises(MergeError, match="not enough free memory") as caught:
            merge_checkpoints(paths, tmp_path / "gpu.pt", **options)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert caught.value.hint == "use a smaller --max-memory, or --device cpu"
    assert sorted(tmp_path.iterdir()) == paths
    # What was locked and allocated for the failed merge is free again, so the next one works.
    merge_checkpoints(paths, tmp_path / "gpu.pt", **options)
    assert torch.cuda.mem_get_info()[0] >= free - (64 << 20) - torch.cuda.memory_reserved()
