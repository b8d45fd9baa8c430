"""merge_avg.formats.zip.records: archives, and archives that contradict themselves."""

import io
import struct
import zipfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merge_avg.errors import MergeError
from merge_avg.formats.zip.records import Part, records

NAMES = st.text(st.characters(codec="utf-8", exclude_characters="/\\\0"), min_size=1, max_size=9)


def archive(contents, method=zipfile.ZIP_STORED, comment=b"", *, zip64=False):
    """Return the bytes of an archive as Python's zipfile writes it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as file:
        file.comment = comment
        for name, data in contents.items():
            with file.open(name, "w", force_zip64=zip64) as record:
                record.write(data)
    return buffer.getvalue()


def found(raw):
    """Return the records of an archive that lies behind other bytes."""
    part = Part(io.BytesIO(b"before" + raw + b"behind"), 0, 6, len(raw))
    return list(records(part))


@given(
    contents=st.dictionaries(NAMES, st.binary(max_size=50), max_size=5),
    deflated=st.booleans(),
    comment=st.binary(max_size=20),
    zip64=st.booleans(),
)
def test_records_are_those_that_zipfile_wrote(contents, deflated, comment, zip64):
    """Names, sizes, checksums and places are those of the archive, whatever its form."""
    method = zipfile.ZIP_DEFLATED if deflated else zipfile.ZIP_STORED
    raw = archive(contents, method, comment, zip64=zip64)
    with zipfile.ZipFile(io.BytesIO(raw)) as file:
        infos = file.infolist()
    ours = found(raw)
    assert [(name, one.nbytes, one.packed, one.crc) for name, one in ours] == [
        (info.filename, info.file_size, info.compress_size if deflated else None, info.CRC)
        for info in infos
    ]
    if not deflated:
        for name, one in ours:
            assert raw[one.offset - 6 : one.offset - 6 + one.nbytes] == contents[name]


@given(
    place=st.integers(0, 400),
    change=st.binary(min_size=1, max_size=4),
)
def test_a_changed_archive_is_read_or_refused(place, change):
    """Bytes changed anywhere never raise anything but MergeError."""
    raw = bytearray(archive({"a/data.pkl": b"N.", "a/data/0": bytes(8)}, comment=b"x"))
    raw[place : place + len(change)] = change
    try:
        read = found(bytes(raw))
    except MergeError:
        return
    assert all(one.offset - 6 + (one.packed or one.nbytes) <= len(raw) for _, one in read)


@pytest.mark.parametrize("where", [1 << 20, (1 << 63) - 1, (1 << 64) - 1])
def test_a_record_beyond_the_end_is_refused(where):
    """An offset of 64 bits may be more than a file can be asked for."""
    raw = archive({"a": b"1"})
    entry, end = raw.rindex(b"PK\1\2"), raw.rindex(b"PK\5\6")
    wide = struct.pack("<HHQ", 1, 8, where)
    head = raw[entry : entry + 30] + struct.pack("<H", len(wide)) + raw[entry + 32 : entry + 42]
    directory = head + b"\xff" * 4 + raw[entry + 46 : end] + wide
    size = struct.pack("<I", len(directory))
    with pytest.raises(MergeError, match="it ends too early"):
        found(raw[:entry] + directory + raw[end : end + 12] + size + raw[end + 16 :])


@pytest.mark.parametrize("comment", [b"PK\5\6" + bytes(18), b"PK\5\6"])
def test_an_end_within_the_comment_is_refused(comment):
    """Where a search from the back finds another end, programs see different archives."""
    with pytest.raises(MergeError, match="damaged"):
        found(archive({"a": b"1"}, comment=comment))


@pytest.mark.parametrize("cut", [1, 21, 22, 60, 100])
def test_an_archive_that_was_cut_short_is_refused(cut):
    """The end is missing, or no longer where it should be."""
    raw = archive({"a/data.pkl": b"N.", "a/data/0": bytes(8)})
    with pytest.raises(MergeError, match=r"damaged .*") as caught:
        found(raw[:-cut])
    assert "fetch or save it again" in caught.value.hint


def test_bytes_before_and_behind_an_archive_are_refused():
    """Other programs would search for the archive in them, and may find another one."""
    raw = archive({"a": b"1"})
    with pytest.raises(MergeError):
        found(b"#!/bin/sh\n" + raw)
    with pytest.raises(MergeError):
        found(raw + b"more")


def test_a_name_that_appears_twice_is_refused():
    """Which of the two counts is left to each program."""
    raw = archive({"aa": b"1", "ab": b"2"}).replace(b"ab", b"aa")
    with pytest.raises(MergeError, match="have the same name, 'aa'"):
        found(raw)


def test_records_that_overlap_are_refused():
    """A record within another could be read as two different things."""
    inner = archive({"b": b"2"})
    outer = archive({"a": inner, "b": b"2"})
    start = outer.rindex(b"PK\1\2")  # of the entry of b, whose header moves into a
    where = outer.index(b"PK\3\4", 4)
    moved = outer[: start + 42] + where.to_bytes(4, "little") + outer[start + 46 :]
    with pytest.raises(MergeError, match="overlap"):
        found(moved)
