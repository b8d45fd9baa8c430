"""merge_avg.verify: an output is derived again, and what is not as it was is named."""

import base64
import json
import os
import struct
import subprocess
import sys
import tempfile
import zipfile
import zlib

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from merge_avg import verify_output
from merge_avg.checkpoint import PROVENANCE
from merge_avg.errors import MergeError
from merge_avg.formats import scan
from merge_avg.plan import _budget as budget
from merge_avg.plan import read_record
from tests.helpers import merge_checkpoints

KINDS = ["pt", "safetensors", "shards", "dcp", "one file of shards", "shards of one file", "bare"]


def state(fold):
    generator = torch.Generator().manual_seed(fold)
    weights = {f"layer{i}.weight": torch.randn(40, 30, generator=generator) for i in range(4)}
    return weights | {"steps": torch.tensor(fold), "mask": torch.tensor([True, False])}


def made(folder, kind, count=3):
    """Checkpoints of a kind, and the options and the name of their average."""
    paths = []
    for fold in range(count):
        values = state(fold)
        path = folder / f"c{fold}"
        if kind in ("pt", "bare", "shards of one file"):
            path = folder / f"c{fold}.pt"
            torch.save({"state_dict": values, "optimizer": {"m": torch.ones(50)}}, path)
        elif kind == "safetensors":
            path = folder / f"c{fold}.safetensors"
            save_file(values, path, metadata={"format": "pt"})
        elif kind == "dcp":
            path.mkdir()
            dcp.save({"model": values}, checkpoint_id=path, no_dist=True)
        else:
            path.mkdir()
            keys = list(values)
            for number in (0, 1):
                part = {key: values[key] for key in keys[number::2]}
                save_file(part, path / f"model-0000{number + 1}-of-00002.safetensors")
            (path / "config.json").write_text("{}")
        paths.append(path)
    names = {"pt": "o.pt", "safetensors": "o.safetensors", "bare": "o.pt"}
    names |= {"one file of shards": "o.safetensors", "shards of one file": "o"}
    options = {"bare": {"state_dict": True}, "shards of one file": {"max_shard_size": 9000}}
    return paths, folder / names.get(kind, "o"), options.get(kind, {})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_output_passes(tmp_path, kind):
    """What a merge wrote is found to be what its inputs give, and nothing is written."""
    paths, out, options = made(tmp_path, kind)
    merge_checkpoints(paths, out, weights=["0.5", "0.25", "0.25"], **options)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    found = verify_output(out)
    assert found.inputs == tuple(paths)
    assert found.hashed
    files = [out] if out.is_file() else [path for path in out.rglob("*") if path.is_file()]
    assert found.nbytes == sum(path.stat().st_size for path in files)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["pt", "safetensors", "shards", "dcp"])
