"""The one exception that the library raises for what a user can cause."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Mapping
from typing import Any

Where = str | os.PathLike[str] | None
# Options of the command, and their values where these are plain. Keywords are spelled alike.
_OPTION = (
    r"(?<![\w-])--(no-)?([a-z][a-z-]*[a-z])"
    r"(?: ('[^']*'|\w*[\d_]\w*|(?:[A-Z]+|skip|available|template|max|min|cpu|metric)\b))?"
)
_WEIGHTS = r"(?<![\w-])-w(?: ([\d.,]+))?(?![\w-])"
NAMES = {"metrics": "metrics_file", "dry_run": "select_checkpoints"}  # where they are not alike


def _keyword(found: Any) -> str:
    name, value = found[2].replace("-", "_"), "False" if found[1] else found[3]
    name = NAMES.get(name, name)
    if value and not found[1] and value[0] != "'" and not value.isdecimal() and value != "N":
        value = f'"{value}"'
    return f"{name}={value}" if value else name


def in_keywords(said: str) -> str:
    """Return a text with the library's keywords: --missing skip is missing="skip"."""
    import re  # which `import merge_avg` need not wait for

    said = re.sub(_OPTION, _keyword, said).replace("' exclude='", "', '")
    return re.sub(_WEIGHTS, lambda found: f"weights=[{found[1]}]" if found[1] else "weights", said)


class MergeError(ValueError):
    """Checkpoints that cannot be averaged as asked, or files that cannot be read or written.

    `what` says what is wrong, `where` names the file, `hint` the next step, and `tensor` what it is
    about, or the first of several; these three may be None. Options in the texts are the command's;
    `str(error)`, which is all but the last, has the library's keywords instead.
    """

    # The parts are kept apart for whoever shows them: the command prints the hint on a line of its
    # own, and where="..." lets a caller add the path that a lower layer did not know.

    def __init__(
        self, what: str, *, where: Where = None, hint: str | None = None, tensor: object = None
    ) -> None:
        self.what = what
        self.where = os.fspath(where) if where is not None else None
        self.hint = hint
        self.tensor = None if tensor is None else str(tensor)
        super().__init__(what)

    @property
    def message(self) -> str:
        """Return what is wrong with which file, in one line."""
        return self.what if self.where is None else f"{self.where}: {self.what}"

    def __str__(self) -> str:
        said = in_keywords(self.what if self.hint is None else f"{self.what}\nhint: {self.hint}")
        return said if self.where is None else f"{self.where}: {said}"

    def at(self, where: str | os.PathLike[str]) -> MergeError:
        """Return the same error about a file, unless it names one already."""
        where = self.where or where
        return type(self)(self.what, where=where, hint=self.hint, tensor=self.tensor)


class MergeWarning(UserWarning):
    """A doubt about a mean, such as that models have nothing in common."""


class UsageError(MergeError):
    """Options that contradict themselves or the number of inputs, whatever the files hold."""


class WrittenError(MergeError):
    """A failure after the outputs are complete, such as of a report of them."""


class RankError(MergeError):
    """A failure of one of several ranks, which ends the merge of all.

    `told`: whether another rank tells the user.
    """

    def __init__(self, about: Mapping[str, Any], *, told: bool) -> None:
        where, hint, tensor = (about.get(name) for name in ("where", "hint", "tensor"))
        super().__init__(str(about.get("what")), where=where, hint=hint, tensor=tensor)
        self.told = told


_SPACE = "free some space, or choose another place for the output"
_HINTS = {
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: _SPACE,
    errno.EMFILE: "allow this process more open files: ulimit -n 65536",
    errno.EFBIG: "allow larger files (ulimit -f), or write several with --max-shard-size",
}


def failure(
    error: OSError,
    what: str = "cannot be read or written",
    where: Where = None,
    more: str = "",
) -> MergeError:
    """Return what the system refused as the error that a user sees."""
    # Calls that take a descriptor name no file, but its number.
    named = None if isinstance(error.filename, int) else error.filename
    return MergeError(
        f"{what} ({error.strerror or error}{more})",
        where=where if where is not None else named,
        hint=_HINTS.get(error.errno or 0),
    )


def counted(count: int, noun: str) -> str:
    """Return a number of things: 1 tensor, 2 tensors."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def named(names: Iterable[object], limit: int = 1) -> str:
    """Return the first of several names, quoted, with the count of the rest."""
    quoted = [repr(str(name)) for name in names]
    shown = ", ".join(quoted[:limit])
    rest = len(quoted) - limit
    return shown if rest <= 0 else f"{shown} and {rest:,} more"
