"""The command's parameters, derived from the fields of options classes, and back.

Typer builds a command from the signature of a function, which is made here of options classes:
each field becomes a parameter, and the values given become instances of the classes again. Three
classes have what only the command takes; the options of a merge are in `merge_avg.options`.
"""

from __future__ import annotations

import functools
import inspect
from collections import abc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer

from merge_avg.options import Meaning, Recipe, meanings, option


@dataclass(frozen=True, kw_only=True)
class Action:
    """The tasks that, but for the dry run, have commands of their own."""

    inspect: bool = option(False, "The command inspect, as it was called before.")
    verify: bool = option(False, "The command verify, as it was called before.")
    inputs: Path | None = option(
        None, "Where the inputs lie now, if they were moved.", metavar="DIR"
    )
    dry_run: bool = option(False, "Say what would be done, and write nothing.")


@dataclass(frozen=True, kw_only=True)
class SoupOptions:
    """A soup of the checkpoints rather than their mean."""

    recipe: Recipe | None = option(
        None,
        "The command soup, as it was called before.",
        names=("--soup",),
    )
    evaluation: str | None = option(
        None,
        "Prints the score of the checkpoint {}, as its last number.",
        metavar="COMMAND",
        names=("--eval",),
    )
    eval_json: str | None = option(
        None, "The score is this key of the JSON that --eval prints.", metavar="KEY"
    )


@dataclass(frozen=True, kw_only=True)
class Display:
    """The forms in which results are shown, and where they go."""

    page: Path | None = option(
        None,
        "Write a page of what was done, with charts.",
        metavar="FILE.html",
        names=("--report",),
    )
    as_json: bool = option(False, "Print the report as one JSON object.", names=("--json",))
    quiet: bool = option(
        False, "Print errors only, and the output's path.", names=("--quiet", "-q")
    )


def expanded(function: Callable[..., None]) -> Callable[..., None]:
    """Return a function that has a parameter for each option in place of one for their class."""
    declared = inspect.signature(function, eval_str=True).parameters.values()
    classes = {one.name: one.annotation for one in declared if is_dataclass(one.annotation)}
    flat: list[inspect.Parameter] = []
    for one in declared:
        flat += _parameters(one.annotation) if one.name in classes else [one]

    @functools.wraps(function)
    def called(**values: Any) -> None:
        for name, cls in classes.items():
            values[name] = _instance(cls, values)
        function(**values)

    # An option that two classes declare is a ValueError here. The annotations are in the signature;
    # left on the function as text, typer would evaluate each of them four times.
    called.__signature__ = inspect.Signature(flat)  # type: ignore[attr-defined]
    called.__annotations__ = {}
    return called


def _options(cls: Any) -> Iterator[tuple[str, Meaning, Any]]:
    """Yield the name, the meaning and the default of each option that the command has."""
    return ((name, one, getattr(cls, name)) for name, one in meanings(cls) if one.command)


def _parameters(cls: Any) -> Iterator[inspect.Parameter]:
    hints = get_type_hints(cls)
    for name, meaning, default in _options(cls):
        spelled, text, absent = f"--{name.replace('_', '-')}", meaning.help, default
        if default is True:  # then all that a flag can do is turn it off
            spelled, text, absent = (
                f"--no{spelled[1:]}",
                f"Do not {text[0].lower()}{text[1:]}",
                False,
            )
        elif default == ():  # which the help would list as a default
            absent = None
        kind: Any = str if meaning.parse else _kind(hints[name])
        given = typer.Option(*meaning.names or [spelled], help=text, metavar=meaning.metavar)
        if meaning.parse and get_origin(_kind(hints[name])) is Literal:
            given.autocompletion = _completing(get_args(_kind(hints[name])))
        annotation = Annotated[kind | None, given]
        keyword = inspect.Parameter.KEYWORD_ONLY
        yield inspect.Parameter(name, keyword, default=absent, annotation=annotation)


def _completing(values: tuple[str, ...]) -> Callable[[str], list[str]]:
    # For the shell; typer allows no other parameters.
    return lambda incomplete: [value for value in values if value.startswith(incomplete)]


def _kind(hint: Any) -> Any:
    """Return the type that typer converts to: of several the first, and a list for a sequence."""
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return _kind(get_args(hint)[0])
    return list[get_args(hint)[0]] if origin in (tuple, abc.Sequence) else hint  # type: ignore[misc]


def _instance(cls: Any, values: dict[str, Any]) -> Any:
    """Return the options of a class, whose values are taken out of those of all."""
    given: dict[str, Any] = {}
    for name, meaning, default in _options(cls):
        value = values.pop(name, None)
        if default is True:
            given[name] = not value
        elif value is not None:
            parsed = meaning.parse(value) if meaning.parse else value
            given[name] = tuple(parsed) if default == () else parsed
    return cls(**given)