def test_every_flipped_bit_is_found(tmp_path, kind):
    """Wherever a bit of the output flips, in weights, headers or padding, it fails."""
    paths, out, options = made(tmp_path, kind)
    merge_checkpoints(paths, out, **options)
    files = [out] if out.is_file() else sorted(path for path in out.rglob("*") if path.is_file())
    for path in files:
        data = path.read_bytes()
        for at in {len(data) // 2, len(data) - 1, len(data) // 3}:
            path.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
            with pytest.raises(MergeError):
                verify_output(out)
        path.write_bytes(data + b"more")
        with pytest.raises(MergeError):
            verify_output(out)
        path.write_bytes(data)
    assert verify_output(out)


def span(path, name):
    """Return where the bytes of a tensor of a file begin and end."""
    layout = scan(path)
    info = next(info for info in layout.tensors if info.path[-1] == name)
    start = layout.offset(info.storage)
    return start, start + info.storage.nbytes


def test_the_tensor_that_differs_is_named(tmp_path):
    """A flipped bit in a weight names the tensor, the place and how many bytes differ."""
    paths, out, _ = made(tmp_path, "safetensors")
    merge_checkpoints(paths, out)
    start, _ = span(out, "layer2.weight")
    with out.open("r+b") as file:
        file.seek(start + 40)
        byte = file.read(1)[0]
        file.seek(start + 40)
        file.write(bytes([byte ^ 1]))
    where = f"1 bytes .*first at {start + 40:,} in tensor 'layer2.weight'"
    with pytest.raises(MergeError, match=where):
        verify_output(out)
    paths, out, _ = made(tmp_path, "pt")
    merge_checkpoints(paths, out)
    data = bytearray(out.read_bytes())
    data[span(out, "layer1.weight")[0]] ^= 1
    out.write_bytes(data)
    with pytest.raises(MergeError, match=r"tensor 'state_dict.layer1.weight'"):
        verify_output(out)


def test_the_tensor_of_the_right_shard_is_named(tmp_path):
    """Storages of torch's shards have the same names: that of the file which differs counts."""
    for fold in range(2):
        (tmp_path / str(fold)).mkdir()
        for number in (1, 2, 3):
            name = f"pytorch_model-0000{number}-of-00003.bin"
            torch.save({f"w{number}": torch.full((50,), 1.0 + fold)}, tmp_path / str(fold) / name)
    merge_checkpoints([tmp_path / "0", tmp_path / "1"], tmp_path / "out")
    shard = tmp_path / "out" / "pytorch_model-00002-of-00003.bin"
    raw = shard.read_bytes()
    shard.write_bytes(raw.replace(struct.pack("<f", 1.5), struct.pack("<f", 2.5), 1))
    with pytest.raises(MergeError, match="in tensor 'w2'") as caught:
        verify_output(tmp_path / "out")
    assert caught.value.where == str(shard)


def test_all_bytes_that_differ_are_counted(tmp_path):
    """Bytes that differ are counted over a whole tensor, and those that are equal are not."""
    paths, out, _ = made(tmp_path, "safetensors")
    merge_checkpoints(paths, out)
    data = bytearray(out.read_bytes())
    start, stop = span(out, "layer2.weight")
    for at in range(start + 3, stop, 2):
        data[at] ^= 255
    out.write_bytes(data)
    count = len(range(start + 3, stop, 2))
    with pytest.raises(MergeError, match=f"{count:,} bytes .*first at {start + 3:,} in tensor"):
        verify_output(out)


def test_an_input_that_changed_is_named(tmp_path):
    """Other weights of the same size are told by the hash, another size by itself."""
    paths, out, _ = made(tmp_path, "safetensors")
    merge_checkpoints(paths, out)
    save_file(state(7) | {"steps": torch.tensor(1)}, paths[1], metadata={"format": "pt"})
    with pytest.raises(MergeError, match="hash differs") as caught:
        verify_output(out)
    assert caught.value.where == str(paths[1])
    save_file({"more": torch.ones(3), **state(1)}, paths[1], metadata={"format": "pt"})
    with pytest.raises(MergeError, match="bytes, expected") as caught:
        verify_output(out)
    assert caught.value.where == str(paths[1])


def test_an_input_that_is_missing_or_renamed_is_named(tmp_path):
    """What is missing is named, and a file of its size is offered."""
    paths, out, _ = made(tmp_path, "pt")
    merge_checkpoints(paths, out)
    os.rename(paths[2], tmp_path / "renamed.pt")
    with pytest.raises(MergeError, match=r"its input c2.pt is not in") as caught:
        verify_output(out)
    assert "renamed.pt has the same size" in caught.value.hint
    (tmp_path / "renamed.pt").unlink()
    with pytest.raises(MergeError, match=r"c2.pt is not in") as caught:
        verify_output(out)
    assert "--inputs" in caught.value.hint


@pytest.mark.parametrize("folder", ["run", "run/checkpoints [1]"])
def test_inputs_in_a_run_beside_the_output_are_found_for_the_hint(tmp_path, folder):
    """Where all lie in one folder below, the hint names it; where one is missing, it does not."""
    below = tmp_path / folder
    below.mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    for number in (1, 2):
        torch.save({"w": torch.full((2,), float(number))}, below / f"c{number}.pt")
    merge_checkpoints([below / "c1.pt", below / "c2.pt"], tmp_path / "o.pt")
    with pytest.raises(MergeError, match=r"c1\.pt is not in") as caught:
        verify_output(tmp_path / "o.pt")
    assert caught.value.hint.endswith(f": --inputs {below}")
    assert verify_output(tmp_path / "o.pt", below).inputs == (below / "c1.pt", below / "c2.pt")
    (below / "c2.pt").unlink()
    with pytest.raises(MergeError) as caught:
        verify_output(tmp_path / "o.pt")
    assert caught.value.hint.endswith(": --inputs DIR")


def test_inputs_may_have_moved_together(tmp_path, monkeypatch):
    """Inputs are named from the directory of all, wherever that is by now."""
    runs = tmp_path / "runs"
    for fold in range(3):
        (runs / f"fold{fold}").mkdir(parents=True)
        torch.save(state(fold), runs / f"fold{fold}" / "model.pt")
    paths = sorted(runs.rglob("*.pt"))
    merge_checkpoints(paths, tmp_path / "o.pt")
    runs.rename(tmp_path / "moved")
    assert verify_output(tmp_path / "o.pt", tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "moved")
    assert verify_output("../o.pt")


def test_each_of_several_averages_verifies_alone(tmp_path):
    """Averages that were made in one reading, a template that is not averaged, and any options."""
    paths, _, _ = made(tmp_path, "pt")
    rows = {tmp_path / f"without{k}.pt": [int(i != k) for i in range(3)] for k in range(3)}
    merge_checkpoints(paths, rows)
    assert [len(verify_output(path).inputs) for path in rows] == [2, 2, 2]
    out = tmp_path / "o.pt"
    options = {"weights": [1, "0.5", "-1/3"], "normalize": False, "dtype": "bfloat16"}
    merge_checkpoints(paths, out, exclude=["layer1*"], int_policy="max", **options)
    assert verify_output(out)
    merge_checkpoints(paths, out, overwrite=True, hashes=False, agreement=False, missing="skip")
    assert not verify_output(out).hashed


def saved(content, path):
    """Saves without the record that differs whenever some byte of the content does."""
    torch.save(content, path)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            if not name.endswith("serialization_id"):
                archive.writestr(zipfile.ZipInfo(name), data)


@pytest.mark.parametrize("missing", ["skip", "available"])
@pytest.mark.parametrize("weights", [[1, 1, 0], [0, 1, 1]])
def test_a_checkpoint_without_weight_keeps_its_say(tmp_path, missing, weights):
    """One with the weight zero, that lacks a tensor, is an input where that decides something."""
    paths, out, _ = made(tmp_path, "safetensors")
    fewer = state(2)
    del fewer["layer3.weight"]
    save_file(fewer, paths[2])
    merge_checkpoints(paths, out, weights=weights, missing=missing)
    assert set(verify_output(out).inputs) == set(paths)
    rows = {tmp_path / f"without{k}.safetensors": [int(i != k) for i in range(3)] for k in range(3)}
    merge_checkpoints(paths, rows, missing=missing)
    assert all(verify_output(path).hashed for path in rows)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["record", "text", "skipped", "gap", "file"])
