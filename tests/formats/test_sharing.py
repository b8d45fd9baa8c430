"""merge_avg.formats: checkpoints of a run share what is the same in all, and vouch for nothing."""

import gc
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

from merge_avg.checkpoint import File
from merge_avg.errors import MergeError
from merge_avg.formats import directory, safetensors, scan
from merge_avg.formats import zip as zipped
from merge_avg.formats.pickle import torch_objects
from merge_avg.verify import verify_output
from tests.helpers import merge_checkpoints
from tests.older import since

MANY = 80  # records are enough for archives to be compared by their headers at once


def state(seed, count=5):
    generator = torch.Generator().manual_seed(seed)
    return {f"layer{n}.weight": torch.randn(8, 4, generator=generator) for n in range(count)}


def written(path, kind, seed):
    """Write a checkpoint of a kind, and return its path."""
    if kind in ("pt", "many"):
        path = path.with_suffix(".pt")
        torch.save({"model": state(seed, MANY if kind == "many" else 5), "epoch": 3}, path)
    elif kind == "safetensors":
        path = path.with_suffix(".safetensors")
        save_file(state(seed), path)
    else:
        path.mkdir()
        for shard in range(2):
            part = {f"{shard}.{name}": value for name, value in state(seed + shard).items()}
            name = f"{'model' if kind == 'shards' else 'pytorch_model'}-0000{shard + 1}-of-00002"
            if kind == "shards":
                save_file(part, path / f"{name}.safetensors")
            else:
                torch.save(part, path / f"{name}.bin")
    return path


@pytest.mark.parametrize("kind", ["pt", "many", "safetensors", "shards", "pickled shards"])
def test_files_that_differ_in_numbers_alone_share_their_tensors(tmp_path, kind):
    """Whatever they are called: they are parsed once, and forgotten when nobody uses them."""
    held = (safetensors._HEADERS, zipped._LAST, directory._LAST, torch_objects._KNOWN)
    gc.collect()
    before = [[*one.values()] for one in held]  # of other tests, some of which keep theirs
    paths = [written(tmp_path / f"fold{seed}", kind, seed) for seed in range(3)]
    layouts = [scan(path) for path in paths]
    assert layouts[0].tensors is layouts[1].tensors is layouts[2].tensors
    assert [one.path for one in layouts] == paths
    if kind in ("pt", "many", "pickled shards"):
        assert layouts[0].checksums.keys() == layouts[1].checksums.keys()
        assert layouts[0].checksums != layouts[1].checksums
    del layouts
    gc.collect()
    known = {id(value) for values in before for value in values}
    assert [value for one in held for value in one.values() if id(value) not in known] == []


def of_epoch(path, epoch):
    """Write a checkpoint whose numbers and texts beside the weights are those of an epoch."""
    generator = torch.Generator().manual_seed(epoch)
    weights = {f"w{n}": torch.randn(16, 3, generator=generator) for n in range(MANY)}
    note = "x" * 100 * epoch
    if path.suffix == ".safetensors":
        save_file(weights, path, {"epoch": str(epoch), "note": note})
    else:
        beside = {"epoch": epoch, "loss": epoch / 7, "note": note, "deep": {"steps": [epoch] * 3}}
        torch.save(beside | {"model": weights}, path)
    return weights


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_files_of_other_epochs_share_their_tensors(tmp_path, suffix):
    """What lies beside the weights may be longer, so that these begin elsewhere in each file."""
    paths = [tmp_path / f"e{epoch}{suffix}" for epoch in range(4)]
    states = [of_epoch(path, epoch) for epoch, path in enumerate(paths)]
    layouts = [scan(path) for path in paths]
    assert all(one.tensors is layouts[0].tensors for one in layouts)
    assert len({one.files[0].base for one in layouts}) == 4
    told = [dict(one.metadata).get("epoch", dict(one.scalars).get(("epoch",))) for one in layouts]
    assert [*map(int, told)] == [0, 1, 2, 3]
    out = tmp_path / f"out{suffix}"
    merge_checkpoints(paths, out, template=2)
    verify_output(out)
    read = load_file(out) if suffix == ".safetensors" else torch.load(out)["model"]
    for name, value in read.items():
        mean = torch.stack([state[name].double() for state in states]).mean(0).float()
        assert torch.equal(value, mean), name
    data = bytearray(paths[3].read_bytes())
    data[data.index(states[3]["w9"].numpy().tobytes())] ^= 1
    paths[3].write_bytes(data)
    if suffix == ".pt":
        with pytest.raises(MergeError, match=r"e3\.pt: record 'data/9' is damaged"):
            merge_checkpoints(paths, tmp_path / "other.pt")


