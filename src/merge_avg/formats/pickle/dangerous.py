"""Callables that are known to run code, start processes, or reach files or the network.

Reading a pickle here runs nothing. But an output carries its template's pickle on, and whoever
loads that output may run it, so a file that names one of these callables is refused.

The names come from the lists that the scanners fickling and picklescan publish.
"""

from __future__ import annotations

from typing import NoReturn

from merge_avg.formats.pickle.values import DangerousPickleError, Global, Value

# Every name in these modules, and in modules below them, is dangerous.
_MODULES = frozenset(
    """
    _aix_support _osx_support _posixsubprocess _pyrepl _thread _winapi aiohttp asyncio bdb cProfile
    code codeop commands concurrent ctypes _ctypes dill distutils doctest ensurepip ftplib http
    httplib idlelib imaplib imp importlib _frozen_importlib _frozen_importlib_external
    linecache logging.config mailcap marshal multiprocessing nntplib nt ntpath os pdb
    pickle _pickle cloudpickle joblib pip pkgutil poplib posix posixpath profile pty pydoc
    requests requests_oauthlib runpy shelve shutil site smtplib socket _socket socketserver
    ssl subprocess sys tarfile telnetlib tempfile threading timeit trace urllib urllib2 venv
    webbrowser winreg xmlrpc zipfile zipimport
    """.split()
)
# Single names in modules that are harmless otherwise.
_NAMES = {
    "builtins": frozenset(
        """
        __build_class__ __import__ apply breakpoint compile delattr dir eval exec execfile exit file
        getattr globals help input locals open quit raw_input reload setattr vars
        """.split()
    ),
    "functools": frozenset({"reduce", "partialmethod"}),
    "operator": frozenset({"attrgetter", "itemgetter", "methodcaller"}),
    "_operator": frozenset({"attrgetter", "itemgetter", "methodcaller"}),
    "types": frozenset({"CodeType", "FunctionType"}),
    "_io": frozenset({"FileIO", "open", "open_code"}),
    "io": frozenset({"FileIO", "open", "open_code"}),
    "codecs": frozenset({"open"}),
    "torch": frozenset({"load", "compile"}),
    "torch.serialization": frozenset({"load"}),
    "torch.hub": frozenset({"load", "load_state_dict_from_url", "download_url_to_file"}),
    "torch.jit": frozenset({"load"}),
    "torch.utils.cpp_extension": frozenset({"load", "load_inline"}),
    "numpy": frozenset({"load", "fromfile"}),
    "numpy.testing._private.utils": frozenset({"runstring"}),
}
_NAMES["__builtin__"] = _NAMES["builtins"]  # Python 2's name for it, which protocols 0 to 2 write
# Parts of a dotted name that are dangerous below any module: a dangerous module that an innocent
# one has imported (torch.os, numpy.os.system), and attributes that lead from any object to all.
_PARTS = frozenset(
    """
    builtins ctypes importlib os posix runpy shutil subprocess sys
    __globals__ __builtins__ __subclasses__ __reduce__
    """.split()
)

# Python 3.11.0 to 3.11.3 pickle a member of an enum as getattr(class, name), and torch's metadata
# of distributed checkpoints holds one. That exact form is allowed; every other use is refused.
GETTERS = Global("builtins", "getattr"), Global("__builtin__", "getattr")


def names_a_member(args: Value) -> bool:
    """Return whether arguments of getattr are a class, going by its name, and a member's name."""
    if not isinstance(args, tuple) or len(args) != 2:
        return False
    cls, name = args
    if not isinstance(cls, Global) or not isinstance(name, str) or not name.isidentifier():
        return False
    return cls.name.rpartition(".")[2].lstrip("_")[:1].isupper() and not name.startswith("__")


def refuse_if_dangerous(module: str, name: str) -> None:
    """Raise DangerousPickleError for a callable that is known to run code.

    A dotted name reaches through attributes, so each part of it counts.
    """
    packages = module.split(".")
    prefixes = {".".join(packages[: depth + 1]) for depth in range(len(packages))}
    parts = set(name.split("."))
    if prefixes & _MODULES or parts & (_NAMES.get(module, frozenset()) | _PARTS):
        refuse(module, name)


def refuse(module: str, name: str) -> NoReturn:
    """Raise DangerousPickleError for a callable."""
    raise DangerousPickleError(
        f"its pickle names {module}.{name}, which would run code when loaded",
        hint="do not load this file; get the weights as safetensors from a source you trust",
    )