def test_what_is_kept_of_the_template_is_hashed(tmp_path, kind):
    """Where the template changed beside its weights, it is blamed and not the output."""
    directory = kind == "file"
    paths, out, _ = made(tmp_path, "shards" if directory else "pt")
    big = torch.arange(300_000.0)

    def template(change):
        values = {"a": big[:1000], "b": big[200_000:], "kept": torch.full((70_000,), 1.0)}
        values["kept"][69_000] += change == "skipped"
        big[100_000] = 5.0 if change == "gap" else 100_000.0
        beside = {"m": torch.full((5,), 2.0 + (change == "record"))}
        epoch = 7 + (change == "text")
        saved({"state_dict": values, "optimizer": beside, "epoch": epoch}, paths[0])

    options = {"weights": [0, 1, 1]}
    if not directory:
        for path in paths:
            template(None)
            path.write_bytes(paths[0].read_bytes())
        options["exclude"] = ["kept"]
    merge_checkpoints(paths, out, **options)
    assert verify_output(out).hashed
    if directory:
        (paths[0] / "config.json").write_text("[]")
    else:
        template(kind)
    with pytest.raises(MergeError, match="beside its weights it is not what") as caught:
        verify_output(out, max_memory=12 << 20)
    assert caught.value.where == str(paths[0])


