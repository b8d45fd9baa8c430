"""merge_avg.formats.pickle.callables: what is inert, what runs code, and in which spellings."""

import functools
import importlib
import inspect
import pickle
import re
import sys
import warnings

import pytest
import torch

from merge_avg.formats.pickle import callables
from merge_avg.formats.pickle.callables import is_inert, verdict
from merge_avg.formats.pickle.load import load
from merge_avg.formats.pickle.values import DangerousPickleError
from tests.older import TORCH

INERT = [(module, name) for module, names in callables.INERT.items() for name in sorted(names)]


@pytest.fixture(autouse=True)
def fresh():
    """Ask for each verdict anew."""
    verdict.cache_clear()


def test_the_tables_are_read():
    """A table has names by module, of all lines of the module; titles and comments are in none."""
    tables = callables._tables()
    assert list(tables) == [
        "inert",
        "inert classes",
        "enums",
        "dangerous modules",
        "dangerous",
        "dangerous parts",
    ]
    assert tables["inert"]["collections"] == {"Counter", "OrderedDict", "defaultdict", "deque"}
    assert {"Size", "bfloat16", "uint8"} < tables["inert"]["torch"]  # the first and the last line
    assert tables["dangerous"]["functools"] == {"partialmethod", "reduce"}
    assert not any(key.startswith(("#", "[")) for table in tables.values() for key in table)
    assert {"os", "pickle", "torch.hub"} < callables._MODULES


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("posix", "system"),
        ("os.path", "join"),  # a module below a dangerous one
        ("numpy", "os.system"),  # reached through a module that imports it
        ("random", "_os.system"),
        ("torch.hub", "tempfile._os.system"),
        ("torch", "serialization.pickle.loads"),
        ("torch.serialization", "pickle.loads"),
        ("torch", "serialization.load"),
        ("torch", "hub.load"),
        ("logging", "config._resolve"),
        ("torch.nn", "Linear.__init__.__globals__"),
        ("mycode", "Model.__class__"),
        ("builtins", "eval"),
        ("__builtin__", "eval"),
        ("__builtin__", "reduce"),  # functools.reduce since Python 3
        ("cPickle", "loads"),
        ("commands", "getoutput"),
        ("six.moves", "cPickle.loads"),
        ("six.moves.builtins", "eval"),
        ("urllib3.packages.six.moves.urllib.request", "urlopen"),
        ("_io", "FileIO"),
        ("_operator", "attrgetter"),
        ("numpy", "f2py.crackfortran.myeval"),
        ("sympy", "sympify"),
        ("torch", "load"),
        ("torch.jit", "unsupported_tensor_ops.execWrapper"),
    ],
)
def test_each_part_of_a_name_counts(module, name):
    """Whatever leads to what runs code is refused: modules above, attributes, older names."""
    assert verdict(module, name) == "dangerous"
    with pytest.raises(DangerousPickleError, match=re.escape(f"{module}.{name}")) as caught:
        load(f"c{module}\n{name}\n.".encode(), persistent=None, call=lambda *_: None)
    assert "safetensors" in caught.value.hint


@pytest.mark.parametrize(
    ("module", "name", "expected"),
    [
        ("collections", "OrderedDict", "inert"),
        ("torch._utils", "_rebuild_tensor_v2", "inert"),
        ("builtins", "set", "inert"),
        ("__builtin__", "set", "inert"),
        ("copy_reg", "_reconstructor", "inert"),
        ("torch.nn.modules.linear", "Linear", "inert"),
        ("torch.optim.adamw", "AdamW", "inert"),
        ("torch.nn.modules.linear", "F.torch", "unknown"),
        ("torch.nn.modules.linear", "F", "unknown"),
        ("torch.nn.modules_of_mine.linear", "Linear", "unknown"),
        ("torch", "_utils._rebuild_tensor_v2", "unknown"),
        ("mycode", "Model", "unknown"),
        ("__main__", "Config", "unknown"),
        ("oscar", "system", "unknown"),  # a module whose name begins with that of a dangerous one
        ("mycode.code", "Model", "unknown"),
        ("project.test", "Model", "unknown"),
    ],
)
def test_other_names_are_inert_or_unknown(module, name, expected):
    """Names of checkpoints are inert by their full name alone; one that looks alike is unknown."""
    assert verdict(module, name) == expected


def test_no_inert_name_is_dangerous_as_well():
    """The tables do not contradict each other."""
    assert {verdict(module, name) for module, name in INERT} == {"inert"}


def _found(module, name):
    """Return what a name stands for here, or None where this torch or Python lacks it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of old places
        try:
            return functools.reduce(getattr, name.split("."), importlib.import_module(module))
        except (ImportError, AttributeError):
            return None


def test_inert_names_exist():
    """Nearly all of the table is there in this torch and Python: it has no slips of the pen."""
    missing = {f"{module}.{name}" for module, name in INERT if _found(module, name) is None}
    elsewhere = r"(pytorch_)?lightning.*|pathlib\._local\..*|numpy\.(core|_core)\..*"
    versions = r"torch\._utils\._rebuild_(xla|sparse_csr)_tensor|torch\.float4_e2m1fn_x2"
    storages = r"torch(\.cuda|\.storage)?\.\w+Storage"
    if TORCH < (2, 8):
        versions += r"|torch\.float8_e8m0fnu|torch\._utils\._rebuild_device_tensor_from_cpu_tensor"
    if TORCH < (2, 5):
        elsewhere += r"|torch\.distributed\.tensor\..*|torch\.nn\.parameter\.Buffer"
    odd = [one for one in missing if not re.fullmatch(f"{elsewhere}|{versions}|{storages}", one)]
    assert odd == []


def test_inert_packages_hold_classes():
    """A capitalised name in a package of layers or optimizers is a class, or a type to annotate."""
    import torch.optim.swa_utils

    for module in [one for name, one in sys.modules.items() if is_inert(name, "Name")]:
        for name, value in vars(module).items():
            if is_inert(module.__name__, name) and not inspect.isclass(value):
                kind = type(value)
                assert kind.__module__ in ("typing", "types", "builtins", "collections.abc"), name
                assert not inspect.ismodule(value), name
                assert not inspect.isroutine(value), name
    assert inspect.isclass(torch.optim.swa_utils.AveragedModel)


def test_tensors_of_a_plain_pickle_have_a_way_out():
    """Each is a pickle in a pickle, which may run anything: the hint says how to save them."""
    with pytest.raises(DangerousPickleError, match="_load_from_bytes") as caught:
        load(pickle.dumps([torch.ones(2)]), persistent=None, call=lambda *_: None)
    assert "save it with torch.save" in caught.value.hint
