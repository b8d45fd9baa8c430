"""merge_avg.formats.pickle.methods: methods are data, unless a loader could call them."""

import argparse
import contextlib
import io
import pickle
import sys
import types
import zipfile
from random import Random
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from merge_avg import merge_checkpoints
from merge_avg.errors import MergeError
from merge_avg.formats import scan
from merge_avg.formats.pickle.load import load
from merge_avg.formats.pickle.tensors import TorchHooks
from merge_avg.formats.pickle.values import Allowance, DangerousPickleError, PickleError
from tests.formats.pickle.helpers import read

HERE = __name__.encode()
RAN: list[object] = []  # what ran while a pickle was loaded


class Evil:
    """An object with a method that a hostile pickle wants to be called."""

    def run(self, *args, **more):
        """Note that it was called."""
        RAN.append((args, more))
        return []

    class Inner:
        """A class inside of it, whose name has a dot."""


class Plain:
    """An object that its state makes; loaders look `append` and the like up on it."""


class Keeps:
    """An object whose attributes are the dict that it gets, which may change later."""

    def __setstate__(self, state):
        self.__dict__ = state


class Calls:
    """An object that calls one of its attributes when it is called, hashed or made."""

    def __call__(self, *args):
        return self.function(*args)


class Runs(Evil):
    """An object that calls what its state holds."""

    def __setstate__(self, state):
        state["function"](state["argument"])


class Nested:
    """An object that calls what an object in its state holds."""

    def __setstate__(self, state):
        state["inner"].setdefault("differentiable", 0)


class Entries(dict[str, object]):
    """A dict whose entries are attributes, as that of Lightning is."""

    def __getattr__(self, key):
        try:
            return self[key]
        except KeyError:
            raise AttributeError(key) from None


class Listed(list[object]):
    """A list that calls its items as they come."""

    def append(self, item):
        """Call an item."""
        item(1)


class Mapped(dict[str, object]):
    """A dict that calls its values as they come."""

    def __setitem__(self, key, value):
        value(key)


class Keyed:
    """An object whose attributes are a dict, and that calls one of them for a key."""

    __setstate__ = Keeps.__setstate__

    def __call__(self):
        return self.function(1)


class Kept:
    """An object that keeps its argument, and calls what lies in it as it gets a state."""

    def __new__(cls, value):
        """Keep it."""
        made = super().__new__(cls)
        made.value = value
        return made

    def __setstate__(self, state):
        self.value[0](1)


def use_attribute(value, name="x"):
    """Call a method that lies in an attribute."""
    getattr(value, name)[0](1)


def use_hook(value):
    """Call a method that is a tensor's hook."""
    value._backward_hooks[0](1)


def look_up(value):
    """Look for a key that a dict does not have."""
    value[0]


def use(value):
    """Call a method that lies deep in an argument."""
    value[0]["a"].function(1)


def take(value, **more):
    """Call a method in an argument."""
    (value or more["a"])(1)


class Takes:
    """A class that takes an argument by its name."""

    def __new__(cls, *args, **more):
        """Call what it gets."""
        for one in (*args, *more.values()):
            one(1)
        return super().__new__(cls)


def named(name, module=HERE):
    """Return the opcode for a class or function, of this module if not said otherwise."""
    return b"c" + module + b"\n" + name.encode() + b"\n"


def made(name):
    """Return the opcodes that make an object."""
    return named(name) + b")\x81"


def got(one, name="run"):
    """Return the opcodes for getattr(one, name)."""
    return named("getattr", b"builtins") + b"(" + one + b"S'" + name.encode() + b"'\ntR"


def state(**attributes):
    """Return the opcodes for a dict of attributes."""
    return b"}(" + b"".join(b"S'%b'\n%b" % (k.encode(), v) for k, v in attributes.items()) + b"u"


METHOD, EVIL, PLAIN = got(made("Evil")), made("Evil"), made("Plain")
FUNCTION = made("Calls") + state(function=METHOD) + b"b"  # an object that calls it
SGD = named("SGD", b"torch.optim.sgd") + b")\x81"
SPACE = named("SimpleNamespace", b"types") + b")\x81"

