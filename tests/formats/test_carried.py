"""merge_avg.formats.carried: what a loader of any file would call."""

import io
import pickle

import pytest

from merge_avg.checkpoint import File
from merge_avg.formats import carried


class Mine:
    """A class that nobody else knows."""


class Other:
    """Another."""


class Persistent(pickle.Pickler):
    """Writes an ellipsis as the name of an object that lies elsewhere."""

    def persistent_id(self, obj):
        return "elsewhere" if obj is ... else None


MINE, OTHER = (f"{__name__}.{name}" for name in ("Mine", "Other"))


def dumps(value, protocol=4):
    """Return a pickle in which an ellipsis is a persistent id."""
    Persistent(file := io.BytesIO(), protocol).dump(value)
    return file.getvalue()


def found(path, raw):
    """What would be called by a loader of a file of these bytes."""
    path.write_bytes(raw)
    return carried.callables_of(File(path, len(raw), 0, 0, 0))


ONE, TWO = dumps([Mine()]), dumps([Other()])
OLD = dumps([Mine()], 0)


@pytest.mark.parametrize(
    ("raw", "names"),
    [
        (ONE + TWO, [MINE, OTHER]),
        (TWO + ONE + TWO, [OTHER, MINE]),
        (dumps([..., Mine()]) + dumps([..., Other()]), [MINE, OTHER]),
        (ONE + TWO[:-1], [MINE]),
        (ONE + b"\xff", [MINE]),
        (OLD + TWO[:-1], [MINE]),
        (OLD + b"\xff", [MINE]),
    ],
    ids="two three persistent cut garbled old_cut old_garbled".split(),
)
def test_pickles_one_after_the_other(tmp_path, raw, names):
    """Each is looked into, up to the first that cannot be read, and each name is given once."""
    assert found(tmp_path / "a", raw) == tuple(names)


@pytest.mark.parametrize("nbytes", [-1, 0, 1])
@pytest.mark.parametrize("old", [True, False])
def test_the_first_bytes_are_not_the_whole(tmp_path, old, nbytes):
    """Wherever the first read ends, a whole pickle counts, with one after it that is cut."""
    first = OLD if old else ONE
    rest = dumps([Other(), b"x" * carried._FIRST_READ])
    size = carried._FIRST_READ + nbytes - len(first)
    assert found(tmp_path / "cut", first + rest[:size]) == (MINE,)
    assert found(tmp_path / "whole", first + rest) == (MINE, OTHER)
    exact = first + dumps(b"x" * (size - len(dumps(b"x" * 300)) + 300))
    assert len(exact) == carried._FIRST_READ + nbytes
    assert found(tmp_path / "exact", exact) == (MINE,)


def test_no_more_than_the_largest_is_read(tmp_path, monkeypatch):
    """A pickle that is longer may name anything; one that ends before is known."""
    raw = dumps([b"x" * 200_000, Mine()])
    monkeypatch.setattr(carried, "_LARGEST", len(raw))
    assert found(tmp_path / "a", raw) == found(tmp_path / "a", raw + b"x") == (MINE,)
    monkeypatch.setattr(carried, "_LARGEST", len(raw) - 1)
    assert found(tmp_path / "a", raw) == ("whatever a names",)


@pytest.mark.parametrize("protocol", range(2, 8))
def test_what_begins_as_a_pickle_may_name_anything(tmp_path, protocol):
    """A mark of a protocol that exists is one, where the rest cannot be read; others are not."""
    for rest in (b"\x95\x01", b"\xff", b"", ONE[2:-1]):
        names = found(tmp_path / "a", bytes([0x80, protocol]) + rest)
        assert names == (("whatever a names",) if protocol <= 5 else ())


@pytest.mark.parametrize("suffix", ["py", "pyc", "pyd", "so", "dll", "dylib", "PY"])
def test_code_is_code(tmp_path, suffix):
    """A file that Python or the system runs as code is named for its name alone."""
    assert found(tmp_path / f"a.{suffix}", b"") == (f"the code in a.{suffix}",)