def test_holes_in_what_is_averaged_are_hashed(tmp_path):
    """Elements of the template between those of a strided tensor are told by its hash too."""
    paths = [tmp_path / f"{fold}.pt" for fold in range(3)]
    big, small = torch.arange(90_000.0), torch.ones(5_000)
    for path in paths:
        saved({"a": big[::2], "b": small}, path)
    out = tmp_path / "o.pt"
    merge_checkpoints(paths, out, weights=[0, 1, 1])
    assert verify_output(out, max_memory=12 << 20).hashed
    big[1001] = 0.0
    saved({"a": big[::2], "b": small}, paths[0])
    with pytest.raises(MergeError, match="beside its weights") as caught:
        verify_output(out)
    assert caught.value.where == str(paths[0])


def test_a_file_that_does_not_belong_to_an_output_is_named(tmp_path):
    """A stray file in a directory is what fails, by name."""
    paths, out, _ = made(tmp_path, "shards")
    merge_checkpoints(paths, out)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(MergeError, match="its inputs give no such file") as caught:
        verify_output(out)
    assert caught.value.where == str(out / "notes.txt")


def test_each_input_is_read_once(tmp_path):
    """Hashes come from the one reading, though windows be far smaller than what is hashed."""
    paths = []
    for fold in range(3):
        generator = torch.Generator().manual_seed(fold)
        paths.append(tmp_path / f"{fold}.safetensors")
        save_file({"a": torch.randn(1_000_000, generator=generator)}, paths[-1])
    script = (
        "import os, sys\n"
        "from merge_avg import merge_checkpoints\n"
        "def count(): return int(open('/proc/self/io').read().split()[1])\n"
        "before = count()\n"
        "result = merge_checkpoints(sys.argv[1:], 'o.safetensors', max_memory=11 << 20)\n"
        "assert result.job.budget.window < 1 << 16, result.job.budget\n"
        "print(count() - before)\n"
    )
    command = [sys.executable, "-c", script, *map(str, paths)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 12_000_000 + 1_000_000
    assert verify_output(tmp_path / "o.safetensors").hashed


def test_another_version_is_told(tmp_path):
    """An output of another version is compared all the same, and the hint names both."""
    out = damaged(tmp_path, lambda record: record | {"merge_avg": "99.0"})
    with pytest.raises(MergeError, match="bytes are not what") as caught:
        verify_output(out)
    assert "merge-avg 99.0 made it" in caught.value.hint


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_equal_merges_give_equal_bytes(tmp_path, suffix):
    """Nothing in an output tells when, where, in which order or in how many threads it was made."""
    outputs = []
    for place, options in (("a", {}), ("b", {"threads": 3}), ("c", {"max_memory": 9 << 20})):
        folder = tmp_path / place
        folder.mkdir()
        paths, out, _ = made(folder, suffix)
        if place == "b":
            paths = [paths[0], paths[2], paths[1]]
        merge_checkpoints(paths, out, **options)
        outputs.append(out.read_bytes())
    assert len(set(outputs)) == 1


@pytest.mark.parametrize(("off", "fine"), [(1e-6, True), (-1e-6, True), (1e-4, False)])
def test_the_last_digit_of_the_agreement_may_be_another_machines(tmp_path, off, fine):
    """Sums that are rounded otherwise change its sixth place; more than that is a difference."""
    paths, out, _ = made(tmp_path, "safetensors")
    figure = merge_checkpoints(paths, out).agreement.mean
    there, other = (f"{one:+.6f}".encode() for one in (figure, figure + off))
    content = out.read_bytes()
    assert content.count(there) == 1
    out.write_bytes(content.replace(there, other))
    if fine:
        assert verify_output(out).hashed
    else:
        with pytest.raises(MergeError, match="bytes are not what its inputs give"):
            verify_output(out)


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(
        st.sampled_from([1, 7, 1000, 131_072, 140_000, 270_000]), min_size=1, max_size=4
    ),
    threads=st.integers(1, 3),
    window=st.sampled_from([10, 13, 16, 17]),
)
def test_hashes_do_not_depend_on_windows(tmp_path_factory, sizes, threads, window):
    """However large the windows are, smaller than chunks of some dtype too, hashes stay."""
    folder = tmp_path_factory.mktemp("hashes")
    paths = []
    for fold in range(2):
        generator = torch.Generator().manual_seed(fold)
        values = {
            str(i): torch.randn(size, generator=generator).to([torch.float32, torch.float16][i % 2])
            for i, size in enumerate(sizes)
        }
        paths.append(folder / f"{fold}.safetensors")
        save_file(values, paths[-1])
    first = merge_checkpoints(paths, folder / "a.safetensors").hashes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(budget, "_LARGEST_WINDOW", 4 << window)
        result = merge_checkpoints(paths, folder / "b.safetensors", threads=threads)
    assert result.job.budget.window == 1 << window
    assert result.hashes == first
    assert len({*first.read, first.kept}) == 3


