"""merge_avg.errors: one exception, with its parts."""

import errno
import pickle

import pytest

import merge_avg
from merge_avg.errors import MergeError, UsageError, failure, named


def test_a_message_begins_with_its_file():
    """The message has the path where there is one; the text has the hint on the next line."""
    error = MergeError("it is damaged", where="a.pt", hint="fetch it again")
    assert error.message == "a.pt: it is damaged"
    assert str(error) == "a.pt: it is damaged\nhint: fetch it again"
    assert (error.what, error.where, error.hint) == ("it is damaged", "a.pt", "fetch it again")
    assert str(MergeError("nothing to do")) == "nothing to do"
    assert merge_avg.MergeError is MergeError
    assert issubclass(UsageError, MergeError)
    assert issubclass(MergeError, ValueError)


def test_a_path_is_added_once():
    """A lower layer's error gets the path that its caller knows, unless it names one already."""
    error = UsageError("it is damaged", hint="fetch it again").at("a.pt")
    assert type(error) is UsageError
    assert (error.message, error.hint) == ("a.pt: it is damaged", "fetch it again")
    assert error.at("b.pt").message == "a.pt: it is damaged"


def test_an_error_crosses_processes():
    """Pickled by a pool of processes, an error keeps its parts, and says them once."""
    error = pickle.loads(pickle.dumps(UsageError("it is wrong", where="a.pt", hint="mend it")))
    assert type(error) is UsageError
    assert str(error) == "a.pt: it is wrong\nhint: mend it"


@pytest.mark.parametrize(
    ("code", "hint"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EDQUOT, "free some space"),
        (errno.EMFILE, "ulimit -n"),
        (errno.EFBIG, "--max-shard-size"),
        (errno.EACCES, None),
    ],
)
def test_what_the_system_refused_is_said_in_its_words(code, hint):
    """The reason is the system's; where a next step is known, it is the hint."""
    error = failure(OSError(code, "no luck", "a.pt"))
    assert error.message == "a.pt: cannot be read or written (no luck)"
    assert (error.hint is None) if hint is None else (hint in error.hint)


def test_a_failure_names_the_file_that_is_known():
    """The caller's path wins; a descriptor names no file."""
    assert failure(OSError(5, "no luck", "a.pt"), where="b.pt").where == "b.pt"
    assert failure(OSError(5, "no luck", 3)).where is None
    assert str(failure(OSError("odd"), "cannot be opened", more="; 5 bytes")) == (
        "cannot be opened (odd; 5 bytes)"
    )


def test_names_are_quoted_and_counted():
    """The first names stand for all, with the number of the rest."""
    assert named([]) == ""
    assert named(["a"]) == "'a'"
    assert named(["a", "b", "c"]) == "'a' and 2 more"
    assert named(iter("abcd"), 2) == "'a', 'b' and 2 more"
    assert named(map(str, range(2_000))) == "'0' and 1,999 more"
