"""merge_avg.formats.pickle.numpy_objects: digests of arrays, in every form that pickles have."""

import pickle

import numpy as np
import pytest
import torch
from torch import nn

from merge_avg.formats import scan
from merge_avg.formats.pickle.load import load
from merge_avg.formats.pickle.numpy_objects import digest_of
from merge_avg.formats.pickle.torch_objects import objects_at
from merge_avg.formats.pickle.values import Allowance, Global, Instance, Omitted, PickleError
from tests.formats.pickle.helpers import read


def digest(array, protocol=2):
    """Return the digest of an array as a pickle holds it."""
    return digest_of(read(pickle.dumps(array, protocol)), Allowance())


@pytest.mark.parametrize("protocol", range(6))
def test_equal_arrays_have_equal_digests(protocol):
    """Whatever the protocol; another value, shape, dtype or order makes another."""
    base = np.arange(6.0).reshape(2, 3)
    others = (
        base + 1,
        base.reshape(3, 2),
        base.astype("f4"),
        base.astype(">f8"),
        base.astype("c16"),
        np.asfortranarray(base),
        np.zeros(0),
        np.zeros((0, 3)),
    )
    found = [digest(array, protocol) for array in (base, *others)]
    assert None not in found
    assert len(set(found)) == len(found)
    assert digest(base.copy(), protocol) == found[0]
    if protocol < 5:  # which holds what is in Fortran order under another function
        assert found == [digest(array, 2) for array in (base, *others)]


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_long_arrays_have_digests(protocol):
    """Bytes that are too long to be held are told apart all the same."""
    base = np.arange(300_000.0)
    other = base.copy()
    other[-1] = 0
    assert digest(base, protocol) != digest(other, protocol)
    assert digest(base, protocol) == digest(base.copy(), protocol)
    assert digest(base, protocol) is not None


@pytest.mark.parametrize(
    "value",
    [
        np.arange(3),
        np.array(["a"]),
        np.array([None]),
        np.zeros(2, dtype=[("a", "f4")]),
        np.float64(3),
        {},
    ],
)
def test_only_floats_and_complex_numbers_have_digests(value):
    """Integers count or index, and objects are no numbers."""
    one = read(pickle.dumps(value))
    assert one == {} or digest_of(one, Allowance()) is None


def test_floats_of_other_packages_have_digests():
    """Dtypes of ml_dtypes go by their classes."""
    floats = Instance(Global("ml_dtypes", "bfloat16"), ())
    dtype = Instance(Global("numpy", "dtype"), (floats.function, False, True), (3, "<", None))
    function = Global("numpy.core.multiarray", "_reconstruct")
    one = Instance(function, (), (1, (2,), dtype, False, b"1234"))
    assert digest_of(one, Allowance())
    dtype.args = (Global("ml_dtypes", "int4"), False, True)
    assert digest_of(one, Allowance()) is None


def test_hostile_arrays_cost_what_they_take():
    """A shape may be anything; hashing one array again and again is paid for."""
    dtype = Instance(Global("numpy", "dtype"), ("f8",), (3, "<"))
    function = Global("numpy.core.numeric", "_frombuffer")
    deep = ()
    for _ in range(80):
        deep = (deep, deep)
    assert digest_of(Instance(function, (b"", dtype, (deep, 1 << 100_000), "C")), Allowance())
    assert digest_of(Instance(function, (b"", dtype, (1,) * 65, "C")), Allowance()) is None
    assert digest_of(Instance(function, (b"", dtype, 3, "C")), Allowance()) is None
    assert digest_of(Instance(function, (3, dtype, (1,), "C")), Allowance()) is None
    assert digest_of(Instance(function, (b"", 3, (1,), "C")), Allowance()) is None
    allowance, one = Allowance(), Instance(function, (bytes(1 << 20), dtype, (1 << 17,), "C"))
    digest_of(one, allowance)
    assert allowance.used == 1 << 16
    with pytest.raises(PickleError, match="more memory"):
        [digest_of(one, allowance) for _ in range(5)]


def test_what_is_left_out_has_a_digest():
    """A text or bytes of more than a MiB are only hashed."""
    one, other = (
        load(pickle.dumps(text), persistent=None, call=None).value
        for text in ("x" * (1 << 21), "x" * (1 << 21) + "y")
    )
    assert isinstance(one, Omitted)
    assert one.nbytes == 1 << 21
    assert len(one.digest) == 32
    assert one.digest != other.digest


class Running:
    """An object with arrays and a number."""

    def __init__(self, mean):
        self.mean, self.count = np.full(3, mean), mean


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_scan_lists_arrays_below_the_root(tmp_path, protocol, legacy):
    """In state dicts, lists and objects, each with its path."""
    for number in range(2):
        value = [{"w": torch.ones(2), "m": np.zeros(3)}, Running(float(number)), nn.Identity()]
        more = {"_use_new_zipfile_serialization": not legacy, "pickle_protocol": protocol}
        torch.save(value, tmp_path / f"{number}.pt", **more)
    one, other = (dict(scan(tmp_path / f"{number}.pt").arrays) for number in range(2))
    assert list(one) == list(other) == [(0, "m"), (1, "mean")]
    assert one[0, "m"] == other[0, "m"]
    assert one[1, "mean"] != other[1, "mean"]


def test_no_more_than_some_thousand_arrays_are_listed(monkeypatch):
    """They are a courtesy."""
    monkeypatch.setattr("merge_avg.formats.pickle.torch_objects._MOST_ARRAYS", 2)
    found = objects_at(pickle.dumps([np.zeros(1) for _ in range(3)], 2)).arrays
    assert [path for path, _ in found] == [(0,), (1,)]