ORDERED = named("OrderedDict", b"collections") + b")R"
FILLED = ORDERED + b"K\1K\1s"
META = named("_rebuild_meta_tensor_no_storage", b"torch._utils")
META += b"(ctorch\nfloat32\n(K\1t(K\1t\x89tR"
SHARED = b"]q\2"  # a list that gets a method later
LATER = b"0h\2" + METHOD + b"a0"
# Each of these runs Evil.run when Python loads it.
HOSTILE = {
    "reduce": METHOD + b"(K\1tR",
    "reduce_nothing": METHOD + b")R",
    "object": b"(" + METHOD + b"K\1o",
    "memo": METHOD + b"q\x05h\x05K\1\x85R",
    "copy": METHOD + b"2K\1\x85R",
    "map": named("list", b"builtins")
    + b"("
    + named("map", b"builtins")
    + b"("
    + METHOD
    + b"]K\1atRtR",
    "partial": named("partial", b"functools") + METHOD + b"K\1\x86R)R",
    "argument": named("take") + METHOD + b"\x85R",
    "argument_of_class": named("Takes") + METHOD + b"\x85\x81",
    "argument_by_name": named("Takes") + b")" + state(a=METHOD) + b"\x92",
    "deep_argument": named("use") + b"]" + state(a=FUNCTION) + b"a\x85R",
    "overwritten": named("use") + b"]" + state(a=FUNCTION) + b"q\7a\x85R0h\7S'a'\nNs",
    "inst": b"(" + METHOD + b"i" + HERE + b"\ntake\n",
    "setstate": PLAIN + state(__setstate__=METHOD) + b"bK\1b",
    "setstate_slots": PLAIN + b"N" + state(__setstate__=METHOD) + b"\x86bK\1b",
    "append": PLAIN + state(append=METHOD) + b"bK\1a",
    "appends": PLAIN + state(append=METHOD) + b"b(K\1K\2e",
    "extend": PLAIN + state(extend=METHOD) + b"b(K\1K\2e",
    "add": PLAIN + state(add=METHOD) + b"b(K\1\x90",
    "own_append": EVIL + b"q\1" + state(append=got(b"h\1")) + b"bK\1a",
    "kept_dict": made("Keeps") + b"q\1}q\2bh\2S'append'\n" + METHOD + b"s0h\1K\1a",
    "kept_dict_again": made("Keeps") + b"q\1}q\2bh\2S'__setstate__'\n" + METHOD + b"s0h\1K\1b",
    "callable": FUNCTION + b"K\1\x85R",
    "callable_append": PLAIN + state(append=FUNCTION) + b"bK\1a",
    "own_callable": made("Calls") + b"q\1" + state(function=METHOD) + b"bK\1\x85R",
    "items": PLAIN + PLAIN + state(items=METHOD) + b"bb",
    "items_of_pair": PLAIN + PLAIN + state(items=METHOD) + b"bN\x86b",
    "its_setstate": made("Runs") + state(function=METHOD, argument=b"K\1") + b"b",
    "its_append": made("Listed") + METHOD + b"a",
    "its_setitem": made("Mapped") + b"K\1" + METHOD + b"s",
    "ordered_dict": named("OrderedDict", b"collections")
    + b")R"
    + state(__setstate__=METHOD)
    + b"bK\1b",
    "ordered_dict_argument": named("OrderedDict", b"collections")
    + b"(]S'a'\n"
    + METHOD
    + b"\x86atRq\1"
    + named("take")
    + METHOD
    + b"\x85R",
    "entries": made("Entries") + b"S'append'\n" + METHOD + b"sK\1a",
    "entries_setstate": made("Entries") + b"S'__setstate__'\n" + METHOD + b"sK\1b",
    "entries_callable": made("Entries") + b"S'append'\n" + FUNCTION + b"sK\1a",
    "optimizer": SGD + state(_patch_step_function=METHOD, defaults=b"}") + b"b",
    "optimizer_defaults": SGD
    + state(defaults=PLAIN + state(setdefault=METHOD) + b"b", param_groups=b"]")
    + b"b",
    "namespace_in_optimizer": SGD
    + state(defaults=SPACE + state(setdefault=METHOD) + b"b", param_groups=b"]")
    + b"b",
    "namespace_in_another": made("Nested")
    + state(inner=SPACE + state(setdefault=METHOD) + b"b")
    + b"b",
    "member_of_namespace": SPACE + state(a=METHOD) + b"bq\1" + got(b"h\1", "a") + b"K\1\x85R",
    "persistent": b"]" + METHOD + b"aQ",
    "items_of_ordered_dict": SPACE + FILLED + state(items=METHOD) + b"bb",
    "own_items_of_ordered_dict": EVIL + b"q\1" + FILLED + state(items=got(b"h\1")) + b"bb",
    "attribute_of_ordered_dict": ORDERED
    + (state(x=SHARED) + b"bq\3" + LATER + named("use_attribute") + b"h\3\x85R"),
    "default": named("defaultdict", b"collections")
    + (made("Keyed") + b"}q\2b\x85Rq\3" + b"0h\2S'function'\n" + METHOD + b"s0")
    + (named("look_up") + b"h\3\x85R"),
    "attribute_of_parameter": named("_rebuild_parameter_with_state", b"torch._utils")
    + (b"(" + META + b"\x89" + ORDERED + state(x=SHARED) + b"tRq\3" + LATER)
    + (named("use_attribute") + b"h\3\x85R"),
    "hook_of_parameter": named("_rebuild_parameter", b"torch._utils")
    + (b"(" + META + b"\x89" + ORDERED + b"q\2tRq\3" + b"0h\2K\0" + METHOD + b"s0")
    + (named("use_hook") + b"h\3\x85R"),
    "argument_kept": named("Kept") + SHARED + b"\x85\x81q\3" + LATER + b"h\3}b",
    "items_of_namespace": PLAIN + SPACE + state(items=METHOD) + b"bb",
    "own_items": PLAIN + EVIL + b"q\1" + state(items=got(b"h\1")) + b"bb",
    "own_items_of_pair": PLAIN + b"N" + EVIL + b"q\1" + state(items=got(b"h\1")) + b"b\x86b",
    "beside_own": made("Runs")
    + b"q\1"
    + state(before=got(b"h\1"), function=METHOD, argument=b"K\1", own=got(b"h\1"))
    + b"b",
}