def test_directories_hold_files_that_begin_elsewhere(tmp_path):
    """Shards with other metadata are averaged, and what is kept of them is copied, as they lie."""
    for number in range(3):
        folder = tmp_path / str(number)
        folder.mkdir()
        weights = of_epoch(folder / "model.safetensors", number)
        save_file({"exp_avg": weights["w0"]}, folder / "optimizer.safetensors", {"n": "y" * number})
    paths = [tmp_path / str(number) for number in range(3)]
    assert scan(paths[0]).tensors is scan(paths[1]).tensors
    merge_checkpoints(paths, tmp_path / "out", template=2)
    verify_output(tmp_path / "out")
    kept = "optimizer.safetensors"
    assert (tmp_path / "out" / kept).read_bytes() == (paths[1] / kept).read_bytes()


def test_keys_that_are_equal_are_not_the_same(tmp_path):
    """True is equal to 1: a file with one of them has its own names."""
    for name, key in (("a", 1), ("b", True)):
        torch.save({"m": {key: torch.zeros(2), "w": torch.ones(3)}}, tmp_path / f"{name}.pt")
    first, second = scan(tmp_path / "a.pt"), scan(tmp_path / "b.pt")
    assert [info.path[1] for info in first.tensors] == [1, "w"]
    assert second.tensors[0].path[1] is True


def test_a_folder_is_not_told_from_zeros(tmp_path):
    """Names that are as long with the folder as another's, but are not in one, are others."""
    first = scan(written(tmp_path / "abc", "many", 0))
    raw = (tmp_path / "abc.pt").read_bytes()
    (tmp_path / "forged.pt").write_bytes(raw.replace(b"abc/", b"ab/\0"))
    with pytest.raises(MergeError):
        scan(tmp_path / "forged.pt")
    assert first.tensors


@pytest.mark.parametrize("kind", ["pt", "safetensors", "shards", "pickled shards"])
def test_what_differs_is_not_shared(tmp_path, kind):
    """A shape, a dtype or a place that is another one is read as it is."""
    first = scan(written(tmp_path / "a", kind, 0))
    other = {f"layer{n}.weight": torch.randn(4, 8) for n in range(5)}
    if kind == "pt":
        torch.save({"model": other, "epoch": 3}, tmp_path / "b.pt")
        second = scan(tmp_path / "b.pt")
    else:
        save_file(other, tmp_path / "b.safetensors")
        second = scan(tmp_path / "b.safetensors")
    assert {info.shape for info in first.tensors} == {(8, 4)}
    assert {info.shape for info in second.tensors} == {(4, 8)}


@pytest.mark.parametrize("kind", ["pt", "many"])
def test_a_checkpoint_does_not_vouch_for_another(tmp_path, kind):
    """Damage is found in the second file although the first, which is whole, looks the same."""
    good, bad = (written(tmp_path / name, kind, seed) for seed, name in enumerate(["a", "b"]))
    merge_checkpoints([good, bad], tmp_path / "fine.pt")
    raw = bad.read_bytes()
    with zipfile.ZipFile(bad) as archive:
        info = archive.getinfo("b/data/2")
    local = bytearray(raw)
    local[info.header_offset + 30] ^= 1  # the name in its local header
    bad.write_bytes(local)
    first = scan(good)
    with pytest.raises(MergeError, match="b/data/2' of the archive is not where it should be"):
        scan(bad)
    data = bytearray(raw)
    count = MANY if kind == "many" else 5
    data[raw.index(state(1, count)["layer2.weight"].numpy().tobytes())] ^= 1
    bad.write_bytes(data)
    assert scan(bad).tensors is first.tensors
    with pytest.raises(MergeError, match=r"b\.pt: record 'data/2' is damaged"):
        merge_checkpoints([good, bad], tmp_path / "out.pt")
    assert not (tmp_path / "out.pt").exists()


def outcome(path):
    """Return all that a scan tells, or how it fails."""
    try:
        found = scan(path)
    except MergeError as error:
        return str(error)
    return found.tensors, dict(found.checksums), found.archive, found.metadata, found.notes


