"""merge_avg.formats.zip.records: archives, and archives that contradict themselves."""

import hashlib
import importlib
import io
import struct
import zipfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merge_avg.errors import MergeError
from merge_avg.formats.zip.records import END64, LOCATOR, Part, records

reading = importlib.import_module("merge_avg.formats.zip.records")  # the package hides it
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
    comment=st.binary(max_size=20).filter(lambda raw: b"PK\5\6" not in raw),
    zip64=st.booleans(),
)
def test_records_are_those_that_zipfile_wrote(contents, deflated, comment, zip64):
    """Names, sizes, checksums and places are those of the archive, whatever its form."""
    method = zipfile.ZIP_DEFLATED if deflated else zipfile.ZIP_STORED
    raw = archive(contents, method, comment, zip64=zip64)
    with zipfile.ZipFile(io.BytesIO(raw)) as file:
        infos = file.infolist()
    ours = found(raw)
    assert [(one.name, one.nbytes, one.packed, one.crc) for one in ours] == [
        (info.filename, info.file_size, info.compress_size if deflated else None, info.CRC)
        for info in infos
    ]
    if not deflated:
        for one in ours:
            assert raw[one.offset - 6 : one.offset - 6 + one.nbytes] == contents[one.name]


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
    assert all(one.offset - 6 + (one.packed or one.nbytes) <= len(raw) for one in read)


def far(raw, where):
    """Return an archive of one record that lies at an offset of 64 bits, and has a comment."""
    entry, end = raw.rindex(b"PK\1\2"), raw.rindex(b"PK\5\6")
    wide = struct.pack("<HHQ", 1, 8, where)
    head = raw[entry : entry + 30] + struct.pack("<HH", len(wide), 2) + raw[entry + 34 : entry + 42]
    directory = head + b"\xff" * 4 + raw[entry + 46 : end] + wide + b"no"
    size = struct.pack("<I", len(directory))
    return raw[:entry] + directory + raw[end : end + 12] + size + raw[end + 16 :]


def test_a_record_beyond_the_end_is_refused():
    """An offset of 64 bits may be more than a file can be asked for."""
    raw = archive({"a": b"1"})
    assert found(far(raw, 0)) == found(raw)
    for where in (1 << 20, (1 << 63) - 1, (1 << 64) - 1):
        with pytest.raises(MergeError, match="it ends too early"):
            found(far(raw, where))


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


def patched(raw, *changes):
    """Return an archive with numbers changed: by the header's mark, its place there, its size."""
    raw = bytearray(raw)
    for mark, place, size, value in changes:
        at = raw.rindex(mark) + place
        raw[at : at + size] = value.to_bytes(size, "little")
    return bytes(raw)