class Loader(pickle._Unpickler):
    """Python's own loader in Python, with ids that are called."""

    def persistent_load(self, pid):
        """Call what an id holds."""
        return pid[0](1)


def runs(data, loader):
    """Return whether a loader runs Evil.run for a pickle."""
    RAN.clear()
    errors = AttributeError, TypeError, KeyError, ValueError, IndexError, pickle.UnpicklingError
    with contextlib.suppress(*errors):  # behind the call, where what it returns does not fit
        loader(io.BytesIO(data)).load()
    return bool(RAN)


class Fast(pickle.Unpickler):
    """The same in C."""

    persistent_load = Loader.persistent_load


# Hooks that know no tensors.
NONE = SimpleNamespace(persistent=lambda _: None, call=lambda *_: None)


@pytest.mark.parametrize("name", HOSTILE)
def test_no_method_can_be_called(name):
    """Each of these pickles runs a method when Python loads it, and is refused."""
    data = HOSTILE[name] + b"."
    assert runs(data, Loader)
    # The loader in C never looks `items` up, and appends to a list of any class by itself.
    assert runs(data, Fast) or name in ("its_append", *(one for one in HOSTILE if "items" in one))
    for hooks in (NONE, TorchHooks(Allowance())):
        with pytest.raises(DangerousPickleError) as caught:
            load(data, persistent=hooks.persistent, call=hooks.call)
        assert "if you made" in caught.value.hint


@pytest.mark.parametrize("name", HOSTILE)
def test_it_is_the_method_that_is_refused(name):
    """The same is read, and named, where the object itself stands in the place of its method."""
    data = HOSTILE[name].replace(METHOD, EVIL) + b"."
    if b"getattr" not in data:
        read(data)


