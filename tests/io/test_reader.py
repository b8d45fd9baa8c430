"""merge_avg.io._reader: reading by offset, decoding, and checking what was read."""

import contextlib
import errno
import itertools
import os
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merge_avg.checkpoint import Checksums, File, Layout, Storage
from merge_avg.errors import MergeError
from merge_avg.io import _platform, _reader
from merge_avg.io._platform import write_fully
from merge_avg.io._reader import Checksum, Reader


def opened(*paths, sums=()):
    """Return a reader of files, of which checksums of storages are recorded."""
    checksums = Checksums.of({storage.bytes_at: crc for storage, crc in dict(sums).items()})
    layout = Layout(paths[0], "?", tuple(map(File.of, paths)), (), checksums=checksums)
    return Reader(layout, paths[0].parent)


def test_finish_reads_the_rest_and_finds_damage(tmp_path):
    """Bytes that nobody asked for are read for their checksum; a wrong one is an error."""
    path = tmp_path / "a"
    path.write_bytes(b"xx" + b"0123456789")
    storage = Storage("data/0", 2, 10)
    for crc, damaged in ((zlib.crc32(b"0123456789"), False), (1, True)):
        reader = opened(path, sums={storage: crc})
        part = bytearray(3)
        reader.read(memoryview(part), storage, 3)
        assert part == b"345"
        if damaged:
            with pytest.raises(MergeError, match="'data/0' is damaged"):
                reader.finish()
        else:
            reader.finish()
        reader.close()


def test_a_file_that_shrinks_or_changes_is_an_error(tmp_path):
    """A file that ends too early, or was written to meanwhile, is named."""
    path = tmp_path / "a"
    path.write_bytes(b"0123")
    reader = opened(path)
    with pytest.raises(MergeError, match="ends at byte 4"):
        reader.read(memoryview(bytearray(8)), Storage("all", 0, 8), 0)
    os.truncate(path, 2)
    with pytest.raises(MergeError, match="changed while it was read"):
        reader.finish()
    reader.close()


def test_a_file_that_was_replaced_after_the_scan_is_an_error(tmp_path):
    """What is opened has to be what was scanned."""
    path = tmp_path / "a"
    path.write_bytes(b"0123")
    reader = opened(path)
    (tmp_path / "b").write_bytes(b"4567")
    (tmp_path / "b").replace(path)
    with pytest.raises(MergeError, match="changed while it was read"):
        reader.read(memoryview(bytearray(4)), Storage("all", 0, 4), 0)
    reader.close()


@given(
    sizes=st.lists(st.integers(0, 7), min_size=1, max_size=6),
    where=st.tuples(st.integers(0, 30), st.integers(0, 30)),
)
def test_parts_read_as_one(tmp_path_factory, sizes, where):
    """A storage of parts, in several files, reads as their bytes one after the other."""
    folder = tmp_path_factory.mktemp("parts")
    whole, parts, paths = b"", [], []
    for number, size in enumerate(sizes):
        data = bytes(range(len(whole), len(whole) + size))
        paths.append(folder / str(number))
        paths[-1].write_bytes(b"xyz" + data)
        parts.append(Storage(str(number), 3, size, file=number))
        whole += data
    start, stop = sorted(min(place, len(whole)) for place in where)
    reader = opened(*paths)
    into = bytearray(stop - start)
    reader.read(memoryview(into), Storage("all", 0, len(whole), parts=tuple(parts)), start)
    assert into == whole[start:stop]
    reader.close()


