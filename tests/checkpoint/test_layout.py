"""merge_avg.layout: what a strided view of a storage reaches."""

import itertools

import torch
from hypothesis import example, given
from hypothesis import strategies as st

from merge_avg import merge_checkpoints
from merge_avg.checkpoint._dtypes import BY_NAME
from merge_avg.checkpoint._layout import Storage, TensorInfo

dimensions = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6)), max_size=3)


@given(dimensions)
@example([(2, 0), (2, 3)])  # as many elements as from first to last, but not those
def test_dense_is_every_element_once(pairs):
    """Of the elements from the first to the last each is reached, by one index."""
    shape, stride = [list(one) for one in zip(*pairs, strict=True)] or ([], [])
    info = TensorInfo(
        ("a",), BY_NAME["float32"], tuple(shape), tuple(stride), 5, Storage("s", 0, 0)
    )
    reached = [
        5 + sum(i * step for i, step in zip(index, stride, strict=True))
        for index in itertools.product(*map(range, shape))
    ]
    assert info.stop == max(reached, default=4) + 1
    assert info.dense == (sorted(reached) == list(range(5, info.stop)))


def test_what_no_index_reaches_is_kept(tmp_path):
    """A view that repeats some elements and skips others leaves those to the template."""
    for fold in range(2):
        base = torch.tensor([1.0, 10, 20, 3]) + 2 * fold
        torch.save({"w": base.as_strided((2, 2), (0, 3))}, tmp_path / f"{fold}.pt")
    merge_checkpoints([tmp_path / "0.pt", tmp_path / "1.pt"], tmp_path / "out.pt")
    merged = torch.load(tmp_path / "out.pt")["w"]
    assert merged.tolist() == [[2, 4]] * 2
    assert torch.as_strided(merged, (4,), (1,), 0).tolist() == [2, 10, 20, 4]