@pytest.mark.parametrize(
    "data",
    [
        got(METHOD, "x"),  # of what getattr returned
        got(b"}", "get"),
        got(b"]", "append"),
        got(b"S'a'\n", "format"),
        got(b"N", "a"),
        got(b"(" + EVIL + b"t", "count"),
        got(named("use") + b"]\x85R", "run"),  # of what a function returned, which may be a module
        got(EVIL, "__class__"),
        got(EVIL, "__run"),
        got(EVIL, "run.x"),
        got(EVIL, ""),
        got(EVIL, "f_globals"),
        got(EVIL, "os"),  # as many a class has modules
        got(named("copyreg._reconstructor"[8:], b"copyreg") + b"(cm\nf\nN" + b"tR", "run"),
        named("getattr", b"builtins") + b"(" + EVIL + b"S'run'\nNtR",
        named("getattr", b"builtins") + b")" + state(a=EVIL) + b"\x92",
        b"}q\1}q\2b0h\2S'items'\n" + METHOD + b"s0" + SPACE + b"h\1b",
        METHOD + b"}b",  # which would change the function
        METHOD + b"K\1a",
        METHOD + b"K\1K\1s",
        b"ctorch\nTensor\n" + METHOD + b"\x85R",
        b"cbuiltins\ngetattr\n",
    ],
)
def test_other_uses_of_getattr_are_refused(data):
    """Only an object of a class has methods here, by names that lead no further."""
    with pytest.raises(DangerousPickleError):
        read(data + b".")


@pytest.mark.parametrize("module", [b"torch.optim.sgd", b"torch.optim.lr_scheduler"])
def test_an_optimizer_holds_no_methods_of_its_own(module):
    """Its state names attributes that it calls as it is loaded; that of a schedule does not."""
    data = named("SGD", module) + b")\x81q\1" + state(_step=got(b"h\1", "step")) + b"b."
    if module == b"torch.optim.lr_scheduler":
        read(data)
    else:
        with pytest.raises(DangerousPickleError, match="the method 'step'"):
            read(data)


@pytest.mark.parametrize("swap", [False, True])
def test_an_own_method_that_another_object_shares_is_refused(swap):
    """A list may be an object's own and lie in another object: the second counts too."""
    both = [b"S'own'\nh\2", b"S'other'\nh\3"][:: -1 if swap else 1]
    start = EVIL + b"q\1" + SHARED + b"0"
    later = b"h\2" + got(b"h\1") + b"a0"
    inner = PLAIN + b"q\3" + state(x=b"h\2") + b"b0"  # while the list is empty
    data = start + inner + later + b"h\1}(" + b"".join(both) + b"ub."
    with pytest.raises(DangerousPickleError, match="the method 'run'"):
        read(data)
    read(data.replace(b"h\3", b"K\3"))


@pytest.mark.parametrize("data", [METHOD + b"}b", METHOD + b"K\1a", METHOD + b"K\1K\1s"])
def test_a_method_is_not_changed(data):
    """A method hands the names of attributes on to its function."""
    with pytest.raises(DangerousPickleError, match="attributes may be methods"):
        read(data + b".")


class Act(nn.Module):
    """A module with one of its own methods as an attribute."""

    def __init__(self, inner=None):
        super().__init__()
        self.linear, self.inner = nn.Linear(2, 2), inner
        self.act = self._act

    def _act(self, x):
        return x


class Chosen:
    """A user's own object with a method and a class method."""

    def __init__(self, scale=2):
        self.scale = scale

    def times(self, x):
        """Multiply."""
        return self.scale * x

    @classmethod
    def make(cls):
        """Make another."""
        return cls(3)


def schedule():
    """Return a schedule with its own methods, as older torch has it, and its optimizer."""
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1)
    found = OneCycleLR(optimizer, 0.1, total_steps=9)
    found.anneal_func = types.MethodType(_annealing_cos, found)
    return found


