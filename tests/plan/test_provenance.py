"""merge_avg.plan: the provenance record, written and read."""

import json
import zipfile
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from merge_avg import merge_checkpoints
from merge_avg.arithmetic import Weights
from merge_avg.checkpoint import PROVENANCE, File, Layout
from merge_avg.errors import MergeError
from merge_avg.formats import scan
from merge_avg.io import leads_elsewhere
from merge_avg.options import RECORDED, Options
from merge_avg.plan import Hashes, read_record
from merge_avg.plan._provenance import write_record

MOST = (1 << 128) - 1


def layout(path, nbytes=10):
    """A checkpoint that is known by path and size only."""
    path = Path(path)
    return Layout(path, "?", (File(path, nbytes, 0, 0, 0),), ())


def read(record):
    """What is read of an output with this record."""
    text = record.decode() if isinstance(record, bytes) else record
    return read_record(Layout(Path("o"), "?", (), (), metadata=((PROVENANCE, text),)))


texts = st.text(st.characters(codec="utf-8"), max_size=20)
recorded = st.fixed_dictionaries(
    {
        "normalize": st.booleans(),
        "dtype": st.sampled_from([None, "float32", "template"]),
        "key": st.none() | texts,
        "missing": st.sampled_from(["error", "skip", "available"]),
        "int_policy": st.sampled_from(["error", "template", "max", "mean"]),
        "state_dict": st.booleans(),
        "allow_nonfinite": st.booleans(),
        "max_shard_size": st.none() | st.integers(1, 1 << 60),
        "include": st.lists(texts, max_size=3).map(tuple),
        "exclude": st.lists(texts, max_size=3).map(tuple),
        "weights_only": st.booleans(),
        "weights_for": st.lists(texts, max_size=3).map(tuple),
        "lora": st.sampled_from(["factors", "exact", "rank:8"]),
    }
)
names = st.text(st.characters(codec="utf-8", exclude_characters="/\x00"), min_size=1, max_size=9)
hashes = st.integers(0, MOST)


@given(recorded, st.booleans(), st.booleans())
def test_options_are_read_as_they_were_written(values, agreement, hashed):
    """Each recorded option has its value again, and whether hashes and agreement were wanted."""
    assert set(values) == set(RECORDED)
    options = Options(**values, agreement=agreement, hashes=hashed)
    record = write_record([layout("/a")], Weights.uniform(1), options)
    assert read(record).options == options


@given(
    # Of those that stay in a directory: on Windows a backslash leads elsewhere.
    st.lists(
        names.filter(lambda name: not leads_elsewhere(name)), min_size=1, max_size=4, unique=True
    ),
    st.data(),
)
def test_inputs_are_read_as_they_were_written(paths, data):
    """Names of any characters, sizes, weights and hashes of the inputs are read again."""
    layouts = [layout(f"/folder/{name}", k) for k, name in enumerate(paths)]
    count = len(paths)
    weights = Weights.of(data.draw(st.lists(st.integers(1, 9), min_size=count, max_size=count)))
    found = Hashes(tuple(data.draw(hashes) for _ in paths), data.draw(hashes))
    record = read(write_record(layouts, weights, Options(), "9.9", found, 0.5))
    assert record.version == "9.9"
    assert (record.template.name, record.template.hash) == (paths[0], found.kept)
    inputs = {one.name: (one.nbytes, one.hash, one.weight) for one in record.inputs}
    assert inputs == {
        name: (k, found.read[k], Fraction(weights.integers[k], weights.total))
        for k, name in enumerate(paths)
    }
    assert record.all == (*record.inputs, record.template)


@given(
    st.lists(names, min_size=1, max_size=4, unique=True),
    st.none() | st.lists(hashes, min_size=5, max_size=5),
    st.none() | st.floats(-1, 1),
)
def test_a_draft_is_as_long_as_the_record(paths, found, agreement):
    """Whatever hashes and agreement turn out to be, the record is as long as it was laid out."""
    layouts = [layout(f"/folder/{name}") for name in paths]
    weights, options = Weights.uniform(len(paths)), Options()
    draft = write_record(layouts, weights, options)
    read = None if found is None else Hashes(tuple(found[: len(paths)]), found[-1])
    assert len(write_record(layouts, weights, options, hashes=read, agreement=agreement)) == len(
        draft
    )


