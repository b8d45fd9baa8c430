"""The table of options: everything else is derived from it, so it has to be complete."""

import json

import pytest

from merge_avg.errors import UsageError
from merge_avg.options import (
    RECORDED,
    REPORTED,
    Criteria,
    Options,
    Series,
    Weighting,
    choices,
    meanings,
    parse_range,
    parse_size,
)

CLASSES = [Options, Criteria, Series, Weighting]


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("512", 512),
        ("7B", 7),
        ("1K", 1024),
        ("64MiB", 64 << 20),
        ("1.5G", 3 << 29),
        ("1T", 1 << 40),
        ("3kb", 3000),
        ("2 gb", 2 * 10**9),
        (" 5GB ", 5 * 10**9),
    ],
)
def test_sizes_are_parsed(text, nbytes):
    """Units are decimal with B and binary with iB or alone."""
    assert parse_size(text) == nbytes


@pytest.mark.parametrize(
    "text",
    ["", "x", "-1", "1 XB", "1e3", "MiB", "1iB", "1.G", "1 2", "0", "0.1", "8388608T", "9" * 400],
)
def test_other_texts_are_not_sizes(text):
    """Any other text is a usage error whose hint has an example."""
    with pytest.raises(UsageError, match="is not a size") as raised:
        parse_size(text)
    assert "512MiB" in raised.value.hint


@pytest.mark.parametrize(
    ("text", "bounds"),
    [
        ("100:200", (100, 200, None)),
        ("100:", (100, None, None)),
        (":200", (None, 200, None)),
        (":", (None, None, None)),
        ("100:200:50", (100, 200, 50)),
        ("::50", (None, None, 50)),
        ("100", (100, 100, None)),
        (" 1 : 2 ", (1, 2, None)),
        ("0:0", (0, 0, None)),
    ],
)
def test_ranges_are_parsed(text, bounds):
    """Each bound may be left out, and one number is both."""
    assert parse_range(text) == bounds


@pytest.mark.parametrize("text", ["", "a:b", "1:2:3:4", "-5:", "1.5:2", "1-2", "1:2:-3"])
def test_other_texts_are_not_ranges(text):
    """Any other text is a usage error whose hint has examples."""
    with pytest.raises(UsageError, match="is not understood") as raised:
        parse_range(text)
    assert "1000:5000" in raised.value.hint


@pytest.mark.parametrize("text", ["2:1", "1:2:0", "5::0"])
def test_empty_ranges_are_refused(text):
    """A range without a number, and one without steps, are wrong usage too."""
    with pytest.raises(UsageError, match="is empty"):
        parse_range(text)


def test_what_is_recorded():
    """Outputs have these options in their provenance, in this order: their bytes depend on it."""
    order = "normalize dtype key missing int_policy state_dict allow_nonfinite max_shard_size"
    assert " ".join(RECORDED) == f"{order} include exclude weights_only weights_for lora"


def test_what_is_reported():
    """The report has what decides the values, and the device; not how the output is split up."""
    assert set(REPORTED) == {*RECORDED, "device"} - {"max_shard_size"}


@pytest.mark.parametrize("cls", CLASSES)
def test_every_option_has_help(cls):
    """Each field that has a meaning says it in a sentence or two."""
    found = dict(meanings(cls))
    assert found
    for name, meaning in found.items():
        assert meaning.help.strip(), name
        assert meaning.help.endswith((".", "--metric.")), name


def test_every_field_of_options_has_a_meaning():
    """None is forgotten: the command, the library and the provenance are made from meanings."""
    assert list(dict(meanings(Options))) == list(Options.__dataclass_fields__)


def test_recorded_options_are_plain_values():
    """The defaults of recorded options go into JSON, and come back as they were."""
    values = {name: getattr(Options(), name) for name in RECORDED}
    texts = {"include": [], "exclude": [], "weights_for": []}
    assert json.loads(json.dumps(values)) == {**values, **texts}


def test_choices_are_those_of_the_type():
    """A Literal type lists its values; other types, and unions of several, have no list."""
    assert choices(Options, "missing") == ("error", "skip", "available")
    assert choices(Options, "int_policy") == ("error", "template", "max", "mean")
    assert choices(Options, "key") == choices(Options, "dtype") == choices(Options, "include") == ()
    assert choices(Criteria, "mode") == ("min", "max")  # or None
    assert choices(Options, "fail_on") == ("drifted", "strangers")


def test_defaults_ask_for_nothing():
    """Without options all checkpoints are taken, equally, into one output."""
    assert Criteria().empty
    assert Criteria(mode="min").empty  # which alone chooses nothing
    assert not Criteria(best=1).empty
    assert not Series().several
    assert not Series(lasts=(3,)).several
    assert Series(lasts=(3, 5)).several
    assert Weighting() == Weighting(weights=None, scheme=None, sigma=None)
