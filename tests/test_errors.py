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
    error = UsageError("it is damaged", hint="fetch it again", tensor="w").at("a.pt")
    assert type(error) is UsageError
    assert (error.message, error.hint) == ("a.pt: it is damaged", "fetch it again")
    assert (error.tensor, MergeError("it is damaged").tensor) == ("w", None)
    assert error.at("b.pt").message == "a.pt: it is damaged"


@pytest.mark.parametrize(
    ("hint", "said"),
    [
        ("use --missing skip", 'use missing="skip"'),
        ("keep with --exclude '*u' --exclude '*v'", "keep with exclude='*u', '*v'"),
        ("the root is --key ''", "the root is key=''"),
        ("lower --max-memory and --threads, or", "lower max_memory and threads, or"),
        ("give at least --max-memory 12KiB", 'give at least max_memory="12KiB"'),
        ("or --no-agreement: it compares", "or agreement=False: it compares"),
        ("name it: --inputs DIR", 'name it: inputs="DIR"'),
        ("--last 3 of 2", "last=3 of 2"),
        (
            "give one a checkpoint, as in -w 0.7,0.3",
            "give one a checkpoint, as in weights=[0.7,0.3]",
        ),
        ("give them with -w, in the order", "give them with weights, in the order"),
        ("add --best N or --weighting metric", 'add best=N or weighting="metric"'),
        ("look at --dry-run or --metrics", "look at select_checkpoints or metrics_file"),
        ("choose a wider --dtype, such as float32", "choose a wider dtype, such as float32"),
        ("a file a--key.pt stays - and -- too", "a file a--key.pt stays - and -- too"),
    ],
)
def test_options_are_said_as_keywords(hint, said):
    """The text has the library's spelling, by one rule; the path and the parts stay as they are."""
    error = MergeError("--key is wrong", where="x --key y.pt", hint=hint)
    assert str(error) == f"x --key y.pt: key is wrong\nhint: {said}"
    assert error.message == "x --key y.pt: --key is wrong"
    assert error.hint == hint


def test_an_error_crosses_processes():
    """Pickled by a pool of processes, an error keeps its parts, and says them once."""
    error = pickle.loads(
        pickle.dumps(UsageError("it is wrong", where="a.pt", hint="mend it", tensor="w"))
    )
    assert (type(error), error.tensor) == (UsageError, "w")
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
