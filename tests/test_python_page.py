"""The page of the Python API: its examples run, and it has every name and keyword there is."""

import doctest
import re
from dataclasses import fields
from pathlib import Path

import pytest

import merge_avg
from merge_avg.api import _KINDS, _Merging, _Selecting
from merge_avg.errors import MergeError, in_keywords
from merge_avg.options import choices, meanings

PAGE = (Path(__file__).parent.parent / ".github" / "PYTHON.md").read_text()
TAKES = {  # what is no single type
    "last": "a whole number, or several",
    "weights": "a list of numbers",
    "weights_for": "a mapping of patterns to such lists",
    "dtype": 'a name, as in `"float16"`, or a `torch.dtype`',
    "steps": "`(first, last)`, `(first, last, divisor)`, or one step",
    "epochs": "`(first, last)`, or one epoch",
    "sliding": "a whole number, or `(10, 5)` for every fifth",
    "device": "a text, or a `torch.device`",
    "max_shard_size": "bytes, or a text",
    "max_memory": "bytes, or a text",
    "part": 'a text, as in `"2/4"`, or `(2, 4)`',
}


class Masked(doctest.OutputChecker):
    """Outputs are alike whatever is read, and however fast."""

    def check_output(self, want, got, optionflags):
        want, got = (re.sub(r"\d[\d.,]*(?= (bytes|s|kB)\b)", "N", text) for text in (want, got))
        return super().check_output(want, got, optionflags)


def rows():
    """Yield the rows of the table of keywords, as the code has them."""
    types = {one.name: str(one.type).removeprefix("<class '") for one in fields(_Merging)}
    selecting = {one.name for one in fields(_Selecting)}
    for name, meaning in meanings(_Merging):
        allowed = " ".join(f'`"{one}"`' for one in choices(_Merging, name))
        kinds = (words for start, _, words in _KINDS if types[name].startswith(start))
        takes = TAKES.get(name) or allowed or next(kinds)
        star = " *" if name in selecting else ""
        default = repr(getattr(_Merging, name)).replace("'", '"')
        yield f"| `{name}`{star} | {takes} | `{default}` | {in_keywords(meaning.help)} |"


def test_every_keyword_is_in_the_table():
    """The table is that of the options: one that is added belongs here, as this failure has it."""
    table = PAGE.partition("| keyword | takes | by default | |\n|---|---|---|---|\n")[2]
    assert table.partition("\n\n")[0].splitlines() == [*rows()]


def test_every_name_is_on_the_page():
    """What `dir` lists is in the first table, and whatever values and errors have is below."""
    first = PAGE.partition("This is all of the API")[0]
    assert sorted(re.findall(r"`(\w+)`", first)) == sorted(merge_avg.__all__)
    values = ("Result", "Loaded", "Selection", "Contents", "Verification")
    for cls in (getattr(merge_avg, name) for name in values):
        part = PAGE.partition(f"### `{cls.__name__}`\n")[2].partition("\n#")[0]
        told = re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (.*?) \|", part, re.MULTILINE)))
        assert sorted(told) == sorted(one.name for one in fields(cls))
    part = PAGE.partition("## Errors and warnings")[2]
    error = MergeError("what")
    assert all(f"`{name}`" in part for name in {*vars(error), "message"})
    assert all(hasattr(merge_avg.RunningMean, name) for name in ("update", "extend", "result"))


@pytest.mark.filterwarnings("error::merge_avg.errors.MergeWarning")
def test_examples_run(tmp_path, monkeypatch):
    """They go on from one another in one directory, and give what is shown."""
    monkeypatch.chdir(tmp_path)
    blocks = re.sub(r"(?s)```pycon(\n.*?)```|[^\n]", lambda found: found[1] or "", PAGE)
    example = doctest.DocTestParser().get_doctest(blocks, {}, "PYTHON.md", "PYTHON.md", 0)
    told = []
    runner = doctest.DocTestRunner(Masked(), verbose=False, optionflags=doctest.ELLIPSIS)
    assert len(example.examples) > 30
    assert runner.run(example, out=told.append).failed == 0, "".join(told)


def test_anchors_lead_to_headings():
    """The links within the page are those that GitHub makes of its headings."""
    headings = re.findall(r"^#+ (.*)$", PAGE, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", one.lower()).replace(" ", "-") for one in headings}
    assert set(re.findall(r"\]\(#(.*?)\)", PAGE)) <= anchors
