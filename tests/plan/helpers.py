"""Small plans, made of tensors that lie in no file."""

from pathlib import Path

from merge_avg.checkpoint import BY_NAME, File, Layout, Name, TensorInfo, row_major
from merge_avg.plan._alignment import Aligned
from merge_avg.plan._units import Plan, make_plan

F32, BF16 = BY_NAME["float32"], BY_NAME["bfloat16"]
FILE = File(Path("f.pt"), 0, 0, 0, 0)


def info(key, storage, start, shape, stride=None, dtype=F32):
    """A tensor in a storage; by default contiguous, of float32."""
    return TensorInfo((key,), dtype, shape, stride or row_major(shape), start, storage)


def rows_of(*checkpoints: dict[str, TensorInfo], skipped=()) -> tuple[list[Layout], Aligned]:
    """Layouts called f0.pt, f1.pt, ..., and their tensors aligned with those of the first."""
    layouts = [
        Layout(Path(f"f{i}.pt"), "torch-zip", (FILE,), tuple(one.values()))
        for i, one in enumerate(checkpoints)
    ]
    rows = {Name((), key): tuple(one.get(key) for one in checkpoints) for key in checkpoints[0]}
    return layouts, Aligned(rows, (), frozenset(Name((), key) for key in skipped))


def planned(*checkpoints: dict[str, TensorInfo], dtype: str | None = None) -> Plan:
    """The plan for some checkpoints."""
    return make_plan(*rows_of(*checkpoints), dtype)