def test_gaps_of_a_storage_are_hashed_nowhere(tmp_path):
    """What an output leaves out is in no hash, whatever the budget was."""
    paths = []
    for fold in range(2):
        generator = torch.Generator().manual_seed(fold)
        base = torch.randn(90_000, generator=generator)
        paths.append(tmp_path / f"{fold}.pt")
        torch.save({"a": base[:40_000], "b": base[50_000:]}, paths[-1])
    out = tmp_path / "o.safetensors"
    merge_checkpoints(paths, out, max_memory=12 << 20)
    assert verify_output(out).hashed


def damaged(folder, change):
    """An output whose record was changed."""
    paths, out, _ = made(folder, "safetensors")
    merge_checkpoints(paths, out)
    record = json.loads(dict(scan(out).metadata)[PROVENANCE])
    save_file(state(0), out, metadata={PROVENANCE: json.dumps(change(record))})
    return out


@pytest.mark.parametrize(
    "change",
    [
        lambda record: [],
        lambda record: record | {"inputs": []},
        lambda record: record | {"inputs": [{"name": "/etc/passwd"}]},
        lambda record: record | {"template": record["template"] | {"name": "../c0.safetensors"}},
        lambda record: record | {"template": 5},
        lambda record: record | {"missing": "everything"},
        lambda record: record | {"max_shard_size": float("inf")},
        lambda record: record | {"inputs": record["inputs"] * 5000},
        lambda record: record | {"inputs": [record["inputs"][0] | {"bytes": "x"}]},
        lambda record: record | {"inputs": [record["inputs"][0] | {"hash": "xyz"}]},
        lambda record: {key: value for key, value in record.items() if key != "normalize"},
    ],
)
def test_records_that_lie_are_refused(tmp_path, change):
    """A record that was tampered with is one error, and nothing outside is looked at."""
    with pytest.raises(MergeError, match="damaged"):
        verify_output(damaged(tmp_path, change))


@pytest.mark.parametrize("weight", ["nan", "1/0", "-1", "1e999999999"])
def test_odd_weights_in_a_record_are_refused(tmp_path, weight):
    """Weights that are none are an error too."""

    def change(record):
        return record | {"inputs": [one | {"weight": weight} for one in record["inputs"]]}

    with pytest.raises(MergeError):
        verify_output(damaged(tmp_path, change))


def test_what_says_nothing_cannot_be_verified(tmp_path):
    """A checkpoint that no merge wrote is an error with a word of why."""
    torch.save(state(0), tmp_path / "a.pt")
    with pytest.raises(MergeError, match="does not say what it was made of"):
        verify_output(tmp_path / "a.pt")


