"""merge_avg.brief: results are a few lines in a console and in a notebook."""

import pytest
import torch

from merge_avg import merge_checkpoints, verify_output
from merge_avg.brief import Brief
from merge_avg.report.inspect import contents
from tests.helpers import noise


class Told(Brief):
    def __init__(self, *lines):
        self.lines = lines

    def brief(self):
        return iter(self.lines)


def test_a_value_is_a_headline_and_facts():
    """The first line follows the type's name, the others are indented below it."""
    assert repr(Told("two things", "one: 1", "two: 2")) == "Told: two things\n  one: 1\n  two: 2"


def test_names_from_strangers_stay_names():
    """Controls are escaped in both forms, and markup in the one of a notebook."""
    told = Told("\x1b[31m<script>\u202e")
    assert repr(told) == "Told: \\x1b[31m<script>\\u202e"
    assert told._repr_html_().endswith(">Told: \\x1b[31m&lt;script&gt;\\u202e</pre>")
    assert "pre-wrap" in told._repr_html_()  # as a warning is a long line


def test_much_is_shortened():
    """A text of a million letters, and a thousand lines, take a few."""
    told = Told("a" * 10**6 + "end", *["x"] * 1000)
    assert len(repr(told)) < 1000
    assert repr(told).splitlines()[0].endswith("end")
    assert repr(told).endswith("x\n  ... 985 more")


@pytest.mark.parametrize("layers", [2, 500])
def test_results_are_small_whatever_the_models(tmp_path, layers):
    """The result of a merge of 500 tensors is shown in as few lines as that of two."""
    for fold in range(2):
        state = {f"layer{k}.weight": noise(fold + 2 * k, 8, 8) for k in range(layers)}
        torch.save(state, tmp_path / f"{fold}.pt")
    result = merge_checkpoints([tmp_path / "0.pt", tmp_path / "1.pt"], tmp_path / "mean.pt")
    verified = verify_output(tmp_path / "mean.pt")
    held = contents(tmp_path / "0.pt")
    for value in (result, result.agreement, result.verdict, result.job, verified, held):
        assert len(repr(value)) < 1500
    for value in (result, held, verified):
        assert len(value._repr_html_()) < 2000
    assert repr(result).startswith("Result: 2 checkpoints averaged into '")
    assert "verdict: " in repr(result)
    assert f"bytes are what its 2 inputs give; their hashes are as recorded\n  {tmp_path}" in repr(
        verified
    )
    assert f"averaged: {layers} tensors ('layer0.weight', " in repr(held)
