"""merge_avg.cli._help: what a command says of itself."""

import os
import re
import textwrap

import pytest
import typer

from merge_avg.cli._app import app
from merge_avg.cli._help import COMMANDS, QUESTIONS
from tests.helpers import run_command

FORMER = {"inspect", "verify", "recipe", "inputs", "evaluation", "eval_json"}
NAMES = " ".join(QUESTIONS.values()).split()


def shown(*command, columns=80):
    environment = os.environ | {"COLUMNS": str(columns), "TERM": "dumb", "NO_COLOR": "1"}
    done = run_command(*command, "--help", env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def test_every_option_has_its_place():
    """Each option of the command answers one question, and the help has each but the former."""
    params = typer.main.get_command(app).params
    options = {one.name for one in params if one.param_type_name == "option"} | {"help"}
    assert len(NAMES) == len(set(NAMES))
    assert options - set(NAMES) == {"inspect", "verify", "recipe"}
    taken = {name for _, _, takes in COMMANDS.values() for name in takes.split()}
    assert taken <= options
    assert set(NAMES) <= options
    text = "\n".join(shown())
    for one in params:
        if one.param_type_name == "option":
            assert (re.search(rf"  .*{one.opts[0]}\b", text) is not None) == (
                one.name not in FORMER
            ), one.name


def test_everyday_options_fit_on_a_screen():
    """Usage, arguments and the first group take 24 lines of 80 columns, and no line is longer."""
    lines = shown()
    assert lines[0] == "Usage: merge-avg CHECKPOINT... -o OUTPUT [OPTIONS]"
    assert max(map(len, lines)) <= 80
    assert lines.index("Which checkpoints:") <= 25
    assert any(line.startswith("  -h, --help") for line in lines[:24])
    assert "verify, inspect and soup are commands" in " ".join(" ".join(lines[:24]).split())


def test_an_option_is_explained_in_two_lines():
    """On 80 columns no option's help takes more than two lines, beside a default."""
    text = "\n".join(shown()).partition("Options:\n")[2].partition("Commands,")[0]
    entries = re.findall(r"^  (-\S.*(?:\n {28}.*)*)", text, re.MULTILINE)
    assert len(entries) > 40
    for entry in entries:
        told = " ".join(re.split(r"\s{2,}|\n", entry)[1:]).partition("[default")[0]
        assert told
        assert len(textwrap.wrap(told, 50)) <= 2, told


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_is_as_wide_as_the_terminal(name):
    """A wider terminal has fewer and longer lines; a narrow one none that is longer than it."""
    wide, narrow = (shown(*name.split(), columns=columns) for columns in (150, 60))
    assert 75 < max(map(len, wide)) <= 150
    assert len(wide) < len(narrow)
    options = [line for line in narrow if line.startswith(" " * 28)]
    assert max(map(len, options)) <= 60


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_ends_with_exit_codes(name):
    """Each command has a help of its own, that ends with the exit codes."""
    lines = shown(*name.split())
    assert lines[0].startswith(f"Usage: {f'merge-avg {name}'.strip()} ")
    assert lines[-2].startswith("  Exit codes: 0 done, 1 refused")


@pytest.fixture
def completed(command, monkeypatch):
    """What a shell is told that the last of some words may become."""

    def complete(line):
        monkeypatch.setenv("_MERGE_AVG_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", line)
        monkeypatch.setenv("COMP_CWORD", str(line.count(" ")))
        code, out, err = command()
        assert (code, err) == (0, "")
        return out.split()

    return complete


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("merge-avg ver", ["verify", "version_3.ckpt"]),
        ("merge-avg so", ["soup"]),
        ("merge-avg a.pt ver", []),  # files, which the shell completes by itself
        ("merge-avg verify ver", []),
        ("merge-avg ", []),
        ("merge-avg --missing ", ["error", "skip", "available"]),
        ("merge-avg a.pt --mode m", ["min", "max"]),
        ("merge-avg a.pt --dtype f", ["float64", "float32", "float16"]),
        ("merge-avg inspect --", ["--key", "--json", "--help"]),
    ],
)
def test_shells_complete_commands_options_and_values(tmp_path, completed, line, words):
    """The first word may be a command or a file; an option's value is one of those it has."""
    (tmp_path / "version_3.ckpt").touch()
    assert completed(line) == words


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("-output o.pt", "-output\nhint: did you mean --output?"),
        ("-output=o.pt", "-output\nhint: did you mean --output?"),
        ("-o o.pt -weights 1,2", "-weights\nhint: did you mean --weights?"),
        ("-o o.pt -json", "-json\nhint: did you mean --json?"),
        ("-o o.pt -no-hashes", "-no-hashes\nhint: did you mean --no-hashes?"),
        ("-o o.pt -reprot r.html", "-reprot\nhint: did you mean --report?"),
        ("-help", "-help\nhint: did you mean --help?"),
    ],
)
def test_a_long_option_with_one_dash_is_refused(command, words, told):
    """It would be the value of a short one: -output an output called utput."""
    assert command("a.pt", *words.split()) == (2, "", f"error: no such option: {told}\n")


@pytest.mark.parametrize("words", ["-oo.pt", "-qfo o.pt", "-w-1,2 -oo.pt", "-oo.pt -- -last"])
def test_values_of_short_options_may_follow_at_once(command, words):
    """Letters may be joined, and what comes after two dashes is no option."""
    assert "no such option" not in command("a.pt", "b.pt", *words.split())[2]