@given(data=st.binary(max_size=3000), word=st.sampled_from([1, 2, 4, 8]), packed=st.booleans())
def test_coded_storages_read_as_what_they_stand_for(tmp_path_factory, data, word, packed):
    """Deflated bytes are inflated, and words in big-endian order turned; checksums are held."""
    data = data[: len(data) // 8 * 8]
    path = tmp_path_factory.mktemp("coded") / "a"
    packer = zlib.compressobj(wbits=-15)
    stored = packer.compress(data) + packer.flush() if packed else data
    path.write_bytes(b"xx" + stored)
    storage = Storage("r", 2, len(data), packed=len(stored) if packed else None, swapped=word)
    words = [data[at : at + word][::-1] for at in range(0, len(data), word)]
    reader = opened(path, sums={storage: zlib.crc32(data)})
    into = bytearray(len(data))
    reader.read(memoryview(into), storage, 0)
    assert into == b"".join(words)
    reader.close()


@pytest.mark.parametrize("lie", [{"nbytes": 99}, {"nbytes": 101}, {"crc": 1}, {"packed": 5}])
def test_a_deflated_storage_that_lies_is_damaged(tmp_path, lie):
    """A wrong size, a wrong checksum and a stream cut short are damage, before any byte is used."""
    packer = zlib.compressobj(wbits=-15)
    data = bytes(range(100))
    stored = packer.compress(data) + packer.flush()
    (tmp_path / "a").write_bytes(stored)
    true = {"nbytes": 100, "crc": zlib.crc32(data), "packed": len(stored)}
    told = true | lie
    crc = told.pop("crc")
    storage = Storage("r", 0, **told)
    reader = opened(tmp_path / "a", sums={storage: crc})
    with contextlib.closing(reader), pytest.raises(MergeError, match="'r' is damaged"):
        reader.read(memoryview(bytearray(4)), storage, 0)


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_failures_name_the_file(tmp_path, monkeypatch, code):
    """A file that cannot be opened, read or written is named, with the system's reason."""
    path = tmp_path / "a"
    path.write_bytes(b"0123")

    def fail(*_):
        raise OSError(code, os.strerror(code))

    reader = opened(path)
    for name, verb in (("open", "opened"), ("preadv", "read")):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, fail)
            says = rf"(?m): cannot be {verb} \({os.strerror(code)}\)$"
            with pytest.raises(MergeError, match=says):
                reader.read(memoryview(bytearray(4)), Storage("all", 0, 4), 0)
    reader.close()
    monkeypatch.setattr(os, "pwrite", fail)
    says = rf"(?m)/a: cannot be written \({os.strerror(code)}\)$"
    with pytest.raises(MergeError, match=says) as got:
        write_fully(0, memoryview(b"0123"), 0, path)
    assert (got.value.hint is not None) == (code == errno.ENOSPC)


def test_a_file_that_ends_early_is_named(tmp_path):
    """Where the end comes too soon, file and place are said."""
    path = tmp_path / "a"
    path.write_bytes(b"0123")
    with contextlib.closing(opened(path)) as reader:
        assert reader.path == path
        with pytest.raises(MergeError, match=f"{path}: it ends at byte 4"):
            reader.read(memoryview(bytearray(8)), Storage("all", 0, 8), 0)


def test_what_is_read_again_counts_once(tmp_path):
    """The checksum holds although bytes are read twice, whether that is said or not."""
    path = tmp_path / "a"
    path.write_bytes(b"0123456789")
    storage = Storage("r", 0, 10)
    sums = {storage: zlib.crc32(b"0123456789")}
    five = memoryview(bytearray(5))
    with contextlib.closing(opened(path, sums=sums)) as reader:
        reader.read(five, storage, 0)
        for options in ({}, {"again": True}, {}):
            reader.read(five, storage, 5, **options)
            assert reader._checksum(storage).missing() == []
        os.truncate(path, 0)  # nothing is left to be read
        with pytest.raises(MergeError, match="changed"):
            reader.finish()
    path.write_bytes(b"0123456789")
    parts = Storage("all", 0, 10, parts=(storage,))
    with contextlib.closing(opened(path, sums=sums)) as reader:
        reader.read(five, parts, 0, again=True)
        assert reader._checksum(storage).missing() == [(0, 10)]
        reader.read(five, parts, 0)
        assert reader._checksum(storage).missing() == [(5, 10)]


def test_a_record_that_is_read_whole_is_checked_at_once(tmp_path):
    """Where one read takes all of a record, its checksum needs no keeping."""
    path = tmp_path / "a"
    path.write_bytes(b"0123456789" * 2)
    right, wrong = Storage("r", 0, 10), Storage("w", 10, 10)
    sums = {right: zlib.crc32(b"0123456789"), wrong: zlib.crc32(b"0123456780")}
    with contextlib.closing(opened(path, sums=sums)) as reader:
        reader.read(memoryview(bytearray(10)), right, 0)
        reader.read(memoryview(bytearray(10)), wrong, 0, again=True)
        with pytest.raises(MergeError, match="record 'w' is damaged"):
            reader.read(memoryview(bytearray(10)), wrong, 0)
        assert not reader._sums


