"""The callables that a pickle names: refused, known to be inert, or carried on and named.

    collections.OrderedDict, torch._utils._rebuild_tensor_v2      inert: it makes a plain value
    os.system, torch.hub.load, numpy.f2py.crackfortran.myeval     known to run code: refused
    omegaconf.dictconfig.DictConfig, mycode.Model                 all others: named

Reading a pickle here runs nothing. But a copy carries its template's pickle on, and whoever loads
the copy may run it. No list of what is dangerous is ever complete, so what is not known to be inert
is named to the user. What is inert makes, out of inert arguments, a value and nothing else: it
looks nothing up by a name, opens no file, and calls nothing that the pickle did not name as well.

Lists of the dangerous: those of fickling and picklescan, and trying every public callable of torch,
NumPy and the standard library.
"""

from __future__ import annotations

import _compat_pickle
import pkgutil
import re
import typing
from functools import lru_cache

Verdict = typing.Literal["inert", "unknown", "dangerous"]

_CLASS = re.compile(r"[A-Z]\w+")
_DUNDER = re.compile(r"__\w+__")


def _tables() -> dict[str, dict[str, set[str]]]:
    """Return the tables of callables.txt: names by module, by the title of the table."""
    text = (pkgutil.get_data(__package__, "callables.txt") or b"").decode()
    tables: dict[str, dict[str, set[str]]] = {}
    for line in text.splitlines():
        if line.startswith("["):
            table = tables[line.strip("[]")] = {}
        elif line and not line.startswith("#"):
            module, *names = line.split()
            table.setdefault(module, set()).update(names)
    return tables


_TABLES = _tables()
INERT, INERT_CLASSES = _TABLES["inert"], tuple(_TABLES["inert classes"])
ENUMS = {f"{module}.{name}" for module, names in _TABLES["enums"].items() for name in names}
_NAMES = _TABLES["dangerous"]
# A line of these tables has several modules, or several attributes.
_MODULES, _PARTS = (
    {*table, *(name for names in table.values() for name in names)}
    for table in (_TABLES["dangerous modules"], _TABLES["dangerous parts"])
)


@lru_cache(maxsize=4096)
def verdict(module: str, name: str) -> Verdict:
    """Return what is known of a callable that a pickle names, in any spelling that a loader takes.

    A dotted name reaches through attributes, so that each part of it counts.
    """
    # Below protocol 3, Python's own loader turns names of Python 2 into those of Python 3.
    moved, renamed = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
    moved = _compat_pickle.IMPORT_MAPPING.get(moved, moved)
    for one, called in {(module, name), (moved, renamed)}:
        if _is_dangerous(one.split("."), called.split(".")):
            return "dangerous"
    return "inert" if is_inert(moved, renamed) else "unknown"


def is_inert(module: str, name: str) -> bool:
    """Return whether a callable makes a plain value and does nothing else."""
    inside = any(module == one or module.startswith(f"{one}.") for one in INERT_CLASSES)
    is_class = inside and _CLASS.fullmatch(name) is not None and name not in typing.__all__
    return is_class or name in INERT.get(module, ())


def _is_dangerous(module: list[str], attributes: list[str]) -> bool:
    special = (part for part in attributes if _DUNDER.fullmatch(part) or part in _PARTS)
    if any(not is_inert(".".join(module), part) for part in special):
        return True
    # Modules that import others make them their attributes, often below an underscore: random._os
    # is os. And six.moves has the standard library's under the names of Python 2.
    parts = module + attributes
    starts = {0, *(k + 1 for k, part in enumerate(module) if part == "moves")}
    starts.update(range(len(module), len(parts)))
    return any(_names_danger(parts[start:]) for start in starts)


def _names_danger(parts: list[str]) -> bool:
    first = _compat_pickle.IMPORT_MAPPING.get(parts[0], parts[0]).lstrip("_")
    parts = [*first.split("."), *parts[1:]]
    for count in range(1, len(parts) + 1):
        known = ".".join(parts[:count])
        if known in _MODULES or _NAMES.get(known, set()) & set(parts[count:]):
            return True
    return False