def _annealing_cos(self, start, end, pct):
    return (self, start, end, pct)


@pytest.fixture
def older(monkeypatch):
    """A method of the schedule's class, as older torch has it."""
    monkeypatch.setattr(OneCycleLR, "_annealing_cos", _annealing_cos)


def whole(function):
    """Return a schedule of a function, as it is."""
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1)
    return LambdaLR(optimizer, [function])


HONEST = {
    "scheduler": (lambda: schedule().state_dict(), ()),
    "scheduler_whole": (schedule, ()),
    "lambdas": (lambda: whole(Chosen().times), ("Chosen", "Chosen.times")),
    "hparams": (lambda: {"hparams": {"f": [Chosen().times]}}, ("Chosen", "Chosen.times")),
    "namespace": (lambda: argparse.Namespace(f=Chosen().times), ("Chosen", "Chosen.times")),
    "namespaces": (
        lambda: argparse.Namespace(a=argparse.Namespace(f=[Chosen().times])),
        ("Chosen", "Chosen.times"),
    ),
    "module": (Act, ("Act", "Act._act")),
    "modules": (lambda: nn.Sequential(Act(Act()), Act()), ("Act", "Act._act")),
    "class_method": (lambda: [Chosen.make], ("Chosen", "Chosen.make")),
    "shared": (lambda: [one := Chosen(), one.times, one.times], ("Chosen", "Chosen.times")),
}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("name", HONEST)
@pytest.mark.usefixtures("older")
def test_methods_of_honest_objects_are_kept(name, protocol):
    """Their classes and methods are named, unless they are known; nothing else is."""
    make, names = HONEST[name]
    torch.save({"state": make()}, buffer := io.BytesIO(), pickle_protocol=protocol)
    with zipfile.ZipFile(buffer) as archive:
        data = archive.read("archive/data.pkl")
    found = load(data, persistent=lambda pid: pid, call=lambda *_: None)
    assert set(found.callables) == {f"{__name__}.{one}" for one in names}


@pytest.mark.parametrize("protocol", [0, 1, 2])
def test_methods_of_old_protocols_are_kept(protocol):
    """They make objects by a function, and Python 2 has another name for the module of getattr."""
    data = pickle.dumps([Chosen().times, Chosen], protocol)
    assert b"c__builtin__\ngetattr\n" in data
    for one in (data, data.replace(b"c__builtin__", b"cbuiltins")):
        found = load(one, persistent=None, call=lambda *_: None)
        assert found.callables == (f"{__name__}.Chosen", f"{__name__}.Chosen.times")
        assert found.value[0].args[1] == "times"


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.usefixtures("older")
def test_a_merge_keeps_methods(tmp_path, legacy):
    """They load again, bound to the object of the template."""
    for k in range(2):
        value = {
            "net": Act(Act()),
            "scheduler": schedule().state_dict(),
            "hyper_parameters": {"f": Chosen(k + 5).times},
        }
        more = {"_use_new_zipfile_serialization": not legacy}
        torch.save(value, tmp_path / f"{k}.pt", **more)
    merge_checkpoints([tmp_path / "0.pt", tmp_path / "1.pt"], tmp_path / "out.pt")
    found = torch.load(tmp_path / "out.pt", weights_only=False)
    assert found["hyper_parameters"]["f"](2) == 10
    assert found["net"].act.__self__ is found["net"]
    assert found["net"].inner.act.__self__ is found["net"].inner
    assert found["scheduler"]["anneal_func"](1, 2, 3)[1:] == (1, 2, 3)
    one, other = (torch.load(tmp_path / f"{k}.pt", weights_only=False)["net"] for k in range(2))
    mean = (one.linear.weight.double() + other.linear.weight.double()) / 2
    assert torch.equal(found["net"].linear.weight, mean.float())
    names = {name.rpartition(".")[2] for _, name in scan(tmp_path / "out.pt").callables}
    assert names == {"Act", "_act", "Chosen", "times"}