def test_the_rest_of_a_file_that_ends_early(tmp_path):
    """Bytes that only the checksum needs are named by their file too."""
    path = tmp_path / "a"
    path.write_bytes(b"0123")
    storage = Storage("r", 0, 8)
    with contextlib.closing(opened(path, sums={storage: 1})) as reader:
        reader.read(memoryview(bytearray(4)), storage, 0)
        with pytest.raises(MergeError, match=f"^{path}: it ends at byte 4"):
            reader.finish()
    for packed in (None, 9):
        storage = Storage("r", 0, 8, packed=packed, swapped=2)
        with (
            contextlib.closing(opened(path, sums={storage: 1})) as reader,
            pytest.raises(MergeError, match=f"^{path}: it ends at byte 4"),
        ):
            reader.read(memoryview(bytearray(4)), storage, 0)


@pytest.mark.parametrize("spread", [True, False])
def test_neighbours_are_read_at_once(tmp_path, monkeypatch, spread):
    """What lies close together takes one call, or one each where a system has no such call."""
    path = tmp_path / "a"
    data = bytes(range(256)) * 40
    path.write_bytes(data)
    near = [Storage(str(k), 100 * k, 80) for k in range(50)]  # 20 bytes between them
    far, back = Storage("far", 9000, 80), Storage("back", 10, 5)
    turned = Storage("turned", 9100, 4, swapped=2)
    whole = Storage("whole", 0, 160, parts=(near[3], near[1]))
    storages = [*near, far, back, turned, whole]
    sums = {one: zlib.crc32(data[one.offset :][: one.nbytes]) for one in [*near, far]}
    calls, real = [], os.preadv
    monkeypatch.setattr(os, "preadv", lambda *a: calls.append(a) or real(*a))
    if not spread:
        monkeypatch.setattr(_platform, "_SPREADS", False)
    ends = [*itertools.accumulate(one.nbytes for one in storages)]
    parts = [(end - one.nbytes, end, one, 0) for end, one in zip(ends, storages, strict=True)]
    into = memoryview(bytearray(ends[-1]))
    with contextlib.closing(opened(path, sums=sums)) as reader:
        reader.read_all(reader.plan(parts), into)
        assert len([call for call in calls if len(call[1]) > 1]) == spread
        for (begin, end, *_), one in zip(parts[:-2], storages, strict=False):
            assert into[begin:end] == data[one.offset :][: one.nbytes]
        assert into[ends[-3] : ends[-2]] == bytes([data[n] for n in (9101, 9100, 9103, 9102)])
        assert into[ends[-2] :] == data[300:380] + data[100:180]
        reader.finish()
    with contextlib.closing(opened(path)) as reader:  # without checksums
        again = memoryview(bytearray(ends[-1]))
        reader.read_all(reader.plan(parts), again)
        assert again == into
    bad = sums | {near[7]: 1}
    with (
        contextlib.closing(opened(path, sums=bad)) as reader,
        pytest.raises(MergeError, match="record '7' is damaged"),
    ):
        reader.read_all(reader.plan(parts), into)
    os.truncate(path, 4000)
    with (
        contextlib.closing(opened(path, sums=sums)) as reader,
        pytest.raises(MergeError, match=f"^{path}: it ends at byte 4,000"),
    ):
        reader.read_all(reader.plan(parts), into)


def test_files_and_storages_are_opened_once(tmp_path, monkeypatch):
    """However often it is read, a file is opened once; decoded bytes lie on the output's disk."""
    (tmp_path / "scratch").mkdir()
    path = tmp_path / "a"
    path.write_bytes(b"0123" * 2)
    opens, real = [], os.open
    monkeypatch.setattr(os, "open", lambda *a, **k: opens.append(a[0]) or real(*a, **k))
    reader = Reader(Layout(path, "?", (File.of(path),), ()), tmp_path / "scratch")
    plain, turned = Storage("r", 0, 8), Storage("s", 0, 8, swapped=2)
    with contextlib.closing(reader):
        for storage in (plain, turned) * 3:
            reader.read(memoryview(bytearray(4)), storage, 4)
    assert opens.count(path) == 1
    assert len([one for one in opens if str(one).startswith(str(tmp_path / "scratch"))]) == 1


def test_the_rest_is_read_in_blocks(tmp_path, monkeypatch):
    """What nobody asked for is read for its checksum a block at a time, to the last byte."""
    monkeypatch.setattr(_reader, "_BLOCK", 7)
    path = tmp_path / "a"
    data = bytes(range(100))
    path.write_bytes(b"xx" + data)
    storage = Storage("r", 2, 100)
    with contextlib.closing(opened(path, sums={storage: zlib.crc32(data)})) as reader:
        reader.read(memoryview(bytearray(1)), storage, 50)
        reader.finish()