FROZEN = {
    "é0.safetensors": (
        b"c-kvqfPiYHJSD4YrIeD&f>b3dB~LRGB^{;Wj6@JG+Avl}DJ8KaF+M*ntvI!$7${_*V-"
        b"Z`cqg0Np$<5dZNs}?ACJP-SgV@?y1t4H&fPn^kAh93B0swuPBj*"
    ),
    "é1.safetensors": (
        b"c-kvqfPiYHJSD4YrIeD&f>b3dB~LRGB^{;Wj6@JG+Avl}DJ8KaF+M*ntvI!$7${_*V-"
        b"Z`cqg0Np$<5dZNs}?ACJP-SgV@?y1t4H&fB^>wAhEw`#cy)}flnp`"
    ),
    "o.safetensors": (
        b"c-"
        b"oy(&5qk35MHT=zJ|rA2P+G<<Hb4kRH@GpM`$oZf@)*S;AYb(Z&tOhR*aL~Na>}W17ber<D0)vAD*I}i4YxnP~b"
        b"rbvN;poj~#fjA%iC=>2TbmfbaVNoa=YDCYz)tbj4P*CTX}DJ51iq@HWI*=x_<C>xojV=*odckJk00TNv`>F%no"
        b"oXa9(1fA9;7Jr_&R0o-AMcnKVuGE=+&UUHR5%~VNclS57!4{2P|<ZsgK-"
        b"=y<L=}O5W(^5%URZ0Qm8XG_;=~_df)*=3~n;9Ovp#>l1|Fa42qU;6bI%B-"
        b"ylva$fQmQPIRo<|yl!!~cHG%zz*rB~<Z=WHFwtR2rVYcQ+%)^fp&Y<$AAp&-4+Zp(Vr+c?E&KY|hF^*$D-"
        b"bU=j(6^>JJv=!d$`;BrF%1o^i%QV8{ZZK7YGcjPm$$bLUWGfrsD!)bchfhvX(tt-ZR{()-"
        b"T{|TH?i}k#yY}Yel3fzso}5L+p=9s;x_kMJM=C<H08TMI^L7M<k=l5e<blVqr1yx>1Oir>1N62aQv3Pe!lzxO~"
        b"d=H"
    ),
    "o.pt": (
        b"c-"
        b"o~^OK;Oa5Z)#w4M8f80~Lrv<x`PL>UA2&DUVhG<v@@KMW70(thK#KOgDD0*A1mqLP8w4Ax>Q2A8_W#KR`lAoVa"
        b"m7ocIgu*r~CN`XFp%J3F44@7ta6x9wJb5}{%d{WVUYQ;2wG&)%d97U85k*kH}ZG`g1>&vK^eGDb~qyN+MF=~>j"
        b"H)-~JYrSq$EYZD@oV{%vIDeD2ZnP1X9Y6Ld3bWR=L_4G}pG&i?4B^-"
        b"U>N4hj}FWqpR?(N7@3iHTod2u%f!F8DNTi1c*Tr?RyUhYGNuZCHM<FRQpnM*iUQ;cxTD4%4MKQyDD+-^-"
        b"3TkP2T72yq6d(V2zpo?)m${pA16RvMk&licCjasHGhaMOReE9Y4Ik1ImZvtmg?GJ&`?&yTsU8heS-fUFH;h-"
        b")8f#u<&pE&`M+n2yev>X#Kwm5ZRH=B)%<E|YBvpHuJIJ~(0{Y*ii6!zsXjjp7=iUqmZSo#kFQ=`1VVDR;a3y{S"
        b"F7+gv-z|Dp>HUqSRK0d7hy7Fc6+`;QVjxNXOarf27-+)R9us^@+-Z{Abr_oZ3-KQRO-"
        b")6V`&<6_Ym=w09IFqzAE6HVCmZkYw$#w<-"
        b"_l4>Hw&ajLg_jQkS*CTl?2`_S<iZD6XhrbEi?Wyvsom{yaK{S@yzUXd2UATY8ZlMH(iVxPYL;Sju%*g|Ss@h}Y"
        b"qGR6KbytEV`3S!V^yuX)={f67AV!4Vpuh$Qmx2~6=G3oXI*%6+8;2&0q-"
        b"9dxr>8q)Tk<0Gc{SRV~kb9QWT?JF|nc=l!j}PNY|qjBmyFw1u`2BNa}!!G5ZMsb1$I6Wbv&*$iwJFf(w2dbW50"
        b"=fH5)Y+rDo*VYR5|xn5K)t`A&hn_DTf&&BF=OQ@|dcL?(VfiUI{b;or&wqu8j-"
        b"+j|3k9EICJWKZ@P9sFyF<D@N;l4DKVCU%L*s{I@4ZOPi_S03-"
        b"y>PW#6VS(T3n%6M#9vLFJz}%bNo}4<MZTIqdmRYbBuRZeo7U7E+DFv0d6F7=GL`3bB2TQ%+3=*mO{YKYJj%#wH"
        b"a00w>DV{fSe%Vb%FFRI?j*{}SvELX+SBPZCxX*@)NU0D^CPbd;<r1BnP)y1J#SC#o&tsN-"
        b"`%6pJUWn%6rz}7=pXt11_~}w76"
    ),
}


