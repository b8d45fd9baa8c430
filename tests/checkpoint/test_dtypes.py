"""merge_avg.checkpoint: the table of dtypes says what torch and safetensors say."""

import pytest
import torch

from merge_avg.checkpoint import BY_NAME, BY_SAFETENSORS, BY_STORAGE, CONVERTIBLE
from tests.older import has


@pytest.mark.parametrize("name", [pytest.param(name, marks=has(name)) for name in BY_NAME])
def test_every_dtype_is_torchs(name):
    """Name, size and kind are those of torch's dtype; codes are neither float nor integer here."""
    ours, theirs = BY_NAME[name], getattr(torch, name)
    assert isinstance(theirs, torch.dtype)
    assert ours.itemsize == theirs.itemsize
    if ours.kind in ("float", "complex"):
        assert (theirs.is_floating_point, theirs.is_complex) == (
            ours.kind == "float",
            ours.kind == "complex",
        )
    assert ours.word * (1 + theirs.is_complex) == ours.itemsize


@pytest.mark.parametrize("name", BY_STORAGE)
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_every_storage_is_torchs(name):
    """The class that stands in a pickle for a dtype holds elements of this dtype."""
    assert getattr(torch, name)().dtype == getattr(torch, BY_STORAGE[name].name)


def test_names_are_given_once():
    """No two dtypes have one name in a format, and every format holds what --dtype may ask for."""
    assert len(BY_SAFETENSORS) == sum(dtype.safetensors is not None for dtype in BY_NAME.values())
    assert len(BY_STORAGE) == sum(dtype.storage is not None for dtype in BY_NAME.values())
    assert all(BY_NAME[name].safetensors and BY_NAME[name].storage for name in CONVERTIBLE)