LOCAL, ENTRY, END = b"PK\3\4", b"PK\1\2", b"PK\5\6"
ONE = archive({"name": b"12345"})
TWO = archive({"a": b"1", "name": b"12345"})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ([(ENTRY, 8, 2, 0x1), (LOCAL, 6, 2, 0x1)], "is encrypted"),
        ([(ENTRY, 8, 2, 0x40), (LOCAL, 6, 2, 0x40)], "is encrypted"),
        ([(ENTRY, 8, 2, 0x2000), (LOCAL, 6, 2, 0x2000)], "is encrypted"),
        ([(ENTRY, 10, 2, 12), (LOCAL, 8, 2, 12)], "compressed in an unusual way"),
        ([(ENTRY, 8, 2, 0x1)], "headers contradict"),
        ([(LOCAL, 6, 2, 0x1)], "headers contradict"),
        ([(LOCAL, 18, 4, 4)], "headers contradict"),
        ([(LOCAL, 18, 4, 6)], "headers contradict"),
        ([(ENTRY, 20, 4, 4)], "headers contradict"),
        ([(LOCAL, 6, 2, 0x2), (LOCAL, 18, 4, 0)], "headers contradict"),
        ([(LOCAL, 8, 2, 8)], "'name' of the archive is not where"),
        ([(LOCAL, 0, 4, 0)], "'name' of the archive is not where"),
        ([(LOCAL, 30, 1, 0x4E)], "'name' of the archive is not where"),
        ([(LOCAL, 26, 2, 5)], "'name' of the archive is not where"),
        ([(ENTRY, 42, 4, 1)], "'name' of the archive is not where"),
        ([(ENTRY, 34, 2, 1)], "'name' of the archive is not where"),
        (
            [(ENTRY, 20, 4, 6), (ENTRY, 24, 4, 6), (LOCAL, 18, 4, 6)],
            "'name' of the archive is not where",
        ),
        ([(LOCAL, 28, 2, 1)], "'name' of the archive is not where"),
        ([(ENTRY, 24, 4, 4)], "lies about its size"),
        ([(ENTRY, 24, 4, 6)], "lies about its size"),
        ([(ENTRY, 0, 4, 0)], "directory is garbled"),
        ([(ENTRY, 28, 2, 5)], "directory is garbled"),
        ([(ENTRY, 30, 2, 1)], "directory is garbled"),
        ([(ENTRY, 32, 2, 1)], "directory is garbled"),
        ([(END, 8, 2, 0), (END, 10, 2, 0)], "does not end where it should"),
        ([(END, 8, 2, 2), (END, 10, 2, 2)], "directory ends too early"),
        ([(END, 4, 2, 1)], "directory is not where"),
        ([(END, 6, 2, 1)], "directory is not where"),
        ([(END, 8, 2, 2)], "directory is not where"),
        ([(END, 10, 2, 2)], "directory is not where"),
        ([(END, 12, 4, 49)], "directory is not where"),
        ([(END, 16, 4, 38)], "directory is not where"),
        ([(END, 12, 4, 51), (END, 16, 4, 38)], "directory is garbled"),
        ([(END, 20, 2, 1)], "its end is not where"),
        ([(END, 0, 4, 0)], "its end is missing"),
    ],
)
def test_headers_that_disagree_are_refused(changes, says):
    """Each number that two places give, or that a reader may go by, has to be the right one."""
    with pytest.raises(MergeError, match=says) as caught:
        found(patched(ONE, *changes))
    assert "damaged" not in str(caught.value) or "fetch" in caught.value.hint


@pytest.mark.parametrize(
    "changes",
    [
        [(ENTRY, 8, 2, 0x8), (LOCAL, 6, 2, 0x8), (LOCAL, 14, 4, 0), (LOCAL, 18, 4, 0)],
        [(LOCAL, 18, 4, 0xFFFFFFFF)],
        [(ENTRY, 4, 2, 99), (LOCAL, 4, 2, 99), (ENTRY, 12, 4, 7), (LOCAL, 10, 4, 9)],
        [(ENTRY, 8, 2, 0x2)],
    ],
)
def test_headers_that_differ_in_other_ways_are_read(changes):
    """Sizes that follow the data, in a zip64 field or behind it, versions and times may differ."""
    assert found(patched(ONE, *changes)) == found(ONE)


def test_records_keep_their_archive_and_its_names():
    """Names in another alphabet are decoded as their flag says; offsets are those in the file."""
    raw = archive({"\xfc": b"1"})
    [one] = records(Part(io.BytesIO(b"??" + raw), 3, 2, len(raw), "first/"))
    assert (one.name, one.offset) == ("\xfc", 2 + raw.index(b"1", 30))
    old = patched(raw, (ENTRY, 8, 2, 0), (LOCAL, 6, 2, 0))
    assert [one.name for one in found(old)] == ["\u251c\u255d"]  # in code page 437
    bad = patched(raw, (ENTRY, 46, 1, 0xFF), (LOCAL, 30, 1, 0xFF))
    assert [one.name for one in found(bad)] == ["\\xff\\xbc"]


