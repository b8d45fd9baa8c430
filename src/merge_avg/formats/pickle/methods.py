"""Bound methods: getattr(object, "name") is data where nothing that a loader does can call it.

    {"anneal_func": getattr(OneCycleLR, "_annealing_cos")}    the state of an older scheduler, whose
        own attribute is the same method: state of OneCycleLR = {"anneal_func": getattr(...), ...}

A loader of a pickle, be it C or Python, calls

1.  what stands where a function does: REDUCE, NEWOBJ, NEWOBJ_EX, OBJ, INST;
2.  by way of such a call, what it gets: `map` calls its first argument;
3.  what it looks up on an object to change it: `__setstate__` for BUILD, `append` and `extend` for
    APPEND and APPENDS, `add` for ADDITEMS; and `items` of the state, unless that is a plain dict;
4.  by way of an object's `__setstate__` and the like, what its state holds.

So, as soon as a pickle has a method: functions are named (1); nothing in the arguments of a call,
or in a persistent id, leads to a method, however deep it lies, be it in what a tensor or a dict of
a known function was made of (2); an object that has its state is not changed again, so that lookups
find what its class has and not what the pickle put there, and the state is a plain dict, or two
(3); and an object holds no methods but its own, which the code of its class could call anyway, and
those that objects in it have of their own (4). A few classes call nothing, and may hold any; those
of optimizers call attributes of their state, and hold none.

What getattr itself runs is at most a property, the code of a class: so a method is refused, or
named to the user, like an attribute of the class that the pickle names. For what getattr finds in a
class, a member of an enum, see `names_a_member`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

from merge_avg.formats.pickle.callables import verdict
from merge_avg.formats.pickle.values import (
    DangerousPickleError,
    Global,
    Instance,
    Value,
    is_getter,
    names_a_class,
)

# Classes that store what they get, and those of one module.
_STORES = (
    "argparse.Namespace",
    "types.SimpleNamespace",
    "lightning.fabric.utilities.data.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "pytorch_lightning.utilities.parsing.AttributeDict",
)
_SCHEDULERS = "torch.optim.lr_scheduler."
_INNER = (dict, list, tuple, set, frozenset, Instance)
_VISIT = 20  # bytes that one step costs

Spend = Callable[[int], None]
# A value, the object that may hold methods of its own there, and whether it may hold any.
_Place = tuple[Value, Instance | None, bool]


def method_of(args: Value) -> tuple[Global, str] | None:
    """Return the class and name of the method that arguments of getattr name, if they may."""
    match args:
        case tuple((Instance() as one, str() as name)) if name.isidentifier():
            cls = _class_of(one)
            if cls and not name.startswith("__"):
                known = verdict(cls.module, f"{cls.name}.{name}")
                return None if known == "dangerous" else (cls, name)
    return None


def _class_of(one: Instance) -> Global | None:
    # Protocols 0 and 1 make objects by copyreg._reconstructor(class, object, None).
    made = one.function
    if isinstance(made, Global) and made.name == "_reconstructor" and isinstance(one.args, tuple):
        made = one.args[0]
    return made if isinstance(made, Global) and names_a_class(made) else None


def refuse_use(what: str) -> NoReturn:
    """Raise DangerousPickleError for a method that a loader could call."""
    hint = "if you made this file yourself, save it again without the method of an object in it"
    hint += ", or only state dicts; otherwise do not load it"
    raise DangerousPickleError(f"{what}, and so could run code when loaded", hint=hint)


def is_method(value: Value) -> bool:
    """Return whether a value is what getattr returned for an object."""
    found = type(value) is Instance and is_getter(value.function)
    return found and type(value.args[0]) is Instance


def check_call(args: Value, spend: Spend) -> None:
    """Raise DangerousPickleError if arguments of a call lead to a method."""
    _check([(args, None, False)], spend)


def check_items(items: Value, target: Instance, spend: Spend, *, looked_up: bool = False) -> None:
    """Raise the same if an object gets items or entries, and a loader could call a method.

    Whether `append` and the like are `looked_up`: entries may be attributes, as Lightning has them.
    """
    _check_target(target)
    places: list[_Place] = [(items, target, _is_store(target))]
    _check([*places, (target.pairs if looked_up else None, None, False)], spend)


def check_state(state: Value, target: Value, spend: Spend) -> None:
    """Raise the same if an object gets a state, and a loader could call a method."""
    _check_target(target)
    places: list[_Place] = []
    owner = None
    if isinstance(target, Instance):
        owner = None if _is_optimizer(target) else target
        places += [(one, None, False) for one in (target.args, target.items, target.pairs)]
    for part in state if isinstance(state, tuple) else (state,):
        plain = getattr(part, "state", None) is None and not isinstance(part, Instance)
        places.append((part, owner, _is_store(owner)) if plain else (part, None, False))
    _check(places, spend)


def _check_target(target: Value) -> None:
    if is_method(target) or getattr(target, "state", None) is not None:
        refuse_use("its pickle changes an object once more, whose attributes may be methods")


def _is_store(one: Instance | None) -> bool:
    name = str(one and _class_of(one))
    return name in _STORES or name.startswith(_SCHEDULERS)


def _is_optimizer(one: Instance) -> bool:
    return str(_class_of(one)).startswith("torch.optim.") and not _is_store(one)


def _check(pending: list[_Place], spend: Spend) -> None:
    seen: set[tuple[int, int, bool]] = set()
    while pending:
        value, owner, free = pending.pop()
        spend(_VISIT)
        if is_method(value):
            if not free and (owner is None or value.args[0] is not owner):
                refuse_use(f"its pickle hands on the method {value.args[1]!r} of an object")
            continue
        place = (id(value), id(owner), free)
        # What is known has what it was made of, as a tensor has its hooks, or a dict its default.
        inside = [getattr(value, "args", None), getattr(value, "state", None)]
        if not (isinstance(value, _INNER) or hasattr(value, "args")) or place in seen:
            continue
        seen.add(place)
        if isinstance(value, Instance):
            owner, free = owner and value, free and _is_store(value)
            inside += [value.function, value.items, value.pairs]
        elif isinstance(value, dict):
            inside += [*value, *value.values()]
        elif hasattr(value, "args"):  # a tensor
            owner, free = None, False
        else:
            inside += [*value]
        spend(_VISIT * len(inside))
        pending += [(one, owner, free) for one in inside]