def test_the_record_has_one_length():
    """The same for the smallest and the largest hashes, and for an agreement of either sign."""
    layouts = [layout(f"/c{k}.pt") for k in range(3)]
    lengths = {
        len(write_record(layouts, Weights.uniform(3), Options(), "0", found, agreement))
        for found in (None, Hashes((0,) * 3, 0), Hashes((MOST,) * 3, MOST))
        for agreement in (None, 1.0, -1.0, 0.123456789, -1e-9)
    }
    assert len(lengths) == 1


def test_inputs_are_named_from_the_directory_of_all():
    """Moving all inputs changes nothing, nor does the order in which they are given."""
    weights = Weights.of([1, 2])
    first = write_record([layout("/x/a/m.pt"), layout("/x/b/m.pt")], weights, Options())
    assert write_record([layout("/y/a/m.pt"), layout("/y/b/m.pt")], weights, Options()) == first
    names = [one["name"] for one in json.loads(first)["inputs"]]
    assert names == ["a/m.pt", "b/m.pt"]
    other = write_record([layout("/x/b/m.pt"), layout("/x/a/m.pt")], Weights.of([2, 1]), Options())
    assert json.loads(other)["inputs"] == json.loads(first)["inputs"]


def test_a_draft_holds_zeros():
    """What is not known yet is zero, and neither a hash nor an agreement is there unasked."""
    draft = json.loads(write_record([layout("/a")], Weights.uniform(1), Options()))
    assert (draft["template"]["hash"], draft["inputs"][0]["hash"]) == ("0" * 32,) * 2
    assert draft["agreement"] == "+0.000000"
    options = Options(hashes=False)
    found = Hashes((1,), 2)
    record = json.loads(
        write_record([layout("/a")], Weights.uniform(1), options, "0", found, 0.5, compared=False)
    )
    assert (record["template"]["hash"], record["inputs"][0]["hash"]) == (None, None)
    assert record["agreement"] is None


@pytest.mark.parametrize(("missing", "named"), [("error", ["b"]), ("skip", ["a", "b"])])
def test_a_weight_of_zero_is_named_where_it_had_a_say(missing, named):
    """A checkpoint without weight decides what others lack, unless that is an error anyway."""
    options = Options(missing=missing)
    found = Hashes((1, 2), 3)
    record = read(
        write_record([layout("/a"), layout("/b")], Weights.of([0, 1]), options, "0", found)
    )
    assert [one.name for one in record.inputs] == named
    assert (record.template.name, record.template.hash) == ("a", 3)
    assert {one.name: one.hash for one in record.inputs}["b"] == 2
    assert all(one.hash is None for one in record.inputs if one.name == "a")


OLD = (
    '{"merge_avg": "0.1.0", "inputs": [{"name": "fold0.pt", "bytes": 140, "weight": "1/4", "hash": '
    '"86a8ac62d84a868d2bf1d60bc3a30180"}, {"name": "fold1.pt", "bytes": 141, "weight": "3/4", '
    '"hash": "9db42fbdbb99ddaa3fecaea605fa4d54"}], "template": {"name": "fold0.pt", "bytes": 140, '
    '"hash": "17eb5218c80091116bd22b93c126bee0"}, "agreement": "n/a      ", "normalize": true, '
    '"dtype": null, "key": null, "missing": "error", "int_policy": "error", "state_dict": false, '
    '"allow_nonfinite": false, "max_shard_size": null, "include": [], "exclude": []}'
)