@pytest.mark.parametrize(
    ("data", "size", "says"),
    [
        (bytes(9000), lambda packed: 1032 * packed, None),
        (bytes(9000), lambda packed: 1032 * packed + 1, "lies about its size"),
        (bytes(range(256)) * 8, lambda packed: packed - 64, None),
        (bytes(range(256)) * 8, lambda packed: packed - 65, "lies about its size"),
        (hashlib.shake_256(b"").digest(4096), lambda packed: packed - 67, None),
        (hashlib.shake_256(b"").digest(4096), lambda packed: packed - 68, "lies about its size"),
    ],
)
def test_what_deflate_cannot_do_is_a_lie(data, size, says):
    """It packs up to 1,032 bytes into one, and adds up to 64 and a 1,024th."""
    raw = archive({"name": data}, zipfile.ZIP_DEFLATED)
    [one] = found(raw)
    changed = patched(raw, (ENTRY, 24, 4, size(one.packed)))
    if says is None:
        assert found(changed)[0].nbytes == size(one.packed)
    else:
        with pytest.raises(MergeError, match=says):
            found(changed)


def test_a_directory_is_read_in_blocks(monkeypatch):
    """Wherever a block ends, each entry is read whole."""
    raw = archive({f"{n}" * (n + 1): bytes(n) for n in range(30)})
    whole = found(raw)
    monkeypatch.setattr(reading, "_LARGEST_ENTRY", 46 + 60)
    for size in (106, 107, 200, 333):
        monkeypatch.setattr(reading, "_BLOCK", size)
        assert found(raw) == whole
    assert found(archive({})) == []


def test_records_may_lie_side_by_side_in_any_order():
    """Only those that share a byte overlap; the directory need not follow their order."""
    first, end = TWO.index(ENTRY), TWO.index(END)
    second = TWO.index(ENTRY, first + 1)
    swapped = TWO[:first] + TWO[second:end] + TWO[first:second] + TWO[end:]
    assert [one[:5] for one in found(swapped)] == [one[:5] for one in found(TWO)[::-1]]
    # The first record with one byte more, which is the first of the second's header.
    one = TWO[: TWO.rindex(LOCAL)]
    more = [(ENTRY, 20, 4, 2), (ENTRY, 24, 4, 2), (LOCAL, 18, 4, 2)]
    changed = patched(one + TWO[first:second], *more)
    with pytest.raises(MergeError, match="overlap"):
        found(changed[: len(one)] + TWO[len(one) : first] + changed[len(one) :] + TWO[second:])


def test_the_largest_comment_is_passed_over():
    """An end may be followed by 65,535 bytes."""
    raw = archive({"a": b"1"}, comment=b"x" * 0xFFFF)
    assert len(found(raw)) == 1
    with pytest.raises(MergeError, match="end is missing"):
        found(raw + b"x")


def wide(changes=(), narrow=()):
    """Return an archive with a zip64 end, numbers of which are changed, and of the narrow end."""
    at, start = ONE.rindex(END), ONE.rindex(ENTRY)
    end = [b"PK\6\6", 44, 45, 45, 0, 0, 1, 1, at - start, start]
    locator = [b"PK\6\7", 0, at, 1]
    for place, value in dict(changes).items():
        (end if place < 10 else locator)[place % 10] = value
    raw = ONE[:at] + END64.pack(*end) + LOCATOR.pack(*locator) + ONE[at:]
    return patched(raw, *((END, *change) for change in narrow))