@pytest.mark.parametrize("output", ["o.safetensors", "o.pt"])
def test_an_old_output_verifies(tmp_path, output):
    """Outputs of the release 0.1.0, frozen here with their inputs, are what a merge gives today."""
    for name, packed in FROZEN.items():
        (tmp_path / name).write_bytes(zlib.decompress(base64.b85decode(packed)))
    record = read_record(scan(tmp_path / output))
    assert record.version == "0.1.0"
    assert [one.name for one in record.inputs] == ["é0.safetensors", "é1.safetensors"]
    found = verify_output(tmp_path / output)
    assert (found.hashed, found.nbytes) == (True, (tmp_path / output).stat().st_size)


@pytest.mark.parametrize("lies", ["c1", "o"])
@pytest.mark.parametrize("kind", ["safetensors", "shards"])
def test_the_safetensors_library_is_asked(tmp_path, monkeypatch, kind, lies):
    """The library checks the output and every input that is or holds safetensors, before work."""
    paths, out, options = made(tmp_path, kind)
    merge_checkpoints(paths, out, **options)
    asked = []

    def check(layout):
        asked.append(layout.path)
        if layout.path.name.startswith(lies) or layout.path.parent.name == lies:
            raise MergeError("another way", where=layout.path)

    monkeypatch.setattr(
        "merge_avg.formats.safetensors.check", lambda layout: asked.append(layout.path)
    )
    verify_output(out)
    files = [
        one
        for path in (out, *paths)
        for one in ([path] if path.is_file() else path.glob("*.safetensors"))
    ]
    assert set(files) <= set(asked)
    monkeypatch.setattr("merge_avg.formats.safetensors.check", check)
    with pytest.raises(MergeError, match="another way"):
        verify_output(out)


def test_the_command(tmp_path):
    """--verify prints the outputs, or JSON, and exits with 1 where something is not as it was."""
    paths, _, _ = made(tmp_path, "pt")

    def run(*options, what=("--verify", "o.pt")):
        command = [sys.executable, "-m", "merge_avg", *what, *options]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    report = json.loads(run("-o", "o.pt", "--json", what=map(str, paths)).stdout)
    assert len({one["hash"] for one in report["inputs"]}) == 3
    done = run()
    assert (done.returncode, done.stdout) == (0, "o.pt\n")
    assert "are what its 3 inputs give" in done.stderr
    (found,) = json.loads(run("--json", "--inputs", ".", "-q").stdout)
    assert found["inputs"] == ["c0.pt", "c1.pt", "c2.pt"]
    paths[0].unlink()
    done = run()
    assert done.returncode == 1
    assert "its input c0.pt is not in" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("writable", [True, False])
def test_scratch_lies_where_there_is_room(tmp_path, monkeypatch, writable):
    """Deflated inputs are unpacked beside the output, or where that cannot be, in TMPDIR."""
    paths = [tmp_path / f"{fold}.pt" for fold in range(2)]
    for fold, path in enumerate(paths):
        torch.save({"w": torch.full((500,), float(fold))}, tmp_path / "plain")
        with zipfile.ZipFile(tmp_path / "plain") as old:
            records = {name: old.read(name) for name in old.namelist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
            for name, data in records.items():
                new.writestr(name, data)
    (tmp_path / "plain").unlink()
    merge_checkpoints(paths, tmp_path / "out.pt")
    other = tmp_path / "tmp"
    other.mkdir()
    places = []
    real = tempfile.TemporaryFile

    def made(*args, dir=None, **options):  # noqa: A002 - as in tempfile
        places.append(str(dir))
        return real(*args, dir=dir, **options)

    monkeypatch.setattr(tempfile, "TemporaryFile", made)
    monkeypatch.setattr(tempfile, "tempdir", str(other))
    monkeypatch.setattr(os, "access", lambda *_: writable)
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert verify_output(tmp_path / "out.pt").hashed
    assert set(places) == {str(tmp_path if writable else other)}
    assert len(places) >= 2
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
