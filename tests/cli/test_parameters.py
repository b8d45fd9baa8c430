"""merge_avg.cli._parameters: options classes become the command's parameters, and back."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import typer
from typer.testing import CliRunner

from merge_avg.cli._app import app
from merge_avg.cli._parameters import Action, Display, SoupOptions, expanded
from merge_avg.errors import UsageError
from merge_avg.options import Criteria, Options, Series, Weighting, meanings, option, parse_size


@dataclass(frozen=True, kw_only=True)
class Louder(Options):
    """The options of a merge, and one more: a single field."""

    volume: int | None = option(None, "How loud it is.", metavar="N")


@dataclass(frozen=True, kw_only=True)
class Kinds:
    """An option of each kind."""

    off: bool = option(False, "Off unless asked for.")
    on: bool = option(True, "On unless told otherwise.")
    size: int | None = option(None, "A size.", parse=parse_size)
    choice: Literal["a", "b"] = option("a", "One of two.")
    perhaps: Literal["a", "b"] | None = option(None, "One of two, or none.")
    first: Literal["a", "b"] | str | None = option(None, "The command takes the first type.")
    where: str | Path | int | None = option(None, "Text, as the first of its types.")
    folder: Path | None = option(None, "A path.", names=("--folder", "-f"))
    texts: Sequence[str] = option((), "Several texts.", names=("--text",))
    numbers: tuple[int, ...] = option((), "Several numbers.", names=("--number",))
    hidden: int = option(0, "Of the library only.", command=False)


def given(cls, *arguments):
    """Run a command that takes the options of a class; return them, or the exit code."""
    seen = []

    def command(*, options: cls) -> None:
        seen.append(options)

    of_its_own = typer.Typer(rich_markup_mode=None)
    of_its_own.command()(expanded(command))
    done = CliRunner().invoke(of_its_own, arguments)
    if isinstance(done.exception, UsageError):
        raise done.exception
    return seen[0] if seen else done.exit_code


def test_a_new_option_is_one_field():
    """A field added to the options is a parameter of the command, and its value arrives."""
    assert given(Louder, "--volume", "11", "--missing", "skip") == Louder(volume=11, missing="skip")


def test_without_arguments_the_options_are_their_defaults():
    """What is not given is as the class has it."""
    for cls in (Kinds, Options, Criteria, Series, Weighting, SoupOptions, Action, Display):
        assert given(cls) == cls()


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (["--off"], Kinds(off=True)),
        (["--no-on"], Kinds(on=False)),
        (["--size", "2K"], Kinds(size=2048)),
        (["--choice", "b"], Kinds(choice="b")),
        (["--perhaps", "b"], Kinds(perhaps="b")),
        (["--first", "b"], Kinds(first="b")),
        (["--where", "./3"], Kinds(where="./3")),
        (["--folder", "./a"], Kinds(folder=Path("a"))),
        (["-f", "a"], Kinds(folder=Path("a"))),
        (["--text", "a", "--text", "b"], Kinds(texts=("a", "b"))),
        (["--number", "3", "--number", "5"], Kinds(numbers=(3, 5))),
    ],
)
def test_text_becomes_values(arguments, options):
    """Each kind of field is converted from text, and changes nothing but its own value."""
    assert given(Kinds, *arguments) == options


@pytest.mark.parametrize(
    "arguments",
    [
        ["--on"],
        ["--no-off"],
        ["--choice", "c"],
        ["--first", "c"],
        ["--number", "x"],
        ["--hidden", "1"],
        ["--texts", "a"],
    ],
)
def test_other_arguments_are_wrong_usage(arguments):
    """Flags have one direction, choices are closed, and the library's options are not there."""
    assert given(Kinds, *arguments) == 2


def test_what_a_parser_refuses_is_its_own_error():
    """The error of a parser reaches the caller as it is, with its hint."""
    with pytest.raises(UsageError, match="'big' is not a size"):
        given(Kinds, "--size", "big")


def test_an_option_is_declared_once():
    """Two classes with an option of one name cannot be of one command."""

    def command(*, options: Options, more: Louder) -> None:
        """Take both."""

    with pytest.raises(ValueError, match="duplicate parameter"):
        expanded(command)


def test_other_parameters_stay_as_they_are():
    """What is not an options class keeps its place, annotation and default."""

    def command(*, before: int, options: Series, after: str = "x") -> None:
        """Take options between two others."""

    names = inspect.signature(expanded(command)).parameters
    assert list(names) == ["before", "lasts", "leave_one_out", "prefixes", "sliding", "after"]
    assert (names["before"].annotation, names["after"].default) == (int, "x")


def test_the_command_has_every_option():
    """The command takes each declared option, and beside them only what it averages and where."""
    command = typer.main.get_command(app)
    classes = (Options, Criteria, Series, Weighting, SoupOptions, Action, Display)
    declared = {name for cls in classes for name, one in meanings(cls) if one.command}
    others = {"checkpoints", "output", "version", "install_completion", "show_completion"}
    assert {one.name for one in command.params} - declared == others
    assert declared <= {one.name for one in command.params}


def test_no_two_options_are_spelled_alike():
    """Each option, short or long, is one parameter's; those that are on by default have a no-."""
    spelled = [text for one in typer.main.get_command(app).params for text in one.opts]
    assert len(spelled) == len(set(spelled))
    assert {"-o", "-w", "-q", "--last", "--no-hashes", "--max-memory", "--json"} <= set(spelled)
    assert "--hashes" not in spelled


def test_what_is_not_given_is_the_default():
    """A command that lacks some of the parameters has them as the classes do."""
    seen = []

    def command(*, options: Options, display: Display) -> None:
        seen.append((options, display))

    expanded(command)(threads=3, as_json=None)
    assert seen == [(Options(threads=3), Display())]