@pytest.mark.parametrize(
    ("place", "size", "most"),
    [
        (4, 2, 0xFFFF),
        (6, 2, 0xFFFF),
        (8, 2, 0xFFFF),
        (10, 2, 0xFFFF),
        (12, 4, 0xFFFFFFFF),
        (16, 4, 0xFFFFFFFF),
    ],
)
def test_the_two_ends_agree(place, size, most):
    """A number of the narrow end is that of the wide one, or the largest that it can hold."""
    assert found(wide()) == found(ONE)
    assert found(wide(narrow=[(place, size, most)])) == found(ONE)
    for other in (most - 1, 3):
        with pytest.raises(MergeError, match="two ends contradict"):
            found(wide(narrow=[(place, size, other)]))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({0: b"PK\6\0"}, "two ends contradict"),
        ({1: 45}, "two ends contradict"),
        ({11: 1}, "two ends contradict"),
        ({12: 99}, "two ends contradict"),
        ({10: b"PK\6\0"}, "directory is not where"),  # then there is only the narrow end
        ({6: 2}, "two ends contradict"),
        ({4: 1}, "two ends contradict"),
    ],
)
def test_a_wide_end_is_checked(changes, says):
    """Its length, its place and its disks are those of the only form there is."""
    with pytest.raises(MergeError, match=says):
        found(wide(changes))


@pytest.mark.parametrize("narrow", [(4, 2), (6, 2), (8, 2), (10, 2), (12, 4), (16, 4)])
def test_the_wide_end_counts(narrow):
    """Where the narrow end gives way, the wide one says where the directory is."""
    place = {4: 4, 6: 5, 8: 6, 10: 7, 12: 8, 16: 9}[narrow[0]]
    with pytest.raises(MergeError, match="directory is not where"):
        found(wide({place: 7}, [(*narrow, 2 ** (8 * narrow[1]) - 1)]))


def test_an_archive_that_is_only_its_ends_is_empty():
    """The zip64 end may begin at the first byte."""
    end = archive({})
    ends = END64.pack(b"PK\6\6", 44, 45, 45, 0, 0, 0, 0, 0, 0) + LOCATOR.pack(b"PK\6\7", 0, 0, 1)
    assert found(end) == found(ends + end) == []
    with pytest.raises(MergeError):
        found(b"")


NONE = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ([(1, 3)], [1, 3, 2]),
        ([(9, 77), (1, 3)], [1, 3, 2]),
        ([(1, 3), (1, 4)], [1, 3, 2]),
        ([(1, 3, 4)], [1, 3, 2]),
        ([], [1, NONE, 2]),
        ([(9, 77)], [1, NONE, 2]),
    ],
)
def test_numbers_of_64_bits_are_those_of_the_first_field(fields, expected):
    """Other fields are passed over, and without one the number is itself."""
    extra = b"".join(
        struct.pack(f"<2H{len(numbers)}Q", kind, 8 * len(numbers), *numbers)
        for kind, *numbers in fields
    )
    assert list(reading._wide(extra, 1, NONE, 2)) == expected
    assert list(reading._wide(extra + b"\1\0\0", 1, NONE, 2)) == expected


def test_numbers_of_64_bits_follow_each_other():
    """Those that need it are in the order of the directory, and none may be missing."""
    extra = struct.pack("<2H3Q", 1, 24, 2**40, 2**63 + 1, 5)
    assert list(reading._wide(extra, NONE, NONE, NONE)) == [2**40, 2**63 + 1, 5]
    assert list(reading._wide(extra, NONE, 7, NONE)) == [2**40, 7, 2**63 + 1]
    with pytest.raises(MergeError, match="a size is missing"):
        list(reading._wide(struct.pack("<2HQ", 1, 15, 1) + bytes(7), NONE, NONE))


def test_a_part_is_all_that_is_read():
    """Bytes beyond the part, or the end of the file, are not there."""
    part = Part(io.BytesIO(b"??abc!"), 0, 2, 3)
    assert (part.read(0, 3), part.read(1, 2), part.read(3, 0)) == (b"abc", b"bc", b"")
    for at, count in ((1, 3), (3, 1)):
        with pytest.raises(MergeError, match="it ends too early"):
            part.read(at, count)
    with pytest.raises(MergeError, match="it ends too early"):
        Part(io.BytesIO(b"??ab"), 0, 2, 3).read(0, 3)