def test_an_archive_is_read_as_if_it_were_alone(tmp_path):
    """Whichever byte of its headers differs from another's, with or without the other."""
    good, path = written(tmp_path / "a", "many", 0), written(tmp_path / "b", "many", 1)
    raw = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
        start = archive.start_dir
    places = []
    for number, info in enumerate(infos):
        entry, start = start, start + 46 + len(info.filename) + len(info.extra)
        if number in (0, 40, len(infos) - 1):
            local = info.header_offset
            places += range(local, raw.index(info.filename.encode(), local) + len(info.filename))
            places += range(entry, start)
    places += range(start, len(raw))  # the end of the directory
    changed = []
    for at in places:
        data = bytearray(raw)
        data[at] ^= 0x11
        path.write_bytes(data)
        changed.append((data, outcome(path)))
    first = scan(good)
    assert scan(good).tensors is first.tensors
    for at, (data, expected) in zip(places, changed, strict=True):
        path.write_bytes(data)
        assert outcome(path) == expected, at


def test_folders_of_all_records_may_have_any_name(tmp_path):
    """One of another length, or of letters that not every program reads alike, is read as it is."""
    first = scan(written(tmp_path / "a", "many", 0))
    for name in ("b", "b" * 20, "ü", "ö"):
        path = tmp_path / f"{name}.pt"
        with (
            zipfile.ZipFile(tmp_path / "a.pt") as source,
            zipfile.ZipFile(path, "w") as archive,
        ):
            for one in source.namelist():
                archive.writestr(name + one.removeprefix("a"), source.read(one))
        found = scan(path)
        assert [info.path for info in found.tensors] == [info.path for info in first.tensors]
        assert [name for name, _ in found.archive.records] == archive.namelist()
        assert sorted(found.checksums.values()) == sorted(first.checksums.values())


@since(2, 6, "which may leave out checksums")
def test_checksums_count_where_the_first_has_none(tmp_path):
    """What is planned for a file without checksums is checked in one that has them."""
    torch.serialization.set_crc32_options(compute_crc32=False)
    try:
        first = written(tmp_path / "a", "pt", 0)
    finally:
        torch.serialization.set_crc32_options(compute_crc32=True)
    second = written(tmp_path / "b", "pt", 1)
    assert scan(first).checksums == {}
    merge_checkpoints([first, second], tmp_path / "fine.pt")
    data = bytearray(second.read_bytes())
    data[data.index(state(1)["layer2.weight"].numpy().tobytes())] ^= 1
    second.write_bytes(data)
    with pytest.raises(MergeError, match=r"b\.pt: record 'data/2' is damaged"):
        merge_checkpoints([first, second], tmp_path / "out.pt")


def test_a_header_does_not_vouch_for_the_bytes_behind_it(tmp_path):
    """A file with the same header that is cut short, or goes on, is refused."""
    good, bad = (written(tmp_path / name, "safetensors", seed) for seed, name in enumerate("ab"))
    raw = bad.read_bytes()
    first = scan(good)
    for other in (raw[:-1], raw + b"\0"):
        bad.write_bytes(other)
        with pytest.raises(MergeError, match=r"b\.safetensors: "):
            scan(bad)
    bad.write_bytes(raw)
    assert scan(bad).tensors is first.tensors


def test_records_outside_the_root_keep_their_names(tmp_path):
    """Where not all records begin alike, none is shortened: two could become one."""
    written(tmp_path / "a", "pt", 0)
    with zipfile.ZipFile(tmp_path / "a.pt", "a") as archive:
        archive.writestr("data/0", b"another")
    layout = scan(tmp_path / "a.pt")
    assert {info.storage.name for info in layout.tensors} == {f"a/data/{n}" for n in range(5)}
    assert ("data/0", 7) in [(name, one.nbytes) for name, one in layout.archive.records]
    other = written(tmp_path / "b", "pt", 1)
    merge_checkpoints([tmp_path / "a.pt", other], tmp_path / "o.pt")
    expected = (state(0)["layer0.weight"].double() + state(1)["layer0.weight"].double()) / 2
    with zipfile.ZipFile(tmp_path / "o.pt") as archive:  # torch refuses such archives
        assert archive.read("a/data/0") == expected.float().numpy().tobytes()
        assert archive.read("data/0") == b"another"


def test_archives_within_a_file_keep_the_name_before_their_records(tmp_path):
    """Of two archives that are alike but for that name, each has its own."""
    path = written(tmp_path / "a", "pt", 0)
    nbytes = path.stat().st_size
    found = []
    for name in ("first: ", "second: "):
        with path.open("rb") as file:
            part = zipped.Part(file, 0, 0, nbytes, name)
            found.append(zipped.scan(file, File.of(path), part=part))
    for layout, name in zip(found, ("first: ", "second: "), strict=True):
        assert {info.storage.name.partition("data/")[0] for info in layout.tensors} == {name}
        assert layout.archive.prefix == f"{name}data/"
