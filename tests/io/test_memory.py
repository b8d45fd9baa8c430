"""merge_avg.io._memory: a nameless file that grows and is mapped, and a collector that waits."""

import contextlib
import errno
import gc
import os

import pytest

from merge_avg.errors import MergeError
from merge_avg.io._memory import Scratch, without_collector


def test_the_file_has_no_name_and_grows(tmp_path):
    """Nothing is to be seen in the directory, and what is mapped can be read back."""
    scratch = Scratch(tmp_path)
    scratch.map(1 << 16, 4)[:] = b"\1\2\3\4"
    assert not list(tmp_path.iterdir())
    buffer = bytearray(4)
    scratch.read(memoryview(buffer), 1 << 16)
    assert bytes(buffer) == b"\1\2\3\4"
    scratch.close()


def test_no_room_is_an_error(tmp_path, monkeypatch):
    """A full disk is told before anything is written to a mapping, where it would be fatal."""

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    scratch = Scratch(tmp_path)
    with pytest.raises(MergeError, match="No space left") as caught:
        scratch.map(0, 1 << 16)
    assert "65,536 bytes" in str(caught.value.hint)
    scratch.close()


def test_the_collector_runs_again():
    """Garbage is collected again afterwards, also after an error, if it was before."""
    with contextlib.suppress(ZeroDivisionError), without_collector():
        assert not gc.isenabled()
        assert 1 / 0
    assert gc.isenabled()
    gc.disable()
    try:
        with without_collector():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