@pytest.mark.parametrize("word", [2, 4, 8])
def test_long_deflated_storages(tmp_path, monkeypatch, word):
    """Blocks that cut words, and several storages in one file, come out whole."""
    monkeypatch.setattr(_reader, "_BLOCK", 48)
    stored, storages, whole, sums = b"", [], [], {}
    for number in range(2):
        data = bytes((7 * i * i + number) % 256 for i in range(400 * 8))
        packer = zlib.compressobj(wbits=-15)
        packed = packer.compress(data) + packer.flush()
        more = {"packed": len(packed), "swapped": word}
        storages.append(Storage(str(number), len(stored), len(data), **more))
        sums[storages[-1]] = zlib.crc32(data)
        stored += packed
        whole.append(b"".join(data[at : at + word][::-1] for at in range(0, len(data), word)))
    swapped = Storage("plain", len(stored), 400, swapped=word)
    sums[swapped] = zlib.crc32(whole[0][:400])
    (tmp_path / "a").write_bytes(stored + whole[0][:400])
    with contextlib.closing(opened(tmp_path / "a", sums=sums)) as reader:
        for _ in range(2):
            for storage, data in zip(storages, whole, strict=True):
                into = bytearray(len(data))
                reader.read(memoryview(into), storage, 0)
                assert into == data
        into = bytearray(100)
        reader.read(memoryview(into), swapped, 100)
        turned = b"".join(whole[0][at : at + word][::-1] for at in range(0, 400, word))
        assert into == turned[100:200]


@given(data=st.binary(max_size=60), cuts=st.lists(st.integers(0, 60)), order=st.randoms())
def test_parts_in_any_order_give_the_checksum(data, cuts, order):
    """The combined CRC-32 is that of the whole, in whatever order its parts arrive."""
    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    parts = list(itertools.pairwise(edges))
    order.shuffle(parts)
    sums = Checksum(len(data))
    left = parts.pop() if parts else None
    for start, stop in parts:
        sums.add(start, stop - start, zlib.crc32(data[start:stop]))
    missing = sums.missing()
    assert sum(stop - start for start, stop in missing) == (left[1] - left[0] if left else 0)
    for start, stop in missing:
        sums.add(start, stop - start, zlib.crc32(data[start:stop]))
    assert sums.value() == zlib.crc32(data)


def test_overlapping_parts_are_left_to_be_read():
    """Of parts that overlap, the longest counts, or the first; what others have is missing."""
    data = b"0123456789"
    for parts, missing in (
        ([(0, 6), (4, 10)], [(6, 10)]),
        ([(0, 6), (4, 9), (2, 10)], [(0, 2)]),
        ([(4, 10), (0, 4), (2, 6)], []),
    ):
        sums = Checksum(10)
        for start, stop in parts:
            sums.add(start, stop - start, zlib.crc32(data[start:stop]))
        assert sums.missing() == missing


@given(data=st.data(), size=st.integers(1, 90))
def test_parts_that_overlap_give_the_checksum_too(data, size):
    """Whatever parts come, and however they overlap, with those missing they give the checksum."""
    whole = bytes(range(size))
    sums = Checksum(size)
    edge = st.integers(0, size)
    parts = data.draw(st.lists(st.tuples(edge, edge).map(sorted), max_size=80))
    for start, stop in parts:
        sums.add(start, stop - start, zlib.crc32(whole[start:stop]))
    for start, stop in sums.missing():
        sums.add(start, stop - start, zlib.crc32(whole[start:stop]))
    assert sums.missing() == []
    assert sums.value() == zlib.crc32(whole)


def test_a_checksum_of_nothing_and_of_all():
    """Nothing is missing where all has been added, or where there is nothing."""
    assert Checksum(0).missing() == []
    sums = Checksum(4)
    assert sums.missing() == [(0, 4)]
    sums.add(0, 4, zlib.crc32(b"0123"))
    assert sums.missing() == []


def test_a_complete_run_holds_one_part():
    """Parts that arrive in order are combined with the last one, however few they were."""
    sums = Checksum(30)
    for start in range(0, 30, 10):
        sums.add(start, 10, zlib.crc32(bytes(10)))
    assert (len(sums._parts), len(sums._fresh)) == (1, 0)
    assert sums.value() == zlib.crc32(bytes(30))