def test_settings_of_lightning_hold_methods(monkeypatch):
    """Its dict of attributes stores what it gets, which may not be what a loader looks up."""
    module = types.ModuleType("lightning_fabric.utilities.data")
    module.AttributeDict = type("AttributeDict", (Entries,), {"__module__": module.__name__})
    for name in ("lightning_fabric", "lightning_fabric.utilities"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    value = module.AttributeDict(a=1, f=Chosen().times)
    assert read(pickle.dumps(value, 2)).pairs[0] == ("a", 1)
    entries = named("AttributeDict", module.__name__.encode()) + b")\x81S'append'\n"
    read(entries + METHOD + b"sS'more'\nK\1s.")
    for inner in (METHOD, FUNCTION):
        data = entries + inner + b"sK\1a."
        assert runs(data, Fast)
        with pytest.raises(DangerousPickleError, match="the method 'run'"):
            read(data)


def test_the_search_for_methods_is_paid_for():
    """Lists of lists unfold to far more than was read, and each call would look through them."""
    nest = b"]q\1" + b"".join(b"0](h\1h\1eq\1" for _ in range(60))
    many = METHOD + b"0" + nest + (named("use") + b"h\1\x85R0") * 20
    read(many + b"N.")  # what is shared is looked through once
    long = METHOD + b"0](" + b"K\1" * 30_000 + b"eq\1" + (named("use") + b"h\1\x85R0") * 500
    with pytest.raises(PickleError, match="more memory"):
        read(long + b"N.")


LOOKED_UP = ("append", "extend", "add", "items", "keys", "__setstate__", "setdefault", "function")
VALUES = (
    *(made(name) for name in ("Evil", "Plain", "Keeps", "Calls", "Entries", "Mapped", "Runs")),
    *(SPACE, SGD, b"}", b"]", b")", b"K\1", b"\x8f", *[METHOD] * 5, *[FUNCTION] * 2),
    *(named(name) for name in ("take", "use", "Takes")),
    *(named(name, b"builtins") for name in ("map", "list", "dict")),
    named("OrderedDict", b"collections") + b")R",
)
# What is done to the two values at the top of the stack, or to the one.
STEPS = (
    *[b"b"] * 3,
    *[b"a", b"R", b"\x81", b"0", b"\x86", b"q\10" + b"0(h\10K\1e", b"q\10" + b"0(h\10K\1\x90"],
    *(b"q\10" + b"0S'%b'\nh\10s" % key.encode() for key in LOOKED_UP),
)
ONE = (
    *[b"\x85", b"\x85R", b"\x85\x81", b"2", b"\x85Q", b"K\1a", b"K\1b"],
    *(b"q\10" + b"0}S'%b'\nh\10s" % key.encode() for key in LOOKED_UP),
    *(b"q\10" + b"0" + got(b"h\10", key) for key in ("run", "function", "append")),
)


def program(random):
    """Return a random pickle of objects, methods and what can be done with them."""
    parts, depth, stored = [], 0, 0
    for _ in range(random.randint(4, 20)):
        kind = random.random()
        if not depth or kind < 0.35:
            parts += [random.choice(VALUES), b"q" + bytes([stored % 8])]
            depth, stored = depth + 1, stored + 1
        elif kind < 0.45:
            parts.append(b"h" + bytes([random.randrange(min(stored, 8))]))
            depth += 1
        elif kind < 0.6 or depth < 2:
            parts.append(random.choice(ONE))
            depth += parts[-1] == b"2"
        else:
            parts.append(random.choice(STEPS))
            depth -= 1
    return b"".join(parts) + b"."


@pytest.mark.parametrize("seed", range(4))
def test_no_random_pickle_that_is_read_calls_a_method(seed):
    """Whatever is built of objects and their methods: it is refused, or runs none of them."""
    random, passed, ran = Random(seed), 0, 0  # noqa: S311
    for _ in range(2000):
        data = program(random)
        try:
            read(data)
        except MergeError:
            ran += runs(data, Fast)
            continue
        passed += b"getattr" in data
        assert not runs(data, Fast), data
        assert not runs(data, Loader), data
    assert passed > 30
    assert ran > 5