def test_an_old_record_is_read_and_would_be_written_again():
    """A record of the release 0.1.0 has the meaning, and the bytes, that records have today."""
    record = read(OLD)
    assert record.options == replace(Options(), agreement=True, hashes=True)
    assert [one.weight for one in record.inputs] == [Fraction(1, 4), Fraction(3, 4)]
    layouts = [layout(f"/runs/{one.name}", one.nbytes) for one in record.inputs]
    found = Hashes(tuple(one.hash or 0 for one in record.inputs), record.template.hash or 0)
    again = write_record(layouts, Weights.of(["1/4", "3/4"]), record.options, "0.1.0", found)
    assert again.decode() == OLD


def changed(**values):
    return json.dumps(json.loads(OLD) | values)


TEMPLATE = json.loads(OLD)["template"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "[" * 100_000,
        changed(inputs=[]),
        changed(inputs=[TEMPLATE]),
        changed(template=TEMPLATE | {"name": "../x"}),
        changed(template=TEMPLATE | {"name": "/etc/passwd"}),
        changed(template=TEMPLATE | {"name": ""}),
        changed(template=TEMPLATE | {"hash": "xyz"}),
        changed(template=TEMPLATE | {"bytes": "x"}),
        changed(missing="everything"),
        changed(int_policy=["max"]),
        changed(key=5),
        changed(include=[5]),
        changed(max_shard_size="x"),
        changed(merge_avg=1),
        changed(merge_avg="1" * 10_001),
        changed(inputs=[TEMPLATE | {"weight": one} for one in ("1/2", "1/3")]),
        changed(inputs=[TEMPLATE | {"weight": "1/0"}]),
        changed(inputs=[TEMPLATE | {"weight": "1"}]),
        changed(inputs=[TEMPLATE | {"weight": f"1/{'9' * 5000}"}]),
        changed(template=TEMPLATE | {"bytes": float("inf")}),
        "{" + "9" * 5000,
        json.dumps({key: value for key, value in json.loads(OLD).items() if key != "normalize"}),
    ],
)
def test_a_damaged_record_is_one_error(text):
    """Whatever is wrong with the text, and wherever its names lead, it is refused as damaged."""
    with pytest.raises(MergeError, match=r"^o: its provenance record is damaged"):
        read(text)


def test_the_most_that_a_record_may_hold():
    """Ten thousand inputs, and texts of as many characters, are read, and not one more."""
    one = TEMPLATE | {"weight": "1/2"}
    assert len(read(changed(inputs=[one] * 10_000)).inputs) == 10_000
    assert read(changed(merge_avg="1" * 10_000)).version == "1" * 10_000
    for text in (changed(inputs=[one] * 10_001), changed(inputs=[one | {"weight": "1/2/2"}])):
        with pytest.raises(MergeError, match="damaged"):
            read(text)
    assert read(OLD).template.weight == 0


def test_no_record_is_an_error_with_a_hint():
    """A checkpoint that no merge wrote says so."""
    with pytest.raises(MergeError, match="does not say what it was made of") as caught:
        read_record(layout("a.pt"))
    assert "only outputs of merge-avg" in str(caught.value.hint)


def test_the_record_can_be_read_by_others(tmp_path):
    """It is a JSON record of the archive, with the inputs, their hashes and the agreement."""
    paths = [tmp_path / f"c{k}.pt" for k in range(3)]
    for k, path in enumerate(paths):
        generator = torch.Generator().manual_seed(k)
        torch.save({"w": torch.randn(40, 30, generator=generator)}, path)
    result = merge_checkpoints(paths, tmp_path / "o.pt")
    with zipfile.ZipFile(tmp_path / "o.pt") as archive:
        name = next(name for name in archive.namelist() if name.endswith("merge_avg.json"))
        record = json.loads(archive.read(name))
    assert [one["name"] for one in record["inputs"]] == ["c0.pt", "c1.pt", "c2.pt"]
    assert [int(one["hash"], 16) for one in record["inputs"]] == list(result.hashes.read)
    assert abs(float(record["agreement"]) - result.agreement.mean) < 1e-6
    assert read_record(scan(tmp_path / "o.pt")).template.name == "c0.pt"
