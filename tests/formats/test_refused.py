"""merge_avg.formats.refused: files that are not checkpoints, by name."""

import pickle

import pytest

from merge_avg.errors import MergeError
from merge_avg.formats import scan

STRANGERS = {
    "empty": (b"", "empty"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
    "html": (b"\n<html><body>Login</body></html>", "web page"),
    "gguf": (b"GGUF\x03\x00\x00\x00", "GGUF"),
    "hdf5": (b"\x89HDF\r\n\x1a\n", "HDF5"),
    "gzip": (b"\x1f\x8b\x08\x00", "gzip"),
    "tar": (bytes(257) + b"ustar\x0000" + bytes(250), "tar archive"),
    "pickle": (pickle.dumps({"w": [1.0]}, 2), "a pickle, but not a checkpoint"),
    "noise": (b"\x00\x01\x02\x03", "neither"),
}


@pytest.mark.parametrize("kind", STRANGERS)
def test_each_is_named_with_the_way_out(tmp_path, kind):
    """The message says what the file is, and the hint what to do."""
    content, says = STRANGERS[kind]
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(MergeError, match=says) as caught:
        scan(tmp_path / "a.pt")
    assert caught.value.hint
