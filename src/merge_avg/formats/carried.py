"""Files that a copy carries on as they are: what would a loader of them call?

A merge needs nothing of these, so they may be anything. They are looked into as far as they are
archives of torch.save, or pickles one after the other (as legacy checkpoints are). What cannot be
read of them is named as well: a loader runs a damaged pickle up to the damage.
"""

from __future__ import annotations

from merge_avg.checkpoint import File
from merge_avg.errors import MergeError
from merge_avg.formats.pickle.load import load
from merge_avg.formats.pickle.values import CutShortError, DangerousPickleError
from merge_avg.formats.zip import Part, scan

_CODE = frozenset((".py", ".pyc", ".pyd", ".so", ".dll", ".dylib"))
_FIRST_READ, _LARGEST = 1 << 16, 1 << 27
_ZIP = b"PK\x03\x04"


def callables_of(stamp: File, number: int = 0) -> tuple[str, ...]:
    """Return what a loader of a file would call that is not known to be inert.

    DangerousPickleError where the file names a callable that is known to run code.
    """
    if stamp.path.suffix.lower() in _CODE:
        return (f"the code in {stamp.path.name}",)
    with stamp.path.open("rb") as file:
        return callables_in(Part(file, number, 0, stamp.nbytes), stamp)


def callables_in(part: Part, stamp: File) -> tuple[str, ...]:
    """Return the same of a part of a file."""
    head = part.read(0, min(part.nbytes, _FIRST_READ))
    try:
        if head.startswith(_ZIP):
            return tuple(name for _, name in scan(part.file, stamp, part.number, part).callables)
        try:
            return _pickles(head, whole=part.nbytes <= _FIRST_READ)
        except CutShortError:
            # Text that happens to begin like a pickle comes here too: most goes no further.
            more = part.read(0, min(part.nbytes, _LARGEST))
            return _pickles(more, whole=part.nbytes <= _LARGEST)
    except DangerousPickleError as error:
        raise error.at(stamp.path) from None
    except MergeError:
        # Protocols 0 and 1 have no mark: most files that do not read as one are something else.
        begun = head.startswith(_ZIP) or (head[:1] == b"\x80" and head[1:2] <= b"\x05")
        return (f"whatever {stamp.path.name} names",) if begun else ()


def _pickles(data: bytes, *, whole: bool) -> tuple[str, ...]:
    """Return the callables of the pickles that data begins with; an error where the first fails."""
    callables: dict[str, None] = {}
    at = 0
    while at < len(data):
        try:
            found = load(data, at, persistent=lambda _: None, call=lambda *_: None)
        except MergeError as error:
            # What follows a pickle may be anything, but not one that is cut off here.
            cut = isinstance(error, CutShortError) and not whole
            if not at or cut or isinstance(error, DangerousPickleError):
                raise
            break
        callables |= dict.fromkeys(found.callables)
        at += found.nbytes
    return tuple(callables)
